"""Which run folder uses which artifacts of a store, and removing what none uses.

A record lies in <store>/.roots/ for every run folder: {"run": folder, "artifacts": ["stage/key16", ...]}.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.keys import KEY_LENGTH, digest
from pipeline.store import MANIFEST, Store, read_record, write_text


def keep(store: Store, run_folder: Path, used: Iterable[str], finished: bool = True) -> None:
    """Record the artifacts (`stage/key16`) of a run, built or not yet: `collect` keeps them, and work on them.

    Until a run has `finished`, what was recorded of its folder before is kept as well: that is still what it shows.
    """
    run = str(run_folder.absolute())
    path = store.root / ".roots" / f"{digest(run)[:KEY_LENGTH]}.json"
    before = _record(path) if path.is_file() else {"artifacts": []}
    record = {"run": run, "artifacts": sorted({*used, *([] if finished else before["artifacts"])})}
    if record != before:
        write_text(path, json.dumps(record, indent=1))


def vanished_runs(store: Store) -> list[str]:
    """Recorded run folders that are not there: deleted, moved, or on a disk that is not mounted."""
    return [record["run"] for _, record in _records(store) if not Path(record["run"]).is_dir()]


def collect(store: Store, dry_run: bool, vanished: bool = False) -> list[tuple[Path, int]]:
    """Remove what no recorded run uses, and work left by processes that died. Returns (folder, bytes).

    `vanished` also removes what is used by none but runs whose folder is not there.
    """
    used: set[str] = set()
    for path, record in _records(store):
        if not vanished or Path(record["run"]).is_dir():
            used.update(record["artifacts"])
        elif not dry_run:
            path.unlink()
    unused = [folder for folder in store.finished() if f"{folder.parent.name}/{folder.name}" not in used]
    resumable = {name.replace("/", "-") for name in used}
    dead = [work for work in sorted((store.root / ".work").glob("*")) if work.name not in resumable]
    removed: list[tuple[Path, int]] = []
    for folder in [*unused, *dead]:
        name = folder.name if folder.parent.name == ".work" else f"{folder.parent.name}-{folder.name}"
        with store.lock(name, None) as free:
            if not free:
                continue
            removed.append((folder, sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())))
            if not dry_run:
                # The manifest goes first: a folder half removed must not look finished.
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder)
    return removed


def _records(store: Store) -> list[tuple[Path, dict[str, Any]]]:
    return [(path, _record(path)) for path in sorted((store.root / ".roots").glob("*.json"))]


def _record(path: Path) -> dict[str, Any]:
    remedy = "remove it, and run the configs of this store again before `regrow gc`"
    return read_record(path, {"run", "artifacts"}, remedy)
