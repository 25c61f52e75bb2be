"""What a model writes, and how much it repeats itself: the check that likelihoods do not make.

A pruned model may rank answers well and still write loops. Texts are generated without sampling from the same prompts
for every model, so that they can be read side by side. No torch here.
"""

from collections.abc import Sequence
from typing import Any

PROMPTS = (
    "The capital of France is",
    "To make a cup of tea, first",
    "Once upon a time, in a small village by the sea,",
    "Water boils at a lower temperature on a mountain because",
    "The three most important things when planting a tree are",
    "She opened the letter and read:",
)


def repetition(texts: Sequence[str], size: int = 4) -> float:
    """The share of word n-grams that occurred before in the same text; 0 where no text has one."""
    grams = [_grams(text, size) for text in texts]
    count = sum(map(len, grams))
    return 1 - sum(len(set(part)) for part in grams) / count if count else 0.0


def distinct(texts: Sequence[str], size: int) -> float:
    """Different word n-grams over all, of all texts together (distinct-n, Li et al., arXiv 1510.03055)."""
    grams = [gram for text in texts for gram in _grams(text, size)]
    return len(set(grams)) / len(grams) if grams else 0.0


def measures(texts: Sequence[str]) -> dict[str, Any]:
    """repetition (of 4-grams), distinct_1, distinct_2, the mean number of words, and the texts that are empty."""
    return {
        "repetition": repetition(texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "words": sum(len(text.split()) for text in texts) / len(texts),
        "empty": sum(not text.strip() for text in texts),
    }


def _grams(text: str, size: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
