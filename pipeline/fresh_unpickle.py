"""Run by `pickled` in a process of its own: the tensors and plain attributes of a pickled model.

python -I fresh_unpickle.py FILE.bin OUT: writes OUT/tensors.safetensors and OUT/attributes.json.

Nothing that the file names is imported or called, but for what makes tensors, ordered dictionaries, sizes and dtypes.
Every other object becomes a `Recorded`: its class's name, and the attributes that would have been put on it.
"""

import json
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file


class Recorded:
    """Stands for an object of a class that is not made: keeps state and items, does nothing."""

    def __new__(cls, *arguments: Any, **options: Any) -> "Recorded":
        made = super().__new__(cls)
        made.state = {}
        return made

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update({str(name): value for name, value in part.items()})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[str(key)] = value

    def append(self, value: Any) -> None:
        """Items of a list-like class are of no use here."""

    def extend(self, values: Any) -> None:
        """As above."""


ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,  # type: ignore[attr-defined]
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,  # type: ignore[attr-defined]
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    **{("torch", str(kind).removeprefix("torch.")): kind for kind in (torch.float16, torch.bfloat16, torch.float32)},
}


class Unpickler(pickle.Unpickler):
    """Finds what is allowed, and a Recorded of its own name for everything else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        return ALLOWED.get((module_name, global_name)) or type(global_name, (Recorded,), {})


def collect(module: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    """The parameters and persistent buffers below a recorded torch module, by their names in a state dict."""
    for name, value in (module.state.get("_parameters") or {}).items():
        if isinstance(value, torch.Tensor):
            tensors[prefix + name] = value.detach().contiguous().clone()
    for name, inner in (module.state.get("_modules") or {}).items():
        if isinstance(inner, Recorded):
            collect(inner, f"{prefix}{name}.", tensors)


def main() -> None:
    file, out = sys.argv[1:]
    loader = SimpleNamespace(Unpickler=Unpickler, load=None, __name__="restricted")
    loaded: Any = torch.load(file, map_location="cpu", pickle_module=loader, weights_only=False)
    model = loaded.get("model") if isinstance(loaded, dict) else loaded
    if not isinstance(model, Recorded):
        sys.exit("it holds no pickled model (LLM-Pruner's files are a mapping with the entry 'model')")
    tensors: dict[str, torch.Tensor] = {}
    collect(model, "", tensors)
    config = model.state.get("config")
    said = config.state if isinstance(config, Recorded) else {}
    plain = {name: value for name, value in said.items() if isinstance(value, str | int | float | bool | None)}
    if isinstance(said.get("rope_parameters"), dict):
        plain["rope_parameters"] = said["rope_parameters"]
    save_file(tensors, Path(out) / "tensors.safetensors")
    attributes = {"class": type(model).__name__, "config": plain}
    (Path(out) / "attributes.json").write_text(json.dumps(attributes), encoding="utf-8")


if __name__ == "__main__":
    main()
