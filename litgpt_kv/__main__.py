"""`litgpt_kv`, or `python -m litgpt_kv`."""

from litgpt_kv.benchmark import benchmark
from litgpt_kv.cli import run
from litgpt_kv.commands import generate, strategies
from litgpt_kv.parallel import ends_together
from litgpt_kv.planning import plan

COMMANDS = {
    "generate": ends_together(generate),
    "strategies": strategies,
    "benchmark": ends_together(benchmark),
    "plan": plan,
}
DESCRIPTION = """Key/value caches for litgpt's models.

  litgpt_kv generate demo --prompt "def fib("                                  the shipped model, every token kept
  litgpt_kv generate demo --kv-cache h2o --kv-cache.budget 128 --prompt "def " another cache
  litgpt_kv generate demo --prompt "import os" --prompt "class A:"             a batch
  litgpt_kv generate demo --config config_hub/generate/sink.yaml               options from a file
  litgpt_kv generate demo --devices 2 --accelerator cpu --generate-strategy tensor_parallel
  litgpt_kv plan Llama-3.1-70B --devices 8                                     memory a device, computed
  litgpt_kv strategies                                                         what --kv-cache takes
  litgpt_kv generate --kv-cache.help h2o                                       one of them
  litgpt_kv generate --help                                                    a command's options
"""


def main(args: list[str] | None = None) -> None:
    """Runs a command."""
    run(COMMANDS, DESCRIPTION, args)


if __name__ == "__main__":
    main()
