"""From scores to the structures that stay.

Where every layer's shape is planned from sizes alone (`widths`), the best structures fill it. A global allocation ranks
all layers' structures together, as FLAP does (arXiv 2312.11983): scores standardised by layer and kind, the lowest
going first until the parameters they free are the target.
"""

from itertools import accumulate

import torch
from torch import Tensor

from pruning.architecture import Architecture, LayerShape
from pruning.config import Kind, PruningConfig
from pruning.structures import Kept, KeptLayer, Scores
from pruning.widths import TOLERANCE, half_a_step, left_of, plan_step, shares_of


def allocate(
    original: Architecture,
    now: Architecture,
    scores: Scores,
    config: PruningConfig,
    target: int,
    whole: int | None = None,
    final: int | None = None,
) -> Kept:
    """What stays of a model of shape `now` so that `target` parameters are left, of the `whole` model's so many.

    `final`: what further steps shall leave, where others follow; it, not `target`, is held to the ratio. Uniform shapes
    are planned from the `original` one, so that several steps end where one would. Raises ValueError, naming the layer
    or the ratio, for scores that are not finite and ratios that cannot be reached.
    """
    final = target if final is None else final
    for kind, tensors in scores.items():
        for index, values in enumerate(tensors):
            if bad := int((~torch.isfinite(values)).sum()):
                place = f"layer {index}: " if len(tensors) > 1 else ""
                raise ValueError(f"{place}{bad} of {len(values)} {kind} scores are not finite; nothing was cut")
    if "layers" in config.structures:
        return keep_layers(now, scores["layers"][0], config, now.parameters() - target)
    if config.allocation == "global":
        return _rank_globally(now, scores, config, target, target == final)
    shapes, hidden = plan_step(original, now, config, target, final, whole)
    return _fill(now, shapes, hidden, scores)


def keep_all(shape: Architecture, layers: list[int] | None = None) -> Kept:
    """Nothing cut, but for layers that are not listed."""
    chosen = range(len(shape.layers)) if layers is None else layers
    return Kept([_whole(index, shape.layers[index]) for index in chosen], list(range(shape.hidden)))


def lowest_layers(scores: Tensor, count: int, config: PruningConfig) -> list[int]:
    """The layers that stay when the `count` lowest-scored unprotected ones go."""
    free = _free(scores, config)
    if count >= len(scores) or count > len(free):
        raise ValueError(f"{count} of {len(scores)} layers cannot go: {len(free)} are unprotected, and one has to stay")
    return sorted(set(range(len(scores))) - set(free[:count]))


def _free(scores: Tensor, config: PruningConfig) -> list[int]:
    """The unprotected layers, lowest score first."""
    first, last = config.protect.first, len(scores) - config.protect.last
    return [int(index) for index in torch.argsort(scores, stable=True) if first <= int(index) < last]


def keep_layers(shape: Architecture, scores: Tensor, config: PruningConfig, surplus: int) -> Kept:
    """The layers that stay when those with the lowest scores go, whose parameters come nearest to `surplus`."""
    sizes = [shape.layer_parameters(layer) for layer in shape.layers]
    free = _free(scores, config)
    freed = list(accumulate((sizes[index] for index in (*free, *sorted({*range(len(sizes))} - {*free}))), initial=0))
    count = min(range(len(freed)), key=lambda number: (abs(freed[number] - surplus), number % 2))  # a tie: as round()
    if count < 1:
        raise ValueError(f"ratio: {config.ratio} is less than half a layer; raise it, or cut widths")
    return keep_all(shape, lowest_layers(scores, count, config))


def _rank_globally(shape: Architecture, scores: Scores, config: PruningConfig, target: int, last: bool) -> Kept:
    """The lowest structures of all unprotected layers go; the best of each kind stays in every layer.

    What a step that is not the `last` misses its target by, the next makes up for.
    """
    shares = shares_of(shape, config)
    order: list[tuple[float, int, int, str, int]] = []
    for index, layer in enumerate(shape.layers):
        if not shares[index]:
            continue
        for kind, cost in _costs(shape, layer, config).items():
            values = scores[kind][index].double()
            best = int(values.argmax())
            order += [(float(v), cost, index, kind, n) for n, v in enumerate(values) if n != best]
    surplus = shape.parameters() - target
    gone: set[tuple[int, str, int]] = set()
    for _, cost, index, kind, unit in sorted(order, key=lambda entry: entry[0]):
        if cost / 2 <= surplus:
            surplus -= cost
            gone.add((index, kind, unit))
    layers: list[KeptLayer] = []
    for index, layer in enumerate(shape.layers):
        ffn = [unit for unit in range(layer.ffn) if (index, "ffn", unit) not in gone]
        if "ffn" in config.structures and config.round_to > 1 and shares[index]:
            keep = left_of(layer.ffn, 1 - len(ffn) / layer.ffn, True, config.round_to)
            ffn = _best(scores["ffn"][index], keep)
        groups = [unit for unit in range(layer.groups) if (index, "attention", unit) not in gone]
        heads = [group * layer.heads + head for group in groups for head in range(layer.heads)]
        layers.append(KeptLayer(index, ffn, groups, heads))
    surplus = shape.with_layers([layer.shape for layer in layers]).parameters() - target
    slack = _slack(shape, shares, config)
    if last and -surplus > slack:
        raise ValueError(
            f"ratio: {config.ratio} cannot be reached with FFN channels rounded to {config.round_to}: {-surplus} "
            "parameters too many would go; lower round_to"
        )
    if last:
        _refuse_surplus(surplus, slack, config)
    return Kept(layers, list(range(shape.hidden)))


