"""RandLoRA: a full-rank delta from fixed random bases, of which only scales are trained.

Paper: arXiv 2502.00987. With dmin and dmax the smaller and larger side of W and n = ceil(dmin / rank),

    dW = s * sum over b = 1..n of  B_b Lambda_b A Gamma_b      [dmax, dmin], transposed when in > out

A [rank, dmin] and B_b [dmax, rank] are frozen, shared by all layers (each takes the first rows and columns) and
rebuilt from the seed: uniform, Kaiming with a = sqrt 5, divided by their own standard deviation. Trained: lambda
[n, rank], zero at the start, and gamma [n, dmin], 1 / max(n, dmin). Rank works backwards: a smaller one means more
bases and more parameters, n (rank + dmin). s = alpha / rank / sqrt(n) with alpha = 2 rank unless given: 2 / sqrt(n),
each layer with its own n.

`pairing: peft` combines bases and scales in the order of PEFT and the official code, a different function with the
same distribution; adapters are exchanged with PEFT that way. Bases are sized by the largest sides that occur.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from recovery.base import Adapter, AdapterConfig, Layer

if TYPE_CHECKING:
    from torch import Generator, Tensor

VERSION = 1


class Config(AdapterConfig):
    """`alpha` None means 2 rank, the paper's."""

    method: Literal["randlora"] = "randlora"
    rank: int = Field(default=32, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    pairing: Literal["paper", "peft"] = "paper"


class Method(Adapter):
    """One layer's lambda and gamma over its slice of the shared bases."""

    config: Config

    def __init__(self, config: Config, layer: Layer) -> None:
        super().__init__(config, layer)
        self.wide = layer.inputs > layer.outputs  # the delta is computed transposed
        smaller, larger = sorted((layer.outputs, layer.inputs))
        self.count = count = math.ceil(smaller / config.rank)
        self.bases["A"] = layer.shared["A"][:, :smaller]
        self.bases["B"] = layer.shared["B"][:count, :larger]
        self.trainable["lambda"] = layer.shared["A"].new_zeros(count, config.rank)
        self.trainable["gamma"] = layer.shared["A"].new_full((count, smaller), 1 / max(count, smaller))

    @classmethod
    def shared(cls, config: AdapterConfig, shapes: list[tuple[int, int]], generator: Generator) -> dict[str, Tensor]:
        """A [rank, largest dmin] and B [largest n, largest dmax, rank], float32 on the CPU."""
        import torch

        assert isinstance(config, Config)
        smaller, larger = max(min(shape) for shape in shapes), max(max(shape) for shape in shapes)
        count = math.ceil(smaller / config.rank)
        down = torch.empty(config.rank, smaller).uniform_(-1, 1, generator=generator)
        up = torch.empty(count, larger, config.rank).uniform_(-1, 1, generator=generator)
        # Dividing by the standard deviation undoes any Kaiming bound, so the bound need not be put in first.
        return {"A": down / down.std(), "B": up / up.std()}

    def scale(self) -> float:
        """s = alpha / rank / sqrt(n)."""
        alpha = 2 * self.config.rank if self.config.alpha is None else self.config.alpha
        return alpha / self.config.rank / math.sqrt(self.count)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """[dmax, n rank] and [n rank, dmin], whose product is the unscaled delta; float32."""
        rank, count = self.config.rank, self.count
        up = self.bases["B"].permute(1, 0, 2).reshape(-1, count * rank)
        # down[b, r] = lambda[b, r] * A[r] * gamma[b]
        down = self.trainable["lambda"][:, :, None] * self.bases["A"] * self.trainable["gamma"][:, None, :]
        if self.config.pairing == "peft":
            down = down.transpose(0, 1)
        return up, down.reshape(count * rank, -1)

    def delta(self, weight: Tensor) -> Tensor:
        up, down = self._factors()
        product = self.scale() * (up @ down)
        return product.T if self.wide else product

    def forward(self, x: Tensor, dropped: Tensor, weight: Tensor) -> Tensor:
        # One product a token with the delta of this call, instead of two with bases as wide as the layer.
        return dropped @ self.delta(weight).to(x.dtype).T
