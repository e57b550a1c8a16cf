"""Key/value caches for litgpt's models: exact, small, fast.

The names of `__all__` are imported when they are first used: `litgpt_kv --help` needs no torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers know this name; importing typing takes time
if TYPE_CHECKING:
    from typing import Any

    from litgpt_kv.attention.kernels import Kernel
    from litgpt_kv.cache.kv_cache import KVCache
    from litgpt_kv.cache.storage.base import Storage
    from litgpt_kv.cache.strategies.base import Strategy, Tokens
    from litgpt_kv.compat.input_pos import GPT
    from litgpt_kv.config import KVCacheArgs, SamplingArgs
    from litgpt_kv.llm.llm import LLM
    from litgpt_kv.registry import register

__all__ = [
    "GPT",
    "LLM",
    "KVCache",
    "KVCacheArgs",
    "Kernel",
    "SamplingArgs",
    "Seen",
    "Storage",
    "Strategy",
    "Tokens",
    "register",
]

_MODULES = {
    "GPT": "compat.input_pos",
    "LLM": "llm.llm",
    "KVCache": "cache.kv_cache",
    "KVCacheArgs": "config",
    "Kernel": "attention.kernels",
    "SamplingArgs": "config",
    "Seen": "cache.strategies.base",  # the old name of `Tokens`
    "Storage": "cache.storage.base",
    "Strategy": "cache.strategies.base",
    "Tokens": "cache.strategies.base",
    "register": "registry",
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__`, or a module of the package, when it is first used."""
    if name in _MODULES:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        value = getattr(module, "Tokens" if name == "Seen" else name)
    elif name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        try:
            value = importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
