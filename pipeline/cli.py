"""The `regrow` command: results to stdout, progress to stderr.

Exit codes: 0 done, 1 a stage failed, 2 usage or config, 130 interrupted.
"""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline import __version__, command_options, evaluation_commands, format_commands
from pipeline.errors import ConfigError, RegrowError

STAGES = ("statistics", "prune", "teacher", "recover", "merge", "evaluate", "export")
Command = Callable[..., Any]


class _Group(click.Group):
    """Turns our errors and the system's into a message and an exit code, and Ctrl-C into a promise that is kept."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RegrowError as error:
            click.echo(f"regrow: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has gone: click ends that quietly
                raise
            place = f"{error.filename}: " if error.filename else ""
            click.echo(f"regrow: {place}{error.strerror or error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("regrow: interrupted; the same command goes on where it stopped", err=True)
            ctx.exit(130)


def _options(command: Command) -> Command:
    for option in reversed(
        (
            click.argument("config", type=click.Path(path_type=Path)),
            command_options.overrides,
            command_options.store,
            command_options.runs,
        )
    ):
        command = option(command)
    return command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="regrow")
def main() -> None:
    """Prune a LLaMA-family model, win the lost accuracy back, and score every step. Every stage is cached."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars, where they do not insist; ours are enough
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _run(
    config: Path,
    overrides: tuple[str, ...],
    store: Path,
    runs: Path,
    last: str | None,
    force: str | None,
    as_json: bool,
) -> None:
    from pipeline.run import execute

    run = _open(config, overrides, store, runs)
    show(run, execute(run, last, force), as_json)


def show(run: Any, results: dict[str, Any] | None, as_json: bool) -> None:
    """A run's results on stdout."""
    from pipeline import report
    from pipeline.console import out
    from pipeline.results import as_text, protocols

    if results is None:  # a helper of a run by several processes
        return
    if as_json:
        click.echo(as_text(results))
        return
    console = out()
    if scores := report.score_rows(results):
        console.print(report.table(scores, results["name"]))
        console.print(report.legend(results))
    for protocol in protocols(results["models"])[1:]:
        console.print(report.table(report.protocol_rows(results, protocol), report.PROTOCOLS[protocol]))
    console.print(report.table(report.stage_rows(results)))
    console.print(f"{run.folder}: report.md, results.json, artifacts/")


def _open(config: Path, overrides: tuple[str, ...], store: Path, runs: Path) -> Any:
    from pipeline import config_file, processes
    from pipeline.console import Reporter
    from pipeline.run import Run
    from pipeline.store import Store

    raw = config_file.read(config, overrides)
    checked = config_file.check(raw, str(config))
    return Run(checked, raw, Store(store), runs / checked.name, Reporter(quiet=not processes.first()))


@main.command("run")
@_options
@click.option("--until", "last", type=click.Choice(STAGES), help="Stop after this stage.")
@click.option("--force", type=click.Choice(STAGES), help="Rebuild this stage and what rests on it.")
@command_options.as_json
def run_command(last: str | None, force: str | None, **options: Any) -> None:
    """Run a config: build what is missing, show the table."""
    _run(last=last, force=force, **options)


