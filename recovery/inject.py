"""Attaching adapters to a model, and their files.

An adapter folder holds `adapter.safetensors` (trained and kept tensors) and `adapter.json`: method, its whole config,
the seed, the sha256 of the bases that are rebuilt from it, and sha256 of samples of the decoder it was trained on, so
that it is not put on another model, or twice on the same. It is not PEFT's format.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from recovery import adapters, products, samples
from recovery.base import Adapter, AdapterConfig, Layer, Tensors, digest_of, seed_of
from recovery.saved import DESCRIPTION, FORMAT, WEIGHTS, described
from recovery.targets import chosen


class Registered(nn.ParameterDict):
    """Puts a set of tensors on a device, the trainable as parameters of this dictionary, the others as buffers.

    The set keeps pointing at them when they move.
    """

    def __init__(self, tensors: Tensors, device: torch.device) -> None:
        super().__init__({name: nn.Parameter(tensor.to(device)) for name, tensor in tensors.trainable.items()})
        self.tensors = tensors
        self.rest = ""  # of the shared set: digest of the layers without an adapter
        for name, tensor in tensors.kept.items():
            self.register_buffer(f"kept_{name}", tensor.to(device), persistent=False)
        for name, tensor in tensors.bases.items():
            self.register_buffer(f"base_{name}", tensor.to(device), persistent=False)
        self._link()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Registered":
        super()._apply(fn, recurse)
        self._link()  # moving a module replaces its buffers
        return self

    def _link(self) -> None:
        self.tensors.trainable = dict(self.items())
        self.tensors.kept = {name: getattr(self, f"kept_{name}") for name in self.tensors.kept}
        self.tensors.bases = {name: getattr(self, f"base_{name}") for name in self.tensors.bases}
        self.tensors.rounded = {}  # of bases that are other tensors now


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its adapter: y = W x + b + adapter(x)."""

    def __init__(self, linear: nn.Linear, method: Adapter[Any], shared: Registered) -> None:
        super().__init__()
        self.linear = linear
        self.method = method
        self.adapter = Registered(method, linear.weight.device)
        self.shared = shared  # one module for all layers
        self.sample = samples.sample(linear.weight)  # taken now: weights may be sharded later

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.method.frozen(self.linear.weight), cast("Tensor | None", self.linear.bias)
        if self.training and (dropout := self.method.config.dropout):
            dropped = nn.functional.dropout(x, dropout)
            return products.linear(x, weight, bias) + self.method.forward(dropped, weight, None)
        return self.method.output(x, weight, bias)

    def delta(self) -> Tensor:
        """float32 [out, in]: merged weight minus frozen weight."""
        return self.method.delta(self.linear.weight)


def attach(model: PreTrainedModel, config: AdapterConfig, seed: int) -> list[str]:
    """Freeze the model and put an adapter on every target layer; returns the layers' names.

    Raises ValueError when adapters are attached already, a target or pattern fits no layer, or weights are quantised.
    """
    if adapted(model):
        raise ValueError("the model has adapters already: merge or detach them first")
    found = targets(model, config)
    method: type[Adapter[Any]] = adapters.load(config.method).Method
    size = _head_size(model)
    layers = [Layer(name, linear.weight, seed_of(seed, name), size) for name, linear in found.items()]
    shared = method.share(config, layers, seed_of(seed, "shared"))
    holder = Registered(shared, layers[0].weight.device)
    rest = {name: samples.sample(linear.weight) for name, linear in linears(model).items() if name not in found}
    holder.rest = samples.digest(rest)
    model.requires_grad_(False)
    for layer in layers:
        linear = found[layer.name]
        _replace(model, layer.name, AdaptedLinear(linear, method(config, layer, shared), holder))
    return list(found)


def detach(model: nn.Module) -> None:
    """Take every adapter off; the layers are the frozen ones again."""
    for name, module in adapted(model).items():
        _replace(model, name, module.linear)


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every adapter's parameters, as `layer.name`, and the shared ones as `shared.name`."""
    return {
        f"{place}.{name}": parameter
        for place, module in registered(model).items()
        for name, parameter in module.items()
    }


def kept(model: nn.Module) -> dict[str, Tensor]:
    """Tensors beside the parameters that are saved with them, named likewise."""
    return {
        f"{p}.{name}": tensor for p, module in registered(model).items() for name, tensor in module.tensors.kept.items()
    }


