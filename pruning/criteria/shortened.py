"""Shortened LLaMA: whole decoder layers, ranked by what the loss does without each, or by its Taylor importance.

Paper: arXiv 2402.02834.

    ablation   the mean next-token loss with exactly one layer left out; the layers whose absence hurts least go, all at
               once (the paper's PPL)
    taylor     sum of |w g| over the layer's projections, the lowest go

The paper's "+" never drops the first four and the last two layers: `protect: {first: 4, last: 2}`, the default here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pruning.config import Protect, PruningConfig, Statistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pruning.structures import Scores, Vectors

VERSION = 1


class Config(PruningConfig):
    """`order`: what ranks the layers."""

    method: Literal["shortened"] = "shortened"
    structures: tuple[Literal["layers"], ...] = ("layers",)
    order: Literal["ablation", "taylor"] = "ablation"
    protect: Protect = Protect(first=4, last=2)


def statistics(config: Config | None) -> tuple[Statistic, ...]:
    """Losses without each layer, or gradients; as a depth criterion (None) the former."""
    if config and config.order == "taylor":
        return (Statistic("gradients", (("curvature", False), ("hidden", False))),)
    return (Statistic("ablation"),)


def scores(model: PreTrainedModel, statistics: Vectors, config: PruningConfig) -> Scores:
    """One score a layer."""
    from pruning.structures import architecture, couple

    if "layers.ablation" in statistics:
        return {"layers": [statistics["layers.ablation"]]}
    vectors = {name.replace(".absolute.", "."): v for name, v in statistics.items() if ".absolute." in name}
    return couple(vectors, architecture(model), ("layers",))
