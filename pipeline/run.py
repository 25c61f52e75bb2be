"""Executing a config: plan, check every input, build what is missing, write the run's folder."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml

from pipeline import events, garbage, preflight, processes, provenance, report
from pipeline.config import RunConfig
from pipeline.console import Reporter
from pipeline.errors import ConfigError, RegrowError, StageError
from pipeline.plan import Planned, plan, until
from pipeline.results import Results, as_text, collect
from pipeline.sources import Sources
from pipeline.steps import Step, steps_of
from pipeline.store import Store, Workspace, write_text
from pruning import criteria
from recovery import adapters, history

if TYPE_CHECKING:
    from pipeline.stages import Runner

WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # what a file system says that has none


@dataclass(frozen=True)
class Run:
    """A config with its place: the store its results go to, and the folder that shows them."""

    config: RunConfig
    raw: dict[str, Any]
    store: Store
    folder: Path
    reporter: Reporter

    def sources(self) -> Sources:
        return Sources(self.store, self.config.checksums, self.reporter.say)


def execute(run: Run, last: str | None = None, force: str | None = None) -> report.Results | None:
    """Build what is missing up to the stage `last` and return the results. Cached steps cost no torch import.

    Of several processes the first does that; the others help it train and return None.
    """
    with processes.joined():
        if processes.first():
            return _execute(run, last, force)
        _help(run)
        return None


def _help(run: Run) -> None:
    from pipeline.recovering import adapter_of
    from pipeline.stages import Runner, prepare

    prepare(run.config.runtime)
    while said := processes.hear():
        sources = run.sources()
        (step,) = (step for step in steps_of(run.config, sources) if step.key == said["key"])
        try:
            adapter_of(Runner(run.config, sources, run.store), step, Path(said["scratch"]))
        except Exception as error:
            raise StageError(f"{step.label}, process {os.environ.get('RANK')}: {error}") from error


def _execute(run: Run, last: str | None, force: str | None) -> report.Results:
    if run.config.runtime.tensorboard:
        events.check()
    sources = run.sources()
    every = steps_of(run.config, sources)
    steps = until(every, last)
    for option, stage, among in (("--until", last, every), ("--force", force, steps)):
        stages = dict.fromkeys(step.stage for step in among)
        if stage and stage not in stages:
            raise ConfigError(f"{option} {stage}: there is no such stage in this run, which has {', '.join(stages)}")
    used = {f"{step.stage}/{step.key}" for step in every} | sources.used
    planned = plan(steps, run.store, run.folder, force)
    missing = [item for item in planned if item.status == "build"]
    statuses = {item.step.label: "cached" for item in planned}
    _warn_of_drift(run, planned)
    if missing:
        preflight.check(run.config, [item.step for item in missing], sources)
        statuses |= _build(run, missing, sources, used)
    results = collect(run.config, steps, run.store, statuses)
    _write_folder(run, steps, results)
    _write_events(run, steps, statuses)
    garbage.keep(run.store, run.folder, used)
    return results


def _build(run: Run, missing: list[Planned], sources: Sources, used: set[str]) -> dict[str, str]:
    from pipeline.stages import Runner, prepare

    prepare(run.config.runtime)
    run.folder.mkdir(parents=True, exist_ok=True)
    garbage.keep(run.store, run.folder, used, finished=False)  # before `gc` could take what they rest on
    runner = Runner(run.config, sources, run.store, shown=run.folder)
    statuses: dict[str, str] = {}
    for item in missing:
        step = item.step
        with run.reporter.step(f"{step.label} ({step.key})") as progress:
            force = item.why.startswith("--force")
            runner.progress, runner.fresh = progress, force
            statuses[step.label] = _build_one(run, runner, step, force)
    return statuses


def _build_one(run: Run, runner: "Runner", step: Step, force: bool) -> str:
    def builder(workspace: Workspace) -> dict[str, Any]:
        with provenance.peak_memory() as measured:
            said = runner.build(step, workspace)
        return {**said, **measured, "provenance": provenance.record(_method(run.config, step))}

    try:
        _, status = run.store.build(step.stage, step.material, builder, force=force, waiting=run.reporter.say)
    except (RegrowError, KeyboardInterrupt):
        raise
    except Exception as error:
        reason = run.store.explain(f"{step.stage}-{step.key}", error)
        raise StageError(f"{step.label} failed: {reason}") from error
    return status


def _method(config: RunConfig, step: Step) -> ModuleType | None:
    if step.stage == "prune" and config.pruning:
        return criteria.load(config.pruning.method)
    if step.stage == "recover" and config.recovery:
        return adapters.load(config.recovery.adapter.method)
    return None


def _warn_of_drift(run: Run, planned: list[Planned]) -> None:
    seen: set[str] = set()
    for item in planned:
        if item.status != "cached" or not (artifact := run.store.find(item.step.stage, item.step.key)):
            continue
        for change in provenance.drift(artifact.manifest, _method(run.config, item.step)):
            if change not in seen:
                seen.add(change)
                run.reporter.warn(f"{item.step.label} was built by other code ({change}); --force rebuilds it")


def _write_events(run: Run, steps: list[Step], statuses: dict[str, str]) -> None:
    """TensorBoard's events of training that was not done now: where it was, they are there."""
    for step in steps:
        if run.config.runtime.tensorboard and step.stage == "recover" and statuses[step.label] == "cached":
            log = run.store.folder(step.stage, step.key) / history.LOG
            events.of_log(log, events.folder_of(run.folder, step.key))


def _write_folder(run: Run, steps: list[Step], results: Results) -> None:
    """`runs/<name>/`: the config as run, results, report, and links to the artifacts."""
    write_text(run.folder / "config.yaml", yaml.safe_dump(run.raw, sort_keys=False, allow_unicode=True))
    write_text(run.folder / "results.json", as_text(results))
    write_text(run.folder / "report.md", report.markdown(results))
    made = {step.label.replace(" ", "-"): run.store.folder(step.stage, step.key) for step in steps}
    link(run.folder / "artifacts", made)


def link(folder: Path, targets: dict[str, Path]) -> None:
    """Make the folder's links these, each in one step: another run of the config may finish at the same time."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.is_symlink() and old.name not in targets and not old.name.startswith("."):
            old.unlink(missing_ok=True)
    for name, target in targets.items():
        new = folder / f".{name}.{os.getpid()}"
        new.unlink(missing_ok=True)
        try:
            new.symlink_to(os.path.relpath(target, folder), target_is_directory=True)
        except OSError as error:
            if error.errno in WITHOUT_LINKS:
                return  # results.json names the paths
            raise
        new.replace(folder / name)
