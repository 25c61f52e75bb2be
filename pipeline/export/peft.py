"""The adapter alone, in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

It belongs to the pruned base and to no other model: on the dense one widths do not fit, and after depth pruning it
would load silently onto the wrong layers. LoRA, RoRA (PEFT's use_rslora) and DoRA (use_dora) are PEFT's own methods.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.export import check as checks
from pipeline.export.config import PeftConfig
from pipeline.export.model_folder import ModelFolder

VERSION = 1
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "rora": {"use_rslora": True}, "dora": {"use_dora": True}}
PARTS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def refusal(model: ModelFolder, config: PeftConfig) -> str | None:
    """Why PEFT has no form of this adapter, or None."""
    if model.adapter is None:
        return "there is no adapter to export: nothing was recovered, or none was named (--adapter)"
    method = _described(model.adapter)["config"]["method"]
    if method not in METHODS:
        return f"PEFT's files for {method} are not written yet ({', '.join(METHODS)} are); export the merged model (hf)"
    return None


def write(model: ModelFolder, out: Path, config: PeftConfig) -> dict[str, Any]:
    """Write the two files. Returns the method and how many modules it is on."""
    from safetensors.torch import load_file, save_file

    assert model.adapter is not None
    out.mkdir(parents=True, exist_ok=True)
    options = _described(model.adapter)["config"]
    tensors = load_file(model.adapter / "adapter.safetensors")
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.path),
        "inference_mode": True,
        "r": options["rank"],
        "lora_alpha": options["alpha"],
        "lora_dropout": options["dropout"],
        "bias": "none",
        "target_modules": modules,
        **METHODS[options["method"]],
    }
    renamed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        renamed[f"base_model.model.{module}.{PARTS[part]}"] = tensor
    save_file(renamed, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    return {"method": options["method"], "modules": len(modules)}


def check(model: ModelFolder, out: Path, config: PeftConfig) -> dict[str, Any]:
    """PEFT on the pruned base with these files, against the base with regrow's own adapter."""
    from pruning import checkpoint
    from recovery import inject

    assert model.adapter is not None
    reference = checkpoint.load(model.path)
    inject.attach_saved(reference, model.adapter)
    remote = model.name == "RegrowForCausalLM"
    return checks.with_transformers(model, model.path, remote, adapter=out, reference=reference.eval())


def _described(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter.json").read_text(encoding="utf-8"))
