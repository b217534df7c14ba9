"""Screening: of a stream of rows those that meet a condition, in an order, the best of them.

A condition is Python in its looks only. Its syntax tree is translated, node by known node, into
calls of Arrow's compute functions; whatever is not in the tables below, such as a call or an
attribute, is refused, and nothing is ever evaluated by Python. (pandas' and numexpr's own
expressions are compiled by ``eval``, and both had holes.) Arrow's logic knows a third value, so a
row whose value is missing is neither taken nor rejected but counted by itself.
"""

from __future__ import annotations

import ast
import heapq
import re
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from matxfer.columns import CRYSTAL, TEXTS, Row, arrow_schema, arrow_type, encodable
from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

#: Rows that a condition is computed for at a time.
CHUNK = 1024
_MAX_LENGTH = 2000
_QUOTED = re.compile(r"`([^`]*)`")

_LOGIC: dict[type[ast.boolop], str] = {ast.And: "and_kleene", ast.Or: "or_kleene"}
_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
    ast.Pow: "power",
    ast.BitAnd: "and_kleene",
    ast.BitOr: "or_kleene",
}
_UNARY: dict[type[ast.unaryop], str] = {ast.USub: "negate", ast.Not: "invert", ast.Invert: "invert"}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}
_FUNCTIONS = ("abs", "sqrt", "exp", "ln", "log10")
_EXAMPLE = "such as 'band_gap_ev > 1 and n_sites <= 20'"


class Condition:
    """A condition on the columns of a row.

    Comparisons (chained too), ``and``, ``or``, ``not``, ``in (…)``, arithmetic, ``abs``, ``sqrt``,
    ``exp``, ``ln`` and ``log10`` on columns, numbers and texts. A column whose name is no
    identifier stands between backticks.

    Parameters
    ----------
    text
        The condition.
    columns
        The columns that it may name.

    Raises
    ------
    OptionError
        If it is no condition, names an unknown column or mixes texts and numbers.
    """

    def __init__(self, text: str, columns: Sequence[str]) -> None:
        self.text, self.known = text, list(columns)
        self._quoted: dict[str, str] = {}
        if len(text) > _MAX_LENGTH:
            raise OptionError(f"--filter: longer than {_MAX_LENGTH} characters")
        try:
            self._tree = ast.parse(_QUOTED.sub(self._placeholder, text).strip(), mode="eval").body
            names = [n.id for n in ast.walk(self._tree) if isinstance(n, ast.Name)]
            self.columns = sorted({self._column(n) for n in names if n not in _FUNCTIONS})
            mask = self.mask([])
        except OptionError:
            raise
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._error(f"cannot be understood ({' '.join(str(error).split())})") from None
        except (NotImplementedError, TypeError, OverflowError) as error:
            raise self._error(f"cannot be computed ({' '.join(str(error).split())})") from None
        if not self.columns or str(mask.type) != "bool":
            raise self._error("is no condition on a column")

    def mask(self, rows: Sequence[Row]) -> Any:
        """Return one value per row, true, false or null (a value is missing), as Arrow array."""
        return self._value(self._tree, {name: _array(rows, name) for name in self.columns})

    def _placeholder(self, match: re.Match[str]) -> str:
        name = f"_quoted_{len(self._quoted)}"
        self._quoted[name] = match[1]
        return name

    def _column(self, identifier: str) -> str:
        name = self._quoted.get(identifier, identifier)
        if name not in self.known:
            raise OptionError(unknown("--filter", name, self.known))
        return name

    def _error(self, problem: str) -> OptionError:
        return OptionError(f"--filter {self.text!r} {problem}; write a condition {_EXAMPLE}")

    def _value(self, node: ast.AST, arrays: Mapping[str, Any]) -> Any:  # noqa: PLR0911
        """Compute a node of the tree; one that is not listed here is refused."""
        import pyarrow.compute as pc

        def of(other: ast.AST) -> Any:
            return self._value(other, arrays)

        match node:
            case ast.Name(id=name) if name not in _FUNCTIONS:
                return arrays[self._column(name)]
            case ast.Constant(value=value) if type(value) in {int, float, str}:
                return _scalar(value)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return pc.call_function(_UNARY[type(op)], [of(operand)])
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return pc.call_function(_BINARY[type(op)], [of(left), of(right)])
            case ast.BoolOp(op=op, values=values):
                return _joined(_LOGIC[type(op)], [of(value) for value in values])
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [left, *others]
                pairs = zip(ops, sides, others, strict=False)
                return _joined("and_kleene", [self._compared(*pair, of) for pair in pairs])
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
                if name in _FUNCTIONS:
                    return pc.call_function(name, [of(argument)])
        raise self._error(f"has a {type(node).__name__.lower()}, which has no place in it")

    def _compared(
        self, op: ast.cmpop, left: ast.AST, right: ast.AST, of: Callable[[ast.AST], Any]
    ) -> Any:
        import pyarrow.compute as pc

        if type(op) in _COMPARISONS:
            return pc.call_function(_COMPARISONS[type(op)], [of(left), of(right)])
        listed = isinstance(right, ast.Tuple | ast.List) and right.elts
        if not (isinstance(op, ast.In | ast.NotIn) and listed):
            raise self._error("has a comparison that has no place in it")
        value = of(left)
        found = _joined("or_kleene", [pc.equal(value, of(item)) for item in listed])
        return found if isinstance(op, ast.In) else pc.invert(found)


