"""Weights of 4 or 8 bits in a Hugging Face folder: bitsandbytes' nf4 or int8, torchao's weight-only int8.

The merged model is quantized, never the adapted one: merging into quantized weights rounds twice. Embedding, head and
norms stay as they are. transformers reads the folder where the same package is installed.
"""

import importlib
import json
import logging
from pathlib import Path
from typing import Any

from pipeline.export import check as checks
from pipeline.export.config import QuantizedConfig
from pipeline.export.model_folder import ModelFolder

VERSION = 1
BLOCK, ROWS = 64, 32  # nf4: weights that share a scale; rows that its CPU kernel packs together


def refusal(model: ModelFolder, config: QuantizedConfig) -> str | None:
    """A model that is quantized already is not quantized again."""
    if model.said.get("quantization_config"):
        return "its weights are quantized already; export from the unquantized folder"
    return None


def write(model: ModelFolder, out: Path, config: QuantizedConfig) -> dict[str, Any]:
    """Quantize and save. Returns the bytes of the weights before and after."""
    from pruning.checkpoint import load_tokenizer, save

    kept = unquantized(model) if config.scheme == "nf4" else []
    loaded = _from_pretrained(model.path, quantization_config=_settings(config.scheme, kept))
    try:
        tokenizer = load_tokenizer(model.path)
    except (OSError, ValueError, AttributeError):
        tokenizer = None
    save(loaded, tokenizer, out)
    before, after = (weight_bytes(folder) for folder in (model.path, out))
    return {
        "scheme": config.scheme,
        "trust_remote_code": model.own,
        "bytes": after,
        "bytes_before": before,
        "fallback": [
            f"{name}: not quantized ({ROWS} divides not its rows, or {BLOCK} not their width)" for name in kept
        ],
    }


def unquantized(model: ModelFolder) -> list[str]:
    """Projections that nf4 leaves alone: bitsandbytes' CPU kernel packs rows by 32, and their weights in blocks of 64,
    and fails on anything else. FFN widths that are a multiple of 64 (`round_to: 64`) leave none."""
    shape, found = model.shape, []
    for index, layer in enumerate(shape.layers):
        query, key, d = layer.groups * layer.heads * shape.head_dim, layer.groups * shape.head_dim, shape.hidden
        sizes = {"q": (query, d), "k": (key, d), "v": (key, d), "o": (d, query)}
        named = {f"self_attn.{letter}_proj": size for letter, size in sizes.items()}
        named |= {"mlp.gate_proj": (layer.ffn, d), "mlp.up_proj": (layer.ffn, d), "mlp.down_proj": (d, layer.ffn)}
        for name, (rows, columns) in named.items():
            if rows % ROWS or columns % BLOCK:
                found.append(f"model.layers.{index}.{name}")
    return found


def check(model: ModelFolder, out: Path, config: QuantizedConfig, ids: list[int] | None = None) -> dict[str, Any]:
    """transformers on the folder against the unquantized model: what differs is the rounding."""
    return checks.with_transformers(model, out, remote=model.own, exact=False, ids=ids)


def is_quantized(folder: Path) -> bool:
    """Whether a folder holds weights of few bits."""
    return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def load(folder: Path, device: str = "cpu") -> Any:
    """A model of few bits from its folder, on the device, in evaluation mode."""
    return _from_pretrained(folder, device_map={"": device}).eval()


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _from_pretrained(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from pruning.checkpoint import own_class

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line for every layer's every call
    options = {"device_map": {"": "cpu"}, "dtype": "auto", "use_safetensors": True, **options}
    return (own_class(folder) or AutoModelForCausalLM).from_pretrained(folder, **options)


def _settings(scheme: str, kept: list[str]) -> Any:
    import torch
    import transformers

    if scheme == "torchao_int8":
        torchao: Any = importlib.import_module("torchao.quantization")
        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    if scheme == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *kept] if kept else None,
    )
