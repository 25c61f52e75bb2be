"""Distillation: the pruned model learns the dense model's next-token distributions beside the data's own tokens.

    loss = (1 - weight) CE + weight T² KL(p || q) + hidden H

CE: mean cross entropy of the labelled tokens. KL: forward divergence (Hinton et al., arXiv 1503.02531), mean over the
distilled positions. p is the teacher's distribution over its `top_k` likeliest tokens and one class for all others
(`recovery.teacher`), q the student's over the same classes: its rest is what it gives to all tokens that are not among
the teacher's k. T divides the log-probabilities of both over these classes, which are normalised again; with k the
whole vocabulary that is the usual softmax(logits / T). T² keeps the gradients' size. H: per layer and distilled
position the squared difference of the hidden states over the teacher's squared length, mean over layers and positions.
The rest class and H's scale are ours.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from recovery.config import Distillation
from recovery.data import IGNORED, Row
from recovery.loss import decoded
from recovery.teacher import CHUNK, Teacher, distilled, others


def check(student: PreTrainedModel, teacher: PreTrainedModel, settings: Distillation) -> None:
    """Raise ValueError where the models cannot be compared: vocabularies, or depth and width for hidden states."""
    names = ("vocab_size", *(("num_hidden_layers", "hidden_size") if settings.hidden else ()))
    for name in names:
        ours, theirs = (getattr(model.config, name) for model in (student, teacher))
        if ours != theirs:
            remedy = "" if name == "vocab_size" else "; set recovery.distillation.hidden to 0"
            raise ValueError(f"recovery.distillation: {name} is {ours}, the teacher's is {theirs}{remedy}")


def divergence(logits: Tensor, ids: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
    """KL of the classes, summed over positions, without T²: student logits [n, vocabulary] against ids and logprobs."""
    logits, ids = logits.float(), ids.long()
    classes = logits.gather(-1, ids)
    if logprobs.shape[1] > ids.shape[1]:
        classes = torch.cat([classes, others(logits, ids)], -1)
    # log_softmax over the classes also takes out the normalisation that `classes` lacks.
    student = functional.log_softmax(classes / temperature, -1)
    teacher = functional.log_softmax(logprobs.float() / temperature, -1)
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


def accumulate(
    model: PreTrainedModel, row: Row, teacher: Teacher, settings: Distillation, labelled: int, positions: int
) -> list[float]:
    """Add a row's share to the gradients of a step of `labelled` tokens and distilled `positions`.

    Logits exist for a chunk of positions at a time: each chunk's gradient is taken at once, down to the hidden states.
    Returns the row's sums of CE, KL and H; over their counts they are the step's means.
    """
    device = model.device
    targets = teacher(row)
    chosen = torch.tensor(distilled(row, settings.positions), device=device)
    hidden, layers = decoded(model, row, bool(settings.hidden))
    hidden, labels = hidden[chosen], torch.tensor(row.labels[1:], device=device)[chosen]
    head: Any = model.get_output_embeddings()
    gradient, sums = torch.empty_like(hidden), [0.0, 0.0, 0.0]
    factor = settings.weight * settings.temperature**2 / max(1, positions)
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        leaf = hidden[part].detach().requires_grad_()
        logits = head(leaf).float()
        task = functional.cross_entropy(logits, labels[part], ignore_index=IGNORED, reduction="sum")
        ids, logprobs = targets.ids[part].to(device), targets.logprobs[part].to(device)
        apart = divergence(logits, ids, logprobs, settings.temperature)
        loss = (1 - settings.weight) / max(1, labelled) * task + factor * apart
        (gradient[part],) = torch.autograd.grad(loss, leaf)
        sums[0] += float(task.detach())
        sums[1] += float(apart.detach())
    roots, gradients = [hidden], [gradient]
    if settings.hidden:
        matched = sum(
            ((ours[chosen].float() - theirs.float()).square().sum(-1) / theirs.float().square().sum(-1)).sum()
            for ours, theirs in zip(layers, targets.hidden, strict=True)
        ) / len(layers)
        assert isinstance(matched, Tensor)
        sums[2] = float(matched.detach())
        roots.append(matched)
        gradients.append(torch.tensor(settings.hidden / max(1, positions), device=device))
    torch.autograd.backward(roots, gradients)
    return sums


def means(sums: list[float], settings: Distillation, labelled: int, positions: int) -> dict[str, float]:
    """The step's loss and its terms, by name, from the sums over its rows."""
    task, apart, matched = sums[0] / max(1, labelled), sums[1] / max(1, positions), sums[2] / max(1, positions)
    loss = (1 - settings.weight) * task + settings.weight * settings.temperature**2 * apart + settings.hidden * matched
    terms = {"loss": loss, "task_loss": task, "divergence": apart}
    return {**terms, "hidden_loss": matched} if settings.hidden else terms
