"""Adapters in PEFT's files, `adapter_config.json` and `adapter_model.safetensors`: their names and what they say.

`recovery.peft_write` writes them, `recovery.peft_read` reads them. Nothing is unpickled; this costs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from recovery.base import AdapterConfig

WEIGHTS, DESCRIPTION, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
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
    "eva_config",
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
    "sparse",
    "very_sparse",
]
# Starts that leave the base's weights as they were.
SAME_BASE = (True, False, None, "gaussian", "eva", "mica", "orthogonal")


def refusal(config: AdapterConfig) -> str | None:
    """Why PEFT has no form of this adapter, or None."""
    if config.method == "randlora" and getattr(config, "pairing", None) != "peft":
        return "PEFT pairs RandLoRA's scales and bases otherwise: train with `pairing: peft`, or use the merged model"
    if config.method == "randlora" and any(config.patterns().values()):
        return "PEFT's RandLoRA has one rank and alpha for all layers: leave the patterns out, or use the merged model"
    if config.method not in (*LOW_RANK, "vera", "randlora"):
        return f"PEFT has no form of {config.method}: use the merged model"
    return None


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
