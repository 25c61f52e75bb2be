"""The trainer: adapters in float32 on a frozen model in its own dtype, until a budget of tokens is spent.

Every step collects rows up to `batch_tokens`, averages the loss over the step's labelled tokens, clips and takes an
AdamW step. The rows are a function of data and config alone, so a run that was stopped goes on from its last
checkpoint exactly as if it had not been (bit for bit on a CPU).
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recovery import checkpoints, inject
from recovery.base import seed_of
from recovery.config import RecoveryConfig
from recovery.data import IGNORED, Example, Row, encode, hold_out, mix, pack

CHECKPOINT_EVERY = 60.0  # seconds; when a checkpoint is taken changes no result
Progress = Callable[[int, int, str], None]


@dataclass
class State:
    """Where a run is: everything a checkpoint needs beside tensors."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    labelled: int = 0
    best: float = math.inf
    best_step: int = 0
    validation: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[tuple[float, list[Example]]],
    config: RecoveryConfig,
    scratch: Path,
    progress: Progress = lambda done, total, note: None,
) -> dict[str, Any]:
    """Attach `config.adapter` and train it on the weighted sources; leaves the best adapter attached.

    Resumes from a checkpoint in `scratch`, and writes `log.jsonl` (one line a step) there. Best means the lowest
    held-out loss, or the last step where nothing is held out. Returns a report. Raises ValueError for data with
    nothing to learn and RuntimeError when the loss is not finite, naming the step and the last good checkpoint.
    """
    layers = inject.attach(model, config.adapter, config.seed)
    parameters = inject.trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    training, held = hold_out(sources, config.validation.fraction, config.seed)
    validation = _validation_rows(held, tokenizer, config)
    rows = pack(mix(training, tokenizer, config.loss, config.max_length, config.seed), config.max_length)

    state, last = State(), scratch / checkpoints.LAST
    if last.is_file():
        state = State(**checkpoints.read(last, parameters, optimizer))
        rows = itertools.islice(rows, state.rows, None)
    _cut_log(scratch / "log.jsonl", state.step)
    checks = [config.tokens * (n + 1) / config.validation.times for n in range(config.validation.times)]
    saved = time.monotonic()
    for batch in _batches(rows, config, state):
        started = time.monotonic()
        fed = sum(len(row.ids) for row in batch)
        rate = config.learning_rate * schedule((state.tokens + fed) / config.tokens, config)
        loss, labelled = _step(model, batch, parameters, optimizer, rate, config, state.step)
        if not math.isfinite(loss):
            good = f"step {checkpoints.state_of(last)['step']}" if last.is_file() else "none yet"
            raise RuntimeError(
                f"the loss is {loss} at step {state.step + 1} (rows {state.rows + 1} to {state.rows + len(batch)}); "
                f"last good checkpoint: {good}. Lower recovery.learning_rate or adapter.alpha"
            )
        before = state.tokens
        state.step, state.rows = state.step + 1, state.rows + len(batch)
        state.tokens, state.labelled = state.tokens + fed, state.labelled + labelled
        due = any(before < check <= state.tokens for check in checks) or config.tokens - state.tokens < 2
        if validation and due:
            _validate(model, validation, parameters, state, scratch)
        state.seconds += time.monotonic() - started
        _log(scratch / "log.jsonl", state, loss, rate)
        speed = state.tokens / state.seconds
        left = (config.tokens - state.tokens) / speed
        note = f"loss {loss:.3f}, {speed:.0f} tokens/s, {left // 60:.0f}:{left % 60:02.0f} left"
        progress(state.tokens, config.tokens, note)
        if time.monotonic() - saved > CHECKPOINT_EVERY:
            checkpoints.write(last, parameters, asdict(state), optimizer)
            saved = time.monotonic()
    if validation and (not state.validation or state.validation[-1]["step"] != state.step):
        _validate(model, validation, parameters, state, scratch)
    if validation and state.best_step != state.step:
        checkpoints.read(scratch / checkpoints.BEST, parameters)
    model.eval()
    return _report(state, parameters, layers, scratch / "log.jsonl")


def schedule(share: float, config: RecoveryConfig) -> float:
    """The factor of the learning rate once `share` of the tokens is fed: a linear rise, then a cosine."""
    if share < config.warmup:
        return share / config.warmup
    along = min(1.0, (share - config.warmup) / (1 - config.warmup))
    return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * along))


