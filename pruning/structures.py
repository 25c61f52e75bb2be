"""What a LLaMA-family decoder layer is made of, and what removing a part of it frees.

Two kinds of structure, each a set of weights that can only go together:

    ffn        channel j: row j of gate_proj and up_proj, column j of down_proj: 3 d parameters
    attention  key-value group j of head_dim h with its q query heads: h rows of k_proj and v_proj, q h rows of
               q_proj, q h columns of o_proj: 2 d h (q + 1) parameters

With grouped-query attention the query heads of group j are the contiguous block j q .. j q + q - 1. Biases of the
row-sliced projections go with their rows; norms over the head dimension (Qwen3) belong to no head and stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.config import SERVED, Kind


@dataclass(frozen=True)
class Member:
    """One projection's share in a kind of structure: unit j owns `size` indices of `dimension` from j * size on.

    `dimension` is 0 for rows (outputs; the bias goes along) and 1 for columns (inputs).
    """

    name: str
    linear: nn.Linear
    dimension: int
    size: int

    def per_unit(self, values: Tensor) -> Tensor:
        """Sum values of the weight's shape [out, in] over each unit: float32 [units]."""
        return self.per_index(values).view(-1, self.size).sum(1)

    def per_index(self, values: Tensor) -> Tensor:
        """Sum values of the weight's shape [out, in] over each row or column: float32 [units * size]."""
        return values.float().sum(1 - self.dimension)


@dataclass(frozen=True)
class Widths:
    """How many structures a layer has, and how many parameters one of each frees."""

    ffn: int
    attention: int
    ffn_cost: int
    attention_cost: int

    def count(self, kind: Kind) -> int:
        return self.ffn if kind == "ffn" else self.attention

    def cost(self, kind: Kind) -> int:
        return self.ffn_cost if kind == "ffn" else self.attention_cost


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers. Raises ValueError for a model that is not LLaMA-like."""
    name = type(model).__name__
    if name not in SERVED:
        raise ValueError(f"{name} is not served: its layers are not LLaMA's; served are {', '.join(SERVED)}")
    decoder: Any = model.get_decoder()
    return list(decoder.layers)


def members(layer: nn.Module, kind: Kind) -> list[Member]:
    """The projections that hold a layer's structures of one kind."""
    if kind == "ffn":
        mlp = layer.get_submodule("mlp")
        sides = (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
        return [Member(f"mlp.{name}", _linear(mlp, name), dimension, 1) for name, dimension in sides]
    attention = layer.get_submodule("self_attn")
    head = int(attention.head_dim)  # pyright: ignore[reportArgumentType]
    q, k, v, o = (_linear(attention, f"{name}_proj") for name in "qkvo")
    block = head * (q.out_features // k.out_features)
    return [
        Member("self_attn.q_proj", q, 0, block),
        Member("self_attn.k_proj", k, 0, head),
        Member("self_attn.v_proj", v, 0, head),
        Member("self_attn.o_proj", o, 1, block),
    ]


def widths(layer: nn.Module) -> Widths:
    """A layer's structures, counted from its weights."""
    counts: list[int] = []
    costs: list[int] = []
    for kind in ("ffn", "attention"):
        found = members(layer, kind)
        first = found[0]
        counts.append(first.linear.weight.shape[first.dimension] // first.size)
        costs.append(sum(_freed(member) for member in found))
    return Widths(counts[0], counts[1], costs[0], costs[1])


def named_members(model: PreTrainedModel, kinds: tuple[Kind, ...]) -> Iterator[tuple[int, Kind, Member]]:
    """(layer, kind, member) for every projection of the asked kinds."""
    for index, layer in enumerate(decoder_layers(model)):
        for kind in kinds:
            for member in members(layer, kind):
                yield index, kind, member


def count_parameters(model: PreTrainedModel) -> int:
    """All parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = module.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{name} is a {type(linear).__name__}, not a torch.nn.Linear: prune before quantizing")
    return linear


def _freed(member: Member) -> int:
    weight, bias = member.linear.weight, member.linear.bias
    freed = member.size * weight.shape[1 - member.dimension]
    return freed + (member.size if member.dimension == 0 and bias is not None else 0)  # pyright: ignore
