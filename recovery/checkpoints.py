"""A training run's memory on disk: one safetensors file with tensors and counters, replaced whole."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LAST, BEST = "last.safetensors", "best-{}.safetensors"  # of a step
STEADY = "steady.safetensors"  # while the loss is rising: the last from before


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and `state` (JSON-able) so that the file is either all new or as it was before."""
    temporary = path.with_suffix(".tmp")
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, temporary, metadata={"state": json.dumps(state)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def keep(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], rising: bool) -> None:
    """Write the checkpoint a stopped run goes on from; while the loss rises, the one from before stays beside it.

    Best adapters of other steps than `state` names go: no run will ask for them again.
    """
    last, steady = folder / LAST, folder / STEADY
    if not rising:
        steady.unlink(missing_ok=True)
    elif last.is_file() and not steady.is_file():
        shutil.copyfile(last, steady)
    write(last, tensors, state)
    for path in _bests(folder):
        if path.name != BEST.format(state["best_step"]):
            path.unlink()


def good(folder: Path) -> str:
    """The last checkpoint from before a rise, and the best adapter, with their steps."""
    paths = {"": folder / (STEADY if (folder / STEADY).is_file() else LAST)}
    if bests := _bests(folder):
        paths["best adapter: "] = max(bests, key=lambda path: state_of(path)["step"])
    found = {what: path for what, path in paths.items() if path.is_file()}
    return ", ".join(f"{what}{path} of step {state_of(path)['step']}" for what, path in found.items()) or "none yet"


def _bests(folder: Path) -> list[Path]:
    return list(folder.glob(BEST.format("*")))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors, on the CPU, and its state."""
    with safe_open(path, framework="pt") as file:
        names: list[str] = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["state"])


def state_of(path: Path) -> dict[str, Any]:
    """A checkpoint's state, without reading its tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["state"])
