"""Products, the fused RandLoRA and packed attention against plain autograd and transformers."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pruning.modeling_regrow import (
    RegrowForCausalLM,
    RegrowMistralForCausalLM,
    RegrowQwen2ForCausalLM,
    RegrowQwen3ForCausalLM,
)
from recovery import adapters, inject, products
from recovery.attention import NAME, prepare
from recovery.base import Layer

SHAPES = [(32, 32), (48, 32), (32, 48), (7, 13), (13, 7), (1, 6)]  # out, in


@pytest.fixture(params=[False, True], ids=["native", "float32 for bfloat16"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "slow_bfloat16", lambda: request.param)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor, part: float) -> None:
    """Within `part` of the largest expected value."""
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() <= part * expected.float().abs().max()


def built(pairing: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An adapted layer with a bias and random lambda and gamma."""
    linear = nn.Linear(shape[1], shape[0], dtype=dtype).requires_grad_(False)
    config = adapters.load("randlora").Config(rank=3, pairing=pairing, **options)
    method = adapters.load("randlora").Method
    layer = Layer("layer", linear.weight, 0)
    # Bases are sized for a larger layer too, so that this one takes parts.
    shared = method.share(config, [layer, Layer("other", torch.empty(50, 40), 1)], 0)
    module = inject.AdaptedLinear(linear, method(config, layer, shared), inject.Registered(shared, torch.device("cpu")))
    for seed, parameter in enumerate(module.adapter.parameters()):
        parameter.data += 0.1 * normal(*parameter.shape, seed=seed)
    return module


