"""Magnitude: the size of a structure's weights, without looking at any text.

`coupled` sums |w|^p over all that a structure owns (LLM-Pruner's `l1` and `l2`, arXiv 2305.11627, where no root is
taken; its mean over the coupled tensors ranks alike). `output` takes the p-norm of the columns of down_proj and o_proj
that read the structure (FLAP's baseline `mag_sp`, arXiv 2312.11983), summed over a head's channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from pruning.config import PruningConfig, Statistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pruning.structures import Scores, Vectors

VERSION = 1


class Config(PruningConfig):
    """`norm` l1 or l2; `tensors` whether all coupled weights count or only those that write the output."""

    method: Literal["magnitude"] = "magnitude"
    norm: Literal["l1", "l2"] = "l2"
    tensors: Literal["coupled", "output"] = "coupled"

    @model_validator(mode="after")
    def _owned(self) -> Config:
        if self.tensors == "output" and {"hidden", "layers"} & set(self.structures):
            raise ValueError("tensors: output columns belong to ffn, attention and heads; use coupled")
        return self


def statistics(config: Config) -> tuple[Statistic, ...]:
    """Nothing: calibration text is not looked at."""
    return ()


def scores(model: PreTrainedModel, statistics: Vectors, config: Config) -> Scores:
    """Sums of |w|^p in float32; `statistics` is not looked at."""
    from pruning.structures import architecture, couple, named_weights, per_output_unit

    power = 1 if config.norm == "l1" else 2
    vectors: Vectors = {}
    for name, weight in named_weights(model, hidden="hidden" in config.structures).items():
        values = weight.detach().float().abs().pow(power)
        if weight.ndim == 1:
            vectors[f"{name}.columns"] = values
        else:
            vectors |= {f"{name}.rows": values.sum(1), f"{name}.columns": values.sum(0)}
    if config.tensors == "coupled":
        return couple(vectors, architecture(model), config.structures)
    return per_output_unit(
        lambda name: vectors[f"{name}.columns"].pow(1 / power), architecture(model), config.structures
    )
