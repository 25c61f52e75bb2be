"""The adapter contract over every method in the folder, and each method against PEFT."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from recovery import adapters, inject
from recovery.base import Layer
from recovery.config import RecoveryConfig
from recovery.merge import merge

IDS = torch.randint(4, 200, (2, 10), generator=torch.Generator().manual_seed(1))


def config_of(method: str, **options: Any) -> Any:
    return adapters.load(method).Config(**options)


def shake(model: nn.Module, size: float = 0.1) -> None:
    """Random values in every adapter parameter, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(7)
    for parameter in inject.trainable(model).values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def single(method: str, outputs: int, inputs: int) -> inject.AdaptedLinear:
    module, config = adapters.load(method), config_of(method, rank=4)
    linear = nn.Linear(inputs, outputs, bias=False)
    shared = module.Method.shared(config, [(outputs, inputs)], torch.Generator().manual_seed(0))
    layer = Layer("layer", linear.weight, torch.Generator().manual_seed(1), shared)
    return inject.AdaptedLinear(linear, module.Method(config, layer))


@pytest.mark.parametrize("method", adapters.names())
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16), (7, 13), (13, 7), (1, 5)])
def test_forward_is_the_product_with_the_weight_plus_delta(method: str, shape: tuple[int, int]):
    torch.manual_seed(0)
    layer, x = single(method, *shape), torch.randn(3, 5, shape[1])
    torch.testing.assert_close(layer(x), layer.linear(x), rtol=0, atol=1e-6)  # identity at the start
    shake(layer)
    assert (layer(x) - layer.linear(x)).abs().max() > 1e-3
    merged = nn.functional.linear(x, layer.linear.weight + layer.delta())
    torch.testing.assert_close(layer(x), merged, rtol=1e-4, atol=1e-5)
    assert layer.delta().dtype == torch.float32


@pytest.mark.parametrize("method", adapters.names())
def test_only_the_adapter_trains_and_its_state_round_trips(method: str, tiny_model: LlamaForCausalLM, tmp_path: Path):
    config = config_of(method, rank=4)
    before = tiny_model(input_ids=IDS).logits.detach()
    names = inject.attach(tiny_model, config, seed=3)
    assert len(names) == 14  # seven linear layers in each of two decoder layers, not lm_head
    torch.testing.assert_close(tiny_model(input_ids=IDS).logits, before, rtol=0, atol=1e-5)
    trained = {name for name, parameter in tiny_model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in tiny_model.named_parameters() if ".adapter." in name}
    tiny_model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in inject.trainable(tiny_model).values())

    shake(tiny_model, 0.02)
    live = tiny_model(input_ids=IDS).logits
    inject.save(tiny_model, tmp_path, config, seed=3)
    torch.manual_seed(0)
    fresh = LlamaForCausalLM(tiny_model.config).eval()
    inject.attach_saved(fresh, tmp_path)
    assert torch.equal(fresh(input_ids=IDS).logits, live)

    merged, difference = merge(fresh, IDS)
    assert difference is not None
    assert difference < 1e-5
    torch.testing.assert_close(merged(input_ids=IDS).logits, live, rtol=0, atol=1e-5)
    assert not inject.adapted(merged)
    with pytest.raises(ValueError, match="merged already"):
        merge(merged)


@pytest.mark.parametrize("method", adapters.names())
def test_a_bfloat16_base_keeps_float32_parameters(method: str, tiny_model: LlamaForCausalLM):
    model = tiny_model.to(torch.bfloat16)
    inject.attach(model, config_of(method, rank=4), seed=0)
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    assert {p.dtype for p in inject.trainable(model).values()} == {torch.float32}


