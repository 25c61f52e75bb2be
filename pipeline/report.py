"""What a run found, for people: tables on the terminal, and `report.md`."""

from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from pipeline import comparison
from pipeline.results import Results, metric, protocols

PROTOCOLS = {"A": "Protocol A (log-likelihood ranking)", "B": "Protocol B (fine-tuned, generated, first match)"}
VERDICTS = (
    "Second against first, paired on the same items: won and lost are items only one answers rightly, p is McNemar's "
    "exact test of them; gold log-probability is the mean change in nats a token with its 95% interval. A verdict errs "
    "in one of twenty comparisons of equal models."
)


def score_rows(results: Results) -> list[list[str]]:
    """The first table: sizes, the suites of the first protocol, their averages, perplexities."""
    models: dict[str, Any] = results["models"]
    if not models:
        return []
    dense = models["dense"]
    rows = [["", *models]]
    rows.append(["parameters", *(_size(m["parameters"], dense["parameters"], 1e6, "M") for m in models.values())])
    rows.append(["weights", *(_size(m["bytes"], dense["bytes"], 1e6, " MB") for m in models.values())])
    for protocol in protocols(models)[:1]:
        rows += protocol_rows(results, protocol)[1:]
    for name in dense["perplexity"]:
        cells = [_times(m["perplexity"][name], dense["perplexity"][name], m is dense) for m in models.values()]
        rows.append([f"perplexity {name}", *cells])
    return rows


def protocol_rows(results: Results, protocol: str) -> list[list[str]]:
    """A heading, then the suites of one protocol with each model's score and change against dense, then averages."""
    models: dict[str, Any] = results["models"]
    dense = models["dense"]
    names = [name for name, result in dense["suites"].items() if result["protocol"] == protocol]
    rows = [["", *models]]
    for name in names:
        key = metric(name)
        cells = [
            _score(m["suites"][name], dense["suites"][name], key, m is dense)
            + comparison.mark(results["comparisons"], name, "dense", model)
            for model, m in models.items()
        ]
        rows.append([f"{name} ({key}){'' if name in results['signal'] else ' *'}", *cells])
    strong = sum(name in results["signal"] for name in names)
    labels = {"average": "average", "gold_logprob": "gold log-probability / token"}
    if 0 < strong < len(names):
        labels = {"average": "average", "average_with_signal": f"average of {strong} with signal", **labels}
    for key, label in labels.items():
        values = [m["averages"][protocol][key] for m in models.values()]
        if values[0] is not None:
            rows.append([label, *(_change(v, values[0], ".3f", n == 0) for n, v in enumerate(values))])
    if protocol == "B":
        counts = [sum(m["suites"][name]["unparsed"] for name in names) for m in models.values()]
        rows.append(["answers that name no option", *map(str, counts)])
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
    """A table for the terminal, as wide as its cells need; the first row is the heading."""
    drawn = Table(title=title or None, box=box.SIMPLE, title_justify="left", pad_edge=False)
    for index, heading in enumerate(rows[0]):
        drawn.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows[1:]:
        drawn.add_row(*row)
    drawn.width = Measurement.get(wide := Console(width=10**6, markup=False), wide.options, drawn).maximum
    return drawn


def markdown(results: Results) -> str:
    """`report.md`: both tables, what the columns mean, and where every artifact lies."""
    parts = [f"# {results['name']}", ""]
    if scores := score_rows(results):
        parts += [_pipe_table(scores), "", legend(results), ""]
    for protocol in protocols(results["models"])[1:]:
        parts += [f"## {PROTOCOLS[protocol]}", "", _pipe_table(protocol_rows(results, protocol)), ""]
        parts += [legend(results, protocol), ""]
    for first, second in dict.fromkeys((row["first_model"], row["second_model"]) for row in results["comparisons"]):
        chosen = [r for r in results["comparisons"] if (r["first_model"], r["second_model"]) == (first, second)]
        parts += [f"## {second} against {first}", "", _pipe_table(comparison.table_rows(chosen)), ""]
    if results["comparisons"]:
        parts += [VERDICTS, ""]
    parts += ["## Stages", "", _pipe_table(stage_rows(results)), "", "## Artifacts", ""]
    parts += [f"- `{entry['stage']}/{entry['key']}`: {_what(entry)}" for entry in results["stages"]]
    return "\n".join(parts) + "\n"


def _what(entry: dict[str, Any]) -> str:
    return f"{entry['model']} on {entry['suite']}" if entry["suite"] else f"`{entry['path']}`"


def legend(results: Results, protocol: str | None = None) -> str:
    """What a table's marks mean, the protocol, and how many items were scored."""
    every: dict[str, Any] = results["models"]["dense"]["suites"]
    protocol = protocol or next(iter(protocols(results["models"])), None)
    found = {name: result for name, result in every.items() if result["protocol"] == protocol}
    if not found:
        return "In brackets: the change against dense."
    first = next(iter(found.values()))
    parts = [
        "In brackets: the change against dense; ±: one standard error; ▲ ▼: better, worse than dense on the same "
        "items, no mark: no difference seen (McNemar, 5%). Average: unweighted, over the suites.",
        f"{PROTOCOLS[first['protocol']]}, {'with' if first['bos'] else 'without'} BOS, {first['harness']}.",
        f"Items: {', '.join(f'{name} {count}' for name, count in _counts(found, 'n').items())}.",
    ]
    if weak := [name for name in found if name not in results["signal"]]:
        parts.append(f"*: dense is not above chance there ({', '.join(weak)}), so no change can be read from it.")
    if counts := _counts(found, "truncated"):
        parts.append(f"Contexts cut to the window: {', '.join(f'{name} {count}' for name, count in counts.items())}.")
    return " ".join(parts)


def _counts(found: dict[str, Any], key: str) -> dict[str, int]:
    return {name: result[key] for name, result in found.items() if result.get(key)}


def _pipe_table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


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