def refuse_out_of_reach(shape: Architecture, config: PruningConfig, target: int) -> None:
    """Raises ValueError where a global ranking of any scores leaves more than `target`, and where nothing can go."""
    shares, kinds = shares_of(shape, config), config.structures
    least = [
        LayerShape(
            config.round_to if share and "ffn" in kinds else layer.ffn,
            1 if share and "attention" in kinds else layer.groups,
            layer.heads,
        )
        for layer, share in zip(shape.layers, shares, strict=True)
    ]
    _refuse_surplus(shape.with_layers(least).parameters() - target, _slack(shape, shares, config), config)


def _costs(shape: Architecture, layer: LayerShape, config: PruningConfig) -> dict[Kind, int]:
    """The parameters that one structure of each kind frees."""
    less: dict[Kind, LayerShape] = {
        "ffn": LayerShape(layer.ffn - 1, layer.groups, layer.heads),
        "attention": LayerShape(layer.ffn, layer.groups - 1, layer.heads),
    }
    return {kind: shape.layer_parameters(layer) - shape.layer_parameters(less[kind]) for kind in config.structures}


def _slack(shape: Architecture, shares: list[float], config: PruningConfig) -> float:
    """What a global ranking may miss its target by: half a structure, where that is most."""
    layers = [layer for layer, share in zip(shape.layers, shares, strict=True) if share]
    costs = [
        cost
        for layer in layers
        for kind, cost in _costs(shape, layer, config).items()
        if (layer.ffn if kind == "ffn" else layer.groups) > 1
    ]
    half = max(costs, default=0) / 2
    return max(TOLERANCE * shape.parameters(), half_a_step(shape, shares, config), half)


def _refuse_surplus(surplus: int, slack: float, config: PruningConfig) -> None:
    if surplus > slack:
        rounded = f" (FFN channels rounded to {config.round_to})" if config.round_to > 1 else ""
        raise ValueError(
            f"ratio: {config.ratio} would leave layers empty: {surplus} parameters too many stay with one structure of "
            f"each kind{rounded} in every unprotected layer; lower it, or protect fewer layers"
        )


def standardise(scores: Scores) -> Scores:
    """Zero mean and unit deviation within each layer and kind; a layer whose scores are all equal gets zeros."""
    return {
        kind: [(v - v.mean()) / v.std(correction=0).clamp(min=1e-30) for v in (t.double() for t in tensors)]
        for kind, tensors in scores.items()
    }


def _fill(shape: Architecture, shapes: list[LayerShape], hidden: int, scores: Scores) -> Kept:
    """The best structures of each layer, as many as its planned shape holds."""
    layers: list[KeptLayer] = []
    for index, (old, new) in enumerate(zip(shape.layers, shapes, strict=True)):
        kept = _whole(index, old)
        ffn = _best(scores["ffn"][index], new.ffn) if "ffn" in scores else kept.ffn
        groups = _best(scores["attention"][index], new.groups) if "attention" in scores else kept.attention
        heads: list[int] = []
        for group in groups:
            block = scores["heads"][index][group * old.heads :][: old.heads] if "heads" in scores else None
            best = range(old.heads) if block is None else _best(block, new.heads)
            heads += [group * old.heads + head for head in best]
        layers.append(KeptLayer(index, ffn, groups, heads))
    channels = _best(scores["hidden"][0], hidden) if "hidden" in scores else list(range(shape.hidden))
    return Kept(layers, channels)


def _whole(index: int, layer: LayerShape) -> KeptLayer:
    channels, groups, heads = range(layer.ffn), range(layer.groups), range(layer.groups * layer.heads)
    return KeptLayer(index, list(channels), list(groups), list(heads))


def _best(values: Tensor, keep: int) -> list[int]:
    """Indices of the `keep` highest scores, sorted; ties go to the lower index."""
    order = torch.argsort(values, descending=True, stable=True)
    return sorted(order[:keep].tolist())
