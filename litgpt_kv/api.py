"""`LLM`: a checkpoint and its tokenizer in one object, with litgpt's method names. Floor 6."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from litgpt.config import Config
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from litgpt_kv import checkpoint
from litgpt_kv.cache import KVCache
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Stats, stream
from litgpt_kv.generate.text import TextStream
from litgpt_kv.model import GPT
from litgpt_kv.parallel import Place, Way, way_of


class LLM:
    """A model that turns text into text.

    Attributes:
        model: The `GPT`, in inference mode. tokenizer, prompt_style, config, checkpoint_dir: as in litgpt's `LLM`.
        fabric: The device and precision.
        stats: What the last run did, in tokens and seconds.
        cache: The last run's cache, None without one.
        way: How several devices share the work; None on one.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompt_style: PromptStyle,
        config: Config,
        checkpoint_dir: Path | None,
        fabric: L.Fabric,
    ) -> None:
        self.model, self.tokenizer, self.prompt_style = model, tokenizer, prompt_style
        self.config, self.checkpoint_dir, self.fabric = config, checkpoint_dir, fabric
        self.stats, self.cache = Stats(), None
        self._decoder = model
        self.way: Way | None = None

    @classmethod
    def load(
        cls,
        model: str | Path,
        init: str = "pretrained",
        tokenizer_dir: str | Path | None = None,
        *,
        precision: str | None = None,
        accelerator: str = "auto",
        distribute: str | None = "auto",
    ) -> LLM:
        """Loads a checkpoint in litgpt's layout.

        Args:
            model: A checkpoint folder, a name below `checkpoints/`, or "demo" for the shipped model. With
                `init="random"`, the name of one of litgpt's configs.
            init: "pretrained" or "random".
            tokenizer_dir: Where the tokenizer is, if not beside the weights; needed for `init="random"`.
            precision: Lightning Fabric's name; None is "32-true" on a CPU and "bf16-true" (or "16-true") on a GPU.
            accelerator: "auto", "cpu", "cuda" or "mps".
            distribute: None loads no weights yet: the method `distribute` will.

        Raises:
            ValueError: If the checkpoint is missing, incomplete or corrupt, or an argument is unknown.
        """
        if init not in ("pretrained", "random"):
            raise ValueError(f"init must be 'pretrained' or 'random', got {init!r}.")
        fabric = checkpoint.fabric_for(precision, accelerator)
        folder = None
        if init == "pretrained":
            folder = checkpoint.find(model)
            config = checkpoint.load_config(folder)
            gpt = None if distribute is None else checkpoint.load_model(folder, config, fabric)
        else:
            if tokenizer_dir is None:
                raise ValueError("init='random' needs a tokenizer_dir.")
            config = Config.from_name(str(model))
            with fabric.init_module():
                gpt = GPT(config).eval()
        tokenizer = checkpoint.load_tokenizer(Path(tokenizer_dir or folder))
        style = checkpoint.load_prompt(folder, config) if folder else PromptStyle.from_config(config)
        return cls(
            fabric.setup_module(gpt) if gpt is not None and "mixed" in fabric._precision.precision else gpt,
            tokenizer,
            style,
            config,
            folder,
            fabric,
        )

    def distribute(
        self,
        accelerator: str = "auto",
        devices: int | str = "auto",
        num_nodes: int = 1,
        precision: str | None = None,
        generate_strategy: str | None = None,
    ) -> None:
        """Loads the checkpoint onto several devices; `generate` then runs on all of them.

        With "tensor_parallel" and "data_parallel" every device has a process of its own, which Lightning Fabric starts
        by running this script again (or torchrun or SLURM has started): each process goes on from here and must make
        the same calls. All get the same results; `llm.fabric.is_global_zero` tells one of them.

        Args:
            accelerator: "auto", "cpu", "cuda" or "mps".
            devices: How many on each node, or "auto" for all.
            num_nodes: How many machines.
            precision: See `load`; not one of the mixed ones.
            generate_strategy: "tensor_parallel", "sequential" or "data_parallel".

        Raises:
            ValueError: If the model cannot be divided so, or an argument is unknown.
        """
        way = way_of(generate_strategy)
        if self.checkpoint_dir is None:
            raise ValueError("A model with random weights cannot be distributed: each process would draw its own.")
        place = Place(accelerator, devices, num_nodes, checkpoint.precision_for(precision, accelerator))
        self.model = self._decoder = self.cache = None  # what one device has makes room
        self.way = way(self.config, checkpoint.read_weights(self.checkpoint_dir), place)
        self.fabric, self.model = self.way.fabric, self.way.model
        self._decoder = self.model

    def close(self) -> None:
        """Ends a run of several processes, waiting for all; the end of the script does the same."""
        if self.way is not None:
            self.way.close()

    def compile(self) -> None:
        """Compiles the decode step; the first steps then take a while, the others are faster."""
        self._decoder = torch.compile(self.model, dynamic=False)

    def encode(self, prompt: str, sys_prompt: str | None = None) -> Tensor:
        """A prompt in the model's prompt style as token ids, 1-D int64."""
        if not isinstance(prompt, str):
            raise ValueError(f"A prompt is a text, got {prompt!r}.")
        if not prompt:
            raise ValueError("The prompt is empty.")
        ids = self.tokenizer.encode(self.prompt_style.apply(prompt, sys_prompt=sys_prompt), device=self.fabric.device)
        if not len(ids):
            raise ValueError(f"The prompt {prompt!r} has no tokens.")
        return ids.long()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(torch.tensor(ids, dtype=torch.int64)) if len(ids) else ""

    def generate(
        self,
        prompt: str | Sequence[str],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        *,
        kv_cache: str | KVCacheArgs | None = "dense",
        budget: int | str | None = None,
        prefill: str = "min-length",
        prefill_chunk: int | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
    ) -> str | Tensor | list[str] | list[Tensor] | Iterator[str] | Iterator[list[str]]:
        """Continues a prompt, or several of any lengths in one batch.

        Args:
            prompt: Text, or a list of texts.
            sys_prompt: For prompt styles that have one.
            max_new_tokens: The most new tokens of each prompt.
            temperature, top_k, top_p, seed: See `SamplingArgs`.
            return_as_token_ids: Return 1-D int64 tensors instead of text.
            stream: Return an iterator over pieces of text as they are made; of lists of pieces for a list of prompts.
            kv_cache: A strategy's name, or all of `KVCacheArgs`; None or "none" computes the whole text again at
                every step.
            budget: Tokens kept, instead of that of `kv_cache`.
            prefill: "min-length" (token by token beyond the shortest prompt) or "full" (one padded pass).
            prefill_chunk: See `litgpt_kv.generate.stream`.
            ignore_eos: Go on when the model ends its text.

        Returns:
            The new text, without the prompt; a list for a list of prompts.

        Raises:
            ValueError: If a prompt is empty, does not fit the model's context, or an argument is out of range.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r}.")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = [self.encode(text, sys_prompt) for text in texts]
        kv_cache = None if kv_cache == "none" else kv_cache
        args = KVCacheArgs(strategy=kv_cache) if isinstance(kv_cache, str) else kv_cache
        if not (args is None or isinstance(args, KVCacheArgs)):
            raise ValueError(f"kv_cache must be a strategy's name, KVCacheArgs or None, got {kv_cache!r}.")
        if budget is not None:
            if args is None:
                raise ValueError(f"Without a cache there is no budget, got {budget}.")
            args = replace(args, budget=budget)
        if stream and return_as_token_ids:
            raise ValueError("stream=True gives text; for tokens as they are made see litgpt_kv.generate.stream.")
        sampling = SamplingArgs(temperature, top_k, top_p, seed)
        steps = self.steps(ids, args, max_new_tokens, sampling, prefill, prefill_chunk, ignore_eos)
        if stream:
            pieces = self.pieces(ids, steps)
            return (row[0] for row in pieces) if isinstance(prompt, str) else pieces
        rows: list[list[int]] = [[] for _ in ids]
        for step in steps:
            for row, tokens in zip(rows, step):
                row += tokens
        if return_as_token_ids:
            out = [torch.tensor(row, dtype=torch.int64) for row in rows]
        else:
            out = [TextStream(self.decode, before.tolist()).push(row, last=True) for before, row in zip(ids, rows)]
        return out[0] if isinstance(prompt, str) else out

    def steps(
        self,
        ids: list[Tensor],
        args: KVCacheArgs | None,
        max_new_tokens: int,
        sampling: SamplingArgs,
        prefill: str = "min-length",
        prefill_chunk: int | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[list[list[int]]]:
        """The token level of `generate`: see `litgpt_kv.generate.stream` for what it yields."""
        if self.model is None:
            raise ValueError("No weights are loaded: call distribute() first, or load without distribute=None.")

        def work(ids: list[Tensor], sampling: SamplingArgs) -> tuple[Iterator[list[list[int]]], Stats]:
            steps = self._steps(ids, args, max_new_tokens, sampling, prefill, prefill_chunk, ignore_eos)
            return steps, self.stats

        return work(ids, sampling)[0] if self.way is None else self.way.steps(work, ids, sampling)

    def _steps(
        self,
        ids: list[Tensor],
        args: KVCacheArgs | None,
        max_new_tokens: int,
        sampling: SamplingArgs,
        prefill: str,
        prefill_chunk: int | None,
        ignore_eos: bool,
    ) -> Iterator[list[list[int]]]:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        self.stats, self.cache = Stats(), None
        if args is not None:
            tokens = max(map(len, ids), default=1) + max_new_tokens - 1
            if self._decoder is not self.model and tokens <= self.model.max_seq_length:
                tokens = min(-(-tokens // 128) * 128, self.model.max_seq_length)  # few sizes: each is compiled once
            mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # what autocast makes of keys and values
            dtype = mixed.get(self.fabric._precision.precision)
            self.cache = KVCache.build(self.model, args, max(1, len(ids)), tokens, dtype)
        stop = [] if ignore_eos else [s for s in self.prompt_style.stop_tokens(self.tokenizer) if None not in s]
        return stream(
            self.model,
            ids,
            self.cache,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            prefill=prefill,
            prefill_chunk=prefill_chunk,
            decoder=self._decoder,
            stats=self.stats,
        )

    def pieces(self, ids: list[Tensor], steps: Iterator[list[list[int]]]) -> Iterator[list[str]]:
        texts = [TextStream(self.decode, before.tolist()) for before in ids]
        for step in steps:
            yield [text.push(tokens) if tokens else "" for text, tokens in zip(texts, step)]
        yield [text.push([], last=True) for text in texts]
