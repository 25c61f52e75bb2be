"""From one target ratio to the shape of every layer, from sizes alone.

A uniform allocation takes the same fraction of every kind of structure, as LLM-Pruner does; a list of shares scales
that fraction layer by layer. Groups and heads are few, so their numbers are rounded, and FFN channels (hidden
channels, where no FFN channel is cut) make up the rest, which brings the parameters removed within half a percent of
the model of what was asked.

With `round_to` what stays of a cut width is the nearest multiple of it, and never more than the largest multiple that
the width holds: of 100 channels 64 stay, not 100, if 64 is asked for. Half such a step is then allowed for. Layers that
are not cut at all keep the width they have.
"""

from collections.abc import Callable
from dataclasses import astuple, replace

from pruning.architecture import Architecture, LayerShape
from pruning.config import PruningConfig

TOLERANCE = 0.005  # of the model's parameters


def plan_shapes(
    shape: Architecture, config: PruningConfig, target: int, whole: int | None = None
) -> tuple[list[LayerShape], int]:
    """Each layer's shape and the hidden size once only `target` parameters are left, from sizes alone.

    `whole`: the parameters that ratios are shares of, where they are not those of `shape`. Raises ValueError saying
    what could be reached where that is further than half a percent of the model off.
    """
    shares = shares_of(shape, config)
    layers, hidden, fraction = _nearest(shape, shares, config, target)
    _check(shape, shape.with_layers(layers, hidden), shares, config, target, whole or shape.parameters(), fraction)
    return layers, hidden


def plan_step(
    shape: Architecture, now: Architecture, config: PruningConfig, target: int, final: int, whole: int | None = None
) -> tuple[list[LayerShape], int]:
    """The same after one of several steps, of a model of shape `now` from which `final` parameters shall stay.

    Where one more group goes, FFN channels that make up the rest would come back, and what was cut cannot. So a step
    takes the widths nearest to its own target, but none that is wider than now or narrower than in the end; only the
    end is held to the ratio, and the last step is there exactly.
    """
    ends, end = plan_shapes(shape, config, final, whole)
    nearest, hidden, _ = _nearest(shape, shares_of(shape, config), config, target)
    layers = [
        LayerShape(*(min(most, max(wanted, least)) for most, wanted, least in zip(*map(astuple, three), strict=True)))
        for three in zip(now.layers, nearest, ends, strict=True)
    ]
    return layers, min(now.hidden, max(hidden, end))


def _nearest(
    shape: Architecture, shares: list[float], config: PruningConfig, target: int
) -> tuple[list[LayerShape], int, float]:
    """Layers and hidden size whose parameters come nearest to `target`, and the fraction of the widths that goes."""

    def scaled(fraction: float, rounded: bool) -> tuple[list[LayerShape], int]:
        cut_hidden = "hidden" in config.structures
        hidden = left_of(shape.hidden, fraction, rounded, config.round_to) if cut_hidden else shape.hidden
        cut = [
            _narrowed(layer, min(fraction * share, 1.0), config, rounded) if share else layer
            for layer, share in zip(shape.layers, shares, strict=True)
        ]
        return cut, hidden

    fraction = _bisect(lambda value: shape.with_layers(*scaled(value, False)).parameters(), target)
    layers, hidden = scaled(fraction, True)
    if "ffn" in config.structures:

        def refined(value: float) -> list[LayerShape]:
            return [
                replace(new, ffn=left_of(old.ffn, min(value * share, 1.0), True, config.round_to)) if share else new
                for old, new, share in zip(shape.layers, layers, shares, strict=True)
            ]

        fraction = _bisect(lambda value: shape.with_layers(refined(value), hidden).parameters(), target)
        layers = refined(fraction)
    return layers, hidden, fraction


def _check(
    shape: Architecture,
    planned: Architecture,
    shares: list[float],
    config: PruningConfig,
    target: int,
    whole: int,
    fraction: float,
) -> None:
    ratio, reached = 1 - target / whole, 1 - planned.parameters() / whole
    emptied = [index for index, share in enumerate(shares) if fraction * share >= 1 and share > min(shares)]
    if emptied and config.allocation != "uniform":
        raise ValueError(f"allocation: a ratio of {ratio:.3f} would leave layer {emptied[0]} empty; lower its share")
    slack = max(TOLERANCE, half_a_step(planned, shares, config) / whole)
    if abs(reached - ratio) > slack:
        least = [
            _narrowed(layer, 1.0, config, True) if share else layer
            for layer, share in zip(shape.layers, shares, strict=True)
        ]
        narrowest = left_of(shape.hidden, 1.0, True, config.round_to) if "hidden" in config.structures else None
        most = 1 - shape.with_layers(least, narrowest).parameters() / whole
        rounded = config.round_to > 1 and {"ffn", "hidden"} & set(config.structures)
        rounding = f" with round_to: {config.round_to}" if rounded else ""
        nearer = "lower round_to" if rounded else "add ffn to structures"
        remedy = f"at most {most:.3f} can be removed{rounding}" if ratio > most else nearer
        chosen = sum(share > 0 for share in shares)
        raise ValueError(
            f"ratio: {ratio:.3g} cannot be reached within {slack:.3g} by cutting {' and '.join(config.structures)} "
            f"in {chosen} of {len(shares)} layers: the nearest is {reached:.3f}; {remedy}"
        )


def half_a_step(shape: Architecture, shares: list[float], config: PruningConfig) -> float:
    """Parameters by which rounding the widths may miss: half a step of the kind that makes up the rest."""
    if "ffn" in config.structures:
        channel = shape.layer_parameters(LayerShape(1, 1, 1)) - shape.layer_parameters(LayerShape(0, 1, 1))
        return config.round_to * channel * sum(share > 0 for share in shares) / 2
    if "hidden" in config.structures:
        return config.round_to * shape.parameters() / shape.hidden / 2
    return 0.0


def shares_of(shape: Architecture, config: PruningConfig) -> list[float]:
    """How strongly each layer is cut, relative to the others; protected layers are not.

    Raises ValueError where no layer is left to cut, and where a width holds no multiple of `round_to`.
    """
    count, first, last = len(shape.layers), config.protect.first, config.protect.last
    if first + last >= count:
        raise ValueError(f"protect: first {first} and last {last} leave none of {count} layers to prune")
    shares = [1.0] * count if isinstance(config.allocation, str) else list(config.allocation)
    if len(shares) != count:
        raise ValueError(f"allocation: {len(shares)} shares for a model of {count} layers")
    shares = [share if first <= index < count - last else 0.0 for index, share in enumerate(shares)]
    if not any(shares):
        raise ValueError("allocation: every layer's share is zero")
    cut = [layer.ffn for layer, share in zip(shape.layers, shares, strict=True) if share]
    for kind, width in (("ffn", min(cut)), ("hidden", shape.hidden)):
        if kind in config.structures and width < config.round_to:
            raise ValueError(
                f"round_to: {config.round_to} is more than the {width} {kind} channels there are, so none could stay; "
                f"set it to {width} or less"
            )
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
    steps = round(count * (1 - fraction) / multiple)
    return multiple * min(count // multiple, max(1, steps))


def _bisect(parameters: Callable[[float], float], target: float) -> float:
    """The fraction whose falling parameter count is nearest to the target; a weighted layer may pass 1."""
    low, high = 0.0, 1.0
    while parameters(high) > target and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(middle) > target else (low, middle)
    return min(low, high, key=lambda value: abs(parameters(value) - target))
