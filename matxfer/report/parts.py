"""Pieces that sections share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matxfer.html import Markup, table, tag
from matxfer.plot.elements import periodic_table
from matxfer.report.drawing import drawn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def missing(why: Any) -> Markup:
    """Return a note of what is not known and what to do."""
    return tag("p", why, class_="missing")


def figure(picture: Markup, caption: Any) -> Markup:
    """Return a picture with its caption."""
    return tag("figure", picture, tag("figcaption", caption))


def row(*figures: Markup) -> Markup:
    """Return figures side by side, below one another where the page is narrow."""
    return tag("div", *figures, class_="figures")


def listed(given: Any, between: str = ": ") -> str | None:
    """Return what a mapping says in one line."""
    if not given:
        return None
    return ", ".join(f"{key}{between}{value}" for key, value in given.items())


def files_table(files: Mapping[str, tuple[int, str]]) -> Any:
    """Return names, sizes and checksums of files, if there are any."""
    rows = [
        (name, f"{size / 1e3:,.1f} kB", tag("code", digest))
        for name, (size, digest) in files.items()
    ]
    return table(("file", "size", "SHA-256"), rows, "Files") if rows else ""


def elements_figure(numbers: Iterable[int]) -> Any:
    """Return a periodic table of the elements that were trained on, if they are known."""
    from ase.data import chemical_symbols

    present = {int(z): 1.0 for z in numbers if 0 < int(z) < len(chemical_symbols)}
    if not present:
        return ""

    def draw(axis: Any) -> None:
        periodic_table(present, "", limits=(0.0, 1.6), ax=axis)
        for bar in axis.figure.axes[1:]:
            bar.remove()

    symbols = ", ".join(chemical_symbols[z] for z in sorted(present))
    picture = drawn("elements", f"periodic table: {symbols}", draw, 4.2, 2.2)
    return figure(picture, f"Elements of the training rows ({len(present)}).")
