"""`regrow export`: a config's exports as cached stages, or any model folder's, written where the user says."""

import json
import shutil
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ConfigError, StageError
from pipeline.export.config import ExportConfig, ExportOrName


def asked(formats: tuple[str, ...]) -> list[ExportConfig]:
    """The exports that `--format` names. Raises ConfigError for a name that is none or stands twice."""
    found: list[ExportConfig] = []
    for name in formats:
        try:
            found.append(TypeAdapter(ExportOrName).validate_python(name))
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"--format {name}: {message}") from error
    labels = [config.label for config in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"--format: asked for twice: {', '.join(twice)}")
    return found


def export_folder(folder: Path, formats: tuple[str, ...], out: Path | None, adapter: Path | None) -> dict[str, Any]:
    """Export a model folder. Each export appears whole, or not at all. Returns path and report by format. Raises
    ConfigError for what is wrong beforehand, StageError for what shows as it is written and checked.

    `out` is the folder of one export, or the parent of several; by default the exports lie in the current folder.
    """
    from pipeline.export.lineage import of_folder
    from pipeline.export.model_folder import ModelFolder
    from pipeline.export.write import refuse, write

    wanted = asked(formats)
    if not wanted:
        raise ConfigError("--format: name at least one, as in --format gguf:q8_0")
    if adapter and not any(config.format == "peft" for config in wanted):
        raise ConfigError("--adapter: only --format peft writes an adapter; add it, or export the merged folder")
    model = ModelFolder(folder, adapter)
    targets: list[tuple[ExportConfig, Path]] = []
    for config in wanted:
        target = Path(f"{folder.resolve().name}-{config.label}") if out is None else out
        target = target / config.label if out is not None and len(wanted) > 1 else target
        if target.exists():
            raise ConfigError(f"{target}: is there already; name another place with -o")
        refuse(model, config)
        targets.append((config, target))
    done: dict[str, Any] = {}
    for config, target in targets:
        work = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(work, ignore_errors=True)
        try:
            report = write(model, work, config, of_folder(folder))
            work.rename(target)
        except ValueError as error:  # weights or an adapter that do not fit, in one line
            raise StageError(f"export {config.label}: {error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        done[config.label] = {"path": str(target), **report}
    return done


def as_overrides(formats: tuple[str, ...]) -> tuple[str, ...]:
    """The `--set` that puts these formats into a config; none where none are named."""
    asked(formats)
    return (f"export={json.dumps(list(formats))}",) if formats else ()


def say(done: dict[str, Any]) -> None:
    """One line for each export: where it is, how large, and what the check found."""
    for label, entry in done.items():
        check = entry["check"]
        worst = next((f"{key.replace('_', ' ')} {check[key]:.3g}" for key in check if key.startswith("largest")), "")
        agreed = f"most likely token equal at {check['argmax_agreement']:.1%} of {check['tokens']} positions"
        click.echo(f"{label}: {entry['path']} ({entry['bytes'] / 1e6:.1f} MB); {check['tool']}: {worst}, {agreed}")
