"""Distillation: the pruned model learns a teacher's next-token distributions beside the data's own tokens.

    loss = (1 - weight) CE + weight T² KL(p || q) + hidden H

CE: mean cross entropy of the labelled tokens. KL: forward divergence (Hinton et al., arXiv 1503.02531), mean over the
distilled positions. p is the teacher's distribution over its `top_k` likeliest tokens and one class for all others
(`recovery.teacher`), q the student's over the same classes: its rest is what it gives to all tokens that are not among
the teacher's k. T divides the log-probabilities of both over these classes, which are normalised again; with k the
whole vocabulary that is the usual softmax(logits / T). T² keeps the gradients' size. H: per layer and distilled
position the squared difference of the hidden states over the teacher's squared length, mean over layers and positions.
The rest class and H's scale are ours.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from recovery import products
from recovery.config import Distillation
from recovery.data import IGNORED, Row
from recovery.loss import decoded
from recovery.teacher import CHUNK, Targets, Teacher, distilled


def check(student: Mapping[str, Any], teacher: Mapping[str, Any], settings: Distillation) -> None:
    """Raise ValueError where models whose config.json says this cannot be compared: vocabularies, or depth and width
    for hidden states."""
    names = ("vocab_size", *(("num_hidden_layers", "hidden_size") if settings.hidden else ()))
    for name in names:
        ours, theirs = (said[name] for said in (student, teacher))
        if ours != theirs:
            remedy = "" if name == "vocab_size" else "; set recovery.distillation.hidden to 0"
            raise ValueError(f"recovery.distillation: {name} is {ours}, the teacher's is {theirs}{remedy}")


@torch.no_grad()
def terms(
    logits: Tensor, labels: Tensor, targets: Targets, temperature: float, task_factor: float, factor: float
) -> tuple[float, float, Tensor]:
    """CE and KL (without T²) summed over n positions, and the gradient of `task_factor` CE + `factor` KL.

    Takes logits [n, vocabulary] float32, labels [n] (IGNORED where nothing is learned); the gradient is by the logits.
    Written out because the vocabulary is passed over half as often as autograd would. With the student's softmax s, its
    classes' c and their tempered p' and c': dKL/dz is (c' - p') / T at a teacher's token, and the rest's, shared out as
    s, elsewhere; dCE/dz is s less the label's one-hot.
    """
    ids, learned = targets.ids.long(), labels != IGNORED
    label = labels.where(learned, 0)[:, None]
    total = logits.logsumexp(-1, keepdim=True)
    task = float((total - logits.gather(-1, label))[learned].sum())
    classes = logits.gather(-1, ids) - total
    softmax = (logits - total).exp_()
    likely = softmax.gather(-1, ids)
    softmax.scatter_(-1, ids, 0.0)
    rest = softmax.sum(-1, keepdim=True).clamp_min(1e-30)
    if targets.logprobs.shape[1] > ids.shape[1]:
        classes = torch.cat([classes, rest.log()], -1)
    student = functional.log_softmax(classes / temperature, -1)
    teacher = functional.log_softmax(targets.logprobs.float() / temperature, -1)
    apart = float(functional.kl_div(student, teacher, reduction="sum", log_target=True))
    towards = factor / temperature * (student.exp() - teacher.exp())
    weight = task_factor * learned[:, None]
    beside = towards[:, ids.shape[1] :]  # [n, 1], or [n, 0] without a rest
    gradient = softmax.mul_(weight + (beside / rest).sum(-1, keepdim=True))
    gradient.scatter_(-1, ids, weight * likely + towards[:, : ids.shape[1]])
    return task, apart, gradient.scatter_add_(-1, label, -weight)


def accumulate(
    model: PreTrainedModel, row: Row, teacher: Teacher, settings: Distillation, labelled: float, positions: float
) -> list[float]:
    """Add a row's share to the gradients of a step of `labelled` tokens and distilled `positions`.

    Logits exist for a chunk of positions at a time. Returns the row's sums of CE, KL and H; over their counts they are
    the step's means.
    """
    device = model.device
    targets = teacher(row)
    chosen = torch.tensor(distilled(row, settings.positions), device=device)
    hidden, layers = decoded(model, row, bool(settings.hidden))
    hidden, labels = hidden[chosen], torch.tensor(row.labels[1:], device=device)[chosen]
    head: Any = model.get_output_embeddings()
    gradient, sums, kind = torch.empty_like(hidden), [0.0, 0.0, 0.0], products.computing(hidden)
    factors = (1 - settings.weight) / max(1, labelled), settings.weight * settings.temperature**2 / max(1, positions)
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        with torch.no_grad():
            logits = products.through(head, hidden[part]).float()
        said = Targets(targets.ids[part].to(device), targets.logprobs[part].to(device))
        task, apart, slope = terms(logits, labels[part], said, settings.temperature, *factors)
        gradient[part] = slope.to(kind) @ head.weight.to(kind)
        sums[0] += task
        sums[1] += apart
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
