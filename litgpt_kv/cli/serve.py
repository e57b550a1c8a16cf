"""`litgpt_kv serve`."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from litgpt_kv.arguments import DeviceArgs, RunArgs, StoppingArgs, Without
from litgpt_kv.cli.groups import check_names, typed_options
from litgpt_kv.cli.loading import budget_note, load
from litgpt_kv.cli.options import cache_fields
from litgpt_kv.cli.output import Output
from litgpt_kv.config import KVCacheArgs, OptionValue, SamplingArgs, shown
from litgpt_kv.serve.settings import ServeArgs

Values = OptionValue | list[OptionValue]
CacheSettings = dict[str, Values | dict[str, Values]]
EXTRA = ("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn")


def serve(
    checkpoint_dir: str,
    *,
    caches: dict[str, str | CacheSettings] | None = None,
    settings: ServeArgs = ServeArgs(),
    stopping: StoppingArgs = StoppingArgs(max_new_tokens=256),
    sampling: SamplingArgs = SamplingArgs(),
    kv_cache: KVCacheArgs = KVCacheArgs(),
    run: Annotated[RunArgs, Without("batch_size", "logprobs")] = RunArgs(),
    device: Annotated[DeviceArgs, Without("devices", "num_nodes", "generate_strategy")] = DeviceArgs(),
) -> None:
    """Answer HTTP requests in OpenAI's form, many at a time.

    SIGTERM or Ctrl-C: running answers end, new ones are refused. docs/serve.md has all endpoints and fields.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        caches: More caches, by names that a request may give as kv_cache: {"small": {"strategy": "h2o", "budget": 64}};
            each has rows of its own. That of --kv-cache has its strategy's name.
        settings: How the server answers.
        stopping: When a text ends, where a request says nothing.
        sampling: How tokens are chosen, where a request says nothing.
        kv_cache: What to keep, where a request says nothing.
        run: How prompts are read.
        device: Where to run.
    """
    try:
        from litgpt_kv.serve.server import Server  # needs the extra
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise ValueError(f"serve needs {error.name}: pip install 'litgpt-kv[serve]'.") from error
    named = named_caches(kv_cache, caches or {})
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("litgpt_kv.serve").setLevel(logging.INFO)
    llm = load(checkpoint_dir, device)
    for note in filter(None, map(budget_note, named.values())):
        Output.of(llm).note(note)
    server = Server(llm, named, settings, sampling=sampling, stopping=stopping, run=run)
    Output.of(llm).note(f"Listening on {server.url}, caches: {', '.join(named)}.")
    server.run()


def named_caches(default: KVCacheArgs, others: dict[str, Any]) -> dict[str, KVCacheArgs | None]:
    """The caches of a server by name, the default one first.

    Raises:
        ValueError: If a name is used twice, or a cache's settings are wrong.
    """
    strategies = default.strategy if isinstance(default.strategy, (list, tuple)) else [default.strategy]
    named = {"+".join(dict.fromkeys(strategies)): KVCacheArgs.of(default)}
    for name, given in others.items():
        if not isinstance(name, str) or not name or name in named:
            raise ValueError(f"caches need different names, got {shown(name)}.")
        if not isinstance(given, (str, dict)):
            raise ValueError(f"A cache is a strategy's name or settings by name, got {shown(given)}.")
        fields = cache_fields(given)
        try:
            args = KVCacheArgs(**fields)
        except TypeError as error:
            raise ValueError(f"The cache {name!r}: {error}") from error
        check_names(fields)
        if args.options:
            args = KVCacheArgs(**{**fields, "options": typed_options(args.strategy, args.options)})
        named[name] = KVCacheArgs.of(args)
    return named
