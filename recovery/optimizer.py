"""AdamW over an adapter's parameters: its groups, its learning rate over a run, and its moments in a checkpoint."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from recovery.config import RecoveryConfig

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter


def schedule(share: float, config: RecoveryConfig) -> float:
    """The factor of the learning rate once `share` of the tokens is fed: a linear rise, then a cosine."""
    if share < config.warmup:
        return share / config.warmup
    along = min(1.0, (share - config.warmup) / (1 - config.warmup))
    return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * along))


def adamw(
    parameters: Mapping[str, nn.Parameter], undecayed: Collection[str], config: RecoveryConfig
) -> torch.optim.AdamW:
    """AdamW on parameters named `layer.name`; those whose name is among `undecayed` know no weight decay."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = 0.0 if name.rpartition(".")[2] in undecayed else config.weight_decay
        groups.setdefault(decay, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in groups.items()], lr=config.learning_rate
    )


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's state as tensors named `moment:parameter`."""
    return {
        f"{moment}:{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in MOMENTS
    }


def restore(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put the moments of a checkpoint back into AdamW, taking them out of `tensors`."""
    for name, parameter in parameters.items():
        found = {moment: tensors.pop(f"{moment}:{name}") for moment in MOMENTS}
        # AdamW's step counter stays on the CPU, the others lie beside their parameter.
        optimizer.state[parameter] = {
            moment: tensor if moment == "step" else tensor.to(parameter.device) for moment, tensor in found.items()
        }
