"""Adapters in PEFT's files, `adapter_config.json` and `adapter_model.safetensors`: written and read.

Written: what PEFT has a form for. Every method whose delta is s B A becomes a LoRA (RoRA its use_rslora, DoRA and EDoRA
its use_dora) with rank and alpha by module; VeRA with its shared factors; RandLoRA with `pairing: peft`, the
bases laid into the corner of PEFT's larger ones, and 1 / sqrt(n), which PEFT's scale lacks, taken into lambda.
Read: LoRA, rsLoRA, DoRA, VeRA and RandLoRA, the last two with their projections in the file (drawn again from a seed
they may differ). What an option would change and ours does not know is refused. Nothing is unpickled.

An adapter belongs to one base. PEFT records a name only; ours also writes a digest of the base's weights, and checks
it where it is there. Importing this costs no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recovery import adapters
from recovery.adapters.lora import LowRank
from recovery.base import AdapterConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WEIGHTS, DESCRIPTION, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
BASE = "base_sample_sha256"
LOW_RANK = ("lora", "rora", "dora", "nola", "melora", "lora_mini", "edora", "sora", "increlora", "flat_lora", "gelora")
PARTS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
VECTORS = {
    "VERA": {"b": "vera_lambda_b", "v": "vera_lambda_d"},
    "RANDLORA": {"lambda": "randlora_lambda", "gamma": "randlora_gamma"},
}
# Options of PEFT's that change nothing of a trained adapter, or that are read here.
KNOWN = [
    "peft_type",
    "task_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "megatron_core",
    "qalora_group_size",
    "projection_prng_key",
    "save_projection",
    "d_initial",
    "init_weights",
    "init_lora_weights",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "vera_dropout",
    "randlora_alpha",
    "randlora_dropout",
]
SAME_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # starts that leave the base's weights as they were


def refusal(config: AdapterConfig) -> str | None:
    """Why PEFT has no form of this adapter, or None."""
    if config.method == "randlora" and getattr(config, "pairing", None) != "peft":
        return "PEFT pairs RandLoRA's scales and bases otherwise: train with `pairing: peft`, or use the merged model"
    if config.method not in (*LOW_RANK, "vera", "randlora"):
        return f"PEFT has no form of {config.method}: use the merged model"
    return None


def write(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write the attached adapters into `folder`. `base` is what the files call the model they belong to.

    Raises ValueError where nothing is attached or PEFT has no form of the method.
    """
    from safetensors.torch import save_file

    from recovery import inject

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
    save_file(ready, folder / WEIGHTS, metadata={"format": "pt", BASE: inject.sample_digest(model)})
    (folder / DESCRIPTION).write_text(json.dumps({**said, **options}, indent=2), encoding="utf-8")


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
        if base and base != inject.sample_digest(model):
            raise ValueError(f"{folder}: this adapter was trained on other weights: attach it to its own pruned model")
    except ValueError:
        inject.detach(model)
        raise
    return attached


def read(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Tensor], str | None]:
    """A PEFT folder's adapter in our terms: config, tensors by name, random bases, the digest of its base if it says.

    Raises ValueError for what cannot be read exactly.
    """
    said = described(folder)
    with opened(folder / WEIGHTS) as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        base: str | None = (file.metadata() or {}).get(BASE)
    config, ours, bases = (_read_low_rank if said["peft_type"] == "LORA" else _read_shared)(said, tensors, folder)
    return config, ours, bases, base


@contextmanager
def opened(file: Path) -> Generator[Any]:
    """A safetensors file's handle. Raises ValueError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}): copy or save it again") from error


def json_of(file: Path) -> dict[str, Any]:
    """A JSON file's mapping. Raises ValueError naming the file that holds none."""
    try:
        said: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(said, dict):
        raise ValueError(f"{file}: a mapping was expected, this is a {type(said).__name__}")
    return cast("dict[str, Any]", said)


def described(folder: Path) -> dict[str, Any]:
    """The folder's adapter_config.json. Raises ValueError for a folder that cannot be read."""
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"{folder}: not a PEFT adapter: it has no {DESCRIPTION}")
    said = json_of(folder / DESCRIPTION)
    if said.get("peft_type") not in ("LORA", *VECTORS):
        raise ValueError(f"{folder}: PEFT type {said.get('peft_type')!r}; LORA, VERA and RANDLORA are read")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder}: it has no {WEIGHTS}; regrow unpickles nothing: save it as safetensors")
    idle = (None, False, [], {}, "none")
    odd = [f"{key}: {value}" for key, value in said.items() if key not in KNOWN and value not in idle]
    if said.get("bias", "none") != "none":
        odd.append(f"bias: {said['bias']}")
    if (start := said.get("init_lora_weights")) not in SAME_BASE:
        odd.append(f"init_lora_weights: {start} (it changed the base's weights)")
    if odd:
        raise ValueError(f"{folder}: {'; '.join(odd)}: not served; merge it with PEFT and use the model it gives")
    needed = {"LORA": ("lora_alpha",), "VERA": ("r",), "RANDLORA": ("r", "randlora_alpha")}[said["peft_type"]]
    if absent := [key for key in needed if key not in said]:
        raise ValueError(f"{folder / DESCRIPTION}: it does not say {', '.join(absent)}: it is damaged")
    return said


def method_of(said: dict[str, Any]) -> str:
    """The adapter of ours that computes what an adapter_config.json describes."""
    if said["peft_type"] != "LORA":
        return said["peft_type"].lower()
    return "dora" if said.get("use_dora") else "rora" if said.get("use_rslora") else "lora"


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
    return {"peft_type": "RANDLORA", "r": rank, "randlora_alpha": alpha, "save_projection": True}, tensors


def _read_low_rank(said: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> tuple[AdapterConfig, Any, Any]:
    ours = _renamed(tensors, PARTS, folder)
    method = method_of(said)
    ranks = {name.removesuffix(".A"): tensor.shape[0] for name, tensor in ours.items() if name.endswith(".A")}
    alphas: dict[str, float] = {}
    for name, rank in ranks.items():
        patterns: dict[str, float] = said.get("alpha_pattern") or {}
        alpha = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name)), said["lora_alpha"])
        # Our DoRA knows one scale, alpha / rank.
        alphas[name] = alpha * math.sqrt(rank) if method == "dora" and said.get("use_rslora") else alpha
    options = {"method": method, "targets": tuple(ranks), "rank_pattern": ranks, "alpha_pattern": alphas}
    return adapters.load(method).Config.model_validate(options), ours, {}


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
        options |= {"alpha": said["randlora_alpha"], "pairing": "peft"}
        bases["A"] = bases["A"][:, 0]
        for name, tensor in ours.items():
            if name.endswith(".lambda"):
                ours[name] = tensor.T * math.sqrt(tensor.shape[1])
    return adapters.load(method).Config.model_validate(options), ours, bases


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
