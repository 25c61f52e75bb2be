"""LoRA: a low-rank delta, scaled by alpha / rank.

Paper: arXiv 2106.09685. dW = s B A with s = alpha / rank; A [rank, in] uniform in +-1/sqrt(in) (Kaiming with
a = sqrt 5), B [out, rank] zero, both trained: rank (in + out) parameters. Merge: W + s B A. Seeding A by layer is ours.
`LowRank` serves every method whose delta is s times a product of two thin factors, however it makes them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field

from recovery.base import (
    Adapter,
    AdapterConfig,
    Layer,
    PositiveFloat,
    PositiveInt,
    Tensors,
    generator_of,
    of_pattern,
    random_uniform,
    zeros,
)

if TYPE_CHECKING:
    from torch import Tensor

VERSION, READS = 2, 1
REACHED = 0.016  # s sqrt(rank) rate: from 0.011 to 0.016 did best at ranks 8 to 128 (docs/results.md)


class LowRankConfig(AdapterConfig, frozen=True):
    """Options of the low-rank family. A pattern is a module's name or the end of one; the longest that fits counts."""

    rank: int = Field(default=8, ge=1, description="inner size of B A")
    alpha: float = Field(default=16.0, gt=0, description="numerator of the scale")
    rank_pattern: dict[str, PositiveInt] = Field(default={}, description="rank of the modules a pattern fits")
    alpha_pattern: dict[str, PositiveFloat] = Field(default={}, description="alpha of the modules a pattern fits")

    def rank_of(self, name: str) -> int:
        """The rank of the layer called `name`."""
        return of_pattern(name, self.rank_pattern, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the layer called `name`."""
        return of_pattern(name, self.alpha_pattern, self.alpha)


class FactorsConfig(LowRankConfig, frozen=True):
    """Of the methods that train LoRA's own A and B: their default learning rate follows rank and alpha."""

    def reach(self, name: str) -> float:
        """s sqrt(rank) of a layer: a step of AdamW moves every entry of B by about the rate, whatever the gradient's
        size, and so the delta by about s sqrt(rank) times the rate."""
        return self.alpha_of(name) / math.sqrt(self.rank_of(name))

    def default_rate(self) -> float:
        """The method's, or REACHED over the largest s sqrt(rank) where that is less. The rule is ours."""
        largest = max(self.reach(name) for name in ("", *self.rank_pattern, *self.alpha_pattern))
        return min(self.learning_rate, float(f"{REACHED / largest:.3g}"))


L = TypeVar("L", bound=LowRankConfig)


class LowRank(Adapter[L]):
    """dW = s up down. A method gives `factors`, and its `scale` where that is not alpha / rank."""

    def __init__(self, config: L, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.rank = config.rank_of(layer.name)
        self.alpha = config.alpha_of(layer.name)

    def scale(self) -> float:
        """s, the factor of the product."""
        return self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """down [rank, in] and up [out, rank], in the dtype of the trained tensors."""
        return self.trainable["A"], self.trainable["B"]

    def delta(self, weight: Tensor) -> Tensor:
        down, up = self.factors()
        return self.scale() * (up @ down)

    def forward(self, x: Tensor, weight: Tensor, product: Tensor | None) -> Tensor:
        down, up = self.factors()
        return (x @ down.to(x.dtype).T) @ (self.scale() * up).to(x.dtype).T

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if type(self).forward is not LowRank.forward or type(self).delta is not LowRank.delta:
            return super().output(x, weight, bias)  # a method built on this one with a delta or product of its own
        from recovery.products import low_rank

        down, up = self.factors()
        return low_rank(x, weight, bias, down, self.scale() * up)


class Config(FactorsConfig, frozen=True):
    """LoRA's options."""

    method: Literal["lora"] = "lora"


class Method(LowRank[L]):
    """One layer's A and B."""

    def __init__(self, config: L, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        bound = layer.inputs**-0.5
        self.trainable["A"] = random_uniform((self.rank, layer.inputs), bound, generator_of(layer.seed))
        self.trainable["B"] = zeros(layer.outputs, self.rank)
