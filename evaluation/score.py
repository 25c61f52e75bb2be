"""Protocol A: log-likelihood ranking of the choices, by lm-eval with its own tasks and metrics."""

# lm-eval's registration decorator hides HFLM's own type from the checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportAbstractUsage=false

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, cast

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.harness import build_task, gold_index
from evaluation.suites import Suite

DEFAULT_BATCH = 8
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class SuiteResult:
    """`metrics` as `results.json` shows them; `items` one dict a question, for paired comparisons."""

    metrics: dict[str, Any]
    items: list[dict[str, Any]]


class _Scorer(HFLM):
    """HFLM on a model in memory, with logits at the continuations' positions only.

    Requests that differ in their last token alone (yes / no after one context) share a forward pass.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int, add_bos: bool | None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=add_bos)
        self.lengths: dict[tuple[str, str], int] = {}  # tokens of each continuation
        self.report: Progress = lambda done, total, note: None

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        """(sum of log-likelihoods, all targets greedy) of each ((context, continuation), ids, ids)."""
        self.lengths.update({text: len(continuation) for text, _, continuation in requests})
        inputs: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            # When too long, tokens fall off the left, as in HFLM.
            whole = (context + continuation)[-(self.max_length + 1) :]
            inputs.setdefault(tuple(whole[:-1]), []).append(index)
        order = sorted(inputs, key=len, reverse=True)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for ids, hidden in zip(batch, self._hidden(batch), strict=True):
                for index in inputs[ids]:
                    target = torch.tensor(requests[index][2], device=self.device)
                    logits = self.model.get_output_embeddings()(hidden[len(ids) - len(target) : len(ids)]).float()
                    scores = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)
                    answers[index] = (float(scores.sum()), bool((logits.argmax(1) == target).all()))
            self.report(min(start + self.batch_size, len(order)), len(order), f"{len(batch[0])} tokens wide")
        return answers

    def _hidden(self, batch: list[tuple[int, ...]]) -> torch.Tensor:
        """Last hidden states [rows, longest, hidden] of right-padded rows; what is right of a token is not seen."""
        longest = len(batch[0])
        ids = torch.tensor([list(row) + [0] * (longest - len(row)) for row in batch], device=self.device)
        return self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    rows: list[dict[str, Any]] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    add_bos: bool | None = None,
    progress: Progress = lambda done, total, note: None,
    revision: str | None = None,
) -> SuiteResult:
    """Score one suite on `rows`, or on its own hub data where rows is None.

    `limit` takes the first items. `add_bos` None follows the tokenizer's own rule. Metrics: `acc` ranks summed
    log-likelihoods, `acc_norm` divides by the choice's characters, both with lm-eval's standard error;
    `gold_logprob` is the mean over items of the right choice's log-likelihood per token (nats).
    """
    task = build_task(suite, rows, revision)
    scorer = _Scorer(model, tokenizer, batch_size or DEFAULT_BATCH, add_bos)
    scorer.report = progress
    # `evaluate` is what `simple_evaluate` calls after indexing thousands of tasks and listing the machine's parts.
    outcome: Any = evaluate(scorer, {"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=1)
    found, samples = outcome["results"][task.task_name], outcome["samples"][task.task_name]
    items = [_item(task, sample, scorer.lengths) for sample in samples]
    metrics: dict[str, Any] = {"protocol": suite.protocol, "n": len(items)}
    for name in ("acc", "acc_norm"):
        if f"{name},none" in found:
            metrics[name] = float(found[f"{name},none"])
            metrics[f"{name}_stderr"] = float(found[f"{name}_stderr,none"]) if len(items) > 1 else 0.0
    values = [item["gold_logprob"] for item in items]
    metrics["gold_logprob"] = sum(values) / len(values)
    metrics["gold_logprob_stderr"] = _standard_error(values)
    metrics |= {"harness": f"lm-eval {metadata.version('lm_eval')}", "bos": _adds_bos(scorer)}
    return SuiteResult(metrics, items)


def _item(task: Any, sample: dict[str, Any], lengths: dict[tuple[str, str], int]) -> dict[str, Any]:
    """What is kept of one question, from the requests lm-eval made and the answers it got."""
    arguments = list(sample["arguments"])
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    tokens = [lengths[tuple(pair)] for pair in arguments]
    gold = gold_index(task, sample["doc"])
    return {
        "index": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "gold": gold,
        "loglikelihoods": likelihoods,
        "tokens": tokens,
        "acc": sample.get("acc"),
        "acc_norm": sample.get("acc_norm"),
        "gold_logprob": likelihoods[gold] / tokens[gold],
    }


def _standard_error(values: list[float]) -> float:
    """Sample standard deviation over the square root of n; 0 for one item, since JSON has no NaN."""
    mean, count = sum(values) / len(values), len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count) if count > 1 else 0.0


def _adds_bos(scorer: HFLM) -> bool:
    bos = cast("Any", scorer.tokenizer).bos_token_id
    return bos is not None and scorer.tok_encode("a")[:1] == [bos]
