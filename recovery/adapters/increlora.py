"""IncreLoRA: every layer starts with rank 1, and the layers that need it most are given more while training.

Paper: arXiv 2308.12043. dW = s B diag(E) A; A and B ~ N(0, 0.02^2), E zero at the start. Each layer carries one
component in reserve whose E is fixed at 1e-5, so that its A and B learn ahead; a layer that is given a component
starts to train the reserve's E and gets another reserve. Layers are ranked by the moving average (0.85) of a
sensitivity times that of its deviation. `rank` is the average at the end. Merge: W + dW, without reserves. The start
is off by 1e-5 of a random product, about 1e-9.

Ours: components are handed out evenly between the shares `warmup` and `until` of the tokens, each step to the best
layers, one to each, and again where steps are few (the paper: every 1000 steps to the best two); a layer may hold
`limit` at most, for which room is kept from the start, so that optimizer and checkpoints need not grow; s = alpha /
rank throughout (the original's changes as ranks grow); the sensitivity is the sum over components of |E dL/dE|, divided
by the root of the layer's size: each is the sum of dW * dL/dW of one component, so no gradient of the weight's shape is
needed; the orthogonality penalty is left out. Trained: up to limit (in + out + 1) parameters a layer; those of unused
components only decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from recovery.adapters import lora
from recovery.base import Adapter, Layer, Tensors, generator_of, random_normal, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION, READS = 3, 1
RESERVE, MEMORY, DEVIATION = 1e-5, 0.85, 0.02


class Config(lora.LowRankConfig, frozen=True):
    """IncreLoRA's options."""

    method: Literal["increlora"] = "increlora"
    limit: int | None = Field(default=None, ge=1, description="highest rank of one layer; null is twice its `rank`")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the tokens before ranks grow")
    until: float = Field(default=0.6, gt=0, le=1, description="share of the tokens at which the average is reached")

    @model_validator(mode="after")
    def _ordered(self) -> Config:
        if self.until <= self.warmup:
            raise ValueError(f"until: {self.until} is not after warmup {self.warmup}")
        if self.limit is not None and self.limit < max([self.rank, *self.rank_pattern.values()]):
            raise ValueError(f"limit: {self.limit} is less than the average rank that is asked for")
        return self


class Method(lora.LowRank[Config]):
    """One layer's components: the first `used` train whole, the next one is the reserve, the others wait."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.limit = config.limit or 2 * self.rank
        generator = generator_of(layer.seed)
        self.trainable["A"] = random_normal((self.limit, layer.inputs), DEVIATION, generator)
        self.trainable["B"] = random_normal((layer.outputs, self.limit), DEVIATION, generator)
        self.trainable["E"] = zeros(self.limit)
        self.kept["used"] = zeros(self.limit)
        self.kept["used"][0] = 1
        self.kept["reserve"] = zeros(self.limit)
        self.kept["reserve"][1:2] = RESERVE
        self.kept["score"] = zeros(2)  # moving averages: sensitivity, its deviation

    def factors(self) -> tuple[Tensor, Tensor]:
        size = self.trainable["E"] * self.kept["used"] + self.kept["reserve"]
        return self.trainable["A"], self.trainable["B"] * size

    @property
    def used(self) -> int:
        """The rank now."""
        return int(self.kept["used"].sum())

    def observe(self) -> None:
        """Take the gradient of this step into the moving averages."""
        gradient, score = self.trainable["E"].grad, self.kept["score"]
        if gradient is None:
            return
        size = self.trainable["A"].shape[1] * self.trainable["B"].shape[0]
        now = (self.trainable["E"] * gradient).abs().sum() / size**0.5
        score[0] += (1 - MEMORY) * (now - score[0])
        score[1] += (1 - MEMORY) * ((now - score[0]).abs() - score[1])

    def grow(self) -> None:
        """Make the reserve a component, and the next one the reserve."""
        new = self.used
        self.kept["used"][new] = 1
        self.trainable["E"][new] = RESERVE
        self.kept["reserve"].zero_()
        self.kept["reserve"][new + 1 : new + 2] = RESERVE

    @classmethod
    def after_step(cls, layers: Mapping[str, Adapter[Any]], share: float) -> None:
        found = [layer for layer in layers.values() if isinstance(layer, Method)]
        for layer in found:
            layer.observe()
        config = found[0].config
        along = min(1.0, max(0.0, (share - config.warmup) / (config.until - config.warmup)))
        due = int(along * sum(layer.rank - 1 for layer in found)) - sum(layer.used - 1 for layer in found)
        while due > 0 and (room := [layer for layer in found if layer.used < layer.limit]):
            room.sort(key=lambda layer: float(layer.kept["score"].prod()), reverse=True)  # stable: ties by layer order
            for layer in room[:due]:
                layer.grow()
            due -= len(room)

    @classmethod
    def finish(cls, layers: Mapping[str, Adapter[Any]]) -> None:
        for layer in layers.values():
            layer.kept["reserve"].zero_()
