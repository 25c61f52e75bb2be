"""Protocol B: a fine-tuned model generates, and the first option it names is its answer (LLM-Adapters, DoRA, RandLoRA).

Beam search with 4 beams and 32 new tokens, no sampling; an answer that names no option is wrong and counted. Zero-shot
values measure that a model follows the format, not what it knows.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.harness import build_task
from evaluation.instructions import Instruction, instruction
from evaluation.score import Item, SuiteResult
from evaluation.statistics import mean, standard_error
from evaluation.suites import Suite, load

BEAMS, NEW_TOKENS = 4, 32
TOKENS = {"cpu": 4096}  # of one batch: rows x beams x (prompt + new tokens)
TOKENS_ELSEWHERE = 65536
# What a model's generation_config may say otherwise, so that all models are asked alike.
PLAIN: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "early_stopping": False,
}
Progress = Callable[[int, int, str], None]


def score_generated(
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
    """Score a suite of protocol B; arguments as `score` takes them. `unparsed` counts answers that name no option."""
    task = build_task(load(suite.base), rows, revision)
    docs: Any = task.eval_docs
    asked = [instruction(suite.base, doc) for doc in list(docs)[:limit]]
    items = {item["index"]: item for item in known if item["index"] < len(asked)}
    missing = [index for index in range(len(asked)) if index not in items]
    prompts = [asked[index].prompt for index in missing]
    texts, cut = generate(model, tokenizer, prompts, NEW_TOKENS, BEAMS, tokens_per_batch, add_bos, progress)
    for index, text, shortened in zip(missing, texts, cut, strict=True):
        items[index] = _item(index, asked[index], text, shortened)
    found = [items[index] for index in range(len(asked))]
    right = [item["acc"] for item in found]
    golds = [item["gold"] for item in found]
    uniform = mean([1 / len(question.names) for question in asked])
    majority = max(golds.count(gold) for gold in set(golds)) / len(golds)
    metrics = {
        "protocol": suite.protocol,
        "n": len(found),
        "acc": mean(right),
        "acc_stderr": standard_error(right),
        "chance": max(majority, uniform) if suite.fixed_answers else uniform,
        "unparsed": sum(item["answer"] is None for item in found),
        "truncated": sum(item["truncated"] for item in found),
        "harness": f"{BEAMS} beams, {NEW_TOKENS} new tokens",
        "bos": _encode(tokenizer, "a", add_bos)[:1] == [tokenizer.bos_token_id],
    }
    return SuiteResult(metrics, found)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    beams: int = 1,
    tokens_per_batch: int | None = None,
    add_bos: bool | None = None,
    progress: Progress = lambda done, total, note: None,
) -> tuple[list[str], list[bool]]:
    """What the model writes after each prompt, without sampling or penalties, and whether the prompt lost its start.

    Prompts of like length are batched, padded on the left and masked, with positions counted from each prompt's first
    token: a batch gives what its prompts give one by one. Raises ValueError where the window holds no prompt.
    """
    window = int(getattr(model.config, "max_position_embeddings", 0) or 2**30) - new_tokens
    if window < 1:
        raise ValueError(f"{new_tokens} new tokens do not fit into the model's window of {window + new_tokens}")
    ids = [_encode(tokenizer, prompt, add_bos) for prompt in prompts]
    cut = [len(row) > window for row in ids]
    ids = [row[-window:] for row in ids]
    budget = tokens_per_batch or TOKENS.get(model.device.type, TOKENS_ELSEWHERE)
    pad = cast("int", tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id) or 0
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    texts = [""] * len(ids)
    at = 0
    while at < len(order):
        width = len(ids[order[at]])
        part = order[at : at + max(1, budget // (beams * (width + new_tokens)))]
        batch = torch.full((len(part), width), pad)
        seen = torch.zeros(len(part), width, dtype=torch.long)
        for row, index in enumerate(part):
            batch[row, width - len(ids[index]) :] = torch.tensor(ids[index])
            seen[row, width - len(ids[index]) :] = 1
        made: Any = cast("Any", model).generate(
            input_ids=batch.to(model.device),
            attention_mask=seen.to(model.device),
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            **PLAIN,
            pad_token_id=pad,
        )
        for row, index in enumerate(part):
            texts[index] = cast("str", tokenizer.decode(made[row, width:], skip_special_tokens=True))
        at += len(part)
        progress(at, len(order), f"{width} tokens wide")
    return texts, cut


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, add_bos: bool | None) -> list[int]:
    named = {} if add_bos is None else {"add_special_tokens": add_bos}
    return cast("Any", tokenizer).encode(text, **named)


def _item(index: int, asked: Instruction, text: str, truncated: bool) -> Item:
    answer = asked.parse(text)
    return {
        "index": index,
        "doc_hash": hashlib.sha256(f"{asked.text}\n{asked.gold}".encode()).hexdigest(),
        "gold": asked.gold,
        "answer": answer,
        "text": text,
        "truncated": truncated,
        "acc": float(answer == asked.gold),
    }
