"""LoRA: a low-rank delta, scaled by alpha / rank.

Paper: arXiv 2106.09685. dW = s B A with s = alpha / rank; A [rank, in] uniform in +-1/sqrt(in) (Kaiming with
a = sqrt 5), B [out, rank] zero, both trained. Merge: W + s B A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from recovery.base import Adapter, AdapterConfig, Layer

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


class LowRankConfig(AdapterConfig):
    """Options of the low-rank family."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)


class Config(LowRankConfig):
    """LoRA's options."""

    method: Literal["lora"] = "lora"


class Method(Adapter):
    """One layer's A and B."""

    config: LowRankConfig

    def __init__(self, config: LowRankConfig, layer: Layer) -> None:
        super().__init__(config, layer)
        bound = layer.inputs**-0.5
        down = layer.weight.new_empty(config.rank, layer.inputs, dtype=None).float().cpu()
        self.trainable["A"] = down.uniform_(-bound, bound, generator=layer.generator)
        self.trainable["B"] = down.new_zeros(layer.outputs, config.rank)

    def scale(self) -> float:
        """s, the factor of B A."""
        return self.config.alpha / self.config.rank

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale() * (self.trainable["B"] @ self.trainable["A"])

    def forward(self, x: Tensor, dropped: Tensor, weight: Tensor) -> Tensor:
        down, up = self.trainable["A"].to(x.dtype), self.trainable["B"].to(x.dtype)
        return (dropped @ down.T) @ (self.scale() * up).T
