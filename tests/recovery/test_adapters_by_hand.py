"""Each adapter's delta and hooks on small matrices, worked out by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from recovery import adapters, inject
from recovery.base import Layer, Tensors
from recovery.config import RecoveryConfig
from recovery.optimizer import adamw


def made(name: str, weight: torch.Tensor, shared: Tensors | None = None, **options: Any) -> Any:
    """One layer's adapter, called as a query projection with heads of one channel."""
    module = adapters.load(name)
    layer = Layer("layers.0.q_proj", weight, 0, head_size=1)
    return module.Method(module.Config(**options), layer, shared or Tensors())


def fill(method: Any, **values: Any) -> None:
    for name, value in values.items():
        assert method.trainable[name].shape == torch.tensor(value).shape, name
        method.trainable[name].copy_(torch.tensor(value))


def close(found: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float32))


def test_randlora_by_hand() -> None:
    """The paper's sum, written out, for a 3 x 2 layer with rank 1: n = 2 bases, s = 2 / sqrt 2."""
    config = adapters.load("randlora").Config(rank=1)
    layer = Layer("x", torch.zeros(3, 2), 0)
    method = adapters.load("randlora").Method
    shared = Tensors(
        bases={"A": torch.tensor([[3.0, -1.0]]), "B": torch.tensor([[[1.0], [4.0]], [[2], [5]], [[3], [6]]])}
    )
    made = method(config, layer, shared)
    assert made.trainable["gamma"].tolist() == [[0.5, 0.5], [0.5, 0.5]]  # 1 / max(n, dmin)
    made.trainable["lambda"][:] = torch.tensor([[2.0], [10.0]])
    made.trainable["gamma"][:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # basis 1: B = (1, 2, 3), 2 * (3*1, -1*2) = (6, -4);  basis 2: B = (4, 5, 6), 10 * (3*3, -1*4) = (90, -40)
    expected = torch.tensor([[366.0, -164.0], [462.0, -208.0], [558.0, -252.0]]) * 2**0.5
    torch.testing.assert_close(made.delta(layer.weight), expected)
    bases = method.share(config, [Layer("x", torch.zeros(50, 40), 0), Layer("y", torch.zeros(20, 60), 0)], 0).bases
    assert bases["A"].shape == (1, 40)
    assert bases["B"].shape == (60, 40, 1)
    assert float(bases["B"].std()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("kind", "filled"), [("sparse", 1 / 3), ("very_sparse", 1 / 20)])
def test_randlora_ternary_bases(kind: str, filled: float) -> None:
    """-1, 0 and 1 over their standard deviation, each sign as often as the other."""
    config = adapters.load("randlora").Config(rank=20, bases=kind)
    layers = [Layer("x", torch.zeros(500, 400), 0)]
    bases = adapters.load("randlora").Method.share(config, layers, 0).bases
    for basis in bases.values():
        values = basis.unique()
        assert len(values) == 3
        assert values[1] == 0
        close(values[2], -values[0])
        assert float(basis.std()) == pytest.approx(1, abs=1e-5)
        for sign in (values[0], values[2]):
            share = float((basis == sign).float().mean())
            assert share == pytest.approx(filled / 2, abs=4 * (filled / 2 / basis.numel()) ** 0.5)


def test_randlora_rank_and_alpha_by_pattern() -> None:
    """Each layer takes its own rank's corner of the shared bases, and the sum is written out."""
    module = adapters.load("randlora")
    config = module.Config(rank=2, rank_pattern={"k_proj": 1}, alpha_pattern={"k_proj": 3})
    layers = [Layer("layers.0.q_proj", torch.zeros(5, 4), 0), Layer("layers.0.k_proj", torch.zeros(3, 4), 1)]
    shared = module.Method.share(config, layers, 0)
    up, down = shared.bases["B"], shared.bases["A"]
    assert (up.shape, down.shape) == ((5, 3, 2), (2, 4))  # n is 2 at rank 2, and 3 at rank 1
    for layer, rank, alpha in zip(layers, (2, 1), (4, 3), strict=True):
        method = module.Method(config, layer, shared)
        scales, gamma = method.trainable["lambda"], method.trainable["gamma"]
        for tensor in (scales, gamma):
            tensor.normal_(generator=torch.Generator().manual_seed(0))
        smaller, larger = sorted(layer.weight.shape)
        expected = torch.zeros(larger, smaller)
        for b, row in enumerate(scales):
            for r, scale in enumerate(row):
                expected += (
                    alpha
                    / rank
                    / len(scales) ** 0.5
                    * torch.outer(up[:larger, b, r], scale * down[r, :smaller] * gamma[b])
                )
        assert len(scales) == math.ceil(smaller / rank)
        close(method.delta(layer.weight), expected if rank == 2 else expected.T)


def test_randlora_bases_of_zeros_are_refused() -> None:
    config = adapters.load("randlora").Config(rank=1, bases="very_sparse")  # four entries, half of them not 0

    def draw() -> None:
        for seed in range(1000):
            adapters.load("randlora").Method.share(config, [Layer("x", torch.zeros(4, 4), 0)], seed)

    with pytest.raises(ValueError, match="very_sparse bases of rank 1 came out as zeros"):
        draw()


def test_dora_leaves_rows_of_zeros_alone() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    made = adapters.load("dora").Method(adapters.load("dora").Config(rank=1, alpha=1), Layer("x", weight, 0), Tensors())
    assert made.trainable["magnitude"].tolist() == [5.0, 0.0]
    assert torch.equal(made.delta(weight), torch.zeros(2, 2))
    made.trainable["A"][:] = torch.tensor([[1.0, 0.0]])
    made.trainable["B"][:] = torch.tensor([[5.0], [0.0]])
    # row 0: (3 + 5, 4) has norm sqrt 80 and is brought back to 5
    expected = 5 * torch.tensor([8.0, 4.0]) / 80**0.5 - torch.tensor([3.0, 4.0])
    torch.testing.assert_close(made.delta(weight), torch.stack([expected, torch.zeros(2)]))


def test_vera() -> None:
    bases = {"A": torch.tensor([[1.0, 2, 3, 99], [0, 1, -1, 99]]), "B": torch.tensor([[1.0, 2], [3, -1], [99, 99]])}
    method = made("vera", torch.zeros(2, 3), Tensors(bases=bases), rank=2)
    assert torch.equal(method.trainable["v"], torch.full((2,), 0.1))
    fill(method, b=[10.0, 1], v=[2.0, 3])
    # diag(v) A = (2 4 6), (0 3 -3); B times that = (2 10 0), (6 9 21)
    close(method.delta(torch.zeros(2, 3)), [[20, 100, 0], [6, 9, 21]])


def test_nola() -> None:
    bases = {"A": torch.tensor([[[0.0, 1, 99]], [[2, 2, 99]]]), "B": torch.tensor([[[1.0], [0]], [[1], [-1]]])}
    method = made("nola", torch.zeros(2, 2), Tensors(bases=bases), rank=1, alpha=2, count=2)
    method.bases["A0"].copy_(torch.tensor([[1.0, 0.0]]))
    fill(method, a=[3.0, 1], b=[2.0, 4])
    # A = (1 0) + 3 (0 1) + (2 2) = (3 5);  B = 2 (1 0) + 4 (1 -1) = (6 -4);  s = 2
    close(method.delta(torch.zeros(2, 2)), [[36, 60], [-24, -40]])


def test_mora_shares() -> None:
    method = made("mora", torch.zeros(4, 4), rank=1, kind="share")  # h = floor(sqrt 8 + 1/2) = 3
    fill(method, M=[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    # M takes (x0 + x3, x1 + x0, x2 + x1); its output starts over in the fourth row
    close(method.delta(torch.zeros(4, 4)), [[3, 5, 3, 1], [9, 11, 6, 4], [15, 17, 9, 7], [3, 5, 3, 1]])


def test_mora_rank_by_pattern() -> None:
    method = made("mora", torch.zeros(4, 4), rank=1, kind="share", rank_pattern={"q_proj": 2})
    assert method.trainable["M"].shape == (4, 4)  # floor(sqrt 16 + 1/2)


@pytest.mark.parametrize(
    ("name", "option", "reason"),
    [
        ("vera", "rank_pattern", "VeRA's factors are the whole model's"),
        ("lorta", "alpha_pattern", "LoRTA's tensor is the whole model's"),
        ("mora", "alpha_pattern", "MoRA's scale is 1"),
        ("full", "rank_pattern", "neither rank nor scale"),
    ],
)
def test_patterns_that_mean_nothing_are_refused_with_the_reason(name: str, option: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: .*{reason}"):
        adapters.load(name).Config(**{option: {"q_proj": 2}})


def test_mora_turns() -> None:
    method = made("mora", torch.zeros(4, 4), rank=1, kind="rope")  # 3 made even: h = 2
    fill(method, M=[[1.0, 2], [3, 4]])
    c, s = math.cos(1), math.sin(1)  # chunk 1 is turned by one radian: (x2 c - x3 s, x3 c + x2 s)
    expected = [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, c + 2 * s, 2 * c - s], [0, 0, 3 * c + 4 * s, 4 * c - 3 * s]]
    close(method.delta(torch.zeros(4, 4)), expected)
    wide = made("mora", torch.zeros(2, 8), rank=1, kind="rope")
    fill(wide, M=[[1.0, 2], [3, 4]])
    close(wide.delta(torch.zeros(2, 8)), [[1, 2, 0, 0, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0, 0, 0]])
    tall = made("mora", torch.zeros(5, 2), rank=1, kind="rope")  # sqrt 7 + 1/2: 3, made 2; one chunk, repeated
    fill(tall, M=[[1.0, 2], [3, 4]])
    close(tall.delta(torch.zeros(5, 2)), [[1, 2], [3, 4], [1, 2], [3, 4], [1, 2]])


def test_melora() -> None:
    method = made("melora", torch.zeros(3, 3), rank=1, count=2, alpha=2)
    assert method.trainable["A"].abs().max(dim=0).values[:2].max() <= 0.5**0.5  # a part's own inputs are its bound
    fill(method, A=[[1.0, 2, 3]], B=[[4.0], [5], [6]])
    close(method.delta(torch.zeros(3, 3)), [[8, 16, 0], [10, 20, 0], [0, 0, 36]])  # slices of 2 and 1


def test_starts() -> None:
    """Bounds and deviations of what is drawn, as published; few of 4,000 numbers reach less than 99% of a bound."""

    def layers(out: int, into: int) -> list[Layer]:
        return [Layer("layers.0.q_proj", torch.zeros(out, into), 0, head_size=1)]

    def drawn(name: str, **options: Any) -> tuple[Any, Tensors]:
        module = adapters.load(name)
        shared = module.Method.share(module.Config(**options), layers(100, 400), 0)
        return made(name, torch.zeros(100, 400), shared, **options), shared

    nola, shared = drawn("nola", rank=10, count=25)
    mini, outer = drawn("lora_mini", rank=16, a=400, b=400)
    _, tensor = drawn("lorta", rank=100)
    bounded = {"A0": (nola.bases["A0"], 1 / 20), "A": (mini.trainable["A"], 1 / 20)}
    bounded |= {f"nola {name}": (basis, 1 / 5) for name, basis in shared.bases.items()}
    bounded |= {f"lorta {name}": (tensor.trainable[name], 1 / 10) for name in ("A_400", "heads")}
    for name, (found, bound) in bounded.items():
        assert 0.99 * bound < float(found.abs().max()) <= bound, name
        assert float(found.std()) == pytest.approx(bound / 3**0.5, rel=0.05), name
    for name, basis in outer.bases.items():
        assert float(basis.std()) == pytest.approx(1, rel=0.02), name
    for trained in (nola.trainable["a"], nola.trainable["b"], mini.trainable["B"], tensor.trainable["B_400"]):
        assert not trained.any()


def test_lora_mini() -> None:
    bases = {"Q": torch.tensor([[1.0, 0, 2, 0, 99], [0, 1, 0, 2, 99]]), "P": torch.tensor([[1.0, 1], [0, 2], [99, 99]])}
    method = made("lora_mini", torch.zeros(2, 4), Tensors(bases=bases), rank=1, alpha=2, a=2, b=2)
    fill(method, A=[[3.0, 4]], B=[[1.0], [3]])
    # A Q = (3 4 6 8) / sqrt 4;  P B = (4 6) / sqrt 2;  s = 2
    close(method.delta(torch.zeros(2, 4)), 2**0.5 * torch.tensor([[6.0, 8, 12, 16], [9, 12, 18, 24]]))
    with pytest.raises(ValueError, match="rank: 3 is more than a 2"):
        adapters.load("lora_mini").Config(rank=3, a=2)


def test_sora() -> None:
    method = made("sora", torch.zeros(2, 2), rank=2, alpha=4, threshold=0.1)
    fill(method, A=[[1.0, 0], [0, 1]], B=[[1.0, 2], [3, 4]], gate=[0.5, -0.05])
    close(method.delta(torch.zeros(2, 2)), [[1, -0.2], [3, -0.4]])  # s = 2
    type(method).after_step({"x": method}, 0.5)
    assert method.trainable["gate"].tolist() == pytest.approx([0.4, 0])  # |-0.05| is below the threshold
    close(method.delta(torch.zeros(2, 2)), [[0.8, 0], [2.4, 0]])


def test_edora() -> None:
    weight = torch.tensor([[2.0, 1], [1, 2]])  # 3 (1 1)(1 1)^T / 2 + 1 (1 -1)(1 -1)^T / 2
    method = made("edora", weight, rank=1, alpha=2)
    assert method.trainable["R"].tolist() == [[0.0]]
    assert torch.equal(method.delta(weight), torch.zeros(2, 2))
    fill(method, R=[[1.0]])
    assert made("edora", weight, rank=7, alpha=3).scale() == 1.5  # of the rank that there is
    # W + 2 * 1.5 everywhere = (5 4), (4 5), of norm sqrt 41, brought back to W's sqrt 5
    close(method.delta(weight), (5 / 41) ** 0.5 * torch.tensor([[5.0, 4], [4, 5]]) - weight)


def test_edora_decomposes_as_torch_does() -> None:
    weight = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    up, down = adapters.load("edora").decomposed(weight, 6, seed=1)
    left, sizes, right = torch.linalg.svd(weight)
    torch.testing.assert_close(up @ down, left[:, :6] * sizes[:6] @ right[:6], rtol=0, atol=0.05)
    torch.testing.assert_close(down.norm(dim=1), sizes[:6], rtol=1e-3, atol=0)
    torch.testing.assert_close(up.T @ up, torch.eye(6), rtol=0, atol=1e-5)


def test_mora_turns_bfloat16_with_exact_angles_and_rounds_once() -> None:
    chunks = torch.randn(5, 12, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    places, pairs = (torch.arange(count, dtype=torch.float64) for count in (12, 32))
    angles = places[:, None] * 10000.0 ** (-pairs / 32)
    turned = torch.complex(chunks[..., :32].double(), chunks[..., 32:].double())
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    found = adapters.load("mora")._turned(chunks)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)  # a bfloat16 has 8 digits


def test_increlora_grows_where_the_loss_is_sensitive() -> None:
    first, second = (made("increlora", torch.zeros(4, 4), rank=2, limit=3) for _ in range(2))
    layers = {"first": first, "second": second}
    grow = type(first).after_step
    for method, gradient in ((first, [3.0, 0, 0]), (second, [0.0, 0, 0])):
        fill(method, E=[2.0, 0, 0])
        method.trainable["E"].grad = torch.tensor(gradient)
        assert method.kept["reserve"].tolist() == pytest.approx([0, 1e-5, 0])
    grow(layers, 0.05)  # the warm-up
    # |2 * 3| / sqrt 16 = 1.5; 0.15 of it; 0.15 of how far that was off
    assert first.kept["score"].tolist() == pytest.approx([0.225, 0.15 * 1.275])
    assert (first.used, second.used) == (1, 1)
    grow(layers, 0.36)  # past half way: one of two components
    assert (first.used, second.used) == (2, 1)
    assert first.trainable["E"].tolist() == pytest.approx([2, 1e-5, 0])
    assert first.kept["reserve"].tolist() == pytest.approx([0, 0, 1e-5])
    grow(layers, 1.0)
    assert (first.used, second.used) == (3, 1)  # the limit
    grow(layers, 1.0)
    assert (first.used, second.used) == (3, 1)  # the average is reached
    short = {name: made("increlora", torch.zeros(4, 4), rank=4, limit=6) for name in ("first", "second")}
    grow(short, 1.0)
    assert [method.used for method in short.values()] == [4, 4]  # one step is enough to reach the average of 4
    type(first).finish(layers)
    fill(second, A=[[1.0, 2, 3, 4], [9, 9, 9, 9], [9, 9, 9, 9]], B=[[1.0, 9, 9], [2, 9, 9], [3, 9, 9], [4, 9, 9]])
    row = torch.tensor([1.0, 2, 3, 4])
    close(second.delta(torch.zeros(4, 4)), 8 * 2 * row[:, None] * row)  # s = 16 / 2, E = 2


def test_lorta() -> None:
    module, zeros = adapters.load("lorta"), torch.zeros(2, 2)
    layers = [
        Layer(f"layers.{n}.{name}", torch.zeros(out, into), 0, head_size=1)
        for n, name, out, into in [(0, "q_proj", 2, 2), (1, "k_proj", 1, 2), (1, "o_proj", 2, 2)]
    ]
    config = module.Config(rank=1, alpha=3)
    shared = module.Method.share(config, layers, 0)
    values = {"A_2": [[1.0], [2]], "B_2": [[1.0]], "heads": [[2.0], [5]], "heads_kv": [[7.0]]}
    values |= {"matrices": [[1.0], [10], [0], [100]], "layers": [[1.0], [-1]]}
    for name, value in values.items():
        assert shared.trainable[name].shape == torch.tensor(value).shape
        shared.trainable[name].copy_(torch.tensor(value))
    query, key, output = (module.Method(config, layer, shared) for layer in layers)
    close(query.delta(zeros), [[6, 12], [15, 30]])  # head h: 3 * Ch[h] * (1 2)
    close(key.delta(zeros), [[-210, -420]])  # its own head 7, matrix 10, layer -1
    close(output.delta(zeros), [[-600, -1500], [-1200, -3000]])  # heads side by side on the input side
    with pytest.raises(ValueError, match=r"lorta serves q_proj.*not layers\.0\.up_proj"):
        module.Method.share(config, [Layer("layers.0.up_proj", zeros, 0, 1)], 0)
    with pytest.raises(ValueError, match="2 channels are not whole heads of 3"):
        module.Method.share(config, [Layer("layers.0.q_proj", zeros, 0, 3)], 0)


def test_full_has_the_gradient_of_the_weight(tiny_model: LlamaForCausalLM) -> None:
    ids = torch.randint(4, tiny_model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    tiny_model(ids, labels=ids).loss.backward()
    wanted = {name: p.grad for name, p in tiny_model.named_parameters() if "_proj" in name}
    inject.attach(tiny_model, adapters.load("full").Config(), 0)
    tiny_model(ids, labels=ids).loss.backward()
    for name, parameter in inject.trainable(tiny_model).items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[name.replace(".delta", ".weight")], rtol=1e-4, atol=1e-6)


def test_rora_is_lora_with_alpha_times_the_root_of_the_rank(tiny_model: LlamaForCausalLM) -> None:
    """So RoRA's table needs no rows of LoRA at RoRA's scale: losses and gradients are the same bit for bit."""
    ids = torch.randint(4, tiny_model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    found: list[dict[str, torch.Tensor]] = []
    for name, alpha in (("rora", 6), ("lora", 12)):  # rank 4, whose root is 2
        inject.attach(tiny_model, adapters.load(name).Config(rank=4, alpha=alpha), seed=3)
        optimizer = torch.optim.AdamW(inject.trainable(tiny_model).values(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            tiny_model(ids, labels=ids).loss.backward()
            optimizer.step()
        found.append({name: parameter.detach() for name, parameter in inject.trainable(tiny_model).items()})
        inject.detach(tiny_model)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(tensor.any() for name, tensor in found[0].items() if name.endswith(".B"))


def test_rank_and_alpha_by_pattern(tiny_model: LlamaForCausalLM) -> None:
    patterns = {"up_proj": 6, "layers.1.mlp.up_proj": 2}
    config = adapters.load("lora").Config(rank=4, rank_pattern=patterns, alpha_pattern={"k_proj": 40})
    inject.attach(tiny_model, config, 0)
    found = {name: module.method for name, module in inject.adapted(tiny_model).items()}
    ranks = {name: method.trainable["A"].shape[0] for name, method in found.items() if method.rank != 4}
    assert ranks == {"model.layers.0.mlp.up_proj": 6, "model.layers.1.mlp.up_proj": 2}  # the longer pattern wins
    assert found["model.layers.0.self_attn.k_proj"].scale() == 10
    assert found["model.layers.1.mlp.up_proj"].scale() == 8
    inject.detach(tiny_model)
    for option, pattern in (("rank_pattern", "lm_head"), ("alpha_pattern", "proj")):
        with pytest.raises(ValueError, match=f"{option}: no adapted layer's name ends in '{pattern}'.*down_proj"):
            inject.attach(tiny_model, adapters.load("rora").Config(**{option: {pattern: 4}}), 0)
    assert not inject.adapted(tiny_model)


def test_flat_lora_trembles_within_a_step_and_nowhere_else() -> None:
    config = adapters.load("flat_lora").Config(rank=2, alpha=4, rho=0.2)
    method, generator = adapters.load("flat_lora").Method, torch.Generator().manual_seed(0)
    weight = torch.randn(6, 20_000, generator=generator) * torch.tensor([[1.0], [2], [3], [4], [5], [6]])
    shared = method.share(config, [], 0)
    layers = {name: method(config, Layer(name, weight, n, 1), shared) for n, name in enumerate(("a", "b"))}
    flat = layers["a"]
    flat.trainable["B"].copy_(torch.randn(6, 2, generator=generator))
    assert flat.frozen(weight) is weight
    with method.step(layers, 8, 1):
        assert flat.frozen(weight) is weight  # t = 0: no noise yet
    method.after_step(layers, 0.25)
    before = weight.clone()
    with method.step(layers, 8, 2):
        first = flat.frozen(weight)
        assert flat.frozen(weight) is first  # one noise for all passes
        other = layers["b"].frozen(weight)
    assert torch.equal(weight, before)
    assert flat.frozen(weight) is weight
    merged = weight + 2 * flat.trainable["B"] @ flat.trainable["A"]  # s = 4 / 2
    noise = first - weight
    # k = (1 - cos 45 degrees) / 2 = .146447; the deviation of row i is k rho |W'_i| / sqrt(in)
    expected = 0.146447 * 0.2 * (merged**2).mean(dim=1).sqrt()
    torch.testing.assert_close(noise.std(dim=1), expected, rtol=0.02, atol=0)
    unit = noise / expected[:, None]
    assert unit.mean().abs() < 0.01
    assert float((unit**4).mean()) == pytest.approx(3, rel=0.05)  # a normal's kurtosis
    assert abs(float((unit[0] * unit[1]).mean())) < 0.03  # rows, layers and steps are independent
    assert abs(float((noise * (other - weight)).mean() / noise.std() / (other - weight).std())) < 0.01
    method.after_step(layers, 1.0)
    with method.step(layers, 8, 1):
        last = flat.frozen(weight) - weight
    torch.testing.assert_close(last.std(dim=1), expected / 0.146447, rtol=0.02, atol=0)
    assert abs(float((noise * last).mean() / noise.std() / last.std())) < 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_flat_lora_learns_at_the_noisy_weight(dropout: float, tiny_model: LlamaForCausalLM) -> None:
    """Gradients of A and B are autograd's on a model whose weights have the noise in them."""
    config = adapters.load("flat_lora").Config(rank=2, rho=0.9, dropout=dropout)
    ids = torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(2))
    plain, method = copy.deepcopy(tiny_model), adapters.load("flat_lora").Method
    inject.attach(tiny_model, config, seed=0)
    inject.attach(plain, adapters.load("lora").Config(rank=2, dropout=dropout), seed=0)
    own, other = inject.adapted(tiny_model), inject.trainable(plain)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in inject.trainable(tiny_model).items():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        other[name].data.copy_(parameter.data)
    methods = {name: module.method for name, module in own.items()}
    method.after_step(methods, 1.0)
    with method.step(methods, 24, 1):
        for name, module in inject.adapted(plain).items():
            noisy = methods[name].frozen(own[name].linear.weight)
            assert (noisy - module.linear.weight).abs().max() > 0.01
            module.linear.weight.data.copy_(noisy)
        for model in (plain, tiny_model):
            torch.manual_seed(5)  # dropout's
            model.train()(ids, labels=ids).loss.backward()
    for name, parameter in inject.trainable(tiny_model).items():
        torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["dora", "edora"])
def test_weight_decay_leaves_magnitudes_alone(method: str, tiny_model: LlamaForCausalLM):
    """A magnitude that decays would shrink the rows of the weight, not the delta."""
    config = RecoveryConfig.model_validate({"adapter": {"method": method}, "tokens": 1000, "weight_decay": 0.1})
    inject.attach(tiny_model, config.adapter, seed=0)
    parameters = inject.trainable(tiny_model)
    optimizer = adamw(parameters, adapters.load(method).Method.undecayed, config)
    for group in optimizer.param_groups:
        held = {id(parameter) for parameter in group["params"]}
        ends = {name.rpartition(".")[2] for name, parameter in parameters.items() if id(parameter) in held}
        assert (ends == {"magnitude"}) == (group["weight_decay"] == 0), ends
