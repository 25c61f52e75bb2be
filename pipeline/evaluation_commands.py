"""`regrow evaluate MODEL` and `regrow compare A B`: scoring without a config, and paired tables of what was scored."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from evaluation import suites
from evaluation.items import ITEMS
from pipeline import command_options
from pipeline.errors import ConfigError, did_you_mean
from pipeline.store import MANIFEST, Store, read_manifest

DTYPES = ("float32", "bfloat16", "float16")
SAID_BY_A_CONFIG = {
    "--suite": "evaluation.suites",
    "--limit": "evaluation.limit",
    "--dtype": "model.dtype",
    "--bos/--no-bos": "evaluation.add_bos",
    "--device": "runtime.device",
}
Scores = dict[str, Path]  # where the items of each suite lie


def add(main: click.Group, run_config: Callable[..., None], show: Callable[..., None]) -> None:
    """Add both commands. `run_config` runs a config up to a stage, `show` prints a run's results."""

    @main.command("evaluate")
    @click.argument("model", metavar="MODEL|CONFIG")
    @click.option(
        "--suite", "named", multiple=True, metavar="NAME[=SOURCE]", help="A suite; its rows, if not the hub's."
    )
    @click.option("--limit", type=click.IntRange(1), help="Items of each suite.")
    @click.option("--dtype", type=click.Choice(DTYPES), help="[default: bfloat16]")
    @click.option("--bos/--no-bos", default=None, help="Begin with BOS or not. [default: the tokenizer's rule]")
    @click.option("--device", help="[default: auto]")
    @command_options.overrides
    @click.option("--force", is_flag=True, help="Score again what is cached.")
    @command_options.runs
    @command_options.store
    @command_options.as_json
    def evaluate(  # pyright: ignore[reportUnusedFunction]
        model: str, named: tuple[str, ...], limit: int | None, dtype: str | None, bos: bool | None,
        device: str | None, overrides: tuple[str, ...], force: bool, runs: Path, store: Path, as_json: bool,
    ) -> None:  # fmt: skip
        """Score a model folder or hub model on suites, or run a config up to its scores."""
        again = "evaluate" if force else None
        if is_config(model):
            given = zip(SAID_BY_A_CONFIG.items(), (named or None, limit, dtype, bos, device), strict=True)
            for (option, key), value in given:
                if value is not None:
                    remedy = f"it says {key} itself, which --set changes"
                    raise ConfigError(f"{option} goes with a model; {model} is a config: {remedy}")
            run_config(Path(model), overrides, store, runs, "evaluate", again, as_json)
            return
        from pipeline import config_file
        from pipeline.console import Reporter
        from pipeline.run import Run, execute

        raw = config_of(model, named, limit, dtype or "bfloat16", bos, device or "auto")
        raw = config_file.override(raw, overrides)
        checked = config_file.check(raw, f"evaluate {model}")
        run = Run(checked, raw, Store(store), runs / checked.name, Reporter())
        show(run, execute(run, "evaluate", again), as_json)

    models = click.argument("names", nargs=-1, required=True, metavar="MODEL...")
    dtype = click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
    device = click.option("--device", default="auto", show_default=True, callback=_device)

    @main.command("speed")
    @models
    @click.option("--prompt", type=click.IntRange(2), default=128, show_default=True, help="Tokens of the prompt.")
    @click.option("--new", type=click.IntRange(2), default=32, show_default=True, help="Tokens to generate.")
    @click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
    @click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
    @click.option("--threads", type=click.IntRange(1, 1024))  # as runtime.threads
    @dtype
    @device
    @command_options.store
    @command_options.as_json
    def speed(names: tuple[str, ...], store: Path, as_json: bool, **settings: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        """Measure models in turn: prefill and decode tokens/s, latency, memory, parameters, multiply-adds."""
        from pipeline import side_by_side

        found = _explained(lambda: side_by_side.run_speed(names, Store(store), reporter=_reporter(), **settings))
        _print(found, side_by_side.speed_rows(found), as_json)

    @main.command("sample")
    @models
    @click.option("--prompt", "prompts", multiple=True, help="What to go on from (several; default: six short ones).")
    @click.option("--new", type=click.IntRange(1), default=48, show_default=True, help="Tokens to generate.")
    @dtype
    @device
    @command_options.store
    @command_options.as_json
    def sample(names: tuple[str, ...], store: Path, as_json: bool, **settings: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        """Texts of models side by side, and how much they repeat themselves."""
        from pipeline import side_by_side

        found = _explained(
            lambda: side_by_side.run_samples(names, store=Store(store), reporter=_reporter(), **settings)
        )
        _print(found, side_by_side.sample_rows(found), as_json)
        for number, prompt in enumerate(found["prompts"] if not as_json else []):
            click.echo(f"\n> {prompt}")
            for name, measured in found["models"].items():
                cut = ": longer than its window, went on from the end alone" if measured["truncated"][number] else ""
                click.echo(f"[{name}{cut}] {measured['texts'][number].strip()}")

    @main.command("compare")
    @click.argument("first", metavar="A")
    @click.argument("second", metavar="B")
    @command_options.store
    @command_options.as_json
    def compare(first: str, second: str, store: Path, as_json: bool) -> None:  # pyright: ignore[reportUnusedFunction]
        """Compare B with A on the items both were scored on.

        A and B are runs (RUN or RUN:MODEL; without MODEL its last one), results.json files, or evaluate artifacts
        (folder or key).
        """
        from pipeline import comparison, report
        from pipeline.console import out

        (name, ours), (other, theirs) = sides(first, second, Store(store))
        try:
            rows = comparison.pairs(ours, theirs)
        except ValueError as error:
            raise ConfigError(f"compare: {error}") from error
        if not rows:
            raise ConfigError(
                f"compare: no suite is in both {first} ({', '.join(ours)}) and {second} ({', '.join(theirs)})"
            )
        if as_json:
            click.echo(json.dumps({"first": name, "second": other, "comparisons": rows}, indent=1, ensure_ascii=False))
            return
        console = out()
        console.print(report.table(comparison.table_rows(rows), f"first: {name}, second: {other}"))
        console.print(report.VERDICTS)


def _device(context: click.Context, option: click.Parameter, value: str) -> str:
    """The device, where a config may say it, too. Raises ConfigError."""
    from pydantic import ValidationError

    from pipeline.sections import RuntimeConfig

    try:
        return RuntimeConfig(device=value).device
    except ValidationError as error:
        raise ConfigError(f"--device {value}: {error.errors()[0]['msg']}") from error


def _reporter() -> Any:
    from pipeline.console import Reporter

    return Reporter()


def _explained(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _print(found: dict[str, Any], rows: list[list[str]], as_json: bool) -> None:
    from pipeline import report
    from pipeline.console import out

    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        out().print(report.table(rows))


def is_config(argument: str) -> bool:
    """Whether the argument of `evaluate` names a config and not a model."""
    return Path(argument).suffix in (".yaml", ".yml")


def config_of(
    model: str, named: tuple[str, ...], limit: int | None, dtype: str, bos: bool | None, device: str
) -> dict[str, Any]:
    """The config (as its file would say it) that scores one model on suites given as NAME or NAME=SOURCE.

    Raises ConfigError for a model that is neither a folder nor a hub name, and where no suite is given.
    """
    if not named:
        known = ", ".join(suites.names())
        raise ConfigError(f"evaluate {model}: nothing to score; give --suite NAME or NAME=path:FILE ({known})")
    source, name = source_of(model)
    listed: list[dict[str, str]] = []
    for entry in named:
        suite, equals, place = entry.partition("=")
        listed.append({"name": suite, "source": place} if equals else {"name": suite})
    return {
        "name": f"evaluate-{name}",
        "model": {"source": source, "dtype": dtype},
        "evaluation": {"suites": listed, "limit": limit, "add_bos": bos},
        "runtime": {"device": device},
    }


def sides(first: str, second: str, store: Store) -> tuple[tuple[str, Scores], tuple[str, Scores]]:
    """What `compare` was asked to compare: a name and the items of every suite, for each side."""
    return _side(first, store), _side(second, store)


def source_of(model: str) -> tuple[str, str]:
    """The source that a model named on the command line means, and a short name for it."""
    if re.match(r"(hub|path|pypi|synthetic):", model):
        source = model
    elif Path(model).exists():
        source = f"path:{model}"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model):
        source = f"hub:{model}"
    else:
        raise ConfigError(f"{model}: no such folder or config, and not a hub name (owner/name)")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.partition(":")[2]).strip("-.") or "model"
    return source, name[-60:].lstrip("-._")


def _side(argument: str, store: Store) -> tuple[str, Scores]:
    """RUN, RUN:MODEL, a results.json, an artifact's folder or its key."""
    place, colon, model = argument.rpartition(":")
    if not colon or Path(argument).exists():
        place, model = argument, ""
    path = Path(place)
    if path.is_dir() and (path / "results.json").is_file():
        path = path / "results.json"
    if path.is_file() and path.name != ITEMS:
        return _of_results(argument, path, model)
    if path.name == ITEMS:
        path = path.parent
    if not (path / MANIFEST).is_file():
        if path.exists() or not re.fullmatch(r"[0-9a-f]{4,64}", argument):
            what = "a run's folder (RUN or RUN:MODEL), its results.json, an evaluate artifact's folder or its key"
            raise ConfigError(f"compare {argument}: this is not {what}")
        path = store.by_key(argument).path
    material = read_manifest(path)["material"]
    if "suite" not in material or not (path / ITEMS).is_file():
        raise ConfigError(f"compare {argument}: {path} holds no scored suite (no {ITEMS})")
    return argument, {material["suite"]: path / ITEMS}


def _of_results(argument: str, path: Path, model: str) -> tuple[str, Scores]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        models, run = list(results["models"]), results["name"]
        scored = [entry for entry in results["stages"] if entry["stage"] == "evaluate"]
        places = [(entry["model"], entry["suite"], Path(entry["path"])) for entry in scored]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(f"compare {argument}: {path} is not a run's results.json") from error
    if model and model not in models:
        raise ConfigError(f"compare {argument}: no model {model!r}{did_you_mean(model, models)}; it has {models}")
    if not models:
        raise ConfigError(f"compare {argument}: nothing was scored in {path}")
    chosen = model or models[-1]
    folders = {suite: folder for owner, suite, folder in places if owner == chosen}
    if gone := next((folder for folder in folders.values() if not folder.is_dir()), None):
        remedy = "run its config again, or move the store back"
        raise ConfigError(f"compare {argument}: {gone}, which {path} names, is not there; {remedy}")
    found = {suite: folder / ITEMS for suite, folder in folders.items()}
    return f"{run}:{chosen}", {suite: place for suite, place in found.items() if place.is_file()}
