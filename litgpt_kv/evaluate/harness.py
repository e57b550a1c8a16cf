"""A model for EleutherAI's lm-evaluation-harness: any checkpoint, with any cache.

lm_eval finds only models that it ships or that are registered before it starts, so it is started from here::

    python -m litgpt_kv.evaluate.harness --model litgpt_kv \\
        --model_args checkpoint=demo,kv_cache=h2o,budget=25% --include_path tasks --tasks my_task

All options are lm_eval's own. Importing this module registers the model too, for `lm_eval.simple_evaluate`. It needs
the extra `eval`.

What a number means: a context is read in one pass and compressed to the budget, before the cache sees anything of the
continuation; then the continuation is scored, or the answer generated, token by token through the cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from tqdm import tqdm

try:
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("litgpt_kv.evaluate.harness needs lm_eval: pip install 'litgpt-kv[eval]'.") from error

from litgpt_kv import registry
from litgpt_kv.arguments import RunArgs, check_count, check_threads
from litgpt_kv.config import KVCacheArgs, SamplingArgs, shown
from litgpt_kv.evaluate.candidates import candidates
from litgpt_kv.evaluate.continuations import score
from litgpt_kv.generate import Request, raise_failed
from litgpt_kv.llm.beginning import encode_first, encode_later
from litgpt_kv.llm.chat import conversation_text
from litgpt_kv.llm.llm import LLM
from litgpt_kv.llm.threads import best_threads
from litgpt_kv.llm.turns import takes_system_prompt

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, context and continuation
CACHE_FIELDS = {f.name for f in fields(KVCacheArgs)} - {"strategy", "budget", "options"}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting
SAMPLING = {f.name for f in fields(SamplingArgs)}


@register_model("litgpt_kv")
class LitgptKV(TemplateLM):
    """A checkpoint with a cache, for lm_eval.

    Args:
        checkpoint: A checkpoint folder in litgpt's layout, or "demo".
        kv_cache: NAME[:SELECT][@STORAGE], as in h2o, keydiff:pool, dense@int8 or my_file.py:MyStrategy.
        budget: Tokens that each head keeps. "25%" is that share of the context with its longest continuation, or with
            all new tokens that may be generated. None: all.
        batch_size: Rows at a time.
        max_length: The most tokens of a row; None: the model's context. Longer contexts lose their beginning.
        max_gen_toks: The most new tokens where a task does not say it, at most half of `max_length`.
        device: cpu, cuda or mps; None: what is there. precision: As for `LLM.load`.
        threads: CPU threads; None: one for a small model, else torch's default.
        max_batch_size: Ignored; lm_eval passes it.
        options: Other settings of `KVCacheArgs` (sinks, recent, interval, positions, …) and the strategy's own.
    """

    def __init__(
        self,
        checkpoint: str,
        kv_cache: str = "dense",
        budget: int | str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(batch_size, str) and batch_size.isdecimal():
            batch_size = int(batch_size)
        check_count("batch_size", batch_size, 1, 2**20)
        check_count("max_gen_toks", max_gen_toks, 1, 2**31 - 1)
        if not isinstance(kv_cache, str) or kv_cache == "none":
            raise ValueError(f"kv_cache must be a strategy's name, got {shown(kv_cache)}.")
        base = {name: options.pop(name) for name in CACHE_FIELDS & options.keys()}
        (found,) = candidates([kv_cache], [budget], KVCacheArgs(**base))
        name = str(found.args.strategy)
        own = registry.options("strategy", name)
        if unknown := sorted(options.keys() - {*own}):
            takes = ", ".join(sorted(CACHE_FIELDS | {*own}))
            raise ValueError(f"Unknown option {unknown[0]!r} for kv_cache {name!r}; it takes {takes}.")
        self.args = replace(found.args, options={**found.args.options, **options})
        self.batch_size, self.max_gen_toks, self.name = batch_size, max_gen_toks, checkpoint
        if threads is not None:
            check_threads(threads)
        accelerator = "auto" if device is None else device.partition(":")[0]
        self.llm = LLM.load(checkpoint, precision=precision, accelerator=accelerator)
        threads = threads or best_threads(self.llm.model, self.llm.fabric.device)
        if threads is not None:
            torch.set_num_threads(threads)
        context = self.llm.model.max_seq_length
        self.max_length = context if max_length is None else max_length
        check_count("max_length", self.max_length, 2, context)

    # -- text and tokens ---------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.llm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token in place of an empty context: the beginning of a text, else its end."""
        begin = self.llm.tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        encode = encode_later if add_special_tokens is False else encode_first
        return encode(self.llm.tokenizer, string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, in the checkpoint's prompt style, up to the model's next reply.

        Without `add_generation_prompt` the last message is the beginning of that reply (a task's `gen_prefix`); it
        stands, as it is, where the reply would. A system message (a task's description) is left out with a warning if
        the prompt style has no place for one, as lm_eval's own models do.

        Raises:
            ValueError: If the roles are in another order.
        """
        begun, style = "", self.llm.prompt_style
        if any(message["role"] == "system" for message in chat_history) and not takes_system_prompt(style):
            left_out = f"The prompt style {type(style).__name__} has no place for system messages: left out."
            warnings.warn(left_out, stacklevel=2)
            chat_history = [message for message in chat_history if message["role"] != "system"]
        if not add_generation_prompt:
            if not chat_history or chat_history[-1]["role"] != "assistant":
                raise ValueError("Only a message of the assistant can be continued: the last one must be its.")
            *chat_history, last = chat_history
            begun = last["content"]
        return conversation_text(style, chat_history) + begun

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the name of the checkpoint's prompt style; there is no other."""
        return type(self.llm.prompt_style).__name__ if chat_template else ""

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval writes into its results: the size of the model, and the cache."""
        parameters = self.llm.model.parameters()
        return {"model_num_parameters": sum(p.numel() for p in parameters), "kv_cache": repr(self.args)}

    # -- the three kinds of requests ---------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(self._cut(context, continuation), continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="litgpt_kv loglikelihood", disable=disable_tqdm) as bar:
            found = score(self.llm, pairs, self.args, self.batch_size, on_batch=bar.update)
        for (texts, _, _), answer in zip(requests, found):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows of `max_length` as lm_eval cuts them.

        A first window has one token before it and is read through the cache from its beginning on; what a later window
        has before it is a context, which is compressed.
        """
        windows: list[Encoded] = []
        owners: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            cut = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            own = [(None, *utils.make_disjoint_window(window)) for window in cut]
            windows, owners = windows + own, owners + [number] * len(own)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            sums[number] += logprob
        for request, total in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers: greedily, or sampled where a task sets `do_sample`."""
        asked = [self._request(*request.args) for request in requests]
        own = [self.args.resolved(request.cache_tokens) for request in asked]
        texts: list[str] = [""] * len(asked)
        with tqdm(total=len(asked), desc="litgpt_kv generate", disable=disable_tqdm) as bar:
            for args in sorted({repr(args): args for args in own}.values(), key=repr):  # those of one budget together
                numbers = [number for number, its in enumerate(own) if its == args]
                run = RunArgs(batch_size=self.batch_size, prefill="full")
                sequences = self.llm.run([asked[number] for number in numbers], args, run).sequences()
                raise_failed(sequences)
                for number, sequence in zip(numbers, sequences):
                    texts[number] = sequence.text
                bar.update(len(numbers))
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """Leave out the beginning of a context that does not fit `max_length` with its continuation."""
        if len(continuation) > self.max_length:
            raise ValueError(f"A continuation has {len(continuation):,} tokens; max_length is {self.max_length:,}.")
        return list(context[max(0, len(context) - (self.max_length + 1 - len(continuation))) :])

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        """Return the request of a context and a task's `generation_kwargs`.

        Raises:
            ValueError: For a setting that there is not, or a length that does not fit.
        """
        given = dict(settings)
        until, lengths = given.pop("until", None) or [], [given.pop(name, None) for name in LENGTHS]
        new = next((length for length in lengths if length is not None), min(self.max_gen_toks, self.max_length // 2))
        check_count("max_gen_toks", new, 1, self.max_length - 1)
        sampled = given.pop("do_sample", given.get("temperature", 0) > 0)
        temperature = given.pop("temperature", 1.0)
        if unknown := sorted(given.keys() - SAMPLING):
            raise ValueError(
                f"generation_kwargs {unknown[0]!r} is not known; there are until, do_sample, {', '.join(LENGTHS)} and "
                f"{', '.join(sorted(SAMPLING))}."
            )
        sampling = SamplingArgs(temperature=temperature if sampled else 0.0, **given)
        ids = self.tok_encode(context) or [self.prefix_token_id]
        stops = [until] if isinstance(until, str) else [text for text in until if text]
        return Request(ids[-(self.max_length - new) :], new, 0, sampling, self.llm.ends(), stop_texts=stops)


if __name__ == "__main__":
    cli_evaluate()
