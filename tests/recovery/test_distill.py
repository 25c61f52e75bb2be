"""Distillation: the formula by hand and against plain autograd, the kept teacher, and what is refused."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recovery import distill, history, inject, teacher
from recovery.adapters import lora
from recovery.config import Distillation, RecoveryConfig
from recovery.data import IGNORED, Example, Row
from recovery.feed import feed, within_budget
from recovery.loss import labelled
from recovery.train import train

SOURCES = [
    (2.0, [Example("", f"the number {n} follows {n - 1}") for n in range(60)]),
    (1.0, [Example(f"What follows {n}?", f" {n + 1}") for n in range(40)]),
]


def config_of(**distillation: Any) -> RecoveryConfig:
    return RecoveryConfig.model_validate(
        {
            "adapter": {"method": "rora", "rank": 4, "alpha": 4},
            "tokens": 1500,
            "batch_tokens": 256,
            "max_length": 64,
            "learning_rate": 3e-3,
            "distillation": distillation,
            "checkpoint_every": 0,
        }
    )


@pytest.fixture
def dense(tiny_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The tiny model, surer of what it says: as it is, its distributions are all but uniform."""
    tiny_model.lm_head.weight.data.mul_(20)
    return tiny_model


@pytest.fixture
def student(dense: LlamaForCausalLM) -> LlamaForCausalLM:
    """The dense model with other weights, as if something had been cut out of it."""
    other = copy.deepcopy(dense)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight[:, ::3] = 0
            layer.self_attn.o_proj.weight.mul_(0.5)
    return other


def divergence(logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, temperature: float) -> float:
    labels = torch.full((len(logits),), IGNORED)
    return distill.terms(logits, labels, teacher.Targets(ids, logprobs), temperature, 1.0, 1.0)[1]


def test_divergence_by_hand() -> None:
    probabilities = torch.tensor([[0.25, 0.1, 0.5, 0.15]])
    ids, logprobs = teacher.top(probabilities.log() + 3, 2)
    assert ids.tolist() == [[2, 0]]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([[0.5, 0.25, 0.25]]))
    uniform = torch.zeros(1, 4)  # of the classes: 1/4, 1/4, 1/2
    expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert divergence(uniform, ids, logprobs, 1.0) == pytest.approx(expected)
    r = 2**-0.5  # square roots of the classes: teacher r, 1/2, 1/2; student 1/2, 1/2, r; both sum to 1 + r
    expected = (r * math.log(2 * r) + 0.5 * math.log(0.5 / r)) / (1 + r)
    assert divergence(uniform, ids, logprobs, 2.0) == pytest.approx(expected)
    assert divergence(probabilities.log(), ids, logprobs, 2.0) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [50, 49, 6])
