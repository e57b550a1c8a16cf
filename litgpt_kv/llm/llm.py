"""`LLM`: a checkpoint and its tokenizer in one object, with litgpt's method names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from litgpt.config import Config
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from litgpt_kv.arguments import DeviceArgs, RunArgs, StoppingArgs, check_count, check_flag, check_threads, grouped
from litgpt_kv.cache.decode import read_length_for
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs, SamplingArgs, check_callable, check_type, shown
from litgpt_kv.generate import Request, Stats, raise_failed
from litgpt_kv.generate.compiled import CompiledDecoder
from litgpt_kv.llm import checkpoint
from litgpt_kv.llm.beginning import encode_first
from litgpt_kv.llm.chat import Chat, conversation_text
from litgpt_kv.llm.check_weights import check_finite, check_fit
from litgpt_kv.llm.generated import GeneratedText
from litgpt_kv.llm.quantize import OWN
from litgpt_kv.llm.run import OpenRun, Pieces, Run, RunResult
from litgpt_kv.llm.text_request import TextRequest, check_text
from litgpt_kv.llm.threads import best_threads
from litgpt_kv.llm.turns import check_system_prompt
from litgpt_kv.model.packed import pack
from litgpt_kv.model.quantized import head_inputs, to_int8
from litgpt_kv.parallel import DeviceRequest, ParallelStrategy, find_parallel_strategy


class LLM:
    """Generate text with a model and its tokenizer.

    Attributes:
        model: The `GPT`, in inference mode.
        tokenizer, prompt_style, config, checkpoint_dir: As in litgpt's `LLM`.
        fabric: The device and precision.
        last_run: The last run that ended, None before the first.
        decoder: Runs the one-token steps: the model, or the compiled model after `compile`.
        parallel: The parallel strategy of several devices; None on one device.
        threads: How many CPU threads a run uses; None: torch's number.
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
        self.last_run: RunResult | None = None
        self.decoder = model
        self.parallel: ParallelStrategy | None = None
        self.threads = best_threads(model, fabric.device)

    @property
    def stats(self) -> Stats:
        """Tokens and seconds of the last run that ended."""
        return Stats() if self.last_run is None else self.last_run.stats

    @property
    def cache(self) -> KVCache | None:
        """The cache of the last run that ended; None if it had none."""
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
        check_weights: bool = False,
        threads: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> LLM:
        """Load a checkpoint in litgpt's layout, for inference.

        Where that is faster, large weights are kept in the order in which the CPU multiplies with them (see
        `litgpt_kv.model.packed`): `model.state_dict()` has them as litgpt has them, but they cannot be trained.

        Args:
            model: A checkpoint folder, a name below `checkpoints/`, or "demo" for the shipped model. With
                `init="random"`, the name of one of litgpt's configs.
            init: "pretrained" or "random".
            tokenizer_dir: The folder of the tokenizer, if it is not the checkpoint's; needed for `init="random"`.
            precision: Lightning Fabric's; None is "32-true" on a CPU and "bf16-true" (or "16-true") on a GPU.
            accelerator: "auto", "cpu", "cuda" or "mps".
            quantize: Quantize weights while they are loaded: "int8" by torch's own operators, on any device (see
                `litgpt_kv.model.quantized`; `model.unquantized` names the layers that could not be); as litgpt does,
                with bitsandbytes on an NVIDIA GPU, "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq" or "bnb.int8".
            distribute: With None, no weights are loaded; call the method `distribute` next.
            check_weights: Refuse weights that are NaN or infinite; this reads all weights once more.
            threads: How many CPU threads a run of this model uses; torch's own number is left alone between runs.
                None: one for a small model, which more threads slow down; torch's number for others.
            on_progress: Called with the bytes of the weights that are loaded, and of all.

        Raises:
            ValueError: If the checkpoint is missing, incomplete or corrupt, or an argument is unknown.
        """
        for name, path in (("model", model), ("tokenizer_dir", model if tokenizer_dir is None else tokenizer_dir)):
            if not isinstance(path, (str, Path)):
                raise TypeError(f"{name} must be a name or a path, got {shown(path)}.")
        if not isinstance(init, str) or init not in ("pretrained", "random"):
            raise ValueError(f"init must be 'pretrained' or 'random', got {shown(init)}.")
        if quantize is not None and distribute is None:
            raise ValueError("Quantized weights are for one device: leave out quantize, or distribute=None.")
        if threads is not None:
            check_threads(threads)
        check_callable("on_progress", on_progress)
        fabric = checkpoint.fabric_for(precision, accelerator, quantize)
        folder = None
        if init == "pretrained":
            folder = checkpoint.find(model)
            config = checkpoint.load_config(folder)
            gpt = None if distribute is None else checkpoint.load_model(folder, config, fabric, quantize, on_progress)
            if gpt is not None and check_weights:
                check_finite(gpt.named_parameters(), str(folder / checkpoint.WEIGHTS))
        else:
            if tokenizer_dir is None:
                raise ValueError("init='random' needs a tokenizer_dir.")
            config = Config.from_name(str(model))
            with fabric.init_module():
                gpt = GPT(config).eval()
            if quantize in OWN:
                gpt.unquantized = to_int8(gpt, head_inputs(config, gpt.state_dict()))
        tokenizer = checkpoint.load_tokenizer(Path(tokenizer_dir or folder))
        style = checkpoint.load_prompt(folder, config) if folder else PromptStyle.from_config(config)
        wrapped = quantize not in (None, *OWN) or "mixed" in fabric._precision.precision
        if gpt is not None and not wrapped:
            pack(gpt)
        llm = cls(
            fabric.setup_module(gpt) if gpt is not None and wrapped else gpt,
            tokenizer,
            style,
            config,
            folder,
            fabric,
        )
        llm.threads = llm.threads if threads is None else threads
        return llm

    def distribute(
        self,
        accelerator: str = "auto",
        devices: int | str = "auto",
        num_nodes: int = 1,
        precision: str | None = None,
        generate_strategy: str | None = None,
        *,
        check_weights: bool = False,
    ) -> None:
        """Load the checkpoint onto several devices; `generate` then runs on all of them.

        With "tensor_parallel" and "data_parallel" every device has its own process. Lightning Fabric starts these by
        running the script again, unless torchrun or SLURM has started them. Each process continues after this call and
        must make the same calls; all get the same results. `llm.fabric.is_global_zero` is true in one of them.

        Args:
            accelerator: "auto", "cpu", "cuda" or "mps".
            devices: The number of devices on each machine, or "auto" for all.
            num_nodes: The number of machines.
            precision: See `load`; mixed precisions are refused.
            generate_strategy: "tensor_parallel", "sequential" or "data_parallel".
            check_weights: See `load`.

        Raises:
            ValueError: If the model cannot be divided in this way, or an argument is unknown.
        """
        DeviceArgs(precision, accelerator, devices, num_nodes, generate_strategy)  # raises if a value is out of range
        strategy = find_parallel_strategy(generate_strategy)
        if self.checkpoint_dir is None:
            raise ValueError("A model with random weights cannot be distributed: every process would draw others.")
        request = DeviceRequest(accelerator, devices, num_nodes, checkpoint.precision_for(precision, accelerator))
        self.model = self.decoder = self.last_run = None  # free the memory of the device
        path, weights = self.checkpoint_dir / checkpoint.WEIGHTS, checkpoint.load_weights(self.checkpoint_dir)
        check_fit(path, self.config, weights)  # before any process is started
        self.parallel = strategy(self.config, weights, request)
        self.fabric, self.model = self.parallel.fabric, self.parallel.model
        if check_weights:
            check_finite(self.model.named_parameters(), str(path))
        pack(self.model)
        self.decoder = self.model

    def close(self) -> None:
        """Wait for all processes and end them; the end of the script does the same."""
        if self.parallel is not None:
            self.parallel.close()

    def compile(self, note: Callable[[str], None] = lambda text: None) -> None:
        """Compile the decode step: steps that need a new graph are slow, the others faster.

        On a CUDA device, steps that come again and again are recorded as CUDA graphs. On a CPU, the weights of a packed
        model may change their order in memory (`litgpt_kv.model.packed`).

        Args:
            note: Called with a line of text before a graph is made and after.
        """
        self.decoder = CompiledDecoder(self.model, note)

    def encode(self, prompt: str, sys_prompt: str | None = None) -> Tensor:
        """Apply the model's prompt style to a prompt, and return its token ids, 1-D int64.

        Raises:
            ValueError: If the prompt is empty, or the style has no place for a system prompt.
        """
        for name, text in (("prompt", prompt), ("sys_prompt", "" if sys_prompt is None else sys_prompt)):
            check_text(name, text)
        if not prompt:
            raise ValueError("The prompt is empty.")
        check_system_prompt(self.prompt_style, sys_prompt)
        return self.encode_text(self.prompt_style.apply(prompt, sys_prompt=sys_prompt))

    def encode_text(self, text: str) -> Tensor:
        """Return the token ids of a text as it is, without a prompt style, 1-D int64."""
        ids = encode_first(self.tokenizer, text)
        if not ids:
            raise ValueError(f"The prompt {shown(text)} has no tokens.")
        return torch.tensor(ids, dtype=torch.int64, device=self.fabric.device)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids.

        Raises:
            TypeError: If they are not whole numbers. ValueError: If one is not between 0 and 2**31 - 1.
        """
        if not isinstance(ids, (Tensor, list, tuple)):
            raise TypeError(f"Token ids must be a list of whole numbers, got {shown(ids)}.")
        if not len(ids):
            return ""
        tokens = torch.as_tensor(ids)
        if tokens.dim() != 1 or tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"Token ids must be a list of whole numbers, got {shown(ids)}.")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < 2**31:
            raise ValueError(f"Token ids must be 0 to 2**31 - 1, got {shown(ids)}.")
        return self.tokenizer.decode(tokens)

    def generate(
        self,
        prompt: str | Sequence[str],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float | None = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        *,
        kv_cache: str | Mapping[str, Any] | KVCacheArgs | None = "dense",
        budget: int | float | str | None = None,
        **settings: Any,
    ) -> str | Tensor | list[str] | list[Tensor] | Iterator[str] | Iterator[list[str]]:
        """Continue a prompt, or several prompts of any lengths.

        Args:
            prompt: Text, or a list of texts.
            sys_prompt: The system prompt; ValueError if the prompt style has no place for one.
            max_new_tokens: The most new tokens of each prompt.
            temperature, top_k, top_p: See `SamplingArgs`; one value, or one for each prompt.
            return_as_token_ids: Return 1-D int64 tensors instead of text.
            stream: Return an iterator over pieces of text as they are generated, with its own `stats`; for a list of
                prompts, over lists of pieces.
            kv_cache: A strategy's name, options by name as in a YAML file, or `KVCacheArgs`; None or "none" computes
                the whole text again at every step.
            budget: Replaces the budget of `kv_cache`: tokens, or a share of the longest row, "20%" or 0.2.
            settings: The other fields of `SamplingArgs` (seed, repetition_penalty, min_p; one value or one a prompt),
                `StoppingArgs` (min_new_tokens, stop, ignore_eos) and `RunArgs` (batch_size, prefill, prefill_chunk,
                logprobs), by name.

        Returns:
            The new text, without the prompt, as a `GeneratedText`: a str that also has `tokens`, `finish_reason` and,
            with logprobs=True, `logprobs`. A list for a list of prompts.

        Raises:
            ValueError: If a prompt is empty, does not fit the model's context, or an argument is out of range; at the
                end, if the logits of a prompt were not finite.
            TypeError: For an unknown argument or one of the wrong type.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise TypeError(f"prompt must be a text or a list of texts, got {shown(prompt)}.")
        for name, flag in (("stream", stream), ("return_as_token_ids", return_as_token_ids)):
            check_flag(name, flag)
        if stream and return_as_token_ids:
            raise ValueError("stream=True gives text; to stream tokens, see litgpt_kv.generate.stream.")
        args = KVCacheArgs.of(kv_cache, budget)
        settings |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        stopping, sampling, batching = grouped("generate", settings, StoppingArgs, SamplingArgs, RunArgs)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        requests = [
            self.request(TextRequest(text, sys_prompt=sys_prompt, stopping=stopping, sampling=row_sampling), b)
            for b, (text, row_sampling) in enumerate(zip(texts, sampling.rows(len(texts))))
        ]
        run = self.run(requests, args, batching)
        if stream:
            return Pieces(run, single=isinstance(prompt, str))
        sequences = run.sequences()
        raise_failed(sequences)
        if return_as_token_ids:
            out = [torch.tensor(s.tokens, dtype=torch.int64) for s in sequences]
        else:
            out = [GeneratedText(s.text, s.tokens, s.logprobs, s.reason) for s in sequences]
        return out[0] if isinstance(prompt, str) else out

    def request(self, text: TextRequest | str, id: int | None = None) -> Request:
        """Build the `Request` of a text, for `run`: with token ids, stop sequences and temperature.

        Args:
            text: A `TextRequest`, or only a prompt.
            id: The request's number in a run; None: its index in the list of requests.

        Raises:
            ValueError: If the prompt is empty or is not text.
        """
        text = TextRequest(text) if isinstance(text, str) else text
        check_type("text", text, TextRequest, "a TextRequest or a text")
        if text.messages is not None:
            ids = self.encode_text(conversation_text(self.prompt_style, text.messages, text.sys_prompt))
        else:
            ids = self.encode(text.prompt, text.sys_prompt)
        stopping, sampling = text.stopping, text.sampling
        if sampling.temperature is None:
            sampling = sampling.resolved(self.temperature)
        ends = () if stopping.ignore_eos else self.ends()
        limits = stopping.max_new_tokens, stopping.min_new_tokens
        return Request(ids, *limits, sampling, ends, stop_texts=stopping.stops, id=id)

    @property
    def temperature(self) -> float:
        """The temperature that the checkpoint recommends, else litgpt's default, 0.8."""
        return 0.8 if self.checkpoint_dir is None else checkpoint.own_temperature(self.checkpoint_dir)

    def ends(self) -> list[list[int]]:
        """Return the token sequences that end the model's text, as its prompt style defines them."""
        return [list(stop) for stop in self.prompt_style.stop_tokens(self.tokenizer) if None not in stop]

    def run(
        self,
        requests: Sequence[Request],
        args: KVCacheArgs | None,
        batching: RunArgs = RunArgs(),
        tokens: int | None = None,
    ) -> Run:
        """Start a run that answers a list of requests; see `Run`."""
        return Run(self, requests, args, batching, tokens)

    def answer(self, requests: Iterable[Request], args: KVCacheArgs | None, batching: RunArgs, tokens: int) -> OpenRun:
        """Start a run that takes a request from an iterator whenever a row is free; see `OpenRun`."""
        return OpenRun(self, requests, args, batching, tokens)

    def build_cache(self, args: KVCacheArgs, batch_size: int, tokens: int) -> KVCache:
        """Build a cache for rows of at most `tokens` tokens, in the dtype of this model's keys and values."""
        if self.decoder is not self.model and tokens <= self.model.max_seq_length:
            args = args.resolved(tokens)  # percentages are of the exact number of tokens
            tokens = min(read_length_for(tokens), self.model.max_seq_length)  # few sizes: each is compiled once
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # autocast's dtype of keys and values
        return KVCache.build(self.model, args, batch_size, tokens, mixed.get(self.fabric._precision.precision))

    def chat(
        self,
        sys_prompt: str | None = None,
        *,
        kv_cache: str | Mapping[str, Any] | KVCacheArgs = "dense",
        **settings: Any,
    ) -> Chat:
        """Start a conversation whose cache stays between turns; see `Chat`."""
        return Chat(self, sys_prompt, kv_cache=kv_cache, **settings)

    def benchmark(self, num_iterations: int = 1, **kwargs: Any) -> tuple[Any, dict[str, list[float]]]:
        """Measure `generate`, whose arguments it takes. Names and units are as in litgpt.

        Returns:
            The last output, and a table of lists with one value for each iteration: "Seconds total", "Seconds to first
            token" (the time to read all prompts), "Tokens generated", "Inference speed in tokens/sec" (all tokens over
            all seconds), "Prefill speed in tokens/sec", "Decode speed in tokens/sec", "Cache memory allocated in GB",
            and on a GPU "Total GPU memory allocated in GB". Unlike litgpt's, this runs `generate` once an iteration and
            does not tokenize the text again to count its tokens.
        """
        check_count("num_iterations", num_iterations, 1, 2**31 - 1)
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
