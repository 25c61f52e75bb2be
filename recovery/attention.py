"""Attention over packed rows, example by example.

transformers sees from restarting position ids where examples meet and makes one mask of the whole row, whose empty
parts a CPU computes all the same: time grows with the row's length instead of the examples'. The attention registered
here takes such a row apart, and is transformers' `sdpa` for everything else: batches, padding, generation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from recovery.products import computing

NAME = "regrow_packed"


def prepare(model: PreTrainedModel) -> None:
    """Let a model on a CPU that would use `sdpa` take packed rows apart, from now on."""
    chosen = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    if model.device.type == "cpu" and chosen == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: query, key and value [rows, heads, length, width], the result
    [rows, length, heads, width]. `attention_mask` says the same as restarting position ids where there are some."""
    lengths = _lengths(options.get("position_ids"))
    if len(lengths) < 2 or len(query) > 1 or key.shape[2] != sum(lengths) or options.get("sliding_window"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    kind = computing(query)
    parts = (tensor.to(kind).split(lengths, 2) for tensor in (query, key, value))
    outputs = [
        scaled_dot_product_attention(
            *part, is_causal=True, enable_gqa=True, scale=options.get("scaling"), dropout_p=options.get("dropout", 0.0)
        )
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2).to(query.dtype).contiguous(), None


def _lengths(positions: Tensor | None) -> list[int]:
    """Lengths of the examples of one row of position ids [1, length] that start at 0; nothing for other rows."""
    if positions is None or positions.shape[0] != 1:
        return []
    row = positions[0].tolist()
    starts = [place for place, position in enumerate(row) if position == 0]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(row)], strict=True)]
    return lengths if row == [position for length in lengths for position in range(length)] else []


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
