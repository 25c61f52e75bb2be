"""SoRA: LoRA with a trained gate on every component, which a proximal step drives to exactly zero.

Paper: arXiv 2311.11696. dW = s B diag(gate) A with s = alpha / rank; gate [rank] starts N(0, 1), A and B as LoRA's,
all trained: rank (in + out) + rank parameters. After every optimizer step each gate moves towards zero by `threshold`
and stops there: sign(g) max(|g| - threshold, 0). What is zero at the end costs nothing: each layer finds its rank.
Merge: W + dW. The paper's setting: rank 8, threshold 3e-4 at a learning rate of 8e-4.

Ours: the true proximal operator (the original zeroes below twice the threshold), and it alone: the original also adds
10 times the mean |gate| to the loss. As in the original, the threshold is a step's, not multiplied by the learning
rate: with few steps raise it, or nothing reaches zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from recovery.adapters import lora
from recovery.base import Adapter, Layer, Tensors, generator_of, random_normal

if TYPE_CHECKING:
    from torch import Tensor

VERSION, READS = 2, 1


class Config(lora.FactorsConfig, frozen=True):
    """SoRA's options."""

    method: Literal["sora"] = "sora"
    threshold: float = Field(default=3e-4, ge=0, description="how far a step moves every gate towards zero")


class Method(lora.Method[Config]):
    """One layer's A, B and gates."""

    undecayed = ("gate",)  # what shrinks gates is the proximal step

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.trainable["gate"] = random_normal((self.rank,), 1.0, generator_of(layer.seed, "gate"))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.trainable["A"], self.trainable["B"] * self.trainable["gate"]

    @classmethod
    def after_step(cls, layers: Mapping[str, Adapter[Any]], share: float) -> None:
        for layer in layers.values():
            gate, threshold = layer.trainable["gate"], layer.config.threshold
            gate.copy_(gate.sign() * (gate.abs() - threshold).clamp_min(0))
