"""litgpt's GPT with its forward split: training, a prefill that seeds a cache, and decoding.

The modules and their state-dict keys are litgpt's; only attention and the path through the blocks are ours.

B rows · T tokens · C embedding size · V vocabulary · N length of the rope tables · E rotated elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import litgpt.model as base
from litgpt.config import Config
from litgpt.model import do_softcapping
from litgpt_kv.attention.rope import RopeTables, signed, theta_of
from litgpt_kv.attention.yarn import is_yarn, yarn_tables
from litgpt_kv.cache import KVCache
from litgpt_kv.cache.pieces import PromptReader
from litgpt_kv.cache.slots import Sharing
from litgpt_kv.cache.views import training_pass
from litgpt_kv.config import shown
from litgpt_kv.model.block import Block
from litgpt_kv.model.linear import speed_up


class GPT(base.GPT):
    """A decoder-only language model, for training and for generation with any cache.

    Every litgpt checkpoint loads: the state-dict keys are litgpt's. The ways to call it:

    - ``model(idx)``: training. (B, T) token ids give (B, T, V) logits, litgpt's to the bit.
    - ``model(idx, cache, length)``: prefill. Right-padded prompts (B, T) of ``length`` (B,) tokens seed an empty cache
      and give (B, V) logits at each row's last real token.
    - ``model(piece, cache.read_in_pieces(row, length))``: the next tokens (1, t) of a long prompt give (1, V) logits
      after the last of them; together the pieces do what one prefill does.
    - ``model(token, cache)``: decode. (B, 1) tokens, one a row at its own next position, give (B, 1, V). A block
      (B, T) gives (B, T, V): causal inside, equal to T single steps for strategies that score by recency; others evict
      for the whole block before it attends.

    Gradients flow through training and through a prefill's own tokens; what was read from a cache has none.

    Attributes:
        sharing: Where other devices hold the other heads, how a cache hears of them; None on one device.
        unquantized: After `to_int8`, the names of the layers that could not be quantized.
    """

    sharing: Sharing | None = None
    unquantized: Sequence[str] = ()
    _rope: tuple[Tensor, RopeTables] | None = None  # a class attribute: litgpt's LoRA models skip our __init__

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        if config.padded_vocab_size is None:
            raise ValueError(f"The config {config.name!r} has no padded_vocab_size.")
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                h=nn.ModuleList(self.block(config, i) for i in range(config.n_layer)),
                ln_f=config.norm_class(config.n_embd, eps=config.norm_eps),
            )
        )
        for module in self.modules():
            if isinstance(module, base.GroupedTopkRouter):
                self._init_weights(module)  # which litgpt leaves as the memory was
        speed_up(self)
        self.mask_cache: Tensor | None = None
        self.max_seq_length = config.block_size  # makes the rope tables

    block: type[Block] = Block
    """The class of the blocks."""

    def forward(
        self,
        idx: Tensor,
        cache: KVCache | PromptReader | None = None,
        length: Tensor | None = None,
        lm_head_chunk_size: int = 0,
    ) -> Tensor | list[Tensor]:
        """Logits of the tokens `idx` (B, T) int64; see the class for the ways to call it.

        Args:
            idx: Token ids, (B, T).
            cache: Where keys and values go; None for training.
            length: (B,) real tokens in each row of a right-padded prompt; given for a prefill and only then.
            lm_head_chunk_size: In training, compute the head in chunks of so many tokens and return their list.

        Raises:
            ValueError: If the cache cannot do what is asked: another batch size, rows not empty before a prefill, a
                block longer than the budget, a full dense cache, a position past the model's context, or rows that
                an earlier step left half-way.
        """
        self._check(idx, cache, length)
        x = self.embed(idx)  # a token outside of the vocabulary ends here, before the cache moves
        T = idx.size(1)
        if cache is None:
            step = training_pass([block.attn.spec for block in self.transformer.h], T, self.rope())
        elif length is not None:
            step = cache.begin_prefill(T, length, self.rope())
        else:
            step = cache.begin_decode(T, self.rope())
        for block, view in zip(self.transformer.h, step.views):
            x = block(x, view)
        x = self.transformer.ln_f(x)  # (B, T, C), or (B, 1, C) where only the last tokens are wanted
        if step.rereading is not None:  # for the attention that it pays to the tokens, not for its output
            for part, views in step.rereading.parts(idx):
                read = self.embed(part)
                for block, view in zip(self.transformer.h, views):
                    read = block(read, view)
        step.commit()
        if step.last_only:
            x = x.squeeze(1)  # (B, C)
        elif lm_head_chunk_size > 0:
            return [self.head(part) for part in x.split(lm_head_chunk_size, dim=1)]
        return self.head(x)  # (B, V) or (B, T, V)

    def _check(self, idx: Tensor, cache: KVCache | PromptReader | None, length: Tensor | None) -> None:
        if not isinstance(idx, Tensor):
            raise TypeError(f"Tokens must be a tensor of shape (B, T), got {shown(idx)}.")
        if idx.dim() != 2:
            raise ValueError(f"Tokens must have shape (B, T), got {tuple(idx.shape)}.")
        if idx.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"Tokens must be integers, int64 or int32, got {idx.dtype}.")
        B, T = idx.shape
        if cache is not None and not isinstance(cache, (KVCache, PromptReader)):
            raise TypeError(f"cache must be a KVCache or None, got {shown(cache)}.")
        if cache is not None and cache.batch_size != B:
            raise ValueError(f"The cache has {cache.batch_size} rows, the tokens have {B}.")
        if length is not None and cache is None:
            raise ValueError("A length without a cache means nothing: pass the cache to seed.")
        if (cache is None or length is not None) and T > self.max_seq_length:
            hint = "" if cache is None else " The min-length prefill reads longer prompts into a cache that evicts."
            raise ValueError(f"Cannot forward {T} tokens, the model's context is {self.max_seq_length}.{hint}")

    def embed(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) to (B, T, C)."""
        x = self.transformer.wte(idx)
        return x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype) if self.config.scale_embeddings else x

    def head(self, x: Tensor) -> Tensor:
        """x (..., C) to logits (..., V)."""
        logits = self.lm_head(x)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else do_softcapping(logits, cap)

    def rope_cache(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin (N, E) of all positions: litgpt's, but for YaRN, which is turned the right way round."""
        tables = super().rope_cache(device)  # which checks the config, too
        return yarn_tables(self.config, self.max_seq_length, device) if is_yarn(self.config) else tables

    def rope(self) -> RopeTables:
        """The rope tables of each base, made once for the buffers that litgpt keeps."""
        if self._rope is None or self._rope[0] is not self.sin:
            with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode cannot be trained with
                self._rope = self.sin, self.make_rope(self.cos, self.sin)
        return self._rope[1]

    def make_rope(self, cos: Tensor, sin: Tensor) -> RopeTables:
        """Rope tables from litgpt's cos and sin, (N, E) or (N, E, bases)."""
        size = self.config.rope_n_elem
        if self.config.rope_indices is None:
            return RopeTables([(cos, signed(sin, size))], [0] * self.config.n_layer)
        pairs = [(cos[..., i].contiguous(), signed(sin[..., i], size)) for i in range(cos.size(-1))]
        return RopeTables(pairs, list(self.config.rope_indices))

    def theta(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What one position turns and the amplitudes, for each pair of `rope()`; exact where the tables were cast."""
        if self.cos.dtype == torch.float64:
            rope = self.rope()
        else:  # made anew: a cast to bfloat16 and back leaves no trace but the rounding
            rope = self.make_rope(*self.rope_cache(self.cos.device))
        return [theta_of(pair) for pair in rope.tables]
