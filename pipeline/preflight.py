"""Everything that can be found wrong before work begins: sources, the model's kind, rows, leaks.

A failure here costs seconds and leaves nothing behind; the same failure an hour into a run would cost the hour.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from evaluation import suites
from pipeline import processes, rows
from pipeline.config import RunConfig
from pipeline.errors import ConfigError, SourceError
from pipeline.plan import shape_of
from pipeline.sections import PerplexityConfig, RowsConfig, SuiteConfig
from pipeline.sources import Sources, described
from pipeline.steps import Step
from pruning.config import SERVED
from recovery import adapters, saved, targets
from recovery.data import Example
from recovery.feed import split

CHARACTERS = 32  # of a token, more than any text has on average: what is longer need not be counted


def check(config: RunConfig, missing: list[Step], sources: Sources) -> None:
    """Fetch and read every input of the missing steps. Raises ConfigError or SourceError."""
    check_model(config, sources)
    scored = [step.scored for step in missing if step.scored]
    stages = {step.stage for step in missing}
    if stages & {"statistics", "prune"}:
        if config.calibration:
            rows.texts(sources, config.calibration)
            _check_positions("pruning.calibration.length", config.calibration.length, config.model.source, sources)
        check_pruning(config, sources)
    if "recover" in stages:
        check_base(config)
        check_length(config, sources)
        check_targets(config, sources)
    if scored or stages & {"teacher", "recover"}:
        check_tokenizer(config.model.source, sources)
    elif stages & {"statistics", "prune", "merge"}:
        _tokenizer(config.model.source, sources)
    if config.recovery and stages & {"teacher", "recover", "merge"}:
        check_teacher(config, sources)
        check_data(config, sources)
    if stages & {"merge", "export"} and config.adapter:
        check_adapter(config, config.adapter, sources)
    for part in dict.fromkeys(scored):
        if isinstance(part, PerplexityConfig):
            check_text(config, part, sources)
        elif local := part.rows():
            check_asked(part, rows.read_rows(sources, local))
    if "export" in stages:
        from pipeline.export import foreseen

        foreseen.refuse(config, sources)
    check_leaks(config, sources)


def check_model(config: RunConfig, sources: Sources) -> None:
    """Refuse weights that are not safetensors, and to change a model that is not LLaMA-like by its config.json."""
    changed = bool(config.pruning or config.recovery or config.adapter)
    _check_kind("model.source", config.model.source, sources, changed)


def check_tokenizer(spec: str, sources: Sources) -> None:
    """Refuse a tokenizer that ends every text: a prompt would be over before its answer, in training and in scoring."""
    tokenizer = _tokenizer(spec, sources)
    if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        remedy = "set add_eos_token to false in its tokenizer_config.json, or take that token from its post-processor"
        raise ConfigError(f"model.source: the tokenizer of {spec} ends every text by {tokenizer.eos_token}; {remedy}")


def check_teacher(config: RunConfig, sources: Sources) -> None:
    """Refuse a teacher of its own that cannot be read as the model can, or that splits text into other tokens."""
    if (theirs := config.teacher) is None:
        return
    assert config.recovery is not None
    assert config.recovery.distillation is not None
    ours = config.model.source
    place = "recovery.distillation.teacher"
    said = _check_kind(place, theirs, sources, served=True)
    from recovery import distill  # torch comes in here, as something has to be built

    try:
        distill.check(_described(ours, sources), said, config.recovery.distillation)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    words = [_tokenizer(spec, sources).get_vocab() for spec in (ours, theirs)]
    if words[0] != words[1]:
        raise ConfigError(f"{place}: {theirs} has another tokenizer than {ours}; name a model that has the same")


def check_adapter(config: RunConfig, spec: str, sources: Sources) -> None:
    """Refuse an adapter whose files do not hold what is served, or that PEFT has no form for where that is asked."""
    adapter = sources.adapter(spec)
    try:
        saved.check(adapter)
    except ValueError as error:
        raise SourceError(f"recovery.adapter.from: {error}") from error
    reason = adapter.refusal() if any(wanted.format == "peft" for wanted in config.export) else None
    if reason:
        raise ConfigError(f"export: {reason}")


def check_pruning(config: RunConfig, sources: Sources) -> None:
    """Refuse a ratio, shape or compensation that the model's config alone shows to be impossible, and GPUs that are not
    there."""
    import torch  # here, as something has to be built

    from pruning.prune import foresee

    assert config.pruning is not None
    if config.runtime.placement == "spread" and not torch.cuda.is_available():
        remedy = "set it to whole or offload"
        raise ConfigError(f"runtime.placement: spread: torch {torch.__version__} sees no GPU here; {remedy}")
    said = _described(config.model.source, sources)
    try:
        foresee(said, config.pruning)
    except ValueError as error:
        raise ConfigError(f"pruning.{error}") from error


def check_data(config: RunConfig, sources: Sources) -> None:
    """Refuse training rows of which nothing is left, or nothing can be held out where that would end the run."""
    assert config.recovery is not None
    found: list[tuple[float, list[Example]]] = []
    for index, part in enumerate(config.data):
        examples = rows.examples(sources, part, config.recovery.max_length)
        if not any(example.response for example in examples):
            raise SourceError(f"recovery.data.{index}: {part.source}: no rows are left to train on")
        found.append((part.weight, examples))
    try:
        split(found, config.recovery)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_length(config: RunConfig, sources: Sources) -> None:
    """Refuse rows longer than model or teacher have positions, and steps of fewer rows than there are processes."""
    assert config.recovery is not None
    asked = config.recovery.max_length
    for spec in filter(None, (config.model.source, config.teacher)):
        _check_positions("recovery.max_length", asked, spec, sources)
    step, helping = config.recovery.batch_tokens, processes.count()
    if helping > step // asked:
        raise ConfigError(
            f"recovery.batch_tokens: a step of {step} tokens holds {step // asked} of the rows of max_length {asked}, "
            f"too few for {helping} processes: set it to {helping * asked} or more"
        )


def check_targets(config: RunConfig, sources: Sources) -> None:
    """Refuse an adapter's targets or patterns that fit no layer of the dense model."""
    assert config.recovery is not None
    said = _described(config.model.source, sources)
    try:
        targets.chosen(targets.expected(said["num_hidden_layers"]), config.recovery.adapter)
    except ValueError as error:
        raise ConfigError(f"recovery.adapter.{error}") from error


