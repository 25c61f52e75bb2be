"""What a run is: one YAML file, checked whole before anything starts.

The sections of `pruning` and `recovery.adapter` are checked by the `Config` of the method they name, so a method's
options live in the method's own file. Every problem is reported at once, as `file: path.to.key: what is wrong`.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline.export.config import ExportOrName
from pipeline.sections import (
    CalibrationConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RowsConfig,
    RuntimeConfig,
    SourceText,
    SuiteConfig,
)
from pipeline.source_text import parse
from pruning import criteria
from pruning.config import HELD_OUT, PruningConfig
from recovery import peft_format
from recovery.config import RecoveryConfig


def _adapter_folder(value: str) -> str:
    if (kind := parse(value).kind) != "path":
        raise ValueError(f"an adapter is read from a folder here, path:FOLDER; fetch what {kind}: names first")
    return value


AdapterFolder = Annotated[SourceText, AfterValidator(_adapter_folder)]


class RunConfig(BaseModel):
    """One run. `calibration`, `data` and `teacher` stand inside `pruning`, `recovery` and `recovery.distillation` in
    the file. `teacher` is another model than the dense one that teaches.

    `recovery` trains an adapter, or `adapter` names one that was trained before (in the file
    `recovery: {adapter: {from: "path:FOLDER"}}`); never both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    checksums: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = {}
    model: ModelConfig
    pruning: PruningConfig | None = None
    calibration: CalibrationConfig | None = Field(default=None, alias="pruning.calibration")
    recovery: RecoveryConfig | None = None
    data: tuple[DataConfig, ...] = Field(default=(), alias="recovery.data")
    teacher: SourceText | None = Field(default=None, alias="recovery.distillation.teacher")
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
        distillation = self.recovery and self.recovery.distillation
        if distillation and distillation.hidden and self.pruning:
            gone = [kind for kind in ("hidden", "layers") if kind in self.pruning.structures]
            gone += ["layers"] if self.pruning.depth else []
            if gone:
                raise ValueError(
                    f"recovery.distillation.hidden: a model with {gone[0]} pruned has other hidden states than the "
                    "teacher; set it to 0"
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
        used += [("recovery.distillation.teacher", self.teacher)] if self.teacher else []
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
        parsed = [(place, parse(spec)) for place, spec in used]
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
    """The file's layout as RunConfig's: calibration, data, teacher and `adapter.from` lifted out, the run's seed handed
    down."""
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
    recovery: Any = flat.get("recovery")
    distillation: Any = recovery.get("distillation") if isinstance(recovery, dict) else None
    if isinstance(distillation, dict) and "teacher" in distillation:
        flat["recovery.distillation.teacher"] = distillation["teacher"]
        rest = {name: value for name, value in distillation.items() if name != "teacher"}
        flat["recovery"] = {**recovery, "distillation": rest}
    return flat
