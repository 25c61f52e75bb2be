"""Scores against lm-eval's own HFLM, and against log-likelihoods worked out token by token."""

import math
from typing import Any

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaForCausalLM

from evaluation import suites
from evaluation.examples import examples
from evaluation.harness import build_task
from evaluation.perplexity import perplexity
from evaluation.score import score
from evaluation.suites import check_rows

THREE = {"text": ["rain", "a tree", "it"], "label": ["A", "B", "C"]}
ARC = {"question": "What falls?", "choices": THREE, "answerKey": "B"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        {"passage": "Cats eat fish.", "question": "do cats eat fish", "idx": 0, "label": 1},
        {"passage": "A dog is red.", "question": "is a dog blue", "idx": 1, "label": 0},
        {"passage": "Trees stand still.", "question": "do trees walk", "idx": 2, "label": 0},
    ],
    "piqa": [
        {"goal": "open a door", "sol1": "push", "sol2": "eat the handle", "label": 0},
        {"goal": "cut bread", "sol1": "use a song", "sol2": "use a knife ", "label": 1},
    ],
    "social_iqa": [
        {"context": "Ann ran.", "question": "Why?", "answerA": "go", "answerB": "nap", "answerC": "no", "label": "3"},
        {"context": "Bo ate.", "question": "Then?", "answerA": "full", "answerB": "x", "answerC": "sad", "label": "1"},
    ],
    "hellaswag": [
        {"ind": 1, "activity_label": "Cooking", "ctx_a": "A man cuts [x] bread.", "ctx_b": "he", "ctx": "",
         "endings": ["eats it.", "flies", "is a tree [title] Next", "sings"], "label": "2"},
        {"ind": 2, "activity_label": "Run", "ctx_a": "A dog runs.", "ctx_b": "then", "ctx": "",
         "endings": ["stops.", "reads", "b", "c"], "label": "0"},
    ],
    "winogrande": [
        {"sentence": "The cup fell off the table because _ was wet.",
         "option1": "the cup", "option2": "the table", "answer": "2"},
        {"sentence": "Ann beat Bo since _ trained.", "option1": "Ann", "option2": "Bo", "answer": "1"},
    ],
    "arc_easy": [ARC, {**ARC, "question": "What flies?", "answerKey": "A"}],
    "arc_challenge": [ARC, {**ARC, "question": "What swims well?", "answerKey": "C"}],
    "openbookqa": [
        {"question_stem": "The sun is", "choices": {"text": ["hot", "a wet"], "label": ["A", "B"]}, "answerKey": "A"},
        {"question_stem": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": "B"},
    ],
    "commonsense_qa": [
        {"question": " Where is a book? ", "question_concept": "book", "answerKey": "D",
         "choices": {"label": list("ABCDE"), "text": ["sea", "sky", "fire", "shelf", "sun"]}},
        {"question": "What barks?", "question_concept": "dog", "answerKey": "A",
         "choices": {"label": list("ABCDE"), "text": ["dog", "sky", "fire", "shelf", "sun"]}},
    ],
    "copa": [
        {"premise": "The man fell.", "choice1": "Ill.", "choice2": "It rained.", "question": "cause", "label": 1},
        {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I sang.", "question": "effect", "label": 0},
    ],
    "synthetic_questions": [
        {"question": "question : who ? answer :", "choices": ["a", "b", "c", "d"], "label": 2},
        {"question": "question : where ? answer :", "choices": ["x", "y", "z", "w"], "label": 0},
    ],
}  # fmt: skip
ROWS["synthetic_sentences"] = ROWS["synthetic_questions"]

RANKED = [name for name in suites.names() if suites.load(name).protocol == "A"]

# (context, continuation) of the first row's right answer, written by hand from lm-eval's templates
GOLD = {
    "boolq": ("Cats eat fish.\nQuestion: do cats eat fish?\nAnswer:", " yes"),
    "piqa": ("Question: open a door\nAnswer:", " push"),
    "social_iqa": ("Q: Ann ran. Why?\nA:", " no"),
    "hellaswag": ("Cooking: A man cuts bread. He", " is a tree. Next"),
    "winogrande": ("The cup fell off the table because the table", " was wet."),
    "arc_easy": ("Question: What falls?\nAnswer:", " a tree"),
    "arc_challenge": ("Question: What falls?\nAnswer:", " a tree"),
    "openbookqa": ("The sun is", " hot"),
    "commonsense_qa": (
        "Question: Where is a book?\nA. sea\nB. sky\nC. fire\nD. shelf\nE. sun\nAnswer:", " D",
    ),
    "copa": ("The man fell because", "  it rained."),  # two blanks, as lm-eval asks
    "synthetic_questions": ("question : who ? answer :", " c"),
    "synthetic_sentences": ("question : who ? answer :", " c"),
}  # fmt: skip


def by_hand(model: LlamaForCausalLM, tokenizer: Any, context: str, continuation: str) -> tuple[float, int]:
    """Log-likelihood of the continuation and its number of tokens, one token at a time."""
    ids, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    total = 0.0
    for position in range(start, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:position]])).logits[0, -1]
        total += torch.log_softmax(logits, -1)[ids[position]].item()
    return total, len(ids) - start


