"""The loss of packed rows: float32 cross entropy, with logits only where something is learned."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from recovery import attention, parallel, products
from recovery.data import IGNORED, Row

CHUNK = 1024  # labelled tokens whose logits exist at one time when there are more


def labelled(rows: Sequence[Row]) -> int:
    """How many tokens of the rows are learned."""
    return sum(label != IGNORED for row in rows for label in row.labels)


def decoded(model: PreTrainedModel, row: Row, layers: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The last hidden states [length - 1, width] of a row, from which its tokens but the first are predicted; with
    `layers` also those behind every decoder layer, the last one's normalised.

    No attention mask is given: with one, even of ones, transformers would not see the restarts of the position ids,
    and examples would read each other.
    """
    attention.prepare(model)
    ids = torch.tensor([row.ids], device=model.device)
    positions = torch.tensor([row.positions], device=model.device)
    decoder: Any = model.get_decoder()
    out = decoder(input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=layers)
    between = out.hidden_states[1:] if layers else ()
    return out.last_hidden_state[0, :-1], tuple(states[0, :-1] for states in between)


def row_loss(model: PreTrainedModel, row: Row) -> tuple[Tensor, int]:
    """Cross entropy summed over a row's labelled tokens, float32, and how many there are."""
    hidden, _ = decoded(model, row)
    labels = torch.tensor(row.labels[1:], device=model.device)
    learned = labels != IGNORED
    hidden, labels = hidden[learned], labels[learned]
    head: Any = model.get_output_embeddings()

    def summed(part: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(products.through(head, part).float(), targets, reduction="sum")

    if len(labels) <= CHUNK:
        return summed(hidden, labels), len(labels)
    parts = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    # checkpoint drops a chunk's logits after the forward pass and computes them again in the backward pass
    sums: Any = [checkpoint(summed, *part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum(), len(labels)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Sequence[Row]) -> float:
    """Mean cross entropy of the labelled tokens of rows, in eval mode; the processes share the rows."""
    model.eval()
    total = sum(float(row_loss(model, row)[0]) * counts for _, row, counts in parallel.share(rows))
    return parallel.add_up([total])[0] / labelled(rows)
