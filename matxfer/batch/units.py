"""Inputs cut into units of work whose borders depend on the inputs alone.

A unit is a chunk of small files, of rows of a table, or of structures that have been read already;
a part is a run of units. Which unit a structure is in decides with which others it meets the
network, so equal borders make equal results to the last digit, whoever computes them and whenever.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from matxfer.crystal import CrystalError
from matxfer.readers import Entry, expand, is_archive, is_single, members_of, read_file, read_member
from matxfer.readers.entry import describe, entry_of, stem_of
from matxfer.readers.formats import streamed_kind
from matxfer.readers.slices import TableSlice, parquet_rows, parquet_slices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from matxfer.readers.archive import Member

#: A file, or an archive and a member of it, still to be parsed.
File: TypeAlias = "str | tuple[str, Member]"
Payload: TypeAlias = "list[File] | list[Entry] | TableSlice"


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Consecutive inputs.

    Parameters
    ----------
    index
        Its number in the stream of all units.
    part
        Number of the part that it belongs to.
    payload
        Files, entries, or a slice of a table.
    """

    index: int
    part: int
    payload: Payload

    def entries(
        self,
        structure_column: str | None,
        on_read: Callable[[int], None],
        broken: Mapping[int, CrystalError],
    ) -> Iterator[Entry]:
        """Read the unit.

        Parameters
        ----------
        structure_column
            As in :func:`matxfer.readers.read_file`.
        on_read
            Called with the number, in the unit, of the entry that is about to be read.
        broken
            Entries, by their number in the unit, that must not be read again, and why not.
        """
        payload = self.payload
        if isinstance(payload, TableSlice):
            yield from _marked(payload.entries(broken), on_read)
        elif payload and isinstance(payload[0], Entry):
            yield from _marked(payload, on_read)
        else:
            files = cast("list[File]", payload)
            yield from _of_files(files, structure_column, on_read, broken)


def _marked(entries: Iterable[Any], on_read: Callable[[int], None]) -> Iterator[Entry]:
    number = 0
    on_read(number)
    for entry in entries:
        yield entry
        number += 1
        on_read(number)


def _of_files(
    files: Sequence[File],
    structure_column: str | None,
    on_read: Callable[[int], None],
    broken: Mapping[int, CrystalError],
) -> Iterator[Entry]:
    number = 0
    for file in files:
        if isinstance(file, str):
            source, entries = file, read_file(file, structure_column=structure_column)
        else:
            source, entries = f"{file[0]}!{file[1][0]}", read_member(*file)
        while True:
            if number in broken:  # what follows in this file is lost with it
                yield entry_of(source, (0, stem_of(Path(source)), broken[number]))
                number += 1
                break
            on_read(number)
            entry = next(entries, None)
            if entry is None:
                break
            yield entry
            number += 1


class Plan:
    """The units of some inputs, in order.

    Parameters
    ----------
    inputs
        Files, folders and globs; or an iterator over entries.
    chunk
        Structures or small files per unit.
    structure_column
        As in :func:`matxfer.readers.read_file`.
    part_size
        A part ends with the unit that brings it to so many inputs; ``None``: one part.
    wanted
        Which parts are to be done, by their numbers; the inputs of the others are passed over,
        unread where the format allows.
    """

    def __init__(
        self,
        inputs: Iterable[Any],
        *,
        chunk: int,
        structure_column: str | None = None,
        part_size: int | None = None,
        wanted: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self.inputs, self.chunk, self.structure_column = inputs, chunk, structure_column
        self.part_size, self.wanted = part_size, wanted
        self._units = self._part = self._filled = 0

    @property
    def parts(self) -> int:
        """Number of parts so far; of all parts once the units have been gone through."""
        return self._part + (self._filled > 0)

    def __iter__(self) -> Iterator[Unit]:
        self._units = self._part = self._filled = 0
        if hasattr(self.inputs, "__next__"):
            yield from self._of_entries(self.inputs)
            return
        small: list[File] = []
        for path in expand(self.inputs):
            if is_single(path):
                small.append(str(path))
                if len(small) < self.chunk:
                    continue
            if small:
                yield from self._unit(small, len(small))
                small = []
            if not is_single(path):
                yield from self._of_long_file(path)
        if small:
            yield from self._unit(small, len(small))

    def _unit(self, payload: Payload, size: int) -> Iterator[Unit]:
        """Yield a unit if its part is wanted; count it in any case."""
        if unit := self._next(size):
            yield Unit(*unit, payload)

    def _next(self, size: int) -> tuple[int, int] | None:
        """Count a unit; return its number and its part, or None if that is not wanted."""
        found = self._units, self._part
        self._units += 1
        self._filled += size
        if self.part_size is not None and self._filled >= self.part_size:
            self._part, self._filled = self._part + 1, 0
        return found if self.wanted(found[1]) else None

    def _of_long_file(self, path: Path) -> Iterator[Unit]:
        if path.suffix.lower() == ".parquet":
            yield from self._of_parquet(path)
        elif is_archive(path):
            yield from self._of_archive(path)
        else:
            yield from self._of_entries(read_file(path, structure_column=self.structure_column))

    def _of_entries(self, entries: Iterable[Entry]) -> Iterator[Unit]:
        iterator = iter(entries)
        while chunk := list(islice(iterator, self.chunk)):
            yield from self._unit(chunk, len(chunk))

    def _of_archive(self, path: Path) -> Iterator[Unit]:
        failures: list[CrystalError] = []

        def files() -> Iterator[File]:
            try:
                yield from ((str(path), member) for member in members_of(path))
            except Exception as error:  # noqa: BLE001 - one archive must not stop all
                failures.append(_failure("archive", error))

        found = files()
        while chunk := list(islice(found, self.chunk)):
            yield from self._unit(chunk, len(chunk))
        for failure in failures:
            yield from self._unit([entry_of(str(path), (0, stem_of(path), failure))], 1)

    def _of_parquet(self, path: Path) -> Iterator[Unit]:
        places: list[tuple[int, int]] = []

        def wanted(rows: int) -> bool:
            place = self._next(rows)
            if place is not None:
                places.append(place)
            return place is not None

        done = 0
        try:
            for piece in parquet_slices(path, self.structure_column, self.chunk, wanted):
                yield Unit(*places[done], piece)
                done += 1
        except Exception as error:  # noqa: BLE001 - one table must not stop all
            if done == 0 and not places:
                # Not a table of structures at all: the reader of files says what is wrong.
                file: list[File] = [str(path)]
                yield from self._unit(file, 1)
                return
            failure = _failure("table", error)
            entry = entry_of(str(path), (done * self.chunk, stem_of(path), failure))
            yield Unit(*places[done], [entry])


def _failure(what: str, error: Exception) -> CrystalError:
    if isinstance(error, CrystalError):
        return error
    return CrystalError(
        f"the {what} could not be read from here on ({describe(error)})",
        "check that it is complete",
    )


def count_inputs(inputs: Iterable[Any], limit: int) -> int:
    """Return about how many structures there are, at least ``limit`` if there are more.

    Files of one structure and rows of Parquet tables are counted, other files by their size.
    """
    if hasattr(inputs, "__next__"):
        return 0
    total = 0
    for path in expand(inputs):
        if streamed_kind(path) is not None:
            return limit
        if is_single(path):
            total += 1
        elif path.suffix.lower() == ".parquet":
            total += parquet_rows(path)
        elif path.is_file():
            total += 1 + path.stat().st_size // _BYTES_PER_STRUCTURE
        if total >= limit:
            break
    return total


_BYTES_PER_STRUCTURE = 2000