def test_every_suite_is_tested():
    assert set(ROWS) == set(GOLD) == set(RANKED)


@pytest.mark.parametrize("name", RANKED)
def test_examples_are_the_gold_requests(name: str):
    assert examples(suites.load(name), ROWS[name])[0] == GOLD[name]


@pytest.mark.parametrize("name", RANKED)
def test_scores_equal_lm_evals_own(name: str, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    suite, rows = suites.load(name), ROWS[name]
    found = score(tiny_model, tiny_tokenizer, suite, rows, tokens_per_batch=100)
    reference: Any = simple_evaluate(
        HFLM(pretrained=tiny_model, tokenizer=tiny_tokenizer, batch_size=1),
        tasks=[build_task(suite, rows)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=10,
    )
    (expected,) = reference["results"].values()
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in expected:
            assert found.metrics[metric] == expected[f"{metric},none"]
            assert found.metrics[f"{metric}_stderr"] == pytest.approx(expected[f"{metric}_stderr,none"])
    (samples,) = reference["samples"].values()
    for item, sample in zip(found.items, samples, strict=True):
        likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
        assert item["loglikelihoods"] == pytest.approx(likelihoods, abs=1e-3)
    first, tokens = by_hand(tiny_model, tiny_tokenizer, *GOLD[name])
    assert found.items[0]["gold_logprob"] == pytest.approx(first / tokens, abs=1e-4)
    mean = sum(item["gold_logprob"] for item in found.items) / len(found.items)
    assert found.metrics["gold_logprob"] == pytest.approx(mean)
    assert found.metrics["bos"] is True


def test_scores_do_not_depend_on_batch_size_and_limit_keeps_order(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    suite = suites.load("hellaswag")
    one, many = (
        score(tiny_model, tiny_tokenizer, suite, ROWS["hellaswag"], tokens_per_batch=b).items for b in (1, 4096)
    )
    for left, right in zip(one, many, strict=True):
        assert left["loglikelihoods"] == pytest.approx(right["loglikelihoods"], abs=1e-4)
    limited = score(tiny_model, tiny_tokenizer, suite, ROWS["hellaswag"], limit=1)
    assert [item["doc_hash"] for item in limited.items] == [one[0]["doc_hash"]]
    assert limited.metrics["n"] == 1


def test_contexts_longer_than_the_window_lose_their_beginning(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    row = {"passage": "long " * 100, "question": "is it", "idx": 0, "label": 1}
    suite = suites.load("boolq")
    found = score(tiny_model, tiny_tokenizer, suite, [row])  # 256 positions
    reference: Any = HFLM(pretrained=tiny_model, tokenizer=tiny_tokenizer, batch_size=1)
    task = build_task(suite, [row])
    task.build_all_requests()
    expected = [value for value, _ in reference.loglikelihood(task.instances, disable_tqdm=True)]
    assert found.items[0]["loglikelihoods"] == pytest.approx(expected, abs=1e-3)


def test_perplexity_is_transformers_own_loss_over_the_windows(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    texts = ["the cat sees the dog near the river", "a house stands under a tree"]
    ids = tiny_tokenizer("\n\n".join(texts), return_tensors="pt")["input_ids"]
    losses = [tiny_model(input_ids=ids[:, n : n + 8], labels=ids[:, n : n + 8]).loss for n in range(0, 64, 8)]
    found = perplexity(tiny_model, tiny_tokenizer, texts, window=8)
    assert found["tokens"] == 8 * 7
    assert found["perplexity"] == pytest.approx(math.exp(sum(loss.item() for loss in losses) / 8), rel=1e-5)
    assert perplexity(tiny_model, tiny_tokenizer, texts, window=8, tokens=20)["tokens"] == 2 * 7
    with pytest.raises(ValueError, match="9 tokens to score make no window of 64"):
        perplexity(tiny_model, tiny_tokenizer, texts, window=64, tokens=9)


def test_an_unknown_suite_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'piqa'"):
        suites.load("piqua")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"goal": None}, "row 2: field 'goal' is a NoneType, not str"),
        ("piqa", {"sol2": " "}, "row 2: field 'sol2' has an empty choice"),
        ("piqa", {"label": "0"}, "row 2: field 'label' is a str, not int"),
        ("hellaswag", {"endings": ["a", " "]}, "row 2: field 'endings' has an empty choice"),
        ("arc_easy", {"choices": {"text": ["a"], "label": []}}, "needs as many `text` as `label`"),
        ("arc_easy", {"answerKey": "Z"}, "row 2: answerKey is 'Z', not one of A"),
        ("piqa", {"label": 2}, "row 2: label is 2, not one of 0, 1"),
        # What lm-eval's templates cannot ask, or would ask as something else.
        ("hellaswag", {"endings": ["a", "b", "c"], "label": "3"}, "row 2: label is '3', not one of 0, 1, 2"),
        ("hellaswag", {"endings": [1, 2, 3, 4]}, "row 2: field 'endings' has a choice that is no text"),
        ("arc_easy", {"choices": {"text": [1], "label": ["A"]}}, "row 2: field 'choices' has a choice that is no text"),
        ("winogrande", {"sentence": "Bo lost."}, "row 2: field 'sentence' has no _ for the answer"),
        ("commonsense_qa", {"choices": THREE}, "row 2: choices.label is not A, B, C, D, E, in this order"),
        ("copa", {"question": "why"}, "row 2: question is 'why', not one of cause, effect"),
        ("synthetic_questions", {"label": 7}, "row 2: label is 7, not one of 0, 1, 2, 3"),
        ("synthetic_questions", {"label": -1}, "row 2: label is -1, not one of 0, 1, 2, 3"),
        ("synthetic_questions", {"choices": []}, "row 2: field 'choices' has no choices"),
        ("synthetic_sentences", {"choices": [1, 2]}, "row 2: field 'choices' has a choice that is no text"),
    ],
)
def test_bad_rows_are_named_by_line_and_field(name: str, change: dict[str, Any], message: str):
    rows = [ROWS[name][0], {**ROWS[name][1], **change}]
    with pytest.raises(ValueError, match=message):
        check_rows(suites.load(name), rows, "file.jsonl")
    with pytest.raises(ValueError, match=r"file\.jsonl: row 1: field '\w+' is missing"):
        check_rows(suites.load(name), [{}], "file.jsonl")


def test_any_multiple_choice_task_of_lm_eval_by_its_name(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    suite = suites.load("lm-eval:sciq")
    assert (suite.task, suite.hub, suite.metric) == ("sciq", "allenai/sciq", "acc")
    row = {"question": "What falls?", "support": "Rain falls.", "correct_answer": "rain"}
    row |= {"distractor1": "air", "distractor2": "fire", "distractor3": "stone"}
    found = score(tiny_model, tiny_tokenizer, suite, [row])
    likelihood, tokens = by_hand(tiny_model, tiny_tokenizer, "Rain falls.\nQuestion: What falls?\nAnswer:", " rain")
    assert found.items[0]["gold_logprob"] == pytest.approx(likelihood / tokens, abs=1e-4)
    with pytest.raises(ValueError, match=r"'triviaqa' is generate_until .* regrow scores multiple choice"):
        suites.load("lm-eval:triviaqa")


def test_a_task_that_has_examples_of_its_own_is_asked_without(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    suite = suites.load("lm-eval:ja_leaderboard_jcommonsenseqa")  # its file says three
    choices = {f"choice{n}": f"c{n}" for n in range(5)}
    rows = [{"q_id": n, "question": f"q{n}", "label": n, **choices} for n in range(5)]
    found = score(tiny_model, tiny_tokenizer, suite, rows).items
    alone = score(tiny_model, tiny_tokenizer, suite, rows[2:3]).items
    assert found[2]["loglikelihoods"] == pytest.approx(alone[0]["loglikelihoods"], abs=1e-4)
