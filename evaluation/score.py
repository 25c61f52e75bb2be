"""Protocol A: log-likelihood ranking of the choices, by lm-eval with its own tasks and metrics."""

# lm-eval's registration decorator hides HFLM's own type, and so ours, from the checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportAbstractUsage=false

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, cast

from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.harness import build_task, gold_index
from evaluation.scorer import SharedPrefixLM
from evaluation.statistics import mean, standard_error
from evaluation.suites import Suite

Progress = Callable[[int, int, str], None]
Item = dict[str, Any]


@dataclass(frozen=True)
class SuiteResult:
    """`metrics` as `results.json` shows them; `items` one dict a question, for paired comparisons."""

    metrics: dict[str, Any]
    items: list[Item]


class _Recording(SharedPrefixLM):
    """Remembers how many tokens context and continuation of each (context, continuation) had."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.lengths: dict[tuple[str, str], tuple[int, int]] = {}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # lm-eval asks for its bars by default

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        self.lengths |= {asked: (len(context), len(target)) for asked, context, target in requests if asked}
        return super()._loglikelihood_tokens(requests, *arguments, **named)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    rows: list[dict[str, Any]] | None = None,
    limit: int | None = None,
    tokens_per_batch: int | None = None,
    add_bos: bool | None = None,
    progress: Progress = lambda done, total, note: None,
    revision: str | None = None,
    known: Sequence[Item] = (),
) -> SuiteResult:
    """Score one suite on `rows`, or on its own hub data where rows is None.

    `limit` takes the first items. `add_bos` None follows the tokenizer's own rule. `known` are items scored before on
    the same rows with the same model and settings: they are kept as they are and only the rest is scored. Metrics:
    `acc` ranks summed log-likelihoods, `acc_norm` divides by the choice's characters, both with lm-eval's standard
    error; `gold_logprob` is the mean over items of the right choice's log-likelihood per token (nats); `chance` is what
    guessing gives (one over the choices; where all questions have the same ones, the most frequent answer's share);
    `truncated` counts items whose context lost its beginning to the model's window.
    """
    task = build_task(suite, rows, revision)
    scorer = _Recording(model, tokens_per_batch, tokenizer=tokenizer, add_bos_token=add_bos)
    scorer.report = progress
    count = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
    items = {item["index"]: item for item in known if item["index"] < count}
    wanted = [index for index in range(count) if index not in items]
    if wanted:
        # `evaluate` is what `simple_evaluate` calls after indexing thousands of tasks and listing the machine's parts.
        outcome: Any = evaluate(
            scorer, {"tasks": {task.task_name: task}}, samples={task.task_name: wanted}, bootstrap_iters=0
        )
        for sample in outcome["samples"][task.task_name]:
            items[sample["doc_id"]] = _item(task, sample, scorer)
    found = [items[index] for index in range(count)]
    metrics: dict[str, Any] = {"protocol": suite.protocol, **summary(found, suite.fixed_answers)}
    metrics |= {"harness": f"lm-eval {metadata.version('lm_eval')}", "bos": _adds_bos(scorer)}
    return SuiteResult(metrics, found)


def summary(items: list[Item], fixed_answers: bool) -> dict[str, Any]:
    """The metrics of scored items, with standard errors (sample deviation over the root of n, as lm-eval's)."""
    metrics: dict[str, Any] = {"n": len(items)}
    for name in ("acc", "acc_norm", "gold_logprob"):
        values = [float(item[name]) for item in items if item.get(name) is not None]
        if len(values) == len(items):
            metrics |= {name: mean(values), f"{name}_stderr": standard_error(values)}
    golds = [item["gold"] for item in items]
    uniform = mean([1 / len(item["loglikelihoods"]) for item in items])
    majority = max(golds.count(gold) for gold in set(golds)) / len(golds)
    metrics["chance"] = max(majority, uniform) if fixed_answers else uniform
    metrics["truncated"] = sum(item["truncated"] for item in items)
    return metrics


def _item(task: Any, sample: dict[str, Any], scorer: _Recording) -> Item:
    """What is kept of one question, from the requests lm-eval made and the answers it got."""
    lengths = [scorer.lengths[tuple(pair)] for pair in sample["arguments"]]
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    gold = gold_index(task, sample["doc"])
    return {
        "index": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "gold": gold,
        "loglikelihoods": likelihoods,
        "tokens": [target for _, target in lengths],
        "truncated": any(context + target > scorer.max_length + 1 for context, target in lengths),
        "acc": sample.get("acc"),
        "acc_norm": sample.get("acc_norm"),
        "gold_logprob": likelihoods[gold] / lengths[gold][1],
    }


def _adds_bos(scorer: SharedPrefixLM) -> bool:
    bos = cast("Any", scorer.tokenizer).bos_token_id
    return bos is not None and scorer.tok_encode("a")[:1] == [bos]
