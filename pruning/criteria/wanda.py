"""Wanda-sp: weights of the output projections times the size of what they read.

Criterion arXiv 2306.11695, structured form as in the FLAP paper's comparison (arXiv 2312.11983). With W the weight of
down_proj or o_proj and x_j its input feature j over all calibration tokens,

    score_j = mean over i of |W_ij|  *  sqrt(mean of x_j^2)

and a head's or group's score is the sum over its channels; the ranking is by layer.

Ours: statistics are the dense model's, so that one measurement serves every ratio; the original measures each layer
behind the layers it has pruned already. Means in place of sums over tokens are a constant factor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pruning.config import PruningConfig, Statistic

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pruning.structures import Scores, Vectors

VERSION = 1


class Config(PruningConfig):
    """Nothing of its own."""

    method: Literal["wanda"] = "wanda"
    structures: tuple[Literal["ffn", "attention", "heads"], ...] = Field(default=("ffn", "attention"), min_length=1)


def statistics(config: Config) -> tuple[Statistic, ...]:
    """The mean squares of the inputs of o_proj and down_proj."""
    return (Statistic("activations"),)


def scores(model: PreTrainedModel, statistics: Vectors, config: Config) -> Scores:
    """Importance of every structure; float32."""
    from pruning.structures import architecture, named_weights, per_output_unit

    weights = named_weights(model, hidden=False)

    def features(name: str) -> Tensor:
        weight = weights[name].detach()
        return weight.float().abs().mean(0) * statistics[f"{name}.square"].to(weight.device).sqrt()

    return per_output_unit(features, architecture(model), config.structures)
