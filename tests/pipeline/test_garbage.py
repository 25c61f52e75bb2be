"""What `gc` keeps and removes."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import garbage
from pipeline.keys import digest
from pipeline.store import Store, Workspace

MATERIAL = {"stage": "prune", "ratio": 0.2}


def write(workspace: Workspace) -> dict[str, Any]:
    (workspace.out / "weights.bin").write_bytes(b"abc")
    return {}


def test_gc_keeps_what_a_living_run_uses(tmp_path: Path):
    store, run = Store(tmp_path / "store"), tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    kept, _ = store.build("prune", MATERIAL, write)
    lost, _ = store.build("prune", {**MATERIAL, "ratio": 0.5}, write)
    garbage.keep(store, run, [f"prune/{kept.key}"])
    assert [folder for folder, _ in garbage.collect(store, dry_run=True)] == [lost.path]
    assert lost.path.exists()
    garbage.collect(store, dry_run=False)
    assert (kept.path.exists(), lost.path.exists()) == (True, False)
    run.rename(tmp_path / "moved")
    assert (garbage.vanished_runs(store), garbage.collect(store, dry_run=False)) == ([str(run)], [])
    assert [folder for folder, _ in garbage.collect(store, dry_run=False, vanished=True)] == [kept.path]
    assert garbage.vanished_runs(store) == []


def test_gc_keeps_what_an_unfinished_run_goes_on_from_and_what_it_showed_before(tmp_path: Path):
    store, run = Store(tmp_path / "store"), tmp_path / "runs" / "a"
    before, _ = store.build("prune", MATERIAL, write)
    garbage.keep(store, run, [f"prune/{before.key}"])
    other = {**MATERIAL, "ratio": 0.5}
    now = f"prune/{digest(other)[:16]}"
    garbage.keep(store, run, [now], finished=False)

    def stop(workspace: Workspace) -> dict[str, Any]:
        (workspace.scratch / "checkpoint").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.build("prune", other, stop)
    assert garbage.collect(store, dry_run=False) == []
    garbage.keep(store, run, [now])
    assert [folder for folder, _ in garbage.collect(store, dry_run=False)] == [before.path]
    garbage.keep(store, run, [])
    assert [folder.name for folder, _ in garbage.collect(store, dry_run=False)] == [now.replace("/", "-")]


def test_a_broken_manifest_does_not_keep_the_rest_from_being_collected(tmp_path: Path):
    store = Store(tmp_path)
    kept, _ = store.build("prune", MATERIAL, write)
    broken, _ = store.build("prune", {**MATERIAL, "ratio": 0.5}, write)
    unused, _ = store.build("prune", {**MATERIAL, "ratio": 0.3}, write)
    garbage.keep(store, tmp_path, [f"prune/{kept.key}", f"prune/{broken.key}"])
    (broken.path / "manifest.json").write_text("{")
    assert [folder for folder, _ in garbage.collect(store, dry_run=False)] == [unused.path]
    assert broken.path.is_dir()
