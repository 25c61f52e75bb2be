"""Adapters read from PEFT's files, exactly or not at all.

LoRA, rsLoRA, DoRA, VeRA and RandLoRA, the last two with their projections in the file (drawn again from a seed they
may differ). What an option would change and ours does not know is refused. An adapter belongs to one base: the digest
that `recovery.peft_write` leaves is checked where it is there.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from recovery import adapters
from recovery.peft_format import DESCRIPTION, PARTS, PREFIX, VECTORS, WEIGHTS, described, method_of, opened

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from recovery.base import AdapterConfig


def attach(model: PreTrainedModel, folder: Path) -> list[str]:
    """Attach the adapter of a PEFT folder; returns the layers' names.

    Raises ValueError, leaving the model without adapters, for what cannot be read exactly or belongs to another model.
    """
    from recovery import inject

    config, ours, bases, base = read(folder)
    attached = inject.attach(model, config, seed=0)
    try:
        shared = next(iter(inject.adapted(model).values())).method.shared.bases
        for name, target in shared.items():
            found = bases[name]
            if any(have < need for have, need in zip(found.shape, target.shape, strict=True)):
                raise ValueError(f"{folder}: base {name} is {list(found.shape)}; this model needs {list(target.shape)}")
            target.copy_(found[tuple(slice(size) for size in target.shape)])
        inject.load_tensors(model, ours, str(folder))
        inject.check_base(model, base, str(folder))
    except ValueError:
        inject.detach(model)
        raise
    return attached


def read(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """A PEFT folder's adapter in our terms: config, tensors by name, random bases, and the file's metadata, which may
    hold digests of its base (`recovery.samples`).

    Raises ValueError for what cannot be read exactly.
    """
    said = described(folder)
    with opened(folder / WEIGHTS) as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        base: dict[str, str] = file.metadata() or {}
    config, ours, bases = (_read_low_rank if said["peft_type"] == "LORA" else _read_shared)(said, tensors, folder)
    return config, ours, bases, base


def _read_low_rank(said: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> tuple[AdapterConfig, Any, Any]:
    ours = _renamed(tensors, PARTS, folder)
    method = method_of(said)
    parts = ("A", "B", "magnitude") if method == "dora" else ("A", "B")
    wanted = [f"{layer}.{part}" for layer in dict.fromkeys(name.rpartition(".")[0] for name in ours) for part in parts]
    if absent := [name for name in wanted if name not in ours]:
        raise ValueError(f"{folder / WEIGHTS}: it has no {absent[0]}: it is damaged")
    ranks = {name.removesuffix(".A"): tensor.shape[0] for name, tensor in ours.items() if name.endswith(".A")}
    alphas: dict[str, float] = {}
    patterns = _patterns(said.get("alpha_pattern"), folder)
    for name, rank in ranks.items():
        alpha = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name)), said["lora_alpha"])
        # Our DoRA knows one scale, alpha / rank.
        alphas[name] = alpha * math.sqrt(rank) if method == "dora" and said.get("use_rslora") else alpha
    options = {"method": method, "targets": tuple(ranks), "rank_pattern": ranks, "alpha_pattern": alphas}
    return _config(options, folder), ours, {}


def _read_shared(said: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> tuple[AdapterConfig, Any, Any]:
    kind, method = said["peft_type"], method_of(said)
    # PEFT repeats RandLoRA's projections in every layer; they are one tensor.
    found = {key: [t for name, t in tensors.items() if name.endswith(f".{method}_{key}")] for key in ("A", "B")}
    if not (found["A"] and found["B"]):
        remedy = "they may come out different from its seed: save it with save_projection=True"
        raise ValueError(f"{folder}: its projections are not in the file, and {remedy}")
    bases = {key: copies[0] for key, copies in found.items()}
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith((f".{method}_A", f".{method}_B"))}
    ours = _renamed(own, VECTORS[kind], folder)
    targets = tuple(dict.fromkeys(name.rpartition(".")[0] for name in ours))
    options: dict[str, Any] = {"method": method, "targets": targets, "rank": said["r"]}
    if kind == "RANDLORA":
        # PEFT looks at very_sparse first.
        drawn = next((name for name in ("very_sparse", "sparse") if said.get(name)), "dense")
        options |= {"alpha": said["randlora_alpha"], "pairing": "peft", "bases": drawn}
        bases["A"] = bases["A"][:, 0]
        for name, tensor in ours.items():
            if name.endswith(".lambda"):
                ours[name] = tensor.T.float() * math.sqrt(tensor.shape[1])
    return _config(options, folder), ours, bases


def _config(options: dict[str, Any], folder: Path) -> AdapterConfig:
    try:
        return adapters.load(options["method"]).Config.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{folder / DESCRIPTION}: {place}: {first['msg']} (got {first['input']!r})") from error


def _patterns(said: Any, folder: Path) -> dict[str, float]:
    """alpha_pattern: regular expressions of layers' names, and their alphas."""
    try:
        return {key: said[key] for key in said or {} if re.compile(key)}
    except (TypeError, re.error) as error:
        raise ValueError(f"{folder / DESCRIPTION}: alpha_pattern: {said!r} cannot be read: {error}") from error


def _renamed(tensors: dict[str, Tensor], parts: dict[str, str], folder: Path) -> dict[str, Tensor]:
    """Our names for PEFT's tensors of layers."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ends = [(part, end) for part, end in parts.items() if name.endswith(f".{end}")]
        if not (name.startswith(PREFIX) and ends):
            raise ValueError(f"{folder}: {name}: not a linear layer's part of this method: merge it with PEFT instead")
        part, end = ends[0]
        found[f"{name.removeprefix(PREFIX).removesuffix(f'.{end}')}.{part}"] = tensor
    return found
