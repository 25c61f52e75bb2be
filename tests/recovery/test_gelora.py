"""GeLoRA: the dimension of points that have a known one, the streams it is measured on, and the ranks it gives."""

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recovery import adapters, checkpoints, dimension, inject
from recovery.adapters import gelora
from recovery.config import RecoveryConfig
from recovery.data import Example, Row
from recovery.train import train

SOURCES = [(1.0, [Example("", f"the number {n} follows {n - 1}") for n in range(60)])]


def test_two_nn_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points 0, 1, 3, 7 on a line: distances to neighbours (1, 3), (1, 2), (2, 3), (4, 6), ratios 3, 2, 1.5, 1.5."""
    monkeypatch.setattr(dimension, "LEAST", 4)
    x = [math.log(1.5), math.log(1.5), math.log(2)]  # the largest of four is left out
    y = [-math.log(3 / 4), -math.log(2 / 4), -math.log(1 / 4)]
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    line = torch.tensor([[0.0, 5.0], [1, 5], [3, 5], [7, 5]])
    assert dimension.two_nn(line) == pytest.approx(slope)
    assert dimension.two_nn(torch.cat([line, line[1:3]])) == pytest.approx(slope)  # repeated points count once
    with pytest.raises(ValueError, match="2 distinct hidden states tell no dimension, 4 are needed"):
        dimension.two_nn(line[:2])
    with pytest.raises(ValueError, match="equally far"):
        dimension.two_nn(torch.eye(5))


@pytest.mark.parametrize("known", [1, 2, 4])
def test_two_nn_finds_a_known_dimension(known: int) -> None:
    generator = torch.Generator().manual_seed(known)
    inner = torch.rand(1500, known, generator=generator)
    turned, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    points = torch.nn.functional.pad(inner, (0, 24 - known)) @ turned
    assert dimension.two_nn(points) == pytest.approx(known, rel=0.1)
    assert dimension.two_nn(1000 * points + 50) == pytest.approx(dimension.two_nn(points), rel=1e-3)
    sphere = torch.randn(1500, known + 1, generator=generator)  # curved: its surface has one dimension less
    sphere = sphere / sphere.norm(dim=1, keepdim=True)
    assert dimension.two_nn(sphere) == pytest.approx(known, rel=0.1)


def test_the_streams_are_those_between_the_layers(
    tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of packed examples, each token once: what transformers gives for every example by itself."""
    first, second, third = [1, 40, 50, 60, 70], [1, 40, 51, 61], [1, 80]
    rows = [
        Row([*first, *second], [*first, *second], [0, 1, 2, 3, 4, 0, 1, 2, 3]),
        Row([*third, *first], [*third, *first], [0, 1, 0, 1, 2, 3, 4]),
        Row([9], [9], [0]),
    ]
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(dimension, "two_nn", lambda points: parts.append(points) or float(len(points)))
    found = dimension.of_streams(tiny_model, rows, 8, seed=0)
    assert found == [[4.0, 4.0]] * 3
    wanted: list[torch.Tensor] = []
    with torch.no_grad():
        for ids in (first, second, third):
            model, last = tiny_model.model, tiny_model.model.layers[-1]
            states = list(model(torch.tensor([ids]), output_hidden_states=True).hidden_states)
            angles = model.rotary_emb(states[0], torch.arange(len(ids))[None])
            states[-1] = last(states[-2], position_embeddings=angles)  # transformers gives it normalised
            wanted.append(torch.stack([state[0] for state in states]))
    every = torch.cat(wanted, 1)  # [streams, tokens, width]
    assert every.shape[1] == 11
    for number in range(3):
        points = torch.cat(parts[2 * number : 2 * number + 2])
        apart = torch.cdist(points, every[number])
        assert apart.min(dim=1).values.max() < 1e-4  # each point is one of them
        if number:
            assert torch.cdist(points, points).fill_diagonal_(1).min() > 1e-4  # and another one
    left = [hook for module in tiny_model.modules() for hook in module._forward_hooks.values()]
    assert not any(isinstance(hook, partial) for hook in left)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        # found: ceil(2.1) + 1 = 4 and max(ceil(-.3), 0) + 1 = 1; to rank 5's parameters: times 2
        ({"ranks": "found"}, [4, 1]),
        ({"rank": 5}, [8, 2]),
        ({"rank": 5, "limit": 6}, [6, 2]),
        ({"rank": 5, "rank_pattern": {"layers.1.mlp.up_proj": 7}}, [8, 2]),
    ],
)
def test_ranks_by_hand(
    options: dict[str, Any], ranks: list[int], tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = [[2.9, 3.1], [5.0, 5.2], [4.7, 4.9]]  # means 3, 5.1, 4.8
    monkeypatch.setattr(dimension, "of_streams", lambda *_: halves)
    config = gelora.Config(alpha=10, **options)
    fitted, said = gelora.Method.fit(config, tiny_model, [], 0)
    assert said["found"] == [4, 1]
    assert said["dimensions"] == halves
    inject.attach(tiny_model, fitted, 0)
    for name, module in inject.adapted(tiny_model).items():
        block = int(name.split(".")[2])
        own = options.get("rank_pattern", {}).get(name.removeprefix("model."))
        assert module.method.rank == (own or ranks[block]), name
        assert module.method.scale() == 10 / config.rank
    assert said["ranks"] == fitted.rank_pattern
    if options == {"rank": 5}:
        trained = sum(parameter.numel() for parameter in inject.trainable(tiny_model).values())
        inject.detach(tiny_model)
        inject.attach(tiny_model, adapters.load("lora").Config(rank=5), 0)
        assert trained == sum(parameter.numel() for parameter in inject.trainable(tiny_model).values())


def test_a_run_measures_once_and_saves_what_it_found(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other, third = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    config = RecoveryConfig.model_validate(
        {"adapter": {"method": "gelora", "rank": 4, "tokens": 300}, "tokens": 700, "batch_tokens": 128,
         "max_length": 64, "checkpoint_every": 0}
    )  # fmt: skip
    real, calls = dimension.of_streams, list[int]()

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(dimension, "of_streams", counted)
    report = train(tiny_model, tiny_tokenizer, SOURCES, config, tmp_path)
    fitted = report["fitted"]
    assert len(fitted["dimensions"]) == 3
    assert all(value > 0 for pair in fitted["dimensions"] for value in pair)
    inject.save(tiny_model, tmp_path / "adapter", config.seed)
    said = json.loads((tmp_path / "adapter" / "adapter.json").read_text())["config"]
    assert said["rank_pattern"] == fitted["ranks"]
    assert set(fitted["ranks"]) == set(inject.adapted(tiny_model))
    inject.attach_saved(other, tmp_path / "adapter")
    ids = torch.tensor([[1, 40, 50, 60]])
    assert torch.equal(other(ids).logits, tiny_model(ids).logits)
    again = train(third, tiny_tokenizer, SOURCES, config, tmp_path)  # from its last checkpoint
    assert again["fitted"] == fitted
    assert len(calls) == 1
    assert checkpoints.state_of(tmp_path / checkpoints.LAST)["adapter"] == said


def test_too_little_data_is_said(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = RecoveryConfig.model_validate(
        {"adapter": {"method": "gelora"}, "tokens": 64, "batch_tokens": 32, "max_length": 32}
    )
    with pytest.raises(ValueError, match="distinct hidden states tell no dimension, 10 are needed: give more data"):
        train(tiny_model, tiny_tokenizer, [(1.0, [Example("", "aaaaaa")])], config, tmp_path)
