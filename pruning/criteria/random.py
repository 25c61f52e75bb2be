"""Random: a seeded uniform score for every structure; the floor that a criterion must beat.

One score a structure, so its coupled tensors are cut at the same places. The seed is part of the result's key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pruning.config import Kind, PruningConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

VERSION = 1


class Config(PruningConfig):
    """Nothing but the seed."""

    method: Literal["random"] = "random"


def scores(
    model: PreTrainedModel, input_ids: Tensor, config: Config, progress: Callable[[int, int, str], None]
) -> list[dict[Kind, Tensor]]:
    """Uniform numbers from a private generator; `input_ids` is not looked at."""
    import torch

    from pruning.structures import decoder_layers, widths

    generator = torch.Generator().manual_seed(config.seed)
    return [
        {kind: torch.rand(widths(layer).count(kind), generator=generator) for kind in config.structures}
        for layer in decoder_layers(model)
    ]
