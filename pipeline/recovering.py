"""The stages that train: `teacher` asks its model about the training rows once, `recover` trains on them."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from pipeline import events, processes, rows
from pipeline.steps import Step
from pipeline.store import Workspace
from recovery import checkpoints, distill, history, inject, parallel, peft_format, peft_write
from recovery.data import Example
from recovery.feed import within_budget
from recovery.teacher import Kept, Live, Teacher, keep
from recovery.train import train

if TYPE_CHECKING:
    from pipeline.stages import Runner


def teach(runner: "Runner", step: Step, workspace: Workspace) -> dict[str, Any]:
    """Keep what the teacher says of every row that the run feeds."""
    settings = runner.config.recovery
    assert settings is not None
    assert settings.distillation is not None
    workspace.resumed = any(workspace.scratch.glob("*.safetensors"))
    model, tokenizer = runner.load(runner.teacher_folder())
    feed = within_budget(_examples(runner), tokenizer, settings)
    return {
        "report": keep(
            model, feed, settings.distillation, workspace.out, workspace.scratch, settings.tokens, runner.progress
        )
    }


def recover(runner: "Runner", step: Step, workspace: Workspace) -> dict[str, Any]:
    """Train the adapter, with all processes, and save it with the log of its steps."""
    settings = runner.config.recovery
    assert settings is not None
    workspace.resumed = (workspace.scratch / checkpoints.LAST).is_file()
    processes.call({"key": step.key, "scratch": str(workspace.scratch)})
    log = workspace.scratch / history.LOG
    told: AbstractContextManager[Any] = nullcontext(runner.progress)
    if runner.shown and runner.config.runtime.tensorboard:
        told = events.following(log, events.folder_of(runner.shown, step.key), runner.progress)
    with told as runner.progress:
        model, report = adapter_of(runner, step, workspace.scratch)
    inject.save(model, workspace.out / "adapter", settings.seed)
    if peft_format.refusal(settings.adapter) is None:  # the same adapter, for other tools
        peft_write.write(model, workspace.out / "peft", str(runner.folder(step)))
    (workspace.out / history.LOG).write_bytes(log.read_bytes())
    return {"report": report}


def adapter_of(runner: "Runner", step: Step, scratch: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """This process's part of the training of a step: the model with its adapter, and the report."""
    settings = runner.config.recovery
    assert settings is not None
    later = parallel.sharded() or settings.quantized_base  # split or packed first, then moved
    model, tokenizer = runner.load(runner.folder(step), place="cpu" if later else None)
    teacher: Teacher | None = None
    if settings.distillation:
        if settings.distillation.cache:
            teacher = Kept(runner.store.folder("teacher", step.material["teacher"]))
        else:
            teaching, _ = runner.load(runner.teacher_folder())
            distill.check(model.config.to_dict(), teaching.config.to_dict(), settings.distillation)
            teacher = Live(teaching, settings.distillation)
    examples, device = _examples(runner), runner.device()
    return model, train(model, tokenizer, examples, settings, scratch, runner.progress, teacher, device)


def _examples(runner: "Runner") -> list[tuple[float, list[Example]]]:
    settings = runner.config.recovery
    assert settings is not None
    return [(part.weight, rows.examples(runner.sources, part, settings.max_length)) for part in runner.config.data]
