"""Serve a model with Ray Serve: the endpoints of `litgpt_kv serve`, on as many machines as the Ray cluster has.

python extensions/ray/deployment.py CHECKPOINT --replicas 2 --kv_cache.strategy h2o --kv_cache.budget 25%
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from ray import cloudpickle, serve

from litgpt_kv import LLM
from litgpt_kv.arguments import RunArgs, StoppingArgs, check_count
from litgpt_kv.cli.groups import check_names
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.serve.server import NEW_TOKENS, build_guarded_app
from litgpt_kv.serve.settings import ServeArgs

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas need litgpt_kv, but not this file


def application(
    checkpoint_dir: str,
    caches: Mapping[str, KVCacheArgs | None],
    settings: ServeArgs = ServeArgs(),
    *,
    replicas: int = 1,
    cpus: float = 1,
    gpus: float = 0,
    precision: str | None = None,
    accelerator: str = "auto",
    sampling: SamplingArgs = SamplingArgs(),
    stopping: StoppingArgs = NEW_TOKENS,
    run: RunArgs = RunArgs(),
) -> serve.Application:
    """Make an application for `serve.run`: copies of the model, each with engines and caches of its own.

    If a replica dies, the requests that it was answering fail with status 500, and Ray starts another one.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout that every replica can read, or "demo".
        caches: What a request may ask for by name; the first one is the default. None: no cache.
        settings: How each replica answers. `host` is that of Ray's proxy: if it is a loopback address and there is no
            key, other host names are refused. `connections`: the most requests that a replica takes at a time.
        replicas: How many copies of the model.
        cpus, gpus: What each replica takes of its machine.
        precision, accelerator: As in `LLM.load`.
        sampling, stopping: What counts where a request says nothing.
        run: How prompts are read.
    """
    check_count("replicas", replicas, 1, 2**31 - 1)

    def build():
        llm = LLM.load(checkpoint_dir, precision=precision, accelerator=accelerator)
        return build_guarded_app(llm, caches, settings, sampling=sampling, stopping=stopping, run=run)[1]

    deployed = serve.deployment(
        serve.ingress(build)(),
        name="litgpt_kv",
        num_replicas=replicas,
        max_ongoing_requests=settings.connections,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=settings.drain,
    )
    return deployed.bind()


def main(
    checkpoint_dir: str,
    *,
    replicas: int = 1,
    cpus: float = 1,
    gpus: float = 0,
    precision: str | None = None,
    accelerator: str = "auto",
    kv_cache: KVCacheArgs = KVCacheArgs(),
    settings: ServeArgs = ServeArgs(),
    sampling: SamplingArgs = SamplingArgs(),
    stopping: StoppingArgs = NEW_TOKENS,
    run: RunArgs = RunArgs(),
) -> None:
    """Serve a model with Ray Serve until Ctrl-C.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout that every replica can read, or "demo".
        replicas: How many copies of the model.
        cpus: CPU cores of each replica.
        gpus: GPUs of each replica.
        precision: A precision of Lightning Fabric.
        accelerator: cpu, cuda, mps, or auto.
        kv_cache: What to keep.
        settings: How each replica answers; host and port are those of Ray's proxy.
        sampling: How tokens are chosen, where a request says nothing.
        stopping: When a text ends, where a request says nothing.
        run: How prompts are read.
    """
    check_names(vars(kv_cache))  # a YAML file may not name a file of code to import
    caches = {str(kv_cache.strategy): KVCacheArgs.of(kv_cache)}
    app = application(
        str(Path(checkpoint_dir).resolve()) if Path(checkpoint_dir).is_dir() else checkpoint_dir,  # for other folders
        caches,
        settings,
        replicas=replicas,
        cpus=cpus,
        gpus=gpus,
        precision=precision,
        accelerator=accelerator,
        sampling=sampling,
        stopping=stopping,
        run=run,
    )
    serve.start(http_options={"host": settings.host, "port": settings.port})
    try:
        serve.run(app, blocking=True)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(main)
    except (ValueError, TypeError) as error:
        sys.exit(f"error: {error}")
