"""The trainer: schedule, budget, resuming, the best adapter, hooks and errors."""

import copy
import itertools
import json
import math
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recovery import adapters, checkpoints, history, inject
from recovery.adapters import lora
from recovery.base import Adapter, Layer, Tensors
from recovery.config import RecoveryConfig
from recovery.data import Example
from recovery.optimizer import schedule
from recovery.train import train

SOURCES = [
    (2.0, [Example("", f"the number {n} follows {n - 1}") for n in range(60)]),
    (1.0, [Example(f"What follows {n}?", f" {n + 1}") for n in range(40)]),
]


def config_of(**options: Any) -> RecoveryConfig:
    values: dict[str, Any] = {
        "adapter": {"method": "rora", "rank": 4, "alpha": 4},
        "tokens": 1500,
        "batch_tokens": 256,
        "max_length": 64,
        "learning_rate": 3e-3,
        "validation": {"fraction": 0.1, "tokens": 100, "times": 3},
        "checkpoint_every": 0,
    }
    return RecoveryConfig(**{**values, **options})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / history.LOG).read_text().splitlines()]


def without_time(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if "second" not in key}


def test_schedule_by_hand() -> None:
    config = config_of(warmup=0.1, final_rate=0.1)
    # half the warm-up; its end; half of the cosine: .1 + .9 / 2; a quarter: .1 + .45 (1 + cos 45 degrees); the end
    expected = {0.05: 0.5, 0.1: 1.0, 0.55: 0.55, 0.325: 0.1 + 0.45 * (1 + 2**-0.5), 1.0: 0.1}
    for share, factor in expected.items():
        assert schedule(share, config) == pytest.approx(factor), share
    assert schedule(0.25, config_of(warmup=0, final_rate=0)) == pytest.approx(0.5 + 8**-0.5)


def test_training_lowers_the_loss_within_the_budget(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    frozen = copy.deepcopy(tiny_model)
    seen: list[tuple[int, int, str]] = []
    config = config_of(tokens=6000)
    report = train(tiny_model, tiny_tokenizer, SOURCES, config, tmp_path, lambda *told: seen.append(told))
    assert 6000 - 64 < report["tokens"] <= 6000
    log = lines(tmp_path)
    assert [line["step"] for line in log] == list(range(1, report["steps"] + 1))
    assert log[-1]["tokens"] == report["tokens"] == seen[-1][0]
    assert all(0 <= after["tokens"] - before["tokens"] <= 256 for before, after in itertools.pairwise(log))
    for line in log:
        assert line["learning_rate"] == pytest.approx(3e-3 * schedule(line["tokens"] / 6000, config))
    assert report["loss"][-1] < report["loss"][0] - 0.1
    assert [check["tokens"] >= 6000 * n / 3 - 64 for n, check in enumerate(report["validation"], 1)] == [True] * 3
    assert report["validation"][-1]["loss"] < report["validation"][0]["loss"]
    held = {check["step"]: check["loss"] for check in report["validation"]}
    assert {line["step"]: line["validation_loss"] for line in log if "validation_loss" in line} == held
    assert report["best_step"] == report["steps"] == max(held)
    assert report["trainable_parameters"] == 4 * 2 * (64 + 48 + 48 + 64 + 3 * 80)  # rank (in + out), two layers
    assert {total for _, total, _ in seen} == {6000}
    assert "tokens/s" in seen[-1][2]
    assert not tiny_model.training
    trained = inject.adapted(tiny_model)["model.layers.0.mlp.up_proj"].linear.weight
    assert torch.equal(trained, frozen.model.layers[0].mlp.up_proj.weight)


class Stop(KeyboardInterrupt):
    """What Ctrl-C raises."""


def test_gradients_of_float16_do_not_fade_in_large_steps(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: Any
) -> None:
    """A mean over thousands of tokens is smaller than float16 can hold where it passes through the layers."""
    seen: list[torch.Tensor] = []

    def look(parameters: Any) -> None:
        seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]))

    monkeypatch.setattr("recovery.parallel.add_gradients", look)
    config = config_of(tokens=32_000, batch_tokens=32_000, max_length=256, validation={"fraction": 0})
    for dtype in (torch.float32, torch.float16):
        (tmp_path / str(dtype)).mkdir()
        train(copy.deepcopy(tiny_model).to(dtype), tiny_tokenizer, SOURCES, config, tmp_path / str(dtype))
    exact, half = seen
    assert torch.nn.functional.cosine_similarity(exact, half, dim=0) > 0.9999
    assert half.norm() == pytest.approx(float(exact.norm()), rel=1e-2)


