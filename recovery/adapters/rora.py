"""RoRA: LoRA scaled by alpha / sqrt(rank), so that gradients do not fade as the rank grows.

Paper: arXiv 2501.04315; the formula is rsLoRA's (arXiv 2312.03732). dW = s B A with s = alpha / sqrt(rank); shapes,
start, parameters and merge are LoRA's. RoRA(alpha, rank) equals LoRA(alpha sqrt(rank), rank): compare the two at equal
scale. Ranks, alphas and learning rates of the paper's tables are not published in reach; the defaults are what won in
`docs/results.md`. The scale grows with the rank, so the learning rate must fall: the default is 0.016 / alpha, at
most 2e-3.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from recovery.adapters import lora

VERSION, READS = 2, 1


class Config(lora.FactorsConfig, frozen=True):
    """RoRA's options."""

    method: Literal["rora"] = "rora"
    rank: int = Field(default=32, ge=1, description="inner size of B A")
    alpha: float = Field(default=32.0, gt=0, description="numerator of the scale")

    def reach(self, name: str) -> float:
        return self.alpha_of(name)


class Method(lora.Method[Config]):
    """LoRA with another scale."""

    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank)
