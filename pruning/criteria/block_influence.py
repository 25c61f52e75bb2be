"""Block influence (ShortGPT): how much a decoder layer turns the residual stream.

Paper: arXiv 2403.03853. With h_l the residual stream before layer l, over all tokens of all samples,

    score_l = 1 - mean of cos(h_l, h_l+1)

The lowest go. One forward pass, and whole layers only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pruning.config import PruningConfig, Statistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pruning.structures import Scores, Vectors

VERSION = 1


class Config(PruningConfig):
    """`ratio` says how many layers go: the number nearest to it."""

    method: Literal["block_influence"] = "block_influence"
    structures: tuple[Literal["layers"], ...] = ("layers",)


def statistics(config: Config | None) -> tuple[Statistic, ...]:
    """The cosine of the residual stream before and after each layer."""
    return (Statistic("activations"),)


def scores(model: PreTrainedModel, statistics: Vectors, config: PruningConfig) -> Scores:
    """One score a layer."""
    return {"layers": [statistics["layers.influence"]]}
