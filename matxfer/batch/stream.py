"""Units in, predicted rows out, in order: here or through worker processes."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from matxfer.batch.compute import predict_pack
from matxfer.batch.crew import Crew
from matxfer.batch.known import Known
from matxfer.batch.work import Done, Setup, do_unit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from matxfer.batch.cache import PredictionCache
    from matxfer.batch.prepare import Rows
    from matxfer.batch.units import Unit


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """A unit's rows with their values, shape (n, P), NaN where there is an error."""

    unit: Unit
    rows: Rows
    values: NDArray[np.float64]


def predicted(
    units: Iterable[Unit],
    setup: Setup,
    *,
    workers: int,
    timeout_s: float | None = None,
    cache: PredictionCache | None = None,
) -> Iterator[Predicted]:
    """Yield the units with their predictions, in order.

    On a CPU each worker process does all of a unit, on one thread: nothing but rows crosses a
    process border. For a network on a GPU the workers build graphs, and this process predicts.

    Parameters
    ----------
    units, setup, cache
        See there.
    workers
        Worker processes; 0: all is done here, and nothing stands between this process and a
        structure that brings it down.
    timeout_s
        Seconds that a structure may take, with workers.
    """
    known = Known(len(setup.properties), cache)
    for unit, done in _done(units, setup, known, workers, timeout_s):
        values = done.values if done.values is not None else _here(setup, done)
        yield Predicted(unit, done.rows, known.fill(unit, done, values))


def _done(
    units: Iterable[Unit], setup: Setup, known: Known, workers: int, timeout_s: float | None
) -> Iterator[tuple[Unit, Done]]:
    if workers < 1:
        for unit in units:
            yield unit, do_unit(unit, setup, lambda keys, unit=unit: known.choose(unit, keys))  # type: ignore[misc]
        return
    assert setup.model is not None
    on_cpu = setup.model.device.type == "cpu"
    theirs = setup if on_cpu else Setup(setup.preparation, None, [], setup.properties)
    crew = Crew(workers, theirs, known.choose, timeout_s)
    with threads(1 if on_cpu else torch.get_num_threads()):
        yield from crew.run(iter(units))


def _here(setup: Setup, done: Done) -> NDArray[np.float64]:
    assert setup.model is not None
    assert done.graphs is not None
    return predict_pack(setup.model, setup.plugins, setup.properties, done.graphs)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads here for a while.

    One leaves the workers' CPUs to them, since threads that wait for a busy CPU spin for
    milliseconds; and sums made by one thread are the same to the last bit everywhere.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
