"""What a run would do: for every step, whether its result is there, and if not, what changed since the last run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.keys import differences
from pipeline.results import read_results
from pipeline.sources import Sources
from pipeline.steps import STAGES, Step, label
from pipeline.store import Store
from pruning.architecture import Architecture


@dataclass(frozen=True)
class Planned:
    """A step, whether it is `cached` or to `build`, and why."""

    step: Step
    status: str
    why: str

    def as_json(self) -> dict[str, Any]:
        step = self.step
        suite, statistic = (part.name if part else None for part in (step.scored, step.statistic))
        exported = step.exported.label if step.exported else None
        place = {"stage": step.stage, "model": step.model, "suite": suite, "statistic": statistic, "export": exported}
        place["key"] = step.key
        return {**place, "status": self.status, "why": self.why}


def plan(steps: list[Step], store: Store, run_folder: Path, force: str | None = None) -> list[Planned]:
    """Look every step up. `force` names a stage that is rebuilt, and all that rests on it."""
    previous = {label_of(entry): entry["key"] for entry in read_results(run_folder).get("stages", [])}
    planned: list[Planned] = []
    forced: set[str] = set()
    for step in steps:
        rests_on = [inner.label for inner in step.inputs if inner.key in forced]
        if step.stage == force or rests_on:
            forced.add(step.key)
            planned.append(Planned(step, "build", f"--force {force}"))
        elif store.find(step.stage, step.key):
            planned.append(Planned(step, "cached", ""))
        else:
            planned.append(Planned(step, "build", _why(step, store, previous.get(step.label))))
    return planned


def memory_of_pruning(config: RunConfig, sources: Sources) -> int | None:
    """Bytes that measuring and pruning are predicted to take; None without pruning, or while the model is not here."""
    said = sources.model_config(config.model.source) if config.pruning else None
    if said is None or config.pruning is None:
        return None
    from pruning.memory import peak_bytes

    shape = shape_of(said, f"model.source: {config.model.source}")
    text, own = config.calibration, config.pruning.compensation
    windows = (text.samples, text.length) if text else (0, 0)
    others = (own.samples or windows[0], own.length or windows[1])
    width = 4 if config.model.dtype == "float32" else 2
    return peak_bytes(shape, width, config.pruning, windows, others)


def shape_of(said: dict[str, Any], place: str) -> Architecture:
    """The shape of the model whose config.json says this. Raises ConfigError, which names `place`, where it lacks
    something, or contradicts itself."""
    try:
        return Architecture.read(said)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error


def until(steps: list[Step], stage: str | None) -> list[Step]:
    """The steps up to and including a stage, with all they rest on."""
    if stage is None:
        return steps
    wanted = {step.key for step in steps if STAGES.index(step.stage) <= STAGES.index(stage)}
    for step in reversed(steps):  # what rests on others comes after them
        if step.key in wanted:
            wanted.update(inner.key for inner in step.inputs)
    return [step for step in steps if step.key in wanted]


def label_of(entry: dict[str, Any]) -> str:
    """A `results.json` stage entry's label, as `Step.label` writes it."""
    return label(entry["stage"], entry["model"], entry.get("suite") or entry.get("statistic") or entry.get("export"))


def _why(step: Step, store: Store, old_key: str | None) -> str:
    if old_key is None:
        return "not built yet"
    if old_key == step.key:
        return "its result was removed from the store"
    old = store.find(step.stage, old_key)
    if old is None:
        return "its settings changed"
    names = {
        "base": "the model it starts from",
        "model": "the model it scores",
        "adapter": "the adapter",
        "teacher": "the teacher",
    }
    changed: list[str] = []
    for name in sorted(old.manifest["material"].keys() | step.material.keys()):
        before, after = old.manifest["material"].get(name), step.material.get(name)
        if before == after:
            continue
        made_before = name in names and isinstance(before, str)
        changed += [f"{names[name]} changed"] if made_before else differences(before, after, name)
    return "; ".join(changed)
