"""What the kept weights of o_proj and down_proj do about the removed ones.

`bias` (FLAP, arXiv 2312.11983): a removed input channel j is replaced by its mean m_j over the calibration text, which
makes a bias: b = sum over removed j of W[:, j] m_j. The kept weights stay.

`least_squares` (ours; the closed form that OBS-style updates lead to for one kept set): the layers are walked in order
with two streams, one through the dense model, one through the model pruned so far. With y the dense projection's
output, x the pruned one's input and W_k the kept columns, over all calibration tokens,

    W' = argmin  sum |y + c (h - k) - W' x|^2 + r |W' - W_k|^2

where h - k is how far the pruned residual stream k has drifted from the dense one h before this projection adds to it,
and c = `drift` is the share of it that is taken back: without it errors of all layers pile up, and a dropped layer is
made up for by nobody. For c = 0 that is (sum y x^T + r W_k) (sum x x^T + r I)^-1. r = `ridge` times the mean of the
diagonal of sum x x^T pulls towards the original weights, not towards zero. First o_proj, then down_proj on what the new
o_proj gives it. Sums are float32, the solution is float64. Few tokens are easily fitted too well, so by default each
projection takes the ridge, out of `RIDGES`, whose fit to three quarters of the windows is best on the fourth; the
weights are then fitted to all of them.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.config import HELD_OUT, Compensation, PruningConfig
from pruning.resident import give_back
from pruning.statistics import refuse_not_finite
from pruning.structures import WRITERS, Kept, KeptLayer, Vectors, decoder_layers
from pruning.surgery import Cutter
from pruning.walk import Walk, watch

Progress = Callable[[int, int, str], None]
RIDGES = (0.01, 0.1, 1.0, 10.0)


def cut_with(
    model: PreTrainedModel,
    kept: Kept,
    config: PruningConfig,
    statistics: Vectors,
    input_ids: Tensor | None,
    progress: Progress,
) -> PreTrainedModel:
    """A new model with only the kept structures, compensated. Consumes `model`.

    `statistics`: `bias` needs `activations`; `input_ids` [samples, length]: what `least_squares` runs on. Raises
    ValueError, with nothing cut, when no class can hold the result; and in a layer whose activations are not finite,
    when the layers before it are cut.
    """
    compensation = config.compensation
    if compensation.method == "least_squares" and compensation.ridge == "auto":
        assert input_ids is not None
        if len(input_ids) < HELD_OUT:
            raise ValueError(
                f"compensation: ridge: auto judges by every {HELD_OUT}th calibration window, and there are only "
                f"{len(input_ids)}; raise samples, or give ridge a number"
            )
    cutter = Cutter(model, kept, biased=compensation.method == "bias", free=config.shape in ("free", "gguf"))
    if compensation.method == "least_squares":
        assert input_ids is not None
        return _refit(cutter, model, input_ids, compensation, progress)
    layers = decoder_layers(model)
    cutter.cut_ends()
    for keep in kept.layers:
        layer = layers[keep.index]
        biases = _mean_outputs(layer, keep, cutter, statistics) if compensation.method == "bias" else {}
        cutter.cut_layer(layer, keep)
        for name, bias in biases.items():
            layer.get_submodule(name).bias.data += bias  # pyright: ignore
    return cutter.assemble()


def _mean_outputs(layer: nn.Module, keep: KeptLayer, cutter: Cutter, statistics: Vectors) -> dict[str, Tensor]:
    """What the removed inputs of each writing projection contribute on average, at the kept outputs."""
    found: dict[str, Tensor] = {}
    for name, units, size in zip(WRITERS, (keep.heads, keep.ffn), (cutter.head_dim, 1), strict=True):
        weight: Tensor = layer.get_submodule(name).weight.detach()  # pyright: ignore
        mean = statistics[f"layers.{keep.index}.{name}.mean"].to(weight.device).clone()
        mean.view(-1, size)[units] = 0
        bias = (weight.float() @ mean).to(weight.dtype)
        found[name] = bias if cutter.hidden is None else bias[cutter.hidden.to(bias.device)]
    return found


@torch.no_grad()
def _refit(
    cutter: Cutter, model: PreTrainedModel, input_ids: Tensor, compensation: Compensation, progress: Progress
) -> PreTrainedModel:
    walk = Walk(model, input_ids)
    dense = walk.embed()
    cutter.cut_ends()
    pruned = dense if cutter.hidden is None else walk.embed()
    keeps = {keep.index: keep for keep in cutter.kept.layers}
    for index, layer in enumerate(walk.layers):
        progress(index, len(walk.layers), "least squares")
        before = dense
        with watch(layer, WRITERS) as dense_seen:
            dense = [walk.run(index, hidden) for hidden in before]
        keep = keeps.get(index)
        if keep is None:
            continue
        for name in WRITERS:
            _refuse_not_finite(dense_seen[name], index, name)
        cutter.cut_layer(layer, keep)
        for writer, name in enumerate(WRITERS):
            outputs = [output for _, output in dense_seen.pop(name)]
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            with watch(layer, (name,)) as seen:
                for hidden in pruned:
                    walk.run_half(index, writer, hidden)
            _refuse_not_finite(seen[name], index, name)  # float16 may hold the dense model's and not the pruned one's
            inputs = [values for values, _ in seen[name]]
            targets: list[Tensor] = []
            for output, h, k in zip(outputs, before, pruned, strict=True):
                y, drifted = (part if cutter.hidden is None else part[..., cutter.hidden] for part in (output, h))
                targets.append(y + compensation.drift * (drifted.to(y.device) - k.to(y.device)))
            try:
                _fit(linear, inputs, targets, compensation.ridge)
            except torch.linalg.LinAlgError as error:
                raise ValueError(
                    f"compensation: ridge: {compensation.ridge} is too small for the calibration text to settle the "
                    f"weights of layers.{index}.{name}; raise it, or give more samples; nothing was saved"
                ) from error
            before = [hidden.to(output.device) + output for hidden, output in zip(before, outputs, strict=True)]
            pruned = [hidden.to(x.device) + linear(x) for hidden, x in zip(pruned, inputs, strict=True)]
        give_back()
    progress(len(walk.layers), len(walk.layers), "least squares")
    return cutter.assemble()


def _refuse_not_finite(seen: list[tuple[Tensor, Tensor]], index: int, name: str) -> None:
    for values in (part for pair in seen for part in pair):
        refuse_not_finite(values, f"activations of layers.{index}.{name}", "nothing was saved")


def _fit(
    linear: nn.Linear,
    inputs: list[Tensor],
    targets: list[Tensor],
    ridge: float | Literal["auto"],
) -> None:
    """Refit one cut projection to what it shall give on the inputs that the cut layer gives it."""
    size, device = linear.in_features, linear.weight.device
    # Sums over the windows that are fitted to, and over those that judge the ridge.
    grams = [torch.zeros(size, size, device=device) for _ in range(2)]
    crosses = [torch.zeros(linear.out_features, size, device=device) for _ in range(2)]
    window = 0
    for values, target in zip(inputs, targets, strict=True):
        numbers = torch.arange(window, window + len(values), device=device)
        window += len(values)
        judging = numbers % HELD_OUT == HELD_OUT - 1
        for part, chosen in enumerate((~judging, judging)):
            x, y = values[chosen].flatten(0, 1).float(), target.to(device)[chosen].flatten(0, 1).float()
            if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                y = y - linear.bias.float()
            grams[part].addmm_(x.T, x)
            crosses[part].addmm_(y.T, x)
    if ridge == "auto":
        ridge = min(RIDGES, key=lambda value: _held_out_error(linear.weight, grams, crosses, value))
    linear.weight.copy_(solve(grams[0].add_(grams[1]), crosses[0].add_(crosses[1]), linear.weight, ridge))


def _held_out_error(weight: Tensor, grams: list[Tensor], crosses: list[Tensor], ridge: float) -> float:
    """sum |y - W' x|^2 over the judging windows, less the constant sum |y|^2, for W' fitted to the others."""
    fitted = solve(grams[0], crosses[0], weight, ridge, torch.float32)
    return float((fitted @ grams[1] - 2 * crosses[1]).mul_(fitted).sum())


def solve(gram: Tensor, cross: Tensor, weight: Tensor, ridge: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """argmin over W' of sum |y - W' x|^2 + r |W' - weight|^2, from sum x x^T [in, in] and sum y x^T [out, in].

    r is `ridge` times the mean of the diagonal; inputs that are always zero keep their weights. Computed in `dtype`.
    """
    system = gram.to(dtype, copy=True)
    pull = ridge * system.diagonal().mean().clamp(min=1e-12)
    system.diagonal().add_(pull)
    right = (cross.to(dtype) + pull * weight.to(dtype)).T
    return torch.cholesky_solve(right, torch.linalg.cholesky(system)).T
