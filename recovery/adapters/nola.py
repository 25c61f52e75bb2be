"""NoLA: LoRA's factors as trained mixtures of frozen random ones.

Paper: arXiv 2310.02556. A = A0 + sum_i a_i A_i and B = sum_i b_i B_i over i = 1..k, dW = (alpha / rank) B A. Frozen:
A0 as LoRA's A, A_i [rank, in] and B_i [out, rank] uniform in +-1 / sqrt(k). Trained: a and b, [k] each, zero at the
start, so b learns first, through A0: 2 k parameters a layer, whatever the rank. Merge: W + dW.

Ours: the k bases are drawn once for the model and each layer takes their first rows and columns (the paper redraws
each layer's in every forward and backward pass); A0 is each layer's own. All come from the seed by private generators
on the CPU, the same on every device. Time grows with k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from recovery.adapters import lora
from recovery.base import Layer, Tensors, generator_of, random_uniform, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


class Config(lora.LowRankConfig, frozen=True):
    """NoLA's options."""

    learning_rate: ClassVar[float] = 1e-2
    method: Literal["nola"] = "nola"
    count: int = Field(default=128, ge=1, description="k, random bases of each factor")


class Method(lora.LowRank[Config]):
    """One layer's coefficients a and b."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.inputs, self.outputs = layer.inputs, layer.outputs
        self.bases["A0"] = random_uniform((self.rank, layer.inputs), layer.inputs**-0.5, generator_of(layer.seed))
        self.trainable["a"], self.trainable["b"] = zeros(config.count), zeros(config.count)

    @classmethod
    def share(cls, config: Config, layers: list[Layer], seed: int) -> Tensors:
        """A [k, largest rank, largest in] and B [k, largest out, largest rank], float32."""
        rank = max(config.rank_of(layer.name) for layer in layers)
        inputs, outputs = max(layer.inputs for layer in layers), max(layer.outputs for layer in layers)
        generator, bound = generator_of(seed), config.count**-0.5
        down = random_uniform((config.count, rank, inputs), bound, generator)
        up = random_uniform((config.count, outputs, rank), bound, generator)
        return Tensors(bases={"A": down, "B": up})

    def factors(self) -> tuple[Tensor, Tensor]:
        down = self.shared.bases["A"][:, : self.rank, : self.inputs]
        up = self.shared.bases["B"][:, : self.outputs, : self.rank]
        mixed = (self.trainable["a"] @ down.flatten(1)).view(self.rank, self.inputs)
        return self.bases["A0"] + mixed, (self.trainable["b"] @ up.flatten(1)).view(self.outputs, self.rank)
