"""A Hugging Face folder: a stock class where layers are equal, the modeling file beside the weights where they differ.

With `pad: true` layers that differ are padded to the widest with zeros: the columns of o_proj and down_proj that read a
padded head or channel are zero, so the function is the same, the modeling file is not needed, and nothing is saved in
memory or time against the widest layer.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from pipeline.export import check as checks
from pipeline.export.config import HfConfig
from pipeline.export.model_folder import ModelFolder
from pruning.architecture import LayerShape
from pruning.config import OWN

VERSION = 1
NEEDLESS = ("*.safetensors", "*.bin", "*.py", "*.gguf", "config.json", "*.index.json", "README.md", "manifest.json")


def refusal(model: ModelFolder, config: HfConfig) -> str | None:
    """Every served model has a folder; padding needs layers that differ."""
    if config.pad and not model.own:
        return "its layers have the same widths already, so there is nothing to pad; use hf"
    return None


def write(model: ModelFolder, out: Path, config: HfConfig) -> dict[str, Any]:
    """Write the folder. Returns its class, whether it needs trust_remote_code, and what padding costs."""
    out.mkdir(parents=True, exist_ok=True)
    copy_rest(model, out)
    shape = widest(model) if config.pad else None
    made = _write_config(model, out, shape)
    for name, tensors in model.shards():
        padded = (
            tensors if shape is None else {key: _padded(key, value, model, shape) for key, value in tensors.items()}
        )
        save(padded, out / name)
    copy_index(model, out)
    result: dict[str, Any] = {"class": made, "trust_remote_code": made in OWN}
    if shape:
        before, after = (
            model.shape.parameters(),
            model.shape.with_layers([shape] * len(model.shape.layers)).parameters(),
        )
        result["padding"] = {"parameters": before, "parameters_padded": after, "larger_by": after / before - 1}
    return result


def _write_config(model: ModelFolder, out: Path, padded: LayerShape | None) -> str:
    """`config.json`, and the modeling file where it takes one. Returns the class."""
    from pruning import modeling_regrow

    said = dict(model.said)
    shape = padded or (model.shape.layers[0] if model.own and model.uniform else None)
    if shape:
        try:
            made, made_class = stock(model, shape)
            made.architectures, made.dtype = [made_class.__name__], said.get("dtype")
            made.save_pretrained(out)
            return made_class.__name__
        except ValueError:
            if padded:
                raise  # unpadded, the modeling file does what no stock class can
    if model.own:
        said["auto_map"] = {
            "AutoConfig": f"modeling_regrow.{model.name.replace('ForCausalLM', 'Config')}",
            "AutoModelForCausalLM": f"modeling_regrow.{model.name}",
        }
        shutil.copyfile(modeling_regrow.__file__, out / "modeling_regrow.py")
    (out / "config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    return model.name


def stock(model: ModelFolder, shape: LayerShape) -> tuple[Any, Any]:
    """Config and stock class of the model where every layer has this shape. Raises ValueError where none holds it."""
    from pruning.surgery import target

    count = len(model.shape.layers)
    return target(model.name, model.said, [shape] * count, list(range(count)), model.shape.hidden)


def check(model: ModelFolder, out: Path, config: HfConfig, ids: list[int] | None = None) -> dict[str, Any]:
    """transformers on the folder, in the dtype it is saved in."""
    said = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return checks.with_transformers(model, out, remote="auto_map" in said, ids=ids)


def widest(model: ModelFolder) -> LayerShape:
    """The smallest layer that holds every layer and that a stock class takes: Llama's biases are Llama's alone, whose
    heads have to divide the hidden size."""
    layers, shape = model.shape.layers, model.shape
    ffn, groups, heads = (max(getattr(layer, part) for layer in layers) for part in ("ffn", "groups", "heads"))
    if model.name == "RegrowForCausalLM" and (shape.output_bias or shape.mlp_bias):
        while shape.hidden % (groups * heads):
            groups += 1
            if groups > shape.hidden:
                raise ValueError(f"no number of heads of {heads} a group divides {shape.hidden}")
    return LayerShape(ffn, groups, heads)


def copy_rest(model: ModelFolder, out: Path) -> None:
    """Tokenizer, generation config, licence: everything but weights, config and code."""
    for file in model.path.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in NEEDLESS):
            shutil.copyfile(file, out / file.name)


def copy_index(model: ModelFolder, out: Path) -> None:
    """The shards' index, where there is one, with the written files' size."""
    index = model.path / "model.safetensors.index.json"
    if index.is_file():
        said = json.loads(index.read_text(encoding="utf-8"))
        said["metadata"] = {"total_size": sum(file.stat().st_size for file in out.glob("*.safetensors"))}
        (out / index.name).write_text(json.dumps(said, indent=1), encoding="utf-8")


def save(tensors: dict[str, Any], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _padded(name: str, tensor: Any, model: ModelFolder, to: LayerShape) -> Any:
    """One tensor of a layer, with zeros where the wider layer has more: heads inside groups, then groups, channels."""
    import torch

    if not name.startswith("model.layers."):
        return tensor
    index, part, projection = name.split(".")[2:5]
    old, size = model.shape.layers[int(index)], model.shape.head_dim
    if part == "mlp":
        blocks, wider = (old.ffn,), (to.ffn,)
    elif projection in ("q_proj", "o_proj"):
        blocks, wider = (old.groups, old.heads, size), (to.groups, to.heads, size)
    elif projection in ("k_proj", "v_proj"):
        blocks, wider = (old.groups, size), (to.groups, size)
    else:
        return tensor
    writes = projection in ("o_proj", "down_proj")
    if writes and tensor.ndim == 1:
        return tensor  # a bias on the residual stream
    values = tensor.T if writes else tensor
    rest = values.shape[1:]
    result = torch.zeros(*wider, *rest, dtype=tensor.dtype)
    result[tuple(slice(count) for count in blocks)] = values.reshape(*blocks, *rest)
    result = result.reshape(math.prod(wider), *rest)
    return result.T if writes else result
