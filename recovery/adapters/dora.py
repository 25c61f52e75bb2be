"""DoRA: direction by LoRA, magnitude by one trained number a row.

Paper: arXiv 2402.09353. W' = m * (W + s B A) / ||W + s B A||, norm and m per row (output), s = alpha / rank;
m [out] starts at the rows' norms of W, so the start is exact. The norm is a constant in the backward pass. Trained:
A, B (as LoRA's) and m: rank (in + out) + out parameters. What is added to W x is (m/norm - 1) W x + (m/norm) s B A x,
with dropout on x in both terms. Merge: W', norms taken from the unmerged weight in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from recovery.adapters import lora
from recovery.base import Layer, Tensors

if TYPE_CHECKING:
    from torch import Tensor

VERSION, READS = 2, 1


class Config(lora.FactorsConfig, frozen=True):
    """DoRA's options."""

    method: Literal["dora"] = "dora"


class Magnitude(lora.LowRank[lora.L]):
    """The magnitude m over whatever low-rank direction `factors` gives."""

    undecayed = ("magnitude",)  # to decay it would shrink the rows of the weight, not what was added to them

    def __init__(self, config: lora.L, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.trainable["magnitude"] = layer.weight.detach().float().norm(dim=1).cpu()

    def _ratio(self, weight: Tensor) -> Tensor:
        """m / norm, float32 [out]. A row of zeros has m = 0 and the ratio 1: B may still move it."""
        down, up = (factor.detach() for factor in self.factors())
        norm = (weight.detach().float() + self.scale() * (up @ down)).norm(dim=1)
        magnitude = self.trainable["magnitude"]
        # At the start m and norm are the same number, and the ratio is exactly 1.
        return (magnitude / norm.clamp_min(1e-30)).where(norm > 0, magnitude + 1)

    def delta(self, weight: Tensor) -> Tensor:
        original = weight.detach().float()
        return self._ratio(weight)[:, None] * (original + super().delta(weight)) - original

    def forward(self, x: Tensor, weight: Tensor, product: Tensor | None) -> Tensor:
        ratio = self._ratio(weight)
        product = x @ weight.T if product is None else product
        return ((ratio - 1) * product + ratio * super().forward(x, weight, product)).to(x.dtype)


class Method(Magnitude[Config], lora.Method[Config]):
    """LoRA's A and B, and the magnitude m."""
