"""Training by several processes: each feeds its share of a step's rows, gradients are summed, all take the same step.

Rows are dealt by their place in the step and dropout's numbers depend on it, so that any number of processes trains
what one would, but for the order of sums. Sharding (FSDP2, on when accelerate launches with it) splits the frozen
weights alone: adapters are small and stay whole in every process.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from transformers import PreTrainedModel

T = TypeVar("T")
Within = Callable[[Callable[[], Any]], Any]


def processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 writes files and tells progress."""
    return distributed.get_rank() if processes() > 1 else 0


def share(items: Sequence[T]) -> list[tuple[int, T, bool]]:
    """This process's items, each with its place among all, and whether it counts.

    Sharded weights are gathered by all processes at once, so all must do as much: one that is short of an item gets the
    first again, which does not count.
    """
    mine = [(place, item, True) for place, item in enumerate(items) if place % processes() == rank()]
    short = sharded() and len(mine) < math.ceil(len(items) / processes())
    return [*mine, (0, items[0], False)] if short else mine


def add_up(numbers: list[float]) -> list[float]:
    """Every number summed over the processes, in float64."""
    if processes() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    distributed.all_reduce(total)
    return total.tolist()


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum every parameter's gradient over the processes; one that fed no row brings zeros."""
    if processes() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)


def sharded() -> bool:
    """Whether accelerate was told to shard (FSDP)."""
    return processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def refusal(method: str, whole_weights: bool) -> str | None:
    """Why a method that may need whole weights cannot train here, or None."""
    if whole_weights and sharded():
        return f"{method} needs whole weights: launch without FSDP, or take another method"
    return None


def shard(model: PreTrainedModel, whole: Iterable[nn.Module]) -> Within:
    """Split the weights of every decoder layer, and what is outside them, over the processes. The modules `whole` stay
    whole. Returns what a forward pass has to be called through."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    kept: set[nn.Parameter] = set()
    for module in whole:
        module.to(device)
        kept |= set(module.parameters())
    mesh = init_device_mesh(device.type, (processes(),))
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    layers: Any = model.get_decoder().layers
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=again, ignored_params=kept)
    outer = _Outer(model)
    fully_shard(outer, mesh=mesh, ignored_params=kept)
    return outer


class _Outer(nn.Module):
    """The root that FSDP2 wants a forward pass to begin at: embedding and head are gathered here."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()
