"""The adapters: one module each, found by its file name.

An adapter module has a docstring, `VERSION`, a `Config` (an `AdapterConfig`) and one class, `Method` (an `Adapter`).
Where adapters that an older VERSION saved are the same function here, `READS` names the oldest such one.
Importing it costs no torch: it computes with the methods of the tensors it is given.
"""

import pkgutil
from importlib import import_module
from types import ModuleType


def names() -> list[str]:
    """Every adapter, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of an adapter; `name` is one of `names()`."""
    return import_module(f"{__name__}.{name}")
