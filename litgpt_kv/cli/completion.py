"""`litgpt_kv --print-completion SHELL`: a script that completes commands, options and names of strategies."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

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


def completion(commands: Mapping[str, Callable[..., Any]], shell: str) -> str:
    """Return the completion script of a shell; its first line says where it goes.

    Args:
        commands: The functions of all commands, whose options are read off.
        shell: bash, zsh or tcsh.
    """
    shells = [name for name in USE if name in shtab.SUPPORTED_SHELLS]
    if shell not in shells:
        fail(f"--print-completion needs one of {', '.join(shells)}, got {shell!r:.60}.")
    script = shtab.complete(plain_parser(commands), shell=shell)
    return script if shell == "zsh" else f"# {USE[shell]}\n{script}"  # zsh wants its own first line


def plain_parser(commands: Mapping[str, Callable[..., Any]]) -> argparse.ArgumentParser:
    """Build a parser of the standard library with the commands and options as users write them."""
    from litgpt_kv.cli.parser import build_parser, options_of  # which imports this module

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
    for name in commands:
        parser = subparsers.add_parser(name, help=getattr(commands, "entries", {})[name].summary)
        for flag in ("--help-all", "--print-config"):
            parser.add_argument(flag, action="store_true")
        for option in ("--config", "--import"):
            parser.add_argument(option).complete = shtab.FILE
        own = options_of(build_parser({name: commands[name], "": lambda: None}, "", name), name)
        options = {spelled(action): action for action in own if action.option_strings and action.dest not in SKIPPED}
        if "--kv-cache" in options:
            parser.add_argument("--kv-cache.help", choices=choices["--kv-cache.help"])
        for option, action in options.items():
            added = parser.add_argument(option, choices=choices.get(option))
            if NAMES.get(action.dest) == "FILE":
                added.complete = shtab.FILE
        for action in own:
            if not action.option_strings:
                parser.add_argument(action.dest, nargs="?").complete = shtab.DIRECTORY
    return root
