"""RoRA: LoRA scaled by alpha / sqrt(rank), so that gradients do not fade as the rank grows.

Paper: arXiv 2501.04315; the formula is rsLoRA's (arXiv 2312.03732). dW = s B A with s = alpha / sqrt(rank); all else
is LoRA's. RoRA(alpha, rank) equals LoRA(alpha sqrt(rank), rank): compare the two at equal scale. Ranks and alphas of
the paper's tables are not published in reach; the defaults are ours.
"""

from __future__ import annotations

import math
from typing import Literal

from recovery.adapters import lora

VERSION = 1


class Config(lora.LowRankConfig):
    """RoRA's options."""

    method: Literal["rora"] = "rora"


class Method(lora.Method):
    """LoRA with another scale."""

    def scale(self) -> float:
        return self.config.alpha / math.sqrt(self.config.rank)
