"""What a training run remembers about itself: counters, the log of its steps, and the report made from both."""

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
RECENT = 10  # steps whose mean loss is watched


@dataclass
class State:
    """Where a run is: everything a checkpoint needs beside tensors. `seconds` counts all of its sittings."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    labelled: int = 0
    start: float | None = None  # held-out loss before the first step
    best: float = math.inf
    best_step: int = 0
    validation: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    lowest: float = math.inf  # of the means over RECENT steps


def diverged(state: State, loss: float) -> bool:
    """Take a step's loss down; has the mean of the last RECENT risen to more than half as much again as the lowest such
    mean, and one nat? Noise does not do that, and a recovery that does will not come back."""
    state.recent = [*state.recent[1 - RECENT :], loss]
    if len(state.recent) < RECENT:
        return False
    mean = sum(state.recent) / RECENT
    state.lowest = min(state.lowest, mean)
    return _above(state.lowest, mean, 1.0)


def failed(state: State, loss: float) -> bool:
    """Is a held-out loss no number, or as far above the one before training as a divergence?"""
    return not math.isfinite(loss) or (state.start is not None and _above(state.start, loss, 1.0))


def rising(state: State) -> bool:
    """Has the mean, or the last loss alone, gone a quarter of that way? A divergence may have begun."""
    mean = sum(state.recent) / RECENT
    return _above(state.lowest, max(mean, *state.recent[-1:]), 0.25)


def _above(lowest: float, loss: float, part: float) -> bool:
    """Has a loss gone this part of the way from the lowest to where a run has diverged?"""
    return loss > lowest + part * (0.5 * lowest + 1)


def worn_out(state: State, patience: int | None) -> bool:
    """Were the last `patience` held-out losses no better than the best before them?"""
    since = [check for check in state.validation if check["step"] > state.best_step]
    return patience is not None and len(since) >= patience


def write(folder: Path, state: State, losses: dict[str, float], rate: float) -> None:
    """Add one step's line to the log; `losses` are the step's `loss` and the terms it is made of."""
    line: dict[str, Any] = {"step": state.step, "tokens": state.tokens, **losses, "learning_rate": rate}
    if state.validation and state.validation[-1]["step"] == state.step:
        line["validation_loss"] = state.validation[-1]["loss"]
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "seconds": round(state.seconds, 3)}) + "\n")


def cut(folder: Path, steps: int) -> None:
    """Drop the log's lines of steps that are about to be taken again."""
    path = folder / LOG
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()[:steps]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def note(state: State, loss: float, budget: int) -> str:
    """The line shown beside a progress bar."""
    if not state.tokens or not state.seconds:
        return "first step"
    speed = state.tokens / state.seconds
    left = round((budget - state.tokens) / speed)
    return f"loss {loss:.3f}, {speed:.0f} tokens/s, {left // 60}:{left % 60:02d} left"


def report(folder: Path, state: State, trainable: int, layers: int, stopped: bool) -> dict[str, Any]:
    """The run in numbers; `loss` is the mean training loss of each tenth of the steps."""
    losses: list[float] = [json.loads(line)["loss"] for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    edges = [round(n * len(losses) / 10) for n in range(11)]
    tenths = [losses[a:b] for a, b in itertools.pairwise(edges) if b > a]
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "labelled_tokens": state.labelled,
        "trainable_parameters": trainable,
        "adapted_layers": layers,
        "loss_first_10": sum(losses[:10]) / len(losses[:10]),
        "loss_last_10": sum(losses[-10:]) / len(losses[-10:]),
        "loss": [round(sum(part) / len(part), 5) for part in tenths],
        "validation_start": state.start,
        "validation": state.validation,
        "best_step": state.best_step or state.step,
        "stopped_early": stopped,
        "seconds": round(state.seconds, 2),
        "tokens_per_second": round(state.tokens / state.seconds, 1),
    }
