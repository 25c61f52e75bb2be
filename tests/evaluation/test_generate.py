"""Protocol B: the published wording, the first match, and batches that give what single prompts give."""

import random
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from evaluation import generate as generation
from evaluation import suites
from evaluation.generate import generate, score_generated
from evaluation.instructions import instruction

# Rows in lm-eval's schemas, and the instructions the LLM-Adapters data sets have for the same questions.
PUBLISHED: dict[str, tuple[dict[str, Any], str, str]] = {
    "boolq": (
        {"passage": "-", "question": "is i cant believe its not butter margarine", "label": 0},
        "Please answer the following question with true or false, question: is i cant believe its not butter margarine?"
        "\n\nAnswer format: true/false",
        "false",
    ),
    "piqa": (
        {"goal": "Retain study notes in brain.", "label": 1,
         "sol1": "Go over notes one last time one week before test.",
         "sol2": "Go over notes one last time one day before test."},
        "Please choose the correct solution to the question: Retain study notes in brain.\n\nSolution1: Go over notes "
        "one last time one week before test.\n\nSolution2: Go over notes one last time one day before test.\n\n"
        "Answer format: solution1/solution2",
        "solution2",
    ),
    "social_iqa": (
        {"context": "Robin wanted to share the food with a friend, so they cut the sandwich in half.", "label": "1",
         "question": "What does Robin need to do before this?", "answerA": "get a knife",
         "answerB": "eat half of her own sandwich", "answerC": "give half the sandwich to her friend"},
        "Please choose the correct answer to the question: Robin wanted to share the food with a friend, so they cut "
        "the sandwich in half. What does Robin need to do before this?\n\nAnswer1: get a knife Answer2: eat half of "
        "her own sandwich Answer3: give half the sandwich to her friend\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    "winogrande": (
        {"sentence": "The jeans fit worse than the shirt because I had tried the _ on at the store.",
         "option1": "jeans", "option2": "shirt", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: The jeans fit worse "
        "than the shirt because I had tried the _ on at the store.\n\nOption1: jeans Option2: shirt Answer format: "
        "option1/option2",
        "option2",
    ),
    "arc_easy": (
        {"question": "Which two things interact most in the water cycle?", "answerKey": "2",
         "choices": {"label": ["1", "2"], "text": ["oceans and the Moon", "oceans and the Sun"]}},
        "Please choose the correct answer to the question: Which two things interact most in the water cycle?\n\n"
        "Answer1: oceans and the Moon Answer2: oceans and the Sun\n\nAnswer format: answer1/answer2",
        "answer2",
    ),
    "hellaswag": (
        {"activity_label": "Roof", "ctx_a": "A man sits on a roof.", "ctx_b": "he", "endings": ["a", "b"],
         "label": "0"},
        "Please choose the correct ending to complete the given sentence: Roof: A man sits on a roof. He\n\n"
        "Ending1: a Ending2: b\n\nAnswer format: ending1/ending2",
        "ending1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("suite", PUBLISHED)
def test_instructions_are_the_published_ones(suite: str):
    row, text, gold = PUBLISHED[suite]
    asked = instruction(suite, row)
    assert (asked.text, asked.gold) == (text, gold)
    assert asked.prompt.endswith(f"### Instruction:\n{text}\n\n### Response:\n")
    assert asked.response == f"the correct answer is {gold}"


def test_the_first_option_named_counts():
    asked = instruction("piqa", PUBLISHED["piqa"][0])
    assert asked.parse("the correct answer is solution2, not solution1") == "solution2"
    assert asked.parse("Solution1 or so") is None  # as published: lower case only


@pytest.mark.parametrize("beams", [1, 4])
def test_batches_generate_what_single_prompts_do(beams: int, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    chance = random.Random(0)
    prompts = ["".join(chance.choices("abc def", k=chance.randint(1, 60))) for _ in range(7)]
    torch.nn.init.normal_(tiny_model.lm_head.weight, std=0.5)  # so that no two tokens are nearly tied
    together, cut = generate(tiny_model, tiny_tokenizer, prompts, 8, beams, tokens_per_batch=10_000)
    assert not any(cut)
    for prompt, text in zip(prompts, together, strict=True):
        ids = tiny_tokenizer(prompt, return_tensors="pt")
        alone = tiny_model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=8,
            num_beams=beams,
            do_sample=False,
        )
        assert text == tiny_tokenizer.decode(alone[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("beams", [1, 4])
def test_penalties_of_the_models_own_config_are_not_obeyed(
    beams: int, tiny_model: LlamaForCausalLM, tiny_tokenizer: Any
):
    plain, _ = generate(tiny_model, tiny_tokenizer, ["the cat", "a dog"], 12, beams)
    said = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "length_penalty": -5.0, "early_stopping": True}
    tiny_model.generation_config.update(**said)
    assert generate(tiny_model, tiny_tokenizer, ["the cat", "a dog"], 12, beams)[0] == plain


def test_prompts_longer_than_the_window_are_cut_and_told(tiny_model: LlamaForCausalLM, tiny_tokenizer: Any):
    _, cut = generate(tiny_model, tiny_tokenizer, ["x" * 300, "x"], 8)
    assert cut == [True, False]
    with pytest.raises(ValueError, match="300 new tokens do not fit into the model's window of 256"):
        generate(tiny_model, tiny_tokenizer, ["x"], 300)


def test_scores_count_matches_and_what_names_no_option(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    said = iter(["the correct answer is solution2", "solution2", "no idea"])
    monkeypatch.setattr(
        generation,
        "generate",
        lambda model, tokenizer, prompts, *rest: ([next(said) for _ in prompts], [False] * len(prompts)),
    )
    rows = [{"goal": f"g{n}", "sol1": "a", "sol2": "b", "label": label} for n, label in enumerate((1, 0, 1))]
    suite = suites.load("piqa_generated")
    assert (suite.protocol, suite.metric, suite.base) == ("B", "acc", "piqa")
    found = score_generated(tiny_model, tiny_tokenizer, suite, rows)
    assert found.metrics["acc"] == pytest.approx(1 / 3)
    assert found.metrics["unparsed"] == 1
    assert [item["answer"] for item in found.items] == ["solution2", "solution2", None]
    said = iter(["solution1"])
    more = score_generated(tiny_model, tiny_tokenizer, suite, [*rows, {**rows[0], "label": 0}], known=found.items)
    assert more.metrics["acc"] == pytest.approx(2 / 4)
