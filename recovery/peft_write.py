"""Adapters written in PEFT's files: what PEFT has a form for.

Every method whose delta is s B A becomes a LoRA (RoRA its use_rslora, DoRA and EDoRA its use_dora) with rank and alpha
by module; VeRA with its shared factors; RandLoRA with `pairing: peft`, the bases laid into the corner of PEFT's
larger ones, and 1 / sqrt(n), which PEFT's scale lacks, taken into lambda. PEFT records the base's name only; a digest
of the base's weights is written too.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from recovery import inject
from recovery.adapters.lora import LowRank
from recovery.peft_format import DESCRIPTION, PARTS, PREFIX, VECTORS, WEIGHTS, refusal

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from recovery.base import AdapterConfig


def write(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write the attached adapters into `folder`. `base` is what the files call the model they belong to.

    Raises ValueError where nothing is attached or PEFT has no form of the method.
    """
    methods = {name: module.method for name, module in inject.adapted(model).items()}
    if not methods:
        raise ValueError("the model has no adapters to write: attach them first")
    config: AdapterConfig = next(iter(methods.values())).config
    if reason := refusal(config):
        raise ValueError(reason)
    said: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
    }
    said |= {"target_modules": sorted(methods)}
    forms = {"vera": _vera, "randlora": _randlora}
    options, tensors = forms.get(config.method, _low_rank)(methods)
    folder.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, folder / WEIGHTS, metadata={"format": "pt", **inject.sample_digests(model)})
    (folder / DESCRIPTION).write_text(json.dumps({**said, **options}, indent=2), encoding="utf-8")


def _low_rank(methods: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Any] = {}
    rooted = next(iter(methods.values())).config.method == "rora"
    for name, method in methods.items():
        assert isinstance(method, LowRank)
        down, up = method.factors()
        live = (up != 0).any(dim=0)
        live[0] = True  # PEFT wants a rank of at least 1
        down, up = down[live], up[:, live]  # closed gates and ranks never grown into
        ranks[name] = down.shape[0]
        alphas[name] = method.scale() * (math.sqrt(ranks[name]) if rooted else ranks[name])
        found = {"A": down, "B": up, **{key: t for key, t in method.trainable.items() if key == "magnitude"}}
        tensors |= {f"{PREFIX}{name}.{PARTS[key]}": tensor for key, tensor in found.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    options = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rooted}
    options |= {"use_dora": any(name.endswith("magnitude_vector") for name in tensors)}
    options |= {"rank_pattern": {name: value for name, value in ranks.items() if value != rank}}
    return {**options, "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha}}, tensors


def _vera(methods: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    first = next(iter(methods.values()))
    options = {"peft_type": "VERA", "r": first.config.rank, "save_projection": True, "d_initial": first.config.start}
    tensors = {f"base_model.vera_{name}": tensor for name, tensor in first.shared.bases.items()}
    for name, method in methods.items():
        tensors |= {f"{PREFIX}{name}.{key}": method.trainable[part] for part, key in VECTORS["VERA"].items()}
    return options, tensors


def _randlora(methods: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    first = next(iter(methods.values()))
    rank, alpha = first.config.rank, first.config.alpha or 2 * first.config.rank
    sides = [(m.smaller, m.larger) if m.wide else (m.larger, m.smaller) for m in methods.values()]  # out, in
    smaller, larger = sorted(max(side) for side in zip(*sides, strict=True))
    own = first.shared.bases
    down = own["A"].new_zeros(rank, 1, smaller)
    down[:, 0, : own["A"].shape[1]] = own["A"]
    up = own["B"].new_zeros(larger, math.ceil(smaller / rank), rank)
    up[: own["B"].shape[0], : own["B"].shape[1]] = own["B"]
    tensors = {"base_model.randlora_A": down, "base_model.randlora_B": up}
    for name, method in methods.items():
        tensors[f"{PREFIX}{name}.randlora_lambda"] = method.trainable["lambda"].T / math.sqrt(method.count)
        tensors[f"{PREFIX}{name}.randlora_gamma"] = method.trainable["gamma"]
    drawn = {first.config.bases: True} if first.config.bases != "dense" else {}
    return {"peft_type": "RANDLORA", "r": rank, "randlora_alpha": alpha, "save_projection": True, **drawn}, tensors
