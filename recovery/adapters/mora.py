"""MoRA: one trained square matrix instead of two thin factors, with fixed maps into and out of it.

Paper: arXiv 2405.12130. M [h, h] is trained from zero, h = floor(sqrt((in + out) rank) + 1/2): about LoRA's parameters
at `rank`, but M may have full rank. x is padded to a multiple of h by starting over at its first value, and cut into
chunks of h.

* `share` (the original's type 1, for large ranks): the chunks are summed, M applied, the result repeated to `out`.
* `rope` (type 6, for small ranks): h is even; chunk c is turned by RoPE at position c (base 10000), M applied to each,
  the results joined, and cut or repeated to `out`. Chunks beyond the first ceil(out / h) are read by nothing: most of
  down_proj's input, where in is much larger than out. That is the paper's.

dW, the same function of the identity, is merged as W + dW. Scale 1. Ours: float32 cosines in every dtype of x.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from recovery.base import Adapter, AdapterConfig, Layer, PositiveInt, Tensors, of_pattern, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION, READS = 2, 1


class Config(AdapterConfig, frozen=True):
    """MoRA's options."""

    without_patterns = "MoRA's scale is 1"
    method: Literal["mora"] = "mora"
    rank: int = Field(default=8, ge=1, description="rank of the LoRA with about as many parameters")
    rank_pattern: dict[str, PositiveInt] = Field(default={}, description="rank of the modules a pattern fits")
    kind: Literal["share", "rope"] = Field(default="rope", description="how inputs and outputs are mapped to M")


class Method(Adapter[Config]):
    """One layer's square matrix."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.inputs, self.outputs = layer.inputs, layer.outputs
        rank = of_pattern(layer.name, config.rank_pattern, config.rank)
        side = math.floor(math.sqrt((self.inputs + self.outputs) * rank) + 0.5)
        self.side = max(2, side // 2 * 2) if config.kind == "rope" else side
        self.trainable["M"] = zeros(self.side, self.side)

    def delta(self, weight: Tensor) -> Tensor:
        square = self.trainable["M"]
        identity = square.new_zeros(self.inputs, self.inputs).fill_diagonal_(1)
        return self._apply(identity).T

    def forward(self, x: Tensor, weight: Tensor, product: Tensor | None) -> Tensor:
        return self._apply(x)

    def _apply(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in x's dtype."""
        square, places = self.trainable["M"].to(x.dtype), _counted(x, self.outputs)
        padded = math.ceil(self.inputs / self.side) * self.side
        if padded != self.inputs:
            x = x[..., _counted(x, padded) % self.inputs]
        chunks = x.unflatten(-1, (-1, self.side))  # [..., chunks, h]
        if self.config.kind == "share":
            return (chunks.sum(-2) @ square.T)[..., places % self.side]
        turned = _turned(chunks[..., : math.ceil(self.outputs / self.side), :])
        joined = (turned @ square.T).flatten(-2)
        return joined[..., places % joined.shape[-1]]


def _turned(chunks: Tensor) -> Tensor:
    """RoPE on [..., chunks, h], the position being the chunk's number."""
    import torch

    count, side = chunks.shape[-2:]
    pairs = _counted(chunks, side // 2).float()
    angles = _counted(chunks, count).float()[:, None] * 10000.0 ** (-2 * pairs / side)
    cosine, sine = angles.cos(), angles.sin()
    first, second = chunks[..., : side // 2], chunks[..., side // 2 :]  # half of them times float32 is float32
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(chunks.dtype)


def _counted(like: Tensor, count: int) -> Tensor:
    """0, 1, ..., count - 1 on the device of `like`."""
    import torch

    return torch.arange(count, device=like.device)
