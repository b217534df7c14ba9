"""Columns as a user names them: what the source calls a property, our name, and the unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matxfer.data.properties import UNIT_SUFFIXES, unit_of
from matxfer.datasets.card import Column, DatasetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

#: Columns that every table of ours has.
RESERVED = frozenset(
    {"material_id", "formula", "n_sites", "lattice", "numbers", "frac_coords", "error"}
)
#: What is written for a number without a unit.
DIMENSIONLESS = "1"
_UNITS = ", ".join(dict.fromkeys(UNIT_SUFFIXES.values()))


def read_column(text: str, stated: Mapping[str, str] | None = None) -> Column:
    """Read ``SOURCE=NAME`` or ``SOURCE=NAME:UNIT``.

    Parameters
    ----------
    text
        What the source calls the column; what our table shall call it, which ends in its unit; and
        the unit of the source's values: ``log10(UNIT)`` if they are logarithms, ``1`` if they have
        none. Without a unit it is what the source states, else that of the name.
    stated
        Units that the source states, by its names, where it states any.

    Raises
    ------
    DatasetError
        If it is written otherwise, or units disagree or are missing.
    """
    source, equals, rest = text.partition("=")
    name, colon, unit = (word.strip() for word in rest.partition(":"))
    source = source.strip()
    if not (equals and source and name):
        raise DatasetError(
            f"column {text!r}: write SOURCE=NAME or SOURCE=NAME:UNIT, such as energy=energy_ev"
        )
    if name in RESERVED:
        raise DatasetError(f"column {text!r}: every table has a column {name!r}; choose another")
    known = (stated or {}).get(source)
    given = "" if unit == DIMENSIONLESS else unit
    if colon and known is not None and given != known:
        raise DatasetError(
            f"column {text!r}: the source states {known or 'no unit'!r}; leave the unit out"
        )
    if not colon:
        if known is None and not unit_of(name):
            raise DatasetError(
                f"column {text!r}: in which unit? Let the name end in it, such as {name}_ev, or "
                f"say {source}={name}:1 if it has none. Units: {_UNITS}"
            )
        given = unit_of(name) if known is None else known
    return _checked(Column(source, name, given))


def distinct(columns: Sequence[Column]) -> tuple[Column, ...]:
    """Return columns none of which has the name of another.

    Raises
    ------
    DatasetError
        If two have.
    """
    names = [column.name for column in columns]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"two columns would be called {twice[0]!r}; give one another name")
    return tuple(columns)


def read_columns(
    texts: Iterable[str], stated: Mapping[str, str] | None = None
) -> tuple[Column, ...]:
    """Read several; see :func:`read_column`."""
    return distinct([read_column(text, stated) for text in texts])


def _checked(column: Column) -> Column:
    try:
        column.conversion()
    except DatasetError as error:
        raise DatasetError(str(error).replace("; correct the card", "")) from error
    return column
