"""Saving and loading models, stock and non-uniform ones alike. Nothing in a folder is ever executed here."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pruning.architecture import Architecture
from pruning.placement import Placement, place
from pruning.resident import own_weights
from pruning.structures import Kept
from pruning.surgery import FAMILIES

STRUCTURES = "structures.json"

OWN: dict[str, Any] = {own.__name__: own for _, own in FAMILIES}
for own in OWN.values():
    own.config_class.register_for_auto_class()
    own.register_for_auto_class("AutoModelForCausalLM")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write safetensors, config, generation config and tokenizer; a non-uniform model brings its modeling file.

    Uniform models load in `AutoModelForCausalLM.from_pretrained(folder)`, others with `trust_remote_code=True`.
    """
    # A generation config with sampling values but sampling off is valid to use and invalid to save.
    model.generation_config.do_sample = model.generation_config.do_sample or None
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _named(kind: str, keys: Any) -> str:
    """Up to three weights of a kind of problem, and how many there are; mismatched ones come with both shapes."""
    told = (key if isinstance(key, str) else f"{key[0]} is {list(key[1])}, not {list(key[2])}" for key in keys)
    first = ", ".join(sorted(told)[:3])
    return f"{len(keys)} {kind.replace('_', ' ')}: {first}{', ...' if len(keys) > 3 else ''}"


def load(
    folder: Path | str, dtype: torch.dtype | None = None, device: str = "cpu", placement: Placement = "whole"
) -> PreTrainedModel:
    """A model from a folder, in evaluation mode, in `dtype` (None: as saved). Our own class reads non-uniform ones.

    Raises ValueError when weights and config do not fit each other.
    """
    model_class: Any = own_class(folder) or AutoModelForCausalLM
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are told below, by name
    model, info = model_class.from_pretrained(folder, dtype=dtype or "auto", use_safetensors=True, **options)
    problems = [_named(kind, keys) for kind, keys in info.items() if keys and kind != "error_msgs"]
    if problems:
        raise ValueError(f"{folder}: weights and config.json do not fit each other: {'; '.join(problems)}")
    if device == "cpu" or placement == "offload":
        own_weights(model)
    return place(model, placement, device).eval()


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The folder's tokenizer."""
    own = own_class(folder)
    # AutoTokenizer looks the model type up, and does not know ours.
    config = (own.config_class if own else AutoConfig).from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, config=config)


def own_class(folder: Path | str) -> Any:
    """Our class for layers of different widths where a folder's config.json names one, otherwise None."""
    said = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return OWN.get((said.get("architectures") or [""])[0])


def write_structures(folder: Path, kept: Kept, original: Architecture) -> None:
    """Write `structures.json`: what stayed, by indices in the original model's numbering.

    {"format": 2, "hidden": {"of": 576, "kept": [...]}, "layers": [{"layer": 0, "ffn": {"of": 1536, "kept": [...]},
    "attention": {"of": 3, ...}, "heads": {"of": 9, ...}}], "of_layers": 30}
    """
    layers: list[dict[str, Any]] = []
    for keep in kept.layers:
        old = original.layers[keep.index]
        counts = (("ffn", old.ffn), ("attention", old.groups), ("heads", old.groups * old.heads))
        layers.append({"layer": keep.index} | {kind: {"of": of, "kept": getattr(keep, kind)} for kind, of in counts})
    hidden = {"of": original.hidden, "kept": kept.hidden}
    said = {"format": 2, "of_layers": len(original.layers), "hidden": hidden, "layers": layers}
    (folder / STRUCTURES).write_text(json.dumps(said), encoding="utf-8")
