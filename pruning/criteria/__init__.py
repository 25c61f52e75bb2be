"""The criteria: one module each, found by its file name.

A criterion module has a docstring, `VERSION`, a `Config` (a `PruningConfig`) and

    scores(model, input_ids, config, progress) -> list[dict[Kind, Tensor]]

one mapping a layer with a float32 score for every structure of each asked kind: `ffn` [channels], `attention`
[key-value groups]. Higher means keep. It leaves the model's weights as they were. Importing it costs no torch.
"""

import pkgutil
from importlib import import_module
from types import ModuleType


def names() -> list[str]:
    """Every criterion, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a criterion; `name` is one of `names()`."""
    return import_module(f"{__name__}.{name}")
