"""FLAP: fluctuation of the input features of the output projections, and a bias that makes up for their mean.

Paper: arXiv 2312.11983. With W the weight of down_proj or o_proj, and v_j the variance of its input feature j over all
calibration tokens,

    WIFV (default)   S_j = v_j |W_:,j|^2
    IFV              S_j = v_j
    WIFN             S_j = mean over i of |W_ij| * sqrt(mean of x_j^2)

o_proj's S is squared once more; then S is standardised over the features of one layer, by projection, and a head's or
group's score is the mean over its features. So scores of all layers are on one scale, and `allocation: global` ranks
them together (the paper's AL-AM); `uniform` ranks by layer (its UL-UM). `compensation: bias`, the default here, adds
W_:,j times the mean of each removed feature to the projection's bias.

Ours: exact variance over tokens (the original leaves out the first sample's and mixes old and new means); a group of
grouped-query attention costs what it frees; the best structure of each kind stays in every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pruning.config import Compensation, CompensationOrName, PruningConfig, Statistic

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pruning.structures import Scores, Vectors

VERSION = 1

COMPARABLE = True


class Config(PruningConfig):
    """`metric`: the paper's names."""

    method: Literal["flap"] = "flap"
    structures: tuple[Literal["ffn", "attention", "heads"], ...] = Field(default=("ffn", "attention"), min_length=1)
    metric: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    compensation: CompensationOrName = Compensation(method="bias")


def statistics(config: Config) -> tuple[Statistic, ...]:
    """Mean, variance and mean square of the inputs of o_proj and down_proj."""
    return (Statistic("activations"),)


def scores(model: PreTrainedModel, statistics: Vectors, config: Config) -> Scores:
    """Standardised importance of every structure; float32."""
    from pruning.structures import architecture, named_weights, per_output_unit

    weights = named_weights(model, hidden=False)

    def features(name: str) -> Tensor:
        weight = weights[name].detach().float()
        variance = statistics[f"{name}.variance"].to(weight.device)
        if config.metric == "WIFV":
            values = variance * weight.square().sum(0)
        elif config.metric == "IFV":
            values = variance
        else:
            values = weight.abs().mean(0) * statistics[f"{name}.square"].to(weight.device).sqrt()
        values = values.square() if name.endswith("o_proj") else values
        values = values.double()
        return ((values - values.mean()) / values.std().clamp(min=1e-30)).float()

    return per_output_unit(features, architecture(model), config.structures, mean=True)
