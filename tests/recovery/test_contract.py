"""The contract every adapter in the folder keeps."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pruning.modeling_regrow import RegrowConfig, RegrowForCausalLM
from recovery import adapters, inject
from recovery.base import Layer, seed_of
from recovery.merge import largest_difference, merge

METHODS = adapters.names()
OPTIONS: list[dict[str, Any]] = [{"method": name} for name in METHODS if name not in ("lora_mini", "lorta")]
OPTIONS += [{"method": "lora_mini", "a": 16, "b": 16, "alpha": 8}, {"method": "lorta", "rank": 16, "alpha": 64}]
OPTIONS += [{"method": "randlora", "pairing": "peft"}, {"method": "mora", "kind": "share"}]
OPTIONS += [{"method": "randlora", "bases": "sparse"}, {"method": "randlora", "rank_pattern": {"q_proj": 2}}]
RATES = {"edora": 0.03, "increlora": 0.03, "lorta": 0.03, "vera": 0.03}  # few parameters, or a start at rank 1
SHAPES = [(32, 32), (48, 32), (32, 48), (7, 13), (13, 7), (5, 1), (1, 6)]  # out, in: square, tall, wide, odd, thin


def config_of(options: dict[str, Any], rank: int = 4) -> Any:
    config = adapters.load(options["method"]).Config
    return config(**({"rank": rank} if "rank" in config.model_fields else {}) | options)


def shake(tensors: list[torch.Tensor], size: float = 0.3) -> None:
    """Random values, so that nothing is zero or equal by chance."""
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors:
        tensor.data += size * torch.randn(tensor.shape, generator=generator)


def ids_for(model: LlamaForCausalLM, length: int = 24) -> torch.Tensor:
    return torch.randint(4, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(2))


def test_the_methods_are_found() -> None:
    named = "dora edora flat_lora full gelora increlora lora lora_mini lorta melora mora nola randlora rora sora vera"
    assert named.split() == METHODS


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_linear_with_weight_plus_delta(options: dict[str, Any], bias: bool) -> None:
    config, generator = config_of(options, rank=3), torch.Generator().manual_seed(0)
    linears = [nn.Linear(inputs, outputs, bias=bias) for outputs, inputs in SHAPES]
    layers = [Layer(f"layers.{n}.q_proj", linear.weight, n, head_size=1) for n, linear in enumerate(linears)]
    method = adapters.load(config.method).Method
    shared = method.share(config, layers, 0)
    holder = inject.Registered(shared, torch.device("cpu"))
    modules = [
        inject.AdaptedLinear(linear, method(config, layer, shared), holder)
        for linear, layer in zip(linears, layers, strict=True)
    ]
    for linear, module in zip(linears, modules, strict=True):
        x = torch.randn(3, linear.in_features, generator=generator)
        torch.testing.assert_close(module(x), linear(x), rtol=0, atol=1e-6)  # identity at the start
    shake([*holder.parameters(), *(parameter for module in modules for parameter in module.adapter.parameters())])
    for linear, module in zip(linears, modules, strict=True):
        for tokens in (3, 60):  # randlora multiplies in another order when there are many
            x = torch.randn(2, tokens, linear.in_features, generator=generator)
            offset = None if linear.bias is None else linear.bias.double()
            exact = nn.functional.linear(x.double(), linear.weight.double() + module.delta().double(), offset)
            expected = exact.float()  # a product in float32 has errors of its own
            torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
            assert (expected - linear(x)).abs().max() > 1e-3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_start_is_exact_and_only_adapters_train(options: dict[str, Any], tiny_model: LlamaForCausalLM) -> None:
    ids = ids_for(tiny_model)
    before = tiny_model(ids).logits
    names = inject.attach(tiny_model, config_of(options), seed=0)
    # seven linear layers in each of two decoder layers, lm_head not among them; lorta serves attention's four
    assert len(names) == (8 if options["method"] == "lorta" else 14)
    torch.testing.assert_close(tiny_model(ids).logits, before, rtol=0, atol=1e-6)
    wanted = {id(parameter) for parameter in inject.trainable(tiny_model).values()}
    assert wanted == {id(parameter) for parameter in tiny_model.parameters() if parameter.requires_grad}
    shake(list(inject.trainable(tiny_model).values()), 0.05)
    tiny_model(ids, labels=ids).loss.backward()
    for parameter in tiny_model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in wanted)
    for name, parameter in inject.trainable(tiny_model).items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merge_is_exact_and_refused_twice(options: dict[str, Any], tiny_config: LlamaConfig) -> None:
    """On a model that was pruned to layers of different widths, heads and groups."""
    widths = {
        "0": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 37},
        "1": {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 48},
    }
    torch.manual_seed(0)
    pruned = RegrowForCausalLM(RegrowConfig(**tiny_config.to_dict(), per_layer_config=widths)).eval()
    ids = ids_for(pruned)
    plain = copy.deepcopy(pruned)
    inject.attach(pruned, config_of(options), seed=0)
    shake(list(inject.trainable(pruned).values()), 0.05)
    adapted = pruned(ids).logits
    merged, difference = merge(pruned, ids)
    assert difference is not None
    assert difference < 1e-5
    assert largest_difference(merged, lambda _: adapted, ids) == difference
    assert largest_difference(merged, plain, ids) > 1e-3
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in plain.named_parameters()]
    with pytest.raises(ValueError, match="merged already"):
        merge(merged)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bfloat16_model_keeps_float32_adapters(options: dict[str, Any], tiny_model: LlamaForCausalLM) -> None:
    ids = ids_for(tiny_model)
    inject.attach(tiny_model.bfloat16(), config_of(options), seed=0)
    shake(list(inject.trainable(tiny_model).values()), 0.05)
    assert {parameter.dtype for parameter in inject.trainable(tiny_model).values()} == {torch.float32}
    assert tiny_model(ids).logits.dtype == torch.bfloat16
    layer = next(iter(inject.adapted(tiny_model).values()))
    wanted = (layer.linear.weight.float() + layer.delta()).bfloat16()
    merged, difference = merge(tiny_model, ids)
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, wanted)  # one rounding, from float32
    assert difference is not None
    assert difference < 0.1  # of rounding


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_round_trip(options: dict[str, Any], tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    other, third, ids = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model), ids_for(tiny_model)
    config = config_of(options)
    inject.attach(tiny_model, config, seed=5)
    shake(list(inject.trainable(tiny_model).values()), 0.05)
    inject.save(tiny_model, tmp_path, 5)
    inject.attach_saved(other, tmp_path)
    assert torch.equal(other(ids).logits, tiny_model(ids).logits)
    stored = load_file(tmp_path / inject.WEIGHTS)
    written = [*inject.trainable(tiny_model).values(), *inject.kept(tiny_model).values()]
    assert sum(tensor.numel() for tensor in stored.values()) == sum(tensor.numel() for tensor in written)  # no bases
    said = json.loads((tmp_path / inject.DESCRIPTION).read_text())
    assert said["config"]["method"] == options["method"]

    merged, _ = merge(other)
    with pytest.raises(ValueError, match="other weights"):
        inject.attach_saved(merged, tmp_path)
    assert not inject.adapted(merged)
    narrow = copy.deepcopy(third)
    narrow.model.layers[1].self_attn.q_proj = nn.Linear(32, 24, bias=False)
    with pytest.raises(ValueError, match=r"another pruned model|other weights"):
        inject.attach_saved(narrow, tmp_path)
    assert not inject.adapted(narrow)
    for name in sorted(inject.linears(third).keys() - inject.adapted(tiny_model).keys())[:1]:  # a layer of no adapter
        beside = copy.deepcopy(third)
        beside.get_submodule(name).weight.data.mul_(2)
        with pytest.raises(ValueError, match="other weights"):
            inject.attach_saved(beside, tmp_path)
        assert not inject.adapted(beside)

    tampered = tmp_path / "tampered"
    shutil.copytree(tmp_path, tampered, ignore=lambda *_: ["tampered"])
    said["seed"] = 6
    (tampered / inject.DESCRIPTION).write_text(json.dumps(said))
    module = next(iter(inject.adapted(tiny_model).values()))
    if module.shared.tensors.bases or module.method.bases:
        with pytest.raises(ValueError, match="bases rebuilt from seed 6"):
            inject.attach_saved(third, tampered)
    else:
        inject.attach_saved(third, tampered)  # everything it has is in the file
        assert torch.equal(third(ids).logits, tiny_model(ids).logits)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_falls(options: dict[str, Any], tiny_model: LlamaForCausalLM) -> None:
    ids = ids_for(tiny_model)
    inject.attach(tiny_model, config_of(options), seed=0)
    rate = RATES.get(options["method"], 3e-3)
    optimizer = torch.optim.AdamW(inject.trainable(tiny_model).values(), lr=rate, weight_decay=0)
    losses = []
    for _ in range(30):
        loss = tiny_model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("what", ["older", "too old", "newer", "not finite"])
def test_saved_adapters_of_other_versions_and_broken_ones(
    what: str, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    module, plain = adapters.load("randlora"), copy.deepcopy(tiny_model)
    inject.attach(tiny_model, module.Config(), 0)
    shake(list(inject.trainable(tiny_model).values()))
    inject.save(tiny_model, tmp_path, 0)
    said = json.loads((tmp_path / "adapter.json").read_text())
    said["method_version"] = {"older": 1, "too old": 0, "newer": module.VERSION + 1}.get(what, module.VERSION)
    (tmp_path / "adapter.json").write_text(json.dumps(said))
    if what == "older":  # the same function since version 1, which was made faster only
        inject.attach_saved(plain, tmp_path)
        assert torch.equal(plain(ids_for(plain)).logits, tiny_model(ids_for(plain)).logits)
        return
    if what == "not finite":
        tensors = load_file(tmp_path / "adapter.safetensors")
        tensors["model.layers.1.mlp.up_proj.gamma"][0, 0] = float("nan")
        save_file(tensors, tmp_path / "adapter.safetensors")
    message = "up_proj.gamma holds numbers that are not finite" if what == "not finite" else "train it again"
    with pytest.raises(ValueError, match=message):
        inject.attach_saved(plain, tmp_path)
    assert not inject.adapted(plain)


def test_seeds_differ_by_layer_and_run(tiny_model: LlamaForCausalLM) -> None:
    other, again = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    for model, seed in ((tiny_model, 0), (other, 1), (again, 0)):
        inject.attach(model, config_of({"method": "lora"}), seed=seed)
    first, second, third = (inject.trainable(model) for model in (tiny_model, other, again))
    q, k = "model.layers.0.self_attn.q_proj.A", "model.layers.1.self_attn.q_proj.A"
    assert torch.equal(first[q], third[q])
    assert not torch.equal(first[q], second[q])
    assert not torch.equal(first[q], first[k])
    assert first[q].abs().max() <= 32**-0.5 + 1e-7
    assert first[q].abs().max() > 0.9 * 32**-0.5
    assert seed_of(0, "a") == 8617095791668180470  # the same on every machine


def test_dropout_acts_on_the_adapter_only_and_only_in_training(tiny_model: LlamaForCausalLM) -> None:
    plain = copy.deepcopy(tiny_model)
    config = adapters.load("dora").Config(rank=4, dropout=0.5)
    inject.attach(tiny_model, config, seed=0)
    ids = ids_for(tiny_model)
    tiny_model.train()
    torch.testing.assert_close(tiny_model(ids).logits, plain(ids).logits, rtol=0, atol=1e-6)  # base is not dropped
    shake(list(inject.trainable(tiny_model).values()), 0.05)
    assert not torch.allclose(tiny_model(ids).logits, tiny_model(ids).logits)
    tiny_model.eval()
    assert torch.equal(tiny_model(ids).logits, tiny_model(ids).logits)


def test_targets(tiny_model: LlamaForCausalLM) -> None:
    config = adapters.load("rora").Config(targets=("q_proj", "mlp.up_proj"))
    assert inject.attach(tiny_model, config, 0) == [
        f"model.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    with pytest.raises(ValueError, match="adapters already"):
        inject.attach(tiny_model, config, 0)
    inject.detach(tiny_model)
    assert not inject.adapted(tiny_model)
    for target in ("lm_head", "proj"):
        with pytest.raises(ValueError, match=f"no linear layer is called '{target}'.*down_proj"):
            inject.attach(tiny_model, adapters.load("rora").Config(targets=(target,)), 0)


def test_shared_bases_exist_once_and_follow_the_model(tiny_model: LlamaForCausalLM) -> None:
    inject.attach(tiny_model, config_of({"method": "randlora"}), seed=0)
    layers = list(inject.adapted(tiny_model).values())
    assert len({layer.method.shared.bases["B"].data_ptr() for layer in layers}) == 1
    assert layers[0].method.shared.bases["B"].shape == (48, 8, 4)  # largest dmax, n = 32 / 4, rank
    tiny_model.to(torch.float64)  # any move: the method must not keep the old tensors
    assert {layer.method.shared.bases["B"].dtype for layer in layers} == {torch.float64}
    assert {layer.method.trainable["gamma"].dtype for layer in layers} == {torch.float64}
    assert layers[0].method.trainable["gamma"] is layers[0].adapter["gamma"]


def test_quantised_weights_are_refused(tiny_model: LlamaForCausalLM) -> None:
    layer = tiny_model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj: weights of torch\.int8.*unquantised"):
        inject.attach(tiny_model, config_of({"method": "lora"}), seed=0)
