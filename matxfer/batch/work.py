"""What happens to one unit, in this process or in a worker: read, choose, build, predict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from matxfer.batch.compute import predict_pack
from matxfer.batch.prepare import Preparation, Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from matxfer.batch.units import Unit
    from matxfer.crystal import CrystalError
    from matxfer.data.packed import PackedGraphs
    from matxfer.model import Model
    from matxfer.transfer.plugin import Plugin


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """What every process needs to know.

    Parameters
    ----------
    preparation
        How to make graphs.
    model, plugins, properties
        The network, its plugins and the names of their columns. Workers that only build graphs
        for a network on a GPU have no model.
    """

    preparation: Preparation
    model: Model | None
    plugins: list[Plugin]
    properties: list[str]


@dataclass(frozen=True, slots=True)
class Caution:
    """What has been learned of a unit that brought down a process.

    Parameters
    ----------
    broken
        Entries, by their number in the unit, that must not be touched again, and why not.
    singly
        Whether its graphs go through the network one by one.
    suspect
        Stage and entry at which it was the last time.
    """

    broken: dict[int, CrystalError] = field(default_factory=dict)
    singly: bool = False
    suspect: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Done:
    """A unit that has been worked on.

    Parameters
    ----------
    rows
        One per entry.
    made
        Numbers of the entries that have a prediction of their own, G of them.
    values
        These predictions, shape (G, P), or None where the network is elsewhere.
    graphs
        The graphs for it in that case.
    """

    rows: Rows
    made: list[int]
    values: NDArray[np.float64] | None
    graphs: PackedGraphs | None


class Watch:
    """Told what is worked on; the one of worker processes tells it on."""

    def reading(self, entry: int) -> None:
        """Tell that an entry of the unit is about to be read."""

    def building(self, entry: int) -> None:
        """Tell that the graph of an entry is about to be built."""

    def predicting(self, entries: Sequence[int]) -> None:
        """Tell that entries are about to go through the network."""


def do_unit(
    unit: Unit,
    setup: Setup,
    choose: Callable[[list[bytes | None]], Sequence[int]],
    caution: Caution | None = None,
    watch: Watch | None = None,
) -> Done:
    """Work on a unit.

    Parameters
    ----------
    choose
        Given the keys of all structures of the unit (None for those that could not be read),
        returns the numbers of those that need computing.
    caution, watch
        See there.
    """
    caution, watch = caution or Caution(), watch or Watch()
    preparation, rows = setup.preparation, Rows()
    entries = []
    column = preparation.structure_column
    for entry in unit.entries(column, watch.reading, caution.broken):
        entries.append(entry)
        rows.add(entry)
    chosen = choose([preparation.key(entry) for entry in entries])
    made, pack = preparation.graphs(entries, rows, chosen, caution.broken, watch.building)
    if setup.model is None:
        return Done(rows, made, None, pack)
    values = predict_pack(
        setup.model,
        setup.plugins,
        setup.properties,
        pack,
        singly=caution.singly,
        on_batch=lambda index: watch.predicting([made[k] for k in index]),
    )
    return Done(rows, made, values, None)
