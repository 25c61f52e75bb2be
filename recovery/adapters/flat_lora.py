"""Flat-LoRA: LoRA trained under small random changes of the merged weight, so that it ends where the loss is flat.

Paper: arXiv 2409.14396. Delta, shapes, start, parameters and merge are LoRA's: dW = s B A with s = alpha / rank. What
differs is training: every optimizer step computes forward and backward at W + dW + E with fresh noise
E_ij ~ N(0, (k rho |W'_i| / sqrt(in))^2), W' = W + dW and W'_i its row, the same in all passes of the step, and
k = (1 - cos(pi t)) / 2 with t the share of training done: noise grows from nothing. rho = 0.05 is the paper's. No
gradient flows through E's size. Scores, held-out losses and the saved adapter are without noise.

Ours: numbers follow from the run's seed, the layer and the step, so that a resumed run draws the same (the original
seeds the global generator by the clock); t is the share of the tokens; W + E is formed once a step in W's dtype beside
W, which never changes, at the cost of one copy of the adapted weights while a step lasts (the original adds E to W and
subtracts it again, which leaves rounding behind in 16 bits). Every step draws one number for
every adapted weight, which on a CPU takes a good part of a small step's time, and draws it where the weight lies: a GPU
draws other numbers than a CPU. Weights that are sharded over processes are refused.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from recovery.adapters import lora
from recovery.base import Adapter, Layer, Tensors, seed_of, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


class Config(lora.FactorsConfig, frozen=True):
    """Flat-LoRA's options."""

    method: Literal["flat_lora"] = "flat_lora"
    rho: float = Field(default=0.05, gt=0, lt=1, description="noise at the end, as a share of each row's norm")

    def few_bits_refusal(self) -> str | None:
        return "flat_lora keeps a full copy of the weights while a step lasts; take another method"


class Method(lora.Method[Config]):
    """LoRA's A and B on a frozen weight that trembles while a step lasts."""

    whole_weights = True

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.seed = layer.seed
        self.trembles, self._noisy = False, cast("Tensor | None", None)

    @classmethod
    def share(cls, config: Config, layers: list[Layer], seed: int) -> Tensors:
        """Steps taken, and the share of the tokens they fed."""
        return Tensors(kept={"progress": zeros(2)})

    def frozen(self, weight: Tensor) -> Tensor:
        if not self.trembles:
            return weight
        if self._noisy is None:
            self._noisy = self._with_noise(weight)
        return self._noisy

    def _with_noise(self, weight: Tensor) -> Tensor:
        """W + E of this step, in W's dtype."""
        import torch

        step, share = self.shared.kept["progress"].tolist()
        size = self.config.rho * (1 - math.cos(math.pi * min(share, 1.0))) / 2
        if size == 0:
            return weight
        with torch.no_grad():
            rows = (weight.float() + self.delta(weight)).norm(dim=1, keepdim=True)
            generator = torch.Generator(weight.device).manual_seed(seed_of(self.seed, "noise", int(step)))
            noise = torch.empty(weight.shape, dtype=torch.float32, device=weight.device).normal_(generator=generator)
            return noise.mul_(rows * (size * weight.shape[1] ** -0.5)).add_(weight).to(weight.dtype)

    @classmethod
    @contextmanager
    def step(cls, layers: Mapping[str, Adapter[Any]], tokens: int, passes: int) -> Generator[None]:
        methods = cast("Mapping[str, Method]", layers).values()
        try:
            for method in methods:
                method.trembles = True
            yield
        finally:
            for method in methods:
                method.trembles, method._noisy = False, None

    @classmethod
    def after_step(cls, layers: Mapping[str, Adapter[Any]], share: float) -> None:
        progress = next(iter(layers.values())).shared.kept["progress"]
        progress[0] += 1
        progress[1] = share
