"""DoRA: direction by LoRA, magnitude by one trained number a row.

Paper: arXiv 2402.09353. W' = m * (W + s B A) / ||W + s B A||, norm and m per row (output), s = alpha / rank;
m [out] starts at the rows' norms of W, so the start is exact. The norm is a constant in the backward pass. Trained:
A, B (as LoRA's) and m. The part added to W x is (m/norm - 1) W x + (m/norm) s B A x, with dropout on x in both terms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from recovery.adapters import lora
from recovery.base import Layer

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


class Config(lora.LowRankConfig):
    """DoRA's options."""

    method: Literal["dora"] = "dora"


class Method(lora.Method):
    """A, B and the magnitude m."""

    def __init__(self, config: lora.LowRankConfig, layer: Layer) -> None:
        super().__init__(config, layer)
        self.trainable["magnitude"] = layer.weight.detach().float().cpu().norm(dim=1)

    def _ratio(self, weight: Tensor) -> Tensor:
        """m / norm, float32 [out]; a row of zeros stays a row of zeros."""
        norm = (weight.detach().float() + super().delta(weight).detach()).norm(dim=1)
        return self.trainable["magnitude"] / norm.clamp_min(1e-12)

    def delta(self, weight: Tensor) -> Tensor:
        original = weight.detach().float()
        return self._ratio(weight)[:, None] * (original + super().delta(weight)) - original

    def forward(self, x: Tensor, dropped: Tensor, weight: Tensor) -> Tensor:
        ratio = self._ratio(weight)
        base = (dropped @ weight.T).float()
        return ((ratio - 1) * base + ratio * super().forward(x, dropped, weight).float()).to(x.dtype)
