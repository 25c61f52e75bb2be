"""One export: refuse or write, prove, describe."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from pipeline import export
from pipeline.errors import ConfigError
from pipeline.export import card
from pipeline.export.config import ExportConfig
from pipeline.export.lineage import LINEAGE
from pipeline.export.model_folder import ModelFolder


def check_package(config: ExportConfig) -> None:
    """Raise ConfigError where the package that an export needs is not installed."""
    if config.package and importlib.util.find_spec(config.package) is None:
        remedy = config.package if config.package == "torchao" else "'regrow[export]'"
        raise ConfigError(f"export {config.label}: needs {config.package}: pip install {remedy}")


def refuse(model: ModelFolder, config: ExportConfig) -> None:
    """Raise ConfigError where a package is missing, no whole LLaMA-like model is there, or no such form can hold it."""
    check_package(config)
    _ = model.shape, model.files
    if reason := export.load(config.format).refusal(model, config):
        raise ConfigError(f"export {config.label}: {reason}")


def write(
    model: ModelFolder, out: Path, config: ExportConfig, lineage: dict[str, Any], ids: list[int] | None = None
) -> dict[str, Any]:
    """Write `model` into the folder `out` in the form that `config` asks for, check it, and put the model card and the
    lineage (`regrow.json`) beside it. `ids`: the tokens compared; None: the fixed passage's. Returns what was written
    and what the check measured.

    Raises ConfigError where the format cannot hold the model, StageError where the check fails.
    """
    refuse(model, config)
    form = export.load(config.format)
    out.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = form.write(model, out, config)
    checked: dict[str, Any] = form.check(model, out, config, ids)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    report = {"format": config.label, "written": written, "check": checked, "bytes": size}
    (out / LINEAGE).write_text(json.dumps({**lineage, "export": report}, indent=1), encoding="utf-8")
    (out / "README.md").write_text(card.text(config, lineage, report), encoding="utf-8")
    return report
