"""Compensation against numpy's least squares on stored activations, and FLAP's bias by hand."""

import copy
from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedModel

from pruning import compensation, criteria
from pruning.compensation import RIDGES, solve
from pruning.prune import PruneResult, prune
from pruning.statistics import measure
from pruning.structures import architecture


def pruned(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> PruneResult:
    return prune(model, ids, criteria.load("wanda").Config(ratio=0.15, **options))


def inputs_of(model: PreTrainedModel, ids: torch.Tensor, index: int, name: str) -> numpy.ndarray:
    stored: list[torch.Tensor] = []
    linear = model.get_decoder().layers[index].get_submodule(name)
    hook = linear.register_forward_hook(lambda module, inputs, output: stored.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return stored[0].flatten(0, 1).double().numpy()


def test_the_solution_is_numpys_least_squares_pulled_to_the_old_weights():
    random = numpy.random.default_rng(0)
    x, y, old = random.normal(size=(50, 6)), random.normal(size=(50, 4)), random.normal(size=(4, 6))
    pull = 0.1 * (x**2).sum(0).mean()
    rows = numpy.concatenate([x, numpy.sqrt(pull) * numpy.eye(6)])
    want = numpy.linalg.lstsq(rows, numpy.concatenate([y, numpy.sqrt(pull) * old.T]), rcond=None)[0].T
    found = solve(torch.tensor(x.T @ x), torch.tensor(y.T @ x), torch.tensor(old), 0.1)
    numpy.testing.assert_allclose(found.numpy(), want, rtol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("name", "norm"),
    [("self_attn.o_proj", "input_layernorm"), ("mlp.down_proj", "post_attention_layernorm")],
)
@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_refitted_weights_reproduce_the_dense_outputs_on_pruned_inputs(
    random_model: Any, ids: torch.Tensor, kind: str, name: str, norm: str, drift: float
):
    dense = random_model(kind)
    plain = pruned(random_model(kind), ids)
    refitted = pruned(random_model(kind), ids, compensation={"method": "least_squares", "ridge": 0.05, "drift": drift})
    assert plain.kept == refitted.kept
    for index in (0, 2):  # layer 2 sees inputs that layers 0 and 1 have changed, refitted ones
        x, seen = inputs_of(dense, ids, index, name), inputs_of(refitted.model, ids, index, name)
        y = x @ dense.get_decoder().layers[index].get_submodule(name).weight.detach().double().numpy().T
        # What enters the norm is the residual stream that this projection will add to.
        y = y + drift * (inputs_of(dense, ids, index, norm) - inputs_of(refitted.model, ids, index, norm))
        old = plain.model.get_decoder().layers[index].get_submodule(name).weight.detach().double().numpy()
        pull = 0.05 * (seen**2).sum(0).mean()
        rows = numpy.concatenate([seen, numpy.sqrt(pull) * numpy.eye(seen.shape[1])])
        want = numpy.linalg.lstsq(rows, numpy.concatenate([y, numpy.sqrt(pull) * old.T]), rcond=None)[0].T
        found = refitted.model.get_decoder().layers[index].get_submodule(name).weight.detach().double().numpy()
        numpy.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-5)
        assert ((y - seen @ found.T) ** 2).sum() <= ((y - seen @ old.T) ** 2).sum()


def test_the_ridge_is_the_one_that_serves_windows_it_was_not_fitted_to(monkeypatch: pytest.MonkeyPatch):
    random = torch.Generator().manual_seed(0)
    x, noise = torch.randn(8, 5, 6, generator=random), 3 * torch.randn(8, 5, 3, generator=random)
    linear = torch.nn.Linear(6, 3, bias=False).requires_grad_(False)
    old = linear.weight.clone()
    y = x @ old.T + noise  # nothing is wrong with the old weights: what can be fitted is noise
    errors = {}
    for ridge in RIDGES:
        fit, judge = [n for n in range(8) if n % 4 != 3], [3, 7]
        rows, pull = x[fit].flatten(0, 1).double(), ridge * float(x[fit].double().square().sum((0, 1)).mean())
        stacked = numpy.concatenate([rows, numpy.sqrt(pull) * numpy.eye(6)])
        wanted = numpy.concatenate([y[fit].flatten(0, 1), numpy.sqrt(pull) * old.T.numpy()])
        weight = numpy.linalg.lstsq(stacked, wanted, rcond=None)[0]
        errors[ridge] = float(((y[judge].numpy() - x[judge].numpy() @ weight) ** 2).sum())
    best = min(errors, key=errors.__getitem__)
    assert best != min(RIDGES)
    chosen: list[float] = []
    monkeypatch.setattr(compensation, "solve", lambda *a: (chosen.append(a[3]) if len(a) == 4 else None, solve(*a))[1])
    compensation._fit(linear, list(x.split(3)), list(y.split(3)), "auto")
    assert chosen == [best]


def test_a_ridge_that_is_too_small_is_named_with_its_projection(random_model: Any, ids: torch.Tensor):
    with pytest.raises(ValueError, match=r"ridge: 1e-12 is too small .* layers\.0\.\w+\.\w+; raise it"):
        pruned(random_model(), ids[:, :4], compensation={"method": "least_squares", "ridge": 1e-12})


def test_few_windows_cannot_judge_a_ridge(random_model: Any, ids: torch.Tensor):
    with pytest.raises(ValueError, match="there are only 3; raise samples, or give ridge a number"):
        pruned(random_model(), ids, compensation="least_squares")


@pytest.mark.parametrize(("name", "layer"), [("self_attn.v_proj", 0), ("mlp.up_proj", 2)])
def test_activations_that_are_not_finite_are_named_before_their_layer_is_cut(
    random_model: Any, ids: torch.Tensor, name: str, layer: int
):
    model = random_model()
    broken = model.get_decoder().layers[layer].get_submodule(name)
    with torch.no_grad():
        broken.weight[3, 3] = torch.nan
    config = criteria.load("random").Config(ratio=0.15, compensation={"method": "least_squares", "ridge": 0.1})
    writer = "self_attn.o_proj" if name.startswith("self_attn") else "mlp.down_proj"
    with pytest.raises(
        ValueError, match=rf"activations of layers\.{layer}\.{writer} are not finite; nothing was saved"
    ):
        prune(model, ids, config)
    assert broken.out_features == random_model().get_decoder().layers[layer].get_submodule(name).out_features


@pytest.mark.parametrize("structures", [("ffn",), ("hidden",), ("layers",)])
def test_least_squares_brings_the_logits_nearer_to_the_dense_ones(
    random_model: Any, ids: torch.Tensor, structures: tuple[str, ...]
):
    with torch.no_grad():
        dense = random_model()(input_ids=ids).logits
        distance = {}
        for method in ("none", "least_squares"):
            said = {"method": method, "ridge": 0.01}
            config = criteria.load("magnitude").Config(ratio=0.2, structures=structures, compensation=said)
            result = prune(random_model(), ids, config)
            distance[method] = float((result.model(input_ids=ids).logits - dense).norm())
    assert distance["least_squares"] < distance["none"]


@pytest.mark.parametrize("structures", [("ffn",), ("attention", "ffn"), ("heads", "ffn")])
def test_the_bias_is_the_removed_inputs_mean_contribution(
    random_model: Any, ids: torch.Tensor, structures: tuple[str, ...]
):
    dense = random_model()
    result = pruned(random_model(), ids, structures=structures, shape="free", compensation="bias")
    if structures != ("ffn",):
        assert len(result.kept.layers[0].heads) < 8
    for index, keep in enumerate(result.kept.layers):
        layer = result.model.get_decoder().layers[index]
        kept = {
            "self_attn.o_proj": [head * 8 + i for head in keep.heads for i in range(8)],
            "mlp.down_proj": keep.ffn,
        }
        for name, columns in kept.items():
            weight = dense.get_decoder().layers[index].get_submodule(name).weight.detach().double().numpy()
            mean = inputs_of(dense, ids, index, name).mean(0)
            gone = sorted(set(range(weight.shape[1])) - set(columns))
            found = layer.get_submodule(name)
            numpy.testing.assert_allclose(found.bias.detach().numpy(), weight[:, gone] @ mean[gone], atol=1e-6)
            numpy.testing.assert_array_equal(found.weight.detach().numpy(), weight[:, columns].astype("float32"))
        assert not layer.mlp.up_proj.bias.any()
    assert result.model.config.mlp_bias
    assert result.report["parameters_after"] == sum(p.numel() for p in result.model.parameters())


@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_several_steps_compensate_each_cut_on_what_the_one_before_left(
    random_model: Any, ids: torch.Tensor, method: str
):
    said = {"method": method, "ridge": 0.05}
    options = {"structures": ("ffn",), "shape": "free", "compensation": said}
    together = prune(random_model(), ids, criteria.load("wanda").Config(ratio=0.2, steps=2, **options))
    dense = architecture(random_model())
    start = dense.with_biases() if method == "bias" else dense
    half = 1 - (start.parameters() + 0.8 * dense.parameters()) / 2 / dense.parameters()
    first = prune(random_model(), ids, criteria.load("wanda").Config(ratio=half, **options))
    left = together.report["parameters_after"] / first.report["parameters_after"]
    second = prune(first.model, ids, criteria.load("wanda").Config(ratio=1 - left, **options))
    assert second.report["layers"] == together.report["layers"]
    for index, (whole, keep) in enumerate(zip(together.kept.layers, second.kept.layers, strict=True)):
        assert whole.ffn == [first.kept.layers[index].ffn[unit] for unit in keep.ffn]
    for name, weight in together.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_statistics_are_measured_once_and_other_text_serves_the_compensation(random_model: Any, ids: torch.Tensor):
    config = criteria.load("wanda").Config(ratio=0.15, compensation={"method": "least_squares", "ridge": 0.1})
    other = torch.randint(4, 200, (5, 20), generator=torch.Generator().manual_seed(2))
    model = random_model()
    found = measure(model, ids, criteria.statistics(config), lambda done, total, note: None)
    before = copy.deepcopy(found)
    with_other = prune(model, ids, config, found, other)
    again = prune(random_model(), ids, config, found)
    assert with_other.kept == again.kept
    weights = [r.model.get_decoder().layers[0].mlp.down_proj.weight for r in (with_other, again)]
    assert not torch.equal(*weights)
    assert all(torch.equal(before[name], found[name]) for name in found)
