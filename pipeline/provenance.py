"""What a manifest says beside its key: code and package versions, seconds, peak memory.

None of it is in a key. A difference warns (`drift`) and does not rebuild: integer VERSIONs decide that.
"""

import platform
import resource
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.keys import file_digest

PACKAGES = ("regrow", "torch", "transformers", "lm_eval", "datasets", "safetensors")


@cache
def versions() -> dict[str, str]:
    """Python's and the packages' versions, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def git_commit() -> str | None:
    """The checkout's commit with `+` when it has uncommitted changes; None outside a checkout."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def record(method: ModuleType | None) -> dict[str, Any]:
    """The manifest's `provenance`: versions, git commit, and the sha256 of the method's file."""
    file = method.__file__ if method else None
    digest = {"method_sha256": file_digest(Path(file))} if file else {}
    return {"versions": versions(), "git": git_commit(), **digest}


def drift(manifest: dict[str, Any], method: ModuleType | None) -> list[str]:
    """How the code that made an artifact differs from today's: packages by version, the method by its file."""
    old: dict[str, Any] = manifest.get("provenance", {})
    then: dict[str, str] = old.get("versions", {})
    changed = [f"{name} {then[name]} -> {now}" for name, now in versions().items() if then.get(name, now) != now]
    if (
        method
        and method.__file__
        and "method_sha256" in old
        and file_digest(Path(method.__file__)) != old["method_sha256"]
    ):
        changed.append(f"{Path(method.__file__).name} was edited and its VERSION was not raised")
    return changed


@contextmanager
def peak_memory() -> Generator[dict[str, int]]:
    """Measure a block: fills `peak_memory_bytes` (resident, whole process) and, with a GPU, `peak_gpu_bytes`."""
    measured: dict[str, int] = {}
    _reset_peak()
    torch: Any = sys.modules.get("torch")
    gpu = bool(torch and torch.cuda.is_available())
    if torch and gpu:
        torch.cuda.reset_peak_memory_stats()
    yield measured
    measured["peak_memory_bytes"] = _peak()
    if torch and gpu:
        measured["peak_gpu_bytes"] = int(torch.cuda.max_memory_allocated())


def _reset_peak() -> None:
    """Ask Linux to forget the process's peak; elsewhere the peak is the process's so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
