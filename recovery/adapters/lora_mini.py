"""LoRA-Mini: four factors, the outer two frozen and random, the inner two trained.

Paper: arXiv 2411.15804, from which only that split is in reach; shapes, start and scale are our construction:
dW = s P B A Q with Q [a, in] entries N(0, 1/in) and P [out, b] entries N(0, 1/b), frozen; A [rank, a] uniform in
+-1/sqrt(a), B [b, rank] zero, trained: rank (a + b) parameters a layer, whatever its size. A Q has the variance of
LoRA's A, and P B the size of LoRA's B. s = alpha / rank. Merge: W + dW.

P and Q are drawn once for the model from the seed (standard normal; each layer takes its first rows and columns and
scales them), so that they cost memory once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from recovery.adapters import lora
from recovery.base import Layer, Tensors, generator_of, random_normal, random_uniform, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


class Config(lora.LowRankConfig, frozen=True):
    """LoRA-Mini's options."""

    method: Literal["lora_mini"] = "lora_mini"
    rank: int = Field(default=32, ge=1, description="inner size of B A")
    alpha: float = Field(default=64.0, gt=0, description="numerator of the scale")
    a: int = Field(default=256, ge=1, description="what Q brings the input down to")
    b: int = Field(default=256, ge=1, description="what P brings the output up from")

    @model_validator(mode="after")
    def _narrow(self) -> Config:
        if (rank := max([self.rank, *self.rank_pattern.values()])) > min(self.a, self.b):
            raise ValueError(f"rank: {rank} is more than a {self.a} or b {self.b} can carry")
        return self


class Method(lora.LowRank[Config]):
    """One layer's inner factors."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.inputs, self.outputs = layer.inputs, layer.outputs
        self.trainable["A"] = random_uniform((self.rank, config.a), config.a**-0.5, generator_of(layer.seed))
        self.trainable["B"] = zeros(config.b, self.rank)

    @classmethod
    def share(cls, config: Config, layers: list[Layer], seed: int) -> Tensors:
        """Q [a, largest in] and P [largest out, b], float32, standard normal."""
        inputs, outputs = max(layer.inputs for layer in layers), max(layer.outputs for layer in layers)
        generator = generator_of(seed)
        down = random_normal((config.a, inputs), 1.0, generator)
        return Tensors(bases={"Q": down, "P": random_normal((outputs, config.b), 1.0, generator)})

    def factors(self) -> tuple[Tensor, Tensor]:
        down = self.trainable["A"] @ self.shared.bases["Q"][:, : self.inputs]
        up = self.shared.bases["P"][: self.outputs] @ self.trainable["B"]
        return down * self.inputs**-0.5, up * self.config.b**-0.5
