"""A folder for vLLM: stock classes where layers are equal, DeciLM's `block_configs` where they differ.

vLLM's DeciLMForCausalLM (Nemotron-NAS) gives every layer its own FFN width and its own number of key-value heads, as
`n_heads_in_group`, but one number of query heads. `ffn_mult` would win over `intermediate_size` and is never written.
The modeling file beside the weights reads the same `block_configs` in transformers: that is what the check runs. No
vLLM ran on it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.export import check as checks
from pipeline.export import hf
from pipeline.export.config import HfConfig, VllmConfig
from pipeline.export.model_folder import ModelFolder

VERSION = 2
NOT_RUN = "no vLLM ran on it: its keys follow vLLM's reader of block_configs, and transformers reads the same folder"
CLASS = "DeciLMForCausalLM"


def refusal(model: ModelFolder, config: VllmConfig) -> str | None:
    """Why vLLM cannot serve these widths, and the nearest it can; None where it can."""
    layers = model.shape.layers
    if model.uniform:
        try:
            if model.own:
                hf.stock(model, layers[0])
        except ValueError as error:
            return f"{str(error).partition(';')[0]}; use hf:pad"
        return None
    heads = [layer.groups * layer.heads for layer in layers]
    if len(set(heads)) > 1:
        found = ", ".join(str(count) for count in sorted(set(heads)))
        return (
            f"layers have {found} query heads, and vLLM has one number for all; the nearest it serves: every layer "
            f"padded to {max(heads)} heads (hf:pad), or prune with shape: vllm"
        )
    shape = model.shape
    unread = {
        "biases": shape.qkv_bias or shape.output_bias or shape.mlp_bias,
        "norms of q and k": shape.head_norms,
        "a sliding window": 0 < (model.said.get("sliding_window") or 0) < model.said["max_position_embeddings"],
    }
    if found := " and ".join(what for what, there in unread.items() if there):
        return f"layers differ and have {found}, which vLLM's DeciLM is not known to read; use hf:pad"
    return None


def write(model: ModelFolder, out: Path, config: VllmConfig) -> dict[str, Any]:
    """Write the folder. Returns the class and what was not run."""
    if model.uniform:
        return {**hf.write(model, out, HfConfig(format="hf")), "vllm": NOT_RUN}
    out.mkdir(parents=True, exist_ok=True)
    hf.copy_rest(model, out)
    for name, tensors in model.shards():
        hf.save(tensors, out / name)
    hf.copy_index(model, out)
    (out / "config.json").write_text(json.dumps(block_configs(model), indent=2), encoding="utf-8")
    shutil.copyfile(Path(__file__).parent / "modeling_decilm.py", out / "modeling_decilm.py")
    return {"class": CLASS, "trust_remote_code": True, "vllm": NOT_RUN}


def check(model: ModelFolder, out: Path, config: VllmConfig, ids: list[int] | None = None) -> dict[str, Any]:
    """The keys against vLLM's rules, then transformers on the folder."""
    said = json.loads((out / "config.json").read_text(encoding="utf-8"))
    found = checks.with_transformers(model, out, remote="auto_map" in said, ids=ids)
    return {**found, "vllm": NOT_RUN, "tensor_parallel_sizes": parallel_sizes(model)}


def block_configs(model: ModelFolder) -> dict[str, Any]:
    """The entries of config.json: no per-layer keys but `block_configs`."""
    layers, said = model.shape.layers, model.said
    heads = layers[0].groups * layers[0].heads
    gone = ("per_layer_config", "num_key_value_heads", "intermediate_size", "auto_map", "architectures", "model_type")
    kept = {key: value for key, value in said.items() if key not in gone}
    blocks = [
        {
            "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": heads // layer.groups},
            "ffn": {"no_op": False, "replace_with_linear": False, "intermediate_size": layer.ffn},
        }
        for layer in layers
    ]
    return {
        **kept,
        "architectures": [CLASS],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "modeling_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "num_attention_heads": heads,
        "head_dim": model.shape.head_dim,
        "block_configs": blocks,
    }


def parallel_sizes(model: ModelFolder, most: int = 8) -> list[int]:
    """Numbers of devices that divide every layer's query heads, key-value heads and FFN channels."""
    counts = [(layer.groups * layer.heads, layer.groups, layer.ffn) for layer in model.shape.layers]
    return [size for size in range(1, most + 1) if not any(n % size for layer in counts for n in layer)]
