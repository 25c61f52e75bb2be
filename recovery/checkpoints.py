"""A training run's memory on disk: one safetensors file with tensors and counters, replaced whole."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

LAST, BEST = "last.safetensors", "best.safetensors"
STEADY = "steady.safetensors"  # while the loss is rising: the last from before
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and `state` (JSON-able) so that the file is either all new or as it was before."""
    temporary = path.with_suffix(".tmp")
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, temporary, metadata={"state": json.dumps(state)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def keep(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], rising: bool) -> None:
    """Write the checkpoint a stopped run goes on from; while the loss rises, the one from before stays beside it."""
    last, steady = folder / LAST, folder / STEADY
    if not rising:
        steady.unlink(missing_ok=True)
    elif last.is_file() and not steady.is_file():
        shutil.copyfile(last, steady)
    write(last, tensors, state)


def good(folder: Path) -> str:
    """The last checkpoint from before a rise, and the best adapter, with their steps."""
    names = {"": STEADY if (folder / STEADY).is_file() else LAST, "best adapter: ": BEST}
    found = {what: folder / name for what, name in names.items() if (folder / name).is_file()}
    return ", ".join(f"{what}{path} of step {state_of(path)['step']}" for what, path in found.items()) or "none yet"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors, on the CPU, and its state."""
    with safe_open(path, framework="pt") as file:
        names: list[str] = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["state"])


def state_of(path: Path) -> dict[str, Any]:
    """A checkpoint's state, without reading its tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["state"])


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
