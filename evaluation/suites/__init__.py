"""The suites: one YAML each, which names lm-eval's own task (`task`, `folder`), holds a task config (`config`), or
names the suite whose rows it asks by protocol B (`base`).

Importing this costs no torch and no lm-eval: names, metrics and row checks are needed before anything is scored.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from evaluation.suites import harness_task

FOLDER = Path(__file__).parent
TYPES = {"str": str, "choice": str, "blank": str, "int": int, "list": list, "choices": dict}
KINDS = {"choice": "str", "blank": "str", "choices": "a mapping"}


@dataclass(frozen=True)
class Suite:
    """One benchmark under one protocol.

    `identity` names the row fields by which a question is recognised in another file (each by itself, or
    `identity_joined` as one text); data files are cut in halves by the first one. `fields` gives the row schema (a
    `blank` is a text with the `_` that an answer fills), `gold` the field that holds the right answer, and the values
    that it may have (none: one of the row's `choices.label`, or a number of its list). `asked` gives the values that
    other fields may have, `labels` what `choices.label` has to be, where lm-eval can ask no others. `fixed_answers`:
    every question has the same choices, so always giving the most frequent one is a guess too.
    """

    name: str
    metric: Literal["acc", "acc_norm"]
    identity: tuple[str, ...]
    fields: dict[str, str]
    gold: dict[str, tuple[str, ...]] = field(default_factory=dict)
    asked: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    task: str = ""
    folder: str = ""
    hub: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    identity_joined: bool = False
    fixed_answers: bool = False
    protocol: str = "A"
    base: str = ""

    def identities(self, row: dict[str, Any]) -> list[str]:
        """The texts that identify a row; two rows that share one are the same question or passage."""
        texts = [str(row[name]) for name in self.identity] or [str(sorted(row.items()))]
        return [" ".join(texts)] if self.identity_joined else texts


@cache
def names() -> list[str]:
    """Every suite, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load(name: str) -> Suite:
    """The suite of this name, or lm-eval's task of the name after `lm-eval:`. Raises ValueError naming a near one."""
    if name.startswith(harness_task.PREFIX):
        return Suite(name=name, metric="acc", identity=(), fields={}, **harness_task.describe(name.split(":", 1)[1]))
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no suite is called {name!r}{hint}; there are {', '.join(names())}, lm-eval:TASK")
    said: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    if base := said.get("base"):
        return replace(load(base), name=name, base=base, metric="acc", protocol="B")
    return Suite(name=name, **(said | {"identity": tuple(said["identity"])}))  # pyright: ignore[reportArgumentType]


def check_rows(suite: Suite, rows: list[dict[str, Any]], place: str) -> None:
    """Raise ValueError at the first row that lacks a field, or has what lm-eval's task could not ask.

    Asking its templates for every row would say the same, but takes a minute for 10,000 rows, not a third of a second.
    Fields of a task by name (`lm-eval:TASK`) are not known here; lm-eval's templates ask for them.
    """
    for number, row in enumerate(rows, start=1):
        for name, kind in suite.fields.items():
            problem = _field_problem(row, name, kind)
            if problem:
                raise ValueError(f"{place}: row {number}: {problem}; {suite.name} rows have {suite.fields}")
        if suite.labels and row["choices"]["label"] != list(suite.labels):
            raise ValueError(f"{place}: row {number}: choices.label is not {', '.join(suite.labels)}, in this order")
        for name, values in (suite.gold | suite.asked).items():
            known = [str(value) for value in values or _answers(suite, row)]
            if str(row.get(name)) not in known:
                raise ValueError(f"{place}: row {number}: {name} is {row.get(name)!r}, not one of {', '.join(known)}")


def _answers(suite: Suite, row: dict[str, Any]) -> Iterable[Any]:
    """The labels of the row's choices, or the numbers of those that have none."""
    name, kind = next((name, kind) for name, kind in suite.fields.items() if kind in ("list", "choices"))
    return row[name]["label"] if kind == "choices" else range(len(row[name]))


def _field_problem(row: dict[str, Any], name: str, kind: str) -> str:
    if name not in row:
        return f"field {name!r} is missing"
    value: Any = row[name]
    if not issubclass(type(value), TYPES[kind]):  # isinstance would narrow `value` for the checker
        return f"field {name!r} is a {type(value).__name__}, not {KINDS.get(kind, kind)}"
    options: list[Any] = [value] if kind == "choice" else []
    if kind == "choices":
        options = value.get("text") or []
        labels = value.get("label") or []
        if not options or len(options) != len(labels):
            return f"field {name!r} needs as many `text` as `label` entries"
        if not all(isinstance(label, str) for label in labels):
            return f"field {name!r} has a `label` that is no text"
    elif kind == "list":
        options = value
        if not options:
            return f"field {name!r} has no choices"
    elif kind == "blank" and "_" not in value:
        return f"field {name!r} has no _ for the answer"
    if not all(isinstance(option, str) for option in options):
        return f"field {name!r} has a choice that is no text"
    if any(not option.strip() for option in options):
        return f"field {name!r} has an empty choice"
    return ""
