"""Where results live: one folder per key, which appears whole or not at all.

<store>/<stage>/<key16>/               finished; manifest.json is written last
<store>/.work/<stage>-<key16>/out      what a builder writes; starts empty
<store>/.work/<stage>-<key16>/scratch  training checkpoints; outlives a failure
<store>/.locks/<stage>-<key16>         freed by the kernel when the process dies
<store>/.roots/<digest>.json           which run folder uses which artifacts (`pipeline.garbage`)
"""

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import ConfigError, StageError
from pipeline.keys import KEY_LENGTH, digest, file_digest

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A finished result: its stage, its key's first 16 digits, its folder and its manifest."""

    stage: str
    key: str
    path: Path
    manifest: dict[str, Any]


@dataclass
class Workspace:
    """What a builder is given: `out` becomes the artifact, `scratch` survives a failure. A builder that goes on from
    what it finds in `scratch` sets `resumed`."""

    out: Path
    scratch: Path
    resumed: bool = False


class Store:
    """Artifacts under one root folder, shared safely by several processes."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key[:KEY_LENGTH]

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact of this key, or None."""
        try:
            return _artifact(self.folder(stage, key))
        except FileNotFoundError:
            return None

    def build(
        self,
        stage: str,
        material: dict[str, Any],
        builder: Callable[[Workspace], dict[str, Any]],
        *,
        force: bool = False,
        waiting: Callable[[str], None] = lambda message: None,
    ) -> tuple[Artifact, str]:
        """The artifact whose key is the digest of `material`, and how it came: cached, built or resumed.

        `builder` fills `workspace.out` and returns what the manifest shall say besides. If it raises, nothing
        appears in the store; its scratch stays for the next try. A second process waits for the first one's result.
        """
        key = digest(material)
        if not force and (found := self.find(stage, key)):
            return found, "cached"
        name = f"{stage}-{key[:KEY_LENGTH]}"
        with self.lock(name, waiting):
            if not force and (found := self.find(stage, key)):
                return found, "cached"
            work = self.root / ".work" / name
            workspace = Workspace(work / "out", work / "scratch")
            forced = work / "forced"  # a build anew that was stopped goes on, as any other
            if force and not forced.exists():
                shutil.rmtree(workspace.scratch, ignore_errors=True)
                work.mkdir(parents=True, exist_ok=True)
                forced.touch()
            shutil.rmtree(workspace.out, ignore_errors=True)
            workspace.out.mkdir(parents=True)
            workspace.scratch.mkdir(parents=True, exist_ok=True)
            started = time.time()
            try:
                extra = builder(workspace)
            except BaseException:
                shutil.rmtree(workspace.out, ignore_errors=True)
                if not any(workspace.scratch.iterdir()):
                    shutil.rmtree(work, ignore_errors=True)
                raise
            manifest = {
                "stage": stage,
                "key": key,
                "material": material,
                "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                "seconds": round(time.time() - started, 3),
                **extra,
                "files": _file_list(workspace.out),
            }
            self._publish(workspace.out, self.folder(stage, key), manifest)
            shutil.rmtree(work, ignore_errors=True)
        status = "resumed" if workspace.resumed else "built"
        return Artifact(stage, key[:KEY_LENGTH], self.folder(stage, key), manifest), status

    def artifacts(self, stage: str) -> Iterator[Artifact]:
        """Every finished artifact of a stage, by key."""
        return map(_artifact, self.finished(stage))

    def finished(self, stage: str = "[!.]*") -> list[Path]:
        """The folders of all finished artifacts (of one stage), by stage and key; their manifests are not read."""
        return sorted(manifest.parent for manifest in self.root.glob(f"{stage}/*/{MANIFEST}"))

    def by_key(self, prefix: str) -> Artifact:
        """The one artifact whose key begins with `prefix` (at least 4 digits). Raises ConfigError otherwise."""
        found = [folder for folder in self.finished() if folder.name.startswith(prefix[:KEY_LENGTH])]
        if len(prefix) > KEY_LENGTH:  # folders' names say no more
            found = [folder for folder in found if read_manifest(folder)["key"].startswith(prefix)]
        if len(prefix) < 4 or len(found) != 1:
            reason = "is too short" if len(prefix) < 4 else f"fits {len(found)} artifacts"
            raise ConfigError(f"key {prefix!r} {reason} in {self.root}; `regrow plan CONFIG` shows the keys")
        return _artifact(found[0])

    def verify(self, folder: Path) -> list[str]:
        """What is wrong with an artifact's manifest or files: missing, changed, unlisted. Empty when all is well."""
        try:
            listed: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
        except StageError as error:
            return [str(error)]
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        problems = [f"{name}: missing" for name in sorted(listed.keys() - present)]
        problems += [f"{name}: not in the manifest" for name in sorted(present - listed.keys() - {MANIFEST})]
        problems += [
            f"{name}: changed since it was built"
            for name in sorted(listed.keys() & present)
            if file_digest(folder / name) != listed[name]["sha256"]
        ]
        return problems

    def explain(self, name: str, error: Exception) -> str:
        """What an exception says, and the file that its traceback was written to."""
        reason, log = str(error).strip() or type(error).__name__, self.root / ".logs" / f"{name}.txt"
        try:
            write_text(log, "".join(traceback.format_exception(error)))
        except OSError:  # a full disk, which may be what the exception is about
            return reason
        return f"{reason}\n(the traceback is in {log})"

    @contextmanager
    def lock(self, name: str, waiting: Callable[[str], None] | None) -> Generator[bool]:
        """Hold the lock `name`; yields False at once when it is taken and there is no `waiting` to tell."""
        path = self.root / ".locks" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remedy = "name another folder with --store"
            raise ConfigError(f"store {self.root}: cannot be written ({error.strerror}); {remedy}") from error
        lock, owner = FileLock(path), path.with_name(f"{name}.owner")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is None:
                yield False
                return
            who = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
            waiting(f"{name} is being built by {who}: waiting for its result")
            lock.acquire()
        try:
            write_text(owner, f"process {os.getpid()}")
            yield True
        finally:
            lock.release()

    def _publish(self, out: Path, folder: Path, manifest: dict[str, Any]) -> None:
        write_text(out / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
        _sync(out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            old = self.root / ".work" / f"replaced-{folder.parent.name}-{folder.name}-{os.getpid()}"
            folder.rename(old)
            shutil.rmtree(old)
        try:
            out.rename(folder)
        except OSError as error:
            raise StageError(f"{folder}: the finished result could not be moved here ({error.strerror})") from error


def _artifact(folder: Path) -> Artifact:
    return Artifact(folder.parent.name, folder.name, folder, read_manifest(folder))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact's folder. Raises StageError where it is not as it was written."""
    parts = {"stage", "key", "material", "built", "seconds", "files"}
    return read_record(folder / MANIFEST, parts, f"remove {folder}, and it is built again")


def read_record(path: Path, parts: set[str], remedy: str) -> dict[str, Any]:
    """A JSON mapping that has `parts`. Raises StageError, which ends with `remedy`, where it is none or lacks some."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageError(f"{path}: cannot be read ({error}); {remedy}") from error
    if missing := parts - said.keys() if isinstance(said, dict) else parts:
        raise StageError(f"{path}: has no {', '.join(sorted(missing))}; {remedy}")
    return said


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _file_list(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in files
    }


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
