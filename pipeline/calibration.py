"""Calibration windows: which tokens of which text a criterion sees."""

import random
from typing import Any

from pipeline.errors import StageError
from pipeline.sections import CalibrationConfig

ENOUGH = 4  # stop reading texts once this many times the asked windows are in hand


def windows(tokenizer: Any, texts: list[str], config: CalibrationConfig) -> list[list[int]]:
    """`samples` windows of exactly `length` token ids, without special tokens, chosen by the seed.

    Texts are read in a seeded order and cut into non-overlapping windows; the last, short one of a text is dropped.
    Raises StageError when the texts hold too few tokens.
    """
    order = random.Random(config.seed)
    shuffled = order.sample(texts, len(texts))
    found: list[list[int]] = []
    for text in shuffled:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(ids) - config.length + 1, config.length)
        found += [ids[start : start + config.length] for start in starts]
        if len(found) >= ENOUGH * config.samples:
            break
    if len(found) < config.samples:
        raise StageError(
            f"pruning.calibration: {config.source} holds {len(found)} windows of {config.length} tokens, "
            f"{config.samples} are asked for; give longer text, or lower samples or length"
        )
    return order.sample(found, config.samples)
