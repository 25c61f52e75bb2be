"""From one target ratio to the shape of every layer, from sizes alone.

A uniform allocation takes the same fraction of every kind of structure, as LLM-Pruner does; a list of shares scales
that fraction layer by layer. Groups and heads are few, so their numbers are rounded, and FFN channels (hidden
channels, where no FFN channel is cut) make up the rest, which brings the parameters removed within half a percent of
the model of what was asked.
"""

from collections.abc import Callable

from pruning.architecture import Architecture, LayerShape
from pruning.config import PruningConfig

TOLERANCE = 0.005  # of the model's parameters


def plan_shapes(shape: Architecture, config: PruningConfig, target: int) -> tuple[list[LayerShape], int]:
    """Each layer's shape and the hidden size once only `target` parameters are left, from sizes alone.

    Raises ValueError saying what could be reached where that is further than half a percent of the model off.
    """
    shares = _shares(shape, config)

    def scaled(fraction: float, rounded: bool) -> tuple[list[LayerShape], int]:
        cut_hidden = "hidden" in config.structures
        hidden = left_of(shape.hidden, fraction, rounded, config.round_to) if cut_hidden else shape.hidden
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
                LayerShape(left_of(old.ffn, min(value * share, 1.0), True, config.round_to), new.groups, new.heads)
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
        left_of(layer.ffn, fraction, rounded, config.round_to) if "ffn" in kinds else layer.ffn,
        left_of(layer.groups, fraction, rounded) if "attention" in kinds else layer.groups,
        left_of(layer.heads, fraction, rounded) if "heads" in kinds else layer.heads,
    )


def left_of(count: int, fraction: float, rounded: bool, multiple: int = 1) -> int:
    """How many of `count` structures stay when a fraction goes."""
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
