"""Cutting: slice the kept structures out of the weights, and build the smaller model that holds them."""

from typing import Any

import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedConfig, PreTrainedModel

from pruning.allocation import Kept
from pruning.modeling_regrow import RegrowConfig, RegrowForCausalLM
from pruning.structures import Member, decoder_layers, members

LLAMA = ("LlamaForCausalLM", "MistralForCausalLM", "RegrowForCausalLM")


def cut(model: PreTrainedModel, kept: list[Kept]) -> PreTrainedModel:
    """A new model with only the kept structures. Consumes `model`: its layers are sliced one by one, so that no more
    than one projection exists twice.

    Uniform widths give the same stock class (Mistral's where Llama's config refuses the head count), other widths a
    RegrowForCausalLM. Raises ValueError, with nothing cut, when no class can hold the result.
    """
    layers = decoder_layers(model)
    config, model_class = _target(model, [_layer_config(layer, keep) for layer, keep in zip(layers, kept, strict=True)])
    for layer, keep in zip(layers, kept, strict=True):
        for kind, indices in keep.items():
            for member in members(layer, kind):
                _slice(member, indices)
    return _assemble(model, config, model_class)


def _layer_config(layer: nn.Module, keep: Kept) -> dict[str, int]:
    """The layer's entries of a config once it is cut."""
    attention = layer.get_submodule("self_attn")
    head = int(attention.head_dim)  # pyright: ignore[reportArgumentType]
    key = layer.get_submodule("self_attn.k_proj").out_features // head  # pyright: ignore[reportOperatorIssue]
    query = layer.get_submodule("self_attn.q_proj").out_features // head  # pyright: ignore[reportOperatorIssue]
    width = layer.get_submodule("mlp.gate_proj").out_features
    groups = len(keep["attention"]) if "attention" in keep else key
    return {
        "num_attention_heads": groups * (query // key),
        "num_key_value_heads": groups,
        "intermediate_size": len(keep["ffn"]) if "ffn" in keep else width,  # pyright: ignore[reportReturnType]
    }


def _target(model: PreTrainedModel, layers: list[dict[str, int]]) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Config and class that hold layers of these widths."""
    name, old = type(model).__name__, model.config
    said: dict[str, Any] = old.to_dict()
    said.pop("per_layer_config", None)
    said["head_dim"] = decoder_layers(model)[0].get_submodule("self_attn").head_dim
    if any(layer != layers[0] for layer in layers):
        if name not in LLAMA:
            raise ValueError(f"shape: {name} has no class for layers of different widths; set shape: uniform")
        widest = {key: max(layer[key] for layer in layers) for key in layers[0]}
        own = {str(index): layer for index, layer in enumerate(layers)}
        said = {**_without(said), **widest, "per_layer_config": own}
        return RegrowConfig(**said), RegrowForCausalLM
    said.update(layers[0])
    if name == "LlamaForCausalLM" and said["hidden_size"] % said["num_attention_heads"]:
        if said.get("attention_bias") or said.get("mlp_bias"):
            heads = said["num_attention_heads"]
            raise ValueError(f"{heads} heads do not divide hidden size {said['hidden_size']} and Mistral has no biases")
        # Mistral's config does not ask for divisibility; without a window its model computes what Llama's does.
        said = {key: value for key, value in _without(said).items() if not key.endswith("_bias")}
        return MistralConfig(**said, sliding_window=None), MistralForCausalLM
    return type(old)(**_without(said)), type(model)


def _without(said: dict[str, Any]) -> dict[str, Any]:
    """A config's entries less those that name the old class."""
    return {key: value for key, value in said.items() if key not in ("model_type", "architectures", "auto_map")}


def _slice(member: Member, indices: list[int]) -> None:
    """Keep these units of one projection."""
    linear, size = member.linear, member.size
    weight = linear.weight
    units = torch.tensor(indices, device=weight.device)
    rows = (units[:, None] * size + torch.arange(size, device=weight.device)).flatten()
    linear.weight = nn.Parameter(weight.detach().index_select(member.dimension, rows), requires_grad=False)
    if member.dimension == 0:
        linear.out_features = len(rows)
        if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            linear.bias = nn.Parameter(linear.bias.detach()[rows], requires_grad=False)
    else:
        linear.in_features = len(rows)


def _assemble(model: PreTrainedModel, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """The sliced weights in a model of the new class; tensors are taken over, not copied."""
    config.dtype = model.dtype
    device, state = model.device, model.state_dict()
    with torch.device("meta"):
        new = model_class(config)
    new.load_state_dict(state, assign=True)
    new.tie_weights()
    # Rotary frequencies are not part of the state: take them over from the old model, where they are real.
    decoder: Any = new.get_decoder()
    decoder.rotary_emb = model.get_decoder().rotary_emb
    new.generation_config = model.generation_config
    if any(tensor.is_meta for tensor in (*new.parameters(), *new.buffers())):
        raise RuntimeError(f"{model_class.__name__}: a weight was not carried over")
    new.to(device=device)  # pyright: ignore[reportCallIssue]
    return new.eval()
