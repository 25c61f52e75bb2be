"""What the bytes of a data file say: rows (JSON lines, a JSON list or Parquet), or plain text."""

import io
import json
from typing import Any, cast

from pipeline.errors import SourceError

PARQUET = b"PAR1"  # how every Parquet file begins
Row = dict[str, Any]


def rows_of(content: bytes, place: str) -> list[Row]:
    """The rows of a file, whichever of the three it is. Raises SourceError naming `place` and the row or line."""
    if content.startswith(PARQUET):
        found = _parquet(content, place)
    else:
        text = text_of(content, place).removeprefix("\ufeff")  # a byte order mark
        found = _json(text, place)
        _refuse_half_pairs(text, found, place)
    for index, row in enumerate(found):
        if not isinstance(row, dict):
            raise SourceError(f"{place}: row {index + 1} is not a mapping of fields to values")
    return cast("list[Row]", found)


def text_of(content: bytes, place: str) -> str:
    """The text of a UTF-8 file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{content[error.start]:02x} at {error.start}"
        raise SourceError(f"{place}: not UTF-8 text ({where}); save it as UTF-8") from error


def _json(text: str, place: str) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return cast("list[Any]", json.loads(text))
        except json.JSONDecodeError as error:
            raise SourceError(f"{place}: not JSON: {error}") from error
    found: list[Any] = []
    # Not splitlines: it also cuts at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise SourceError(
                f"{place}: line {number}: neither JSON lines nor a JSON list: {error.msg}, column {error.colno}"
            ) from error
    return found


def _refuse_half_pairs(text: str, rows: list[Any], place: str) -> None:
    """JSON can escape half of a surrogate pair, which is no character."""
    if "\\ud" not in text.lower():
        return
    for index, row in enumerate(rows):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise SourceError(
                f"{place}: row {index + 1} holds half of a surrogate pair (\\ud800 to \\udfff alone), which no "
                "tokenizer reads: take it out"
            ) from error


def _parquet(content: bytes, place: str) -> list[Any]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise SourceError(f"{place}: begins like Parquet and cannot be read as such: {reason}") from error
