"""From examples to training rows: tokens, labels, a mix of sources, and packing that keeps examples apart."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from recovery.base import seed_of

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """A prompt and the response that is trained on; plain text has no prompt. `end` adds the end-of-text token."""

    prompt: str
    response: str
    end: bool = False


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


def encode(tokenizer: Any, example: Example, loss: Literal["response", "full"], longest: int) -> list[Tokens]:
    """Tokens as lm-eval splits a request: trailing blanks of the prompt belong to the response, prompt and whole are
    encoded each by itself, and what the whole has beyond the prompt's length is the response.

    Special tokens follow the tokenizer's own rule. A pair that is too long loses the prompt's beginning, as in
    scoring; plain text is cut into pieces.
    """
    prompt = example.prompt.rstrip(" ")
    whole = example.prompt + example.response
    ids: list[int] = tokenizer(whole, verbose=False)["input_ids"]
    if example.end and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    if not prompt:
        pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
        return [Tokens(piece, piece) for piece in pieces if len(piece) > 1]
    learned = len(tokenizer(prompt, verbose=False)["input_ids"]) if loss == "response" else 0
    labels = [IGNORED] * learned + ids[learned:]
    if len(ids) > longest:
        ids, labels = ids[-longest:], labels[-longest:]
    # The first token of a row is predicted from nothing, so a label there teaches nothing.
    return [Tokens(ids, labels)] if any(label != IGNORED for label in labels[1:]) else []


class Source:
    """One weighted source: its examples in a seeded order, reshuffled every epoch, encoded when they are drawn."""

    def __init__(self, weight: float, examples: list[Example], seed: int, name: str) -> None:
        self.weight = weight
        self.examples = examples
        self.seed = seed
        self.name = name
        self.fed = 0

    def stream(self, tokenizer: Any, loss: Literal["response", "full"], longest: int) -> Iterator[Tokens]:
        """Endless. Raises ValueError when no example has anything to learn."""
        epoch = 0
        while True:
            count = len(self.examples)
            order = random.Random(seed_of(self.seed, self.name, epoch)).sample(range(count), count)
            empty = True
            for index in order:
                for tokens in encode(tokenizer, self.examples[index], loss, longest):
                    empty = False
                    yield tokens
            if empty:
                raise ValueError(f"recovery source {self.name}: none of {count} examples has a token to learn")
            epoch += 1


def hold_out(
    sources: list[tuple[float, list[Example]]], fraction: float, seed: int
) -> tuple[list[tuple[float, list[Example]]], list[list[Example]]]:
    """Set a seeded share of every source's examples aside for validation; at least one where there are ten."""
    training: list[tuple[float, list[Example]]] = []
    held: list[list[Example]] = []
    for number, (weight, examples) in enumerate(sources):
        count = max(round(fraction * len(examples)), 1 if fraction and len(examples) >= 10 else 0)
        chosen = set(random.Random(seed_of(seed, "validation", number)).sample(range(len(examples)), count))
        training.append((weight, [example for n, example in enumerate(examples) if n not in chosen]))
        held.append([examples[n] for n in sorted(chosen)])
    return training, held


def mix(
    sources: list[tuple[float, list[Example]]],
    tokenizer: Any,
    loss: Literal["response", "full"],
    longest: int,
    seed: int,
) -> Iterator[Tokens]:
    """Endless examples; each is drawn from the source that is furthest behind its share of the tokens fed."""
    parts = [Source(weight, examples, seed, str(n)) for n, (weight, examples) in enumerate(sources)]
    streams = [part.stream(tokenizer, loss, longest) for part in parts]
    while True:
        index = min(range(len(parts)), key=lambda n: parts[n].fed / parts[n].weight)
        tokens = next(streams[index])
        parts[index].fed += len(tokens.ids)
        yield tokens


def pack(examples: Iterator[Tokens], longest: int) -> Iterator[Row]:
    """Rows of at most `longest` tokens. Nothing is padded: a row ends before the example that would not fit."""
    held: list[Tokens] = []
    for example in examples:
        if held and sum(len(part.ids) for part in held) + len(example.ids) > longest:
            yield _row(held)
            held = []
        held.append(example)
    if held:
        yield _row(held)


def _row(examples: list[Tokens]) -> Row:
    ids = [token for part in examples for token in part.ids]
    # The first token of an example is not to be predicted from the end of the one before it.
    labels = [label for part in examples for label in (IGNORED, *part.labels[1:])]
    positions = [position for part in examples for position in range(len(part.ids))]
    return Row(ids, labels, positions)