@pytest.mark.parametrize("method", ["rora", "randlora", "flat_lora", "gelora", "increlora", "sora", "edora", "lorta"])
def test_a_stopped_run_goes_on_bit_for_bit(
    method: str, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    if method == "rora":  # its adapter's dropout is not the only one
        tiny_model.config.attention_dropout = 0.1
        for layer in tiny_model.model.layers:
            layer.self_attn.attention_dropout = 0.1
    config = config_of(adapter={"method": method, "rank": 4, "dropout": 0.0 if method == "rora" else 0.2})
    straight, stopped = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    report = train(straight, tiny_tokenizer, SOURCES, config, tmp_path / "a")

    def stop(done: int, total: int, note: str) -> None:
        if done > 800:
            raise Stop

    with pytest.raises(Stop):
        train(stopped, tiny_tokenizer, SOURCES, config, tmp_path / "b", stop)
    assert (tmp_path / "b" / checkpoints.LAST).is_file()
    resumed = copy.deepcopy(tiny_model)
    torch.manual_seed(99)  # the global generator must not matter
    fed: list[int] = []
    again = train(resumed, tiny_tokenizer, SOURCES, config, tmp_path / "b", lambda done, *_: fed.append(done))
    assert fed[0] > 500  # it did not begin anew
    assert without_time(again) == without_time(report)
    first, second = inject.trainable(straight), inject.trainable(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert list(map(without_time, lines(tmp_path / "a"))) == list(map(without_time, lines(tmp_path / "b")))
    other = config_of(adapter={"method": method, "rank": 4, "dropout": 0.1})
    with pytest.raises(ValueError, match="another config"):
        train(copy.deepcopy(tiny_model), tiny_tokenizer, SOURCES, other, tmp_path / "b")


def test_the_best_adapter_is_kept(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([4.0, 3.0, 2.0, 2.5])
    monkeypatch.setattr("recovery.train.mean_loss", lambda model, rows: next(losses))
    report = train(tiny_model, tiny_tokenizer, SOURCES, config_of(), tmp_path)
    assert report["validation_start"] == 4.0
    assert [check["loss"] for check in report["validation"]] == [3.0, 2.0, 2.5]
    assert report["best_step"] == report["validation"][1]["step"] < report["steps"]
    kept, last = (
        load_file(tmp_path / checkpoints.BEST.format(report["best_step"])),
        load_file(tmp_path / checkpoints.LAST),
    )
    parameters = inject.trainable(tiny_model)
    assert all(torch.equal(parameters[name], kept[name]) for name in parameters)
    assert not all(torch.equal(parameters[name], last[name]) for name in parameters)


def test_held_out_examples_are_never_fed(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from recovery import train as module

    fed: set[str] = set()
    held: set[str] = set()
    real_update, real_mean = module.row_loss, module.mean_loss

    def texts(row: Any) -> set[str]:
        starts = [n for n, position in enumerate(row.positions) if position == 0]
        return {tiny_tokenizer.decode(row.ids[a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)}

    def feeding(model: Any, row: Any) -> Any:
        fed.update(texts(row))
        return real_update(model, row)

    def checking(model: Any, rows: Any) -> float:
        for row in rows:
            held.update(texts(row))
        return real_mean(model, rows)

    monkeypatch.setattr(module, "row_loss", feeding)
    monkeypatch.setattr(module, "mean_loss", checking)
    train(tiny_model, tiny_tokenizer, SOURCES, config_of(tokens=4000), tmp_path)
    assert {"?" in text for text in held} == {True, False}  # from both sources
    assert len(fed) == 60 - 6 + 40 - 4
    assert not fed & held


def test_a_loss_that_is_not_finite(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def poison(done: int, total: int, note: str) -> None:
        if done > 600:
            tiny_model.lm_head.weight.data.fill_(torch.nan)

    with pytest.raises(
        RuntimeError, match=r"loss is nan .*at step 3 .*last good checkpoint: .* of step 2\b.*learning_rate"
    ):
        train(tiny_model, tiny_tokenizer, SOURCES, config_of(validation={"fraction": 0}), tmp_path, poison)


def test_a_loss_that_rises_far_stops_the_run(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    state, means = history.State(), []
    losses = [4.0] * 10 + [2.0] * 10 + [9.0] * 10
    for loss in losses:
        means.append(history.diverged(state, loss))
    # lowest mean 2, so more than 4: (6 * 2 + 4 * 9) / 10 = 4.8 is, (7 * 2 + 3 * 9) / 10 = 4.1 is, 3.4 is not
    assert means.index(True) == 22
    assert state.lowest == 2.0

    def spoil(done: int, total: int, note: str) -> None:
        if done > 2500:
            tiny_model.lm_head.weight.data.mul_(3)

    config = config_of(tokens=10_000, batch_tokens=128, validation={"fraction": 0})
    with pytest.raises(
        RuntimeError, match=r"has risen to .* from .* at step \d+ \(rows \d+ to \d+\); last good checkpoint"
    ) as raised:
        train(tiny_model, tiny_tokenizer, SOURCES, config, tmp_path, spoil)
    named = re.search(r"last good checkpoint: (\S+) of step (\d+)", str(raised.value))
    assert named
    written = [line["loss"] for line in lines(tmp_path)]
    first = next(step for step, loss in enumerate(written, 1) if loss > written[0] + 1)  # the model is spoilt by then
    assert int(named[2]) < first
    assert checkpoints.state_of(Path(named[1]))["step"] == int(named[2]) >= first - 5


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([2.0, 4.1], r"held-out loss is 4.1, before training it was 2, at step \d+; last good checkpoint"),
        ([2.0, 3.9, math.nan], "held-out loss is nan"),
    ],
)
def test_a_held_out_loss_far_above_the_start_stops(
    losses: list[float],
    message: str,
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However soon a run goes wrong: a rise within its first steps is no rise above their own mean."""
    found = iter(losses)
    monkeypatch.setattr("recovery.train.mean_loss", lambda model, rows: next(found))
    with pytest.raises(RuntimeError, match=message):
        train(tiny_model, tiny_tokenizer, SOURCES, config_of(), tmp_path)
    assert next(found, None) is None


def test_a_best_adapter_from_after_the_checkpoint_does_not_count(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after a best adapter was written and before the checkpoint that knows of it, then repeated otherwise."""
    found = iter([9.0, 3.0, 1.0])
    monkeypatch.setattr("recovery.train.mean_loss", lambda model, rows: next(found))
    steps: list[int] = []

    def stop(done: int, total: int, note: str) -> None:
        steps.append(len(list(tmp_path.glob("best-*"))))
        if steps[-1] == 2:
            raise Stop

    before, config = copy_of(tiny_model), config_of(checkpoint_every=0)
    with pytest.raises(Stop):
        train(tiny_model, tiny_tokenizer, SOURCES, config, tmp_path, stop)
    found = iter([3.5, 4.0])
    report = train(before, tiny_tokenizer, SOURCES, config, tmp_path)
    assert [check["loss"] for check in report["validation"]] == [3.0, 3.5, 4.0]
    kept, parameters = load_file(tmp_path / checkpoints.BEST.format(report["best_step"])), inject.trainable(before)
    assert report["best_step"] == report["validation"][0]["step"]
    assert all(torch.equal(parameters[name], kept[name]) for name in parameters)


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_puts_the_step_down(
    again: bool, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The step is finished and kept; a second Ctrl-C does not wait for that."""

    before, handler = copy_of(tiny_model), signal.default_int_handler
    signal.signal(signal.SIGINT, handler)  # which a shell may have it ignore

    def press(done: int, total: int, note: str) -> None:
        if done > 800 and (again or signal.getsignal(signal.SIGINT) != handler):
            signal.raise_signal(signal.SIGINT)

    config = config_of(checkpoint_every=math.inf)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tiny_tokenizer, SOURCES, config, tmp_path, press)
    assert signal.getsignal(signal.SIGINT) == handler
    if again:
        assert not (tmp_path / checkpoints.LAST).exists()
        return
    assert checkpoints.state_of(tmp_path / checkpoints.LAST)["step"] == len(lines(tmp_path)) > 0
    fed: list[int] = []
    train(before, tiny_tokenizer, SOURCES, config, tmp_path, lambda done, *_: fed.append(done))
    assert fed[0] > 800


def test_patience_ends_a_run_and_the_best_adapter_is_kept(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([1.9, 3.0, 2.0, 2.5, 2.1, 1.0])
    monkeypatch.setattr("recovery.train.mean_loss", lambda model, rows: next(losses))
    config = config_of(tokens=3000, validation={"fraction": 0.1, "times": 10, "patience": 2})
    report = train(tiny_model, tiny_tokenizer, SOURCES, config, tmp_path)
    assert [check["loss"] for check in report["validation"]] == [3.0, 2.0, 2.5, 2.1]
    assert report["stopped_early"]
    assert report["tokens"] <= 3000 * 0.4 + 256
    kept, parameters = load_file(tmp_path / checkpoints.BEST.format(report["best_step"])), inject.trainable(tiny_model)
    assert all(torch.equal(parameters[name], kept[name]) for name in parameters)
    # A run that was cut off after its last step does not go on either.
    again = train(copy_of(tiny_model), tiny_tokenizer, SOURCES, config, tmp_path)
    assert again["steps"] == report["steps"]


def test_a_run_whose_patience_ends_with_its_budget_was_not_stopped(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([4.0, 3.5, 3.0, 2.0, 2.5])
    monkeypatch.setattr("recovery.train.mean_loss", lambda model, rows: next(losses))
    config = config_of(tokens=3000, validation={"fraction": 0.1, "times": 4, "patience": 1})
    report = train(tiny_model, tiny_tokenizer, SOURCES, config, tmp_path)
    assert [check["loss"] for check in report["validation"]] == [3.5, 3.0, 2.0, 2.5]
    assert not report["stopped_early"]


def test_patience_is_refused_where_nothing_is_held_out(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    few = [(weight, list(examples)[:9]) for weight, examples in SOURCES]
    config = config_of(validation={"fraction": 0.05, "patience": 1})
    with pytest.raises(ValueError, match=r"no held-out loss to watch.*fraction: 0\.05"):
        train(tiny_model, tiny_tokenizer, few, config, tmp_path)


def test_increlora_has_its_average_rank_at_the_end_whatever_the_budget_left(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = config_of(tokens=3000, adapter={"method": "increlora", "rank": 4, "until": 1.0})
    report = train(tiny_model, tiny_tokenizer, SOURCES, config, tmp_path)
    assert report["tokens"] < 3000
    used = [module.method.kept["used"].sum() for module in inject.adapted(tiny_model).values()]
    assert sum(map(float, used)) == 4 * len(used)


def copy_of(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model without its adapters."""
    other = copy.deepcopy(model)
    inject.detach(other)
    return other


@pytest.mark.parametrize("method", ["rora", "dora", "randlora", "flat_lora"])
def test_gradient_checkpointing_changes_no_bit(
    method: str,
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    found: list[dict[str, torch.Tensor]] = []
    forwards: list[int] = []
    for on in (False, True):
        model, place = copy.deepcopy(tiny_model), tmp_path / str(on)
        place.mkdir()
        passes = 0
        model.model.layers[0].input_layernorm.register_forward_hook(count)
        adapter = {"method": method, "rank": 4, "dropout": 0.1}
        config = config_of(adapter=adapter, tokens=600, gradient_checkpointing=on, validation={"fraction": 0})
        train(model, tiny_tokenizer, SOURCES, config, place)
        found.append({name: tensor.detach() for name, tensor in inject.trainable(model).items()})
        forwards.append(passes)
        assert not model.is_gradient_checkpointing
    assert forwards[1] == 2 * forwards[0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_flat_loras_noise_reaches_the_passes_and_only_them(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    logs: list[list[dict[str, Any]]] = []
    for method in ({"method": "lora"}, {"method": "flat_lora", "rho": 0.5}):
        model, place = copy.deepcopy(tiny_model), tmp_path / method["method"]
        place.mkdir()
        config = config_of(adapter=method, learning_rate=1e-9)  # so small that the adapter stays where it began
        train(model, tiny_tokenizer, SOURCES, config, place)
        logs.append(lines(place))
    progress = load_file(tmp_path / "flat_lora" / checkpoints.LAST)["shared.progress"].tolist()
    assert progress == [len(logs[1]), 1.0]
    moved = [abs(mine["loss"] - theirs["loss"]) for mine, theirs in zip(*logs, strict=True)]
    assert moved[0] == 0
    assert max(moved[1:]) > 1e-3
    for mine, theirs in zip(*logs, strict=True):
        assert mine.get("validation_loss") == pytest.approx(theirs.get("validation_loss"), abs=1e-5)


def test_what_needs_whole_weights_refuses_sharded_ones(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recovery.parallel.sharded", lambda: True)
    with pytest.raises(ValueError, match="flat_lora needs whole weights: launch without FSDP"):
        train(tiny_model, tiny_tokenizer, SOURCES, config_of(adapter={"method": "flat_lora"}), tmp_path)
    assert not inject.adapted(tiny_model)


@pytest.mark.parametrize("method", sorted(adapters.names()))
def test_masters_are_float32_on_a_bfloat16_base(
    method: str, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Steps far smaller than a bfloat16's last digit are not lost."""
    model = tiny_model.bfloat16()
    still = {"threshold": 0} if method == "sora" else {}  # sora's own step is larger than the optimizer's
    config = config_of(adapter={"method": method, **still}, tokens=800, learning_rate=1e-6, warmup=0)
    inject.attach(model, config.adapter, config.seed)
    before = {name: tensor.detach().clone() for name, tensor in inject.trainable(model).items()}
    inject.detach(model)
    train(model, tiny_tokenizer, SOURCES, config, tmp_path)
    parameters = inject.trainable(model)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    moments = load_file(tmp_path / checkpoints.LAST)
    assert {tensor.dtype for name, tensor in moments.items() if ":" in name} == {torch.float32}
    moved = [(parameters[name].detach() - before[name]).abs().max() for name in before]
    assert 0 < float(max(moved)) < 1e-4
    assert {module.linear.weight.dtype for module in inject.adapted(model).values()} == {torch.bfloat16}


class Gated(lora.Method):
    """LoRA with a counter that is kept, a shared gain, and both hooks."""

    @classmethod
    def share(cls, config: lora.LowRankConfig, layers: list[Layer], seed: int) -> Tensors:
        return Tensors(trainable={"gain": torch.ones(1)})

    def __init__(self, config: lora.LowRankConfig, layer: Layer, shared: Tensors) -> None:
        super().__init__(config, layer, shared)
        self.kept["steps"] = torch.zeros(1)

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        return self.shared.trainable["gain"] * super().delta(weight)

    def forward(self, x: torch.Tensor, weight: torch.Tensor, product: torch.Tensor | None) -> torch.Tensor:
        return Adapter.forward(self, x, weight, product)

    @classmethod
    def after_step(cls, layers: Mapping[str, Adapter[Any]], share: float) -> None:
        for layer in layers.values():
            assert layer.trainable["B"].grad is not None
            layer.kept["steps"] += 1
            layer.trainable["B"].clamp_(-0.001, 0.001)

    @classmethod
    def finish(cls, layers: Mapping[str, Adapter[Any]]) -> None:
        for layer in layers.values():
            layer.trainable["B"].mul_(2)


def test_shared_parameters_kept_tensors_and_hooks(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = SimpleNamespace(Method=Gated, Config=lora.Config, VERSION=7)
    monkeypatch.setattr(adapters, "load", lambda name: module)
    other, config = copy.deepcopy(tiny_model), config_of(adapter={"method": "lora"}, validation={"fraction": 0})
    report = train(tiny_model, tiny_tokenizer, SOURCES, config, tmp_path)
    assert set(inject.kept(tiny_model)) == {f"{name}.steps" for name in inject.adapted(tiny_model)}
    assert {float(tensor) for tensor in inject.kept(tiny_model).values()} == {report["steps"]}
    parameters = inject.trainable(tiny_model)
    assert float(parameters["shared.gain"].detach()) != 1.0
    assert float(parameters["model.layers.1.mlp.up_proj.B"].abs().max().detach()) == pytest.approx(0.002)
    last = load_file(tmp_path / checkpoints.LAST)
    assert float(last["model.layers.0.mlp.up_proj.steps"]) == report["steps"]
    inject.save(tiny_model, tmp_path / "adapter", config.seed)
    inject.attach_saved(other, tmp_path / "adapter")
    ids = torch.tensor([[1, 40, 50, 60]])
    assert torch.equal(other(ids).logits, tiny_model(ids).logits)
    assert {float(tensor) for tensor in inject.kept(other).values()} == {report["steps"]}


def test_config() -> None:
    config = config_of()
    assert config.adapter == adapters.load("rora").Config(rank=4, alpha=4)
    dumped = config.model_dump(mode="json")
    low_rank = {"rank": 4, "alpha": 4.0, "rank_pattern": {}, "alpha_pattern": {}}
    assert dumped["adapter"] == {"method": "rora", "targets": "all-linear", "dropout": 0.0, **low_rank}
    assert "checkpoint_every" not in dumped  # when a checkpoint is taken changes no result
    assert RecoveryConfig.model_validate({**dumped, "checkpoint_every": 0}) == config


@pytest.mark.parametrize(
    ("options", "place", "message"),
    [
        ({"adapter": {"method": "rorra"}}, ("adapter",), r"no adapter is called 'rorra' \(did you mean 'rora'\?\)"),
        ({"adapter": {"rank": 4}}, ("adapter",), "no adapter is called None; there are dora, edora"),
        ({"adapter": {"method": "rora", "rnak": 4}}, ("adapter", "rnak"), "Extra inputs"),
        ({"adapter": {"method": "lora", "rank": 0}}, ("adapter", "rank"), "greater than or equal to 1"),
        ({"loss": "answer"}, ("loss",), "'response' or 'full'"),
        ({"tokens": 100}, (), "tokens: 100 is less than one step of batch_tokens 256"),
        ({"max_length": 512}, (), "batch_tokens: 256 is less than one row"),
        ({"validation": {"every": 3}}, ("validation", "every"), "Extra inputs"),
    ],
)
def test_bad_configs(options: dict[str, Any], place: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        config_of(**options)
    assert caught.value.errors()[0]["loc"] == place


@pytest.mark.parametrize(("longest", "step"), [({}, 512), ({"max_length": 1024}, 1024), ({"max_length": 64}, 512)])
def test_a_step_holds_a_row_where_it_is_not_said(longest: dict[str, int], step: int) -> None:
    config = RecoveryConfig.model_validate({"adapter": {"method": "lora"}, "tokens": 5000, **longest})
    assert config.batch_tokens == step
    assert RecoveryConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("adapter", "rate"),
    [
        ({"method": "lora"}, 2e-3),
        ({"method": "lora", "rank": 32, "alpha": 64}, 1.41e-3),  # 0.016 / (2 sqrt(32))
        ({"method": "lora", "rank": 64, "alpha": 512}, 2.5e-4),  # 0.016 / (8 sqrt(64)), as the next
        ({"method": "rora", "rank": 64, "alpha": 64}, 2.5e-4),
        ({"method": "rora"}, 5e-4),
        ({"method": "rora", "rank": 128, "alpha": 128}, 1.25e-4),
        ({"method": "rora", "rank": 2, "alpha": 2}, 2e-3),
        ({"method": "rora", "alpha_pattern": {"q_proj": 640}}, 2.5e-5),  # 0.016 / 640: one rate for all layers
        ({"method": "gelora", "rank_pattern": {"q_proj": 64}}, 1e-3),  # 0.016 / (2 sqrt(64)): one scale for all ranks
        ({"method": "melora", "rank": 64, "alpha": 512}, 2e-3),
        ({"method": "nola"}, 1e-2),
    ],
)
def test_the_learning_rate_is_the_methods_where_it_is_not_said(adapter: dict[str, Any], rate: float) -> None:
    config = {"adapter": adapter, "tokens": 5000}
    rates = [RecoveryConfig.model_validate(config | more).learning_rate for more in ({}, {"learning_rate": 1e-3})]
    assert rates == [rate, 1e-3]


def test_configs_and_methods_need_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from recovery import adapters; from recovery.config import RecoveryConfig; "
        "[RecoveryConfig(adapter={'method': name}, tokens=10**5) for name in adapters.names()]; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
