"""The stages of a run and their keys, from the config alone: nothing here builds anything or imports torch.

    statistics ── prune ── recover ── merge          evaluate(dense | pruned | recovered, suite)
                  teacher ─┘          export(format), of the last model; a quantized one is scored as well

Where an adapter is read (`recovery.adapter.from`), merge rests on its folder, and there is no recover.

`material` is what a key is the digest of: the stage and its version, the method's name and version, the stage's whole
config, and the keys of its inputs. Device, threads and batch size of evaluation are not in it.
"""

from dataclasses import dataclass
from typing import Any

from evaluation import suites
from pipeline import export, rows
from pipeline.config import RunConfig
from pipeline.export.config import ExportConfig, QuantizedConfig
from pipeline.keys import KEY_LENGTH, digest
from pipeline.sections import PerplexityConfig, SuiteConfig
from pipeline.sources import Sources
from pruning import criteria
from pruning.config import Statistic
from recovery import adapters
from recovery.config import ROWS

STAGES = ("statistics", "prune", "teacher", "recover", "merge", "evaluate", "export")
# Raise one when its code gives other results; where training rows become others, both teacher's and recover's.
VERSIONS = {"statistics": 2, "prune": 2, "teacher": 3, "recover": 5, "merge": 1, "evaluate": 2, "export": 1}


@dataclass(frozen=True)
class Step:
    """One cached unit of work. `model` says which of the run's models it reads, `scored` what it scores it on,
    `statistic` what it measures, and `exported` the form it writes it in."""

    stage: str
    material: dict[str, Any]
    inputs: tuple["Step", ...] = ()
    model: str = "dense"
    scored: SuiteConfig | PerplexityConfig | None = None
    statistic: Statistic | None = None
    exported: ExportConfig | None = None

    @property
    def key(self) -> str:
        return digest(self.material)[:KEY_LENGTH]

    @property
    def label(self) -> str:
        return label(self.stage, self.model, self.subject)

    @property
    def subject(self) -> str | None:
        """The suite, text, statistic or form that tells steps of one stage apart."""
        if self.exported:
            return self.exported.label
        return self.scored.name if self.scored else self.statistic.name if self.statistic else None


def label(stage: str, model: str, subject: str | None) -> str:
    """What a step is called: `prune`, `statistics gradients`, `evaluate pruned piqa`."""
    return " ".join(filter(None, (stage, model if stage == "evaluate" else None, subject)))


def steps_of(config: RunConfig, sources: Sources) -> list[Step]:
    """Every step of a run, inputs before what needs them. Raises SourceError where a source cannot be resolved."""
    dense = {"source": sources.key(config.model.source), "dtype": config.model.dtype}
    steps: list[Step] = []
    models: list[tuple[str, Step | None]] = [("dense", None)]
    base: Step | None = None
    if config.pruning:
        for statistic in criteria.statistics(config.pruning):
            steps.append(Step("statistics", _statistics(config, sources, dense, statistic), statistic=statistic))
        base = Step("prune", _prune(config, sources, dense, steps), tuple(steps))
        steps.append(base)
        models.append(("pruned", base))
    inputs: tuple[Step, ...] = (base,) if base else ()
    model, adapter = "pruned" if base else "dense", None
    if config.recovery:
        taught = _teacher(config, sources)
        kept = config.recovery.distillation and config.recovery.distillation.cache
        teacher = (Step("teacher", taught),) if taught and kept else ()
        # Asked on the fly or kept, the teacher says the same: it has the same key in the adapter's.
        material = {**_recover(config, sources, _identity(dense, base)), "teacher": taught and digest(taught)}
        recover = Step("recover", material, (*inputs, *teacher), model)
        steps += [*teacher, recover]
        inputs, adapter = (*inputs, recover), recover.key
    elif config.adapter:
        adapter = _read(config.adapter, sources)
    if adapter:
        merge = Step("merge", {**_head("merge"), "base": _identity(dense, base), "adapter": adapter}, inputs, model)
        steps.append(merge)
        models.append(("recovered", merge))
    for model, made_by in models:
        for scored in (*config.evaluation.suites, *config.evaluation.perplexity):
            material = _evaluate(config, sources, scored, _identity(dense, made_by))
            steps.append(Step("evaluate", material, (made_by,) if made_by else (), model, scored))
    return steps + _exports(config, sources, steps, dense)


def _exports(config: RunConfig, sources: Sources, steps: list[Step], dense: dict[str, Any]) -> list[Step]:
    """Every export of the run's last model (the adapter alone: of the model it was trained on), and the scores of
    those that compute otherwise. The model card shows the run's scores, so their keys are part of an export's, but not
    of what its weights score."""
    made = {step.stage: step for step in steps}
    last = made.get("merge") or made.get("prune")
    scores = tuple(step for step in steps if step.stage == "evaluate")
    found: list[Step] = []
    for wanted in config.export:
        alone = wanted.format == "peft"
        base = made.get("prune") if alone else last
        trained = (made["recover"],) if alone and "recover" in made else ()
        inputs = (*scores, *trained, *((base,) if base else ()))
        material = {
            **_head("export"),
            "format_version": export.load(wanted.format).VERSION,
            "config": wanted.model_dump(mode="json"),
            "base": _identity(dense, base),
            "adapter": made["merge"].material["adapter"] if alone else None,
            "scores": [step.key for step in scores],
        }
        model = "recovered" if "merge" in made and not alone else "pruned" if base else "dense"
        step = Step("export", material, inputs, model, exported=wanted)
        found.append(step)
        if isinstance(wanted, QuantizedConfig):
            weights = digest({name: said for name, said in material.items() if name != "scores"})
            for scored in (*config.evaluation.suites, *config.evaluation.perplexity):
                material = _evaluate(config, sources, scored, weights)
                found.append(Step("evaluate", material, (step,), f"{model}-{wanted.scheme}", scored))
    return found


