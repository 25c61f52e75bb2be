"""Streamed statistics of a forward and backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.config import Kind
from pruning.structures import Member, named_members


def stream_gradients(
    model: PreTrainedModel,
    input_ids: Tensor,
    kinds: tuple[Kind, ...],
    reduce: Callable[[int, Kind, Member, Tensor], None],
) -> float:
    """One backward pass of the mean next-token loss over `input_ids` [samples, length]; returns the loss.

    `reduce(layer, kind, member, gradient)` sees each projection's gradient the moment it is complete; then it is
    freed, so that no two layers' gradients are alive together. Weights, and which of them train, end as they were.
    """
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for layer, kind, member in named_members(model, kinds):
        weight = member.linear.weight.requires_grad_(True)

        def complete(parameter: Tensor, layer: int = layer, kind: Kind = kind, member: Member = member) -> None:
            assert parameter.grad is not None
            reduce(layer, kind, member, parameter.grad)
            parameter.grad = None

        hooks.append(weight.register_post_accumulate_grad_hook(complete))
    try:
        with torch.enable_grad():
            ids = input_ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            del logits
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
            parameter.grad = None
    return float(loss.detach())
