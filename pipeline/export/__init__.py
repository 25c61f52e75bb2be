"""Export: what was made, in forms that ordinary tools load. One file per format; each proves what it wrote.

A format module has `VERSION` and three functions of a model, a config and (the last two) the folder `out`: `refusal`
says why this model has no such form, or None; `write` fills `out` and returns what is worth saying; `check` reloads it
in a fresh process without regrow and returns what it measured.
"""

import importlib
from types import ModuleType

FORMATS = ("hf", "gguf", "vllm", "peft", "quantized")


def load(name: str) -> ModuleType:
    """A format's module."""
    return importlib.import_module(f"{__name__}.{name}")
