"""What the formats hold, against the tools that read them: transformers and llama.cpp in processes of their own."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import export
from pipeline.errors import StageError
from pipeline.export import command, vllm
from pipeline.export.gguf import interleaved
from pipeline.export.model_folder import ModelFolder
from pipeline.export.modeling_decilm import DeciLMForCausalLM
from pipeline.export.write import write

FREE = {"shape": "free", "ratio": 0.1}
GROUPS = {**FREE, "allocation": "global"}
ENDS = {**FREE, "protect": {"first": 1, "last": 1}, "structures": ("ffn",)}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip


def config(name: str) -> Any:
    (made,) = command.asked((name,))
    return made


def exported(model: ModelFolder, name: str, out: Path) -> dict[str, Any]:
    return write(model, out, config(name), {})


@pytest.mark.parametrize(
    ("kind", "options", "architecture"),
    [
        ("llama", {"pruning": {"ratio": 0.2}}, "llama"),
        ("llama", {"pruning": GROUPS, "tie_word_embeddings": True}, "deci"),
        ("llama", {"pruning": GROUPS, "attention_bias": True, "mlp_bias": True}, "deci"),
        ("llama", {"pruning": {**ENDS, "compensation": "bias", "method": "flap"}}, "deci"),
        ("llama", {"pruning": {"ratio": 0.1, "structures": ("ffn",), "compensation": "bias"}}, "llama"),
        ("llama", {"pruning": ENDS, "rope_parameters": LLAMA3}, "deci"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, "llama"),
        ("mistral", {"pruning": GROUPS, "sliding_window": 128}, "deci"),
        ("qwen2", {"pruning": {"ratio": 0.2}}, "llama"),
        ("qwen2", {"pruning": GROUPS}, "deci"),
        ("qwen2", {"head_dim": 8, "pruning": {"ratio": 0.1, "structures": ("ffn",)}}, "qwen2"),
        ("qwen3", {"pruning": {"ratio": 0.2, "structures": ("heads", "ffn")}}, "qwen3"),
        ("llama", {"pruning": {"ratio": 0.3, "structures": ("hidden",)}}, "llama"),
    ],
    ids=str,
)
def test_llama_cpp_computes_what_transformers_does(
    folder: Any, tmp_path: Path, kind: str, options: dict[str, Any], architecture: str
):
    report = exported(folder(kind, **options), "gguf:f32", tmp_path / "out")
    assert report["written"]["architecture"] == architecture
    assert report["check"]["argmax_agreement"] == 1.0
    assert report["check"]["largest_log_probability_difference"] < 1e-3
    assert report["check"]["tokens"] == 48


def test_quantized_types_name_what_stayed_16_bit(folder: Any, tmp_path: Path):
    model = folder(pruning={"ratio": 0.1, "structures": ("ffn",)}, initializer_range=0.1)
    assert model.shape.layers[0].ffn % 32
    report = exported(model, "gguf:q8_0", tmp_path / "out")
    assert report["written"]["fallback"] == [
        f"blk.{n}.ffn_down.weight: f16 (width {model.shape.layers[0].ffn} is no multiple of 32)" for n in range(4)
    ]
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out/model-q8_0.gguf").tensors
    }
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"


def test_what_stayed_16_bit_includes_embedding_and_head(folder: Any, tmp_path: Path):
    def fallback(hidden: int) -> list[str]:
        model = folder(hidden_size=hidden)
        return export.load("gguf").write(model, tmp_path, config("gguf:q4_1"))["fallback"]

    ends = [f"{name}.weight: f16 (width 80 is no multiple of 32)" for name in ("token_embd", "output")]
    assert fallback(80)[:2] == ends
    assert fallback(64) == []  # there they have the 8 bits that are meant for them


def test_rows_are_interleaved_inside_each_head():
    rows = torch.arange(8)[:, None]  # two heads of four: halves 0 1 | 2 3 and 4 5 | 6 7
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("tied", [True, False])
def test_padding_makes_a_stock_class_of_the_same_function(folder: Any, tmp_path: Path, tied: bool):
    model = folder(pruning=GROUPS, tie_word_embeddings=tied)
    padded = exported(model, "hf:pad", tmp_path / "padded")
    assert padded["check"]["class"] in ("LlamaForCausalLM", "MistralForCausalLM")
    assert padded["check"]["largest_logit_difference"] < 1e-5
    cost = padded["written"]["padding"]
    assert cost["parameters"] == model.shape.parameters()
    assert cost["parameters_padded"] == padded["check"]["parameters"] > cost["parameters"]
    card = (tmp_path / "padded/README.md").read_text()
    assert "Padded with zeros from" in card
    assert "trust_remote_code" not in card


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_whose_layers_differ_travels_with_its_class(folder: Any, tmp_path: Path, tied: bool):
    model = folder(pruning=GROUPS, tie_word_embeddings=tied)
    assert model.name == "RegrowForCausalLM"
    own = exported(model, "hf", tmp_path / "own")
    assert own["written"] == {"class": "RegrowForCausalLM", "trust_remote_code": True}
    assert own["check"]["largest_logit_difference"] == 0.0
    assert own["check"]["generated_equal"]
    assert own["check"]["parameters"] == model.shape.parameters()
    assert "trust_remote_code=True" in (tmp_path / "own/README.md").read_text()


def test_vllm_gets_block_configs_or_a_reason(folder: Any, tmp_path: Path):
    model = folder(pruning=ENDS)
    report = exported(model, "vllm", tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert (said["architectures"], said["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")
    assert [block["ffn"]["intermediate_size"] for block in said["block_configs"]] == [
        layer.ffn for layer in model.shape.layers
    ]
    assert {block["attention"]["n_heads_in_group"] for block in said["block_configs"]} == {2}
    assert "ffn_mult" not in json.dumps(said)
    assert not {"intermediate_size", "num_key_value_heads", "per_layer_config"} & said.keys()
    assert report["check"]["largest_logit_difference"] == 0.0
    assert "no vLLM ran" in report["check"]["vllm"]
    assert "--format gguf" not in (tmp_path / "out/README.md").read_text()  # regrow does not read DeciLM's folder
    loaded: Any = DeciLMForCausalLM.from_pretrained(tmp_path / "out")
    loaded.set_attn_implementation("eager")  # after loading: only eager layers have weights to show
    shown = loaded(input_ids=torch.tensor([[5, 6, 7]]), output_attentions=True).attentions
    assert [weights.shape for weights in shown] == [(1, 8, 3, 3)] * 4


def test_vllm_refuses_unequal_query_heads_and_names_the_nearest(folder: Any):
    model = folder(pruning=GROUPS)
    heads = {layer.groups * layer.heads for layer in model.shape.layers}
    assert len(heads) > 1
    assert f"padded to {max(heads)} heads" in vllm.refusal(model, config("vllm"))


def test_vllm_refuses_layers_that_are_alike_and_of_no_stock_class(folder: Any, tmp_path: Path):
    model = folder(pruning={"method": "flap", "ratio": 0.2, "shape": "free"})
    assert model.uniform
    assert model.name == "RegrowForCausalLM"
    reason = vllm.refusal(model, config("vllm"))
    assert reason == "6 heads do not divide 64, as LlamaConfig wants, and Mistral has no biases; use hf:pad"
    (tmp_path / "out").mkdir()
    assert export.load("hf").write(model, tmp_path / "out", config("hf:pad"))["class"] == "LlamaForCausalLM"
    assert vllm.refusal(ModelFolder(tmp_path / "out"), config("vllm")) is None


def test_layers_that_differ_beyond_llamas_are_refused_by_name(folder: Any):
    for kind, what in (("mistral", "a sliding window"), ("qwen2", "biases"), ("qwen3", "norms of q and k")):
        model = folder(kind, pruning=ENDS, sliding_window=16)
        assert f"layers differ and have {what}, which vLLM's" in vllm.refusal(model, config("vllm"))
        reason = export.load("gguf").refusal(model, config("gguf"))
        assert ("norms, and of llama.cpp's architectures only deci" in reason) if kind == "qwen3" else reason is None


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_quantized_folders_load_and_shrink(folder: Any, tmp_path: Path, scheme: str):
    model = folder(pruning=ENDS, tie_word_embeddings=True, initializer_range=0.05)
    report = exported(model, f"quantized:{scheme}", tmp_path / "out")
    assert report["written"]["bytes"] < report["written"]["bytes_before"]
    kept = {line.split(":")[0] for line in report["written"]["fallback"]}
    parts = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}  # of the odd widths; 96 rows fit, 96 columns do not
    odd = {f"model.layers.{n}.{part}" for n in range(4) for part in (parts if n in (1, 2) else {"mlp.down_proj"})}
    assert kept == (odd if scheme == "nf4" else set())
    assert report["check"]["largest_logit_difference"] > 0
    assert report["check"]["class"] == "RegrowForCausalLM"
    assert "quantized already" in export.load("quantized").refusal(ModelFolder(tmp_path / "out"), config("quantized"))


def test_a_wrong_file_does_not_pass_the_check(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.export.gguf.interleaved", lambda values, heads: values)
    with pytest.raises(StageError, match="agrees on the most likely token at only"):
        exported(folder(), "gguf:f32", tmp_path / "out")


def test_what_cannot_be_exported_says_why(folder: Any, tmp_path: Path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
    gguf_of = export.load("gguf")
    assert "rope scaling 'yarn'" in gguf_of.refusal(folder(rope_parameters=yarn), config("gguf"))
    model = folder()
    (model.path / "tokenizer.json").unlink()
    (model.path / "tokenizer_config.json").unlink()
    assert "no tokenizer" in gguf_of.refusal(model, config("gguf"))
    assert "nothing to pad" in export.load("hf").refusal(model, config("hf:pad"))
    assert "no adapter to export" in export.load("peft").refusal(model, config("peft"))


def test_a_copy_loads_with_all_its_files(folder: Any, tmp_path: Path):
    model = folder(pruning={"ratio": 0.2})
    (model.path / "LICENSE").write_text("be kind")
    (model.path / "README.md").write_text("---\nlicense: mit\n---\nold card")
    done = command.export_folder(model.path, ("hf",), tmp_path / "out", None)
    assert (tmp_path / "out/LICENSE").read_text() == "be kind"
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "--format gguf" in card
    assert json.loads((tmp_path / "out/regrow.json").read_text())["export"]["check"] == done["hf"]["check"]
    first, second = (AutoModelForCausalLM.from_pretrained(place) for place in (model.path, tmp_path / "out"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
