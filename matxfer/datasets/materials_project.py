"""Tables of the Materials Project's present database, through its client mp-api (optional)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.datasets.card import Column, DatasetCard, DatasetError
from matxfer.datasets.convert import write_table
from matxfer.provenance import provenance

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: The client's fields, the names that they get, and their units in the database.
CARD = DatasetCard(
    name="materials_project",
    title="Materials Project, summary of its present database",
    collection="Materials Project",
    licence="CC-BY 4.0, as the Materials Project states it; look again before you pass the data on",
    url="https://api.materialsproject.org",
    sha256="",
    file_type="json",
    rows=0,
    doi=("10.1063/1.4812323",),
    columns=(
        Column("formation_energy_per_atom", "formation_energy_ev_per_atom", "eV/atom"),
        Column("energy_above_hull", "energy_above_hull_ev_per_atom", "eV/atom"),
        Column("band_gap", "band_gap_ev", "eV"),
        Column("bulk_modulus", "bulk_modulus_vrh_gpa", "GPa"),
        Column("shear_modulus", "shear_modulus_vrh_gpa", "GPa"),
        Column("total_magnetization", "total_magnetization_mub_per_cell", "μB/cell"),
    ),
    structure_column="structure",
    id_column="material_id",
    formula_column="formula_pretty",
)
#: Moduli come as averages after Voigt, Reuss and Hill.
_AVERAGES = ("bulk_modulus", "shear_modulus")


def fetch_materials_project(
    output: str | Path, *, client: Any = None, **criteria: Any
) -> dict[str, Any]:
    """Write a table of the materials that meet some criteria.

    Parameters
    ----------
    output
        Parquet file to write.
    client
        An ``mp_api.client.MPRester(use_document_model=False)``; ``None``: one with the key of
        ``$MP_API_KEY``.
    **criteria
        What ``MPRester.materials.summary.search`` takes, such as ``chemsys="Li-O"`` or
        ``band_gap=(1, 3)``; at least one.

    Returns
    -------
    dict
        ``table``, ``rows``, ``failed``, ``errors``, ``values``, as of
        :func:`matxfer.datasets.fetch.fetch_dataset`.

    Raises
    ------
    DatasetError
        If the client is not installed, there is no key, nothing is asked for, the database does
        not answer, or nothing meets the criteria.
    """
    if not criteria:
        raise DatasetError(
            'Materials Project: say which materials, such as chemsys="Li-O"; all of them are the '
            "dataset mp_all_20181018"
        )
    table = Path(output)
    try:
        client = client or _client()
        found = client.materials.summary.search(fields=CARD.source_columns, **criteria)
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(
            f"Materials Project: {type(error).__name__}: {error}; check the criteria, the key in "
            "$MP_API_KEY and the connection"
        ) from error
    facts = {"criteria": {k: repr(v) for k, v in criteria.items()}, **provenance()}
    name = f"Materials Project, {criteria}"
    return {
        "table": str(table),
        **asdict(write_table(CARD, _rows(found), table, facts, None, name)),
    }


def _client() -> Any:
    import os

    try:
        from mp_api.client import MPRester
    except ImportError as error:
        raise DatasetError(
            "Materials Project: its client is not installed; pip install 'matxfer[mp]'"
        ) from error
    if not (key := os.environ.get("MP_API_KEY")):
        raise DatasetError(
            "Materials Project: there is no key; get one at https://next-gen.materialsproject.org"
            "/api and put it in $MP_API_KEY"
        )
    return MPRester(key, use_document_model=False)


def _rows(found: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for k, document in enumerate(found):
        if not isinstance(document, dict):
            yield str(k), f"a {type(document).__name__} where a dictionary should be"
            continue
        cells = {name: document.get(name) for name in CARD.source_columns}
        for name in _AVERAGES:
            average = document.get(name)
            if isinstance(average, dict):
                cells[name] = average.get("vrh")
        yield str(k), cells
