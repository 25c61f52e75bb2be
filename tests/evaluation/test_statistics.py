"""Errors and verdicts against scipy, a bootstrap, and values worked by hand."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from evaluation import items
from evaluation.statistics import compare, has_signal, interval, mcnemar, standard_error, t_quantile


def scored(right: list[int], gold: list[float] | None = None) -> list[dict[str, Any]]:
    golds = gold or [-1.0] * len(right)
    return [
        {"index": n, "doc_hash": f"h{n}", "acc": float(a), "gold_logprob": g}
        for n, (a, g) in enumerate(zip(right, golds, strict=True))
    ]


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)  # by hand: (1 + 10) / 2^10 on each side
    for wins, losses in ((0, 5), (2, 9), (40, 61)):
        assert mcnemar(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)


def test_intervals_are_student_t_and_agree_with_a_bootstrap():
    for freedom in (3, 5, 10, 50):
        assert t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.01)
    chance = np.random.default_rng(0)
    values = list(chance.normal(0.1, 1.0, 300))
    low, high = interval(values)
    expected = stats.t.interval(0.95, 299, loc=np.mean(values), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=1e-5)
    means = chance.choice(values, (4000, 300)).mean(1)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)
    assert standard_error(values) == pytest.approx(stats.sem(values))
    assert interval([1.0]) == (-math.inf, math.inf)


def test_verdicts():
    dense = scored([1] * 10 + [0] * 10)
    same = compare(dense, dense, "acc")
    assert (same.verdict, same.p, same.gold_verdict) == ("no difference seen", 1.0, "no difference seen")
    worse = compare(dense, scored([0] * 9 + [1] + [0] * 10), "acc")
    assert (worse.verdict, worse.wins, worse.losses, worse.difference) == ("worse", 0, 9, -0.45)
    assert compare(scored([0] * 20), dense, "acc").verdict == "better"
    # Accuracy stands still while every right answer becomes a little less likely.
    golds = [-1.0 - 0.01 * n for n in range(20)]
    slight = compare(
        scored([1] * 20, golds), scored([1] * 20, [g - 0.1 - 0.001 * (n % 3) for n, g in enumerate(golds)]), "acc"
    )
    assert (slight.verdict, slight.gold_verdict) == ("no difference seen", "worse")
    assert slight.gold_difference == pytest.approx(-0.10095)


def test_equal_models_rarely_differ():
    """The stated error rate, over 400 pairs of models that are right on 60% of 100 items by chance alone."""
    chance = np.random.default_rng(1)
    found = [compare(*(scored(list(chance.random(100) < 0.6)) for _ in range(2)), "acc").verdict for _ in range(400)]
    seen = sum(verdict != "no difference seen" for verdict in found)
    assert seen <= 20 + 3 * (400 * 0.05 * 0.95) ** 0.5  # the rate, and three deviations of a count of 400


def test_items_are_paired_by_question(tmp_path: Any):
    few, many = scored([1, 0, 1]), scored([1, 1, 1, 0])
    many[0]["text"] = "what was generated, \u2028 and \x85 in it"
    assert compare(few, many, "acc").n == 3
    with pytest.raises(ValueError, match="item 0 is not the same question"):
        compare(few, [{**many[0], "doc_hash": "other"}], "acc")
    with pytest.raises(ValueError, match="no item in common"):
        compare(few, many[3:], "acc")
    items.write(tmp_path / items.ITEMS, many)
    assert items.read(tmp_path / items.ITEMS) == many
    (tmp_path / items.ITEMS).write_text('{"index": 0, "doc_hash": "x"}\n{"index"')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        items.read(tmp_path / items.ITEMS)


def test_signal_is_more_than_chance():
    score = {"acc": 0.32, "acc_stderr": 0.04, "chance": 0.25}
    assert has_signal(score, "acc")  # 0.32 - 1.645 x 0.04 = 0.254
    assert not has_signal({**score, "chance": 0.26}, "acc")