def by_formula(module: Any, pairing: str) -> torch.Tensor:
    """W + dW as a sum over bases, one after the other, under autograd."""
    method, weight = module.method, module.linear.weight.float()
    scales, gamma = method.trainable["lambda"], method.trainable["gamma"]
    count, rank = scales.shape
    smaller, larger = sorted(weight.shape)
    up, down = method.shared.bases["B"][:larger], method.shared.bases["A"][:, :smaller]
    total = torch.zeros(larger, smaller)
    for j in range(count * rank):  # column j of B meets row j of the scaled A
        b, r = divmod(j, rank)
        scaled, own = (b, r) if pairing == "paper" else (j % count, j // count)
        row = scales[scaled, own] * down[own] * gamma[scaled]
        total = total + torch.outer(up[:, b, r], row)
    total = 2 / count**0.5 * total
    return weight + (total.T if weight.shape[1] > weight.shape[0] else total)


@pytest.mark.parametrize("pairing", ["paper", "peft"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("passes", "fused"), [(1, True), (3, True), (3, False)])
def test_gradients_are_those_of_the_formula(pairing: str, shape: tuple[int, int], passes: int, fused: bool) -> None:
    module = built(pairing, shape, fused=fused)
    parameters = [module.adapter["lambda"], module.adapter["gamma"]]
    x = normal(2 * passes, 40, shape[1]).requires_grad_()
    dy = normal(2 * passes, 40, shape[0], seed=1)
    expected_y = nn.functional.linear(x, by_formula(module, pairing), module.linear.bias)
    expected = torch.autograd.grad(expected_y, [x, *parameters], dy)
    parts = zip(x.split(2), dy.split(2), strict=True)
    with module.method.step({"layer": module.method}, x.numel() // shape[1], passes):
        for part, gradient in parts:
            y = module(part)
            assert (type(y.grad_fn).__name__ == "_MergedBackward") == fused
            y.backward(gradient)
        assert all((parameter.grad is None) == (passes > 1 and fused) for parameter in parameters)
    close(module(x).detach(), expected_y.detach(), 1e-5)
    for found, wanted in zip([x.grad, *(p.grad for p in parameters)], expected, strict=True):
        close(found, wanted, 1e-4)
    with module.method.step({"layer": module.method}, 80, passes):  # a second step adds to what is there
        module(x[:2]).backward(dy[:2])
    again = torch.autograd.grad((nn.functional.linear(x[:2], by_formula(module, pairing)) * dy[:2]).sum(), parameters)
    for parameter, first, second in zip(parameters, expected[1:], again, strict=True):
        close(parameter.grad, first + second, 1e-4)


@pytest.mark.usefixtures("slow")
def test_fused_bfloat16_is_as_good_as_the_unfused() -> None:
    """Against float32: neither way is further off than bfloat16's eight bits allow."""
    found = {}
    for fused in (True, False):
        torch.manual_seed(0)
        module = built("paper", (48, 32), torch.bfloat16, fused=fused)
        x, dy = normal(64, 32).bfloat16().requires_grad_(), normal(64, 48, seed=1).bfloat16()
        y = module(x)
        assert y.dtype == torch.bfloat16
        parameters = list(module.adapter.parameters())
        found[fused] = [y, *torch.autograd.grad(y, [x, *parameters], dy)]
        x, dy = x.detach().float().requires_grad_(), dy.float()
        y = nn.functional.linear(x, by_formula(module, "paper"), module.linear.bias.float())
        found["exact"] = [y, *torch.autograd.grad(y, [x, *parameters], dy)]
        for value, exact in zip(found[fused], found["exact"], strict=True):
            close(value, exact, 0.02)
    assert all(gradient.dtype == torch.float32 for gradient in found[True][2:])


def test_bfloat16_gradients_are_collected_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 micro-batches that pull the same way: a sum kept in eight bits would stop growing."""
    monkeypatch.setattr(products, "slow_bfloat16", lambda: False)
    module, passes = built("paper", (48, 32), torch.bfloat16), 64
    parameters = list(module.adapter.parameters())
    xs, dys = (1 + 0.3 * normal(passes, 200, size, seed=size).bfloat16() for size in (32, 48))
    with module.method.step({"layer": module.method}, 200 * passes, passes):
        for x, dy in zip(xs, dys, strict=True):
            module(x).backward(dy)
    y = nn.functional.linear(xs.float(), by_formula(module, "paper"), module.linear.bias.float())
    for found, exact in zip(parameters, torch.autograd.grad(y, parameters, dys.float()), strict=True):
        assert float((found.grad - exact).norm() / exact.norm()) < 6e-3


def test_merged_weight_is_formed_once_and_never_stale(tiny_model: LlamaForCausalLM, monkeypatch: Any) -> None:
    method = adapters.load("randlora").Method
    formed: list[int] = []
    real = method._factors
    monkeypatch.setattr(method, "_factors", lambda self, *given: formed.append(1) or real(self, *given))
    module = built("paper", (48, 32))
    x = normal(100, 32)

    def check(times: int) -> None:
        formed.clear()
        for mode in (True, False):
            module.train(mode)
            expected = nn.functional.linear(x, by_formula(module, "paper"), module.linear.bias)
            close(module(x), expected.detach(), 1e-5)
        with torch.inference_mode():
            close(module(x), expected, 1e-5)
        assert len(formed) == times

    check(1)
    check(0)
    optimizer = torch.optim.AdamW(module.adapter.parameters(), lr=0.1)
    module(x).square().sum().backward()  # what was formed in inference mode can be trained with
    optimizer.step()
    check(1)
    module.adapter["gamma"].data.mul_(1.5)  # not seen by the tensor's version
    check(1)
    module.adapter["lambda"].data = module.adapter["lambda"].data * 0.5
    check(1)
    module.adapter.load_state_dict({name: 2 * tensor for name, tensor in module.adapter.state_dict().items()})
    check(1)
    module.linear.weight.data = module.linear.weight.data + 1
    check(1)
    y = module(x)
    with torch.no_grad():
        module.adapter["gamma"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    module.double().float()
    check(1)
    for _ in range(2):  # a step's passes share it; the next step forms its own
        formed.clear()
        with method.step({"layer": module.method}, 200, 2):
            close(module(x), nn.functional.linear(x, by_formula(module, "paper"), module.linear.bias).detach(), 1e-5)
            module(x)
        assert len(formed) == 1
        module.adapter["gamma"].data.mul_(1.5)
    check(1)


def test_a_rounded_base_follows_its_base() -> None:
    module = built("paper", (48, 32), torch.bfloat16)
    shared = module.shared.tensors
    first = shared.base("B", torch.bfloat16)
    assert first is shared.base("B", torch.bfloat16)
    assert torch.equal(first, shared.bases["B"].bfloat16())
    shared.bases["B"].mul_(1.1)  # as reading PEFT's files does
    assert torch.equal(shared.base("B", torch.bfloat16), shared.bases["B"].bfloat16())
    assert shared.base("B", torch.float16).dtype == torch.float16
    module.double()
    assert not shared.rounded
    assert torch.equal(shared.base("B", torch.bfloat16), shared.bases["B"].bfloat16())


def test_few_tokens_dropout_and_sharded_weights_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    module = built("paper", (32, 32))
    assert type(module(normal(16, 32)).grad_fn).__name__ != "_MergedBackward"  # 2 * 32 * 32 / (4 * 32) = 16 tokens
    assert type(module(normal(17, 32)).grad_fn).__name__ == "_MergedBackward"
    with module.method.step({"layer": module.method}, 17, 2):  # it is the step's tokens that count
        assert type(module(normal(2, 32)).grad_fn).__name__ == "_MergedBackward"
    dropping = built("paper", (32, 32), dropout=0.5)
    assert type(dropping(normal(100, 32)).grad_fn).__name__ != "_MergedBackward"
    assert type(dropping.eval()(normal(100, 32)).grad_fn).__name__ == "_MergedBackward"
    # Sharded: whole merged weights would be the whole model in every process.
    sharded = built("paper", (32, 32))
    with monkeypatch.context() as patch:
        patch.setattr("recovery.parallel.sharded", lambda: True)
        x = normal(100, 32)
        with torch.no_grad():
            found = sharded.eval()(x)
        assert type(sharded.train()(x).grad_fn).__name__ != "_MergedBackward"
    assert sharded.method._formed is None
    close(found, sharded(x), 1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: LlamaForCausalLM) -> None:
    inject.attach(tiny_model, adapters.load("randlora").Config(rank=4), seed=0)
    parameters = list(inject.trainable(tiny_model).values())
    for seed, parameter in enumerate(parameters):
        parameter.data += 0.05 * normal(*parameter.shape, seed=seed)
    ids = torch.randint(4, 200, (2, 40), generator=torch.Generator().manual_seed(0))
    plain = torch.autograd.grad(tiny_model.train()(ids, labels=ids).loss, parameters)
    tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
    tiny_model.enable_input_require_grads()
    layers = {name: module.method for name, module in inject.adapted(tiny_model).items()}
    for passes in (1, 2):
        with adapters.load("randlora").Method.step(layers, 80, passes):
            tiny_model(ids, labels=ids).loss.backward()
        for parameter, gradient in zip(parameters, plain, strict=True):
            close(parameter.grad, gradient, 1e-4)  # type: ignore
            parameter.grad = None


@pytest.mark.parametrize("shape", [(64, 16, 1100), (64, 1100, 16), (64, 1100, 1200), (8, 16, 24)])  # tokens, out, in
@pytest.mark.parametrize(("dtype", "part"), [(torch.bfloat16, 5e-3), (torch.float32, 1e-6)])
def test_a_product_with_a_transposed_factor(shape: tuple[int, int, int], dtype: torch.dtype, part: float) -> None:
    tokens, outputs, inputs = shape
    dy, x = normal(tokens, outputs).to(dtype), normal(tokens, inputs, seed=1).to(dtype)
    found = products.transposed_product(dy, x)
    assert found.dtype == dtype
    close(found, (dy.double().T @ x.double()).float(), part)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_low_rank(bias: bool) -> None:
    for dtype, part in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        x, weight = normal(2, 9, 12).to(dtype).requires_grad_(), normal(7, 12, seed=1).to(dtype)
        offset = normal(7, seed=2).to(dtype) if bias else None
        down, up = normal(3, 12, seed=3).requires_grad_(), normal(7, 3, seed=4).requires_grad_()
        dy = normal(2, 9, 7, seed=5).to(dtype)
        exact = [None if t is None else t.detach().float() for t in (weight, offset)]
        wide = x.detach().float().requires_grad_()
        expected = nn.functional.linear(wide, *exact)
        found = products.linear(x, weight, offset)
        assert found.dtype == dtype
        close(found, expected, part)
        close(torch.autograd.grad(found, x, dy)[0], torch.autograd.grad(expected, wide, dy.float())[0], part)
        expected = nn.functional.linear(wide, *exact) + wide @ down.T @ up.T
        found = products.low_rank(x, weight, offset, down, up)
        assert found.dtype == dtype
        close(found, expected, part)
        gradients = torch.autograd.grad(found, [x, down, up], dy)
        for gradient, wanted in zip(
            gradients, torch.autograd.grad(expected, [wide, down, up], dy.float()), strict=True
        ):
            close(gradient, wanted, part)
        assert gradients[1].dtype == torch.float32


@pytest.mark.parametrize("shape", ["uniform", "free", "windowed", "qwen2", "qwen3"])
def test_packed_attention_is_sdpa_under_a_block_mask(tiny_config: LlamaConfig, shape: str) -> None:
    torch.manual_seed(0)
    widths: Any = {0: {"intermediate_size": 24}}
    kinds: dict[str, Any] = {
        "free": RegrowForCausalLM, "windowed": RegrowMistralForCausalLM, "qwen2": RegrowQwen2ForCausalLM,
        "qwen3": RegrowQwen3ForCausalLM,
    }  # fmt: skip
    if shape == "uniform":
        model: Any = LlamaForCausalLM(tiny_config).eval()
    else:
        own, said = kinds[shape], {key: value for key, value in tiny_config.to_dict().items() if key != "model_type"}
        window = 5 if shape == "windowed" else None  # shorter than two of the three examples
        model = own(own.config_class(**said, per_layer_config=widths, sliding_window=window)).eval()
    ids = torch.randint(4, 200, (1, 30), generator=torch.Generator().manual_seed(0))
    packed = torch.tensor([[*range(11), *range(1), *range(18)]])
    batch = torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])

    def results() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids, position_ids=packed, use_cache=False).logits
        logits.square().mean().backward()
        layer = model.model.layers[0].self_attn
        gradients = [part.weight.grad for part in (layer.q_proj, layer.k_proj, layer.v_proj)]
        padded = model(input_ids=batch, attention_mask=mask).logits[:, 3:]
        written = model.generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=4)
        return [logits, *gradients, padded, written]

    expected = results()
    prepare(model)
    assert {of._attn_implementation for of in [model.config, *(at.self_attn.config for at in model.model.layers)]} == {
        NAME
    }
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
