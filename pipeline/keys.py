"""Identities of results: canonical JSON and the sha256 of it.

Nothing is hashed through `str()` or pickle: a value whose text could differ between two runs of the same
config (NaN, a set, a path, a callable) is refused, so that equal keys mean equal settings.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

KEY_LENGTH = 16  # characters of the key that name a folder


def canonical(value: object, place: str = "key") -> str:
    """JSON with sorted keys and no spaces. Raises TypeError or ValueError naming the place of an unstable value."""
    _check(value, place)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: object) -> str:
    """sha256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """`path: old -> new` for every leaf in which two key materials differ; lists are compared whole."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        before, after = cast("Mapping[str, object]", old), cast("Mapping[str, object]", new)
        for key in sorted(before.keys() | after.keys()):
            inner = f"{path}.{key}" if path else key
            yield from differences(before.get(key), after.get(key), inner)
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _check(value: Any, place: str) -> None:
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place}: {value} has no canonical form")
        return
    if isinstance(value, dict):
        for key, inner in cast("dict[object, object]", value).items():
            if not isinstance(key, str):
                raise TypeError(f"{place}: key {key!r} is a {type(key).__name__}, not a string")
            _check(inner, f"{place}.{key}")
        return
    if isinstance(value, list | tuple):
        for index, inner in enumerate(cast("list[object]", value)):
            _check(inner, f"{place}[{index}]")
        return
    raise TypeError(f"{place}: a {type(value).__name__} has no canonical form")
