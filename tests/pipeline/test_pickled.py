"""Pickled models are read without making anything but tensors."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from pipeline import pickled
from pipeline.cli import main
from pipeline.errors import ConfigError, StageError
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


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 32}
IDS = torch.randint(4, 60, (1, 100), generator=torch.Generator().manual_seed(1))


def small(kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, **more: Any) -> Any:
    torch.manual_seed(0)
    widths = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return kind(config(**widths, **heads, initializer_range=0.2, **more)).eval()


def converted(model: Any, folder: Path, **how: Any) -> Any:
    torch.save({"model": model}, folder / "pytorch_model.bin", **how)
    pickled.convert(folder / "pytorch_model.bin", folder / "out", None, allowed=True)
    return checkpoint.load(folder / "out")


def test_scaled_rotary_positions_and_several_end_tokens_are_kept(tmp_path: Path):
    model = small(rope_parameters={**SCALED, "rope_theta": 10000.0})
    expected = model(IDS).logits
    attributes = model.config.__dict__  # as transformers 4 keeps them
    attributes.pop("rope_parameters")
    attributes.update(rope_theta=10000.0, rope_scaling=SCALED, eos_token_id=[7, 8])
    again = converted(model, tmp_path)
    assert torch.equal(again(IDS).logits, expected)
    assert again.config.eos_token_id == [7, 8]


@pytest.mark.parametrize("window", [16, None])
def test_a_mistral_keeps_its_window(window: int | None, tmp_path: Path):
    model = small(MistralForCausalLM, MistralConfig, sliding_window=window)
    expected = model(IDS).logits
    again = converted(model, tmp_path)
    assert again.config.sliding_window == window
    assert torch.equal(again(IDS).logits, expected)


def test_parameters_with_attributes_are_read_and_others_refused(tmp_path: Path):
    model = small()
    expected = model(IDS).logits
    for name in ("model.embed_tokens", "model.norm", "model.layers.0.self_attn.q_proj"):
        weight = model.get_submodule(name).weight
        weight.acc_grad = torch.ones_like(weight)  # as LLM-Pruner's Taylor criteria leave it
    assert torch.equal(converted(model, tmp_path)(IDS).logits, expected)
    model.model.norm._parameters["weight"] = slice(0)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(StageError, match=r"model\.norm\.weight is a slice, not a tensor"):
        converted(model, other)


def test_a_cut_hidden_size_leaves_the_heads_as_wide(tmp_path: Path):
    model = small()
    for name, parameter in model.named_parameters():
        written = ("o_proj", "down_proj")
        cut = parameter.data[:24] if any(part in name for part in written) else parameter.data[..., :24]
        model.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(cut.clone())
    model.config.hidden_size = 24  # as LLM-Pruner sets it
    model.config.__dict__.pop("head_dim")
    expected = model(IDS).logits
    again = converted(model, tmp_path)
    assert again.config.head_dim == 8
    assert torch.equal(again(IDS).logits, expected)


def test_old_files_of_torch_are_read(tmp_path: Path):
    model = small()
    expected = model(IDS).logits
    assert torch.equal(converted(model, tmp_path, _use_new_zipfile_serialization=False)(IDS).logits, expected)


def test_weights_that_do_not_make_the_model_are_refused(tmp_path: Path):
    model = small()
    del model.model.norm
    with pytest.raises(ConfigError, match=r"model\.norm\.weight: its shape is none, that .* is \[32\]"):
        converted(model, tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        pickled.convert(tmp_path / "pytorch_model.bin", tmp_path / "out", tmp_path, allowed=True)


class Writes(torch.nn.Module):
    """Scripted, its code runs when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[bool]:
        return (self.training,)

    @torch.jit.export
    def __setstate__(self, state: tuple[bool]) -> None:
        self.training = state[0]
        self.kept = torch.from_file("owned", True, 4)
        self.kept.fill_(65.0)


def test_a_torchscript_archive_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Writes()).save("pytorch_model.bin")
    with pytest.raises(StageError, match="TorchScript"):
        pickled.convert(Path("pytorch_model.bin"), Path("out"), None, allowed=True)
    assert not Path("owned").exists()
    torch.jit.load("pytorch_model.bin")
    assert Path("owned").exists()  # what it would have done
