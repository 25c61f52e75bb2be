import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, StageError
from pipeline.keys import digest
from pipeline.store import Store, Workspace

MATERIAL = {"stage": "prune", "ratio": 0.2}


def write(workspace: Workspace) -> dict[str, Any]:
    (workspace.out / "model").mkdir()
    (workspace.out / "model" / "weights.bin").write_bytes(b"abc")
    return {"said": 1}


def test_a_result_is_built_once_and_its_manifest_lists_the_files(tmp_path: Path):
    store = Store(tmp_path)
    artifact, status = store.build("prune", MATERIAL, write)
    assert (status, artifact.key) == ("built", digest(MATERIAL)[:16])
    assert artifact.path == tmp_path / "prune" / artifact.key
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest["material"] == MATERIAL
    assert manifest["said"] == 1
    # sha256 of b"abc", from FIPS 180-2
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["files"] == {"model/weights.bin": {"bytes": 3, "sha256": known}}

    def fail(workspace: Workspace) -> dict[str, Any]:
        raise AssertionError("built twice")

    assert store.build("prune", MATERIAL, fail) == (artifact, "cached")


def test_a_failed_build_leaves_only_its_scratch_and_the_next_one_resumes(tmp_path: Path):
    store = Store(tmp_path)

    def half(workspace: Workspace) -> dict[str, Any]:
        (workspace.out / "part").write_text("x")
        (workspace.scratch / "checkpoint").write_text("step 3")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        store.build("recover", MATERIAL, half)
    assert store.find("recover", digest(MATERIAL)) is None
    assert not (tmp_path / "recover").exists()

    def rest(workspace: Workspace) -> dict[str, Any]:
        assert list(workspace.out.iterdir()) == []
        assert (workspace.scratch / "checkpoint").read_text() == "step 3"
        workspace.resumed = True
        return {}

    assert store.build("recover", MATERIAL, rest)[1] == "resumed"
    assert list((tmp_path / ".work").iterdir()) == []


def test_a_failure_without_scratch_leaves_nothing(tmp_path: Path):
    def fail(workspace: Workspace) -> dict[str, Any]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Store(tmp_path).build("prune", MATERIAL, fail)
    assert list((tmp_path / ".work").iterdir()) == []


def test_force_replaces_the_result(tmp_path: Path):
    store = Store(tmp_path)
    store.build("prune", MATERIAL, write)

    def other(workspace: Workspace) -> dict[str, Any]:
        (workspace.out / "new").write_text("n")
        return {}

    artifact, status = store.build("prune", MATERIAL, other, force=True)
    assert status == "built"
    assert sorted(path.name for path in artifact.path.iterdir()) == ["manifest.json", "new"]


def test_a_forced_build_begins_anew_once(tmp_path: Path):
    """What an ordinary build left behind is dropped; what a forced one left is gone on from."""
    store, found = Store(tmp_path), list[list[str]]()

    def stop(workspace: Workspace) -> dict[str, Any]:
        found.append(sorted(path.name for path in workspace.scratch.iterdir()))
        workspace.resumed = bool(found[-1])
        (workspace.scratch / f"part {len(found)}").write_text("")
        if len(found) < 4:
            raise KeyboardInterrupt
        return {}

    for force in (False, True, True):
        with pytest.raises(KeyboardInterrupt):
            store.build("prune", MATERIAL, stop, force=force)
    _, status = store.build("prune", MATERIAL, stop, force=True)
    assert status == "resumed"
    assert found == [[], [], ["part 2"], ["part 2", "part 3"]]


def test_a_second_builder_waits_for_the_first(tmp_path: Path):
    store, started, waited = Store(tmp_path), threading.Event(), []

    def slow(workspace: Workspace) -> dict[str, Any]:
        started.set()
        time.sleep(0.3)
        return {}

    first = threading.Thread(target=lambda: store.build("prune", MATERIAL, slow))
    first.start()
    started.wait()
    _, status = Store(tmp_path).build("prune", MATERIAL, slow, waiting=waited.append)
    first.join()
    assert status == "cached"
    assert "is being built by process" in waited[0]


def test_verify_finds_changed_missing_and_foreign_files(tmp_path: Path):
    store = Store(tmp_path)
    artifact, _ = store.build("prune", MATERIAL, write)
    assert store.verify(artifact.path) == []
    (artifact.path / "model" / "weights.bin").write_bytes(b"abd")
    (artifact.path / "extra").write_text("x")
    found = ["extra: not in the manifest", "model/weights.bin: changed since it was built"]
    assert store.verify(artifact.path) == found
    (artifact.path / "model" / "weights.bin").unlink()
    assert "model/weights.bin: missing" in store.verify(artifact.path)


def test_a_broken_manifest_is_one_problem_and_stops_nothing_else(tmp_path: Path):
    store = Store(tmp_path)
    kept, _ = store.build("prune", MATERIAL, write)
    broken, _ = store.build("prune", {**MATERIAL, "ratio": 0.5}, write)
    (broken.path / "manifest.json").write_text("{")
    assert [len(store.verify(folder)) for folder in (kept.path, broken.path)] == [0, 1]
    assert "manifest.json: cannot be read" in store.verify(broken.path)[0]
    assert store.by_key(kept.key).path == kept.path


@pytest.mark.parametrize(("said", "message"), [("", "Expecting value"), ("[]", "has no built, files, key"), ("{}", "")])
def test_a_manifest_that_was_changed_is_named_with_what_to_do(tmp_path: Path, said: str, message: str):
    store = Store(tmp_path)
    artifact, _ = store.build("prune", MATERIAL, write)
    (artifact.path / "manifest.json").write_text(said)
    for reads in (lambda: store.find("prune", artifact.key), lambda: store.by_key(artifact.key)):
        with pytest.raises(StageError, match=rf"manifest\.json: .*{message}.*; remove .*, and it is built again"):
            reads()


def test_by_key_wants_one_artifact(tmp_path: Path):
    store = Store(tmp_path)
    artifact, _ = store.build("prune", MATERIAL, write)
    key = digest(MATERIAL)
    for length in (6, 16, 20, 64):
        assert store.by_key(key[:length]).path == artifact.path
    with pytest.raises(ConfigError, match="fits 0 artifacts"):
        store.by_key(key[:16] + ("f" if key[16] != "f" else "0"))
    with pytest.raises(ConfigError, match="fits 0 artifacts"):
        store.by_key("ffffffff" if artifact.key[0] != "f" else "00000000")
    with pytest.raises(ConfigError, match="too short"):
        store.by_key(artifact.key[:2])
