"""Merging: the adapters' deltas go into the weights, in float32, and are cast once."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recovery.inject import adapted


@torch.no_grad()
def merge(model: PreTrainedModel, input_ids: Tensor | None = None) -> tuple[PreTrainedModel, float | None]:
    """Put every adapter into its layer's weight and take it off, in place.

    With `input_ids` [rows, length], also the largest absolute difference between the logits before (adapters live)
    and after. Raises ValueError where nothing is attached, as after a first merge.
    """
    layers = adapted(model)
    if not layers:
        raise ValueError("no adapters are attached: they were merged already, or never loaded")
    model.eval()
    before = _logits(model, input_ids) if input_ids is not None else None
    for name, module in layers.items():
        linear = module.linear
        linear.weight.data = (linear.weight.data.float() + module.delta()).to(linear.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    if before is None or input_ids is None:
        return model, None
    return model, float((_logits(model, input_ids) - before).abs().max())


def _logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids.to(model.device), use_cache=False).logits.float()
