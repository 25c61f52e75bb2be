"""Which rows a run trains on: a function of data and config alone, the same for the trainer and for the teacher."""

from collections.abc import Iterator
from typing import Any

from recovery.config import RecoveryConfig
from recovery.data import Example, Row, batches, encode, hold_out, mix, pack

Sources = list[tuple[float, list[Example]]]


def feed(sources: Sources, tokenizer: Any, config: RecoveryConfig) -> tuple[Iterator[Row], list[Row]]:
    """Endless training rows of the weighted sources, and the held-out ones: about as many tokens from every source."""
    training, held = split(sources, config)
    rows = pack(mix(training, tokenizer, config.loss, config.max_length, config.seed), config.max_length)
    return rows, _validation_rows(held, tokenizer, config)


def split(sources: Sources, config: RecoveryConfig) -> tuple[Sources, list[list[Example]]]:
    """Examples to train on, and held-out ones (`hold_out`). Raises ValueError, too, for patience without the latter."""
    training, held = hold_out(sources, config.validation.fraction, config.seed)
    if config.validation.patience and not any(held):
        raise ValueError(
            "recovery.validation.patience: no source has the ten examples from which on one is held out, so there is "
            f"no held-out loss to watch with fraction: {config.validation.fraction}; leave patience out, or raise "
            "recovery.validation.fraction"
        )
    return training, held


def within_budget(sources: Sources, tokenizer: Any, config: RecoveryConfig) -> Iterator[Row]:
    """The rows that a whole run feeds, in its order."""
    rows, _ = feed(sources, tokenizer, config)
    for batch in batches(rows, config.tokens, config.batch_tokens, config.max_length):
        yield from batch


def _validation_rows(held: list[list[Example]], tokenizer: Any, config: RecoveryConfig) -> list[Row]:
    rows: list[Row] = []
    share = config.validation.tokens / max(1, len(held))
    for examples in held:
        found = []
        for example in examples:
            found += encode(tokenizer, example, config.loss, config.max_length)
            if sum(len(tokens.ids) for tokens in found) >= share:
                break
        rows += pack(found, config.max_length)
    return rows
