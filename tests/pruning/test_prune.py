import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pruning import checkpoint, criteria
from pruning.allocation import plan_widths
from pruning.config import PruningConfig
from pruning.prune import PruneResult, prune
from pruning.structures import Widths, count_parameters, decoder_layers, members, widths

IDS = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(1))


def config_of(method: str = "llm_pruner", **options: Any) -> PruningConfig:
    return criteria.load(method).Config(**{"ratio": 0.2, **options})


def random_model(kind: str, **options: Any) -> PreTrainedModel:
    shape = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, **options,
    }  # fmt: skip
    classes: dict[str, Any] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config, model = classes[kind]
    torch.manual_seed(0)
    made = model(config(**shape)).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # zero biases would hide a wrong slice
    return made


def masked_logits(model: PreTrainedModel, result: PruneResult) -> torch.Tensor:
    """The dense model's logits with the output columns of every removed structure set to zero."""
    with torch.no_grad():
        for layer, kept in zip(decoder_layers(model), result.kept, strict=True):
            for kind, indices in kept.items():
                member = members(layer, kind)[-1]
                assert member.dimension == 1
                for unit in set(range(member.linear.in_features // member.size)) - set(indices):
                    member.linear.weight[:, unit * member.size : (unit + 1) * member.size] = 0
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_pruned_equals_dense_with_the_removed_structures_masked(kind: str, tied: bool):
    dense, model = (random_model(kind, tie_word_embeddings=tied) for _ in range(2))
    result = prune(model, IDS, config_of(ratio=0.3))
    assert result.report["widths"][0]["attention"] < 4
    expected = masked_logits(dense, result)
    torch.testing.assert_close(result.model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


def test_free_shape_keeps_protected_layers_whole():
    dense, model = random_model("llama"), random_model("llama")
    result = prune(model, IDS, config_of(ratio=0.1, shape="free", protect={"first": 1, "last": 1}))
    assert result.report["widths"][0] == result.report["widths"][2] == {"ffn": 48, "attention": 4}
    assert result.report["widths"][1]["ffn"] < 48
    torch.testing.assert_close(result.model(input_ids=IDS).logits, masked_logits(dense, result), rtol=0, atol=1e-5)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "remote")
ids = torch.tensor([[5, 6, 7, 8]])
print(type(model).__name__, model.num_parameters())
print(model(input_ids=ids).logits.double().sum().item())
print(model.generate(ids, max_new_tokens=6, do_sample=False).tolist())
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"structures": ("ffn",)}, "LlamaForCausalLM"),
        ({}, "MistralForCausalLM"),  # 6 of 8 heads are left, which do not divide a hidden size of 32
        ({"shape": "free", "protect": {"first": 1, "last": 0}}, "RegrowForCausalLM"),
    ],
)
def test_a_saved_model_loads_without_regrow(
    tmp_path: Path, tiny_tokenizer: Any, options: dict[str, Any], expected: str
):
    result = prune(random_model("llama"), IDS, config_of(**options))
    assert type(result.model).__name__ == expected
    checkpoint.save(result.model, tiny_tokenizer, tmp_path / "model")

    again = checkpoint.load(tmp_path / "model")
    assert torch.equal(again(input_ids=IDS).logits, result.model(input_ids=IDS).logits)
    assert checkpoint.load_tokenizer(tmp_path / "model")("a b")["input_ids"] == tiny_tokenizer("a b")["input_ids"]

    remote = "remote" if expected == "RegrowForCausalLM" else "stock"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-I", "-c", LOAD, str(tmp_path / "model"), remote]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, total, tokens = run.stdout.splitlines()
    assert first == f"{expected} {count_parameters(result.model)}"
    ids = torch.tensor([[5, 6, 7, 8]])
    assert float(total) == pytest.approx(result.model(input_ids=ids).logits.double().sum().item(), abs=1e-4)
    assert json.loads(tokens) == result.model.generate(ids, max_new_tokens=6, do_sample=False).tolist()


# Published counts (methods.md 2.0): block-wise ratio 0.25 of the structures of the pruned layers.
ANCHORS = [
    # hidden, heads, groups, head_dim, ffn, vocabulary, layers, first, last, parameters before, after
    (4096, 32, 32, 128, 11008, 32000, 32, 4, 2, 6_738_415_616, 5_422_977_024, 24, 8256),
    (4096, 32, 8, 128, 14336, 128256, 32, 4, 2, 8_030_261_248, 6_612_586_496, 6, 10752),
    (2048, 32, 4, 64, 5632, 32000, 22, 4, 4, 1_100_048_384, 945_907_712, 3, 4224),
]


