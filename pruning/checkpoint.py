"""Saving and loading models, stock and non-uniform ones alike. Nothing in a folder is ever executed here."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pruning.allocation import Kept
from pruning.modeling_regrow import RegrowConfig, RegrowForCausalLM

STRUCTURES = "structures.json"

RegrowConfig.register_for_auto_class()
RegrowForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write safetensors, config, generation config and tokenizer; a non-uniform model brings its modeling file.

    Uniform models load in `AutoModelForCausalLM.from_pretrained(folder)`, others with `trust_remote_code=True`.
    """
    # A generation config with sampling values but sampling off is valid to use and invalid to save.
    model.generation_config.do_sample = model.generation_config.do_sample or None
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load(folder: Path | str, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
    """A model from a folder, in evaluation mode, in `dtype` (None: as saved). Our own class reads non-uniform ones.

    Raises ValueError when weights and config do not fit each other.
    """
    said = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model_class: Any = RegrowForCausalLM if said.get("model_type") == RegrowConfig.model_type else AutoModelForCausalLM
    model, info = model_class.from_pretrained(
        folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
    )
    problems = {name: keys for name, keys in info.items() if keys and name != "error_msgs"}
    if problems:
        raise ValueError(f"{folder}: weights and config.json do not fit each other: {problems}")
    return model.to(device).eval()


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The folder's tokenizer."""
    said = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    # AutoTokenizer looks the model type up, and does not know ours.
    config = (
        RegrowConfig(**said)
        if said.get("model_type") == RegrowConfig.model_type
        else AutoConfig.from_pretrained(folder)
    )
    return AutoTokenizer.from_pretrained(folder, config=config)


def write_structures(folder: Path, kept: list[Kept], widths: list[dict[str, int]]) -> None:
    """Write `structures.json`: for each layer and kind the kept indices in the original model's numbering.

    {"format": 1, "layers": [{"ffn": {"of": 1536, "kept": [0, 2, ...]}, "attention": {"of": 3, "kept": [0, 2]}}]}
    """
    layers = [
        {kind: {"of": of[kind], "kept": indices} for kind, indices in layer.items()}
        for layer, of in zip(kept, widths, strict=True)
    ]
    (folder / STRUCTURES).write_text(json.dumps({"format": 1, "layers": layers}), encoding="utf-8")
