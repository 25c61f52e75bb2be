"""From one target ratio to the shape of every layer, and from scores to the structures that fill it.

A uniform allocation takes the same fraction of every kind of structure, as LLM-Pruner does; a list of shares scales
that fraction layer by layer. Groups and heads are few, so their numbers are rounded, and FFN channels (hidden
channels, where no FFN channel is cut) make up the rest, which brings the parameters removed within half a percent of
the model of what was asked. A global allocation ranks all layers' structures together, as FLAP does (arXiv 2312.11983):
scores standardised by layer and kind, the lowest going first until the parameters they free are the target.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pruning.architecture import Architecture, LayerShape
from pruning.config import PruningConfig
from pruning.structures import Kept, KeptLayer, Scores

TOLERANCE = 0.005  # of the model's parameters


def allocate(original: Architecture, now: Architecture, scores: Scores, config: PruningConfig, target: int) -> Kept:
    """What stays of a model of shape `now` so that `target` parameters are left.

    Uniform shapes are planned from the `original` one, so that several steps end where one would. Raises ValueError,
    naming the layer or the ratio, for scores that are not finite and ratios that cannot be reached.
    """
    for kind, tensors in scores.items():
        for index, values in enumerate(tensors):
            if bad := int((~torch.isfinite(values)).sum()):
                place = f"layer {index}: " if len(tensors) > 1 else ""
                raise ValueError(f"{place}{bad} of {len(values)} {kind} scores are not finite; nothing was cut")
    if "layers" in config.structures:
        return _keep_layers(now, scores["layers"][0], config, now.parameters() - target)
    if config.allocation == "global":
        return _rank_globally(now, scores, config, target)
    shapes, hidden = plan_shapes(original, config, target)
    return _fill(now, shapes, hidden, scores)


def keep_all(shape: Architecture, layers: list[int] | None = None) -> Kept:
    """Nothing cut, but for layers that are not listed."""
    chosen = range(len(shape.layers)) if layers is None else layers
    return Kept([_whole(index, shape.layers[index]) for index in chosen], list(range(shape.hidden)))


def lowest_layers(scores: Tensor, count: int, config: PruningConfig) -> list[int]:
    """The layers that stay when the `count` lowest-scored unprotected ones go."""
    first, last = config.protect.first, len(scores) - config.protect.last
    free = [int(index) for index in torch.argsort(scores, stable=True) if first <= int(index) < last]
    if count >= len(scores) or count > len(free):
        raise ValueError(f"{count} of {len(scores)} layers cannot go: {len(free)} are unprotected, and one has to stay")
    return sorted(set(range(len(scores))) - set(free[:count]))


def plan_shapes(shape: Architecture, config: PruningConfig, target: int) -> tuple[list[LayerShape], int]:
    """Each layer's shape and the hidden size once only `target` parameters are left, from sizes alone.

    Raises ValueError saying what could be reached where that is further than half a percent of the model off.
    """
    shares = _shares(shape, config)

    def scaled(fraction: float, rounded: bool) -> tuple[list[LayerShape], int]:
        cut_hidden = "hidden" in config.structures
        hidden = _left(shape.hidden, fraction, rounded, config.round_to) if cut_hidden else shape.hidden
        cut = [
            _narrowed(layer, min(fraction * share, 1.0), config, rounded)
            for layer, share in zip(shape.layers, shares, strict=True)
        ]
        return cut, hidden

    fraction = _bisect(lambda value: shape.with_layers(*scaled(value, False)).parameters(), target)
    layers, hidden = scaled(fraction, True)
    if "ffn" in config.structures:

        def refined(value: float) -> list[LayerShape]:
            return [
                LayerShape(_left(old.ffn, min(value * share, 1.0), True, config.round_to), new.groups, new.heads)
                for old, new, share in zip(shape.layers, layers, shares, strict=True)
            ]

        fraction = _bisect(lambda value: shape.with_layers(refined(value), hidden).parameters(), target)
        layers = refined(fraction)
    _check(shape, layers, hidden, shares, config, target, fraction)
    return layers, hidden


def _check(
    shape: Architecture,
    layers: list[LayerShape],
    hidden: int,
    shares: list[float],
    config: PruningConfig,
    target: int,
    fraction: float,
) -> None:
    parameters = shape.parameters()
    ratio, reached = 1 - target / parameters, 1 - shape.with_layers(layers, hidden).parameters() / parameters
    emptied = [index for index, share in enumerate(shares) if fraction * share >= 1 and share > min(shares)]
    if emptied and config.allocation != "uniform":
        raise ValueError(f"allocation: a ratio of {ratio:.3f} would leave layer {emptied[0]} empty; lower its share")
    finest = 0.0 if "ffn" in config.structures or hidden == shape.hidden else 0.5 / hidden  # half a hidden channel
    if config.round_to == 1 and abs(reached - ratio) > max(TOLERANCE, finest):
        least = [
            _narrowed(layer, float(share > 0), config, True) for layer, share in zip(shape.layers, shares, strict=True)
        ]
        smallest = shape.with_layers(least, 1 if "hidden" in config.structures else None)
        most = 1 - smallest.parameters() / parameters
        remedy = f"at most {most:.3f} can be removed" if ratio > most else "add ffn to structures"
        chosen = sum(share > 0 for share in shares)
        raise ValueError(
            f"ratio: {ratio:.3g} cannot be reached within {TOLERANCE} by cutting {' and '.join(config.structures)} "
            f"in {chosen} of {len(shares)} layers: the nearest is {reached:.3f}; {remedy}"
        )


def _shares(shape: Architecture, config: PruningConfig) -> list[float]:
    """How strongly each layer is cut, relative to the others; protected layers are not."""
    count, first, last = len(shape.layers), config.protect.first, config.protect.last
    if first + last >= count:
        raise ValueError(f"protect: first {first} and last {last} leave none of {count} layers to prune")
    shares = [1.0] * count if isinstance(config.allocation, str) else list(config.allocation)
    if len(shares) != count:
        raise ValueError(f"allocation: {len(shares)} shares for a model of {count} layers")
    shares = [share if first <= index < count - last else 0.0 for index, share in enumerate(shares)]
    if not any(shares):
        raise ValueError("allocation: every layer's share is zero")
    return shares


def _narrowed(layer: LayerShape, fraction: float, config: PruningConfig, rounded: bool) -> LayerShape:
    """One layer less a fraction of each kind. Unrounded widths are real numbers, for the search only."""
    kinds = config.structures
    return LayerShape(
        _left(layer.ffn, fraction, rounded, config.round_to) if "ffn" in kinds else layer.ffn,
        _left(layer.groups, fraction, rounded) if "attention" in kinds else layer.groups,
        _left(layer.heads, fraction, rounded) if "heads" in kinds else layer.heads,
    )


def _left(count: int, fraction: float, rounded: bool, multiple: int = 1) -> int:
    if not rounded:
        return count * (1 - fraction)  # pyright: ignore[reportReturnType]
    if fraction == 0:
        return count
    return min(count, max(1, multiple, round(count * (1 - fraction) / multiple) * multiple))


def _bisect(parameters: Callable[[float], float], target: float) -> float:
    """The fraction whose falling parameter count is nearest to the target; a weighted layer may pass 1."""
    low, high = 0.0, 1.0
    while parameters(high) > target and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(middle) > target else (low, middle)
    return min(low, high, key=lambda value: abs(parameters(value) - target))


def _keep_layers(shape: Architecture, scores: Tensor, config: PruningConfig, surplus: int) -> Kept:
    size = sum(shape.layer_parameters(layer) for layer in shape.layers) / len(shape.layers)
    count = round(surplus / size)
    if count < 1:
        raise ValueError(f"ratio: {config.ratio} is less than half a layer; raise it, or cut widths")
    return keep_all(shape, lowest_layers(scores, count, config))


def _rank_globally(shape: Architecture, scores: Scores, config: PruningConfig, target: int) -> Kept:
    """The lowest structures of all unprotected layers go; the best of each kind stays in every layer."""
    first, last = config.protect.first, len(shape.layers) - config.protect.last
    order: list[tuple[float, int, int, str, int]] = []
    for index, layer in enumerate(shape.layers):
        if not first <= index < last:
            continue
        whole = shape.layer_parameters(layer)
        less = {
            "ffn": LayerShape(layer.ffn - 1, layer.groups, layer.heads),
            "attention": LayerShape(layer.ffn, layer.groups - 1, layer.heads),
        }
        for kind in config.structures:
            values, cost = scores[kind][index].double(), whole - shape.layer_parameters(less[kind])
            best = int(values.argmax())
            order += [(float(v), cost, index, kind, n) for n, v in enumerate(values) if n != best]
    surplus = shape.parameters() - target
    gone: set[tuple[int, str, int]] = set()
    for _, cost, index, kind, unit in sorted(order, key=lambda entry: entry[0]):
        if cost / 2 <= surplus:
            surplus -= cost
            gone.add((index, kind, unit))
    if surplus > TOLERANCE * shape.parameters():
        raise ValueError(
            f"ratio: {config.ratio} would leave layers empty: {surplus} parameters too many stay with one structure of "
            f"each kind in every unprotected layer; lower it, or protect fewer layers"
        )
    layers: list[KeptLayer] = []
    for index, layer in enumerate(shape.layers):
        ffn = [unit for unit in range(layer.ffn) if (index, "ffn", unit) not in gone]
        if config.round_to > 1 and len(ffn) < layer.ffn:
            keep = _left(layer.ffn, 1 - len(ffn) / layer.ffn, True, config.round_to)
            ffn = _best(scores["ffn"][index], keep)
        groups = [unit for unit in range(layer.groups) if (index, "attention", unit) not in gone]
        heads = [group * layer.heads + head for group in groups for head in range(layer.heads)]
        layers.append(KeptLayer(index, ffn, groups, heads))
    return Kept(layers, list(range(shape.hidden)))


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