def test_terms_and_gradient_are_autograds(k: int, temperature: float) -> None:
    """Over the whole vocabulary against torch's kl_div as it stands; over k classes against a rest formed by hand."""
    torch.manual_seed(0)
    theirs, ours = 3 * torch.randn(7, 50), (3 * torch.randn(7, 50)).requires_grad_()
    labels = torch.tensor([4, IGNORED, 0, 49, IGNORED, 7, 7])
    ids, logprobs = teacher.top(theirs, k)
    goal, mine = theirs, ours
    if k < 50:
        order = theirs.argsort(-1, descending=True)
        assert torch.equal(ids, order[:, :k])
        goal, mine = (
            torch.cat(
                [part.softmax(-1).gather(-1, order[:, :k]), part.softmax(-1).gather(-1, order[:, k:]).sum(-1, True)], -1
            ).log()
            for part in (theirs, ours)
        )
    apart = functional.kl_div((mine / temperature).log_softmax(-1), (goal / temperature).softmax(-1), reduction="sum")
    task = functional.cross_entropy(ours, labels, reduction="sum", ignore_index=IGNORED)
    (expected,) = torch.autograd.grad(0.2 * task + 0.7 * apart, ours)
    found = distill.terms(ours.detach(), labels, teacher.Targets(ids.int(), logprobs), temperature, 0.2, 0.7)
    assert found[:2] == pytest.approx((float(task.detach()), float(apart.detach())), rel=1e-5)
    torch.testing.assert_close(found[2], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", ["labelled", "all"])
@pytest.mark.parametrize("hidden", [0.0, 0.3])
def test_gradients_are_those_of_the_whole_logits(
    positions: str,
    hidden: float,
    student: LlamaForCausalLM,
    dense: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain autograd over logits [all positions, vocabulary], one example at a time, against chunks of packed rows."""
    monkeypatch.setattr("recovery.distill.CHUNK", 7)
    monkeypatch.setattr("recovery.teacher.CHUNK", 5)
    size = len(tiny_tokenizer)
    config = config_of(weight=0.7, temperature=1.5, positions=positions, hidden=hidden, top_k=size, cache=False)
    settings = config.distillation
    assert settings is not None
    rows = list(within_budget(SOURCES, tiny_tokenizer, config))[:3]
    inject.attach(student, lora.Config(rank=2, targets=("up_proj", "q_proj")), 0)
    for parameter in inject.trainable(student).values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    tasks, apart, matched, counts = [], [], [], [0, 0]
    for row in rows:
        starts = [n for n, position in enumerate(row.positions) if position == 0]
        for a, b in zip(starts, [*starts[1:], len(row.ids)], strict=True):
            ids, labels = torch.tensor([row.ids[a:b]]), torch.tensor(row.labels[a + 1 : b])
            ours = student(ids, output_hidden_states=True)
            theirs = dense(ids, output_hidden_states=True)
            logits, goal = ours.logits[0, :-1], theirs.logits[0, :-1].detach()
            chosen = labels != IGNORED if positions == "labelled" else torch.ones(b - a - 1, dtype=torch.bool)
            counts[0] += int((labels != IGNORED).sum())
            counts[1] += int(chosen.sum())
            tasks.append(functional.cross_entropy(logits, labels, reduction="sum"))
            both = [functional.log_softmax(part[chosen] / 1.5, -1) for part in (logits, goal)]
            apart.append(functional.kl_div(*both, reduction="sum", log_target=True))
            for mine, other in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
                mine, other = mine[0, :-1][chosen], other[0, :-1][chosen].detach()
                matched.append((((mine - other) ** 2).sum(-1) / (other**2).sum(-1)).sum() / 2)
    expected = 0.3 * sum(tasks) / counts[0] + 0.7 * 1.5**2 * sum(apart) / counts[1] + hidden * sum(matched) / counts[1]
    parameters = list(inject.trainable(student).values())
    reference = torch.autograd.grad(expected, parameters)

    asked = teacher.Live(dense, settings)
    assert counts[0] == labelled(rows)
    assert counts[1] == sum(sum(teacher.distilled(row, positions)) for row in rows)
    sums = [0.0, 0.0, 0.0]
    for row in rows:
        terms = distill.accumulate(student, row, asked, settings, *counts)
        sums = [total + term for total, term in zip(sums, terms, strict=True)]
    said = distill.means(sums, settings, *counts)
    assert said["loss"] == pytest.approx(float(expected.detach()), rel=1e-3)  # the teacher is rounded to 16 bits
    assert said["task_loss"] == pytest.approx(float(sum(tasks).detach()) / counts[0], rel=1e-4)
    assert ("hidden_loss" in said) == bool(hidden)
    for parameter, gradient in zip(parameters, reference, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=5e-3, atol=2e-5)


def kept(model: LlamaForCausalLM, tokenizer: Any, config: RecoveryConfig, place: Path) -> dict[str, Any]:
    for name in ("out", "scratch"):
        (place / name).mkdir(parents=True, exist_ok=True)
    rows = within_budget(SOURCES, tokenizer, config)
    assert config.distillation is not None
    return teacher.keep(model, rows, config.distillation, place / "out", place / "scratch", config.tokens)


@pytest.mark.parametrize(("positions", "weight"), [("labelled", 0.5), ("all", 1.0)])
def test_a_kept_teacher_trains_the_same_adapter_as_one_asked_on_the_fly(
    positions: str,
    weight: float,
    student: LlamaForCausalLM,
    dense: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher, "SHARD", 200)
    config = config_of(positions=positions, weight=weight, top_k=8)
    assert config.distillation is not None
    said = kept(dense, tiny_tokenizer, config, tmp_path / "teacher")
    shards = sorted((tmp_path / "teacher/out").iterdir())
    assert len(shards) > 1
    assert sum(path.stat().st_size for path in shards) < said["positions"] * (8 * 4 + 9 * 2) + 2000 * len(shards)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    reports, models = [], [copy.deepcopy(student), copy.deepcopy(student)]
    asked = (teacher.Live(dense, config.distillation), teacher.Kept(tmp_path / "teacher/out"))
    for model, source, place in zip(models, asked, ("a", "b"), strict=True):
        reports.append(train(model, tiny_tokenizer, SOURCES, config, tmp_path / place, teacher=source))
    assert said["tokens"] == reports[0]["tokens"]
    first, second = (inject.trainable(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    log = [json.loads(line) for line in (tmp_path / "a" / history.LOG).read_text().splitlines()]
    for line in log:
        assert line["loss"] == pytest.approx((1 - weight) * line["task_loss"] + weight * line["divergence"])
    assert weight < 1 or log[-1]["divergence"] < 0.5 * log[0]["divergence"]


def test_a_stopped_teacher_goes_on_and_a_strange_row_is_refused(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher, "SHARD", 200)
    config = config_of(positions="all", top_k=4)
    straight = kept(tiny_model, tiny_tokenizer, config, tmp_path / "a")
    real, calls = teacher.Live.__call__, 0

    def counting(self: teacher.Live, row: Row) -> teacher.Targets:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return real(self, row)

    monkeypatch.setattr(teacher.Live, "__call__", counting)
    with pytest.raises(KeyboardInterrupt):
        kept(tiny_model, tiny_tokenizer, config, tmp_path / "b")
    assert kept(tiny_model, tiny_tokenizer, config, tmp_path / "b") == straight
    assert 11 < calls < straight["rows"] + 11  # not all of them again
    first, second = teacher.Kept(tmp_path / "a/out"), teacher.Kept(tmp_path / "b/out")
    for row in within_budget(SOURCES, tiny_tokenizer, config):
        assert torch.equal(first(row).ids, second(row).ids)
        assert torch.equal(first(row).logprobs, second(row).logprobs)
    _, held = feed(SOURCES, tiny_tokenizer, config)
    with pytest.raises(ValueError, match="has not seen this row: rebuild it"):
        first(held[0])


def test_what_is_refused(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="too large to keep: set cache to false"):
        Distillation(hidden=1.0)
    with pytest.raises(ValidationError, match="nothing would be distilled"):
        Distillation(weight=0)
    with pytest.raises(ValueError, match="needs a teacher"):
        train(tiny_model, tiny_tokenizer, SOURCES, config_of(), tmp_path)
    shallow = copy.deepcopy(tiny_model)
    shallow.config.num_hidden_layers = 1
    distill.check(shallow.config.to_dict(), tiny_model.config.to_dict(), Distillation())
    with pytest.raises(ValueError, match=r"num_hidden_layers is 1, the teacher's is 2; set .*hidden to 0"):
        distill.check(shallow.config.to_dict(), tiny_model.config.to_dict(), Distillation(hidden=1.0, cache=False))
