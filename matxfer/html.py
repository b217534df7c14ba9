"""HTML made of parts that are escaped: for notebooks and reports."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from matxfer.columns import encodable, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Markup:
    """Text that is HTML already; everything else is escaped where it is put into a page."""

    text: str

    def __str__(self) -> str:
        return self.text


def markup(value: Any) -> str:
    """Return a value as HTML: escaped, without control characters, unless it is :class:`Markup`.

    >>> from matxfer.html import markup
    >>> markup("<script>")
    '&lt;script&gt;'
    """
    if isinstance(value, Markup):
        return value.text
    return escape(encodable(printable(words(value), keep="\n\t")))


def words(value: Any) -> str:
    """Return a value as people write it: numbers with four digits, an en dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return str(value)


def tag(name: str, *content: Any, **attributes: Any) -> Markup:
    """Return an element; ``class_`` is the attribute ``class``, ``None`` leaves one out.

    >>> from matxfer.html import tag
    >>> str(tag("p", "a < b", class_="note"))
    '<p class="note">a &lt; b</p>'
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{markup(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{told}>{''.join(map(markup, content))}</{name}>")


def join(parts: Iterable[Any]) -> Markup:
    """Return parts, one after the other."""
    return Markup("".join(map(markup, parts)))


def table(
    head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: Any = None, **attributes: Any
) -> Markup:
    """Return a table; numbers are to the right."""
    lines = [tag("caption", caption)] if caption is not None else []
    if head:
        cells = (tag("th", each, scope="col") for each in head)
        lines.append(tag("thead", tag("tr", *cells)))
    body = (tag("tr", *(_cell(each) for each in row)) for row in rows)
    return tag("table", *lines, tag("tbody", *body), **attributes)


def _cell(value: Any) -> Markup:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return tag("td", value, class_="number" if numeric else None)


def facts(pairs: Mapping[str, Any] | Iterable[tuple[str, Any]], **attributes: Any) -> Markup:
    """Return a table of two columns: what, and what about it."""
    items = pairs.items() if hasattr(pairs, "items") else pairs
    rows = (tag("tr", tag("th", key, scope="row"), tag("td", value)) for key, value in items)
    return tag("table", tag("tbody", *rows), **attributes)


def card(title: str, *parts: Any) -> str:
    """Return what a notebook shows of an object: its title, and what there is below."""
    head = tag("div", tag("strong", title), style="margin-bottom: 0.3em")
    there = (part for part in parts if part is not None)
    return str(tag("div", head, *there, class_="matxfer", style="max-width: 60em"))
