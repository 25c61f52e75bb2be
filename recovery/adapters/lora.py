"""LoRA: a low-rank delta, scaled by alpha / rank.

Paper: arXiv 2106.09685. dW = s B A with s = alpha / rank; A [rank, in] uniform in +-1/sqrt(in) (Kaiming with
a = sqrt 5), B [out, rank] zero, both trained: rank (in + out) parameters. Merge: W + s B A. Seeding A by layer is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from recovery.base import Adapter, AdapterConfig, Layer, Tensors, generator_of, random_uniform, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2


class LowRankConfig(AdapterConfig, frozen=True):
    """Options of the low-rank family."""

    rank: int = Field(default=8, ge=1, description="inner size of B A")
    alpha: float = Field(default=16.0, gt=0, description="numerator of the scale")


class Config(LowRankConfig, frozen=True):
    """LoRA's options."""

    method: Literal["lora"] = "lora"


class Method(Adapter[LowRankConfig]):
    """One layer's A and B."""

    def __init__(self, config: LowRankConfig, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        bound = layer.inputs**-0.5
        self.trainable["A"] = random_uniform((config.rank, layer.inputs), bound, generator_of(layer.seed))
        self.trainable["B"] = zeros(layer.outputs, config.rank)

    def scale(self) -> float:
        """s, the factor of B A."""
        return self.config.alpha / self.config.rank

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale() * (self.trainable["B"] @ self.trainable["A"])

    def forward(self, x: Tensor, weight: Tensor, product: Tensor | None) -> Tensor:
        down, up = self.trainable["A"].to(x.dtype), (self.scale() * self.trainable["B"]).to(x.dtype)
        return (x @ down.T) @ up.T

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if type(self).forward is not Method.forward or type(self).delta is not Method.delta:
            return super().output(x, weight, bias)  # a method built on this one whose delta is not s B A
        from recovery.products import low_rank

        return low_rank(x, weight, bias, self.trainable["A"], self.scale() * self.trainable["B"])
