"""Run by `pickled` in a process of its own: the tensors and plain attributes of a pickled model.

python -I fresh_unpickle.py FILE.bin OUT: writes OUT/tensors.safetensors and OUT/attributes.json.

Nothing that the file names is imported or called, but for what makes tensors, ordered dictionaries, sizes and dtypes.
Every other object becomes a `Recorded`: its class's name, and the attributes that would have been put on it.
TorchScript archives, which `torch.load` would hand to an interpreter of their own code, are refused.
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


def parameter(data: torch.Tensor, needs_gradient: bool, hooks: Any, _state: Any) -> Any:
    """A parameter with attributes, such as the acc_grad that LLM-Pruner leaves behind; they are of no use here."""
    return torch._utils._rebuild_parameter(data, needs_gradient, hooks)  # type: ignore[attr-defined]


ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,  # type: ignore[attr-defined]
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,  # type: ignore[attr-defined]
    ("torch._utils", "_rebuild_parameter_with_state"): parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    **{("torch", str(kind).removeprefix("torch.")): kind for kind in (torch.float16, torch.bfloat16, torch.float32)},
}


class Unpickler(pickle.Unpickler):
    """Finds what is allowed, and a Recorded of its own name for everything else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        return ALLOWED.get((module_name, global_name)) or type(global_name, (Recorded,), {})


def load(file: Any, **options: Any) -> Any:
    """As `pickle.load`, for the pickles that torch's older files begin with."""
    return Unpickler(file, **options).load()


def refuse(*_arguments: Any, **_options: Any) -> None:
    sys.exit("it is a TorchScript archive, which is code and cannot be read for its tensors alone")


def collect(module: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    """The parameters below a recorded torch module, by their names in a state dict."""
    for name, value in (module.state.get("_parameters") or {}).items():
        if isinstance(value, torch.Tensor):
            tensors[prefix + name] = value.detach().contiguous().clone()
        elif value is not None:
            sys.exit(f"{prefix}{name} is a {type(value).__name__}, not a tensor that can be read here")
    for name, inner in (module.state.get("_modules") or {}).items():
        if isinstance(inner, Recorded):
            collect(inner, f"{prefix}{name}.", tensors)


def plain(value: Any) -> bool:
    """Whether JSON can say it."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and plain(inner) for name, inner in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return isinstance(value, str | int | float | bool | None)


def below(module: Any, *names: str) -> dict[str, Any]:
    """Attributes of the module found by the names of modules, or nothing."""
    for name in names:
        module = (module.state.get("_modules") or {}).get(name) if isinstance(module, Recorded) else None
    return module.state if isinstance(module, Recorded) else {}


def main() -> None:
    file, out = sys.argv[1:]
    torch.jit.load = refuse  # what torch.load calls for such archives, whatever unpickler it is given
    loader = SimpleNamespace(Unpickler=Unpickler, load=load, __name__="restricted")
    loaded: Any = torch.load(file, map_location="cpu", pickle_module=loader, weights_only=False)
    model = loaded.get("model") if isinstance(loaded, dict) else loaded
    if not isinstance(model, Recorded):
        sys.exit("it holds no pickled model (LLM-Pruner's files are a mapping with the entry 'model')")
    tensors: dict[str, torch.Tensor] = {}
    collect(model, "", tensors)
    config = model.state.get("config")
    said = dict(config.state) if isinstance(config, Recorded) else {}
    # LLM-Pruner writes a cut hidden size into the config, from which the heads' width no longer follows.
    said["head_dim"] = below(model, "model", "layers", "0", "self_attn").get("head_dim") or said.get("head_dim")
    save_file(tensors, Path(out) / "tensors.safetensors")
    found = {name: value for name, value in said.items() if plain(value)}
    attributes = {"class": type(model).__name__, "config": found}
    (Path(out) / "attributes.json").write_text(json.dumps(attributes), encoding="utf-8")


if __name__ == "__main__":
    main()
