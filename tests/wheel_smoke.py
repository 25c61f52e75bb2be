"""Build the wheel, install it into a bare environment, and use it from another folder.

The environment borrows this one's dependencies through a path file (nested path files are not read, so an editable
install of regrow cannot stand in for the wheel). Run by `make test`, after pytest.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """The command's output; its own message and a failure when it exits with anything but 0."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
        wheel = next(folder.glob("regrow-*.whl"))
        venv.create(folder / "env", with_pip=False)
        python = folder / "env" / "bin" / "python"
        run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=folder)
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

        where = run(python, "-c", "import pipeline; print(pipeline.__file__)", cwd=folder).strip()
        if not Path(where).is_relative_to(site):
            sys.exit(f"the smoke test imported {where}, not the wheel's files")
        regrow = folder / "env" / "bin" / "regrow"
        for words, expected in (
            (["--help"], "Usage: regrow"),
            (["methods"], "llm_pruner"),
            (["plan", "tiny.yaml"], "evaluate recovered"),
        ):
            if expected not in run(regrow, *words, cwd=folder):
                sys.exit(f"regrow {' '.join(words)}: its output does not say {expected!r}")
    print("wheel: built, installed, used from another folder")


if __name__ == "__main__":
    main()
