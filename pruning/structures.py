"""What a LLaMA-family decoder layer is made of, and which weights each kind of structure owns.

    ffn        channel j: row j of gate_proj and up_proj, column j of down_proj
    attention  key-value group j of head dimension h with its q query heads: h rows of k_proj and v_proj, q h rows of
               q_proj, q h columns of o_proj
    heads      query head j: h rows of q_proj, h columns of o_proj; every group of a layer loses the same number
    hidden     channel j of the residual stream: entry j of every norm, column j of q, k, v, gate and up_proj, of the
               embedding and the head, row j of o_proj and down_proj, in all layers
    layers     a whole decoder layer

With grouped-query attention the query heads of group j are the contiguous block j q .. j q + q - 1. Biases of the
row-sliced projections go with their rows; norms over the head dimension (Qwen3) belong to no head and stay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.architecture import Architecture, LayerShape
from pruning.config import SERVED, Kind

ATTENTION = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
FFN = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
READERS = (*ATTENTION[:3], *FFN[:2])  # projections that read the residual stream; the other two write to it
WRITERS = (ATTENTION[3], FFN[2])
NORMS = ("input_layernorm", "post_attention_layernorm")

# Scores: for ffn, attention and heads one float32 tensor a layer; for hidden [d] and layers [L] a single one.
Scores = dict[Kind, list[Tensor]]
# Numbers for every row and column of every weight: "layers.3.mlp.up_proj.rows", "embed.columns", "norm.columns".
Vectors = dict[str, Tensor]


@dataclass(frozen=True)
class KeptLayer:
    """One layer that stays: its index, and the sorted indices of its structures that stay, numbered as they were."""

    index: int
    ffn: list[int]
    attention: list[int]
    heads: list[int]

    @property
    def shape(self) -> LayerShape:
        return LayerShape(len(self.ffn), len(self.attention), len(self.heads) // len(self.attention))


@dataclass(frozen=True)
class Kept:
    """All that stays: layers, and sorted indices of the residual stream's channels."""

    layers: list[KeptLayer]
    hidden: list[int]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers. Raises ValueError for a model that is not LLaMA-like."""
    name = type(model).__name__
    if name not in SERVED:
        raise ValueError(f"{name} is not served: its layers are not LLaMA's; served are {', '.join(SERVED)}")
    decoder: Any = model.get_decoder()
    return list(decoder.layers)


def architecture(model: PreTrainedModel) -> Architecture:
    """The model's shape. Raises ValueError for a model that is not LLaMA-like or whose projections are not plain."""
    for layer in decoder_layers(model):
        for name in (*ATTENTION, *FFN):
            linear = layer.get_submodule(name)
            if type(linear) is not nn.Linear:
                kind = type(linear).__name__
                raise ValueError(f"{name} is a {kind}, not a torch.nn.Linear: prune before quantizing or adapting")
    return Architecture.read(model.config.to_dict())


def count_parameters(model: PreTrainedModel) -> int:
    """All parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def named_weights(model: PreTrainedModel, hidden: bool) -> dict[str, nn.Parameter]:
    """Every weight that a structure owns, by the name that `Vectors` uses; `hidden` adds embedding, head and norms."""
    found: dict[str, nn.Parameter] = {}
    for index, layer in enumerate(decoder_layers(model)):
        for name in (*ATTENTION, *FFN, *(NORMS if hidden else ())):
            weight = layer.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            found[f"layers.{index}.{name}"] = weight
    if hidden:
        ends: Any = model  # transformers leaves these untyped
        found |= {"embed": ends.get_input_embeddings().weight, "norm": ends.get_decoder().norm.weight}
        if ends.get_output_embeddings().weight is not found["embed"]:
            found["head"] = ends.get_output_embeddings().weight
    return found


def couple(vectors: Vectors, shape: Architecture, kinds: tuple[Kind, ...]) -> Scores:
    """Sum numbers of rows and columns over all that a structure owns.

    For layers that is every weight of the layer's projections.
    """
    scores: Scores = {}
    for kind in kinds:
        if kind == "hidden":
            scores[kind] = [_hidden(vectors, len(shape.layers))]
        elif kind == "layers":
            totals = [
                torch.stack([vectors[f"layers.{index}.{name}.rows"].sum() for name in (*ATTENTION, *FFN)]).sum()
                for index in range(len(shape.layers))
            ]
            scores[kind] = [torch.stack(totals)]
        else:
            scores[kind] = [_width(vectors, index, kind, shape) for index in range(len(shape.layers))]
    return scores


def per_output_unit(
    features: Callable[[str], Tensor], shape: Architecture, kinds: tuple[Kind, ...], mean: bool = False
) -> Scores:
    """Sum (or mean) of numbers for the input features of o_proj and down_proj over each unit that feeds them.

    `features` maps a projection's name ("layers.3.mlp.down_proj") to float32 [in]; ffn, attention and heads only.
    """
    scores: Scores = {}
    for kind in kinds:
        name = WRITERS[1] if kind == "ffn" else WRITERS[0]
        sizes = {"ffn": lambda _: 1, "heads": lambda _: shape.head_dim, "attention": lambda n: shape.head_dim * n}
        scores[kind] = []
        for index, layer in enumerate(shape.layers):
            values = features(f"layers.{index}.{name}").view(-1, sizes[kind](layer.heads))
            scores[kind].append(values.mean(1) if mean else values.sum(1))
    return scores


def _width(vectors: Vectors, index: int, kind: Kind, shape: Architecture) -> Tensor:
    q, k, v, o = (f"layers.{index}.{name}" for name in ATTENTION)
    gate, up, down = (f"layers.{index}.{name}" for name in FFN)
    size = shape.head_dim
    if kind == "ffn":
        return vectors[f"{gate}.rows"] + vectors[f"{up}.rows"] + vectors[f"{down}.columns"]
    query = vectors[f"{q}.rows"] + vectors[f"{o}.columns"]
    if kind == "heads":
        return query.view(-1, size).sum(1)
    block = size * shape.layers[index].heads
    key = vectors[f"{k}.rows"] + vectors[f"{v}.rows"]
    return query.view(-1, block).sum(1) + key.view(-1, size).sum(1)


def _hidden(vectors: Vectors, layers: int) -> Tensor:
    parts = [vectors[f"{name}.columns"] for name in ("embed", "head", "norm") if f"{name}.columns" in vectors]
    for index in range(layers):
        parts += [vectors[f"layers.{index}.{name}.columns"] for name in (*READERS, *NORMS)]
        parts += [vectors[f"layers.{index}.{name}.rows"] for name in WRITERS]
    return torch.stack(parts).sum(0)
