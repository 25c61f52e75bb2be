from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from pruning import criteria, placement
from pruning.placement import place, visits
from pruning.prune import prune
from pruning.structures import decoder_layers


@pytest.mark.parametrize(
    "options",
    [
        {"method": "llm_pruner", "structures": ("hidden", "ffn")},
        {"method": "llm_pruner", "steps": 2},
        {
            "method": "wanda",
            "structures": ("ffn",),
            "compensation": {"method": "least_squares", "ridge": 0.1},
            "depth": {"layers": 1},
        },
        {"method": "flap", "shape": "free", "allocation": "global"},
        {"method": "shortened", "protect": {"first": 0, "last": 0}},
    ],
    ids=str,
)
def test_layers_that_visit_the_device_are_pruned_as_layers_that_live_there(
    random_model: Any, ids: torch.Tensor, options: dict[str, Any]
):
    config = criteria.load(options["method"]).Config(ratio=0.3, **options)
    expected = prune(random_model(), ids, config)
    entered: list[int] = []
    model = place(random_model(), "offload", "cpu")
    for index, layer in enumerate(decoder_layers(model)):
        assert visits(layer)
        layer.register_forward_pre_hook(lambda module, inputs, index=index: entered.append(index))
    found = prune(model, ids, config, again=lambda cut: place(cut, "offload", "cpu"))
    assert set(entered) == {0, 1, 2, 3}
    assert found.kept == expected.kept
    assert not any(visits(layer) for layer in decoder_layers(found.model))
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight), name


def test_a_layer_leaves_when_another_one_runs(random_model: Any, ids: torch.Tensor):
    # The `meta` device stands for a GPU: what visits it loses its numbers, but shows where it is.
    model = place(random_model(), "offload", "meta")
    layers = decoder_layers(model)
    assert model.get_input_embeddings().weight.is_meta
    hooks = [layer._hf_hook for layer in layers]
    assert [hook.prev_module_hook.model for hook in hooks] == [layers[-1], *layers[:-1]]
    assert all(hook.execution_device == "meta" for hook in hooks)
    assert not any(parameter.is_meta for layer in layers for parameter in layer.parameters())
    layers[2](torch.zeros(1, 3, 32, device="meta"), position_embeddings=(torch.zeros(1, 3, 8, device="meta"),) * 2)
    assert all(parameter.is_meta for parameter in layers[2].parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "llm_pruner", "structures": ("hidden", "ffn"), "steps": 2},
        {
            "method": "wanda",
            "structures": ("ffn",),
            "compensation": {"method": "least_squares", "ridge": 0.1},
            "depth": {"layers": 1},
        },
    ],
    ids=str,
)
def test_a_model_spread_over_gpus_is_pruned_as_one_on_one_device(
    random_model: Any, ids: torch.Tensor, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    placed: list[dict[str, Any]] = []

    def dispatch(model: Any, places: dict[str, Any]) -> None:
        """accelerate's hooks on every module, with the CPU in place of each GPU."""
        placed.append(places)
        dispatch_model(model, dict.fromkeys(places, "cpu"), force_hooks=True)

    monkeypatch.setattr(placement, "get_max_memory", lambda: {0: 10**6, 1: 10**6, "cpu": 10**9})
    monkeypatch.setattr(placement, "dispatch_model", dispatch)
    config = criteria.load(options["method"]).Config(ratio=0.3, **options)
    expected = prune(random_model(), ids, config)
    model = place(random_model(), "spread", "cpu")
    assert set(placed[0].values()) == {0, 1}  # though the first had room for all
    assert hasattr(model.get_decoder().rotary_emb, "_hf_hook")
    found = prune(model, ids, config, again=lambda cut: place(cut, "spread", "cpu"))
    assert found.kept == expected.kept
    assert not any(hasattr(module, "_hf_hook") for module in found.model.modules())
    assert torch.equal(found.model(input_ids=ids).logits, expected.model(input_ids=ids).logits)


def test_models_that_do_not_fit_the_gpus_beside_activations_are_refused(
    random_model: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(placement, "get_max_memory", lambda: {0: 170_000, 1: 170_000, "cpu": 10**9})
    monkeypatch.setattr(placement, "dispatch_model", lambda model, places: None)
    with pytest.raises(ValueError, match="find no room on the GPUs; set it to offload"):
        placement.place(random_model(), "spread", "cpu")
    monkeypatch.setattr(placement, "HEADROOM", 0.0)
    placement.place(random_model(), "spread", "cpu")
