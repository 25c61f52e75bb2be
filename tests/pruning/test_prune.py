import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from pruning import checkpoint, criteria
from pruning.architecture import Architecture, LayerShape
from pruning.config import PruningConfig
from pruning.modeling_regrow import RegrowConfig, RegrowForCausalLM
from pruning.prune import PruneResult, foresee, prune
from pruning.statistics import measure
from pruning.structures import NORMS, count_parameters, decoder_layers
from pruning.widths import plan_shapes, plan_step


def config_of(method: str = "llm_pruner", **options: Any) -> PruningConfig:
    return criteria.load(method).Config(**{"ratio": 0.2, **options})


def masked_logits(model: PreTrainedModel, result: PruneResult, ids: torch.Tensor) -> torch.Tensor:
    """The dense model's logits with every removed structure set to zero where it would write."""
    decoder: Any = model.get_decoder()
    hidden = [channel for channel in range(model.config.hidden_size) if channel not in result.kept.hidden]
    keeps = {keep.index: keep for keep in result.kept.layers}
    with torch.no_grad():
        decoder.embed_tokens.weight[:, hidden] = 0
        for index, layer in enumerate(decoder.layers):
            o, down = layer.self_attn.o_proj, layer.mlp.down_proj
            for parameter in (*o.parameters(), *down.parameters()):
                parameter[hidden if index in keeps else slice(None)] = 0
            if index not in keeps:
                continue
            heads = o.in_features // 8
            for head in set(range(heads)) - set(keeps[index].heads):
                o.weight[:, head * 8 : head * 8 + 8] = 0
            for channel in set(range(down.in_features)) - set(keeps[index].ffn):
                down.weight[:, channel] = 0
        return model(input_ids=ids).logits


KINDS = [
    {"structures": ("ffn",)},
    {"structures": ("attention",), "ratio": 0.1},
    {"structures": ("heads", "ffn"), "ratio": 0.3},
    {"structures": ("ffn", "attention"), "ratio": 0.3},
    {"structures": ("ffn", "attention", "heads"), "ratio": 0.4},
    {"structures": ("hidden",)},
    {"structures": ("hidden", "ffn", "attention", "heads"), "ratio": 0.5},
    {"structures": ("layers",), "ratio": 0.4},
    {"structures": ("ffn",), "depth": {"layers": 1}, "ratio": 0.3},
    {"structures": ("ffn", "attention"), "steps": 3, "ratio": 0.3},
]


