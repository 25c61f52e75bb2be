import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from recovery import adapters, checkpoints, inject
from recovery import train as module
from recovery.config import RecoveryConfig
from recovery.data import Example
from recovery.train import schedule, train

TEXTS = ["the cat sees the dog", "the dog likes the house", "red birds eat fish", "two trees stand near the river"]
SOURCES = [(1.0, [Example("", text) for text in TEXTS * 3]), (1.0, [Example("Q cat ? A", " dog")])]


def config_of(**options: Any) -> RecoveryConfig:
    adapter = {"method": "lora", "rank": 4, **options.pop("adapter", {})}
    settings = {"tokens": 2000, "batch_tokens": 128, "max_length": 64, "learning_rate": 1e-2, **options}
    return RecoveryConfig(adapter=adapter, **settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("method", adapters.names())
def test_the_loss_falls_with_every_adapter(
    method: str, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Path
):
    config = config_of(adapter={"method": method}, learning_rate=3e-2 if method == "randlora" else 1e-2)
    report = train(tiny_model, tiny_tokenizer, SOURCES, config, tmp_path)
    assert report["loss_last_10"] < report["loss_first_10"] - 0.05
    losses = [entry["loss"] for entry in report["validation"]]
    assert losses[-1] < losses[0]
    assert report["best_step"] in [entry["step"] for entry in report["validation"]]


def test_the_budget_is_spent_and_never_exceeded(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Path):
    report = train(tiny_model, tiny_tokenizer, SOURCES, config_of(), tmp_path)
    assert 2000 - 64 <= report["tokens"] <= 2000
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, report["steps"] + 1))
    assert lines[-1]["tokens"] == report["tokens"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_interrupted_run_ends_bit_identical(
    dropout: float, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_of(adapter={"dropout": dropout})
    start = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}

    def fresh() -> LlamaForCausalLM:
        model = LlamaForCausalLM(tiny_model.config)
        model.load_state_dict(start)
        return model

    whole = fresh()
    (tmp_path / "a").mkdir()
    report = train(whole, tiny_tokenizer, SOURCES, config, tmp_path / "a")

    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 0.0)
    scratch = tmp_path / "b"
    scratch.mkdir()

    def stop(done: int, total: int, note: str) -> None:
        if done > 900:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(fresh(), tiny_tokenizer, SOURCES, config, scratch, stop)
    assert 0 < checkpoints.state_of(scratch / checkpoints.LAST)["step"] < report["steps"]
    resumed = fresh()
    again = train(resumed, tiny_tokenizer, SOURCES, config, scratch)
    ours, theirs = inject.trainable(resumed), inject.trainable(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    strip = ("tokens_per_second",)
    assert {k: v for k, v in again.items() if k not in strip} == {k: v for k, v in report.items() if k not in strip}


def test_one_step_is_plain_autograd_and_adamw(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Path):
    text = "the cat sees"
    config = config_of(
        tokens=13, batch_tokens=13, max_length=13, warmup=0.0, final_rate=1.0, validation={"fraction": 0.0}
    )
    start = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    other = LlamaForCausalLM(tiny_model.config).eval()
    other.load_state_dict(start)
    inject.attach(other, config.adapter, config.seed)
    parameters = inject.trainable(other)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    ids = tiny_tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids.shape[1] == 13
    other(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()

    train(tiny_model, tiny_tokenizer, [(1.0, [Example("", text)])], config, tmp_path)
    for name, parameter in inject.trainable(tiny_model).items():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=1e-6)


def test_the_schedule_worked_by_hand():
    config = config_of(warmup=0.2, final_rate=0.1)
    assert schedule(0.1, config) == pytest.approx(0.5)
    assert schedule(0.2, config) == pytest.approx(1.0)
    assert schedule(0.6, config) == pytest.approx(0.1 + 0.9 * 0.5)  # half way along the cosine
    assert schedule(1.0, config) == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_stops_with_the_step(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Path
):
    tiny_model.lm_head.weight.data[0, 0] = math.inf
    with pytest.raises(RuntimeError, match=r"the loss is nan at step 1 .*last good checkpoint: none yet"):
        train(tiny_model, tiny_tokenizer, SOURCES, config_of(), tmp_path)


def test_data_with_nothing_to_learn_is_refused(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="none of 1 examples has a token to learn"):
        train(tiny_model, tiny_tokenizer, [(1.0, [Example("Q", "")])], config_of(), tmp_path)


def test_impossible_budgets_are_refused():
    with pytest.raises(ValueError, match="less than one step of batch_tokens"):
        config_of(tokens=100)
    with pytest.raises(ValueError, match="less than one row of max_length"):
        config_of(batch_tokens=32)
