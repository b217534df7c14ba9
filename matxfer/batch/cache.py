"""Predictions kept from run to run: one SQLite file per weights, a structure's key → its values."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.store import cache_folder
from matxfer.errors import OptionError
from matxfer.graph import GRAPH_VERSION
from matxfer.plugin_files import META, WEIGHTS, read_plugin

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from matxfer.model import Model
    from matxfer.transfer.plugin import Plugin

#: Version of the layout of a cache file.
LAYOUT = 1
#: All files together may hold so many bytes; ``$MATXFER_PREDICTIONS_GB`` overrides.
LIMIT_BYTES = 2 << 30
#: SQLite takes at least so many variables in a statement.
_VARIABLES = 500
_BUSY_SECONDS = 30


def weights_of(model: Model, plugins: Iterable[Plugin]) -> dict[str, Any]:
    """Return what decides a prediction besides the structure: checksums, graph version, options.

    Raises
    ------
    OptionError
        If model or plugins have never been written, so that there is nothing to know them by.
    """
    found = []
    for plugin in plugins:
        if plugin.folder is None:
            raise OptionError(f"plugin {plugin.name!r} has not been saved; save it first")
        sums = read_plugin(plugin.folder).checksums()
        found.append({"name": plugin.name, **{name: sums[name] for name in (WEIGHTS, META)}})
    if not model.checksum:
        raise OptionError(f"model {model.name!r} has not been saved; save it first")
    return {
        "model": {"name": model.name, "sha256": model.checksum},
        "plugins": found,
        "graph": {"version": GRAPH_VERSION, **model.backbone.graph_options.to_json()},
    }


class PredictionCache:
    """Values by structure for one set of weights; several processes may use it at once.

    What goes wrong with the file is warned of once, and then the cache does nothing: no prediction
    is lost for want of it.

    Parameters
    ----------
    weights
        See :func:`weights_of`.
    n_properties
        Number P of values of a structure.
    folder
        Where the files are; ``None``: in matxfer's cache.
    limit_bytes
        Largest sum of their sizes; the least recently used files go first.
    """

    def __init__(
        self,
        weights: dict[str, Any],
        n_properties: int,
        folder: Path | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        folder = folder or cache_folder() / "predictions"
        text = json.dumps([LAYOUT, n_properties, weights], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.path = folder / f"{name}.sqlite"
        self.n_properties = n_properties
        self.limit_bytes = _limit() if limit_bytes is None else limit_bytes
        self._database: sqlite3.Connection | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open()
            _forget_old(folder, self.path, self.limit_bytes)
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def _open(self) -> None:
        try:
            self._database = _connect(self.path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, no space, no permission
                raise
            self.path.unlink()  # no SQLite file: it cannot be ours any more
            self._database = _connect(self.path)
        self.path.touch()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float64]]:
        """Return the values of the keys that are known, shape (P,) each."""
        found: dict[bytes, NDArray[np.float64]] = {}
        for start in range(0, len(keys), _VARIABLES):
            if self._database is None:
                break
            some = keys[start : start + _VARIABLES]
            marks = ",".join("?" * len(some))
            try:
                rows = self._database.execute(
                    f"SELECT key, value FROM prediction WHERE key IN ({marks})",  # noqa: S608
                    list(some),
                ).fetchall()
            except sqlite3.Error as error:
                self._give_up(error)
                break
            for key, value in rows:
                array = np.frombuffer(value, dtype="<f8")
                if array.shape == (self.n_properties,):
                    found[bytes(key)] = array
        return found

    def put(self, keys: Sequence[bytes], values: NDArray[np.float64]) -> None:
        """Keep values, shape (n, P), all or none of them."""
        if self._database is None or not len(keys):
            return
        try:
            if self.path.stat().st_size > self.limit_bytes:
                return
            rows = [
                (key, row.astype("<f8").tobytes()) for key, row in zip(keys, values, strict=True)
            ]
            with self._database:
                self._database.executemany("INSERT OR IGNORE INTO prediction VALUES (?, ?)", rows)
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _give_up(self, error: Exception) -> None:
        warnings.warn(f"{self.path}: the cache is not used ({error})", stacklevel=2)
        self.close()


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_BUSY_SECONDS)
    try:
        # One writer and many readers at a time; a power cut costs the last values, not the file.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS prediction (key BLOB PRIMARY KEY, value BLOB NOT NULL) "
                "WITHOUT ROWID"
            )
    except sqlite3.Error:
        database.close()
        raise
    return database


def _limit() -> int:
    given = os.environ.get("MATXFER_PREDICTIONS_GB")
    return int(float(given) * 2**30) if given else LIMIT_BYTES


def _forget_old(folder: Path, keep: Path, limit_bytes: int) -> None:
    """Remove the least recently used other files until all fit the limit."""
    files = sorted(folder.glob("*.sqlite"), key=lambda file: file.stat().st_mtime)
    total = sum(file.stat().st_size for file in files)
    for file in files:
        if total <= limit_bytes:
            return
        if file != keep:
            total -= file.stat().st_size
            for name in (file.name, f"{file.name}-wal", f"{file.name}-shm"):
                file.with_name(name).unlink(missing_ok=True)