def _scalar(value: Any) -> Any:
    import pyarrow as pa

    return pa.scalar(value if isinstance(value, str) else float(value))


def _joined(function: str, values: Sequence[Any]) -> Any:
    import pyarrow.compute as pc

    result = values[0]
    for value in values[1:]:
        result = pc.call_function(function, [result, value])
    return result


def _array(rows: Sequence[Row], column: str) -> Any:
    """Return a column as Arrow array: texts, or float64 with NaN as null."""
    import pyarrow as pa

    values = [row[column] for row in rows]
    if column in TEXTS:
        texts = [None if value is None else encodable(value) for value in values]
        return pa.array(texts, pa.string())
    return pa.array([None if _missing(value) else float(value) for value in values], pa.float64())


def _missing(value: Any) -> bool:
    return value is None or value != value  # noqa: PLR0124 - NaN is what differs from itself


def unknown(option: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a column that there is not."""
    return f"{option}: there is no column {name!r}; the columns are {', '.join(known)}"


@dataclass(frozen=True, slots=True)
class Order:
    """A column to sort by, and whether its largest values come first."""

    column: str
    descending: bool

    @classmethod
    def parse(cls, text: str, columns: Sequence[str]) -> Order:
        """Read ``COLUMN`` or ``COLUMN:desc`` (or ``:asc``).

        Raises
        ------
        OptionError
            If there is no such column.
        """
        name, colon, direction = text.rpartition(":")
        if not colon or direction not in {"asc", "desc"}:
            name, direction = text, "asc"
        if name not in columns:
            raise OptionError(unknown("--sort-by", name, columns))
        return cls(name, direction == "desc")


class Screen:
    """Pass on the rows that are wanted, and count all others.

    Parameters
    ----------
    known
        The columns of the rows.
    where
        Condition that a row has to meet, see :class:`Condition`. Rows with an error, or with a
        missing value that decides, do not meet it.
    sort_by
        ``COLUMN`` or ``COLUMN:desc``. Missing values come last. Without ``top`` all rows that are
        kept are held in memory, about 200 bytes each (and their structures, if they have them).
    top
        Keep so many of the first in that order; no more are in memory at any time.
    columns
        The columns to write, all of them if None.

    Attributes
    ----------
    columns : list of str
        The columns to write, in order.
    seen, failed, rejected, undecided, cut, kept : int
        Rows so far; of these, with an error; that do not meet the condition; whose value is
        missing; not among the first ``top``; passed on. With a condition or ``top``, the last five
        sum to the first.

    Raises
    ------
    OptionError
        For an unknown column, a bad condition, ``top`` below 1 or without an order.
    """

    def __init__(
        self,
        known: Sequence[str],
        *,
        where: str | None = None,
        sort_by: str | None = None,
        top: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        self.known = list(known)
        self.columns = list(dict.fromkeys(columns)) if columns is not None else self.known
        for name in self.columns:
            if name not in self.known:
                raise OptionError(unknown("--columns", name, self.known))
        self.condition = None if where is None else Condition(where, self.known)
        self.order = None if sort_by is None else Order.parse(sort_by, self.known)
        if top is not None and (top < 1 or self.order is None):
            raise OptionError("--top needs a number above 0, and --sort-by COLUMN[:desc]")
        self.top = top
        self.seen = self.failed = self.rejected = self.undecided = self.cut = self.kept = 0

    @property
    def selects(self) -> bool:
        """Whether rows can be left out."""
        return self.condition is not None or self.top is not None

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows that are wanted."""
        chosen: Iterable[Row] = self._met(self._counted(rows))
        if self.top is not None:
            chosen = self._best(chosen)
        elif self.order is not None:
            chosen = self._sorted(chosen)
        for row in chosen:
            self.kept += 1
            yield row

    def choices(self) -> dict[str, Any]:
        """Return what was asked for, for the metadata of a file."""
        order = self.order and f"{self.order.column}:{'desc' if self.order.descending else 'asc'}"
        where = self.condition and self.condition.text
        return {"filter": where, "sort_by": order, "top": self.top}

    def summary(self) -> str:
        """Return what became of the rows in one line, ``""`` if none could be left out."""
        if not self.selects:
            return ""
        parts = [
            f"{count} {what}"
            for count, what in (
                (self.rejected, "do not meet the filter"),
                (self.undecided, "lack a value that it needs"),
                (self.failed, "could not be predicted"),
                (self.cut, f"come after the first {self.top}"),
            )
            if count
        ]
        left_out = f"; left out: {', '.join(parts)}" if parts else ""
        return f"kept {self.kept} of {self.seen} structures{left_out}"

    def _counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.seen += 1
            failed = row["error"] is not None
            self.failed += failed
            if not (failed and self.selects):
                yield row

    def _met(self, rows: Iterable[Row]) -> Iterator[Row]:
        if self.condition is None:
            yield from rows
            return
        iterator = iter(rows)
        while chunk := list(islice(iterator, CHUNK)):
            for row, met in zip(chunk, self.condition.mask(chunk).to_pylist(), strict=True):
                if met:
                    yield row
                elif met is None:
                    self.undecided += 1
                else:
                    self.rejected += 1

    def _best(self, rows: Iterable[Row]) -> list[Row]:
        assert self.order is not None
        assert self.top is not None
        column, entered = self.order.column, 0

        def present() -> Iterator[Row]:
            nonlocal entered
            for row in rows:
                if _missing(row[column]):
                    self.undecided += 1
                else:
                    entered += 1
                    yield row

        # Both hold no more than n rows, and leave equal ones in the order of the input.
        pick = heapq.nlargest if self.order.descending else heapq.nsmallest
        best = pick(self.top, present(), key=lambda row: row[column])
        self.cut = entered - len(best)
        return best

    def _sorted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Sort all rows, kept as Arrow tables meanwhile: a tenth of the memory of dictionaries."""
        import pyarrow as pa
        import pyarrow.compute as pc

        assert self.order is not None
        schema = arrow_schema(self.known)
        crystals: list[Any] = []
        parts: list[Any] = []
        iterator = iter(rows)
        while chunk := list(islice(iterator, CHUNK)):
            crystals += [row.get(CRYSTAL) for row in chunk]
            arrays = [_array(chunk, name).cast(arrow_type(name)) for name in self.known]
            parts.append(pa.Table.from_arrays(arrays, schema=schema))
        if not parts:
            return
        table = pa.concat_tables(parts)
        direction = "descending" if self.order.descending else "ascending"
        order = pc.sort_indices(table, [(self.order.column, direction)])  # stable, nulls last
        for start in range(0, len(order), CHUNK):
            places = order.slice(start, CHUNK)
            for place, row in zip(places.to_pylist(), table.take(places).to_pylist(), strict=True):
                if crystals[place] is not None:
                    row[CRYSTAL] = crystals[place]
                yield row
