"""VeRA: one frozen random pair of factors for the whole model, of which each layer trains two vectors.

Paper: arXiv 2310.11454. dW = diag(b) B diag(v) A with scale 1. A [rank, largest in] and B [largest out, rank] are
frozen, uniform by Kaiming (bound sqrt(6 / fan)), shared by all layers, each of which takes the first columns of A and
the first rows of B, and rebuilt from the seed. Trained: b [out], zero, and v [rank], 0.1: out + rank parameters.
Merge: W + dW. The paper trains with a learning rate of 1e-2 and high ranks; the default rank is PEFT's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from recovery.base import Adapter, AdapterConfig, Layer, Tensors, generator_of, random_uniform, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


class Config(AdapterConfig, frozen=True):
    """VeRA's options."""

    learning_rate: ClassVar[float] = 1e-2
    without_patterns = "VeRA's factors are the whole model's, of one rank, and its scale is 1"
    method: Literal["vera"] = "vera"
    rank: int = Field(default=256, ge=1, description="inner size of the shared factors")
    start: float = Field(default=0.1, gt=0, description="first value of v")


class Method(Adapter[Config]):
    """One layer's b and v over its part of the shared factors."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.inputs, self.outputs = layer.inputs, layer.outputs
        self.trainable["b"] = zeros(layer.outputs)
        self.trainable["v"] = zeros(config.rank) + config.start

    @classmethod
    def share(cls, config: Config, layers: list[Layer], seed: int) -> Tensors:
        """A [rank, largest in] and B [largest out, rank], float32."""
        inputs, outputs = max(layer.inputs for layer in layers), max(layer.outputs for layer in layers)
        generator = generator_of(seed)
        down = random_uniform((config.rank, inputs), (6 / inputs) ** 0.5, generator)
        up = random_uniform((outputs, config.rank), (6 / config.rank) ** 0.5, generator)
        return Tensors(bases={"A": down, "B": up})

    def _factors(self) -> tuple[Tensor, Tensor]:
        down = self.trainable["v"][:, None] * self.shared.bases["A"][:, : self.inputs]
        return down, self.trainable["b"][:, None] * self.shared.bases["B"][: self.outputs]

    def delta(self, weight: Tensor) -> Tensor:
        down, up = self._factors()
        return up @ down

    def forward(self, x: Tensor, weight: Tensor, product: Tensor | None) -> Tensor:
        down, up = self._factors()
        return (x @ down.to(x.dtype).T) @ up.to(x.dtype).T
