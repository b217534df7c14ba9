"""Raw results: one JSON object per run and line, kept so that a killed benchmark goes on."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
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

    def append(self, record: Record) -> None:
        """Add a record: one write at the end of the file, unless its run is there already."""
        if self.find(record["run"]) is not None:
            return  # another process was faster
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = f"{json.dumps(record, ensure_ascii=False)}\n"
        if not self._ends_whole():
            line = f"\n{line}"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

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


def complete(
    records: Records,
    runs: Iterable[dict[str, Any]],
    measure: Callable[[dict[str, Any]], Record],
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Carry out the runs that have no record yet; return the records of all, in their order."""
    wanted = list(runs)
    for run in wanted:
        if records.find(run) is None:
            record = {"run": run, **measure(run)}
            records.append(record)
            if on_record is not None:
                on_record(record)
    found = {_key(record["run"]): record for record in records.read()}
    return [found[_key(run)] for run in wanted]


def _key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)
