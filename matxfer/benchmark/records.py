"""Raw results: one JSON object per run and line, kept so that a killed benchmark goes on."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

#: What a run is (``"run"``: a JSON object) and what came of it.
Record = dict[str, Any]


class Records:
    """The runs so far, in a file that several processes may append to.

    Parameters
    ----------
    path
        The file; it and its folder need not be there yet.
    on_damage
        Told of lines that cannot be read; a process was killed while it wrote them.
    """

    def __init__(self, path: Path, on_damage: Callable[[str], None] | None = None) -> None:
        self.path, self._on_damage = path, on_damage

    def read(self) -> list[Record]:
        """Return all whole records, the first of those of the same run."""
        return list(self._by_run().values())

    def find(self, run: dict[str, Any]) -> Record | None:
        """Return the record of a run, if there is one by now."""
        return self._by_run().get(_key(run))

    def missing(self, runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return those of the runs that have no record by now."""
        there = self._by_run()
        return [run for run in runs if _key(run) not in there]

    def append(self, record: Record) -> None:
        """Add a record: one write at the end of the file, unless its run is there already."""
        if self.find(record["run"]) is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = f"{json.dumps(record, ensure_ascii=False)}\n"
        if not self._ends_whole():
            line = f"\n{line}"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(file, line.encode())
        finally:
            os.close(file)
        if written < len(line.encode()):
            raise OSError(f"{self.path}: the disk is full; make room and start again")

    def _ends_whole(self) -> bool:
        if not self.path.exists() or not self.path.stat().st_size:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _by_run(self) -> dict[str, Record]:
        found: dict[str, Record] = {}
        damaged = 0
        content = self.path.read_text("utf-8", errors="replace") if self.path.exists() else ""
        for line in filter(None, content.split("\n")):
            try:
                record = json.loads(line)
                found.setdefault(_key(record["run"]), record)
            except (ValueError, KeyError, TypeError):
                damaged += 1
        if damaged and self._on_damage is not None:
            self._on_damage(
                f"{self.path}: {damaged} line(s) cannot be read, probably cut off by a kill; "
                "their runs are done again"
            )
            self._on_damage = None  # once is enough
        return found


class Claims:
    """Which runs a process is at, for others that work on the same file.

    One byte of a file beside the records is locked for each run; the kernel ends a lock with its
    process, however that ends. Where there are no such locks, every claim is granted: a run may
    then be done twice, and its first record counts.

    Parameters
    ----------
    path
        The file of records.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f".{path.name}.lock")

    @contextmanager
    def claim(self, run: dict[str, Any], *, wait: bool) -> Iterator[bool]:
        """Claim a run for a while, waiting for another process if asked to; say if it is ours."""
        try:
            import fcntl
        except ImportError:
            yield True
            return
        place = int.from_bytes(blake2b(_key(run).encode(), digest_size=6).digest())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:  # closing it ends the claim
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
            except BlockingIOError:
                yield False
                return
            yield True


def complete(
    records: Records,
    runs: Iterable[dict[str, Any]],
    measure: Callable[[dict[str, Any]], Record],
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Carry out the runs that have no record yet; return the records of all, in their order.

    Runs that another process is at come last; by then it has mostly done them.
    """
    wanted, claims = list(runs), Claims(records.path)
    for wait in (False, True):
        for run in records.missing(wanted):
            with claims.claim(run, wait=wait) as ours:
                if ours and records.find(run) is None:
                    record = {"run": run, **measure(run)}
                    records.append(record)
                    if on_record is not None:
                        on_record(record)
    found = {_key(record["run"]): record for record in records.read()}
    return [found[_key(run)] for run in wanted]


def _key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)
