"""Pickled models are read without making anything but tensors."""

import os
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from pipeline.cli import main
from pruning import checkpoint


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def test_an_llm_pruner_file_becomes_a_folder_and_runs_nothing(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    for width, layer in zip((40, 48), tiny_model.model.layers, strict=True):  # as LLM-Pruner cuts: in place, no config
        mlp = layer.mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight[:width].clone())
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :width].clone())
    expected = tiny_model(input_ids=ids).logits
    torch.save({"model": tiny_model, "tokenizer": Evil()}, tmp_path / "pytorch_model.bin")
    tiny_tokenizer.save_pretrained(tmp_path / "base")

    words = ["unpickle", "pytorch_model.bin", "-o", "out", "--tokenizer", "base"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2
    assert "--allow-pickle reads its tensors alone" in refused.stderr
    done = CliRunner().invoke(main, [*words, "--allow-pickle"])
    assert done.exit_code == 0, done.output
    assert "RegrowForCausalLM" in done.stdout
    again = checkpoint.load(tmp_path / "out")
    assert torch.equal(again(input_ids=ids).logits, expected)
    assert checkpoint.load_tokenizer(tmp_path / "out")("a b")["input_ids"] == tiny_tokenizer("a b")["input_ids"]
    assert not (tmp_path / "owned").exists()
    torch.save({"weights": 1}, tmp_path / "other.bin")
    other = CliRunner().invoke(main, ["unpickle", "other.bin", "-o", "there", "--allow-pickle"])
    assert "it holds no pickled model" in other.stderr
    assert other.exit_code == 1
