"""MELoRA: several small LoRAs side by side, each between one slice of the input and one of the output.

Paper: arXiv 2402.17263. dW = blockdiag(s B_i A_i) over i = 1..n, A_i [rank, in_i] uniform in +-1/sqrt(in_i), B_i
[out_i, rank] zero, both trained, s = alpha / rank. Rank n x rank with the rank (in + out) parameters of one LoRA of
`rank`. Merge: W + dW. The paper's setting: rank 1, n 8, alpha 16.

Ours: widths that n does not divide are cut into slices that differ by at most one (the original floors and fails),
and a layer narrower than n has as many parts as it is wide. A [rank, in] and B [out, rank] hold the parts side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from recovery.adapters import lora
from recovery.base import Layer, Tensors, generator_of, random_uniform, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


class Config(lora.LowRankConfig, frozen=True):
    """MELoRA's options."""

    method: Literal["melora"] = "melora"
    rank: int = Field(default=1, ge=1, description="inner size of each part")
    count: int = Field(default=8, ge=1, description="n, the parts")


class Method(lora.LowRank[Config]):
    """One layer's parts."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.count = min(config.count, layer.inputs, layer.outputs)
        self.trainable["A"] = random_uniform((self.rank, layer.inputs), 1.0, generator_of(layer.seed))
        for part in self.trainable["A"].tensor_split(self.count, dim=1):
            part *= part.shape[1] ** -0.5
        self.trainable["B"] = zeros(layer.outputs, self.rank)

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Every part's A_i [rank, in_i] and B_i [out_i, rank]."""
        downs = self.trainable["A"].tensor_split(self.count, dim=1)
        return list(zip(downs, self.trainable["B"].tensor_split(self.count), strict=True))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The same delta as one product: down [n rank, in] and up [out, n rank], zero outside the blocks."""
        import torch

        downs, ups = zip(*self._parts(), strict=True)
        return torch.block_diag(*downs), torch.block_diag(*ups)

    def forward(self, x: Tensor, weight: Tensor, product: Tensor | None) -> Tensor:
        import torch

        slices = x.tensor_split(self.count, dim=-1)
        parts = zip(slices, self._parts(), strict=True)
        added = [(part @ a.to(x.dtype).T) @ (self.scale() * b).to(x.dtype).T for part, (a, b) in parts]
        return torch.cat(added, dim=-1)
