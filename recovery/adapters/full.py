"""Full: every weight of the adapted layers trains, as a float32 delta.

No paper: plain fine-tuning, the baseline the RandLoRA paper measures against. dW [out, in] starts at zero: in x out
parameters, and AdamW's moments are twice as many. Merge: W + dW. Embeddings, norms and lm_head stay frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from recovery.base import Adapter, AdapterConfig, Layer, Tensors, zeros

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


class Config(AdapterConfig, frozen=True):
    """Full training has no options of its own."""

    learning_rate: ClassVar[float] = 1e-4
    without_patterns = "full training has neither rank nor scale"
    method: Literal["full"] = "full"


class Method(Adapter[Config]):
    """One layer's delta."""

    def __init__(self, config: Config, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.trainable["delta"] = zeros(layer.outputs, layer.inputs)

    def delta(self, weight: Tensor) -> Tensor:
        return self.trainable["delta"]
