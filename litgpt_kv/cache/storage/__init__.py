"""How keys and values are stored.

`base.py` says what a storage is, `coded.py` has what those of codes share, every other file registers some: `plain`,
`integer` (int8, int4, int4-hadamard, k8v4), `float8`, `kivi` (by channel and token), `offload` (in the host's memory).
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
