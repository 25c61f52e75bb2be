"""From one target ratio to the structures that each layer keeps.

As in LLM-Pruner, attention and FFN lose the same fraction of their structures; key-value groups are few, so their
number is rounded and FFN channels make up the rest, which brings the parameters removed within half a percent of the
model of what was asked.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.config import Kind, PruningConfig
from pruning.structures import Widths, count_parameters, decoder_layers, widths

TOLERANCE = 0.005  # of the model's parameters
Kept = dict[Kind, list[int]]


def allocate(model: PreTrainedModel, scores: list[dict[Kind, Tensor]], config: PruningConfig) -> list[Kept]:
    """Sorted indices of the kept structures, one mapping a layer.

    Raises ValueError naming the layer whose scores are not finite, or what ratio could be reached.
    """
    for index, layer in enumerate(scores):
        for kind, values in layer.items():
            if not torch.isfinite(values).all():
                bad = int((~torch.isfinite(values)).sum())
                raise ValueError(f"layer {index}: {bad} of {len(values)} {kind} scores are not finite; nothing was cut")
    sizes = [widths(layer) for layer in decoder_layers(model)]
    dropped = plan_widths(sizes, count_parameters(model), config)
    return [
        {kind: _best(values, len(values) - drop[kind]) for kind, values in layer.items()}
        for layer, drop in zip(scores, dropped, strict=True)
    ]


def plan_widths(sizes: list[Widths], parameters: int, config: PruningConfig) -> list[dict[Kind, int]]:
    """How many structures of each kind every layer loses, from the layers' sizes alone."""
    count = len(sizes)
    first, last = config.protect.first, config.protect.last
    if first + last >= count:
        raise ValueError(f"protect: first {first} and last {last} leave none of {count} layers to prune")
    chosen = range(first, count - last)
    size = sizes[first]
    if any(sizes[index] != size for index in chosen):
        raise ValueError("the layers to prune differ in width already; prune the original model in one step")
    target = config.ratio * parameters / len(chosen)  # parameters a layer has to lose
    drop = _split(size, target, config)
    reached = sum(drop[kind] * size.cost(kind) for kind in config.structures) * len(chosen) / parameters
    if config.round_to == 1 and abs(reached - config.ratio) > TOLERANCE:
        most = sum((size.count(kind) - 1) * size.cost(kind) for kind in config.structures) * len(chosen) / parameters
        remedy = f"at most {most:.3f} can be removed" if config.ratio > most else "add ffn to structures"
        raise ValueError(
            f"ratio: {config.ratio} cannot be reached within {TOLERANCE} by cutting {' and '.join(config.structures)} "
            f"in {len(chosen)} of {count} layers: the nearest is {reached:.3f}; {remedy}"
        )
    nothing: dict[Kind, int] = dict.fromkeys(config.structures, 0)
    return [drop if index in chosen else nothing for index in range(count)]


def _split(size: Widths, target: float, config: PruningConfig) -> dict[Kind, int]:
    """The same fraction of each kind, groups rounded, channels filling up; at least one of each is left."""
    kinds = config.structures
    fraction = target / sum(size.count(kind) * size.cost(kind) for kind in kinds)
    drop: dict[Kind, int] = {}
    if "attention" in kinds:
        drop["attention"] = min(size.attention - 1, round(fraction * size.attention))
        target -= drop["attention"] * size.attention_cost
    if "ffn" in kinds:
        kept = size.ffn - target / size.ffn_cost
        kept = min(size.ffn, max(1, config.round_to, round(kept / config.round_to) * config.round_to))
        drop["ffn"] = size.ffn - kept
    return drop


def _best(values: Tensor, keep: int) -> list[int]:
    """Indices of the `keep` highest scores, sorted; ties go to the lower index."""
    order = torch.argsort(values, descending=True, stable=True)
    return sorted(order[:keep].tolist())
