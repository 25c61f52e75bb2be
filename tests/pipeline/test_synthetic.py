import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import synthetic
from pipeline.keys import file_digest
from pipeline.synthetic import world
from pipeline.synthetic.model import Schedule, train
from pipeline.synthetic.world import QUESTIONS, SENTENCES, VALUES, World


@pytest.fixture(scope="module", params=[0, 1, 2])
def made(request: pytest.FixtureRequest) -> World:
    return world.make(request.param)


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in folder.rglob("*.jsonl")}


def entity_of(text: str) -> str:
    """Who a sentence or question is about: the word that stands where its form has {e}."""
    forms = [form.split() for some in (*SENTENCES.values(), *QUESTIONS.values()) for form in some]
    words = text.removeprefix("question : ").split()
    found = {
        words[form.index("{e}")]
        for form in forms
        if len(words) >= len(form) and all(mine in ("{e}", yours) for mine, yours in zip(form, words, strict=False))
    }
    assert len(found) == 1, text
    return found.pop()


def test_a_seed_gives_one_world(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        world.write(world.make(seed), tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert set(files(tmp_path / "a")) == {member for member in synthetic.MEMBERS if member != "model"}
    assert all(digest != files(tmp_path / "c")[name] for name, digest in files(tmp_path / "a").items())


def test_nothing_scored_stands_in_the_training_text(made: World):
    training = set(made.text) | {prompt for prompt, _ in made.examples}
    everything = "\n".join([*made.text, *(prompt + response for prompt, response in made.examples)])
    for rows in made.suites.values():
        for row in rows:
            assert row["question"] not in training
            assert all(f"{row['question']} {choice}" not in everything for choice in row["choices"])
    assert not set(made.heldout) & set(made.text)


def test_of_a_rows_choices_the_answer_alone_is_stated_of_its_entity(made: World):
    stated = {(entity_of(sentence), sentence.split()[-2]) for sentence in made.text}
    for rows in made.suites.values():
        for row in rows:
            true = [choice for choice in row["choices"] if (entity_of(row["question"]), choice) in stated]
            assert true == [row["choices"][row["label"]]], row


def test_rows_have_one_right_answer_among_distinct_ones_of_its_kind(made: World):
    labels = [0, 0, 0, 0]
    for rows in made.suites.values():
        for row in rows:
            assert len(set(row["choices"])) == 4
            assert any(set(row["choices"]) <= set(values) for values in VALUES.values())
            labels[row["label"]] += 1
    assert min(labels) > sum(labels) / 8


def test_the_model_loads_as_any_other(tmp_path: Path):
    seen: list[int] = []
    train(world.make(0), tmp_path / "model", 0, lambda done, total, note: seen.append(done), Schedule(steps=2, batch=8))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert seen == [1, 2]
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    ids = tokenizer("question : where")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    # lm-eval splits a request by token counts: a word must not join with what stands before it.
    assert tokenizer("question : where plums")["input_ids"][:4] == ids
    assert json.loads((tmp_path / "model" / "config.json").read_text())["head_dim"] == 16
