"""The small world: a made-up language, a model trained on it, and suites about it. For CI, offline, in seconds.

`build` writes a folder with the MEMBERS; everything in it follows from the seed. Importing this costs no torch.
"""

from collections.abc import Callable
from pathlib import Path

VERSION = 2
SUITES = ("synthetic_questions", "synthetic_sentences")
MEMBERS = (
    "model",
    "text.jsonl",
    "examples.jsonl",
    "heldout.jsonl",
    *(f"suites/{suite}.jsonl" for suite in SUITES),
)


def build(folder: Path, seed: int, progress: Callable[[int, int, str], None]) -> None:
    """Write the world of `seed` into `folder`: data files first, then the model trained on them."""
    from pipeline.synthetic import world
    from pipeline.synthetic.model import train

    made = world.make(seed)
    world.write(made, folder)
    train(made, folder / "model", seed, progress)
