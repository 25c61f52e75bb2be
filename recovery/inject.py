"""Attaching adapters to a model, and their files.

An adapter folder holds `adapter.safetensors` (trained tensors, float32) and `adapter.json` (method, its whole config,
the seed, and the sha256 of the bases that are rebuilt from it). It is not PEFT's format.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from recovery import adapters
from recovery.base import Adapter, AdapterConfig, Layer, digest_of, seed_of

WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its adapter: y = W x + b + adapter(x)."""

    def __init__(self, linear: nn.Linear, method: Adapter) -> None:
        super().__init__()
        self.linear = linear
        self.method = method
        self.dropout = nn.Dropout(method.config.dropout)
        device = linear.weight.device
        self.adapter = nn.ParameterDict({n: nn.Parameter(t.to(device)) for n, t in method.trainable.items()})
        for name, tensor in method.bases.items():
            self.register_buffer(f"base_{name}", tensor.to(device), persistent=False)
        self._relink()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.method.forward(x, self.dropout(x), self.linear.weight)

    def delta(self) -> Tensor:
        """float32 [out, in]: merged weight minus frozen weight."""
        return self.method.delta(self.linear.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptedLinear":
        super()._apply(fn, recurse)
        self._relink()  # moving a module replaces its buffers
        return self

    def _relink(self) -> None:
        """The method computes with the module's own tensors."""
        self.method.trainable = dict(self.adapter.items())
        self.method.bases = {name: getattr(self, f"base_{name}") for name in self.method.bases}


def attach(model: PreTrainedModel, config: AdapterConfig, seed: int) -> list[str]:
    """Freeze the model and put an adapter on every target layer; returns the layers' names.

    Raises ValueError when adapters are attached already or a target name fits no linear layer.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: merge them first")
    targets = _targets(model, config)
    method = adapters.load(config.method).Method
    shapes = [tuple(linear.weight.shape) for linear in targets.values()]
    shared = method.shared(config, shapes, torch.Generator().manual_seed(seed_of(seed, "bases")))
    model.requires_grad_(False)
    for name, linear in targets.items():
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        parent, _, child = name.rpartition(".")
        layer = Layer(name, linear.weight, generator, shared)
        setattr(model.get_submodule(parent), child, AdaptedLinear(linear, method(config, layer)))
    return list(targets)


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every adapter's parameters, as `layer.parameter`."""
    return {f"{layer}.{name}": p for layer, module in adapted(model).items() for name, p in module.adapter.items()}


def save(model: nn.Module, folder: Path, config: AdapterConfig, seed: int) -> None:
    """Write the adapter's two files into `folder`."""
    layers = adapted(model)
    if not layers:
        raise ValueError("the model has no adapters to save")
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": 1,
        "method_version": adapters.load(config.method).VERSION,
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "bases_sha256": _bases_digest(layers),
    }
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable(model).items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def attach_saved(model: PreTrainedModel, folder: Path) -> None:
    """Attach the adapter of a folder. Raises ValueError when it was made for other layers, or its bases differ."""
    said = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    config = adapters.load(said["config"]["method"]).Config.model_validate(said["config"])
    attach(model, config, said["seed"])
    found = _bases_digest(adapted(model))
    if found != said["bases_sha256"]:
        raise ValueError(
            f"{folder}: the bases rebuilt from seed {said['seed']} have sha256 {found[:16]}..., the adapter was "
            f"trained with {said['bases_sha256'][:16]}...; another torch draws other numbers: use the merged model"
        )
    load_parameters(model, load_file(folder / WEIGHTS), str(folder))


def load_parameters(model: nn.Module, tensors: dict[str, Tensor], place: str) -> None:
    """Copy tensors into the attached adapters' parameters. Raises ValueError when names or shapes differ."""
    parameters = trainable(model)
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())
        raise ValueError(f"{place}: made for other layers than this model's: {', '.join(odd[:3])} ...")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)}, this model needs {list(parameter.shape)}"
            raise ValueError(f"{place}: {name} has shape {shapes}: it belongs to another pruned model")
        parameter.data.copy_(tensors[name])


def _targets(model: PreTrainedModel, config: AdapterConfig) -> dict[str, nn.Linear]:
    found = dict(_linears(model))
    if config.targets == "all-linear":
        return found
    known = {name.rpartition(".")[2] for name in found}
    for target in config.targets:
        if target not in known:
            raise ValueError(f"targets: no linear layer is called {target!r}; there are {', '.join(sorted(known))}")
    return {name: linear for name, linear in found.items() if name.rpartition(".")[2] in config.targets}


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The decoder layers' linear modules by their full names; lm_head is not among them."""
    inner: Any = model.get_decoder()
    decoder = {id(module) for module in inner.layers.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) in decoder:
            yield name, module


def _bases_digest(layers: dict[str, AdaptedLinear]) -> str:
    return digest_of({f"{n}.{b}": t for n, module in layers.items() for b, t in module.method.bases.items()})
