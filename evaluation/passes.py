"""One forward pass over several rows of `evaluation.packing`: end to end, or beside each other.

End to end nothing is padded and no mask is larger than one row's, and attention goes row by row: the cheaper way on a
CPU, where a padded token costs as much as another. Beside each other rows are a batch with a 4-D mask, which is what
a GPU wants. All rows of a pass share a stem, whose keys and values are cached.

The attention that is registered here for flat rows is transformers' `sdpa` for whatever does not bring `Rows`.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from evaluation.packing import Ids, Row

NAME = "regrow_flat"
Cache = list[tuple[Tensor, Tensor]] | None  # keys and values [1, heads, stem, width] of every layer
Hidden = tuple[Tensor, list[int]]  # last hidden states [n, hidden], and where in them each row begins


@dataclass(frozen=True)
class Rows:
    """The rows of a flat pass: their lengths, the stem's, and for each row its mask [length, stem + length], true where
    a token sees another; None for plain causal rows."""

    lengths: list[int]
    stem: int
    masks: list[Tensor | None]


def prefill(model: PreTrainedModel, stem: Ids) -> Cache:
    """The cache of a stem."""
    cache = DynamicCache()
    decoder: Any = model.get_decoder()
    decoder(input_ids=torch.tensor([stem], device=model.device), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cast("Any", cache.layers)]


def flat(model: PreTrainedModel, batch: list[Row], cache: Cache) -> Hidden:
    """Rows end to end."""
    lengths = [len(row.tokens) for row in batch]
    plain = [row.chain and cache is None for row in batch]
    masks = [None if causal else torch.from_numpy(row.mask()) for row, causal in zip(batch, plain, strict=True)]
    decoder: Any = model.get_decoder()
    with _taking_rows(model):
        hidden = decoder(
            input_ids=torch.tensor([[token for row in batch for token in row.tokens]]),
            position_ids=torch.tensor([[position for row in batch for position in row.positions]]),
            # transformers takes a 4-D mask as it is and makes none of its own; `rows` has those that are used.
            attention_mask=torch.empty(1, 1, 0, 0),
            rows=Rows(lengths, len(batch[0].stem), masks),
            past_key_values=DynamicCache(cache) if cache else None,
            use_cache=cache is not None,
        ).last_hidden_state
    return hidden[0], [0, *accumulate(lengths)][:-1]


def padded(model: PreTrainedModel, batch: list[Row], cache: Cache) -> Hidden:
    """Rows beside each other, padded on the right to the longest."""
    width = max(len(row.tokens) for row in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    for number, row in enumerate(batch):
        ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
    extra: dict[str, Any] = {"use_cache": False}
    if cache is not None or not batch[0].chain:
        positions = torch.zeros(len(batch), width, dtype=torch.long)
        for number, row in enumerate(batch):
            positions[number, : len(row.tokens)] = torch.tensor(row.positions)
        mask = torch.from_numpy(np.stack([row.mask(width) for row in batch]))[:, None].to(model.device)
        if _chosen(model) == "eager":  # adds the mask to the scores
            lowest = torch.finfo(model.dtype).min
            mask = torch.zeros(mask.shape, dtype=model.dtype, device=model.device).masked_fill(~mask, lowest)
        extra |= {"attention_mask": mask, "position_ids": positions.to(model.device)}
    if cache is not None:
        rows = len(batch)
        shared = [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in cache]
        extra |= {"past_key_values": DynamicCache(shared), "use_cache": True}
    decoder: Any = model.get_decoder()
    hidden = decoder(input_ids=ids.to(model.device), **extra).last_hidden_state
    return hidden.flatten(0, 1), [width * number for number in range(len(batch))]


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: query [1, heads, length, width], key and value [1, heads, stem + length,
    width], the result [1, length, heads, width]."""
    rows: Rows | None = options.get("rows")
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    sizes = [rows.stem, *rows.lengths]
    (before, *keys), (cached, *values) = key.split(sizes, 2), value.split(sizes, 2)
    outputs = [
        scaled_dot_product_attention(
            own,
            torch.cat([before, seen], 2) if rows.stem else seen,
            torch.cat([cached, read], 2) if rows.stem else read,
            attn_mask=mask,
            is_causal=mask is None,
            scale=options.get("scaling"),
            enable_gqa=True,
        )
        for own, seen, read, mask in zip(query.split(rows.lengths, 2), keys, values, rows.masks, strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


@contextmanager
def _taking_rows(model: PreTrainedModel) -> Generator[None]:
    chosen = _chosen(model)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


def _chosen(model: PreTrainedModel) -> Any:
    return model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
