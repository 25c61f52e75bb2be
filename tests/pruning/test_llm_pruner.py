"""Scores against LLM-Pruner's formula worked out with plain autograd: all gradients alive, loops over heads."""

import pytest
import torch
from transformers import LlamaForCausalLM

from pruning.criteria import llm_pruner

IDS = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss_of(model, ids), parameters), strict=True))


def reference(model: LlamaForCausalLM, taylor: str) -> list[dict[str, list[float]]]:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    g = gradients(model, IDS)
    each = [gradients(model, IDS[n : n + 1]) for n in range(len(IDS))]
    h = {name: sum(one[name] ** 2 for one in each) / len(each) for name in g}
    found = []
    for layer in range(2):

        def salience(name: str, layer: int = layer) -> torch.Tensor:
            key = f"model.layers.{layer}.{name}.weight"
            w = weights[key]
            first, second = w * g[key], w * h[key] * w
            return {"param_second": second, "param_mix": first - 0.5 * second}.get(taylor, first)

        def channel(values: torch.Tensor) -> float:
            return float(values.sum().abs() if taylor == "vectorize" else values.abs().sum())

        gate, up, down = (salience(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
        ffn = [channel(gate[j]) + channel(up[j]) + channel(down[:, j]) for j in range(48)]
        q, k, v, o = (salience(f"self_attn.{name}_proj") for name in "qkvo")
        groups = []
        for j in range(2):
            total = sum(channel(k[i]) + channel(v[i]) for i in range(j * 8, j * 8 + 8))
            for head in (2 * j, 2 * j + 1):  # the contiguous block of query heads of group j
                total += sum(channel(q[i]) + channel(o[:, i]) for i in range(head * 8, head * 8 + 8))
            groups.append(total)
        found.append({"ffn": ffn, "attention": groups})
    return found


@pytest.mark.parametrize("taylor", ["vectorize", "param_first", "param_second", "param_mix"])
def test_scores_are_the_papers_formula(tiny_model: LlamaForCausalLM, taylor: str):
    expected = reference(tiny_model, taylor)
    config = llm_pruner.Config(ratio=0.2, taylor=taylor)
    found = llm_pruner.scores(tiny_model, IDS, config, lambda done, total, note: None)
    for layer, want in zip(found, expected, strict=True):
        for kind in ("ffn", "attention"):
            torch.testing.assert_close(layer[kind], torch.tensor(want[kind]), rtol=1e-4, atol=1e-8)


def test_scoring_leaves_the_model_as_it_was(tiny_model: LlamaForCausalLM):
    before = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    llm_pruner.scores(tiny_model, IDS, llm_pruner.Config(ratio=0.2), lambda done, total, note: None)
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad
