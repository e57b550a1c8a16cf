"""`litgpt_kv`, or `python -m litgpt_kv`."""

from litgpt_kv.benchmark import benchmark
from litgpt_kv.cli import run
from litgpt_kv.commands import generate, strategies

COMMANDS = {"generate": generate, "strategies": strategies, "benchmark": benchmark}
DESCRIPTION = """Key/value caches for litgpt's models.

Try the shipped model:  litgpt_kv generate demo --kv-cache h2o --kv-cache.budget 128 --prompt "def fib("
All strategies:         litgpt_kv strategies
One strategy:           litgpt_kv generate --kv-cache.help h2o
A command's options:    litgpt_kv generate --help
"""


def main(args: list[str] | None = None) -> None:
    """Runs a command."""
    run(COMMANDS, DESCRIPTION, args)


if __name__ == "__main__":
    main()
