"""`recovery.quantized_base` through the command: from the pruned model's full weights into them again."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from pipeline.cli import main


def regrow(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_the_adapter_goes_into_the_full_weights(small_run: Path) -> None:
    keys = []
    for options in ([], ["--set", "recovery.quantized_base=nf4"]):
        result = regrow("merge", "run.yaml", *options)
        assert result.exit_code == 0, result.output
        keys.append((small_run / "runs/small/artifacts/recover").resolve().name)
    assert keys[0] != keys[1]
    artifacts = small_run / "runs/small/artifacts"
    report = json.loads((artifacts / "recover/manifest.json").read_text())["report"]
    weights = 4 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)  # float32, two layers
    assert report["quantized_base"]["bytes_before"] == weights
    assert report["quantized_base"]["bytes"] == weights / 4 * 36 / 64
    dense, merged = (load_file(path / "model.safetensors") for path in (small_run / "dense", artifacts / "merge/model"))
    adapter, name = load_file(artifacts / "recover/adapter/adapter.safetensors"), "model.layers.1.mlp.up_proj"
    expected = dense[f"{name}.weight"] + 2 * adapter[f"{name}.B"] @ adapter[f"{name}.A"]
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-6, atol=1e-6)
    assert json.loads((artifacts / "merge/manifest.json").read_text())["report"]["largest_logit_difference"] < 1e-4


def test_a_missing_bitsandbytes_is_said_before_work_begins(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = regrow("run", "run.yaml", "--set", "recovery.quantized_base=int8")
    assert result.exit_code == 2
    assert "recovery.quantized_base: int8 needs bitsandbytes: pip install 'regrow[quantized]'" in result.output
    assert not list((small_run / "store").glob("*/*/manifest.json"))
    result = regrow(
        "run", "run.yaml", "--set", "recovery.quantized_base=int8", "--set", "recovery.adapter.method=randlora"
    )
    assert result.exit_code == 2
    assert "recovery" in result.output
    assert "set its `fused` to false" in result.output
