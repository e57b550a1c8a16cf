"""`LLM`: a checkpoint and its tokenizer in one object, with litgpt's method names. Floor 6."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from litgpt.config import Config
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.config import KVCacheArgs, SamplingArgs, check_whole, shown
from litgpt_kv.generate import Request, Stats, raise_failed
from litgpt_kv.generate.text import stop_texts
from litgpt_kv.llm import checkpoint
from litgpt_kv.llm.chat import Chat
from litgpt_kv.llm.run import Pieces, Run
from litgpt_kv.model.gpt import GPT
from litgpt_kv.parallel import Place, Way, way_of


class LLM:
    """A model that turns text into text.

    Attributes:
        model: The `GPT`, in inference mode. tokenizer, prompt_style, config, checkpoint_dir: as in litgpt's `LLM`.
        fabric: The device and precision.
        last_run: The last run that ended, None before the first.
        decoder: Runs the one-token steps: the model, or what `compile` made of it.
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
        self.last_run: Run | None = None
        self.decoder = model
        self.way: Way | None = None

    @property
    def stats(self) -> Stats:
        """What the last run that ended did, in tokens and seconds."""
        return Stats() if self.last_run is None else self.last_run.stats

    @property
    def cache(self) -> KVCache | None:
        """The cache of the last run that ended; None without one."""
        return None if self.last_run is None else self.last_run.cache

    @classmethod
    def load(
        cls,
        model: str | Path,
        init: str = "pretrained",
        tokenizer_dir: str | Path | None = None,
        *,
        precision: str | None = None,
        accelerator: str = "auto",
        quantize: str | None = None,
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
            quantize: Quantize weights as they are loaded, litgpt's way, with bitsandbytes on an NVIDIA GPU: "bnb.nf4",
                "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq" or "bnb.int8".
            distribute: None loads no weights yet: the method `distribute` will.

        Raises:
            ValueError: If the checkpoint is missing, incomplete or corrupt, or an argument is unknown.
        """
        if init not in ("pretrained", "random"):
            raise ValueError(f"init must be 'pretrained' or 'random', got {init!r}.")
        if quantize is not None and distribute is None:
            raise ValueError("Quantized weights are for one device: leave out quantize, or distribute=None.")
        fabric = checkpoint.fabric_for(precision, accelerator, quantize)
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
        wrapped = quantize is not None or "mixed" in fabric._precision.precision
        return cls(
            fabric.setup_module(gpt) if gpt is not None and wrapped else gpt,
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
        self.model = self.decoder = self.last_run = None  # what one device has makes room
        self.way = way(self.config, checkpoint.read_weights(self.checkpoint_dir), place)
        self.fabric, self.model = self.way.fabric, self.way.model
        self.decoder = self.model

    def close(self) -> None:
        """Ends a run of several processes, waiting for all; the end of the script does the same."""
        if self.way is not None:
            self.way.close()

    def compile(self) -> None:
        """Compiles the decode step; the first steps then take a while, the others are faster."""
        self.decoder = torch.compile(self.model, dynamic=False)

    def encode(self, prompt: str, sys_prompt: str | None = None) -> Tensor:
        """A prompt in the model's prompt style as token ids, 1-D int64."""
        if not isinstance(prompt, str):
            raise ValueError(f"A prompt is a text, got {shown(prompt)}.")
        if not prompt:
            raise ValueError("The prompt is empty.")
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ValueError(f"The prompt {prompt!r:.60} has half of a surrogate pair, which is no text.")
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
        batch_size: int | None = None,
        prefill: str = "min-length",
        prefill_chunk: int | None = None,
        min_new_tokens: int = 0,
        stop: str | Sequence[str] = (),
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        ignore_eos: bool = False,
        logprobs: bool = False,
    ) -> str | Tensor | list[str] | list[Tensor] | Iterator[str] | Iterator[list[str]]:
        """Continues a prompt, or several of any lengths.

        Args:
            prompt: Text, or a list of texts.
            sys_prompt: For prompt styles that have one.
            max_new_tokens: The most new tokens of each prompt.
            temperature, top_k, top_p, repetition_penalty, seed: See `SamplingArgs`; one value, or one a prompt.
            return_as_token_ids: Return 1-D int64 tensors instead of text.
            stream: Return an iterator over pieces of text as they are made, with `stats` of its own; over lists of
                pieces for a list of prompts.
            kv_cache: A strategy's name, or all of `KVCacheArgs`; None or "none" computes the whole text again at
                every step.
            budget: Tokens kept, instead of that of `kv_cache`.
            batch_size: Prompts at a time; when one ends the next takes its place. None: all at once.
            prefill: "min-length" (each prompt in one pass as far as the budget allows, the rest in blocks or token by
                token) or "full" (one padded pass, then compressed to the budget).
            prefill_chunk: See `litgpt_kv.generate.stream`.
            min_new_tokens: The end of the model's text and `stop` count only after so many.
            stop: A text that ends the output and is not part of it, or several.
            ignore_eos: Go on when the model ends its text.
            logprobs: Fill `stats.logprobs`: one list of log-probabilities for each prompt.

        Returns:
            The new text, without the prompt; a list for a list of prompts.

        Raises:
            ValueError: If a prompt is empty, does not fit the model's context, or an argument is out of range; at the
                end if the model's logits were not finite for one of them.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise ValueError(f"prompt must be a text or a list of texts, got {shown(prompt)}.")
        if stream and return_as_token_ids:
            raise ValueError("stream=True gives text; for tokens as they are made see litgpt_kv.generate.stream.")
        args = KVCacheArgs.of(kv_cache, budget)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        sampling = SamplingArgs(temperature, top_k, top_p, seed, repetition_penalty).rows(len(texts))
        requests = [
            self.request(text, b, sys_prompt, max_new_tokens, min_new_tokens, sampling[b], stop, ignore_eos)
            for b, text in enumerate(texts)
        ]
        run = self.run(requests, args, batch_size, prefill, prefill_chunk, logprobs)
        if stream:
            return Pieces(run, single=isinstance(prompt, str))
        sequences = run.sequences()
        raise_failed(sequences)
        out = [torch.tensor(s.tokens, dtype=torch.int64) if return_as_token_ids else s.text for s in sequences]
        return out[0] if isinstance(prompt, str) else out

    def request(
        self,
        prompt: str,
        id: int | None = None,
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        min_new_tokens: int = 0,
        sampling: SamplingArgs | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Request:
        """A prompt and its settings, as `run` takes them; the arguments are those of `generate`."""
        ids, ends = self.encode(prompt, sys_prompt), () if ignore_eos else self.ends()
        sampling = SamplingArgs() if sampling is None else sampling
        return Request(ids, max_new_tokens, min_new_tokens, sampling, ends, stop_texts=stop_texts(stop), id=id)

    def ends(self) -> list[list[int]]:
        """The token sequences with which the model ends its text, by its prompt style."""
        return [list(stop) for stop in self.prompt_style.stop_tokens(self.tokenizer) if None not in stop]

    def run(self, requests: Sequence[Request], args: KVCacheArgs | None, *options: Any, **named: Any) -> Run:
        """Answers requests; see `Run` for the options, and for what it gives."""
        return Run(self, requests, args, *options, **named)

    def build_cache(self, args: KVCacheArgs, batch_size: int, tokens: int) -> KVCache:
        """A cache in the dtype of this model's keys and values; `tokens` are what a row will see."""
        if self.decoder is not self.model and tokens <= self.model.max_seq_length:
            args = args.resolved(tokens)  # a share of what a row will see, not of the rounded number
            tokens = min(-(-tokens // 128) * 128, self.model.max_seq_length)  # few sizes: each is compiled once
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # what autocast makes of keys and values
        return KVCache.build(self.model, args, batch_size, tokens, mixed.get(self.fabric._precision.precision))

    def chat(self, sys_prompt: str | None = None, *, kv_cache: str | KVCacheArgs = "dense", **settings: Any) -> Chat:
        """A conversation whose cache stays between turns; see `Chat`."""
        return Chat(self, sys_prompt, kv_cache=kv_cache, **settings)

    def benchmark(self, num_iterations: int = 1, **kwargs: Any) -> tuple[Any, dict[str, list[float]]]:
        """Times `generate`, whose arguments it takes; litgpt's names and units, one value an iteration.

        Returns:
            The last output, and lists of "Seconds total", "Seconds to first token" (all the time prompts took), "Tokens
            generated", "Inference speed in tokens/sec" (all tokens over all seconds), "Prefill speed in tokens/sec",
            "Decode speed in tokens/sec", "Cache memory allocated in GB", and on a GPU "Total GPU memory allocated in
            GB". litgpt runs `generate` twice an iteration and counts the tokens of the text anew; this does neither.
        """
        check_whole("num_iterations", num_iterations)
        table: dict[str, list[float]] = {}
        out = None
        for _ in range(num_iterations):
            began = time.perf_counter()
            out = self.generate(**kwargs)
            out = list(out) if kwargs.get("stream") else out
            seconds, stats = time.perf_counter() - began, self.stats
            row = {"Seconds total": seconds, "Seconds to first token": stats.prefill_seconds}
            row |= {"Tokens generated": stats.new_tokens, "Inference speed in tokens/sec": stats.new_tokens / seconds}
            row["Prefill speed in tokens/sec"] = stats.prefill_tokens / stats.prefill_seconds
            if stats.decode_tokens:
                row["Decode speed in tokens/sec"] = stats.decode_tokens / stats.decode_seconds
            if self.cache is not None:
                row["Cache memory allocated in GB"] = self.cache.allocated()["total"] / 1e9
            if self.fabric.device.type == "cuda":
                row["Total GPU memory allocated in GB"] = torch.cuda.max_memory_allocated() / 1e9
            for name, value in row.items():
                table.setdefault(name, []).append(value)
        if kwargs.get("stream"):
            pieces = out or []
            single = isinstance(kwargs.get("prompt"), str)
            out = "".join(pieces) if single else ["".join(row) for row in zip(*pieces)]
        return out, table
