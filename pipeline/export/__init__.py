"""Export: what was made, in forms that ordinary tools load. One file per format; each proves what it wrote.

A format module has `VERSION`, `refusal(model, config)`, the reason why this model has no such form or None;
`write(model, out, config)`, which fills the folder `out` and returns what is worth saying; and `check(model, out, config)`,
which reloads it in a fresh process without regrow and returns what it measured.
"""

import importlib
from types import ModuleType

FORMATS = ("hf", "gguf", "vllm", "peft", "quantized")


def load(name: str) -> ModuleType:
    """A format's module."""
    return importlib.import_module(f"{__name__}.{name}")