def test_random_bases_are_not_stored_and_other_ones_are_refused(tiny_model: LlamaForCausalLM, tmp_path: Path):
    config = config_of("randlora", rank=4)
    inject.attach(tiny_model, config, seed=3)
    inject.save(tiny_model, tmp_path, config, seed=3)
    from safetensors.torch import load_file

    assert {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter.safetensors")} == {"lambda", "gamma"}
    text = (tmp_path / "adapter.json").read_text()
    (tmp_path / "adapter.json").write_text(text.replace('"seed": 3', '"seed": 4'))
    with pytest.raises(ValueError, match="bases rebuilt from seed 4"):
        inject.attach_saved(LlamaForCausalLM(tiny_model.config), tmp_path)


def test_an_adapter_of_another_pruned_model_is_refused(tiny_model: LlamaForCausalLM, tmp_path: Path):
    config = config_of("lora", rank=4)
    inject.attach(tiny_model, config, seed=0)
    inject.save(tiny_model, tmp_path, config, seed=0)
    other = tiny_model.config.to_dict() | {"intermediate_size": 40}
    narrower = LlamaForCausalLM(type(tiny_model.config)(**other))
    with pytest.raises(ValueError, match="belongs to another pruned model"):
        inject.attach_saved(narrower, tmp_path)


def test_targets_are_names_of_linear_layers(tiny_model: LlamaForCausalLM):
    with pytest.raises(ValueError, match="no linear layer is called 'qproj'"):
        inject.attach(tiny_model, config_of("lora", targets=("qproj",)), seed=0)
    assert len(inject.attach(tiny_model, config_of("lora", targets=("q_proj", "v_proj")), seed=0)) == 4
    with pytest.raises(ValueError, match="has adapters already"):
        inject.attach(tiny_model, config_of("lora"), seed=0)


def test_scales_worked_by_hand():
    assert single("lora", 8, 8).method.scale() == 16 / 4  # alpha 16, rank 4
    assert single("rora", 8, 8).method.scale() == 16 / 2
    # n = ceil(12 / 4) = 3 bases: alpha / rank / sqrt(3) with alpha = 2 rank
    assert single("randlora", 20, 12).method.scale() == pytest.approx(2 / 3**0.5)


def test_randlora_is_the_sum_of_the_paper():
    layer = single("randlora", 20, 12)
    shake(layer)
    method = layer.method
    a, b = method.bases["A"], method.bases["B"]
    lam, gamma = method.trainable["lambda"], method.trainable["gamma"]
    total = sum(b[i] @ torch.diag(lam[i]) @ a @ torch.diag(gamma[i]) for i in range(3))
    torch.testing.assert_close(layer.delta(), 2 / 3**0.5 * total, rtol=1e-4, atol=1e-5)
    assert (a.std().item(), b.std().item()) == pytest.approx((1, 1), abs=1e-5)


# ---- PEFT 0.21 as an independent reference: the same numbers put into both give the same logits


def peft_layers(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}


@pytest.mark.parametrize("method", ["lora", "rora", "dora"])
def test_low_rank_methods_equal_peft(method: str, tiny_model: LlamaForCausalLM):
    inject.attach(tiny_model, config_of(method, rank=4, alpha=6.0), seed=0)
    shake(tiny_model)
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", use_rslora=method == "rora", use_dora=method == "dora"
    )
    other = peft.get_peft_model(LlamaForCausalLM(tiny_model.config).eval(), settings)
    ours = inject.adapted(tiny_model)
    for name, layer in peft_layers(other.base_model.model).items():
        mine = ours[name].adapter
        layer.lora_A["default"].weight.data.copy_(mine["A"])
        layer.lora_B["default"].weight.data.copy_(mine["B"])
        if method == "dora":
            layer.lora_magnitude_vector["default"].weight.data.copy_(mine["magnitude"])
    torch.testing.assert_close(tiny_model(input_ids=IDS).logits, other(input_ids=IDS).logits, rtol=0, atol=1e-5)

    tiny_model(input_ids=IDS, labels=IDS).loss.backward()
    other(input_ids=IDS, labels=IDS).loss.backward()
    name, layer = next(iter(peft_layers(other.base_model.model).items()))
    torch.testing.assert_close(ours[name].adapter["A"].grad, layer.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-6)


def test_randlora_equals_peft_with_its_pairing_bases_and_scale(tiny_model: LlamaForCausalLM):
    inject.attach(tiny_model, config_of("randlora", rank=4, pairing="peft"), seed=0)
    shake(tiny_model)
    torch.manual_seed(0)
    settings = peft.RandLoraConfig(r=4, randlora_alpha=4, target_modules="all-linear", save_projection=False)
    other = peft.get_peft_model(LlamaForCausalLM(tiny_model.config).eval(), settings)
    ours = inject.adapted(tiny_model)
    for name, layer in peft_layers(other.base_model.model).items():
        module, method = ours[name], ours[name].method
        count, smaller = method.trainable["gamma"].shape
        a, b = layer.randlora_A["default"], layer.randlora_B["default"]  # [r, 1, dmin], [dmax, n, r]
        a.data[:, 0, :smaller].copy_(method.bases["A"])
        b.data[: method.bases["B"].shape[1], :count].copy_(method.bases["B"].permute(1, 0, 2))
        # PEFT's scale is alpha / r = 1 here: ours goes into lambda, which is [r, n] there.
        scaled = method.scale() * method.trainable["lambda"].reshape(count, 4)
        layer.randlora_lambda["default"].data.copy_(scaled.T)
        layer.randlora_gamma["default"].data.copy_(module.adapter["gamma"])
    torch.testing.assert_close(tiny_model(input_ids=IDS).logits, other(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_an_unknown_adapter_is_named():
    with pytest.raises(ValueError, match="no adapter is called 'roar'"):
        RecoveryConfig(adapter={"method": "roar"}, tokens=4096)  # pyright: ignore[reportArgumentType]
