"""litgpt's GPT with its forward split: a pass for training that may seed a cache, and decoding. Floor 4.

The modules and their state-dict keys are litgpt's; only attention and the way through the blocks are ours.

B rows · T tokens · H query heads · G key/value heads · D head size · C embedding size · V vocabulary ·
E rotated elements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import litgpt.model as base
from litgpt.config import Config
from litgpt.model import do_softcapping
from litgpt_kv.attention.eager import Masks, attend, attend_last, attend_mass, mass, queries_at
from litgpt_kv.attention.rope import Angles, halves, rotate, theta_of
from litgpt_kv.attention.yarn import is_yarn, yarn_tables
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.layer import Turn
from litgpt_kv.cache.slots import Sharing
from litgpt_kv.compat.input_pos import Attached, attach, dense_cache
from litgpt_kv.config import layer_facts
from litgpt_kv.model.latent import MultiheadLatentAttention
from litgpt_kv.model.linear import speed_up


class GPT(base.GPT):
    """A decoder-only language model, for training and for generation with any cache.

    Every litgpt checkpoint loads: the state-dict keys are litgpt's. The three ways to call it:

    - ``model(idx)``: training. (B, T) token ids give (B, T, V) logits, litgpt's to the bit.
    - ``model(idx, cache, length)``: prefill. Right-padded prompts (B, T) of ``length`` (B,) tokens seed an empty cache
      and give (B, V) logits at each row's last real token.
    - ``model(token, cache)``: decode. (B, 1) tokens, one a row at its own next position, give (B, 1, V). A block
      (B, T) gives (B, T, V): causal inside, equal to T single steps for strategies that rank by recency; others evict
      for the whole block before it attends.

    Gradients flow through training and through a prefill's own tokens; what was read from a cache has none.

    Attributes:
        sharing: Where other devices hold the other heads, how a cache hears of them; None on one device.
    """

    sharing: Sharing | None = None

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        if config.padded_vocab_size is None:
            raise ValueError(f"The config {config.name!r} has no padded_vocab_size.")
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
                ln_f=config.norm_class(config.n_embd, eps=config.norm_eps),
            )
        )
        for module in self.modules():
            if isinstance(module, base.GroupedTopkRouter):
                self._init_weights(module)  # which litgpt leaves as the memory was
        speed_up(self)
        self.mask_cache: Tensor | None = None
        self.max_seq_length = config.block_size  # makes the rope tables

    def forward(
        self,
        idx: Tensor,
        cache: KVCache | Tensor | None = None,
        length: Tensor | int | None = None,
        lm_head_chunk_size: int = 0,
        *,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Logits of the tokens `idx` (B, T) int64; see the class for the three ways to call it.

        Args:
            idx: Token ids, (B, T).
            cache: Where keys and values go; None for training.
            length: (B,) real tokens in each row of a right-padded prompt; given for a prefill and only then.
            lm_head_chunk_size: In training, compute the head in chunks of so many tokens and return their list.
            input_pos, input_pos_maxp1: litgpt's way to call, also in the places of `cache` and `length`: the tokens'
                positions (T,) or (B, T), and one more than the largest; after `set_kv_cache`. It gives (B, T, V).

        Raises:
            ValueError: If the cache cannot do what is asked: another batch size, rows not empty before a prefill, a
                block longer than the budget, a full dense cache, or a position past the model's context.
        """
        if idx.dim() != 2:
            raise ValueError(f"Tokens must have shape (B, T), got {tuple(idx.shape)}.")
        B, T = idx.shape
        attached = input_pos is not None or isinstance(cache, Tensor)
        if attached:  # litgpt's own code
            cache, length = Attached.of(self, idx, cache, length, input_pos, input_pos_maxp1), None
        if cache is not None and cache.batch_size != B:
            raise ValueError(f"The cache has {cache.batch_size} rows, the tokens have {B}.")
        if length is not None and cache is None:
            raise ValueError("A length without a cache means nothing: pass the cache to seed.")
        whole = cache is None or length is not None or (attached and cache.fresh)
        if whole and T > self.max_seq_length:
            hint = "" if cache is None else " The min-length prefill reads longer prompts into a cache that evicts."
            raise ValueError(f"Cannot forward {T} tokens, the model's context is {self.max_seq_length}.{hint}")
        tables, which = self._rope()
        x = self.transformer.wte(idx)  # (B, T, C); a token outside of the vocabulary ends here, before the cache moves
        if self.config.scale_embeddings:
            x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)

        turns: list[Turn] | list[None] = [None] * len(which)
        if whole:
            angles = [(cos[:T].unsqueeze(0), sin[:T].unsqueeze(0)) for cos, sin in tables]
            if cache is not None:
                turns = cache.begin_prompt(T, length, angles, which)
        else:
            angles, turns = [], cache.begin(T, tables, which)

        masks = Masks() if whole else None
        for i, (block, table, turn) in enumerate(zip(self.transformer.h, which, turns)):
            # a prefill needs every key and value of the last layer, but only the output of each row's last token
            last = length.to(x.device) - 1 if length is not None and i == len(which) - 1 else None
            x = block(x, angles[table] if whole else None, turn, last, masks=masks)

        if cache is None or attached:
            x = self.transformer.ln_f(x)
            if lm_head_chunk_size > 0:
                return [self._head(part) for part in x.split(lm_head_chunk_size, dim=1)]
            return self._head(x)  # (B, T, V)
        if length is not None:
            cache.end_prompt(length)
            x = x.squeeze(1)  # (B, C)
        else:
            cache.end(turns)
        return self._head(self.transformer.ln_f(x))  # (B, V) or (B, T, V)

    def set_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int | None = None,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """litgpt's: gives every layer a cache for `model(idx, input_pos)`. Nothing else here needs one.

        Args:
            batch_size: The most rows of a pass. max_seq_length: Positions; None: the model's `max_seq_length`.
            rope_cache_length: Not needed. device, dtype: Of the buffers; None: each layer's own.
        """
        size = self.max_seq_length if max_seq_length is None else max_seq_length
        self.mask_cache = attach(self, batch_size, size, device=device, dtype=dtype)

    def _head(self, x: Tensor) -> Tensor:
        logits = self.lm_head(x)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else do_softcapping(logits, cap)

    def rope_cache(self, device: torch.device | None = None) -> Angles:
        """cos and sin (N, E) of all positions: litgpt's, but for YaRN, which is turned the right way round."""
        tables = super().rope_cache(device)  # which checks the config, too
        return yarn_tables(self.config, self.max_seq_length, device) if is_yarn(self.config) else tables

    def theta(self) -> list[Angles]:
        """What one position turns and the amplitude, for each rope base; exact where the tables were cast."""
        if self.cos.dtype == torch.float64:
            tables = self._rope()[0]
        else:  # made anew: a cast to bfloat16 and back leaves no trace but the rounding
            cos, sin = self.rope_cache(self.cos.device)
            tables = [(cos, sin)] if cos.dim() == 2 else [(cos[..., i], sin[..., i]) for i in range(cos.size(-1))]
        return [theta_of(cos, sin) for cos, sin in tables]

    def _rope(self) -> tuple[list[Angles], list[int]]:
        """The rope tables (N, E), one pair for each rope base, and which of them each layer uses."""
        if self.config.rope_indices is None:
            return [(self.cos, self.sin)], [0] * self.config.n_layer
        bases = range(self.cos.size(-1))
        return [(self.cos[..., i], self.sin[..., i]) for i in bases], list(self.config.rope_indices)


