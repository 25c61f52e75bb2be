"""Who may import whom, and what a method module may cost to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pruning", "recovery", "evaluation")


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_know_neither_the_pipeline_nor_each_other(package: str):
    strangers = {"pipeline", *PACKAGES} - {package}
    for path in (ROOT / package).rglob("*.py"):
        assert not imported(path) & strangers, path


def test_methods_configs_and_suites_import_no_torch():
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from evaluation import suites\nfrom pruning import criteria\nfrom recovery import adapters\n"
        "import pipeline.config_file, pipeline.steps, pipeline.plan, pipeline.run, pipeline.synthetic\n"
        "[registry.load(name) for registry in (criteria, adapters, suites) for name in registry.names()]\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
