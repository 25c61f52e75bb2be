"""`items.jsonl`: what is kept of every scored question, one JSON object a line, so that comparing needs no rerun.

index, doc_hash (lm-eval's, of the row), gold, loglikelihoods (nats, one a choice), tokens (of each choice), truncated,
acc, acc_norm, gold_logprob (nats a token).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ITEMS = "items.jsonl"
Item = dict[str, Any]


def write(path: Path, items: Sequence[Item]) -> None:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


def read(path: Path) -> list[Item]:
    """Raises ValueError naming the line that is not an item."""
    items: list[Item] = []
    # Not splitlines of the text: it also cuts at characters that JSON strings, what a model wrote, may hold.
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number}: not JSON ({error})") from error
        if not isinstance(item, dict) or not {"index", "doc_hash"} <= item.keys():
            raise ValueError(f"{path}: line {number}: not a scored item (it has no index and doc_hash)")
        items.append(item)
    return items
