"""A training run's memory on disk: adapter, optimizer state and counters in one safetensors file, replaced whole."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

LAST, BEST = "last.safetensors", "best.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def write(
    path: Path,
    parameters: dict[str, nn.Parameter],
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write parameters, AdamW's moments and `state` (JSON-able) so that the file is whole or as it was before."""
    tensors = {f"parameter:{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer is not None:
        for name, parameter in parameters.items():
            for moment in MOMENTS:
                tensors[f"{moment}:{name}"] = optimizer.state[parameter][moment]
    temporary = path.with_suffix(".tmp")
    ready = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, temporary, metadata={"state": json.dumps(state)})
    temporary.replace(path)


def read(
    path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Put a checkpoint's tensors back and return its `state`. Raises ValueError when it is of another adapter."""
    with safe_open(path, framework="pt") as file:
        expected = {f"parameter:{name}" for name in parameters}
        if expected != {name for name in file.keys() if name.startswith("parameter:")}:  # noqa: SIM118
            raise ValueError(f"{path}: this checkpoint is of another adapter; remove it to start anew")
        for name, parameter in parameters.items():
            parameter.data.copy_(file.get_tensor(f"parameter:{name}"))
            if optimizer is not None:
                moments: dict[str, Tensor] = {moment: file.get_tensor(f"{moment}:{name}") for moment in MOMENTS}
                optimizer.state[parameter] = {
                    moment: tensor if moment == "step" else tensor.to(parameter.device)
                    for moment, tensor in moments.items()
                }
        return json.loads(file.metadata()["state"])


def state_of(path: Path) -> dict[str, Any]:
    """A checkpoint's `state`, without its tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["state"])