def _head(stage: str) -> dict[str, Any]:
    return {"stage": stage, "version": VERSIONS[stage]}


def _identity(dense: dict[str, Any], made_by: Step | None) -> Any:
    return made_by.key if made_by else dense


def _statistics(config: RunConfig, sources: Sources, dense: dict[str, Any], statistic: Statistic) -> dict[str, Any]:
    assert config.calibration is not None
    measured = {"name": statistic.name, "options": dict(statistic.options)}
    calibration = rows.material(sources, config.calibration)
    return {**_head("statistics"), **measured, "calibration": calibration, "model": dense}


def _prune(config: RunConfig, sources: Sources, dense: dict[str, Any], statistics: list[Step]) -> dict[str, Any]:
    assert config.pruning is not None
    method = criteria.load(config.pruning.method)
    # Calibration text is part of the statistics' keys; here only what pruning itself runs on it counts.
    text = config.calibration if config.pruning.runs_on_text else None
    # Since version 2 only this has changed: added biases count in the ratio, several steps end where one does, and
    # layers that are unlike are counted by their own sizes.
    biased = {"bias_version": 2} if config.pruning.compensation.method == "bias" else {}
    stepped = {"steps_version": 2} if config.pruning.steps > 1 else {}
    unlike = "layers" in config.pruning.structures and config.pruning.shape != "uniform"
    depth = config.pruning.depth
    return {
        **_head("prune"),
        **biased,
        **stepped,
        **({"layers_version": 2} if unlike else {}),
        **({"depth_version": criteria.load(depth.method).VERSION} if depth else {}),
        "method_version": method.VERSION,
        "config": config.pruning.model_dump(mode="json"),
        "calibration": rows.material(sources, text) if text else None,
        "statistics": [step.key for step in statistics],
        "model": dense,
    }


def _recover(config: RunConfig, sources: Sources, base: Any) -> dict[str, Any]:
    assert config.recovery is not None
    method = adapters.load(config.recovery.adapter.method)
    return {
        **_head("recover"),
        "method_version": method.VERSION,
        "config": config.recovery.model_dump(mode="json"),
        "data": [rows.material(sources, data) for data in config.data],
        "base": base,
    }


def _teacher(config: RunConfig, sources: Sources) -> dict[str, Any] | None:
    """What the teacher says depends on: its model, which rows are fed, and what is kept of them."""
    assert config.recovery is not None
    if config.recovery.distillation is None:
        return None
    return {
        **_head("teacher"),
        "data": [rows.material(sources, data) for data in config.data],
        "rows": config.recovery.model_dump(mode="json", include=ROWS),
        "kept": config.recovery.distillation.model_dump(mode="json", include={"positions", "top_k"}),
        "model": {"source": sources.key(config.teacher or config.model.source), "dtype": config.model.dtype},
    }


def _read(spec: str, sources: Sources) -> dict[str, Any]:
    """An adapter that was trained before: its files, and the method that reads them."""
    found = sources.adapter(spec)
    return {**sources.key(spec), "format": found.form, "method": found.method, "method_version": found.version}


def _evaluate(
    config: RunConfig, sources: Sources, scored: SuiteConfig | PerplexityConfig, model: Any
) -> dict[str, Any]:
    head = {**_head("evaluate"), "model": model}
    if isinstance(scored, PerplexityConfig):
        settings = scored.model_dump(mode="json", include={"window", "tokens"})
        return {**head, "perplexity": settings, "rows": rows.material(sources, scored)}
    local = scored.rows()
    suite = suites.load(scored.name)
    data = rows.material(sources, local) if local else suite_on_hub(scored.name, sources)
    limit = scored.limit if scored.limit is not None else config.evaluation.limit
    settings = {"limit": limit, "add_bos": config.evaluation.add_bos, "protocol": suite.protocol}
    if not suite.fields:
        settings["shots"] = 0  # where a task's own file may say another number
    if suite.protocol == "B":
        settings["generation_version"] = 2  # since then penalties of the model's generation_config are not obeyed
    return {**head, "suite": scored.name, "settings": settings, "rows": data}


def suite_on_hub(name: str, sources: Sources) -> dict[str, Any]:
    """The commit of the hub data set that lm-eval reads for this suite. Raises SourceError without a network."""
    dataset = suites.load(name).hub
    return {"kind": "hub", "name": dataset, "commit": sources.commit(f"suite {name}", dataset, "dataset")}
