"""Training steps against plain autograd and torch's AdamW, example by example."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from recovery import history, inject
from recovery.config import RecoveryConfig
from recovery.data import IGNORED, Example, Row, batches
from recovery.feed import feed
from recovery.train import train

# Answers of very different lengths: a mean over rows, or over examples, would be another loss.
EXAMPLES = [Example(f"How many is {n}?", " many" * (1 + 4 * (n % 3))) for n in range(40)]


def examples_of(row: Row) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of every example, apart again."""
    starts = [place for place, position in enumerate(row.positions) if position == 0]
    ends = [*starts[1:], len(row.ids)]
    return [(torch.tensor([row.ids[a:b]]), torch.tensor(row.labels[a:b])) for a, b in zip(starts, ends, strict=True)]


def test_weight_decay_leaves_soras_gates_alone(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Path):
    """Without a gradient (a rate that rounds to nothing) only decay would move them."""
    settings: dict[str, Any] = {"tokens": 700, "batch_tokens": 230, "max_length": 75, "learning_rate": 1e-3}
    settings |= {"validation": {"fraction": 0.0}, "weight_decay": 100.0, "clip": 1e-30}
    config = RecoveryConfig.model_validate({"adapter": {"method": "sora", "rank": 4, "threshold": 0}, **settings})
    other = LlamaForCausalLM(tiny_model.config)
    inject.attach(other, config.adapter, config.seed)
    train(tiny_model, tiny_tokenizer, [(1.0, EXAMPLES)], config, tmp_path)
    before, after = inject.trainable(other), inject.trainable(tiny_model)
    for name, parameter in after.items():
        share = float(parameter.detach().norm() / before[name].detach().norm()) if before[name].any() else 1.0
        assert share == pytest.approx(1.0, abs=1e-6) if name.endswith((".gate", ".B")) else share < 0.9, name


@pytest.mark.parametrize("clip", [0.01, 100.0])
def test_steps_are_plain_autograd_and_adamw(
    clip: float, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Path
):
    settings: dict[str, Any] = {"tokens": 700, "batch_tokens": 230, "max_length": 75, "learning_rate": 1e-2}
    settings |= {"warmup": 0.0, "final_rate": 1.0, "validation": {"fraction": 0.0}, "weight_decay": 0.1, "clip": clip}
    config = RecoveryConfig.model_validate({"adapter": {"method": "lora", "rank": 4}, **settings})
    other = LlamaForCausalLM(tiny_model.config).eval()
    other.load_state_dict(tiny_model.state_dict())
    inject.attach(other, config.adapter, config.seed)
    parameters = inject.trainable(other)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    sources = [(1.0, EXAMPLES)]
    rows, _ = feed(sources, tiny_tokenizer, config)
    losses: list[float] = []
    for batch in batches(rows, 700, 230, 75):
        learned = [[int((labels != IGNORED).sum()) for _, labels in examples_of(row)] for row in batch]
        assert len({sum(counts) for counts in learned}) > 1  # rows with unequal shares of the mean
        total = torch.zeros(())
        for ids, labels in (example for row in batch for example in examples_of(row)):
            logits = other(input_ids=ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        loss = total / sum(map(sum, learned))
        loss.backward()
        assert (float(torch.nn.utils.clip_grad_norm_(parameters.values(), clip)) > clip) == (clip == 0.01)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert len(losses) == 4

    train(tiny_model, tiny_tokenizer, sources, config, tmp_path)
    log = [json.loads(line) for line in (tmp_path / history.LOG).read_text().splitlines()]
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-5)
    for name, parameter in inject.trainable(tiny_model).items():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=1e-6)
