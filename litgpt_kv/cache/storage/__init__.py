"""How keys and values are stored: `base.py` says what a storage is; every other file here registers some."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
