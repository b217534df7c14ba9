"""Worker processes that may die: their units go on without the structure that killed them."""

from __future__ import annotations

import signal
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection, get_context
from typing import TYPE_CHECKING, Any

from matxfer.batch import worker
from matxfer.batch.work import Caution, Done
from matxfer.batch.worker import Board, Stage
from matxfer.crystal import CrystalError
from matxfer.errors import ErrorKind, MatxferError
from matxfer.runtime import deaf_to_interrupts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from matxfer.batch.units import Unit
    from matxfer.batch.work import Setup

#: Units that may be done or in work before the first of them has been handed out: one slow
#: structure holds nobody up while the others fill this many.
WINDOW_PER_WORKER, WINDOW = 4, 16
#: Seconds between looks at the clocks of the workers.
_LOOK = 0.5
#: Workers that may die in a row without a reason and without a unit done.
_USELESS = 3


class CrewError(MatxferError):
    """Worker processes that cannot even start."""


@dataclass(slots=True, eq=False)
class _Job:
    """A unit on its way through the crew."""

    unit: Unit
    caution: Caution = field(default_factory=Caution)
    keys: list[bytes | None] | None = None
    chosen: list[int] | None = None
    done: Done | None = None


@dataclass(slots=True, eq=False)
class _Worker:
    process: Any
    pipe: connection.Connection
    board: Board
    job: _Job | None = None
    asks: bool = False
    ready: bool = False


