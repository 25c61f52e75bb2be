"""Training examples from a suite's rows: the gold context and continuation, word for word as they are scored."""

from typing import Any

from evaluation.harness import checked_task, gold_index, requests
from evaluation.suites import Suite


def examples(suite: Suite, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(context, continuation) of each row's right answer; the continuation begins with its blank.

    Raises ValueError for rows that lm-eval cannot ask.
    """
    task = checked_task(suite, rows)
    return [pairs[gold_index(task, doc)] for doc, pairs in requests(task)]
