"""Training on a base of 4 or 8 bits: what is kept, what is computed, and where the adapter goes."""

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recovery import adapters, inject, parallel
from recovery.config import RecoveryConfig
from recovery.data import Example
from recovery.merge import merge
from recovery.quantized import FewBits, quantize
from recovery.train import train

SCHEMES = ("nf4", "int8")
SMALL = {"rank": 4, "alpha": 8.0, "a": 16, "b": 16}
SOURCES = [(1.0, [Example("", f"the number {n} follows {n - 1}") for n in range(60)])]


def by_hand(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """The rounded weight: nearest level of each block of 64 along the rows, or of each row."""
    if scheme == "int8":
        largest = weight.half().float().abs().amax(1, keepdim=True)
        return (weight.half().float() * (127 / largest)).round() * largest / 127
    levels, flat = get_4bit_type("nf4", device="cpu"), weight.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(levels).abs().argmin(-1)
    return (levels[nearest] * largest).flatten()[: len(flat)].view(weight.shape)


def wide(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    """Hidden 64 and FFN 75: rows of whole blocks, and rows that no block fits, of odd width."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**tiny_config.to_dict(), "hidden_size": 64, "intermediate_size": 75}))


def linears(model: LlamaForCausalLM) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}


def adapter(method: str, **options: Any) -> Any:
    config = adapters.load(method).Config
    own = {name: value for name, value in SMALL.items() if name in config.model_fields}
    return config(**own | ({"fused": False} if method == "randlora" else {}) | options)


def settings(**options: Any) -> RecoveryConfig:
    values = {
        "adapter": {"method": "lora", "rank": 4},
        "tokens": 1000,
        "batch_tokens": 256,
        "max_length": 64,
        "learning_rate": 3e-3,
        "validation": {"fraction": 0.1, "tokens": 100},
    }
    return RecoveryConfig(**{**values, **options})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(64, 128), (48, 96), (33, 47), (5, 1)])
def test_weights_are_rounded_as_published(scheme: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = FewBits.packed(weight, scheme)
    torch.testing.assert_close(packed.unpacked(), by_hand(weight, scheme), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(packed.T.unpacked(), by_hand(weight, scheme).T, rtol=1e-6, atol=1e-7)
    blocks = -(-weight.numel() // 64)
    assert packed.stored_bytes() == (36 * blocks if scheme == "nf4" else weight.numel() + 4 * shape[0])
    half = FewBits.packed(weight.bfloat16(), scheme).unpacked()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), by_hand(weight.bfloat16().float(), scheme), rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_computes_what_bitsandbytes_own_does(scheme: str) -> None:
    plain = nn.Linear(128, 64)
    if scheme == "nf4":
        theirs: Any = bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=False)
    else:
        theirs = bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to("cpu").train()
    plain.weight = nn.Parameter(FewBits.packed(plain.weight, scheme), requires_grad=False)
    found = []
    for layer in (theirs, plain):
        x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", [name for name in adapters.names() if name != "flat_lora"])
def test_gradients_equal_autograd_on_the_rounded_weights(method: str, scheme: str, tiny_config: LlamaConfig) -> None:
    model = wide(tiny_config)
    plain = copy.deepcopy(model)
    rounded = {f"model.layers.{name}.weight": by_hand(m.weight.detach(), scheme) for name, m in linears(model).items()}
    inject.attach(model, adapter(method), seed=0)
    quantize(model, scheme)
    generator = torch.Generator().manual_seed(3)
    for parameter in inject.trainable(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(4, 200, (2, 24), generator=generator)
    loss = model(ids, labels=ids).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in inject.trainable(model).items()}
    for parameter in inject.trainable(model).values():
        parameter.grad = None
    merged = dict(rounded)
    for name, module in inject.adapted(model).items():
        weight = rounded[f"{name}.weight"]
        merged[f"{name}.weight"] = weight + module.method.delta(weight)
    expected = functional_call(plain, merged, (ids,), {"labels": ids}).loss
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, parameter in inject.trainable(model).items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_keeps_unpacked_weights(dropout: float, dtype: torch.dtype, tiny_config: LlamaConfig) -> None:
    for method in ("lora", "dora", "edora", "vera", "randlora"):
        model = wide(tiny_config).to(dtype).train()
        inject.attach(model, adapter(method, rank=3, dropout=dropout), seed=0)
        quantize(model, "nf4")
        saved: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, into: list[torch.Tensor] = saved) -> torch.Tensor:
            into.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(torch.randint(4, 200, (1, 23)), labels=torch.randint(4, 200, (1, 23))).loss
        loss.backward()
        kept = {tensor.numel() for tensor in saved if not isinstance(tensor, FewBits)}
        assert any(isinstance(tensor, FewBits) for tensor in saved)
        assert not kept & {linear.weight.numel() for linear in linears(model).values()}, method


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_trains_on_rounded_weights_and_merges_into_full_ones(
    scheme: str, tiny_config: LlamaConfig, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    full = wide(tiny_config)
    rounded, model = copy.deepcopy(full), copy.deepcopy(full)
    for linear in linears(rounded).values():
        linear.weight.data = by_hand(linear.weight.data, scheme)
    (tmp_path / "plain").mkdir()
    config = settings(quantized_base=scheme)
    report = train(model, tiny_tokenizer, SOURCES, config, tmp_path, device="cpu")
    plain = train(rounded, tiny_tokenizer, SOURCES, settings(), tmp_path / "plain")
    assert report["loss"] == pytest.approx(plain["loss"], abs=2e-5)
    for found, expected in zip(report["validation"], plain["validation"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)  # in eval mode, between training steps
    first, second = inject.trainable(model), inject.trainable(rounded)
    for name in first:  # AdamW's first steps go by the sign of a gradient, however small
        assert (first[name] - second[name]).norm() < 1e-2 * second[name].norm(), name

    said, weights = report["quantized_base"], [linear.weight.data for linear in linears(full).values()]
    error = sum(float((by_hand(w, scheme) - w).square().sum()) for w in weights)
    assert said["rounding"] == pytest.approx((error / sum(float(w.square().sum()) for w in weights)) ** 0.5, abs=1e-5)
    assert said["bytes_before"] == 4 * sum(w.numel() for w in weights)
    assert said["bytes"] < said["bytes_before"] * (0.15 if scheme == "nf4" else 0.28)

    with pytest.raises(ValueError, match="weights of few bits are not merged into"):
        merge(model)
    inject.save(model, tmp_path / "adapter", config.seed)
    merged = copy.deepcopy(full)
    inject.attach_saved(merged, tmp_path / "adapter")
    _, difference = merge(merged, torch.tensor([[1, 40, 50, 60, 70]]))
    assert difference is not None
    assert difference < 1e-5
    stored = load_file(tmp_path / "adapter" / inject.WEIGHTS)
    for name, linear in linears(merged).items():
        down, up = (stored[f"model.layers.{name}.{factor}"] for factor in ("A", "B"))
        assert up.abs().max() > 0
        expected = linears(full)[name].weight.data + 16 / 4 * (up @ down)
        torch.testing.assert_close(linear.weight.data, expected, rtol=1e-6, atol=1e-6)


def test_gradient_checkpointing_changes_no_bit(
    tiny_config: LlamaConfig, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = []
    for on in (False, True):
        model, place = wide(tiny_config).bfloat16(), tmp_path / str(on)
        place.mkdir()
        config = settings(quantized_base="nf4", tokens=600, gradient_checkpointing=on, adapter={"method": "dora"})
        train(model, tiny_tokenizer, SOURCES, config, place)
        found.append(inject.trainable(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_model_moves_packed(tiny_config: LlamaConfig) -> None:
    model = wide(tiny_config)
    inject.attach(model, adapter("dora", targets=("q_proj",)), seed=0)
    quantize(model, "nf4")
    assert {type(linear.weight.data) for linear in linears(model).values()} == {FewBits}  # adapted or not
    assert not isinstance(model.lm_head.weight, FewBits)
    model.to("meta")
    for linear in linears(model).values():
        assert isinstance(linear.weight, FewBits)
        assert {linear.weight.device, linear.weight.codes.device, linear.weight.scales.device} == {torch.device("meta")}


def test_refusals(tiny_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match=r"quantized_base: randlora keeps a full copy.*`fused` to false"):
        settings(adapter={"method": "randlora"}, quantized_base="nf4")
    with pytest.raises(ValidationError, match="quantized_base: flat_lora keeps a full copy"):
        settings(adapter={"method": "flat_lora"}, quantized_base="nf4")
    assert settings(adapter={"method": "randlora", "fused": False}, quantized_base="nf4").quantized_base == "nf4"
    with pytest.raises(ValidationError, match="'nf4' or 'int8'"):
        settings(quantized_base="int4")
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "sharded", lambda: True)
        with pytest.raises(ValueError, match=r"quantized_base: .* not split over processes"):
            quantize(wide(tiny_config), "nf4")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"quantized_base: needs bitsandbytes: pip install 'regrow\[quantized\]'"):
        quantize(wide(tiny_config), "nf4")


def test_only_a_quantized_base_is_part_of_the_key() -> None:
    assert "quantized_base" not in settings().model_dump(mode="json")
    dumped = settings(quantized_base="int8").model_dump(mode="json")
    assert dumped["quantized_base"] == "int8"
    assert RecoveryConfig.model_validate(dumped) == settings(quantized_base="int8")
