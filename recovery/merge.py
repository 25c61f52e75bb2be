"""Merging: the adapters' deltas go into the weights, in float32, and are cast once to the weights' dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recovery.inject import adapted, detach
from recovery.quantized import FewBits


@torch.no_grad()
def merge(model: PreTrainedModel, input_ids: Tensor | None = None) -> tuple[PreTrainedModel, float | None]:
    """Put every adapter into its layer's weight and take it off, in place.

    With `input_ids` [rows, length], also the largest absolute difference between the logits before (adapters live)
    and after, which is rounding to the weights' dtype. Raises ValueError where nothing is attached, as after a merge,
    and where weights are of few bits: what is merged into those would be rounded twice.
    """
    layers = adapted(model)
    if not layers:
        raise ValueError("no adapters are attached: they were merged already, or never loaded")
    if any(isinstance(module.linear.weight, FewBits) for module in layers.values()):
        raise ValueError("weights of few bits are not merged into: save the adapter, attach it to the full weights")
    model.eval()
    before = None if input_ids is None else _logits(model, input_ids)
    for module in layers.values():
        weight = module.linear.weight
        weight.data = (weight.data.float() + module.delta()).to(weight.dtype)
    detach(model)
    return model, None if before is None else largest_difference(model, lambda _: before, input_ids)


@torch.no_grad()
def largest_difference(
    first: PreTrainedModel | Callable[[Any], Any], second: PreTrainedModel | Callable[[Any], Any], input_ids: Any
) -> float:
    """The largest absolute difference of two models' logits on `input_ids` [rows, length].

    Either may also be a function from token ids to logits [rows, length, vocabulary]. Call it in eval mode.
    """
    return float((_logits(first, input_ids) - _logits(second, input_ids)).abs().max())


def _logits(model: PreTrainedModel | Callable[[Any], Any], input_ids: Any) -> Tensor:
    if isinstance(model, PreTrainedModel):
        return model(input_ids=input_ids.to(model.device), use_cache=False).logits.float()
    return model(input_ids).float()