@pytest.mark.parametrize("kind", ["llama", "llama with biases", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_pruned_equals_dense_with_the_removed_structures_masked(
    random_model: Any, ids: torch.Tensor, kind: str, tied: bool, options: dict[str, Any]
):
    shape = {"tie_word_embeddings": tied}
    if kind == "llama with biases":
        shape |= {"attention_bias": True, "mlp_bias": True}
        options = {**options, "shape": "free"}  # stock Llama has no such head counts, and Mistral no such biases
        kind = "llama"
    if options["structures"] == ("attention",):
        options = {**options, "ratio": removed(random_model(kind, **shape), groups=1)}
    dense, model = (random_model(kind, **shape) for _ in range(2))
    result = prune(model, ids, config_of(**options))
    assert result.report["parameters_after"] == count_parameters(result.model) < count_parameters(dense)
    expected = masked_logits(dense, result, ids)
    torch.testing.assert_close(result.model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


# Windows are shorter than every sequence here, in all layers (Mistral) and in the last two of four (Qwen).
WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 3}, "qwen2": WINDOW, "qwen3": WINDOW
}  # fmt: skip


def removed(model: PreTrainedModel, groups: int) -> float:
    """The share of the model's parameters that so many key-value groups of every layer hold."""
    attention = decoder_layers(model)[0].self_attn
    each = sum(p.numel() for name, p in attention.named_parameters() if "norm" not in name and name != "o_proj.bias")
    return groups / 4 * each * len(decoder_layers(model)) / count_parameters(model)


@pytest.mark.parametrize(
    "options",
    [
        {"protect": {"first": 1, "last": 1}, "ratio": 0.1},
        {"allocation": "global"},
        {"allocation": (0.5, 1, 2, 0), "structures": ("ffn",), "ratio": 0.1},
        {"allocation": "global", "depth": {"layers": 1}, "ratio": 0.3},
        {"protect": {"first": 1, "last": 0}, "structures": ("heads", "ffn"), "steps": 2},
        {"allocation": "global", "method": "flap"},
    ],
    ids=str,
)
def test_free_shapes_equal_the_masked_model_and_load_again(
    random_model: Any, ids: torch.Tensor, options: dict[str, Any], tmp_path: Path
):
    dense, model = random_model(), random_model()
    result = prune(model, ids, config_of(**{"shape": "free", "compensation": "none", **options}))
    assert type(result.model).__name__ == "RegrowForCausalLM"
    assert abs(result.report["ratio_reached"] - options.get("ratio", 0.2)) <= 0.005
    logits = result.model(input_ids=ids).logits
    torch.testing.assert_close(logits, masked_logits(dense, result, ids), rtol=0, atol=1e-5)
    checkpoint.save(result.model, None, tmp_path)
    again = checkpoint.load(tmp_path)
    assert torch.equal(again(input_ids=ids).logits, logits)
    assert Architecture.read(json.loads((tmp_path / "config.json").read_text())).parameters() == count_parameters(again)


def test_protected_layers_stay_whole_and_shares_scale_the_others(random_model: Any, ids: torch.Tensor):
    free = {"shape": "free", "structures": ("ffn",)}
    layers = prune(random_model(), ids, config_of(**free, ratio=0.1, protect={"first": 1, "last": 1})).report["layers"]
    assert [layer["ffn"] for layer in layers][::3] == [48, 48]
    assert layers[1]["ffn"] == layers[2]["ffn"] < 48
    layers = prune(random_model(), ids, config_of(**free, ratio=0.1, allocation=(0, 1, 2, 0))).report["layers"]
    lost = [48 - layer["ffn"] for layer in layers]
    assert lost[0] == lost[3] == 0
    assert lost[2] == pytest.approx(2 * lost[1], abs=1)


def test_a_global_allocation_takes_the_lowest_standardised_scores(random_model: Any, ids: torch.Tensor):
    config = config_of("magnitude", shape="free", allocation="global", structures=("ffn",), ratio=0.15)
    model = random_model()
    scores = criteria.load("magnitude").scores(model, {}, config)["ffn"]
    flat = torch.cat([(values - values.mean()) / values.std(correction=0) for values in scores])
    result = prune(model, None, config)
    kept = torch.zeros(4 * 48, dtype=torch.bool)
    for keep in result.kept.layers:
        kept[[keep.index * 48 + unit for unit in keep.ffn]] = True
    assert float(flat[kept].min()) >= float(flat[~kept].max())
    assert len({layer["ffn"] for layer in result.report["layers"]}) > 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_computes_and_generates_with_free_shapes_as_its_own_class_does(
    random_model: Any, ids: torch.Tensor, kind: str, tmp_path: Path
):
    dense, model = (random_model(kind, initializer_range=0.2, **FAMILIES[kind]) for _ in range(2))
    settings = config_of(shape="free", structures=("ffn", "attention"), protect={"first": 1, "last": 1}, ratio=0.1)
    result = prune(model, ids, settings)
    logits = result.model(input_ids=ids).logits
    torch.testing.assert_close(logits, masked_logits(dense, result, ids), rtol=0, atol=1e-5)
    checkpoint.save(result.model, None, tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    again: Any = checkpoint.load(tmp_path)
    assert type(again) is type(result.model)
    assert torch.equal(again(input_ids=ids).logits, logits)
    assert Architecture.read(json.loads((tmp_path / "config.json").read_text())).parameters() == count_parameters(again)
    written = [again.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*written)
    again.set_attn_implementation("eager")  # after loading: only eager layers have weights to show
    shown = again(input_ids=ids, output_attentions=True)
    torch.testing.assert_close(shown.logits, logits, rtol=0, atol=1e-5)
    assert [weights.shape[1] for weights in shown.attentions] == [8, *[result.report["layers"][1]["heads"]] * 2, 8]
    twice = prune(again, ids, settings)  # what differs can be pruned further
    assert type(twice.model) is type(result.model)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([[5, 6, 7, 8]])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=sys.argv[1] == "remote")
    print(type(model).__name__, model.num_parameters())
    print(model(input_ids=ids).logits.double().sum().item())
    print(model.generate(ids, max_new_tokens=6, do_sample=False).tolist())
"""


def loads_without_regrow(models: dict[Path, PreTrainedModel], remote: bool):
    """In a process of its own, where regrow cannot be imported: the same class, logits and generated tokens."""
    place = next(iter(models)).parent
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules"), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-I", "-c", LOAD, "remote" if remote else "stock", *map(str, models)]
    run = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3 * len(models)
    ids = torch.tensor([[5, 6, 7, 8]])
    for model, first, total, tokens in zip(models.values(), lines[::3], lines[1::3], lines[2::3], strict=True):
        assert first == f"{type(model).__name__} {count_parameters(model)}"
        assert float(total) == pytest.approx(model(input_ids=ids).logits.double().sum().item(), abs=1e-4)
        written: Any = model
        assert json.loads(tokens) == written.generate(ids, max_new_tokens=6, do_sample=False).tolist()


SAVED: list[tuple[dict[str, Any], str]] = [
    ({"structures": ("ffn",)}, "LlamaForCausalLM"),
    ({}, "MistralForCausalLM"),  # 6 of 8 heads are left, which do not divide a hidden size of 32
    ({"structures": ("hidden",), "round_to": 8}, "LlamaForCausalLM"),
    ({"structures": ("layers",)}, "LlamaForCausalLM"),
    ({"structures": ("ffn",), "compensation": "bias"}, "LlamaForCausalLM"),
    ({"shape": "free", "protect": {"first": 1, "last": 0}}, "RegrowForCausalLM"),
    ({"shape": "free", "allocation": "global", "compensation": "bias"}, "RegrowForCausalLM"),
]


@pytest.mark.parametrize("remote", [False, True])
def test_saved_models_load_without_regrow(
    random_model: Any, ids: torch.Tensor, tmp_path: Path, tiny_tokenizer: Any, remote: bool
):
    models: dict[Path, PreTrainedModel] = {}
    for number, (options, expected) in enumerate(SAVED):
        if (expected == "RegrowForCausalLM") != remote:
            continue
        made, folder = prune(random_model(), ids, config_of(**options)).model, tmp_path / str(number)
        assert type(made).__name__ == expected
        checkpoint.save(made, tiny_tokenizer, folder)
        assert torch.equal(checkpoint.load(folder)(input_ids=ids).logits, made(input_ids=ids).logits)
        assert checkpoint.load_tokenizer(folder)("a b")["input_ids"] == tiny_tokenizer("a b")["input_ids"]
        models[folder] = made
    loads_without_regrow(models, remote)


def test_free_shapes_of_every_other_family_load_without_regrow(random_model: Any, tiny_tokenizer: Any, tmp_path: Path):
    models: dict[Path, PreTrainedModel] = {}
    for kind, options in FAMILIES.items():
        if kind != "llama":
            dense = random_model(kind, initializer_range=0.2, **options)
            made = prune(dense, None, config_of("magnitude", shape="free", allocation="global")).model
            checkpoint.save(made, tiny_tokenizer, tmp_path / kind)
            assert checkpoint.load_tokenizer(tmp_path / kind)("a b")["input_ids"] == tiny_tokenizer("a b")["input_ids"]
            models[tmp_path / kind] = made
    assert sorted(type(model).__name__ for model in models.values()) == [
        "RegrowMistralForCausalLM", "RegrowQwen2ForCausalLM", "RegrowQwen3ForCausalLM"
    ]  # fmt: skip
    loads_without_regrow(models, remote=True)


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
    shape = Architecture.read(config.to_dict())
    assert count_parameters(model) == shape.parameters() == before
    settings = config_of(ratio=0.3, shape="free", protect={"first": first, "last": last})
    planned, _ = plan_shapes(shape, settings, after)
    assert planned[0] == shape.layers[0]
    assert planned[first] == LayerShape(kept_ffn, kept_groups, heads // groups)
    assert shape.with_layers(planned).parameters() == after


# SmolLM2-135M: d 576, 3 groups of 3 heads of 64, f 1536, tied
SMOL = Architecture.read(
    {
        "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True,
    }
)  # fmt: skip


def test_query_heads_that_cannot_be_divided_among_the_groups_are_refused():
    said = {
        "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 2,
        "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 64,
    }  # fmt: skip
    with pytest.raises(ValueError, match="num_attention_heads: 9 of layer 0 cannot be divided among num_key_value_hea"):
        Architecture.read(said)
    own = {"1": {"num_attention_heads": 7, "num_key_value_heads": 3}}
    with pytest.raises(ValueError, match="num_attention_heads: 7 of layer 1 cannot be divided"):
        Architecture.read({**said, "num_key_value_heads": 3, "per_layer_config": own})
    with pytest.raises(ValueError, match=r"config\.json has no model_type"):
        Architecture.read({name: value for name, value in said.items() if name != "model_type"})


@pytest.mark.parametrize("structures", [("ffn", "attention"), ("ffn", "heads"), ("hidden",), ("hidden", "ffn")])
@pytest.mark.parametrize("ratio", [0.05, 0.13, 0.2, 0.35, 0.5, 0.6])
def test_the_ratio_is_hit_within_half_a_percent_of_the_model(ratio: float, structures: tuple[str, ...]):
    assert SMOL.parameters() == 134_515_008
    target = round((1 - ratio) * SMOL.parameters())
    shapes, hidden = plan_shapes(SMOL, config_of(ratio=ratio, structures=structures), target)
    assert all(shape == shapes[0] for shape in shapes)
    size = shapes[0]
    attention = 2 * hidden * 64 * size.groups * (size.heads + 1)
    left = 49152 * hidden + hidden + 30 * (attention + 3 * hidden * size.ffn + 2 * hidden)
    assert 1 - left / SMOL.parameters() == pytest.approx(ratio, abs=0.005)


def test_kept_widths_are_rounded_when_asked():
    target = round(0.8 * SMOL.parameters())
    shapes, _ = plan_shapes(SMOL, config_of(round_to=256), target)
    assert shapes[0].ffn % 256 == 0
    _, hidden = plan_shapes(SMOL, config_of(structures=("hidden",), round_to=32), target)
    assert hidden % 32 == 0
    assert hidden < 576


def test_what_stays_of_a_cut_width_is_a_multiple_even_where_the_width_is_none(random_model: Any):
    widths = SMOL.with_layers([LayerShape(100, 3, 3)] * 30)
    settings = config_of(structures=("ffn",), round_to=64)
    target = widths.with_layers([LayerShape(70, 3, 3)] * 30).parameters()
    assert plan_shapes(widths, settings, target)[0] == [LayerShape(64, 3, 3)] * 30
    protected = config_of(structures=("ffn",), round_to=64, shape="free", protect={"first": 1, "last": 0})
    assert plan_shapes(widths, protected, target)[0] == [LayerShape(100, 3, 3)] + [LayerShape(64, 3, 3)] * 29
    with pytest.raises(ValueError, match=r"round_to: 128 is more than the 100 ffn channels .* set it to 100 or less"):
        plan_shapes(widths, config_of(structures=("ffn",), round_to=128), target)
    almost_whole = widths.with_layers([LayerShape(98, 3, 3)] * 30).parameters()
    with pytest.raises(ValueError, match="lower round_to"):
        plan_shapes(widths, settings, almost_whole)
    ranked = config_of("random", shape="gguf", allocation="global", structures=("ffn",), round_to=20, ratio=0.2)
    assert {layer["ffn"] % 20 for layer in prune(random_model(), None, ranked).report["layers"]} == {0}


@pytest.mark.parametrize(
    ("options", "ratio", "message"),
    [
        ({"shape": "gguf", "structures": ("ffn",)}, 0.9, "at most 0.580 can be removed with round_to: 32"),
        ({"round_to": 256, "structures": ("hidden",)}, 0.9, "the nearest is 0.556; at most 0.556 can be removed"),
        ({"round_to": 32, "structures": ("attention",)}, 0.01, "add ffn to structures"),
    ],
    ids=str,
)
def test_a_ratio_is_refused_where_rounding_keeps_it_out_of_reach(options: dict[str, Any], ratio: float, message: str):
    with pytest.raises(ValueError, match=message):
        plan_shapes(SMOL, config_of(ratio=ratio, **options), round((1 - ratio) * SMOL.parameters()))


@pytest.mark.parametrize("ratio", [0.12, 0.14, 0.16, 0.2])
def test_a_global_ranking_of_groups_ends_within_half_a_group(random_model: Any, ratio: float):
    dense = random_model()
    shape = Architecture.read(dense.config.to_dict())
    whole = shape.layers[0]
    group = shape.layer_parameters(whole) - shape.layer_parameters(replace(whole, groups=whole.groups - 1))
    settings = config_of("random", ratio=ratio, shape="free", allocation="global", structures=("attention",))
    left = prune(dense, None, settings).model.num_parameters()
    assert abs(left - (1 - ratio) * shape.parameters()) <= group / 2 + 1


def test_a_global_ranking_is_refused_where_rounding_leaves_too_much(random_model: Any):
    settings = config_of("random", ratio=0.35, shape="gguf", allocation="global", structures=("ffn",))
    said = {**random_model().config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    for attempt in (lambda: foresee(said, settings), lambda: prune(random_model(), None, settings)):
        with pytest.raises(ValueError, match=r"with one structure of each kind \(FFN channels rounded to 32\)"):
            attempt()


def test_a_global_ranking_is_refused_where_rounding_takes_too_much(random_model: Any, ids: torch.Tensor):
    settings = {"shape": "free", "allocation": "global", "structures": ("ffn",), "round_to": 64}
    for steps in (1, 2):
        with pytest.raises(ValueError, match=r"rounded to 64: \d+ parameters too many would go; lower round_to"):
            prune(random_model(intermediate_size=100), ids, config_of("random", ratio=0.01, steps=steps, **settings))


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


@pytest.mark.parametrize(("ratio", "gone"), [(0.2, {3, 4}), (0.4, {3, 4, 0}), (0.6, {3, 4, 0, 1})])
def test_whole_layers_that_are_unlike_go_until_the_ratio_is_nearest(ratio: float, gone: set[int]):
    layers = {index: {"intermediate_size": 400 if index < 3 else 37} for index in range(5)}
    model = RegrowForCausalLM(RegrowConfig(**SMALL, num_hidden_layers=5, per_layer_config=layers))
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(model)):
            layer.mlp.up_proj.weight.fill_(index if index < 3 else 0)  # the small ones have the lowest scores
    # 44,608 parameters in each of the first three layers, 9,760 in each of the others, of 157,472
    result = prune(model, None, config_of("magnitude", ratio=ratio, structures=("layers",), shape="free"))
    assert {*range(5)} - {layer.index for layer in result.kept.layers} == gone


@pytest.mark.parametrize(
    "options",
    [{}, {"structures": ("layers",), "ratio": 0.3}, {"depth": {"layers": 1}, "ratio": 0.4}, {"shape": "vllm"}],
    ids=str,
)
def test_layers_that_differ_already_are_no_uniform_model(ids: torch.Tensor, options: dict[str, Any]):
    said = {**SMALL, "num_hidden_layers": 4, "intermediate_size": 48}
    other = {"num_key_value_heads": 2} if "shape" in options else {"intermediate_size": 40}
    model = RegrowForCausalLM(RegrowConfig(**said, per_layer_config={1: other}))
    settings = config_of("magnitude", **options)
    entries = {**model.config.to_dict(), "architectures": ["RegrowForCausalLM"]}
    for attempt in (lambda: foresee(entries, settings), lambda: prune(model, ids % 64, settings)):
        with pytest.raises(ValueError, match=r"shape: \w+: the layers have 2 different .* set shape: free"):
            attempt()
    prune(model, ids % 64, settings.model_copy(update={"shape": "free"}))


def sizes(kind: str) -> list[int]:
    return {"hidden": [32], "layers": [4], "ffn": [48] * 4, "attention": [4] * 4, "heads": [8] * 4}[kind]


def can_score(method: str, kind: str) -> bool:
    """Whole-model kinds need sums over all coupled weights; depth methods know layers only."""
    if method in ("block_influence", "shortened"):
        return kind == "layers"
    return method in ("random", "magnitude", "llm_pruner") or kind in ("ffn", "attention", "heads")


@pytest.mark.parametrize("method", criteria.names())
@pytest.mark.parametrize("kind", ["ffn", "attention", "heads", "hidden", "layers"])
def test_every_criterion_scores_each_structure_and_repeats_itself(
    random_model: Any, ids: torch.Tensor, method: str, kind: str, tmp_path: Path
):
    module = criteria.load(method)
    options = {"protect": {"first": 0, "last": 0}, "ratio": 0.18} if kind == "layers" else {"round_to": 8}
    options |= {"structures": (kind, "ffn") if kind in ("attention", "heads") else (kind,), "compensation": "none"}
    if not can_score(method, kind):
        with pytest.raises(ValidationError, match="structures"):
            config_of(method, **options)
        return
    config = config_of(method, **options)
    results = [prune(random_model(), ids, config) for _ in range(2)]
    assert results[0].kept == results[1].kept
    found = measure(random_model(), ids, module.statistics(config), lambda done, total, note: None)
    scores = module.scores(random_model(), found, config)
    assert [len(values) for values in scores[kind]] == sizes(kind)
    assert all(values.isfinite().all() for values in scores[kind])
    report = results[0].report
    assert report["parameters_after"] == count_parameters(results[0].model)
    checkpoint.save(results[0].model, None, tmp_path / "model")
    saved = checkpoint.load(tmp_path / "model")
    assert torch.equal(saved(input_ids=ids).logits, results[0].model(input_ids=ids).logits)
    assert module.__doc__
    assert isinstance(module.VERSION, int)


def test_structures_are_written_in_the_original_numbering(random_model: Any, ids: torch.Tensor, tmp_path: Path):
    result = prune(random_model(), ids, config_of("random", depth={"layers": 2}, ratio=0.5))
    checkpoint.write_structures(tmp_path, result.kept, result.original)
    said = json.loads((tmp_path / "structures.json").read_text())
    assert said["of_layers"] == 4
    assert said["hidden"] == {"of": 32, "kept": list(range(32))}
    assert [layer["layer"] for layer in said["layers"]] == [keep.index for keep in result.kept.layers]
    layer = said["layers"][1]
    assert layer["ffn"] == {"of": 48, "kept": sorted(set(result.kept.layers[1].ffn))}
    assert layer["heads"]["of"] == 8
    assert [head // 2 for head in layer["heads"]["kept"][::2]] == layer["attention"]["kept"]


@pytest.mark.parametrize(
    ("shape", "options", "steps"),
    [
        ({}, {"ratio": 0.3}, 3),
        # A step that takes two of three groups at once would need FFN channels that are cut already.
        ({"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 192},
         {"ratio": 0.15}, 4),
        ({}, {"structures": ("attention",)}, 2),  # one group, of which no step can take half
        ({}, {"structures": ("attention",), "shape": "free", "allocation": "global"}, 9),
        ({}, {"ratio": 0.4, "method": "flap"}, 2),  # by way of 6 heads with biases, which no stock class takes
    ],
    ids=str,
)  # fmt: skip
def test_several_steps_end_where_one_would(
    random_model: Any, ids: torch.Tensor, shape: dict[str, Any], options: dict[str, Any], steps: int
):
    options = {"ratio": removed(random_model(**shape), groups=1), **options}
    one, more = (prune(random_model(**shape), ids, config_of(steps=number, **options)) for number in (1, steps))
    assert one.report["ratio_reached"] == more.report["ratio_reached"] == pytest.approx(options["ratio"], abs=0.005)
    assert one.report["layers"] == more.report["layers"] or options.get("allocation") == "global"


def test_several_steps_need_text_only_where_something_is_measured(random_model: Any):
    settings = config_of("magnitude", steps=2)
    assert not settings.runs_on_text
    assert prune(random_model(), None, settings).report["ratio_reached"] == pytest.approx(0.2, abs=0.005)
    for options in ({"compensation": "bias"}, {"compensation": "least_squares"}, {"depth": {"layers": 1}}):
        assert config_of("magnitude", steps=2, **options).runs_on_text


@pytest.mark.parametrize("structures", [("ffn", "attention"), ("ffn", "heads"), ("hidden", "ffn")])
def test_no_step_plans_what_an_earlier_one_has_cut(structures: tuple[str, ...]):
    whole, config = SMOL.parameters(), config_of(structures=structures)
    for ratio, steps in ((0.15, 4), (0.2, 8), (0.3, 5), (0.5, 8)):
        final, now = round((1 - ratio) * whole), SMOL
        for step in range(steps):
            target = whole - round((whole - final) * (step + 1) / steps)
            layers, hidden = plan_step(SMOL, now, config, target, final)
            assert hidden <= now.hidden
            assert layers[0].ffn <= now.layers[0].ffn
            assert layers[0].groups * layers[0].heads <= now.layers[0].groups * now.layers[0].heads
            now = SMOL.with_layers(layers, hidden)
        assert (list(now.layers), now.hidden) == plan_shapes(SMOL, config, final)


@pytest.mark.parametrize(
    "options",
    [
        {"structures": ("ffn",)},
        {"structures": ("ffn",), "steps": 3},
        {"structures": ("ffn",), "depth": {"layers": 1}, "ratio": 0.3},
        {"structures": ("ffn",), "allocation": "global", "shape": "free"},
        {"structures": ("ffn",), "allocation": "global", "shape": "free", "steps": 2},
    ],
    ids=str,
)
def test_added_biases_count_in_the_ratio(random_model: Any, ids: torch.Tensor, options: dict[str, Any]):
    report = prune(random_model(), ids, config_of("wanda", compensation="bias", **options)).report
    assert report["ratio_reached"] == pytest.approx(options.get("ratio", 0.2), abs=0.005)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.2}, "less than 1"),
        ({"protect": {"first": 4, "last": 2}}, "set shape: free"),
        ({"allocation": "global"}, "set shape: free"),
        ({"structures": ("layers", "ffn")}, r"set depth: \{layers: N\}"),
        ({"structures": ("heads",), "allocation": "global", "shape": "free"}, "not heads"),
        ({"structures": ("layers",), "steps": 2}, "one step"),
        ({"structures": ("layers",), "compensation": "bias"}, "remove none"),
        ({"structures": ("hidden",), "taylor": "param_mix"}, "param_first or vectorize"),
        ({"structures": ("hidden",), "shape": "free", "protect": {"last": 1}}, "protect: hidden channels go"),
        ({"structures": ("hidden",), "shape": "free", "allocation": (1, 2)}, "allocation: hidden channels go"),
        ({"method": "wanda", "structures": ("hidden",)}, "structures"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        config_of(**{"method": "llm_pruner", **options})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"ratio": 0.95}, r"ratio: 0.95 cannot be reached .* at most 0\.\d+ can be removed"),
        ("llama", {"ratio": 0.02, "structures": ("attention",)}, "add ffn to structures"),
        ("llama", {"shape": "free", "protect": {"first": 2, "last": 2}}, "leave none of 4 layers"),
        ("llama", {"shape": "free", "allocation": (1, 1)}, "2 shares for a model of 4 layers"),
        ("llama", {"shape": "free", "structures": ("ffn",), "allocation": (9, 1, 1, 1)}, "would leave layer 0 empty"),
        ("llama", {"compensation": "bias"}, "6 heads do not divide 32"),
        ("qwen2", {"compensation": "bias"}, "no bias on o_proj and down_proj"),
        ("mistral", {"compensation": "bias", "shape": "free", "allocation": "global"}, "no bias on o_proj"),
        ("qwen3", {"shape": "vllm", "structures": ("ffn",), "allocation": "global"}, "set shape: free, or uniform"),
        ("llama", {"ratio": 0.9, "shape": "free", "allocation": "global"}, "would leave layers empty"),
        ("llama", {"depth": {"layers": 4}}, "one has to stay"),
        ("llama", {"depth": {"layers": 3}}, r"depth: layers: 3 takes \d+\.\d% of the parameters, more than ratio: 0.2"),
        ("llama", {"structures": ("layers",), "ratio": 0.9}, "of 4 layers cannot go"),
        ("llama", {"structures": ("layers",), "ratio": 0.01}, "less than half a layer"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_foreseen_from_the_config_and_refused_by_the_cut(
    random_model: Any, ids: torch.Tensor, kind: str, options: dict[str, Any], message: str
):
    model, settings = random_model(kind), config_of(**options)
    before = model(input_ids=ids).logits
    with pytest.raises(ValueError, match=message):
        foresee({**model.config.to_dict(), "architectures": [type(model).__name__]}, settings)
    with pytest.raises(ValueError, match=message):
        prune(model, ids, settings)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_what_only_the_weights_show_is_refused_with_nothing_cut(random_model: Any, ids: torch.Tensor):
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not served"):
        prune(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)), ids, config_of())
    with pytest.raises(ValueError, match="would leave layers empty"):
        prune(random_model(), None, config_of("random", ratio=0.9, shape="free", allocation="global"))
    for method in ("llm_pruner", "wanda"):
        model = random_model()
        with torch.no_grad():
            model.get_decoder().layers[1].mlp.up_proj.weight[3, 3] = torch.nan
        with pytest.raises(ValueError, match=r"numbers of layers\.\d.* are not finite; nothing was cut"):
            prune(model, ids, config_of(method))
        assert model.get_decoder().layers[0].mlp.up_proj.out_features == 48
    with pytest.raises(ValueError, match="needs calibration tokens"):
        prune(random_model(), None, config_of())
    with pytest.raises(ValueError, match="length >= 2"):
        prune(random_model(), ids[:, :1], config_of())


def test_norms_of_cut_hidden_channels_are_rescaled(random_model: Any, ids: torch.Tensor):
    dense = random_model()
    result = prune(random_model(), ids, config_of(structures=("hidden",)))
    width = result.model.config.hidden_size
    scale = (32 / width) ** 0.5
    for name in NORMS:
        norm = result.model.get_decoder().layers[0].get_submodule(name)
        before = dense.get_decoder().layers[0].get_submodule(name).weight
        torch.testing.assert_close(norm.weight, before[result.kept.hidden] * scale)
        assert norm.variance_epsilon == pytest.approx(dense.config.rms_norm_eps * 32 / width)
