"""One run at a time in a run folder: two would write each other's checkpoints."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from matxfer.pretraining.callbacks import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def only_run_in(run_folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder; it ends with the process, however that ends.

    Raises
    ------
    TrainingError
        If another run holds it.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_folder / "run.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"{run_folder}: another run is at work in this folder; wait for its end, or name "
            "another one with --run-folder"
        ) from None
    except NotImplementedError:
        warnings.warn(f"{run_folder}: the file system knows no locks", stacklevel=4)
    try:
        yield
    finally:
        lock.release()
