"""How much memory pruning takes, from the model's shape and the settings alone.

The accounting follows `walk`, `statistics` and `compensation`: the weights are there once; beside them lies the
residual stream of all calibration tokens, and what one layer needs at a time.
"""

from pruning.architecture import Architecture, LayerShape
from pruning.config import PruningConfig, Statistic

BATCH_TOKENS = 1024  # tokens that pass a layer together (`walk`)
HEAD_TOKENS = 256  # positions whose logits exist together (`statistics`)


def peak_bytes(
    shape: Architecture,
    width: int,
    config: PruningConfig,
    windows: tuple[int, int],
    others: tuple[int, int] | None = None,
) -> int:
    """Predicted peak of statistics and pruning above an empty process, in bytes; a guide, good to about a tenth.

    `width`: bytes of a weight; `windows`: calibration (samples, length); `others`: those of the compensation.
    """
    from pruning import criteria

    widest = max(shape.layers, key=shape.layer_parameters)
    asked = criteria.statistics(config)
    needs = [_statistic(statistic, shape, widest, width, windows) for statistic in asked]
    if config.compensation.method == "least_squares":
        needs.append(_least_squares(shape, widest, width, others or windows))
    slicing = shape.hidden * widest.ffn * width  # the projection being sliced exists twice
    return shape.parameters() * width + max([slicing, *needs])


def _statistic(
    statistic: Statistic, shape: Architecture, layer: LayerShape, width: int, windows: tuple[int, int]
) -> int:
    tokens = windows[0] * windows[1]
    batch = min(tokens, max(BATCH_TOKENS, windows[1]))
    stream = tokens * shape.hidden * width
    if statistic.name != "gradients":
        # One batch's activations in a layer, and float32 copies of the widest input and its square.
        return 2 * stream + batch * (_activations(shape, layer) * width // 2 + 2 * 4 * layer.ffn)
    options = dict(statistic.options)
    if options["curvature"]:
        batch = windows[1]
    gradients = shape.layer_parameters(layer)
    accumulated = options["curvature"] + (options["curvature"] or tokens > BATCH_TOKENS)
    # Residual streams below every layer, one layer's graph and gradients, three float32 products of its largest weight.
    need = (len(shape.layers) + 2) * stream + batch * _activations(shape, layer) * width
    need += gradients * (width + 4 * accumulated) + 3 * 4 * shape.hidden * layer.ffn
    head = 3 * 4 * HEAD_TOKENS * shape.vocabulary
    if options["hidden"]:
        head += shape.vocabulary * shape.hidden * width
        need += shape.vocabulary * shape.hidden * width
    return max(need, head + (len(shape.layers) + 2) * stream)


def _least_squares(shape: Architecture, layer: LayerShape, width: int, windows: tuple[int, int]) -> int:
    tokens = windows[0] * windows[1]
    size = max(layer.ffn, layer.groups * layer.heads * shape.head_dim)
    # Dense before and after the layer, pruned, the dense outputs of both projections, and the targets.
    streams = 6 * tokens * shape.hidden * width
    inputs = tokens * (layer.ffn + layer.groups * layer.heads * shape.head_dim) * width
    # Two Gram matrices in float32, the system and its factor in float64; the right-hand side likewise.
    return streams + 2 * inputs + size * size * (2 * 4 + 8 + 8) + size * shape.hidden * (2 * 4 + 8 + 8)


def _activations(shape: Architecture, layer: LayerShape) -> int:
    """Numbers that one layer's graph keeps for a token."""
    query, key = layer.groups * layer.heads * shape.head_dim, layer.groups * shape.head_dim
    return 8 * shape.hidden + 4 * query + 4 * key + 4 * layer.ffn
