"""What the columns of a prediction hold: text, whole numbers, or numbers with a unit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

#: One row of a prediction: column → value; missing values are None. A row may carry its structure
#: under :data:`CRYSTAL`, which is no column.
Row = dict[str, Any]

TEXTS = frozenset({"id", "source", "formula", "error_kind", "error", "warning"})
INTEGERS = frozenset({"frame", "n_sites", "steps", "converged"})
#: Key under which a row carries its :class:`matxfer.crystal.Crystal`, for structures out.
CRYSTAL = "crystal"
#: Key under which a row with a structure carries what an ASE calculator said of it, no column.
RESULTS = "results"


def arrow_type(column: str) -> Any:
    """Return the Arrow type of a column."""
    import pyarrow as pa

    if column in TEXTS:
        return pa.string()
    return pa.int64() if column in INTEGERS else pa.float64()


def arrow_schema(columns: Sequence[str]) -> Any:
    """Return the Arrow schema of columns."""
    import pyarrow as pa

    return pa.schema([(column, arrow_type(column)) for column in columns])


def printable(text: str, keep: str = "") -> str:
    """Return text with control characters (of terminals too) written as escapes.

    Parameters
    ----------
    text
        The text.
    keep
        Characters that may stay, such as line ends.
    """
    if text.isprintable():
        return text
    plain = (
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(plain)


def encodable(text: str) -> str:
    """Return text that UTF-8 can hold: odd bytes of file names are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
