"""Each structure is computed once: values by content, for as long as a part lasts or for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from matxfer.batch.cache import PredictionCache
    from matxfer.batch.units import Unit
    from matxfer.batch.work import Done

#: Predictions of a structure, shape (P,), or the kind and text of what is wrong with it.
Value: TypeAlias = "NDArray[np.float64] | tuple[str | None, str | None]"

#: Structures whose values are held in memory, about 300 bytes each; far more than are in flight.
HELD = 100_000


class Known:
    """Values of the structures that have been met.

    What has been met is forgotten at the end of a part: whether its parts are computed in one go
    or after an interruption, here or elsewhere, makes no difference to a part.

    Parameters
    ----------
    n_properties
        Number P of values of a structure.
    cache
        Where values are kept from run to run, if they are.
    """

    def __init__(self, n_properties: int, cache: PredictionCache | None = None) -> None:
        self.n_properties, self.cache = n_properties, cache
        self._met: dict[int, dict[bytes, Value | None]] = {}
        self._keys: dict[int, list[bytes | None]] = {}
        self._given: dict[int, dict[int, Value | None]] = {}
        self._fresh: dict[int, list[int]] = {}

    def choose(self, unit: Unit, keys: list[bytes | None]) -> list[int]:
        """Return which structures of a unit need computing; to be called unit by unit."""
        met = self._met.setdefault(unit.part, {})
        fresh: list[int] = []
        given: dict[int, Value | None] = {}
        kept = self.cache.get([k for k in keys if k and k not in met]) if self.cache else {}
        for k, key in enumerate(keys):
            if key is None:
                continue
            if key not in met:
                met[key] = kept.get(key)
                if key not in kept:
                    fresh.append(k)
                    continue
            given[k] = met[key]
        while len(met) > HELD:
            del met[next(iter(met))]
        self._keys[unit.index], self._given[unit.index] = keys, given
        self._fresh[unit.index] = fresh
        return fresh

    def fill(self, unit: Unit, done: Done, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values of all rows of a unit, (n, P), NaN where there are none.

        To be called in the same order of the units. What is wrong with a structure that has been
        met before is said in the rows.

        Parameters
        ----------
        values
            What has been computed for the rows ``done.made``, shape (G, P).
        """
        met, rows = self._met[unit.part], done.rows
        keys, given = self._keys.pop(unit.index), self._given.pop(unit.index)
        whole = np.full((len(rows), self.n_properties), np.nan)
        whole[done.made] = values
        made = set(done.made)
        for k in self._fresh.pop(unit.index):
            key = keys[k]
            assert key is not None
            met[key] = whole[k].copy() if k in made else (rows.kinds[k], rows.errors[k])
        for k, value in given.items():
            found = value if value is not None else met[_key(keys, k)]
            assert found is not None
            if isinstance(found, tuple):
                rows.kinds[k], rows.errors[k] = found
            else:
                whole[k] = found
        if self.cache is not None:
            self.cache.put([_key(keys, k) for k in done.made], values)
        for part in [p for p in self._met if p < unit.part]:
            del self._met[part]
        return whole


def _key(keys: Sequence[bytes | None], k: int) -> bytes:
    key = keys[k]
    assert key is not None
    return key