@pytest.mark.parametrize("anchor", ANCHORS)
def test_published_parameter_counts(anchor: tuple[int, ...]):
    hidden, heads, groups, head, ffn, vocabulary, layers, first, last, before, after, kept_groups, kept_ffn = anchor
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=groups, head_dim=head,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    assert count_parameters(model) == before
    size = widths(decoder_layers(model)[0])
    shape = {"shape": "free", "protect": {"first": first, "last": last}}
    dropped = plan_widths([size] * layers, before, config_of(ratio=1 - after / before, **shape))
    assert dropped[0] == {"ffn": 0, "attention": 0}
    assert dropped[first] == {"ffn": ffn - kept_ffn, "attention": groups - kept_groups}
    freed = sum(drop["ffn"] * size.ffn_cost + drop["attention"] * size.attention_cost for drop in dropped)
    assert before - freed == after


@pytest.mark.parametrize("ratio", [0.05, 0.13, 0.2, 0.35, 0.5, 0.6])
def test_the_ratio_is_hit_within_half_a_percent_of_the_model(ratio: float):
    # SmolLM2-135M's layers: d 576, 3 groups of 3 heads of 64, f 1536
    size = Widths(ffn=1536, attention=3, ffn_cost=3 * 576, attention_cost=2 * 576 * 64 * 4)
    (drop, *rest) = plan_widths([size] * 30, 134_515_008, config_of(ratio=ratio))
    assert all(other == drop for other in rest)
    removed = 30 * (drop["ffn"] * 1728 + drop["attention"] * 294_912)
    assert removed / 134_515_008 == pytest.approx(ratio, abs=0.005)


def test_kept_widths_are_rounded_when_asked():
    size = Widths(ffn=1536, attention=3, ffn_cost=1728, attention_cost=294_912)
    drop = plan_widths([size] * 30, 134_515_008, config_of(ratio=0.2, round_to=256))[0]
    assert (1536 - drop["ffn"]) % 256 == 0


@pytest.mark.parametrize("method", criteria.names())
def test_every_criterion_scores_each_structure_and_repeats_itself(method: str, tmp_path: Path):
    config = config_of(method)
    results = [prune(random_model("llama"), IDS, config) for _ in range(2)]
    assert results[0].kept == results[1].kept
    module = criteria.load(method)
    for scores in module.scores(random_model("llama"), IDS, config, lambda done, total, note: None):
        assert {kind: len(values) for kind, values in scores.items()} == {"ffn": 48, "attention": 4}
        assert all(values.isfinite().all() and values.dtype == torch.float32 for values in scores.values())
    report = results[0].report
    assert report["parameters_after"] == count_parameters(results[0].model)
    assert abs(report["ratio_reached"] - 0.2) <= 0.005
    checkpoint.save(results[0].model, None, tmp_path / "model")
    saved = checkpoint.load(tmp_path / "model")
    assert torch.equal(saved(input_ids=IDS).logits, results[0].model(input_ids=IDS).logits)
    assert module.__doc__
    assert isinstance(module.VERSION, int)


def test_structures_are_written_in_the_original_numbering(tmp_path: Path):
    result = prune(random_model("llama"), IDS, config_of())
    checkpoint.write_structures(tmp_path, result.kept, result.widths)
    said = json.loads((tmp_path / "structures.json").read_text())
    layer = said["layers"][1]
    assert layer["ffn"]["of"] == 48
    assert layer["ffn"]["kept"] == result.kept[1]["ffn"] == sorted(set(result.kept[1]["ffn"]))


def test_what_cannot_be_done_is_refused_with_the_remedy():
    with pytest.raises(ValidationError, match="less than 1"):
        config_of(ratio=1.2)
    with pytest.raises(ValidationError, match="set shape: free"):
        config_of(protect={"first": 4, "last": 2})
    with pytest.raises(ValueError, match=r"ratio: 0.95 cannot be reached .* at most 0\.\d+ can be removed"):
        prune(random_model("llama"), IDS, config_of(ratio=0.95))
    with pytest.raises(ValueError, match="add ffn to structures"):
        prune(random_model("llama"), IDS, config_of(ratio=0.02, structures=("attention",)))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not served"):
        prune(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)), IDS, config_of())
    with pytest.raises(ValueError, match="leave none of 3 layers"):
        prune(random_model("llama"), IDS, config_of(shape="free", protect={"first": 2, "last": 1}))
    model = random_model("llama")
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layer 0: .* scores are not finite; nothing was cut"):
        prune(model, IDS, config_of())
    assert model.get_decoder().layers[0].mlp.up_proj.out_features == 48
