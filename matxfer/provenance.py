"""Where a file came from: versions, command, date, duration."""

from __future__ import annotations

import datetime as dt
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from matxfer.notebook import in_notebook

_PACKAGES = ("matxfer", "torch", "numpy", "vesin", "moyopy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def provenance(seconds: float | None = None) -> dict[str, Any]:
    """Return command, date, versions and, if given, the seconds it took.

    Only the file names of paths on the command line are kept: folders are the user's business.
    A kernel's own command line says nothing of what was done in its notebook.
    """
    words = ["a Jupyter notebook"] if in_notebook() else _command_line()
    record: dict[str, Any] = {
        "command": " ".join(words),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": versions(),
    }
    if seconds is not None:
        record["seconds"] = round(seconds, 3)
    return record


def _command_line() -> list[str]:
    return [Path(word).name if "/" in word else word for word in sys.argv]
