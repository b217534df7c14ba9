"""What an ASE database knows of its rows besides the structures, as cells of a table.

Key-value pairs, what is a single number or text in ``data``, and the results of ASE's calculators,
whose units ASE states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import Crystal, CrystalError
from matxfer.readers.ase_database import crystal_of_row, database_rows, name_of_row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pandas as pd

#: Results of ASE's calculators, of the cell, in ASE's units: what we call them. No key-value pair
#: has such a key, for ASE reserves them.
RESULTS = {
    "energy": "energy_ev",
    "free_energy": "free_energy_ev",
    "magmom": "total_magnetization_mub_per_cell",
}

#: Name, structure (or what is wrong with it) and cells of a row.
Row = tuple[str, Crystal | CrystalError, dict[str, Any]]


def rows_with_properties(path: Path, kind: str = "db") -> Iterator[Row]:
    """Yield the rows of an ASE database with everything that is a number or text.

    Parameters
    ----------
    path, kind
        See :func:`matxfer.readers.ase_database.read_ase_db`.

    Yields
    ------
    name, structure, cells
        Results by their keys in ASE, key-value pairs, and what is in ``data`` as ``data.KEY``.

    Raises
    ------
    CrystalError
        If the file is empty or no database.
    """
    for row in database_rows(path, kind, more=(*RESULTS, "data")):
        if isinstance(row, CrystalError):
            yield str(row.frame), CrystalError(row.reason, row.remedy), {}
            continue
        name = name_of_row(row)
        yield name, crystal_of_row(row, name), _cells(row)


def _cells(row: Any) -> dict[str, Any]:
    try:
        data = dict(row.data)
    except Exception:  # noqa: BLE001 - what stands there is anyone's; the pairs are of use alone
        data = {}
    # One name in all rows, whatever a row has: no column is of two kinds.
    found = {**row.key_value_pairs, **{f"data.{key}": value for key, value in data.items()}}
    found |= {key: row.get(key) for key in RESULTS if row.get(key) is not None}
    return {key: plain(value) for key, value in found.items()}


def plain(value: Any) -> Any:
    """Return a number or truth value of NumPy as Python's; other things as they are."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return value.item()
    return value


def frame_of_database(path: Path) -> pd.DataFrame:
    """Return an ASE database as a data frame: ``material_id``, ``structure``, numbers and texts.

    Results have the names of :data:`RESULTS`, unless there are such columns already.

    Raises
    ------
    CrystalError
        If the file is empty or no database.
    """
    import pandas as pd

    found = pd.DataFrame(
        {
            **{k: v for k, v in cells.items() if isinstance(v, str | int | float)},
            "material_id": name,
            "structure": structure,
        }
        for name, structure, cells in rows_with_properties(path)
    )
    return found.rename(columns={k: v for k, v in RESULTS.items() if v not in found.columns})
