"""RoRA: LoRA scaled by alpha / sqrt(rank), so that gradients do not fade as the rank grows.

Paper: arXiv 2501.04315; the formula is rsLoRA's (arXiv 2312.03732). dW = s B A with s = alpha / sqrt(rank); shapes,
start, parameters and merge are LoRA's. RoRA(alpha, rank) equals LoRA(alpha sqrt(rank), rank): compare the two at equal
scale. Ranks, alphas and learning rates of the paper's tables are not published in reach; the defaults are what won in
`docs/results.md`. With rank >= 64 and alpha = 2 rank the scale is 16 or more: lower alpha or the learning rate if the
loss jumps; at rank and alpha 128 a rate of 1e-4 did better than the default there.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from recovery.adapters import lora

VERSION, READS = 2, 1


class Config(lora.LowRankConfig, frozen=True):
    """RoRA's options."""

    learning_rate: ClassVar[float] = 5e-4
    method: Literal["rora"] = "rora"
    rank: int = Field(default=32, ge=1, description="inner size of B A")
    alpha: float = Field(default=32.0, gt=0, description="numerator of the scale")


class Method(lora.Method[Config]):
    """LoRA with another scale."""

    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank)
