"""Settings of the process: memory that is kept, threads, a training library that is quiet."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
#: What the libraries that compute read once, as they are loaded.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def keep_large_blocks() -> None:
    """Tell glibc to keep large blocks instead of returning them to the kernel each time.

    Every edge tensor of a batch is such a block; fetching its pages anew costs more than the
    arithmetic on it. Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def use_threads(count: int) -> None:
    """Let this process compute with so many threads: torch, and the BLAS of NumPy and SciPy.

    The threads of a BLAS that wait for a busy CPU spin: two processes of two threads each on two
    CPUs take many times as long as with one thread each.

    Parameters
    ----------
    count
        At least 1; for libraries that are loaded already, and for those still to come.
    """
    import torch
    from threadpoolctl import threadpool_limits

    for name in THREAD_VARIABLES:
        os.environ[name] = str(count)
    threadpool_limits(count)
    torch.set_num_threads(count)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Let processes that are started meanwhile never hear Ctrl-C.

    It goes to the whole group; the main process decides what becomes of the work in hand. A
    process that is told so only once it runs may hear it before, in the middle of its own start.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's greetings and tips, and warnings that do not apply, for a while.

    Its hints about data-loader workers are wrong for us: a batch is one gather from memory, and
    handing it to another process would cost more than making it. And Ctrl-C stays what it is: on
    a KeyboardInterrupt Lightning ends the process, without a word, with exit code 1.
    """
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=r".*LeafSpec.*")
            yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
