"""Data frames as JSON in pandas' split form, a row at a time: matminer's and Matbench's layout.

``{"index": [...], "columns": [...], "data": [[...], ...]}``. The larger sets have some gigabytes of
text, so it is never in memory as a whole.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, TextIO

from matxfer.crystal import CrystalError
from matxfer.datasets.card import DatasetError
from matxfer.readers.content import MAX_FILE_BYTES, MAX_PART_BYTES, open_binary
from matxfer.readers.entry import describe
from matxfer.readers.monty_json import unique_keys

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

#: Characters read at a time.
_PIECE = 1 << 20
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def rows_of(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the rows of a file, decompressed where needed.

    Parameters
    ----------
    path
        The file.
    wanted
        Columns that must be there.

    Yields
    ------
    str
        The row's index in the frame, its number where the frame has none before its rows.
    dict or str
        Its cells by column, or what is wrong with it.

    Raises
    ------
    DatasetError
        If the file is of another layout, lacks a column, is damaged or ends too early.
    """
    count = 0
    try:
        with open_binary(path, MAX_FILE_BYTES) as stream:
            text = _Scanner(io.TextIOWrapper(stream, encoding="utf-8"))
            for index, row in _rows(text, wanted):
                yield index, row
                count += 1
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    except (OSError, EOFError, ValueError, RecursionError, CrystalError) as error:
        raise DatasetError(
            f"{path}: damaged or incomplete after {count} rows ({describe(error)}); fetch it again"
        ) from error


def is_split(path: Path) -> bool:
    """Return whether a JSON file begins like a data frame in split form."""
    try:
        with open_binary(path, MAX_FILE_BYTES) as stream:
            text = _Scanner(io.TextIOWrapper(stream, encoding="utf-8"))
            return next(text.keys_of_object(), "") in {"columns", "index", "data"}
    except (OSError, EOFError, ValueError, RecursionError, CrystalError):
        return False


def _rows(text: _Scanner, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    columns: list[str] | None = None
    index: list[Any] = []
    found = False
    for key in text.keys_of_object():
        if key == "columns":
            columns = [str(name) for name in text.value()]
            if missing := [name for name in wanted if name not in columns]:
                raise DatasetError(
                    f"there is no column {missing[0]!r}; the columns are {columns}. The card does "
                    "not describe this file"
                )
        elif key == "index":
            index = list(text.value())
        elif key == "data":
            if columns is None:
                raise DatasetError("the rows come before the names of their columns")
            found = True
            for k, row in enumerate(text.items_of_array()):
                name = str(index[k]) if k < len(index) else str(k)
                if isinstance(row, list) and len(row) == len(columns):
                    yield name, dict(zip(columns, row, strict=True))
                else:
                    yield name, f"the row does not have {len(columns)} cells"
        else:
            text.value()  # such as the note of who wrote it
    if not found:
        raise DatasetError("this is no data frame in split form (columns, index, data)")


class _Scanner:
    """A stream of JSON text that is read value by value.

    Parameters
    ----------
    stream
        The text.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.text, self.at = "", 0

    def keys_of_object(self) -> Iterator[str]:
        """Yield the keys of an object; the caller takes each value before the next key."""
        self._take("{")
        if self._peek() == "}":
            return
        while True:
            key = self.value()
            self._take(":")
            yield str(key)
            if self._peek() == "}":
                return
            self._take(",")

    def items_of_array(self) -> Iterator[Any]:
        """Yield the values of an array."""
        self._take("[")
        if self._peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self._peek() == "]":
                self.at += 1
                return
            self._take(",")

    def value(self) -> Any:
        """Return the next value."""
        self._peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            # A number at the end of what was read may go on.
            if end == len(self.text) and self._more():
                continue
            self.at = end
            return value

    def _peek(self) -> str:
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self._more():
                raise EOFError("the text ends in the middle")

    def _take(self, mark: str) -> None:
        if self._peek() != mark:
            raise ValueError(f"{self._peek()!r} where {mark!r} should be")
        self.at += 1

    def _more(self) -> bool:
        """Read on, twice as much each time, and forget what is done with."""
        rest = len(self.text) - self.at
        if rest > MAX_PART_BYTES:
            raise ValueError("a row without an end")
        piece = self.stream.read(max(_PIECE, rest))
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)
