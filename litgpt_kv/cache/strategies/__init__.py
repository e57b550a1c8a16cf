"""What a cache keeps: `base.py` says what a strategy is; every other file here registers a family of them."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
