"""Progress in a Jupyter notebook: one line that changes, and is gone when the work is done."""

from __future__ import annotations

import functools
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

#: Seconds before a line appears, and between two of its changes: each one is a message.
_PATIENCE, _PAUSE = 0.5, 0.25


def in_notebook() -> bool:
    """Say whether this is the kernel of a notebook, where outputs are displayed.

    IPython is never imported for it: a process that has not done so is no kernel.
    """
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def is_watched() -> bool:
    """Say whether a person looks at stderr on a terminal that understands moving text.

    A cell ``!matxfer …`` of a notebook gives its command a terminal too, and keeps in the notebook
    whatever is written on it: Jupyter's kernels are known by a variable of their environment.
    """
    return sys.stderr.isatty() and "JPY_PARENT_PID" not in os.environ


def told_in_notebook(callback: str, what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function show its progress in a notebook, unless it is told where to report it.

    Parameters
    ----------
    callback
        Keyword of the function that takes a callback: of the number of things done since the last
        call, or of the thing done.
    what
        What is done, in words.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            if kwargs.get(callback) is not None or not in_notebook():
                return function(*args, **kwargs)
            with line_in_notebook(what) as advance:

                def tell(done: Any) -> None:
                    advance(done if isinstance(done, int) else 1)

                more: dict[str, Any] = {callback: tell}
                return function(*args, **{**kwargs, **more})

        return watched

    return decorate


@contextmanager
def line_in_notebook(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a count, and of a known total a bar, under the cell, in one output that is replaced.

    Work shorter than half a second shows nothing, and nothing is left in the notebook's file.

    Yields a function of the number of things done since the last call.
    """
    from IPython.display import display

    started = last = time.monotonic()
    done = 0
    handle: Any = None

    def advance(count: int) -> None:
        nonlocal done, last, handle
        done += count
        now = time.monotonic()
        if now - started < _PATIENCE or now - last < _PAUSE:
            return
        last = now
        shown = _Line(what, done, total, now - started)
        if handle is None:
            handle = display(shown, display_id=True)
        else:
            handle.update(shown)

    try:
        yield advance
    finally:
        if handle is not None:
            handle.update(_Line("", 0, None, 0.0))


class _Line:
    """A state of the work, as text and as a bar."""

    def __init__(self, what: str, done: int, total: int | None, seconds: float) -> None:
        self.what, self.done, self.total, self.seconds = what, done, total, seconds

    def __repr__(self) -> str:
        if not self.what:
            return ""
        of = f" of {self.total:,}" if self.total else ""
        left = ""
        if self.total and 0 < self.done < self.total:
            left = f", {self.seconds * (self.total / self.done - 1):.0f} s left"
        return f"{self.what} {self.done:,}{of} ({self.seconds:.0f} s{left})"

    def _repr_html_(self) -> str:
        from matxfer.html import tag

        if not self.what:
            return ""
        parts = [tag("span", repr(self))]
        if self.total:
            parts.append(tag("progress", value=self.done, max=self.total))
        return str(tag("div", *parts))
