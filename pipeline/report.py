"""What a run found: `results.json`, the table on the terminal, and `report.md`."""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from evaluation import suites
from pipeline.config import PerplexityConfig, RunConfig
from pipeline.errors import StageError
from pipeline.steps import Step
from pipeline.store import Artifact, Store

SCHEMA = 1
Results = dict[str, Any]


def collect(config: RunConfig, steps: list[Step], store: Store, statuses: dict[str, str]) -> Results:
    """The run's `results.json` from finished artifacts. `statuses` maps a step's label to how it came."""
    models: dict[str, Any] = {}
    stages: list[dict[str, Any]] = []
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
    for entry in models.values():
        entry["average"] = _mean([result[metric(name)] for name, result in entry["suites"].items()])
        entry["gold_logprob"] = _mean([result["gold_logprob"] for result in entry["suites"].values()])
    return {"schema": SCHEMA, "name": config.name, "models": models, "stages": stages}


def as_text(results: Results) -> str:
    """`results.json` as text."""
    return json.dumps(results, indent=1, ensure_ascii=False)


def read_results(run_folder: Path) -> Results:
    """The last `results.json` of a run folder; an empty mapping if there is none."""
    try:
        return json.loads((run_folder / "results.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def metric(suite: str) -> str:
    """The metric that a suite's protocol names."""
    return suites.load(suite).metric


def score_rows(results: Results) -> list[list[str]]:
    """The table: a heading, then one row a measure with a cell for each model and its change against dense."""
    models: dict[str, Any] = results["models"]
    if not models:
        return []
    dense = models["dense"]
    rows = [["", *models]]
    rows.append(["parameters", *(_size(m["parameters"], dense["parameters"], 1e6, "M") for m in models.values())])
    rows.append(["weights", *(_size(m["bytes"], dense["bytes"], 1e6, " MB") for m in models.values())])
    for name in dense["suites"]:
        key = metric(name)
        cells = [_score(m["suites"][name], dense["suites"][name], key, m is dense) for m in models.values()]
        rows.append([f"{name} ({key})", *cells])
    if dense["suites"]:
        for label, key in (("average", "average"), ("gold log-probability / token", "gold_logprob")):
            rows.append([label, *(_change(m[key], dense[key], ".3f", m is dense) for m in models.values())])
    for name in dense["perplexity"]:
        cells = [_times(m["perplexity"][name], dense["perplexity"][name], m is dense) for m in models.values()]
        rows.append([f"perplexity {name}", *cells])
    return rows


def stage_rows(results: Results) -> list[list[str]]:
    """One row a stage: status, seconds and peak memory of the build; the scorings of one model are summed up."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in results["stages"]:
        label = f"evaluate {entry['model']}" if entry["stage"] == "evaluate" else entry["stage"]
        groups.setdefault(label, []).append(entry)
    rows = [["stage", "status", "seconds", "peak memory"]]
    for label, entries in groups.items():
        status = ", ".join(dict.fromkeys(entry["status"] for entry in entries))
        seconds = sum(entry["seconds"] for entry in entries)
        memory = max(entry["peak_memory_bytes"] for entry in entries)
        rows.append([label, status, f"{seconds:.1f}", f"{memory / 1e9:.2f} GB"])
    return rows


def table(rows: list[list[str]], title: str = "") -> Table:
    """A table for the terminal; the first row is the heading."""
    drawn = Table(title=title or None, box=box.SIMPLE, title_justify="left", pad_edge=False)
    for index, heading in enumerate(rows[0]):
        drawn.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows[1:]:
        drawn.add_row(*row)
    return drawn


def markdown(results: Results) -> str:
    """`report.md`: both tables, what the columns mean, and where every artifact lies."""
    parts = [f"# {results['name']}", ""]
    if scores := score_rows(results):
        parts += [_pipe_table(scores), "", _legend(results), ""]
    parts += ["## Stages", "", _pipe_table(stage_rows(results)), "", "## Artifacts", ""]
    parts += [f"- `{entry['stage']}/{entry['key']}`: {_what(entry)}" for entry in results["stages"]]
    return "\n".join(parts) + "\n"


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


def _what(entry: dict[str, Any]) -> str:
    return f"{entry['model']} on {entry['suite']}" if entry["suite"] else f"`{entry['path']}`"


def _legend(results: Results) -> str:
    suites_found: dict[str, Any] = results["models"]["dense"]["suites"]
    counts = ", ".join(f"{name} {result['n']}" for name, result in suites_found.items())
    text = "In brackets: the change against dense; ±: one standard error. Average: unweighted, over the suites."
    return f"{text} Protocol A (log-likelihood ranking). Items: {counts}." if counts else text


def _pipe_table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _size(value: float, dense: float, unit: float, name: str) -> str:
    change = "" if value == dense else f" ({value / dense - 1:+.1%})"
    return f"{value / unit:.1f}{name}{change}"


def _score(result: dict[str, Any], dense: dict[str, Any], key: str, is_dense: bool) -> str:
    error = f" ±{result[key + '_stderr']:.3f}"
    return f"{result[key]:.3f}{error if is_dense else ''}" + _bracket(result[key] - dense[key], ".3f", is_dense)


def _change(value: float, dense: float, form: str, is_dense: bool) -> str:
    return f"{value:{form}}" + _bracket(value - dense, form, is_dense)


def _times(value: float, dense: float, is_dense: bool) -> str:
    return f"{value:.2f}" + ("" if is_dense else f" (×{value / dense:.2f})")


def _bracket(change: float, form: str, is_dense: bool) -> str:
    return "" if is_dense else f" ({change:+{form}})"
