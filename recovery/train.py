"""The trainer: adapters in float32 on a frozen model in its own dtype, until a budget of tokens is spent.

Every step collects rows up to `batch_tokens`, averages the loss over the step's labelled tokens, clips and takes an
AdamW step. The rows are a function of data and config alone, and dropout's numbers of config, step and row, so a run
that was stopped goes on from its last checkpoint exactly as if it had not been (bit for bit on a CPU with the same
threads). Several processes share every step's rows (`recovery.parallel`); the first alone writes.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recovery import adapters, checkpoints, distill, history, inject, interrupt, parallel, quantized
from recovery.base import Adapter, seed_of
from recovery.config import RecoveryConfig
from recovery.data import Row, batches
from recovery.feed import Sources, feed, within_budget
from recovery.history import State
from recovery.loss import labelled, mean_loss, row_loss
from recovery.optimizer import adamw, moments, restore, schedule
from recovery.teacher import Teacher, distilled

Progress = Callable[[int, int, str], None]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sources,
    config: RecoveryConfig,
    scratch: Path,
    progress: Progress = lambda done, total, note: None,
    teacher: Teacher | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Attach `config.adapter` and train it on the weighted sources; leaves the best adapter attached, in eval mode.

    Best means the lowest held-out loss, or the last step where nothing is held out. Resumes from a checkpoint in
    `scratch`, and writes `log.jsonl` (one line a step) there. `progress` gets tokens fed, tokens in all, and a note
    with loss, speed and time left. `teacher` says what its model would, where `config.distillation` asks for it.
    A base that is to be quantized goes to `device` in few bits, layer by layer. Returns a report (`history.report`).
    Raises ValueError for data without a token to learn, a checkpoint of another config or a base that cannot be
    quantized here, and RuntimeError when a loss is not finite or has risen far above its lowest, or its start. Ctrl-C
    is raised when the step under way is taken and kept.
    """
    rows, validation = feed(sources, tokenizer, config)
    run = _Run(model, config, scratch, within_budget(sources, tokenizer, config), validation, progress, teacher, device)
    remaining = itertools.islice(rows, run.state.rows, None)
    saved = time.monotonic()
    left = config.tokens - run.state.tokens
    early = False
    run.look()
    with interrupt.noticed() as pressed:
        steps = batches(remaining, left, config.batch_tokens, config.max_length)
        for batch, following in itertools.pairwise(itertools.chain(steps, [None])):
            assert batch
            if early := history.worn_out(run.state, config.validation.patience):
                break
            run.step(batch, last=following is None)
            stopped = parallel.add_up([float(pressed())])[0] > 0  # all processes stop at one step
            if (stopped or time.monotonic() - saved >= config.checkpoint_every) and parallel.rank() == 0:
                run.save()
                saved = time.monotonic()
            if stopped:
                raise KeyboardInterrupt
    return run.finish(early)


