"""Which tools the pruned model will load in, told from its planned shapes before any work."""

from pathlib import Path
from typing import Any

from pipeline import export
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.export.config import ExportConfig, GgufConfig, HfConfig, VllmConfig
from pipeline.export.model_folder import ModelFolder
from pipeline.export.write import check_package
from pipeline.sources import Sources


def planned(config: RunConfig, folder: Path, said: dict[str, Any]) -> ModelFolder:
    """The pruned model as it will be: planned widths, the source's tokenizer. Raises ValueError as `foresee` does."""
    from pruning.prune import foresee

    return ModelFolder.planned(folder, foresee(said, config.pruning) if config.pruning else said)


def targets(config: RunConfig, sources: Sources) -> dict[str, str]:
    """For transformers, llama.cpp and vLLM: how they will load the result, or why not. Empty while the model is not
    here, and without pruning."""
    said = sources.model_config(config.model.source) if config.pruning else None
    if said is None:
        return {}
    try:
        model = planned(config, Path(), said)  # no folder: a plan fetches nothing
    except ValueError as error:
        return {"pruning": f"impossible: {error}"}
    gguf = export.load("gguf")
    llama, served = gguf.shape_refusal(model), _reason(model, VllmConfig(format="vllm"))
    kinds = "stock" if model.uniform else "block_configs (format vllm; no vLLM ran)"
    return {
        "transformers": "with trust_remote_code, or padded (hf:pad)" if model.own else f"stock {model.name}",
        "llama.cpp": llama or f"as {gguf.architecture(model)}",
        "vLLM": served or kinds,
    }


def refuse(config: RunConfig, sources: Sources) -> None:
    """Raise ConfigError for an export that a missing package or the planned shapes already rule out."""
    for wanted in config.export:
        check_package(wanted)
    folder = sources.model_folder(config.model.source)
    said = sources.model_config(config.model.source)
    if said is None:
        return
    try:
        model = planned(config, folder, said)
    except ValueError:
        return  # pruning's own check says it
    for index, wanted in enumerate(config.export):
        if not isinstance(wanted, HfConfig | GgufConfig | VllmConfig):
            continue
        if reason := _reason(model, wanted):
            raise ConfigError(f"export.{index}: {wanted.label}: {reason}")


def _reason(model: ModelFolder, wanted: ExportConfig) -> str | None:
    return export.load(wanted.format).refusal(model, wanted)
