"""`litgpt_kv --print-completion SHELL`: a script that completes commands, options and names of strategies."""

from __future__ import annotations

import argparse
from argparse import Action
from collections.abc import Mapping, Sequence

import shtab

from litgpt_kv import registry
from litgpt_kv.cli.help import NAMES, PROG, spelled
from litgpt_kv.cli.options import fail

SKIPPED = ("help", "config", "print_config", "kv_cache", "kv_cache.options", "kv_cache.storage_options")
USE = {
    "bash": f'eval "$({PROG} --print-completion bash)"',
    "zsh": f"{PROG} --print-completion zsh > ~/.zfunc/_{PROG}",
    "fish": f"{PROG} --print-completion fish > ~/.config/fish/completions/{PROG}.fish",
    "tcsh": f"{PROG} --print-completion tcsh > ~/.{PROG}.tcsh",
}


def completion(options: Mapping[str, Sequence[Action]], summaries: Mapping[str, str], shell: str) -> str:
    """Return the completion script of a shell; its first line says where it goes.

    Args:
        options: The options of each command.
        summaries: A line about each command.
        shell: bash, zsh, fish or tcsh.
    """
    shells = [name for name in USE if name in shtab.SUPPORTED_SHELLS]
    if shell not in shells:
        fail(f"--print-completion needs one of {', '.join(shells)}, got {shell!r:.60}.")
    script = shtab.complete(plain_parser(options, summaries), shell=shell)
    return script if shell == "zsh" else f"# {USE[shell]}\n{script}"  # zsh wants its own first line


def plain_parser(options: Mapping[str, Sequence[Action]], summaries: Mapping[str, str]) -> argparse.ArgumentParser:
    """Build a parser of the standard library with the commands and options as users write them."""
    choices = {
        "--kv-cache": [*registry.names("strategy"), "none"],
        "--kv-cache.help": registry.names("strategy"),
        "--kv-cache.storage": registry.names("storage"),
        "--kv-cache.attention": registry.names("kernel"),
    }
    root = argparse.ArgumentParser(prog=PROG)
    root.add_argument("--version", action="store_true")
    root.add_argument("--print-completion", choices=list(USE))
    subparsers = root.add_subparsers()
    for name, actions in options.items():
        parser = subparsers.add_parser(name, help=summaries.get(name, ""))
        for flag in ("--help-all", "--print-config"):
            parser.add_argument(flag, action="store_true")
        for option in ("--config", "--import"):
            parser.add_argument(option).complete = shtab.FILE
        named = {spelled(a): a for a in actions if a.option_strings and a.dest not in SKIPPED}
        for option in [*named, *(["--kv-cache.help"] if "--kv-cache" in named else [])]:
            added = parser.add_argument(option, choices=choices.get(option))
            if option in named and NAMES.get(named[option].dest) == "FILE":
                added.complete = shtab.FILE
        for action in (action for action in actions if not action.option_strings):
            parser.add_argument(action.dest, nargs="?").complete = shtab.DIRECTORY
    return root