class _Run:
    """One training run: model, optimizer and counters, taken up where `scratch` left them."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: RecoveryConfig,
        scratch: Path,
        rows: Iterable[Row],
        validation: list[Row],
        progress: Progress,
        teacher: Teacher | None,
        device: str | None,
    ) -> None:
        if config.distillation and teacher is None:
            raise ValueError("distillation needs a teacher: recovery.teacher's Live or Kept")
        self.method: type[Adapter[Any]] = adapters.load(config.adapter.method).Method
        if reason := parallel.refusal(config.adapter.method, self.method.whole_weights):
            raise ValueError(reason)
        self.model, self.config, self.scratch = model, config, scratch
        self.validation, self.progress, self.teacher = validation, progress, teacher
        before = self._before()
        if before:
            adapter, self.fitted = type(config.adapter).model_validate(before["adapter"]), before["fitted"]
        else:
            adapter, self.fitted = self.method.fit(config.adapter, model, rows, config.seed)
        self.layers = inject.attach(model, adapter, config.seed)
        self.base = quantized.quantize(model, config.quantized_base, device) if config.quantized_base else None
        self.within: parallel.Within = lambda function: function()
        if parallel.sharded():
            self.within = parallel.shard(model, inject.registered(model).values())
        self.parameters = inject.trainable(model)
        if config.gradient_checkpointing:
            self._recompute("enable")
        self.optimizer = adamw(self.parameters, self.method.undecayed, config)
        self.adapter: dict[str, Any] = adapter.model_dump(mode="json")
        self.state, self.loss = State(), math.nan
        if before:
            self._resume()
        if parallel.rank() == 0:
            history.cut(scratch, self.state.step)

    def step(self, batch: Sequence[Row], last: bool) -> None:
        """Feed a batch, take one optimizer step, log it, and measure the held-out loss where that is due."""
        state, config, started = self.state, self.config, time.monotonic()
        before, after = state.tokens, state.tokens + sum(len(row.ids) for row in batch)
        rate = config.learning_rate * schedule(after / config.tokens, config)
        losses = self._update(batch, rate, 1.0 if last else after / config.tokens)
        self.loss = losses["loss"]
        state.step, state.rows, state.tokens = state.step + 1, state.rows + len(batch), after
        state.labelled += labelled(batch)
        times = config.validation.times
        if last or int(before * times / config.tokens) < int(after * times / config.tokens):
            self._validate()
        state.seconds += time.monotonic() - started
        if parallel.rank() == 0:
            history.write(self.scratch, state, losses, rate)
        self._tell(after)

    def save(self) -> None:
        """Write the checkpoint from which a stopped run goes on."""
        tensors = {**self._tensors(), **moments(self.optimizer, self.parameters)}
        described = {"config": self._described(), "adapter": self.adapter, "fitted": self.fitted, **asdict(self.state)}
        checkpoints.keep(self.scratch, tensors, described, history.rising(self.state))

    def finish(self, early: bool) -> dict[str, Any]:
        """Put the best adapter back and say how it went; `early`: before the budget was spent."""
        state = self.state
        if not state.validation or state.validation[-1]["step"] != state.step:
            self._validate()  # a run that took no step, or was stopped at its last one
        if parallel.rank() > 0:
            return {}
        if self.validation and state.best_step != state.step:
            path = self._best(state.best_step)
            best, _ = checkpoints.read(path)
            inject.load_tensors(self.model, best, str(path))
        with torch.no_grad():
            self.method.finish(self._methods())
        self.model.eval()
        if self.config.gradient_checkpointing:
            self._recompute("disable")
        trainable = sum(parameter.numel() for parameter in self.parameters.values())
        found = {"processes": parallel.processes(), "sharded": parallel.sharded(), "quantized_base": self.base}
        found |= {"fitted": self.fitted} if self.fitted else {}
        return {**history.report(self.scratch, state, trainable, len(self.layers), early), **found}

    def _update(self, batch: Sequence[Row], rate: float, share: float) -> dict[str, float]:
        """One optimizer step; returns the batch's loss and the terms it is made of."""
        self.model.train()
        mine = [row for _, row, _ in parallel.share(batch)]
        # What a method shares between the passes would be made of whole weights: not where they are sharded.
        with (
            nullcontext()
            if parallel.sharded()
            else self.method.step(self._methods(), sum(len(row.ids) for row in mine), len(mine))
        ):
            losses = self._backward(batch)
        if (scale := self._scale(batch)) > 1:
            for parameter in self.parameters.values():
                parameter.grad = None if parameter.grad is None else parameter.grad / scale
        parallel.add_gradients(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        if not (math.isfinite(losses["loss"]) and math.isfinite(norm)):
            self._fail(f"loss is {losses['loss']} (gradient norm {float(norm)})", batch)
        if history.diverged(self.state, losses["loss"]):
            recent = sum(self.state.recent) / len(self.state.recent)
            self._fail(
                f"loss has risen to {recent:.3g} from {self.state.lowest:.3g} (means of {history.RECENT} steps)", batch
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            self.method.after_step(self._methods(), share)
        self.optimizer.zero_grad()
        return losses

    def _backward(self, batch: Sequence[Row]) -> dict[str, float]:
        """Gradients of the batch's mean loss, summed up over this process's rows; the loss is over all of them."""
        count, fed = labelled(batch), self.state.tokens
        settings, teacher = self.config.distillation, self.teacher
        positions = sum(sum(distilled(row, settings.positions)) for row in batch) if settings else 0
        sums, scale = [0.0, 0.0, 0.0], self._scale(batch)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        for place, row, counts in parallel.share(batch):
            over = (count / scale, positions / scale) if counts else (math.inf, math.inf)
            with torch.random.fork_rng(devices):  # for the adapter's dropout, and the model's own
                torch.manual_seed(seed_of(self.config.seed, "dropout", self.state.step, place))
                if settings and teacher:
                    terms = self.within(partial(distill.accumulate, self.model, row, teacher, settings, *over))
                    sums = [total + term * counts for total, term in zip(sums, terms, strict=True)]
                else:
                    loss, _ = self.within(partial(row_loss, self.model, row))
                    (loss / over[0]).backward()
                    sums[0] += float(loss.detach()) * counts
            fed += len(row.ids)
            self._tell(fed)
        sums = parallel.add_up(sums)
        return distill.means(sums, settings, count, positions) if settings else {"loss": sums[0] / count}

    def _scale(self, batch: Sequence[Row]) -> int:
        """What gradients are too large by until a step's rows are summed up: float16 would lose those of a mean."""
        return max(1, labelled(batch)) if self.model.dtype == torch.float16 else 1

    def look(self) -> None:
        """Measure the held-out loss before the first step: what training must not make far worse."""
        if self.validation and self.state.start is None and not self.state.step:
            self.state.start = self.within(partial(mean_loss, self.model, self.validation))

    def _validate(self) -> None:
        """Measure the held-out loss; keep the adapter when it is the best so far."""
        if not self.validation:
            return
        state, loss = self.state, self.within(partial(mean_loss, self.model, self.validation))
        if history.failed(state, loss):
            self._fail(f"held-out loss is {loss:.3g}, before training it was {state.start or math.nan:.3g},")
        state.validation.append({"step": state.step, "tokens": state.tokens, "loss": loss})
        if loss < state.best:
            state.best, state.best_step = loss, state.step
            if parallel.rank() == 0:
                checkpoints.write(self._best(state.step), self._tensors(), {"step": state.step, "loss": loss})

    def _best(self, step: int) -> Path:
        return self.scratch / checkpoints.BEST.format(step)

    def _fail(self, what: str, batch: Sequence[Row] = ()) -> None:
        """`batch` is that of a step which has not ended."""
        rows = f" (rows {self.state.rows + 1} to {self.state.rows + len(batch)})" if batch else ""
        raise RuntimeError(
            f"the {what} at step {self.state.step + bool(batch)}{rows}; last good checkpoint: "
            f"{checkpoints.good(self.scratch)}. Lower recovery.learning_rate or the adapter's alpha"
        )

    def _recompute(self, what: str) -> None:
        """Turn gradient checkpointing on or off, by the name that this transformers has for it."""
        named = getattr(self.model, f"activation_checkpointing_{what}", None)
        turn = named or getattr(self.model, f"gradient_checkpointing_{what}")
        turn(*([{"use_reentrant": False}] if what == "enable" else []))

    def _before(self) -> dict[str, Any] | None:
        """What the checkpoint of a stopped run says, if there is one."""
        path = self.scratch / checkpoints.LAST
        said = checkpoints.state_of(path) if path.is_file() else None
        if said and said["config"] != self._described():
            raise ValueError(f"{path}: this checkpoint is of a run with another config; remove it to start anew")
        return {"adapter": self._described()["adapter"], "fitted": {}, **said} if said else None

    def _resume(self) -> None:
        path = self.scratch / checkpoints.LAST
        tensors, state = checkpoints.read(path)
        for name in ("config", "adapter", "fitted"):
            state.pop(name, None)
        restore(self.optimizer, self.parameters, tensors)
        inject.load_tensors(self.model, tensors, str(path))
        self.state = State(**state)

    def _described(self) -> Any:
        return json.loads(self.config.model_dump_json())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**self.parameters, **inject.kept(self.model)}

    def _methods(self) -> dict[str, Adapter[Any]]:
        return {name: module.method for name, module in inject.adapted(self.model).items()}

    def _tell(self, fed: int) -> None:
        self.progress(fed, self.config.tokens, history.note(self.state, self.loss, self.config.tokens))
