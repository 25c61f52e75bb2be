"""LLM-Pruner: Taylor importance of coupled weights, block-wise, channel-wise or layer-wise.

Paper: arXiv 2305.11627. With w a weight and g the gradient of the mean next-token loss of all calibration samples in
one batch, the salience S of a weight and the score of a structure in one tensor are

    vectorize      S = w g                      |sum of S over the row or column|
    param_first    S = w g                      sum of |S|          (Element^1 in the paper's table; the default)
    param_second   S = w h w                    sum of |S|          (Element^2)
    param_mix      S = w g - 0.5 w h w          sum of |S|

with h the mean over samples of the squared per-sample gradient. A structure's score is the sum over its tensors; a
head's is the sum over its channels (`vectorize` takes the absolute value channel by channel). Ranking is by layer.
`structures: [ffn, attention]` is the paper's block-wise mode, `[hidden]` its channel-wise mode.

Ours: with grouped-query attention the query side is summed over the contiguous block of a group's heads, where the
original code folds it modulo the number of groups. Whole layers are ranked by the sum over their projections (the
original keeps the first ones, unscored). Gradients are reduced layer by layer; products and sums are float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from pruning.config import PruningConfig, Statistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pruning.structures import Scores, Vectors

VERSION = 2


class Config(PruningConfig):
    """`taylor` chooses the salience; `param_second` and `param_mix` take one backward pass a sample."""

    method: Literal["llm_pruner"] = "llm_pruner"
    taylor: Literal["vectorize", "param_first", "param_second", "param_mix"] = "param_first"

    @model_validator(mode="after")
    def _measured(self) -> Config:
        if "hidden" in self.structures and self.taylor in ("param_second", "param_mix"):
            raise ValueError(f"taylor: {self.taylor} is not measured for hidden channels; use param_first or vectorize")
        return self


def statistics(config: Config) -> tuple[Statistic, ...]:
    """Gradients; with their squares by sample where the salience has h."""
    curvature = config.taylor in ("param_second", "param_mix")
    return (Statistic("gradients", (("curvature", curvature), ("hidden", "hidden" in config.structures))),)


def scores(model: PreTrainedModel, statistics: Vectors, config: Config) -> Scores:
    """Importance of every structure; float32."""
    from pruning.structures import architecture, couple

    sums = {"vectorize": "signed", "param_first": "absolute", "param_second": "second", "param_mix": "mixed"}
    kind = f".{sums[config.taylor]}."
    vectors = {name.replace(kind, "."): values for name, values in statistics.items() if kind in name}
    if config.taylor == "vectorize":
        vectors = {name: values.abs() for name, values in vectors.items()}
    return couple(vectors, architecture(model), config.structures)
