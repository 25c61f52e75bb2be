"""GeLoRA: LoRA whose ranks follow the intrinsic dimension of the hidden states, measured before training.

Paper: arXiv 2412.09250. The dimension of a layer's input and output is estimated by TwoNN (`recovery.dimension`), and
its increase bounds from below the rank that a change of the layer needs. Delta and merge are LoRA's: dW = s B A.

Ours, for the paper's exact rule is not published in reach: block l, between streams of dimension d_l and d_l+1, finds
max(ceil(d_l+1 - d_l), 0) + 1 for all its matrices. Found ranks are small; by default (`ranks: scaled`) they are
multiplied by what brings the parameters to those of LoRA at `rank`, and rounded, 1 to `limit`. `ranks: found` takes
them as they are. s = alpha / `rank` in every layer, whatever its rank. The streams are measured on `tokens` tokens of
the run's own training rows, in two halves: the mean is taken, both are reported, and they can lie far apart. Layers
that `rank_pattern` names keep its rank. The saved adapter's `rank_pattern` holds the rank of every layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from recovery.adapters import lora
from recovery.base import of_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from recovery.data import Row

VERSION = 1


class Config(lora.FactorsConfig, frozen=True):
    """GeLoRA's options."""

    method: Literal["gelora"] = "gelora"
    ranks: Literal["scaled", "found"] = Field(default="scaled", description="to LoRA's parameters at `rank`, or as is")
    limit: int = Field(default=64, ge=1, description="highest rank of one layer")
    tokens: int = Field(default=4000, ge=100, description="training tokens whose hidden states are measured")

    def reach(self, name: str) -> float:
        """LoRA's s sqrt(rank), with the one scale; ranks that are only found later do not count."""
        return self.alpha / self.rank * math.sqrt(self.rank_of(name))


class Method(lora.Method[Config]):
    """LoRA with one scale for all ranks."""

    def scale(self) -> float:
        return self.alpha / self.config.rank

    @classmethod
    def fit(
        cls, config: Config, model: PreTrainedModel, rows: Iterable[Row], seed: int
    ) -> tuple[Config, dict[str, Any]]:
        from recovery import dimension, inject, parallel

        halves = [[0.0] * dimension.PARTS] * (dimension.depth(model) + 1)
        if parallel.rank() == 0:
            halves = dimension.of_streams(model, rows, config.tokens, seed)
        agreed = iter(parallel.add_up([value for pair in halves for value in pair]))  # the same in all processes
        halves = [[next(agreed) for _ in pair] for pair in halves]
        means = [sum(pair) / len(pair) for pair in halves]
        found = [max(math.ceil(after - before), 0) + 1 for before, after in itertools.pairwise(means)]
        sizes = {name: sum(linear.weight.shape) for name, linear in inject.targets(model, config).items()}
        ranks = {name: found[_block(name)] for name in sizes}
        if config.ranks == "scaled":
            factor = config.rank * sum(sizes.values()) / sum(size * ranks[name] for name, size in sizes.items())
            ranks = {name: round(factor * rank) for name, rank in ranks.items()}
        ranks = {name: min(max(rank, 1), config.limit) for name, rank in ranks.items()}
        pattern = {name: of_pattern(name, config.rank_pattern, rank) for name, rank in ranks.items()}
        said = {
            "dimensions": [[round(value, 3) for value in pair] for pair in halves],
            "found": found,
            "ranks": pattern,
        }
        return config.model_copy(update={"rank_pattern": pattern}), said


def _block(name: str) -> int:
    """The number of the decoder layer that a module is in: 3 for model.layers.3.mlp.up_proj."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1])