def save(model: nn.Module, folder: Path, seed: int) -> None:
    """Write the adapter's two files into `folder`. `seed` is that it was attached with."""
    layers = adapted(model)
    if not layers:
        raise ValueError("the model has no adapters to save: attach them first")
    config: AdapterConfig = next(iter(layers.values())).method.config
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format": FORMAT,
        "method_version": adapters.load(config.method).VERSION,
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "bases_sha256": _bases_digest(model),
        **sample_digests(model),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in {**trainable(model), **kept(model)}.items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def attach_saved(model: PreTrainedModel, folder: Path) -> None:
    """Attach the adapter of a folder, as it was saved.

    Raises ValueError, leaving the model as it was, when it was made for another model, or its bases come out different.
    """
    said = described(folder)
    method = adapters.load(said["config"]["method"])
    attach(model, method.Config.model_validate(said["config"]), said["seed"])
    try:
        load_tensors(model, load_file(folder / WEIGHTS), str(folder))
        _check(model, said, folder)
    except ValueError:
        detach(model)
        raise


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], place: str) -> None:
    """Copy tensors into the attached adapters' parameters and kept tensors. Raises ValueError where they do not fit."""
    targets: dict[str, Tensor] = {**trainable(model), **kept(model)}
    if targets.keys() != tensors.keys():
        odd = sorted(targets.keys() ^ tensors.keys())
        raise ValueError(f"{place}: made for other layers than this model's: {', '.join(odd[:3])} ...")
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)}, this model needs {list(target.shape)}"
            raise ValueError(f"{place}: {name} has shape {shapes}: it belongs to another pruned model")
    for name, target in targets.items():
        if not tensors[name].isfinite().all():
            raise ValueError(f"{place}: {name} holds numbers that are not finite: its training went wrong; train again")
        target.data.copy_(tensors[name])


def _check(model: nn.Module, said: dict[str, Any], folder: Path) -> None:
    found = _bases_digest(model)
    if found != said["bases_sha256"]:
        raise ValueError(
            f"{folder}: the bases rebuilt from seed {said['seed']} have sha256 {found[:16]}, it was trained with "
            f"{said['bases_sha256'][:16]}: another seed or torch draws other numbers; use the merged model instead"
        )
    check_base(model, said, str(folder))


def check_base(model: nn.Module, said: Mapping[str, str], place: str) -> None:
    """Raises ValueError where the decoder's weights are not those that an adapter's files say, by `sample_digests`."""
    if all(said.get(name, digest) == digest for name, digest in sample_digests(model).items()):
        return
    half = any(module.linear.weight.dtype == torch.float16 for module in adapted(model).values())
    dtype = ", in the dtype it was trained in, as float16 rounds otherwise" if half else ""
    raise ValueError(
        f"{place}: this adapter was trained on other weights; attach it to the pruned model it belongs to{dtype} "
        "(a merged model has it inside already)"
    )


def targets(model: PreTrainedModel, config: AdapterConfig) -> dict[str, nn.Linear]:
    """The decoder layers' linear modules that are asked for, by their full names.

    Raises ValueError for a target or pattern that fits none, and for quantised weights.
    """
    found = linears(model)
    for name, linear in found.items():
        if not linear.weight.is_floating_point():
            raise ValueError(f"{name}: weights of {linear.weight.dtype} cannot be adapted: load the model unquantised")
    return {name: found[name] for name in chosen(found, config)}


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The decoder layers' linear modules by their full names; lm_head is never among them."""
    blocks: Any = model.get_decoder().layers
    decoder = {id(module) for module in blocks.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in decoder
    }


def _head_size(model: PreTrainedModel) -> int:
    config: Any = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def registered(model: nn.Module) -> dict[str, Registered]:
    """The modules that hold the adapters' tensors, by layer, and the shared one."""
    layers = adapted(model)
    places = {name: module.adapter for name, module in layers.items()}
    if layers:
        places["shared"] = next(iter(layers.values())).shared
    return places


def _bases_digest(model: nn.Module) -> str:
    return digest_of(
        {f"{p}.{n}": t for p, module in registered(model).items() for n, t in module.tensors.bases.items()}
    )


def sample_digests(model: nn.Module) -> dict[str, str]:
    """By what the adapter's files know the model: `recovery.samples` of the adapted layers and of the others."""
    layers = adapted(model)
    rest: str = next(iter(layers.values())).shared.rest
    return {samples.ADAPTED: samples.digest({name: layer.sample for name, layer in layers.items()}), samples.REST: rest}
