"""What a teacher, most often the dense model, says of training rows, computed on the fly or kept on disk.

At every distilled position the teacher's distribution p over the vocabulary is cut to its `top_k` likeliest tokens and
one more class, `rest`, which holds the probability of all others together: nothing is lost but how the rest is spread.
Stored are int32 token ids [positions, k] and float16 log-probabilities [positions, k + 1], rest last; where k is the
whole vocabulary there is no rest. The on-the-fly teacher rounds likewise, so both ways train the same adapter.

Kept rows lie in shards, found again by a digest of the row: another order or other batches do not matter.
"""

import itertools
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from recovery import checkpoints, interrupt, products
from recovery.base import seed_of
from recovery.config import Distillation
from recovery.data import IGNORED, Row
from recovery.loss import decoded

CHUNK = 256  # positions whose logits exist at one time
SHARD = 1 << 16  # positions of one file, about; fewer where a minute has gone by
SAVE_EVERY = 60.0  # seconds
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Targets:
    """A row's teacher: `ids` [n, k] int32, `logprobs` [n, k + 1] float16 (or [n, k], see above) at its n distilled
    positions, and where hidden states are matched, `hidden`, one [n, width] a layer."""

    ids: Tensor
    logprobs: Tensor
    hidden: tuple[Tensor, ...] = ()


Teacher = Callable[[Row], Targets]


def distilled(row: Row, positions: str) -> list[bool]:
    """Of every token but the last: is what follows it distilled? `labelled`: where it is learned; `all`: wherever it
    belongs to the same example."""
    if positions == "labelled":
        return [label != IGNORED for label in row.labels[1:]]
    return [position != 0 for position in row.positions[1:]]


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest ids [n, k] and float32 log-probabilities [n, k + 1], rest last, of logits [n, vocabulary]."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    if k >= logits.shape[-1]:
        return torch.arange(logits.shape[-1], device=logits.device).expand_as(logits), logits - total
    values, ids = logits.topk(k)
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids, torch.cat([values, others], -1) - total


class Live:
    """A model, asked row by row."""

    def __init__(self, model: PreTrainedModel, settings: Distillation) -> None:
        self.model, self.settings = model.eval().requires_grad_(False), settings

    @torch.no_grad()
    def __call__(self, row: Row) -> Targets:
        chosen = torch.tensor(distilled(row, self.settings.positions), device=self.model.device)
        hidden, layers = decoded(self.model, row, bool(self.settings.hidden))
        head: Any = self.model.get_output_embeddings()
        parts = [top(products.through(head, part), self.settings.top_k) for part in hidden[chosen].split(CHUNK)]
        ids, logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
        return Targets(ids.int(), logprobs.half(), tuple(layer[chosen] for layer in layers))


class Kept:
    """A folder that `keep` wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Any] = [safe_open(path, framework="pt") for path in _shards(folder)]
        self.places: dict[int, tuple[Any, int, int]] = {}
        for file in self.files:
            ends: list[int] = file.get_tensor("ends").tolist()
            for digest, span in zip(file.get_tensor("rows").tolist(), itertools.pairwise([0, *ends]), strict=True):
                self.places[digest] = (file, *span)

    def __call__(self, row: Row) -> Targets:
        if (place := self.places.get(_digest(row))) is None:
            raise ValueError(f"{self.folder}: the teacher has not seen this row: rebuild it (--force teacher)")
        file, start, end = place
        return Targets(file.get_slice("ids")[start:end], file.get_slice("logprobs")[start:end])


def keep(
    model: PreTrainedModel,
    rows: Iterable[Row],
    settings: Distillation,
    folder: Path,
    scratch: Path,
    tokens: int,
    progress: Progress = lambda done, total, note: None,
) -> dict[str, Any]:
    """Ask the teacher about every row and write its answers into `folder`. Goes on from the shards in `scratch`.

    `progress` gets tokens read and `tokens`, those to read. Returns a report.
    """
    asked, stream = Live(model, settings), iter(rows)
    done, held, saved = 0, _Shard(), time.monotonic()
    for path in _shards(scratch):
        with safe_open(path, framework="pt") as file:
            done += sum(len(row.ids) for row in itertools.islice(stream, len(file.get_tensor("rows"))))
    with interrupt.noticed() as pressed:
        for row in stream:
            held.add(row, asked(row))
            done += len(row.ids)
            progress(done, tokens, "")
            stopped = pressed()
            if stopped or held.positions >= SHARD or time.monotonic() - saved >= SAVE_EVERY:
                held.write(scratch)
                held, saved = _Shard(), time.monotonic()
            if stopped:
                raise KeyboardInterrupt
    held.write(scratch)
    for path in _shards(scratch):
        shutil.copyfile(path, folder / path.name)
    kept = Kept(folder)
    positions = sum(file.get_slice("ids").get_shape()[0] for file in kept.files)
    return {"tokens": done, "rows": len(kept.places), "positions": positions}


class _Shard:
    """Rows on their way to one file."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ends: list[int] = []
        self.parts: list[Targets] = []
        self.positions = 0

    def add(self, row: Row, targets: Targets) -> None:
        self.positions += len(targets.ids)
        self.rows.append(_digest(row))
        self.ends.append(self.positions)
        self.parts.append(Targets(targets.ids.cpu(), targets.logprobs.cpu()))

    def write(self, folder: Path) -> None:
        if self.rows:
            tensors = {
                "rows": torch.tensor(self.rows),
                "ends": torch.tensor(self.ends),
                "ids": torch.cat([part.ids for part in self.parts]),
                "logprobs": torch.cat([part.logprobs for part in self.parts]),
            }
            checkpoints.write(folder / f"{len(_shards(folder)):05d}.safetensors", tensors, {})


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _digest(row: Row) -> int:
    return seed_of(row.ids, row.labels, row.positions)
