"""A structure in OPTIMADE's form becomes a crystal.

See the specification, section "Structures Entries": https://specification.optimade.org
"""

from __future__ import annotations

from typing import Any

import numpy as np

from matxfer.crystal import Crystal, CrystalError
from matxfer.errors import ErrorKind
from matxfer.readers.entry import bad_cell, bad_coordinates, unknown_species

#: What is asked for of each entry.
FIELDS = (
    "lattice_vectors",
    "cartesian_site_positions",
    "species",
    "species_at_sites",
    "chemical_formula_reduced",
    "last_modified",
)
_REMEDY = "choose another entry, or tell the provider"


def crystal_of_optimade(attributes: dict[str, Any], name: str = "") -> Crystal:
    """Return the crystal of an entry's attributes.

    Parameters
    ----------
    attributes
        ``lattice_vectors`` (3 × 3, Å), ``cartesian_site_positions`` (n × 3, Å),
        ``species_at_sites`` (n) and ``species``; without the last, names of species are symbols.
    name
        Id of the crystal.

    Raises
    ------
    CrystalError
        If a field is missing or damaged, a site is disordered or partly empty, or a species is no
        element.
    """
    from ase.data import atomic_numbers

    sites = attributes.get("species_at_sites")
    if not isinstance(sites, list) or not sites:
        raise CrystalError("there are no species_at_sites", _REMEDY, kind=ErrorKind.EMPTY)
    lattice = _numbers(attributes.get("lattice_vectors"))
    if lattice is None or lattice.shape != (3, 3):
        raise bad_cell("lattice_vectors are missing, or not periodic in three directions", _REMEDY)
    positions = _numbers(attributes.get("cartesian_site_positions"))
    if positions is None or positions.shape != (len(sites), 3):
        raise bad_coordinates(
            f"cartesian_site_positions are not three numbers for each of {len(sites)} sites",
            _REMEDY,
        )
    symbols = {site: _symbol(site, attributes.get("species")) for site in dict.fromkeys(sites)}
    for site, symbol in symbols.items():
        if symbol not in atomic_numbers or symbol == "X":
            raise unknown_species(f"unknown species {symbol!r} (site {site!r})", _REMEDY)
    try:
        frac = np.linalg.solve(lattice.T, positions.T).T
    except np.linalg.LinAlgError as error:
        raise bad_cell("the cell has no volume", _REMEDY) from error
    return Crystal(lattice, [atomic_numbers[symbols[site]] for site in sites], frac, id=name)


def _symbol(site: Any, species: Any) -> str:
    """Return the one element of a species.

    Raises
    ------
    CrystalError
        If it has several, or is partly empty.
    """
    if not species:
        return str(site)
    entries = species if isinstance(species, list) else []
    entry = next((s for s in entries if isinstance(s, dict) and s.get("name") == site), None)
    if entry is None:
        raise unknown_species(f"species {site!r} of a site is not described", _REMEDY)
    symbols = entry.get("chemical_symbols")
    shares = entry.get("concentration") or [1.0]
    if not isinstance(symbols, list) or not symbols or len(shares) != len(symbols):
        raise unknown_species(f"species {site!r} has no chemical symbols", _REMEDY)
    present = [(s, x) for s, x in zip(symbols, shares, strict=True) if x]
    if len(present) != 1 or abs(present[0][1] - 1) > 1e-3 or entry.get("attached"):
        parts = ", ".join(f"{symbol} {share:g}" for symbol, share in present)
        raise CrystalError(
            f"disordered: species {site!r} is {parts or 'empty'}",
            "choose an ordered structure",
            kind=ErrorKind.DISORDERED,
        )
    return str(present[0][0])


def _numbers(value: Any) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Return an array of finite numbers, ``None`` if it is none."""
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return found if np.isfinite(found).all() else None
