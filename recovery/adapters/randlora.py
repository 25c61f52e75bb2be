"""RandLoRA: a full-rank delta from fixed random bases, of which only scales are trained.

Paper: arXiv 2502.00987. With dmin and dmax the smaller and larger side of W and n = ceil(dmin / rank),

    dW = s * sum over b = 1..n of  B_b Lambda_b A Gamma_b      [dmax, dmin], transposed when in > out

A [rank, dmin] and B_b [dmax, rank] are frozen, shared by all layers (each takes the first rows and columns) and
rebuilt from the seed: uniform, Kaiming with a = sqrt 5, divided by their own standard deviation. Trained: lambda
[n, rank], zero at the start, and gamma [n, dmin], 1 / max(n, dmin). Rank works backwards: a smaller one means more
bases and more parameters, n (rank + dmin). s = alpha / rank / sqrt(n) with alpha = 2 rank unless given: 2 / sqrt(n),
each layer with its own n. Merge: W + dW.

Ours: bases are sized by the largest dmin and dmax that occur (PEFT: by the largest in and out, which is more), computed
with in the model's dtype, and in the backward pass everything but lambda and gamma is computed again instead of kept.
`pairing: peft` combines bases and scales in the order of PEFT and the official code, a different function with the same
distribution; adapters are exchanged with PEFT that way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from recovery.base import Adapter, AdapterConfig, Layer, Tensors, generator_of, random_uniform

if TYPE_CHECKING:
    from torch import Tensor, dtype

VERSION = 1


class Config(AdapterConfig, frozen=True):
    """RandLoRA's options."""

    method: Literal["randlora"] = "randlora"
    rank: int = Field(default=32, ge=1, description="inner size of one basis pair; smaller means more parameters")
    alpha: float | None = Field(default=None, gt=0, description="numerator of the scale; null is 2 rank, the paper's")
    pairing: Literal["paper", "peft"] = Field(default="paper", description="which scale meets which basis column")


class Method(Adapter[Config]):
    """One layer's lambda and gamma over its part of the shared bases."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.wide = layer.inputs > layer.outputs  # the delta is computed transposed
        self.smaller, self.larger = sorted((layer.outputs, layer.inputs))
        self.count = math.ceil(self.smaller / config.rank)
        base = shared.bases["A"]
        self.trainable["lambda"] = base.new_zeros(self.count, config.rank)
        self.trainable["gamma"] = base.new_full((self.count, self.smaller), 1 / max(self.count, self.smaller))

    @classmethod
    def share(cls, config: Config, layers: list[Layer], seed: int) -> Tensors:
        """A [rank, largest dmin] and B [largest dmax, largest n, rank], float32."""
        smaller = max(min(layer.outputs, layer.inputs) for layer in layers)
        larger = max(max(layer.outputs, layer.inputs) for layer in layers)
        generator = generator_of(seed)
        # Dividing by the standard deviation undoes any Kaiming bound, so the bound need not be put in first.
        down = random_uniform((config.rank, smaller), 1.0, generator)
        up = random_uniform((larger, math.ceil(smaller / config.rank), config.rank), 1.0, generator)
        return Tensors(bases={"A": down / down.std(), "B": up / up.std()})

    def scale(self) -> float:
        """s = alpha / rank / sqrt(n)."""
        alpha = 2 * self.config.rank if self.config.alpha is None else self.config.alpha
        return alpha / self.config.rank / math.sqrt(self.count)

    def _factors(self, scales: Tensor, gamma: Tensor, kind: dtype) -> tuple[Tensor, Tensor]:
        """[dmax, n rank] and s times [n rank, dmin]: the delta is their product."""
        up = self.shared.bases["B"][: self.larger, : self.count].flatten(1)
        # down[b, r, j] = lambda[b, r] * A[r, j] * gamma[b, j]
        down = (self.scale() * scales)[:, :, None] * self.shared.bases["A"][:, : self.smaller] * gamma[:, None, :]
        if self.config.pairing == "peft":
            down = down.transpose(0, 1)
        return up.to(kind), down.flatten(0, 1).to(kind)

    def delta(self, weight: Tensor) -> Tensor:
        up, down = self._factors(self.trainable["lambda"], self.trainable["gamma"], self.trainable["gamma"].dtype)
        product = up @ down
        return product.T if self.wide else product

    def _added(self, x: Tensor, scales: Tensor, gamma: Tensor) -> Tensor:
        up, down = self._factors(scales, gamma, x.dtype)
        tokens = x.numel() // x.shape[-1]
        if tokens * (self.smaller + self.larger) > self.smaller * self.larger:  # the delta itself is cheaper
            product = up @ down
            return x @ (product if self.wide else product.T)
        return (x @ up) @ down if self.wide else (x @ down.T) @ up.T

    def forward(self, x: Tensor, weight: Tensor, product: Tensor | None) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        # Factors and delta are as large as the weight: keeping them for the backward pass would double the model.
        return checkpoint(  # type: ignore[no-any-return]
            self._added,
            x,
            self.trainable["lambda"],
            self.trainable["gamma"],
            use_reentrant=False,
            preserve_rng_state=False,
        )
