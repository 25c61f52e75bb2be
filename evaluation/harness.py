"""lm-eval's own tasks, built for our rows or for their hub data."""

import logging
from collections.abc import Iterator
from typing import Any, cast

import datasets
import lm_eval.tasks
import pyarrow
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from evaluation.suites import Suite

SPLIT = "scored"
TASKS = lm_eval.tasks.__path__[0]

# lm-eval reports every step of its own and warns of settings that are ours; what matters comes back as results.
logging.getLogger("lm_eval").setLevel(logging.ERROR)


def build_task(suite: Suite, rows: list[dict[str, Any]] | None, revision: str | None = None) -> ConfigurableTask:
    """The suite's lm-eval task over `rows` (its hub schema), or over its own hub data set where rows is None.

    Only the data set is replaced: prompts, choices, filters and metrics are the task's. `revision` pins hub data.
    Always zero-shot, whatever a task's own file says. Raises ValueError for rows that make no table.
    """
    data: dict[str, Any] = {"num_fewshot": 0}
    if rows is not None:
        try:
            table = datasets.Dataset.from_list(rows)
        except pyarrow.ArrowException as error:
            raise ValueError(f"the rows make no table, a field may have values of several types: {error}") from error

        def local(**_: object) -> datasets.DatasetDict:
            return datasets.DatasetDict({SPLIT: table})

        splits = {"training_split": None, "validation_split": None, "test_split": SPLIT, "fewshot_split": None}
        data |= {"custom_dataset": local, "dataset_kwargs": None, **splits}
    elif revision:
        data |= {"dataset_kwargs": {"revision": revision}}
    if suite.config:
        task: Any = ConfigurableTask(config={**suite.config, **data})
    else:
        manager = TaskManager(include_path=f"{TASKS}/{suite.folder}", include_defaults=False)
        # A task by name takes overrides as a member of a group; a bare mapping would be a task of its own.
        found = manager.load([{"group": "regrow", "task": [{"task": suite.task, **data}]}])["tasks"]
        (task,) = found.values()
    return cast("ConfigurableTask", task)


def checked_task(suite: Suite, rows: list[dict[str, Any]]) -> ConfigurableTask:
    """The suite's task over rows. Raises ValueError where lm-eval cannot ask them.

    The fields of our own suites are `suites.check_rows`'s to know; of a task by name (`lm-eval:TASK`) every row is
    asked for its text and its answer here.
    """
    if suite.fields:
        return build_task(suite, rows)
    try:
        task = build_task(suite, rows)
        for doc in task.eval_docs:
            task.doc_to_text(doc)
            gold_index(task, cast("dict[str, Any]", doc))
    except Exception as error:  # templates and functions of any task
        raise ValueError(f"lm-eval cannot ask the rows as {suite.name}: {error!r}") from error
    return task


def gold_index(task: ConfigurableTask, doc: dict[str, Any]) -> int:
    """Which choice is right: the number lm-eval itself compares predictions with."""
    gold: Any = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return task.doc_to_choice(doc).index(gold) if isinstance(gold, str) else int(gold)


def requests(task: ConfigurableTask) -> Iterator[tuple[dict[str, Any], list[tuple[str, str]]]]:
    """Every item with its (context, continuation) pairs, one a choice, as lm-eval asks them (zero-shot)."""
    for number, doc in task.doc_iterator():
        context = task.fewshot_context(doc, num_fewshot=0)
        built: Any = task.construct_requests(doc=doc, ctx=context, metadata=(task.task_name, number, 1))
        yield doc, [instance.args for instance in built]