class Crew:
    """A few worker processes.

    Parameters
    ----------
    size
        How many.
    setup
        What a worker needs; its weights are shared with the workers, not copied.
    choose
        Given a unit and the keys of its structures, returns which need computing; called in the
        order of the units.
    timeout_s
        Seconds that a structure may take in any one stage; ``None``: for ever.
    """

    def __init__(
        self,
        size: int,
        setup: Setup,
        choose: Callable[[Unit, list[bytes | None]], list[int]],
        timeout_s: float | None = None,
    ) -> None:
        self.size, self.choose, self.timeout_s = size, choose, timeout_s
        self._setup = setup
        # Spawned, not forked: forking a process that has started torch's threads can deadlock.
        self._context = get_context("spawn")
        self._workers: list[_Worker] = []
        self._useless = 0
        self._limit = max(WINDOW_PER_WORKER * size, WINDOW)

    def run(self, units: Iterator[Unit]) -> Iterator[tuple[Unit, Done]]:
        """Yield the units with what has become of them, in their order."""
        window: deque[_Job] = deque()
        lost: deque[_Job] = deque()
        more = True
        try:
            self._workers = [self._hire() for _ in range(self.size)]
            while True:
                for each in self._workers:
                    if each.job is not None or not each.ready:
                        continue
                    job = lost.popleft() if lost else None
                    if job is None and more and len(window) < self._limit:
                        unit = next(units, None)
                        more = unit is not None
                        if unit is not None:
                            job = _Job(unit)
                            window.append(job)
                    if job is not None:
                        self._give(each, job)
                while window and window[0].done is not None:
                    first = window.popleft()
                    assert first.done is not None
                    yield first.unit, first.done
                if not window and not more:
                    return
                idle = any(each.ready and each.job is None for each in self._workers)
                if idle and (lost or (more and len(window) < self._limit)):
                    continue
                self._listen(window, lost)
        finally:
            self._dismiss()

    # -- messages -----------------------------------------------------------------------------
    def _give(self, to: _Worker, job: _Job) -> None:
        to.job = job
        with suppress(BrokenPipeError, ConnectionResetError):  # it is dead, as its pipe will say
            to.pipe.send((worker.UNIT, (job.unit, job.caution)))

    def _listen(self, window: deque[_Job], lost: deque[_Job]) -> None:
        by_pipe = {each.pipe: each for each in self._workers}
        for pipe in connection.wait(list(by_pipe), timeout=_LOOK):
            each = by_pipe[pipe]  # type: ignore[index]
            try:
                kind, content = each.pipe.recv()
            except (EOFError, ConnectionResetError):
                self._bury(each, lost)
                continue
            self._take(each, kind, content)
        self._answer(window)
        self._look_at_clocks(lost)

    def _take(self, each: _Worker, kind: str, content: Any) -> None:
        if kind == worker.READY:
            each.ready = True
            return
        job = each.job
        assert job is not None
        if kind == worker.KEYS:
            job.keys, each.asks = content, True
        elif kind == worker.DONE:
            job.done, each.job, self._useless = content, None, 0
        elif isinstance(content, Exception):
            raise content
        else:
            raise RuntimeError(f"a worker process failed: {content}")

    def _answer(self, window: deque[_Job]) -> None:
        """Choose in the order of the units, then answer whoever waits."""
        for job in window:
            if job.chosen is None:
                if job.keys is None:
                    break
                job.chosen = self.choose(job.unit, job.keys)
        for each in self._workers:
            if each.asks and each.job is not None and each.job.chosen is not None:
                each.asks = False
                with suppress(BrokenPipeError, ConnectionResetError):
                    each.pipe.send((worker.CHOSEN, each.job.chosen))

    # -- death --------------------------------------------------------------------------------
    def _look_at_clocks(self, lost: deque[_Job]) -> None:
        if self.timeout_s is None:
            return
        now = time.monotonic()
        for each in list(self._workers):
            stage, _, _, since = each.board.read()
            if each.job is not None and stage != Stage.IDLE and now - since > self.timeout_s:
                each.process.kill()
                self._bury(each, lost, timeout=True)

    def _bury(self, each: _Worker, lost: deque[_Job], *, timeout: bool = False) -> None:
        """Hire another in place of a dead worker; its unit is done again with caution."""
        each.process.join()
        each.pipe.close()
        self._workers.remove(each)
        if each.job is None or each.board.read()[0] == Stage.IDLE:
            self._useless += 1
            if self._useless >= _USELESS:
                raise CrewError(
                    f"worker processes die before they work ({_cause(each.process.exitcode)}); "
                    "use --workers 0, or free some memory"
                )
        if each.job is not None:
            each.job.caution = self._blame(each, timeout=timeout)
            lost.append(each.job)
        self._workers.append(self._hire())

    def _blame(self, each: _Worker, *, timeout: bool) -> Caution:
        """Return how to go on after a death: as before, one by one, or without a structure.

        Somebody else may have killed the worker, so that nothing is blamed the first time.
        """
        assert each.job is not None
        caution, (stage, entry, count, _) = each.job.caution, each.board.read()
        if stage == Stage.IDLE:
            return caution
        if not timeout and caution.suspect != (stage, entry):
            return replace(caution, suspect=(stage, entry))
        if stage == Stage.PREDICTING and count > 1:
            return replace(caution, singly=True)
        if timeout:
            error = CrystalError(
                f"it was given up after {self.timeout_s:g} s",
                "raise the limit (--timeout), or use a smaller cell",
                kind=ErrorKind.TIMEOUT,
            )
        else:
            doing = {Stage.READING: "read", Stage.BUILDING: "made a graph"}.get(stage, "computed")
            error = CrystalError(
                f"the process died while it was {doing}, twice ({_cause(each.process.exitcode)})",
                "check the structure; if it is sound, there may be too little memory",
                kind=ErrorKind.WORKER_CRASH,
            )
        return replace(caution, broken={**caution.broken, entry: error})

    # -- life ---------------------------------------------------------------------------------
    def _hire(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        numbers = self._context.RawArray("d", Board.SIZE)
        with worker.one_thread_each(), deaf_to_interrupts():
            process = self._context.Process(
                target=worker.main, args=(theirs, numbers, self._setup), daemon=True
            )
            process.start()
        theirs.close()
        return _Worker(process, ours, Board(numbers))

    def _dismiss(self) -> None:
        for each in self._workers:
            each.pipe.close()
        for each in self._workers:
            each.process.terminate()
            each.process.join()
        self._workers = []


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        try:
            return signal.Signals(-exitcode).name
        except ValueError:
            return f"signal {-exitcode}"
    return f"exit code {exitcode}"
