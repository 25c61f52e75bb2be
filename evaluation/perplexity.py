"""Perplexity of plain text: exp of the mean next-token loss over non-overlapping windows."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 1024  # tokens a forward pass takes at most; the logits of one pass are held at once


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    window: int,
    tokens: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict[str, Any]:
    """Score the texts, joined by blank lines, in windows of `window` tokens; a last, shorter window is dropped.

    In each window the first token is context only, as in LLM-Pruner's protocol, and the tokenizer's special tokens
    stand once, before the whole text, if it adds any. `tokens` scores the first so many tokens only. Losses are
    computed in float32. Raises ValueError when the text is shorter than one window.
    """
    ids = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    count = len(ids if tokens is None else ids[:tokens]) // window
    if count == 0:
        have = len(ids) if tokens is None else min(tokens, len(ids))
        raise ValueError(f"{have} tokens to score make no window of {window}: give more text or a shorter window")
    windows = ids[: count * window].view(count, window).to(model.device)
    total, batch = 0.0, max(1, ROWS // window)
    for start in range(0, count, batch):
        part = windows[start : start + batch]
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        total += float(losses)
        progress(min(start + batch, count), count, "windows")
    scored = count * (window - 1)
    loss = total / scored
    return {"perplexity": math.exp(loss), "loss": loss, "tokens": scored, "window": window}