class Block(base.Block):
    """litgpt's block, with our attention and a layer's part of a pass instead of a mask and positions."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        # the class alone: made anew, its weights would no longer be those that litgpt draws from the same seed
        self.attn.__class__ = MultiheadLatentAttention if config.latent_attention else CausalSelfAttention
        self.attn.facts = layer_facts(config, block_idx)

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        turn: Turn | None = None,
        last: Tensor | None = None,
        *litgpts: Any,
        masks: Masks | None = None,
    ) -> Tensor:
        """x (B, T, C) through attention and MLP.

        Args:
            x: Hidden states.
            angles: Of the positions, for a whole pass; None for new tokens.
            turn: This layer's part of a pass with a cache.
            last: (B,) the only tokens whose output is wanted; it is then (B, 1, C).
            masks: Of a whole pass, for all layers.
        """
        if isinstance(angles, Tensor):  # litgpt's arguments: cos, sin, mask, input_pos, input_pos_maxp1
            return super().forward(x, angles, turn, last, *litgpts)
        normed = self.norm_1(x)
        attended = self.post_attention_norm(self.attn(normed, angles, turn, last, masks=masks))
        if last is not None:
            x, normed = (tokens_at(z, last) for z in (x, normed))
        if self.config.parallel_residual:
            if not self.config.shared_attention_norm:
                normed = self.norm_2(x)
            x = attended + x
        else:
            x = attended + x
            normed = self.norm_2(x)
        return self.post_mlp_norm(self.mlp(normed)) + x


class CausalSelfAttention(base.CausalSelfAttention):
    """litgpt's attention module with three short forwards: whole sequence, whole sequence that seeds, new tokens."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        self.facts = layer_facts(config, block_idx)

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        turn: Turn | None = None,
        last: Tensor | None = None,
        *litgpts: Any,
        masks: Masks | None = None,
    ) -> Tensor:
        """x (B, T, C) to (B, T, C), or to (B, 1, C) for the tokens `last` (B,) alone."""
        if isinstance(angles, Tensor):  # litgpt's arguments, see Block
            return super().forward(x, angles, turn, last, *litgpts)
        qk, v = self.heads(x)
        y = self.new(qk, v, turn) if angles is None else self.whole(qk, v, angles, turn, last, masks)  # (B, T, H, D)
        return self.proj(y.flatten(2))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Projects x (B, T, C) to unrotated queries and keys (B, H + G, T, D) and values (B, G, T, D).

        Queries and keys stay one tensor, as they are rotated alike.
        """
        config, size = self.config, self.config.head_size
        H, G = config.n_head, config.n_query_groups
        qkv = self.qkv(x)
        if config.norm_qk and config.norm_qk_type == "olmo2":  # over the whole projection
            q, k, v = qkv.split((H * size, G * size, G * size), dim=-1)
            qkv = torch.cat((self.norm_q(q), self.norm_k(k), v), dim=-1)
        qk, v = qkv.unflatten(-1, (H + 2 * G, size)).transpose(1, 2).split((H + G, G), dim=1)
        if config.norm_qk and config.norm_qk_type == "default":  # a head at a time
            q, k = qk.split((H, G), dim=1)
            qk = torch.cat((self.norm_q(q), self.norm_k(k)), dim=1)
        if config.rope_interleave:
            qk = halves(qk, config.rope_n_elem)
        return qk, v

    def whole(
        self, qk: Tensor, v: Tensor, angles: Angles, turn: Turn | None, last: Tensor | None, masks: Masks | None
    ) -> Tensor:
        """A whole sequence, or its tokens `last`, attends to itself; with a turn, it seeds the cache."""
        facts = self.facts
        math = {"scale": facts.scale, "softcap": facts.softcap, "window": facts.window}
        q, k = rotate(qk, angles, facts.rope_size).split((facts.heads, facts.groups), dim=1)
        one, how = q, partial(attend, **math, masks=masks)
        if last is not None:
            one = queries_at(q, last)
            how = partial(attend_last, last=last, **math)
        y = self.scaled_dot_product_attention(one, k, v, how)
        if turn is not None:
            layer, step = turn.layer, turn.step
            received = mass(q, k, step.length, layer.observes, **math) if layer.observes else None
            layer.seed(step, q, qk[:, facts.heads :] if layer.raw else k, v, received)
        return y

    def new(self, qk: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """New tokens enter the cache and attend to what it keeps."""
        facts, layer, step = self.facts, turn.layer, turn.step
        size = facts.rope_size
        q, k = rotate(qk, turn.angles, size).split((facts.heads, facts.groups), dim=1)
        far = None
        if turn.far is not None:
            far = rotate(qk[:, : facts.heads], turn.far[0], size), turn.far[1]
        keys, values = layer.extend(step, qk[:, facts.heads :] if layer.raw else k, v, q)
        if turn.ranked is not None:
            keys = rotate(keys, turn.keys, size)

        def over_cache(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            math = {"scale": facts.scale, "softcap": facts.softcap, "far": far, "want_mass": layer.observes != 0}
            y, received = attend_mass(q, keys, values, turn.mask, **math)
            if received is not None:
                layer.observe(step, received)
            return y

        return self.scaled_dot_product_attention(q, keys, values, over_cache)

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Callable[[Tensor, Tensor, Tensor], Tensor] | Tensor | None = None
    ) -> Tensor:
        """q (B, H, T, D), k and v to (B, T, H, Dv): litgpt's name for what adapters wrap, and every pass comes through.

        `mask` says how: a function of q, k and v to (B, H, T, Dv), or litgpt's masks, of which it adds the boolean ones
        to softcapped scores; here they mask.
        """
        if callable(mask):
            return mask(q, k, v).transpose(1, 2)
        if mask is not None and mask.dtype == torch.bool and self.facts.softcap is not None:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        return super().scaled_dot_product_attention(q, k, v, mask)

    def build_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> base.KVCache:
        """litgpt's: this layer's part of `GPT.set_kv_cache`."""
        return dense_cache(self, batch_size, max_seq_length, device, dtype)


def tokens_at(x: Tensor, pos: Tensor) -> Tensor:
    """One token a row: x (B, T, C) at pos (B,) is (B, 1, C)."""
    return x.gather(1, pos.view(-1, 1, 1).expand(-1, 1, x.size(-1)))
