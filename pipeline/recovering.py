"""The stages that train: `teacher` asks the dense model about the training rows once, `recover` trains on them."""

from typing import TYPE_CHECKING, Any

from pipeline import rows
from pipeline.steps import Step
from pipeline.store import Workspace
from recovery import distill, inject
from recovery.data import Example
from recovery.feed import within_budget
from recovery.teacher import Kept, Live, Teacher, keep
from recovery.train import train

if TYPE_CHECKING:
    from pipeline.stages import Runner


def teach(runner: "Runner", step: Step, workspace: Workspace) -> dict[str, Any]:
    """Keep what the dense model says of every row that the run feeds."""
    settings = runner.config.recovery
    assert settings is not None
    assert settings.distillation is not None
    model, tokenizer = runner.load(runner.dense_folder())
    feed = within_budget(_examples(runner), tokenizer, settings)
    return {
        "report": keep(
            model, feed, settings.distillation, workspace.out, workspace.scratch, settings.tokens, runner.progress
        )
    }


def recover(runner: "Runner", step: Step, workspace: Workspace) -> dict[str, Any]:
    """Train the adapter and save it with the log of its steps."""
    settings = runner.config.recovery
    assert settings is not None
    model, tokenizer = runner.load(runner.folder(step))
    teacher: Teacher | None = None
    if settings.distillation:
        if settings.distillation.cache:
            teacher = Kept(runner.store.folder("teacher", step.material["teacher"]))
        else:
            dense, _ = runner.load(runner.dense_folder())
            distill.check(model, dense, settings.distillation)
            teacher = Live(dense, settings.distillation)
    report = train(model, tokenizer, _examples(runner), settings, workspace.scratch, runner.progress, teacher)
    inject.save(model, workspace.out / "adapter", settings.adapter, settings.seed)
    (workspace.out / "log.jsonl").write_bytes((workspace.scratch / "log.jsonl").read_bytes())
    return {"report": report}


def _examples(runner: "Runner") -> list[tuple[float, list[Example]]]:
    return [
        (part.weight, [Example(*pair, end=part.format == "instruction") for pair in rows.pairs(runner.sources, part)])
        for part in runner.config.data
    ]
