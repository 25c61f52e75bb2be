"""The adapter alone, in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

It belongs to the pruned base and to no other model: on the dense one widths do not fit, and after depth pruning it
would load silently onto the wrong layers. `recovery.peft_format` says which methods PEFT has a form for.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.export import check as checks
from pipeline.export.config import PeftConfig
from pipeline.export.model_folder import ModelFolder
from recovery import peft_format, peft_write, saved

VERSION = 2


def refusal(model: ModelFolder, config: PeftConfig) -> str | None:
    """Why PEFT has no form of this adapter, or None."""
    if model.adapter is None:
        return "there is no adapter to export: nothing was recovered, or none was named (--adapter)"
    try:
        return saved.read(model.adapter).refusal()
    except ValueError as error:
        return str(error)


def write(model: ModelFolder, out: Path, config: PeftConfig) -> dict[str, Any]:
    """Write the two files. Returns the method and how many modules it is on."""
    reference = _adapted(model)
    peft_write.write(reference, out, str(model.path))
    said = json.loads((out / peft_format.DESCRIPTION).read_text(encoding="utf-8"))
    assert model.adapter is not None
    return {"method": saved.read(model.adapter).method, "modules": len(said["target_modules"])}


def check(model: ModelFolder, out: Path, config: PeftConfig, ids: list[int] | None = None) -> dict[str, Any]:
    """PEFT on the pruned base with these files, against the base with regrow's own adapter."""
    reference = _adapted(model).eval()
    return checks.with_transformers(model, model.path, model.own, adapter=out, reference=reference, ids=ids)


def _adapted(model: ModelFolder) -> Any:
    """The base with the adapter attached by regrow."""
    from pruning import checkpoint

    assert model.adapter is not None
    reference = checkpoint.load(model.path)
    saved.attach(reference, saved.read(model.adapter))
    return reference
