"""Every allocation the pruner can make exports to each format, or is refused with a reason; and plan foresees which."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import export
from pipeline.errors import ConfigError
from pipeline.export import check, command
from pipeline.export.foreseen import targets
from pipeline.export.model_folder import ModelFolder
from pipeline.export.write import refuse
from pruning import checkpoint, criteria
from pruning.prune import foresee

WIDTHS = {"ffn": ("ffn",), "attention": ("ffn", "attention"), "heads": ("ffn", "heads"), "hidden": ("hidden", "ffn"),
          "layers": ("layers",)}  # fmt: skip
CASES = [
    *((kind, {"structures": WIDTHS[name], "ratio": 0.3}) for kind in ("llama", "mistral", "qwen2", "qwen3")
      for name in WIDTHS),
    *((kind, {"structures": ("ffn",), "depth": {"layers": 1}, "ratio": 0.35}) for kind in ("llama", "qwen3")),
    *((kind, {"shape": shape, "structures": ("ffn",), "protect": {"first": 1, "last": 1}, "ratio": 0.1})
      for kind in ("llama", "mistral") for shape in ("free", "vllm", "gguf")),
    *((kind, {"shape": "free", "allocation": "global", "ratio": 0.2}) for kind in ("mistral", "qwen2", "qwen3")),
    *(("llama", {"shape": shape, "allocation": "global", "ratio": 0.2}) for shape in ("free", "gguf")),
    ("llama", {"shape": "free", "allocation": "global", "ratio": 0.2, "method": "flap", "compensation": "bias"}),
    ("llama", {"shape": "vllm", "structures": ("ffn",), "allocation": (0.5, 1, 2, 1), "ratio": 0.15}),
    ("llama", {"structures": ("ffn",), "ratio": 0.15, "method": "flap", "compensation": "bias"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_every_allocation_exports_or_says_why_not(
    folder: Any, tmp_path: Path, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    # The tools themselves run in test_formats; here regrow's own loader reads what was written.
    monkeypatch.setattr(check, "_run", lambda *arguments: pytest.fail("the tool was started"))
    model = folder(kind, pruning=options)
    loads = 0
    for config in command.asked(("hf", "hf:pad", "gguf:f32", "gguf:q4_1", "vllm")):
        form = export.load(config.format)
        reason = form.refusal(model, config)
        if reason:
            assert len(reason) > 20
            with pytest.raises(ConfigError, match=f"export {config.label}: "):
                refuse(model, config)
            continue
        out = tmp_path / config.label
        out.mkdir()
        form.write(model, out, config)
        if config.format == "gguf":
            assert len(list(out.glob("*.gguf"))) == 1
        elif config.format == "hf":
            again, served = checkpoint.load(out), checkpoint.load(model.path)
            ids = torch.tensor([check.token_ids(model)])
            torch.testing.assert_close(again(input_ids=ids).logits, served(input_ids=ids).logits, rtol=0, atol=1e-5)
            padded = ModelFolder(out).shape.parameters()
            assert sum(p.numel() for p in again.parameters()) == padded
            assert padded == model.shape.parameters() or config.label == "hf-pad"
        loads += 1
    assert loads >= 2  # two Hugging Face folders, or one and a GGUF file, at the least
    assert export.load("hf").refusal(model, command.asked(("hf",))[0]) is None
    if options.get("shape") == "vllm":
        assert export.load("vllm").refusal(model, command.asked(("vllm",))[0]) is None
    if options.get("shape") == "gguf":
        assert all(layer.ffn % 32 == 0 for layer in model.shape.layers)


def test_sizes_alone_foresee_the_class_that_pruning_makes(folder: Any, tmp_path: Path):
    for kind, options in CASES:
        if kind != "llama" and "shape" not in options:
            continue
        dense = folder(kind).said
        settings = criteria.load(options.get("method", "magnitude")).Config(**{"method": "magnitude", **options})
        said = foresee(dense, settings)
        made = folder(kind, pruning=options)
        assert said["architectures"] == made.said["architectures"], options
        if options.get("allocation") != "global":
            assert ModelFolder.planned(tmp_path, said).shape == made.shape, options


def test_a_plan_says_what_each_tool_could_load(folder: Any, tmp_path: Path):
    from pipeline.config_file import check as checked
    from pipeline.sources import Sources
    from pipeline.store import Store

    path = folder().path
    pruning = {"method": "magnitude", "ratio": 0.2, "shape": "free", "allocation": "global"}
    raw = {"name": "x", "model": {"source": f"path:{path}"}, "pruning": pruning, "evaluation": {"suites": ["piqa"]}}
    config = checked(raw, "x.yaml")
    found = targets(config, Sources(Store(tmp_path / "store"), {}))
    assert found["llama.cpp"] == "as deci"
    assert "trust_remote_code" in found["transformers"]
    assert "query heads" in found["vLLM"]
    biased = {"method": "flap", "ratio": 0.2, "shape": "free", "calibration": {"source": "path:x", "field": "text"}}
    found = targets(checked({**raw, "pruning": biased}, "x.yaml"), Sources(Store(tmp_path / "store"), {}))
    assert found["vLLM"] == "6 heads do not divide 64, as LlamaConfig wants, and Mistral has no biases; use hf:pad"
    stock = checked({**raw, "pruning": {"method": "magnitude", "ratio": 0.2}}, "x.yaml")
    found = targets(stock, Sources(Store(tmp_path / "store"), {}))
    assert found == {"transformers": "stock MistralForCausalLM", "llama.cpp": "as llama", "vLLM": "stock"}
