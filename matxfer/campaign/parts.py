"""Parts of a prediction, each there whole or not at all; what is there is not done again."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.batch.cache import weights_of
from matxfer.batch.stream import threads
from matxfer.batch.units import Plan
from matxfer.campaign.manifest import CampaignError, begin, finish, look_at
from matxfer.campaign.share import Share
from matxfer.output import write_rows
from matxfer.prediction import CHUNK, BatchOptions, Predictor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from matxfer.batch.units import Unit
    from matxfer.columns import Row

#: Structures per part, unless the user says otherwise: about half a minute of work on two cores.
PART_SIZE = 20_000


class Stop:
    """A wish to stop after the part in hand.

    Attributes
    ----------
    part
        The part that is being written.
    wished
        Whether to stop after it.
    """

    def __init__(self) -> None:
        self.part: int | None = None
        self.wished = False

    def after(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """Pass units on, those of later parts only as long as there is no wish to stop."""
        for unit in units:
            if self.wished and (self.part is None or unit.part > self.part):
                return
            yield unit


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[Stop]:
    """Turn the first Ctrl-C (or SIGTERM, as schedulers send it) into a wish to stop.

    The second one is a ``KeyboardInterrupt`` as ever.
    """
    stop = Stop()

    def heard(number: int, _: Any) -> None:
        if stop.wished:
            raise KeyboardInterrupt
        stop.wished = True
        say(f"{signal.Signals(number).name}: finishing the part in hand; once more to stop at once")

    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class Outcome:
    """What a process has done of a campaign.

    Parameters
    ----------
    rows, errors
        Rows that it wrote, and failed ones by kind.
    found
        Parts that were there already.
    complete
        Whether all parts of all processes are there.
    stopped
        Whether it stopped before its end.
    manifest
        The whole, once complete.
    """

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    found: int = 0
    complete: bool = False
    stopped: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)


class Campaign:
    """A prediction into a folder of parts.

    Each part is a run of whole units, and borders of units depend on the inputs alone; so a part
    has the same rows whether it is computed in one go, after an interruption, or by one process
    of many.

    Parameters
    ----------
    folder
        Where ``part-00000.parquet`` … and ``manifest.json`` go.
    predictor
        Model and plugins, which must have been saved.
    inputs
        Files, folders and globs.
    options
        How to work.
    part_size
        Structures per part.
    resume
        Whether to go on with what is in the folder.
    share
        The parts of this process.

    Raises
    ------
    CampaignError
        If the folder belongs to something else, naming the difference.
    """

    def __init__(
        self,
        folder: Path,
        predictor: Predictor,
        inputs: Sequence[str | Path],
        options: BatchOptions | None = None,
        *,
        part_size: int = PART_SIZE,
        resume: bool = False,
        share: Share | None = None,
    ) -> None:
        if part_size < 1:
            raise CampaignError(f"parts of {part_size} structures; give a positive number")
        for given in map(Path, inputs):
            if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
                raise CampaignError(
                    f"{folder}: this is inside the input {given}, whose files the parts would be; "
                    "give a folder elsewhere"
                )
        self.folder, self.predictor, self.inputs = folder, predictor, list(inputs)
        self.options, self.part_size = options or BatchOptions(), part_size
        self.share = share or Share()
        seen = look_at(self.inputs)
        #: Structures of all processes together, None if nobody knows.
        self.structures = seen.structures
        self._whole: set[int] = set()
        settings = {
            "inputs": seen.facts,
            "weights": weights_of(predictor.model, predictor.plugins),
            "columns": predictor.columns,
            "options": {
                "structure_column": self.options.structure_column,
                "max_atoms": self.options.max_atoms,
                "shard_size": part_size,
                "unit": CHUNK,
            },
        }
        begin(folder, settings, resume=resume, alone=self.share.size == 1)

    def path(self, part: int) -> Path:
        """Return where a part is."""
        return self.folder / f"part-{part:05d}.parquet"

    def plan(self, wanted: Callable[[int], bool]) -> Plan:
        """Return the units of the wanted parts."""
        return Plan(
            self.inputs,
            chunk=CHUNK,
            structure_column=self.options.structure_column,
            part_size=self.part_size,
            wanted=wanted,
        )

    def run(
        self,
        *,
        parts: Callable[[int], bool] | None = None,
        stop: Stop | None = None,
        on_row: Callable[[Row], None] = lambda _: None,
    ) -> Outcome:
        """Compute the parts that are not there yet.

        Parameters
        ----------
        parts
            Which ones, by default those of this process' share.
        stop
            Asked after each part.
        on_row
            Called with each row; what it raises ends the run, and the part in hand is not written.
        """
        mine = parts or self.share.owns
        stop, outcome = stop or Stop(), Outcome()
        plan = self.plan(lambda part: mine(part) and not self.is_whole(part))
        predicted = self.predictor.predicted(plan, self.options, stop.after)
        # One thread, as in the workers: a part is the same with them and without.
        with threads(1), closing(predicted):
            for part, group in groupby(predicted, key=lambda each: each.unit.part):
                if stop.wished and stop.part is not None:
                    break
                stop.part = part
                rows = (row for each in group for row in self.predictor.rows_of(each))
                counted = _counted(rows, outcome, on_row)
                write_rows(counted, self.predictor.columns, self.path(part))
        outcome.found = sum(map(mine, self._whole))
        outcome.stopped = stop.wished
        if parts is None and not stop.wished:
            self.finish(outcome, plan.parts)
        return outcome

    def missing(self) -> list[int]:
        """Return the parts that are not there, going through the inputs without computing."""
        return [part for part in range(self._count()) if not self.is_whole(part)]

    def _count(self) -> int:
        plan = self.plan(lambda _: False)
        for _ in plan:
            pass
        return plan.parts

    def is_whole(self, part: int) -> bool:
        """Say whether a part was there before this run; asked again, the answer is the same."""
        if part not in self._whole and self.path(part).exists():
            import pyarrow.parquet as pq

            try:
                pq.read_metadata(self.path(part))
            except (OSError, ValueError):  # damaged since it was written
                return False
            self._whole.add(part)
        return part in self._whole

    def finish(self, outcome: Outcome, parts: int | None = None) -> None:
        """Write the manifest if all parts are there, which the last process finds.

        Parameters
        ----------
        outcome
            Where to say so.
        parts
            How many parts there have to be, if that is known.
        """
        count = self._count() if parts is None else parts
        if all(self.path(part).exists() for part in range(count)):
            if self.path(count).exists():
                raise CampaignError(f"{self.path(count)}: there is one part too many; remove it")
            outcome.manifest = finish(self.folder, [self._summary(p) for p in range(count)])
            outcome.complete = True

    def _summary(self, part: int) -> dict[str, Any]:
        import pyarrow.parquet as pq

        table = pq.read_table(self.path(part), columns=["error_kind"])
        counts = Counter(kind for kind in table["error_kind"].to_pylist() if kind is not None)
        return {"file": self.path(part).name, "rows": table.num_rows, "errors": dict(counts)}


def _counted(rows: Iterable[Row], outcome: Outcome, on_row: Callable[[Row], None]) -> Iterator[Row]:
    for row in rows:
        on_row(row)
        outcome.rows += 1
        if row["error_kind"] is not None:
            outcome.errors[row["error_kind"]] += 1
        yield row
