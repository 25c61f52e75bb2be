"""A small run that several tests of the command start from."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM

from pruning import checkpoint


@pytest.fixture
def small_run(
    tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder, with a tiny dense model and `run.yaml`, which trains LoRA on it."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tiny_model, tiny_tokenizer, tmp_path / "dense")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the {n} follows the {n - 1}"}) + "\n" for n in range(40)))
    source = {"source": f"path:{text}", "field": "text"}
    recovery = {"adapter": {"method": "lora"}, "tokens": 512, "batch_tokens": 128, "max_length": 64, "data": [source]}
    said = {
        "name": "small",
        "model": {"source": f"path:{tmp_path}/dense", "dtype": "float32"},
        "recovery": recovery,
        "evaluation": {"perplexity": [{"name": "text", "window": 32, **source}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(said))
    return tmp_path
