"""How sure a score is, and whether two models differ: paired on the same items, so that hard items cancel out.

Accuracy: McNemar's exact test on the items where one model is right and the other wrong. Gold log-probability: a
paired t interval of the mean difference, which shows a change long before accuracy does. No torch here.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

LEVEL = 0.05  # a verdict is wrong in at most one of twenty comparisons of equal models
VERDICTS = ("better", "worse", "no difference seen")
Item = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A second model against a first on the same items. `difference` is second less first.

    `wins` and `losses` count items that only the second, only the first answers rightly; `p` is McNemar's. The gold
    fields are None where items have no gold log-probability (nats a token); `low` and `high` bound 95%.
    """

    n: int
    first: float
    second: float
    difference: float
    stderr: float
    wins: int
    losses: int
    p: float
    verdict: str
    gold_difference: float | None = None
    gold_low: float | None = None
    gold_high: float | None = None
    gold_verdict: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Sample standard deviation over the square root of n; 0 for one value, since JSON has no NaN."""
    middle, count = mean(values), len(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (count - 1) / count) if count > 1 else 0.0


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of `wins` against `losses`: how often equal models differ at least so lopsidedly."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)


def t_quantile(share: float, freedom: int) -> float:
    """Student's t quantile by its expansion about the normal's (Abramowitz & Stegun 26.7.5).

    Off by less than 0.01 from three degrees of freedom on; with fewer it is too small.
    """
    z = NormalDist().inv_cdf(share)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / freedom + second / freedom**2 + third / freedom**3 + fourth / freedom**4


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean; the whole line, as far as floats go, for a single value."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = t_quantile(1 - LEVEL / 2, len(values) - 1) * standard_error(values)
    return mean(values) - half, mean(values) + half


def compare(first: Sequence[Item], second: Sequence[Item], metric: str) -> Comparison:
    """Two models' items of one suite, paired by index. Items that only one has are left out.

    Raises ValueError when they share none, or an index stands for different questions.
    """
    known = {item["index"]: item for item in first}
    pairs = [(known[item["index"]], item) for item in second if item["index"] in known]
    if not pairs:
        raise ValueError("the two have no item in common")
    for left, right in pairs:
        if left["doc_hash"] != right["doc_hash"]:
            raise ValueError(f"item {left['index']} is not the same question in both: they were scored on other rows")
    values = [(float(left[metric]), float(right[metric])) for left, right in pairs]
    changes = [right - left for left, right in values]
    wins, losses = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    p = mcnemar(wins, losses)
    gold: dict[str, Any] = {}
    if all(item.get("gold_logprob") is not None for pair in pairs for item in pair):
        moved = [right["gold_logprob"] - left["gold_logprob"] for left, right in pairs]
        low, high = interval(moved)
        bounds = {"gold_low": low, "gold_high": high} if math.isfinite(low) else {}
        gold = {"gold_difference": mean(moved), **bounds, "gold_verdict": _verdict(low > 0, high < 0)}
    sides = mean([left for left, _ in values]), mean([right for _, right in values])
    verdict = _verdict(p < LEVEL and wins > losses, p < LEVEL and losses > wins)
    return Comparison(len(pairs), *sides, mean(changes), standard_error(changes), wins, losses, p, verdict, **gold)


def has_signal(metrics: Item, metric: str) -> bool:
    """Whether a score is above chance by more than a one-sided 5% error."""
    margin = NormalDist().inv_cdf(1 - LEVEL) * metrics[f"{metric}_stderr"]
    return metrics[metric] - margin > metrics["chance"]


def _verdict(better: bool, worse: bool) -> str:
    return VERDICTS[0] if better else VERDICTS[1] if worse else VERDICTS[2]
