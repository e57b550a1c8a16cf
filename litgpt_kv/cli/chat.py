"""`litgpt_kv chat`: chat with a model in the terminal."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Annotated

from litgpt_kv.arguments import DeviceArgs, RunArgs, StoppingArgs, Without
from litgpt_kv.cli.loading import CLI_SAMPLING, budget_note, load
from litgpt_kv.cli.output import Output
from litgpt_kv.cli.terminal import talk
from litgpt_kv.config import KVCacheArgs, SamplingArgs


def chat(
    checkpoint_dir: str,
    *,
    sys_prompt: str | None = None,
    max_tokens: int | None = None,
    multiline: bool = False,
    stopping: StoppingArgs = StoppingArgs(max_new_tokens=256),
    sampling: SamplingArgs = CLI_SAMPLING,
    kv_cache: KVCacheArgs = KVCacheArgs(),
    run: Annotated[RunArgs, Without("batch_size", "prefill_chunk", "logprobs")] = RunArgs(),
    device: Annotated[DeviceArgs, Without("devices", "num_nodes", "generate_strategy")] = DeviceArgs(),
) -> None:
    """Chat with a model. The cache stays between turns, so only the new turn is read.

    /reset starts a new conversation, /cache shows how many tokens are kept, /quit ends the program; Ctrl-C ends a
    reply. A line that ends with a backslash continues on the next line. If turns are piped and one is refused, the exit
    code is 1.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        sys_prompt: The system prompt; refused if the model's prompt style has no place for one.
        max_tokens: The most tokens of a conversation: the size of a dense cache, and the default budget. By default the
            model's context, but at most 8192.
        multiline: An input may have several lines; !submit on its own line ends it.
        stopping: When a reply ends.
        sampling: How tokens are chosen.
        kv_cache: Which tokens the cache keeps.
        run: How the first turn is read.
        device: Where to run.
    """
    args = KVCacheArgs.of(kv_cache)
    if args is None:
        raise ValueError("chat needs a cache, kv_cache 'none' has none: choose a strategy.")
    llm = load(checkpoint_dir, device, sys_prompt)
    settings = {f.name: getattr(part, f.name) for part in (stopping, sampling) for f in fields(part)}
    output = Output.of(llm)
    output.take_notes(llm)
    if (note := budget_note(args)) is not None:
        output.note(note)
    conversation = llm.chat(sys_prompt, kv_cache=args, max_tokens=max_tokens, prefill=run.prefill, **settings)
    refused = talk(conversation, multiline, output)
    if refused and not sys.stdin.isatty():  # a script must know
        raise SystemExit(1)
