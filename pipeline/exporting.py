"""The stage `export`: the run's last model in one more form, with its check and its model card."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import report
from pipeline.export import lineage as lineages
from pipeline.export.model_folder import ModelFolder
from pipeline.export.write import write
from pipeline.results import collect
from pipeline.steps import Step
from pipeline.store import Workspace

if TYPE_CHECKING:
    from pipeline.stages import Runner


def export(runner: "Runner", step: Step, workspace: Workspace) -> dict[str, Any]:
    """Write, check and describe one export of the model that the step reads."""
    assert step.exported is not None
    adapter = runner.adapter(step).folder if step.exported.format == "peft" else None
    model = ModelFolder(runner.folder(step), adapter)
    lineage = {**lineages.of_folder(model.path), **_of_source(runner.dense_folder(), workspace.out)}
    if adapter:
        lineage["recovery"] = lineages.of_adapter(step.material["adapter"], adapter.name, runner.store.root)
    scored = [inner for inner in step.inputs if inner.scored]
    if scored:
        lineage["results"] = report.score_rows(collect(runner.config, scored, runner.store, {}))
    return {"report": write(model, workspace.out, step.exported, lineage)}


def _of_source(folder: Path, out: Path) -> dict[str, Any]:
    """The source's licence: what its README states, and its licence files, copied."""
    for file in (*folder.glob("LICENSE*"), *folder.glob("NOTICE*")):
        shutil.copyfile(file, out / file.name)
    licence = lineages.licence_of(folder)
    return {"licence": licence} if licence else {}
