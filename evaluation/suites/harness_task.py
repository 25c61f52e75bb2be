"""Any other multiple-choice task of lm-eval, by its name: found in lm-eval's files without importing lm-eval."""

import importlib.util
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import yaml

PREFIX = "lm-eval:"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads a task's `!function` references as text: nothing of a task runs here."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))


def describe(name: str) -> dict[str, Any]:
    """What a Suite needs to know of lm-eval's task `name` (without the prefix).

    Raises ValueError for a name that is no task's, naming near ones, and for a task that ranks no choices.
    """
    spec = importlib.util.find_spec("lm_eval")  # finds it, and imports nothing
    root = Path(cast("str", cast("Any", spec).origin)).parent / "tasks"
    tasks: list[str] = []
    # There are ten thousand files: those called like the task come first.
    for path in sorted(
        root.rglob("*.yaml"), key=lambda path: (name not in path.stem, path.parent.name not in name, path)
    ):
        found = re.search(r"^task: *[\"']?([\w.-]+)[\"']? *$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if found and found[1] == name:
            return _described(name, path, root)
        if found:
            tasks.append(found[1])
    near = get_close_matches(name, tasks, n=3)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    raise ValueError(f"lm-eval has no task {name!r}{hint}; a group of tasks is given task by task")


def _described(name: str, path: Path, root: Path) -> dict[str, Any]:
    said = _read(path)
    kind = said.get("output_type")
    metrics = [entry["metric"] for entry in said.get("metric_list", []) if isinstance(entry.get("metric"), str)]
    if kind != "multiple_choice" or "acc" not in metrics:
        raise ValueError(f"lm-eval's task {name!r} is {kind} scored by {metrics}; regrow scores multiple choice by acc")
    return {"task": name, "folder": path.parent.relative_to(root).as_posix(), "hub": said.get("dataset_path", "")}


def _read(path: Path) -> dict[str, Any]:
    said: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    if included := said.get("include"):
        said = _read((path.parent / included).resolve()) | said
    return said
