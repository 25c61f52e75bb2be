"""Random: a seeded uniform score for every structure; the floor that a criterion must beat.

One score a structure, so its coupled tensors are cut at the same places. The seed is part of the result's key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pruning.config import PruningConfig, Statistic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pruning.structures import Scores, Vectors

VERSION = 2


class Config(PruningConfig):
    """Nothing but the seed."""

    method: Literal["random"] = "random"


def statistics(config: Config) -> tuple[Statistic, ...]:
    """Nothing: calibration text is not looked at."""
    return ()


def scores(model: PreTrainedModel, statistics: Vectors, config: Config) -> Scores:
    """Uniform numbers from a private generator."""
    import torch

    from pruning.structures import architecture

    shape = architecture(model)
    generator = torch.Generator().manual_seed(config.seed)
    counts = {
        "ffn": [layer.ffn for layer in shape.layers],
        "attention": [layer.groups for layer in shape.layers],
        "heads": [layer.groups * layer.heads for layer in shape.layers],
        "hidden": [shape.hidden],
        "layers": [len(shape.layers)],
    }
    return {kind: [torch.rand(count, generator=generator) for count in counts[kind]] for kind in config.structures}
