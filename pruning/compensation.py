"""What the kept weights of o_proj and down_proj do about the removed ones.

`bias` (FLAP, arXiv 2312.11983): a removed input channel j is replaced by its mean m_j over the calibration text, which
makes a bias: b = sum over removed j of W[:, j] m_j. The kept weights stay.

`least_squares` (ours; the closed form that OBS-style updates lead to for one kept set): the layers are walked in order
with two streams, one through the dense model, one through the model pruned so far. With y the dense projection's
output, x the pruned one's input and W_k the kept columns, over all calibration tokens,

    W' = argmin  sum |y - W' x|^2 + r |W' - W_k|^2  =  (sum y x^T + r W_k) (sum x x^T + r I)^-1

with r = `ridge` times the mean of the diagonal of sum x x^T: towards the original weights, not towards zero. First
o_proj, then down_proj on what the new o_proj gives it. Sums are float32, the solution is float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.config import PruningConfig
from pruning.resident import give_back
from pruning.structures import WRITERS, Kept, KeptLayer, Vectors, decoder_layers
from pruning.surgery import Cutter
from pruning.walk import Walk, watch

Progress = Callable[[int, int, str], None]


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
    ValueError, with nothing cut, when no class can hold the result.
    """
    compensation = config.compensation
    cutter = Cutter(model, kept, biased=compensation.method == "bias", free=config.shape == "free")
    if compensation.method == "least_squares":
        assert input_ids is not None
        return _refit(cutter, model, input_ids, compensation.ridge, progress)
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
    cutter: Cutter, model: PreTrainedModel, input_ids: Tensor, ridge: float, progress: Progress
) -> PreTrainedModel:
    walk = Walk(model, input_ids)
    dense = walk.embed()
    cutter.cut_ends()
    pruned = dense if cutter.hidden is None else walk.embed()
    keeps = {keep.index: keep for keep in cutter.kept.layers}
    for index, layer in enumerate(walk.layers):
        progress(index, len(walk.layers), "least squares")
        with watch(layer, WRITERS) as dense_seen:
            dense = [walk.run(index, hidden) for hidden in dense]
        keep = keeps.get(index)
        if keep is None:
            continue
        cutter.cut_layer(layer, keep)
        for writer, name in enumerate(WRITERS):
            targets = [output for _, output in dense_seen.pop(name)]
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            with watch(layer, (name,)) as seen:
                for hidden in pruned:
                    walk.run_half(index, writer, hidden)
            inputs = [values for values, _ in seen[name]]
            _fit(linear, inputs, targets, cutter.hidden, ridge)
            pruned = [hidden.to(x.device) + linear(x) for hidden, x in zip(pruned, inputs, strict=True)]
        give_back()
    progress(len(walk.layers), len(walk.layers), "least squares")
    return cutter.assemble()


def _fit(linear: nn.Linear, inputs: list[Tensor], targets: list[Tensor], channels: Tensor | None, ridge: float) -> None:
    """Refit one cut projection to the dense one's outputs, on the inputs that the cut layer gives it."""
    size, device = linear.in_features, linear.weight.device
    gram = torch.zeros(size, size, device=device)
    cross = torch.zeros(linear.out_features, size, device=device)
    for values, target in zip(inputs, targets, strict=True):
        x, y = values.flatten(0, 1).float(), target.flatten(0, 1).float()
        y = y if channels is None else y[:, channels.to(device)]
        if linear.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            y = y - linear.bias.float()
        gram.addmm_(x.T, x)
        cross.addmm_(y.T, x)
    linear.weight.copy_(solve(gram, cross, linear.weight, ridge))


def solve(gram: Tensor, cross: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """argmin over W' of sum |y - W' x|^2 + r |W' - weight|^2, from sum x x^T [in, in] and sum y x^T [out, in]; float64.

    r is `ridge` times the mean of the diagonal; inputs that are always zero keep their weights.
    """
    system = gram.double()
    pull = ridge * system.diagonal().mean().clamp(min=1e-12)
    system.diagonal().add_(pull)
    right = (cross.double() + pull * weight.double()).T
    return torch.cholesky_solve(right, torch.linalg.cholesky(system)).T