def check_base(config: RunConfig) -> None:
    """Refuse a quantized base that cannot be had here, and sharded weights where the method needs them whole."""
    from recovery import parallel  # torch comes in here, as something has to be built

    assert config.recovery is not None
    name = config.recovery.adapter.method
    if reason := parallel.refusal(name, adapters.load(name).Method.whole_weights):
        raise ConfigError(f"recovery.adapter.method: {reason}")
    if config.recovery.quantized_base:
        from recovery.quantized import refusal

        if reason := refusal():
            raise ConfigError(f"recovery.quantized_base: {config.recovery.quantized_base} {reason}")


def check_asked(part: SuiteConfig, found: list[dict[str, Any]]) -> None:
    """Refuse rows to score of which lm-eval's task makes nothing."""
    from evaluation.harness import checked_task  # lm-eval comes in here, as something has to be scored

    try:
        checked_task(suites.load(part.name), found)
    except ValueError as error:
        raise SourceError(f"evaluation.suites: {part.source}: {error}") from error


def check_text(config: RunConfig, part: PerplexityConfig, sources: Sources) -> None:
    """Refuse text that makes no window, or windows that are longer than the model has positions."""
    place = f"evaluation.perplexity: {part.name}"
    _check_positions(f"{place}: window", part.window, config.model.source, sources)
    if not (found := rows.texts(sources, part)):
        raise SourceError(f"{place}: {part.source}: no text to score")
    if sum(map(len, found)) < part.window * CHARACTERS:
        tokenizer = _tokenizer(config.model.source, sources)
        if (count := len(tokenizer("\n\n".join(found), verbose=False)["input_ids"])) < part.window:
            raise SourceError(f"{place}: {part.source}: {count} tokens make no window of {part.window}; lower `window`")


def check_leaks(config: RunConfig, sources: Sources) -> None:
    """Refuse to train or calibrate on what is scored: the same question or passage in local rows of one suite."""
    marks: dict[str, set[str]] = defaultdict(set)
    for part in (*config.evaluation.suites, *config.evaluation.perplexity):
        local = part.rows() if isinstance(part, SuiteConfig) else part
        if local and local.suite:
            marks[local.suite].update(_marks(sources, local))
    named: list[tuple[str, RowsConfig]] = [(f"recovery.data.{n}", part) for n, part in enumerate(config.data)]
    if config.calibration:
        named.append(("pruning.calibration", config.calibration))
    for place, part in named:
        if part.suite and (both := marks[part.suite] & _marks(sources, part)):
            remedy = "set `half` on both sides, or `exclude` the scored file"
            raise ConfigError(f"{place}: {len(both)} questions or texts of {part.suite} are also scored; {remedy}")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has files of a tokenizer."""
    return any(file for pattern in ("tokenizer*", "vocab*") for file in folder.glob(pattern))


def _tokenizer(spec: str, sources: Sources) -> Any:
    from pruning.checkpoint import load_tokenizer  # torch comes in here, as something has to be built

    folder = sources.model_folder(spec)
    try:
        return load_tokenizer(folder)
    except Exception as error:  # transformers and tokenizers have many for files that are not there or not theirs
        if not has_tokenizer(folder):
            raise ConfigError(f"{spec}: {folder} has no tokenizer; copy its files into it") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{spec} has no tokenizer that can be read: {reason}") from error


def _check_positions(place: str, asked: int, spec: str, sources: Sources) -> None:
    longest = _described(spec, sources).get("max_position_embeddings")
    if longest and asked > longest:
        raise ConfigError(f"{place}: {asked} is more than the {longest} positions of {spec}")


def _described(spec: str, sources: Sources) -> dict[str, Any]:
    """A model's config.json."""
    return described(sources.model_folder(spec) / "config.json", spec)


def _check_kind(place: str, spec: str, sources: Sources, served: bool) -> dict[str, Any]:
    """The config.json of a model of safetensors, and where `served` is asked, of a kind that is trained or taught."""
    folder = sources.model_folder(spec)
    said = described(folder / "config.json", spec)
    names: list[str] = said.get("architectures") or []
    if served and not set(names) & set(SERVED):
        found = ", ".join(names) or said.get("model_type") or "an unnamed architecture"
        raise ConfigError(f"{place}: {spec} is {found}; regrow serves {', '.join(SERVED)}")
    if served:
        shape_of(said, f"{place}: {spec}")
    if not any(folder.glob("*.safetensors")):
        remedy = "regrow unpickles nothing: save it as safetensors, or name a revision that is one (@revision)"
        raise ConfigError(f"{place}: {spec} has no .safetensors weights; {remedy}")
    return said


def _marks(sources: Sources, part: RowsConfig) -> set[str]:
    suite = suites.load(part.suite or "")
    return {mark for row in rows.read_rows(sources, part) for mark in rows.identities(suite, row)}
