"""LLM-Pruner: block-wise Taylor importance of coupled weights.

Paper: arXiv 2305.11627. With w a weight and g the gradient of the mean next-token loss of all calibration samples in
one batch, the salience S of a weight and the score of a structure in one tensor are

    vectorize      S = w g                      |sum of S over the row or column|
    param_first    S = w g                      sum of |S|          (Element^1 in the paper's table; the default)
    param_second   S = w h w                    sum of |S|          (Element^2)
    param_mix      S = w g - 0.5 w h w          sum of |S|

with h the mean over samples of the squared per-sample gradient. A structure's score is the sum over its tensors; a
head's is the sum over its channels (`vectorize` takes the absolute value channel by channel). Ranking is by layer.

Ours: with grouped-query attention the query side is summed over the contiguous block of a group's heads, where the
original code folds it modulo the number of groups. Gradients are reduced to scores as they come and freed; products
and sums are float32 whatever the model's dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pruning.config import Kind, PruningConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from pruning.structures import Member

VERSION = 1


class Config(PruningConfig):
    """`taylor` chooses the salience; `param_second` and `param_mix` take one more backward pass a sample."""

    method: Literal["llm_pruner"] = "llm_pruner"
    taylor: Literal["vectorize", "param_first", "param_second", "param_mix"] = "param_first"


def scores(
    model: PreTrainedModel, input_ids: Tensor, config: Config, progress: Callable[[int, int, str], None]
) -> list[dict[Kind, Tensor]]:
    """Importance of every structure on `input_ids` [samples, length]; float32, on the model's device."""
    from pruning.statistics import stream_gradients

    found: list[dict[Kind, Tensor]] = [{} for _ in range(model.config.num_hidden_layers)]
    curvature: dict[int, Tensor] = {}  # param_mix only: h of each weight, by the member's identity
    samples = len(input_ids)
    steps = samples + 1 if config.taylor in ("param_second", "param_mix") else 1

    def add(layer: int, kind: Kind, score: Tensor) -> None:
        found[layer][kind] = found[layer][kind] + score if kind in found[layer] else score

    def first_order(layer: int, kind: Kind, member: Member, gradient: Tensor) -> None:
        salience = member.linear.weight.detach().float() * gradient.float()
        if config.taylor == "vectorize":
            add(layer, kind, member.per_index(salience).abs().view(-1, member.size).sum(1))
            return
        if config.taylor == "param_mix":
            squared = member.linear.weight.detach().float() ** 2
            salience = salience - 0.5 * squared * curvature.pop(id(member.linear))
        add(layer, kind, member.per_unit(salience.abs()))

    def second_order(layer: int, kind: Kind, member: Member, gradient: Tensor) -> None:
        # |w h w| is a sum of squares, so the mean over samples may be taken of the scores instead of the weights.
        salience = (member.linear.weight.detach().float() * gradient.float()) ** 2
        add(layer, kind, member.per_unit(salience) / samples)

    def accumulate(layer: int, kind: Kind, member: Member, gradient: Tensor) -> None:
        share = gradient.float() ** 2 / samples
        key = id(member.linear)
        curvature[key] = curvature[key] + share if key in curvature else share

    if config.taylor in ("param_second", "param_mix"):
        reduce = second_order if config.taylor == "param_second" else accumulate
        for index in range(samples):
            progress(index, steps, "per-sample gradients")
            stream_gradients(model, input_ids[index : index + 1], config.structures, reduce)
    if config.taylor != "param_second":
        progress(steps - 1, steps, "gradients")
        stream_gradients(model, input_ids, config.structures, first_order)
    progress(steps, steps, "scored")
    return found
