"""From examples to training rows: tokens, labels, a mix of sources, and packing that keeps examples apart."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from recovery.base import seed_of

IGNORED = -100  # the label that torch's cross entropy leaves out
Loss = Literal["response", "full"]


@dataclass(frozen=True)
class Example:
    """A prompt and the response that is trained on; plain text has no prompt.

    `end` adds the end-of-text token to what is learned. It is off by default: a scored continuation has none, and
    a choice in the middle of a text is not its end. Turn it on for instructions whose answers are to be generated.
    """

    prompt: str
    response: str
    end: bool = False
    group: str = ""  # what it shares with others, a passage: none of them trains where one is held out

    def shared(self) -> Any:
        """The group, or the example itself where it stands alone."""
        return self.group or (self.prompt, self.response, self.end)


@dataclass(frozen=True)
class Tokens:
    """Token ids of one example and a label for each: the id itself, or IGNORED where nothing is learned."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Row:
    """Examples laid end to end. Position ids restart at each one's start, which is what keeps them apart."""

    ids: list[int]
    labels: list[int]
    positions: list[int]


def encode(tokenizer: Any, example: Example, loss: Loss, longest: int) -> list[Tokens]:
    """Tokens as lm-eval splits a request: white space at the prompt's end belongs to the response, prompt and whole
    are encoded each by itself, and what the whole has beyond the prompt's length is the response.

    Special tokens follow the tokenizer's own rule. A pair longer than `longest` loses the prompt's beginning, as in
    scoring; plain text is cut into windows. What is left without a token to learn is left out.
    """
    prompt = example.prompt.rstrip()
    ids: list[int] = tokenizer(example.prompt + example.response, verbose=False)["input_ids"]
    if example.end and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    if not prompt:
        windows = [ids[start : start + longest] for start in range(0, len(ids), longest)]
        return [Tokens(window, window) for window in windows if len(window) > 1]
    unlearned = len(tokenizer(prompt, verbose=False)["input_ids"]) if loss == "response" else 0
    labels = [IGNORED] * unlearned + ids[unlearned:]
    ids, labels = ids[-longest:], labels[-longest:]
    return [Tokens(ids, labels)] if any(label != IGNORED for label in labels[1:]) else []


def hold_out(
    sources: list[tuple[float, list[Example]]], fraction: float, seed: int
) -> tuple[list[tuple[float, list[Example]]], list[list[Example]]]:
    """Set a seeded share of every source's examples aside for validation; at least one where there are ten.

    An example that was set aside is left out of training wherever it stands again, and so is all of its group. Returns
    training and held-out parts. Raises ValueError for a source of which nothing is left to train on.
    """
    held: list[list[Example]] = []
    for number, (_, examples) in enumerate(sources):
        count = max(round(fraction * len(examples)), 1 if fraction and len(examples) >= 10 else 0)
        held.append(random.Random(seed_of(seed, "validation", number)).sample(examples, count))
    aside = {example.shared() for part in held for example in part}
    training = [(weight, [e for e in examples if e.shared() not in aside]) for weight, examples in sources]
    for number, ((_, before), (_, after)) in enumerate(zip(sources, training, strict=True)):
        if before and not after:
            raise ValueError(
                f"recovery.data.{number}: all of its {len(before)} examples are held out, or equal to what is; set "
                "recovery.validation.fraction to 0 or give it other rows"
            )
    return training, held


def mix(
    sources: list[tuple[float, list[Example]]], tokenizer: Any, loss: Loss, longest: int, seed: int
) -> Iterator[Tokens]:
    """Endless examples; each is drawn from the source that is furthest behind its share of the tokens fed.

    Raises ValueError for a weight that is not positive and for a source without a token to learn.
    """
    for number, (weight, _) in enumerate(sources):
        if not weight > 0:
            raise ValueError(f"recovery.data.{number}: weight {weight} is not positive; leave the source out instead")
    streams = [_stream(examples, tokenizer, loss, longest, seed, n) for n, (_, examples) in enumerate(sources)]
    fed = [0] * len(sources)
    while True:
        index = min(range(len(sources)), key=lambda n: fed[n] / sources[n][0])
        tokens = next(streams[index])
        fed[index] += len(tokens.ids)
        yield tokens


def pack(examples: Iterable[Tokens], longest: int) -> Iterator[Row]:
    """Rows of at most `longest` tokens. Nothing is padded: a row ends before the example that would not fit."""
    held: list[Tokens] = []
    for example in examples:
        if held and sum(len(part.ids) for part in held) + len(example.ids) > longest:
            yield _row(held)
            held = []
        held.append(example)
    if held:
        yield _row(held)


def batches(rows: Iterable[Row], budget: int, batch_tokens: int, max_length: int) -> Iterator[list[Row]]:
    """Rows for one optimizer step each, at most `batch_tokens`, until the next row would exceed `budget` tokens."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        if len(row.ids) > budget:
            break
        batch.append(row)
        size += len(row.ids)
        budget -= len(row.ids)
        if size + max_length > batch_tokens:  # the next row might not fit
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _stream(
    examples: list[Example], tokenizer: Any, loss: Loss, longest: int, seed: int, number: int
) -> Iterator[Tokens]:
    """One source without end: a seeded order, another one every epoch, encoded when drawn."""
    epoch = 0
    while True:
        order = random.Random(seed_of(seed, number, epoch)).sample(range(len(examples)), len(examples))
        empty = True
        for index in order:
            for tokens in encode(tokenizer, examples[index], loss, longest):
                empty = False
                yield tokens
        if empty:
            raise ValueError(f"recovery.data.{number}: none of {len(examples)} examples has a token to learn")
        epoch += 1


def _row(examples: list[Tokens]) -> Row:
    # An example's first token is predicted from nothing: neither at a row's start nor from the end of the one before.
    return Row(
        [token for part in examples for token in part.ids],
        [label for part in examples for label in (IGNORED, *part.labels[1:])],
        [position for part in examples for position in range(len(part.ids))],
    )