def _stage_command(stage: str, help_text: str) -> None:
    @main.command(stage, help=help_text)
    @_options
    @click.option("--force", is_flag=True, help="Rebuild this stage.")
    @command_options.as_json
    def command(force: bool, **options: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        _run(last=stage, force=stage if force else None, **options)


_stage_command("prune", "Run a config up to the pruned model.")
_stage_command("recover", "Run a config up to the trained adapter.")
_stage_command("merge", "Run a config up to the merged model.")
evaluation_commands.add(main, _run, show)
format_commands.add(main, _run)


@main.command("plan")
@_options
@command_options.as_json
def plan_command(config: Path, overrides: tuple[str, ...], store: Path, runs: Path, as_json: bool) -> None:
    """Show what a run would build and what is cached, and why."""
    from pipeline.console import out
    from pipeline.export import foreseen
    from pipeline.plan import memory_of_pruning, plan
    from pipeline.report import table
    from pipeline.steps import steps_of

    run = _open(config, overrides, store, runs)
    sources = run.sources()
    planned = plan(steps_of(run.config, sources), run.store, run.folder)
    memory = memory_of_pruning(run.config, sources)
    loads = foreseen.targets(run.config, sources)
    if as_json:
        steps = [item.as_json() for item in planned]
        click.echo(
            json.dumps(
                {"name": run.config.name, "steps": steps, "pruning_memory_bytes": memory, "loads": loads}, indent=1
            )
        )
        return
    rows = [["step", "key", "status", "why"]]
    rows += [[item.step.label, item.step.key, item.status, item.why] for item in planned]
    out().print(table(rows, run.config.name))
    for tool, how in loads.items():
        out().print(f"{tool}: {how}")
    if memory:
        out().print(f"pruning is predicted to take {memory / 1e9:.1f} GB of memory")


@main.command("report")
@click.argument("configs", nargs=-1, required=True, type=click.Path(path_type=Path))
@command_options.overrides
@command_options.store
@click.option("--format", "form", type=click.Choice(["md", "json"]), default="md", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write here instead of stdout.")
def report_command(
    configs: tuple[Path, ...], overrides: tuple[str, ...], store: Path, form: str, output: Path | None
) -> None:
    """Report finished runs from the store, without building anything."""
    from pipeline import report
    from pipeline.results import collect
    from pipeline.steps import steps_of

    found: list[dict[str, Any]] = []
    for config in configs:
        run = _open(config, overrides, store, Path("runs"))
        found.append(collect(run.config, steps_of(run.config, run.sources()), run.store, {}))
    if form == "json":
        text = json.dumps(found if len(found) > 1 else found[0], indent=1, ensure_ascii=False) + "\n"
    else:
        text = "\n".join(report.markdown(results) for results in found)
    if output:
        output.write_text(text, encoding="utf-8")
    else:
        click.echo(text, nl=False)


@main.command("methods")
@command_options.as_json
def methods_command(as_json: bool) -> None:
    """List criteria, adapters and suites with one line each."""
    from evaluation import suites
    from pruning import criteria
    from recovery import adapters

    found = {
        kind: {name: (registry.load(name).__doc__ or "").strip().splitlines()[0] for name in registry.names()}
        for kind, registry in (("criteria", criteria), ("adapters", adapters))
    }
    found["suites"] = {
        name: f"{suites.load(name).metric}, protocol {suites.load(name).protocol}" for name in suites.names()
    }
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for kind, methods in found.items():
        click.echo(f"{kind}:")
        width = max(map(len, methods))
        for name, line in methods.items():
            click.echo(f"  {name:{width}}  {line}")


@main.command("show")
@click.argument("key")
@command_options.store
def show_command(key: str, store: Path) -> None:
    """Print an artifact's manifest: what made it, from what, and its files."""
    from pipeline.store import Store

    artifact = Store(store).by_key(key)
    click.echo(json.dumps({"path": str(artifact.path), **artifact.manifest}, indent=1, ensure_ascii=False))


def _there(store: Path) -> Path:
    """The store's folder. Raises ConfigError where there is none: a name misspelt would look like one that is empty."""
    if not store.is_dir():
        raise ConfigError(f"store {store}: no such folder; name the store's with --store")
    return store


@main.command("verify")
@click.argument("key", required=False)
@command_options.store
def verify_command(key: str | None, store: Path) -> None:
    """Check the files of one artifact, or of all, against their manifests."""
    from pipeline.store import Store

    shelf = Store(_there(store))
    folders = [shelf.by_key(key).path] if key else shelf.finished()
    bad = 0
    for folder in folders:
        problems = shelf.verify(folder)
        bad += bool(problems)
        for problem in problems:
            click.echo(f"{folder.parent.name}/{folder.name}: {problem}")
    click.echo(f"{len(folders)} artifacts, {bad} damaged")
    sys.exit(1 if bad else 0)


@main.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--vanished", is_flag=True, help="Also what only runs used whose folder is not there any more.")
@command_options.store
def gc_command(dry_run: bool, vanished: bool, store: Path) -> None:
    """Remove what no run uses any more, and what dead processes left behind."""
    from pipeline import garbage
    from pipeline.store import Store

    shelf = Store(_there(store))
    for folder in [] if vanished else garbage.vanished_runs(shelf):
        click.echo(f"{folder} is not there (deleted, or moved?): what that run used is kept; --vanished removes it")
    removed = garbage.collect(shelf, dry_run, vanished)
    for folder, size in removed:
        click.echo(f"{'would remove' if dry_run else 'removed'} {folder} ({size / 1e6:.1f} MB)")
    click.echo(f"{len(removed)} folders, {sum(size for _, size in removed) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
