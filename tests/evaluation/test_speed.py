"""Counts of work against formulas, repetition against texts counted by hand."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from evaluation.fluency import distinct, measures, repetition
from evaluation.speed import macs, measure


def test_macs_are_those_of_the_layers(tiny_model: LlamaForCausalLM):
    length, hidden, ffn, vocabulary = 10, 32, 48, tiny_model.config.vocab_size
    projections = 2 * hidden * hidden + 2 * hidden * 16 + 3 * hidden * ffn  # q, o; k, v of two heads of 8; the FFN
    attention = 2 * 4 * length * length * 8  # scores and sums of four heads
    assert macs(tiny_model, length) == 2 * (length * projections + attention) + length * hidden * vocabulary


def test_models_are_measured_in_turn(tiny_model: LlamaForCausalLM):
    torch.manual_seed(3)
    small = LlamaForCausalLM(type(tiny_model.config)(**{**tiny_model.config.to_dict(), "num_hidden_layers": 1})).eval()
    order: list[str] = []
    found = measure({"dense": tiny_model, "small": small}, 16, 4, 2, 2, lambda done, total, note: order.append(note))
    assert order == ["dense", "small", "small", "dense", "dense", "small"]
    assert found["small"].macs < found["dense"].macs
    assert found["small"].parameters == sum(p.numel() for p in small.parameters()) < found["dense"].parameters
    for speed in found.values():
        assert speed.bytes == 4 * speed.parameters
        assert min(speed.prefill_tokens_per_second, speed.decode_tokens_per_second, speed.latency_seconds) > 0
        assert speed.peak_bytes is None or speed.peak_bytes >= speed.bytes
    with pytest.raises(ValueError, match="dense: 250 prompt and 32 new tokens do not fit into its window of 256"):
        measure({"dense": tiny_model}, 250)


def test_repetition_and_distinct_by_hand():
    looping, plain = "a b a b a b a b", "one two three four five"
    assert repetition([looping], 4) == pytest.approx(1 - 2 / 5)  # abab, baba of five
    assert repetition([plain], 4) == 0.0
    assert distinct([looping, plain], 1) == pytest.approx(7 / 13)
    assert distinct([looping], 2) == pytest.approx(2 / 7)
    found: dict[str, Any] = measures(["", plain])
    assert (found["empty"], found["words"]) == (1, 2.5)