def row_loss(model: PreTrainedModel, row: Row) -> tuple[Tensor, int]:
    """Summed cross entropy of a row's labelled tokens (float32), and how many there are.

    Logits are computed at the positions before labelled tokens only. No attention mask is given: with one,
    transformers would not see the restarts of the position ids, and examples would read each other.
    """
    device = model.device
    ids = torch.tensor([row.ids], device=device)
    positions = torch.tensor([row.positions], device=device)
    hidden = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, :-1]
    labels = torch.tensor(row.labels[1:], device=device)
    chosen = labels != IGNORED
    head: Any = model.get_output_embeddings()
    logits = head(hidden[chosen]).float()
    return torch.nn.functional.cross_entropy(logits, labels[chosen], reduction="sum"), int(chosen.sum())


def _batches(rows: Iterator[Row], config: RecoveryConfig, state: State) -> Iterator[list[Row]]:
    """Rows for one step each, until the budget is spent. The budget is never exceeded."""
    left = config.tokens - state.tokens
    batch: list[Row] = []
    for row in rows:
        if len(row.ids) > left:
            break
        batch.append(row)
        left -= len(row.ids)
        if sum(len(part.ids) for part in batch) + config.max_length > config.batch_tokens:
            yield batch
            batch = []
    if batch:
        yield batch


def _step(
    model: PreTrainedModel,
    batch: list[Row],
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rate: float,
    config: RecoveryConfig,
    step: int,
) -> tuple[float, int]:
    """One optimizer step; returns the mean loss over the batch's labelled tokens, and their number."""
    model.train()
    labelled = sum(label != IGNORED for row in batch for label in row.labels[1:])
    total = 0.0
    with torch.random.fork_rng(enabled=config.adapter.dropout > 0):
        if config.adapter.dropout > 0:
            torch.manual_seed(seed_of(config.seed, "dropout", step))  # so that a resumed run drops the same
        for row in batch:
            loss, _ = row_loss(model, row)
            (loss / labelled).backward()
            total += float(loss.detach())
    if math.isfinite(total):
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad()
    return total / labelled, labelled


def _validation_rows(held: list[list[Example]], tokenizer: Any, config: RecoveryConfig) -> list[Row]:
    """Held-out rows: about the same number of tokens from every source."""
    rows: list[Row] = []
    for examples in held:
        share, found = config.validation.tokens / len(held), []
        for example in examples:
            found += encode(tokenizer, example, config.loss, config.max_length)
            if sum(len(tokens.ids) for tokens in found) >= share:
                break
        rows += pack(iter(found), config.max_length)
    return rows


@torch.no_grad()
def _validate(
    model: PreTrainedModel, rows: list[Row], parameters: dict[str, torch.nn.Parameter], state: State, scratch: Path
) -> None:
    """Measure the held-out loss; keep the adapter when it is the best so far."""
    model.eval()
    sums = [row_loss(model, row) for row in rows]
    loss = sum(float(total) for total, _ in sums) / sum(count for _, count in sums)
    state.validation.append({"step": state.step, "tokens": state.tokens, "loss": loss})
    if loss < state.best:
        state.best, state.best_step = loss, state.step
        checkpoints.write(scratch / checkpoints.BEST, parameters, {"step": state.step, "loss": loss})


def _cut_log(path: Path, steps: int) -> None:
    """Drop the lines of steps that are about to be taken again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()[:steps]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _log(path: Path, state: State, loss: float, rate: float) -> None:
    line = {"step": state.step, "tokens": state.tokens, "loss": loss, "learning_rate": rate}
    if state.validation and state.validation[-1]["step"] == state.step:
        line["validation_loss"] = state.validation[-1]["loss"]
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "seconds": round(state.seconds, 3)}) + "\n")


def _report(state: State, parameters: dict[str, torch.nn.Parameter], layers: list[str], log: Path) -> dict[str, Any]:
    if state.step == 0:
        raise ValueError("no step was taken: the first row is longer than recovery.tokens")
    losses = [json.loads(line)["loss"] for line in log.read_text(encoding="utf-8").splitlines()]
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "labelled_tokens": state.labelled,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "adapted_layers": len(layers),
        "loss_first_10": sum(losses[:10]) / len(losses[:10]),
        "loss_last_10": sum(losses[-10:]) / len(losses[-10:]),
        "validation": state.validation,
        "best_step": state.best_step or state.step,
        "tokens_per_second": round(state.tokens / state.seconds, 1),
    }
