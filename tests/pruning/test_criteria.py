"""Every criterion's scores against its formula, worked out on stored activations and plain autograd with loops."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pruning import criteria
from pruning.criteria.hywia import fuse
from pruning.statistics import measure
from pruning.structures import Scores

IDS = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(1))


def scores_of(model: LlamaForCausalLM, method: str, **options: Any) -> Scores:
    module = criteria.load(method)
    config = module.Config(ratio=0.2, **options)
    found = measure(model, IDS, module.statistics(config), lambda done, total, note: None)
    return module.scores(model, found, config)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss_of(model, ids), parameters), strict=True))


def inputs_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The inputs of every o_proj and down_proj, [tokens, in]."""
    stored: dict[str, torch.Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):
        for name, module in ((f"{index}.o", layer.self_attn.o_proj), (f"{index}.down", layer.mlp.down_proj)):
            hooks.append(
                module.register_forward_hook(
                    lambda m, i, o, name=name: stored.update({name: i[0].detach().flatten(0, 1).double()})
                )
            )
    model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return stored


def saliences(model: LlamaForCausalLM, taylor: str) -> dict[str, torch.Tensor]:
    """The salience of every weight, all gradients alive."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    g = gradients(model, IDS)
    each = [gradients(model, IDS[n : n + 1]) for n in range(len(IDS))]
    found = {}
    for name, w in weights.items():
        h = sum(one[name] ** 2 for one in each) / len(each)
        first, second = w * g[name], w * h * w
        found[name] = {"param_second": second, "param_mix": first - 0.5 * second}.get(taylor, first)
    return found


@pytest.mark.parametrize("taylor", ["vectorize", "param_first", "param_second", "param_mix"])
def test_taylor_scores_are_the_papers_formula(tiny_model: LlamaForCausalLM, taylor: str):
    s = saliences(tiny_model, taylor)

    def channel(values: torch.Tensor) -> float:
        return float(values.sum().abs() if taylor == "vectorize" else values.abs().sum())

    found = scores_of(tiny_model, "llm_pruner", taylor=taylor, structures=("ffn", "attention"))
    heads = scores_of(tiny_model, "llm_pruner", taylor=taylor, structures=("heads",))["heads"]
    for layer in range(2):
        gate, up, down = (s[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        q, k, v, o = (s[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo")
        ffn = [channel(gate[j]) + channel(up[j]) + channel(down[:, j]) for j in range(48)]
        query = [sum(channel(q[i]) + channel(o[:, i]) for i in range(h * 8, h * 8 + 8)) for h in range(4)]
        groups = []
        for j in range(2):
            key = sum(channel(k[i]) + channel(v[i]) for i in range(j * 8, j * 8 + 8))
            groups.append(key + query[2 * j] + query[2 * j + 1])  # the contiguous query heads of group j
        for kind, want in (("ffn", ffn), ("attention", groups)):
            torch.testing.assert_close(found[kind][layer], torch.tensor(want), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(heads[layer], torch.tensor(query), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("taylor", ["vectorize", "param_first"])
def test_hidden_channels_collect_all_that_they_touch(tiny_model: LlamaForCausalLM, taylor: str, tied: bool):
    if tied:
        tiny_model.lm_head.weight = tiny_model.model.embed_tokens.weight
        tiny_model.config.tie_word_embeddings = True
    want = torch.zeros(32)
    for name, s in saliences(tiny_model, taylor).items():
        by_channel = s[None] if s.ndim == 1 else s.T if name.endswith(("o_proj.weight", "down_proj.weight")) else s
        want += by_channel.sum(0).abs() if taylor == "vectorize" else by_channel.abs().sum(0)
    (found,) = scores_of(tiny_model, "llm_pruner", taylor=taylor, structures=("hidden",))["hidden"]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-8)


def test_several_batches_give_the_gradient_of_the_whole_mean(
    tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    whole = scores_of(tiny_model, "llm_pruner", structures=("hidden", "ffn"))
    monkeypatch.setattr("pruning.statistics.BATCH_TOKENS", 12)
    split = scores_of(tiny_model, "llm_pruner", structures=("hidden", "ffn"))
    for kind, tensors in whole.items():
        for one, other in zip(tensors, split[kind], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_measuring_leaves_the_model_as_it_was(tiny_model: LlamaForCausalLM):
    before = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    for method in criteria.names():
        scores_of(tiny_model, method, **({"protect": {"first": 0, "last": 0}} if method == "shortened" else {}))
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_wanda_is_its_formula_on_stored_inputs(tiny_model: LlamaForCausalLM):
    stored, found = inputs_of(tiny_model), scores_of(tiny_model, "wanda")
    for index, layer in enumerate(tiny_model.model.layers):
        feature = {}
        for name, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
            norm = (stored[f"{index}.{name}"] ** 2).mean(0).sqrt()
            feature[name] = module.weight.detach().abs().mean(0).double() * norm
        groups = torch.stack([feature["o"][j * 16 : j * 16 + 16].sum() for j in range(2)])
        torch.testing.assert_close(found["ffn"][index].double(), feature["down"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found["attention"][index].double(), groups, rtol=1e-5, atol=0)


@pytest.mark.parametrize("metric", ["WIFV", "IFV", "WIFN"])
def test_flap_is_its_formula_on_stored_inputs(tiny_model: LlamaForCausalLM, metric: str):
    stored, found = inputs_of(tiny_model), scores_of(tiny_model, "flap", metric=metric, shape="free")
    for index, layer in enumerate(tiny_model.model.layers):
        feature = {}
        for name, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
            x, w = stored[f"{index}.{name}"], module.weight.detach().double()
            variance = ((x - x.mean(0)) ** 2).mean(0)
            s = {"WIFV": variance * (w**2).sum(0), "IFV": variance}.get(metric, w.abs().mean(0) * (x**2).mean(0).sqrt())
            s = s**2 if name == "o" else s
            feature[name] = (s - s.mean()) / s.std()
        groups = torch.stack([feature["o"][j * 16 : j * 16 + 16].mean() for j in range(2)])
        torch.testing.assert_close(found["ffn"][index].double(), feature["down"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found["attention"][index].double(), groups, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_magnitude(tiny_model: LlamaForCausalLM, norm: str):
    coupled = scores_of(tiny_model, "magnitude", norm=norm)
    output = scores_of(tiny_model, "magnitude", norm=norm, tensors="output")
    mlp, attention = tiny_model.model.layers[1].mlp, tiny_model.model.layers[1].self_attn
    p = 1 if norm == "l1" else 2
    j = 7
    parts = (mlp.gate_proj.weight[j], mlp.up_proj.weight[j], mlp.down_proj.weight[:, j])
    assert float(coupled["ffn"][1][j]) == pytest.approx(
        sum(float((w.detach().abs() ** p).sum()) for w in parts), rel=1e-5
    )
    assert float(output["ffn"][1][j]) == pytest.approx(float(mlp.down_proj.weight[:, j].detach().norm(p)), rel=1e-5)
    group = sum(float(attention.o_proj.weight[:, i].detach().norm(p)) for i in range(16, 32))
    assert float(output["attention"][1][1]) == pytest.approx(group, rel=1e-5)


def test_block_influence_is_one_minus_the_mean_cosine(tiny_model: LlamaForCausalLM):
    with torch.no_grad():
        states = tiny_model.model(input_ids=IDS, output_hidden_states=True).hidden_states
    (found,) = scores_of(tiny_model, "block_influence")["layers"]
    # transformers' last hidden state is the one after the final norm; before it, it is the second layer's output.
    outputs: list[torch.Tensor] = []
    hook = tiny_model.model.layers[1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        tiny_model.model(input_ids=IDS)
    hook.remove()
    assert len(found) == 2
    for index, (x, y) in enumerate(((states[0], states[1]), (states[1], outputs[0]))):
        tokens = zip(x.reshape(-1, 32), y.reshape(-1, 32), strict=True)
        want = 1 - sum(float(a @ b / (a.norm() * b.norm())) for a, b in tokens) / 36
        assert float(found[index]) == pytest.approx(want, abs=1e-5)


def test_shortened_orders_layers_by_the_loss_without_each(tiny_model: LlamaForCausalLM):
    options = {"protect": {"first": 0, "last": 0}}
    (found,) = scores_of(tiny_model, "shortened", **options)["layers"]
    layers = tiny_model.model.layers
    for missing in range(2):
        tiny_model.model.layers = torch.nn.ModuleList(layer for n, layer in enumerate(layers) if n != missing)
        assert float(found[missing]) == pytest.approx(float(loss_of(tiny_model, IDS)), rel=1e-5)
    tiny_model.model.layers = layers
    (found,) = scores_of(tiny_model, "shortened", order="taylor", **options)["layers"]
    g = gradients(tiny_model, IDS)
    want = sum(
        float((p * g[name]).abs().sum())
        for name, p in tiny_model.named_parameters()
        if name.startswith("model.layers.1.") and name.endswith("_proj.weight")
    )
    assert float(found[1]) == pytest.approx(want, rel=1e-4)


def test_hywia_is_listed_as_our_construction():
    assert "our construction" in (criteria.load("hywia").__doc__ or "").splitlines()[0]


def test_hywia_fuses_fine_and_coarse():
    fine, coarse = torch.rand(40, dtype=torch.double) + 0.1, torch.rand(40, dtype=torch.double) + 0.1

    def standardised(x: torch.Tensor) -> torch.Tensor:
        return (x.log() - x.log().mean()) / x.log().std(correction=0)

    u, v = standardised(fine), standardised(coarse)
    i = 11
    c = float(u[i] + v[i]) / 2
    a, b = math.exp(c * float(u[i])), math.exp(c * float(v[i]))
    want = (a * float(u[i]) + b * float(v[i])) / (a + b)
    assert float(fuse(fine, coarse, 1.0)[i]) == pytest.approx(want, abs=1e-5)
    torch.testing.assert_close(fuse(fine, coarse, 1e9).double(), (u + v) / 2, rtol=0, atol=1e-6)
    assert fuse(fine, fine, 1.0).argsort().tolist() == fine.argsort().tolist()
    order = torch.randperm(40)
    torch.testing.assert_close(fuse(fine[order], coarse[order], 1.0), fuse(fine, coarse, 1.0)[order])


def test_hywia_scores_come_from_the_taylor_sums(tiny_model: LlamaForCausalLM):
    kinds = ("ffn", "attention", "heads")
    fine = scores_of(tiny_model, "llm_pruner", taylor="param_mix", structures=kinds)
    found = scores_of(tiny_model, "hywia", structures=kinds)
    layer, g, size = tiny_model.model.layers[1], gradients(tiny_model, IDS), tiny_model.config.head_dim

    def parts(name: str, rows: int, along: int) -> list[float]:
        """|sum of w g| over each block of so many rows (or columns), with both signs in one sum."""
        salience = layer.get_submodule(name).weight.detach() * g[f"model.layers.1.{name}.weight"]
        return [float(block.sum().abs()) for block in salience.split(rows, dim=along)]

    q, k, v, o = (f"self_attn.{letter}_proj" for letter in "qkvo")
    shared = 2 * size  # two query heads read one group
    tensors = {
        "ffn": (("mlp.gate_proj", 1, 0), ("mlp.up_proj", 1, 0), ("mlp.down_proj", 1, 1)),
        "attention": ((q, shared, 0), (o, shared, 1), (k, size, 0), (v, size, 0)),
        "heads": ((q, size, 0), (o, size, 1)),
    }
    for kind in kinds:
        coarse = torch.tensor([parts(*each) for each in tensors[kind]]).sum(0)
        torch.testing.assert_close(found[kind][1], fuse(fine[kind][1], coarse, 1.0), rtol=1e-3, atol=1e-3)
