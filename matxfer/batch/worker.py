"""A worker process: takes units from a pipe, tells on a shared board what it is about to do."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from matxfer.batch.work import Watch, do_unit
from matxfer.runtime import THREAD_VARIABLES, keep_large_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection

    from matxfer.batch.units import Unit
    from matxfer.batch.work import Setup

#: Messages: a unit to do, the numbers to compute (to a worker); keys, a unit done (from it).
UNIT, CHOSEN, READY, KEYS, DONE, FAILED = "unit", "chosen", "ready", "keys", "done", "failed"


class Stage(IntEnum):
    """What a worker is doing."""

    IDLE = 0
    READING = 1
    BUILDING = 2
    PREDICTING = 3


class Board(Watch):
    """Four numbers in memory shared with the main process, which reads them when a worker is dead.

    Parameters
    ----------
    numbers
        Stage, number of the (first) entry, number of entries, time at which this began in s.
    """

    SIZE = 4

    def __init__(self, numbers: Any) -> None:
        self._numbers = numbers

    def tell(self, stage: Stage, entry: int = 0, count: int = 1) -> None:
        """Write down what is done from now on."""
        # The stage last: whoever reads it between two writes sees the old work go on.
        self._numbers[3] = time.monotonic()
        self._numbers[1], self._numbers[2] = entry, count
        self._numbers[0] = stage

    def read(self) -> tuple[Stage, int, int, float]:
        """Return stage, first entry, number of entries, and since when in s."""
        stage, entry, count, since = self._numbers
        return Stage(int(stage)), int(entry), int(count), since

    def reading(self, entry: int) -> None:
        """Tell that an entry of the unit is about to be read."""
        self.tell(Stage.READING, entry)

    def building(self, entry: int) -> None:
        """Tell that the graph of an entry is about to be built."""
        self.tell(Stage.BUILDING, entry)

    def predicting(self, entries: Sequence[int]) -> None:
        """Tell that entries are about to go through the network."""
        self.tell(Stage.PREDICTING, entries[0], len(entries))


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let processes that are started meanwhile compute with one thread.

    Two processes of two threads on two cores wait for each other most of the time. The libraries
    read these variables once, as they are loaded.
    """
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main(pipe: Connection, numbers: Any, setup: Setup) -> None:
    """Do units until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)  # a BLAS has read one_thread_each
    keep_large_blocks()
    board, inbox = Board(numbers), Inbox(pipe)
    try:
        pipe.send((READY, None))
        while True:
            unit, caution = inbox.wait_for(UNIT)
            try:
                pipe.send((DONE, do_unit(*_ask(unit, setup, board, inbox, pipe), caution, board)))
            except (EOFError, BrokenPipeError):
                raise
            except BaseException as error:  # noqa: BLE001 - a bug of ours is to be seen, not lost
                board.tell(Stage.IDLE)
                pipe.send((FAILED, error if isinstance(error, Exception) else str(error)))
            board.tell(Stage.IDLE)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the main process is gone or has no more to do


def _ask(
    unit: Unit, setup: Setup, board: Board, inbox: Inbox, pipe: Connection
) -> tuple[Unit, Setup, Any]:
    def choose(keys: list[bytes | None]) -> Sequence[int]:
        board.tell(Stage.IDLE)
        pipe.send((KEYS, keys))
        chosen: Sequence[int] = inbox.wait_for(CHOSEN)
        return chosen

    return unit, setup, choose


class Inbox:
    """Messages by what they are: the next unit may come before the answer to a question."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._waiting: dict[str, deque[Any]] = {UNIT: deque(), CHOSEN: deque()}

    def wait_for(self, what: str) -> Any:
        """Return the content of the next message of a kind."""
        while not self._waiting[what]:
            kind, content = self._pipe.recv()
            self._waiting[kind].append(content)
        return self._waiting[what].popleft()
