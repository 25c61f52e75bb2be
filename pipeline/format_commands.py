"""`regrow export` and `regrow unpickle`: models into the forms of other tools, and out of a pickle."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline import command_options
from pipeline.errors import ConfigError


def add(main: click.Group, run_config: Callable[..., None]) -> None:
    """Add both commands. `run_config` runs a config up to a stage."""

    @main.command("export")
    @click.argument("config", required=False, type=click.Path(path_type=Path))
    @click.option(
        "--format",
        "formats",
        multiple=True,
        metavar="FORMAT",
        help="hf, hf:pad, gguf:TYPE, vllm, peft, quantized:SCHEME; may be given several times.",
    )
    @click.option(
        "--model",
        "folder",
        type=click.Path(path_type=Path),
        help="Export this model folder instead of a config's model.",
    )
    @click.option("--adapter", type=click.Path(path_type=Path), help="With --model: the adapter folder for peft.")
    @click.option("-o", "--output", type=click.Path(path_type=Path), help="With --model: where it goes.")
    @command_options.overrides
    @command_options.store
    @command_options.runs
    @click.option("--force", is_flag=True, help="Rebuild this stage.")
    @command_options.as_json
    def export(  # pyright: ignore[reportUnusedFunction]
        config: Path | None,
        formats: tuple[str, ...],
        folder: Path | None,
        adapter: Path | None,
        output: Path | None,
        force: bool,
        **options: Any,
    ) -> None:
        """Write a config's model, or any model folder, in forms that other tools load, and check each."""
        from pipeline import config_file
        from pipeline.export import command

        if (config is None) == (folder is None):
            raise ConfigError("give either a CONFIG or --model FOLDER")
        _refuse_without_effect(folder is not None)
        if folder:
            done = command.export_folder(folder, formats, output, adapter)
            click.echo(json.dumps(done, indent=1)) if options["as_json"] else command.say(done)
            return
        assert config is not None
        overrides = (*options.pop("overrides"), *command.as_overrides(formats))
        if not config_file.load(config, overrides).export:
            raise ConfigError(f"{config}: export: nothing is asked for; give --format, or a list in the config")
        run_config(config, last="export", force="export" if force else None, overrides=overrides, **options)

    @main.command("unpickle")
    @click.argument("file", type=click.Path(path_type=Path))
    @click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
    @click.option("--tokenizer", type=click.Path(path_type=Path), help="A folder whose tokenizer files are copied.")
    @click.option("--allow-pickle", is_flag=True, help="Read its tensors alone, in another process.")
    def unpickle(  # pyright: ignore[reportUnusedFunction]
        file: Path, output: Path, tokenizer: Path | None, allow_pickle: bool
    ) -> None:
        """Turn LLM-Pruner's pickled model into a model folder, which `path:FOLDER` then names as a source."""
        from pipeline.pickled import convert

        made = convert(file, output, tokenizer, allow_pickle)
        click.echo(f"{output}: {made['class']}, {made['parameters']:,} parameters")


def _refuse_without_effect(of_folder: bool) -> None:
    """Raise ConfigError for options of the running command that it would ignore: a folder's for a config, or a
    config's for a folder."""
    context = click.get_current_context()
    ignored = ("force", "overrides", "store", "runs") if of_folder else ("adapter", "output")
    for option in context.command.params:
        given = option.name and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        if given and option.name in ignored:
            kind, other = ("--model", "a CONFIG") if of_folder else ("a CONFIG", "--model FOLDER")
            raise ConfigError(f"{option.opts[-1]} has no effect with {kind}; leave it out, or give {other} instead")
