"""What a run found, read from its artifacts: `results.json`."""

import json
from pathlib import Path
from typing import Any

from evaluation import suites
from evaluation.items import ITEMS
from evaluation.statistics import has_signal
from pipeline import comparison
from pipeline.config import RunConfig
from pipeline.errors import StageError
from pipeline.sections import PerplexityConfig
from pipeline.steps import Step
from pipeline.store import Artifact, Store

SCHEMA = 1
Results = dict[str, Any]


def collect(config: RunConfig, steps: list[Step], store: Store, statuses: dict[str, str]) -> Results:
    """The run's `results.json` from finished artifacts. `statuses` maps a step's label to how it came."""
    models: dict[str, Any] = {}
    stages: list[dict[str, Any]] = []
    scores: dict[str, comparison.Scores] = {}
    for step in steps:
        artifact = store.find(step.stage, step.key)
        if artifact is None:
            raise StageError(f"{step.label} ({step.key}) is not in {store.root}; build it with `regrow run`")
        stages.append(_stage(step, artifact, statuses.get(step.label, "cached")))
        if step.scored:
            size = artifact.manifest["model"]
            entry = models.setdefault(step.model, {**size, "suites": {}, "perplexity": {}})
            result = artifact.manifest["report"]
            if isinstance(step.scored, PerplexityConfig):
                entry["perplexity"][step.scored.name] = result["perplexity"]
            else:
                entry["suites"][step.scored.name] = result
                scores.setdefault(step.model, {})[step.scored.name] = artifact.path / ITEMS
    signal = with_signal(models.get("dense", {}).get("suites", {}))
    for entry in models.values():
        entry["averages"] = {protocol: _averages(entry["suites"], protocol, signal) for protocol in protocols(models)}
        first = next(
            iter(entry["averages"].values()), {"average": None, "average_with_signal": None, "gold_logprob": None}
        )
        entry |= first
    compared = comparison.of_models(scores)
    found = {"models": models, "signal": signal, "comparisons": compared, "stages": stages}
    return {"schema": SCHEMA, "name": config.name, **found}


def protocols(models: dict[str, Any]) -> list[str]:
    """The protocols that were scored by, A before B: numbers of two are never in one table or mean."""
    return sorted({result["protocol"] for entry in models.values() for result in entry["suites"].values()})


def _averages(scored: dict[str, Any], protocol: str, signal: list[str]) -> dict[str, float | None]:
    own = {name: result for name, result in scored.items() if result["protocol"] == protocol}
    golds = [result["gold_logprob"] for result in own.values() if "gold_logprob" in result]
    return {
        "average": _mean([result[metric(name)] for name, result in own.items()]),
        "average_with_signal": _mean([result[metric(name)] for name, result in own.items() if name in signal]),
        "gold_logprob": _mean(golds),
    }


def with_signal(dense: dict[str, Any]) -> list[str]:
    """The suites on which the dense model is above chance by more than a one-sided 5% error."""
    return [name for name, result in dense.items() if has_signal(result, metric(name))]


def as_text(results: Results) -> str:
    """`results.json` as text."""
    return json.dumps(results, indent=1, ensure_ascii=False)


def read_results(run_folder: Path) -> Results:
    """The last `results.json` of a run folder; an empty mapping if there is none, or it is something else."""
    try:
        said = json.loads((run_folder / "results.json").read_text(encoding="utf-8"))
        whole = all(isinstance(entry[part], str) for entry in said["stages"] for part in ("stage", "model", "key"))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return said if whole else {}


def metric(suite: str) -> str:
    """The metric that a suite's protocol names."""
    return suites.load(suite).metric


def _stage(step: Step, artifact: Artifact, status: str) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "stage": step.stage,
        "model": step.model,
        "suite": step.scored.name if step.scored else None,
        "statistic": step.statistic.name if step.statistic else None,
        "export": step.exported.label if step.exported else None,
        "key": artifact.key,
        "status": status,
        "seconds": manifest["seconds"],
        "peak_memory_bytes": manifest["peak_memory_bytes"],
        "path": str(artifact.path),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
