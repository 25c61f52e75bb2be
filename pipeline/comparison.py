"""Paired tables: two models on the same items, suite by suite, and what may be said of their difference."""

from itertools import combinations
from pathlib import Path
from typing import Any

from evaluation import items, suites
from evaluation.statistics import compare

Scores = dict[str, Path]  # where the items of each suite lie
MARKS = {"better": " ▲", "worse": " ▼"}


def of_models(models: dict[str, Scores]) -> list[dict[str, Any]]:
    """Every two models of a run compared on every suite both were scored on, for `results.json`."""
    found: list[dict[str, Any]] = []
    for first, second in combinations(models, 2):
        found += [{"first_model": first, "second_model": second, **row} for row in pairs(models[first], models[second])]
    return found


def pairs(first: Scores, second: Scores) -> list[dict[str, Any]]:
    """One comparison for each suite that both have. Raises ValueError where they were scored on other rows."""
    rows: list[dict[str, Any]] = []
    for name in first:
        if name not in second:
            continue
        metric = suites.load(name).metric
        try:
            found = compare(items.read(first[name]), items.read(second[name]), metric)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        rows.append({"suite": name, "metric": metric, "protocol": suites.load(name).protocol, **found.as_json()})
    return rows


def table_rows(comparisons: list[dict[str, Any]]) -> list[list[str]]:
    """A heading, then one row a comparison."""
    heading = ["suite", "items", "first", "second", "difference", "won / lost", "p", "verdict"]
    rows = [[*heading, "gold log-probability, 95%", "verdict on it"]]
    for row in comparisons:
        gold = "" if row["gold_difference"] is None else f"{row['gold_difference']:+.3f}"
        if row["gold_low"] is not None:
            gold += f" [{row['gold_low']:+.3f}, {row['gold_high']:+.3f}]"
        rows.append([
            f"{row['suite']} ({row['metric']})",
            str(row["n"]),
            f"{row['first']:.3f}",
            f"{row['second']:.3f}",
            f"{row['difference']:+.3f} ±{row['stderr']:.3f}",
            f"{row['wins']} / {row['losses']}",
            f"{row['p']:.3g}",
            row["verdict"],
            gold,
            row["gold_verdict"] or "",
        ])  # fmt: skip
    return rows


def mark(comparisons: list[dict[str, Any]], suite: str, first: str, second: str) -> str:
    """▲, ▼ or nothing: the verdict on a suite's metric."""
    for row in comparisons:
        if (row["suite"], row["first_model"], row["second_model"]) == (suite, first, second):
            return MARKS.get(row["verdict"], "")
    return ""
