"""What criteria measure on calibration text, reduced to a few numbers for each row and column as it comes.

Each function is one kind of statistic; a criterion names the ones it needs (`pruning.config.Statistic`), and the same
measurement serves every criterion, ratio and allocation that asks for it. Results are flat names to float32 tensors.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from pruning.config import Statistic
from pruning.memory import BATCH_TOKENS, HEAD_TOKENS
from pruning.resident import give_back
from pruning.structures import ATTENTION, FFN, NORMS, WRITERS, Vectors, named_weights
from pruning.walk import Walk, watch

Progress = Callable[[int, int, str], None]
ROWS_AT_ONCE = 4096  # rows of a weight that are multiplied in float32 together


def measure(
    model: PreTrainedModel, input_ids: Tensor | None, asked: Iterable[Statistic], progress: Progress
) -> Vectors:
    """Everything asked for, on `input_ids` [samples, length]. Raises ValueError where a number is not finite."""
    functions: dict[str, Any] = {"activations": activations, "gradients": gradients, "ablation": ablation}
    found: Vectors = {}
    for statistic in dict.fromkeys(asked):
        found |= functions[statistic.name](model, input_ids, progress=progress, **dict(statistic.options))
    found = {name: values.cpu() for name, values in found.items()}
    for name, values in found.items():
        refuse_not_finite(values, f"numbers of {name}", "nothing was cut")
    return found


def refuse_not_finite(values: Tensor, what: str, done: str) -> None:
    """Raises ValueError saying what is not finite, and what was `done` until then."""
    if bad := int((~torch.isfinite(values)).sum()):
        raise ValueError(
            f"calibration: {bad} of {values.numel()} {what} are not finite; {done}. "
            "Look for damaged weights, or prune in bfloat16 or float32 instead of float16"
        )


@torch.no_grad()
def activations(model: PreTrainedModel, input_ids: Tensor, progress: Progress) -> Vectors:
    """One forward pass. For the inputs of o_proj and down_proj, over all tokens: `.mean`, `.variance` and `.square`
    (the mean square), accumulated in float64; `layers.influence` [L]: 1 - mean cosine of the residual stream before
    and after each layer (block influence, arXiv 2403.03853)."""
    walk = Walk(model, input_ids)
    hidden = walk.embed()
    found: Vectors = {}
    influence: list[float] = []
    for index, layer in enumerate(walk.layers):
        progress(index, len(walk.layers), "activations")
        sums: dict[str, Tensor] = {}
        alike = 0.0
        for batch, before in enumerate(hidden):
            with watch(layer, WRITERS) as seen:
                hidden[batch] = walk.run(index, before)
            after = hidden[batch].float()
            alike += float(torch.cosine_similarity(before.to(after), after, dim=-1).double().sum())
            for name, [(inputs, _)] in seen.items():
                values = inputs.flatten(0, 1)
                total = values.sum(0, dtype=torch.float64)
                squares = torch.linalg.vector_norm(values, dim=0, dtype=torch.float64).square()
                for key, part in ((f"{name}.mean", total), (f"{name}.square", squares)):
                    share = part / walk.tokens
                    sums[key] = sums[key] + share if key in sums else share
        influence.append(1 - alike / walk.tokens)
        for name in WRITERS:
            mean, square = sums[f"{name}.mean"], sums[f"{name}.square"]
            key = f"layers.{index}.{name}"
            found |= {f"{key}.mean": mean.float(), f"{key}.square": square.float()}
            found[f"{key}.variance"] = (square - mean.square()).clamp(min=0).float()
        give_back()
    progress(len(walk.layers), len(walk.layers), "activations")
    return found | {"layers.influence": torch.tensor(influence)}


@torch.no_grad()
def ablation(model: PreTrainedModel, input_ids: Tensor, progress: Progress) -> Vectors:
    """`layers.ablation` [L]: mean next-token loss with exactly one layer left out (Shortened LLaMA's order by
    perplexity, arXiv 2402.02834). The layers below the missing one are run once for all."""
    walk = Walk(model, input_ids)
    below = walk.embed()
    losses: list[float] = []
    for missing in range(len(walk.layers)):
        progress(missing, len(walk.layers), "leaving out layers")
        total = 0.0
        for hidden, ids in zip(below, walk.batches, strict=True):
            for index in range(missing + 1, len(walk.layers)):
                hidden = walk.run(index, hidden)
            total += sum(float(part) for part in _losses(walk, hidden, ids))
        losses.append(total / (walk.tokens - len(input_ids)))
        below = [walk.run(missing, hidden) for hidden in below]
    progress(len(walk.layers), len(walk.layers), "leaving out layers")
    return {"layers.ablation": torch.tensor(losses)}


def gradients(
    model: PreTrainedModel, input_ids: Tensor, progress: Progress, hidden: bool = False, curvature: bool = False
) -> Vectors:
    """One backward pass of the mean next-token loss, a layer at a time.

    With w a weight and g its gradient, for each row and column of each projection: `.absolute` (sum of |w g|) and
    `.signed` (sum of w g); with `curvature`, h the mean over samples of the squared per-sample gradient, also `.second`
    (sum of w h w) and `.mixed` (sum of |w g - w h w / 2|). `hidden` adds embedding, head and norms. Only one layer's
    gradients are alive at a time; products are float32. Weights, and which of them train, end as they were.
    """
    walk = Walk(model, input_ids, 1 if curvature else BATCH_TOKENS)  # one token or less: sample by sample
    weights = named_weights(model, hidden)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    found: Vectors = {}
    samples, batches = len(input_ids), len(walk.batches)
    inputs: list[list[Tensor]] = []
    try:
        with torch.no_grad():
            stream = walk.embed()
            for index in range(len(walk.layers)):
                inputs.append(stream)
                stream = [walk.run(index, part) for part in stream]
        with torch.enable_grad():
            above = _backward_through_head(walk, stream, weights, found)
            for index in reversed(range(len(walk.layers))):
                progress(len(walk.layers) - 1 - index, len(walk.layers), "gradients")
                names = [f"layers.{index}.{name}" for name in (*ATTENTION, *FFN, *NORMS)]
                reducer = _Reducer({name: weights[name] for name in names if name in weights}, samples, curvature)
                for number, part in enumerate(inputs.pop()):
                    leaf = part.detach().requires_grad_(True)
                    output = walk.run(index, leaf)
                    output.backward(above[number].to(output.device))
                    above[number] = _gradient(leaf)
                    reducer.fold(batches)
                reducer.finish(found)
                give_back()
            if hidden:
                reducer = _Reducer({"embed": weights["embed"]}, samples, curvature)
                for number, ids in enumerate(walk.batches):
                    embedded = model.get_input_embeddings()(ids)
                    embedded.backward(above[number].to(embedded.device))
                reducer.finish(found)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
            parameter.grad = None
    progress(len(walk.layers), len(walk.layers), "gradients")
    return found


def _backward_through_head(walk: Walk, stream: list[Tensor], weights: dict[str, nn.Parameter], found: Vectors):
    """Gradients of the mean loss with respect to the last layer's output; a tied embedding keeps its head's share."""
    reducer = _Reducer({name: weights[name] for name in ("norm", "head", "embed") if name in weights}, 1, False)
    above: list[Tensor] = []
    for hidden, ids in zip(stream, walk.batches, strict=True):
        leaf = hidden.detach().requires_grad_(True)
        for loss in _losses(walk, leaf, ids):
            (loss / (walk.tokens - sum(len(part) for part in walk.batches))).backward()
        above.append(_gradient(leaf))
    reducer.weights.pop("embed", None)
    reducer.finish(found)
    return above


def _losses(walk: Walk, hidden: Tensor, ids: Tensor) -> Iterator[Tensor]:
    """The next-token losses of a batch, summed over a few positions at a time, so that few logits exist together."""
    size = max(1, HEAD_TOKENS // len(ids))
    for start in range(0, ids.shape[1] - 1, size):
        labels = ids[:, start + 1 : start + 1 + size]
        logits = walk.logits(hidden[:, start : start + labels.shape[1]])
        yield cross_entropy(logits.flatten(0, 1), labels.flatten().to(logits.device), reduction="sum")


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


class _Reducer:
    """Takes the gradients of a few weights, batch by batch, and leaves sums over rows and columns of them."""

    def __init__(self, weights: dict[str, nn.Parameter], samples: int, curvature: bool):
        self.weights, self.samples, self.curvature = weights, samples, curvature
        self.sums: Vectors = {}
        self.squares: Vectors = {}
        for weight in weights.values():
            weight.requires_grad_(True)

    def fold(self, batches: int) -> None:
        """Add a batch's gradients up in float32, and their squares; a single batch's stay where they are."""
        if batches == 1 and not self.curvature:
            return
        for name, weight in self.weights.items():
            assert weight.grad is not None
            gradient = weight.grad.float()
            weight.grad = None
            if self.curvature:
                # A batch is a sample; its share in the mean loss is 1 / samples of its own loss' gradient.
                square = gradient.square() * self.samples
                self.squares[name] = self.squares[name].add_(square) if name in self.squares else square
            self.sums[name] = self.sums[name].add_(gradient) if name in self.sums else gradient

    @torch.no_grad()
    def finish(self, found: Vectors) -> None:
        """Reduce and free each gradient in turn."""
        for name, weight in self.weights.items():
            gradient = self.sums.pop(name) if name in self.sums else weight.grad
            assert gradient is not None
            square = self.squares.pop(name, None)
            if weight.ndim == 1:
                found |= {f"{name}.signed.columns": weight.float() * gradient.float()}
                found[f"{name}.absolute.columns"] = found[f"{name}.signed.columns"].abs()
            else:
                _reduce(name, weight, gradient, square, found)
            weight.grad = None
            weight.requires_grad_(False)


def _reduce(name: str, weight: Tensor, gradient: Tensor, square: Tensor | None, found: Vectors) -> None:
    rows: dict[str, list[Tensor]] = {}
    columns: dict[str, Tensor] = {}
    for start in range(0, len(weight), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        values = weight[part].float()
        first = values * gradient[part].float()
        kinds = {"signed": first, "absolute": first.abs()}
        if square is not None:
            second = values.square().mul_(square[part])
            kinds |= {"second": second, "mixed": (first - second / 2).abs()}
        for kind, numbers in kinds.items():
            rows.setdefault(kind, []).append(numbers.sum(1))
            columns[kind] = columns[kind] + numbers.sum(0) if kind in columns else numbers.sum(0)
    for kind in rows:
        found |= {f"{name}.{kind}.rows": torch.cat(rows[kind]), f"{name}.{kind}.columns": columns[kind]}
