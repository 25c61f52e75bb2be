"""Pruning: score, allocate, cut."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pruning import criteria
from pruning.allocation import Kept, allocate
from pruning.config import PruningConfig
from pruning.structures import count_parameters, decoder_layers, widths
from pruning.surgery import cut


@dataclass(frozen=True)
class PruneResult:
    """`kept`: indices of the kept structures by layer and kind, in the original numbering; `widths`: out of how many.

    `report`: parameters before and after, the ratio asked and reached, and the widths of each layer.
    """

    model: PreTrainedModel
    kept: list[Kept]
    widths: list[dict[str, int]]
    report: dict[str, Any]


def prune(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: PruningConfig,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> PruneResult:
    """Remove `config.ratio` of the model's parameters by the criterion that `config.method` names.

    `input_ids`: calibration tokens [samples, length]. Consumes `model`. Raises ValueError, with the model whole,
    when it is not LLaMA-like, when scores are not finite, or when the ratio cannot be reached.
    """
    layers = decoder_layers(model)
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"calibration tokens have shape {list(input_ids.shape)}; [samples, length >= 2] is needed")
    before = count_parameters(model)
    sizes = [widths(layer) for layer in layers]
    model.eval()
    scores = criteria.load(config.method).scores(model, input_ids, config, progress)
    kept = allocate(model, scores, config)
    pruned = cut(model, kept)
    after = count_parameters(pruned)
    left = [widths(layer) for layer in decoder_layers(pruned)]
    report = {
        "parameters_before": before,
        "parameters_after": after,
        "ratio": config.ratio,
        "ratio_reached": 1 - after / before,
        "widths": [{"ffn": size.ffn, "attention": size.attention} for size in left],
    }
    return PruneResult(pruned, kept, [{"ffn": s.ffn, "attention": s.attention} for s in sizes], report)
