"""Figures as SVG inside a page: ids of their own, ink of the page's colour, names on hover."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from matxfer.columns import encodable, printable
from matxfer.html import Markup, markup
from matxfer.plot.style import RC, new_figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
#: A colour that no figure has; in the page it becomes that of the text, light or dark.
_INK = "#010203"
#: Pixels per point: a little larger than drawn (4/3), as a page is read from farther away.
_SCALE = 1.65
_RC: Any = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
}


def drawn(
    name: str,
    alt: str,
    draw: Callable[[Any], None],
    width: float = 3.3,
    height: float = 2.7,
    points: Sequence[tuple[float, float, str]] = (),
) -> Markup:
    """Draw a figure and return it as SVG.

    Parameters
    ----------
    name
        Of the figure, in small letters: its ids begin with it.
    alt
        What there is to see, in words.
    draw
        Draws on the axes that it is given.
    width, height
        In inches.
    points
        Coordinates and a text: shown where the mouse is on the point of a scatter plot.
    """
    from matplotlib import rc_context

    with rc_context({**RC, **_RC, "svg.hashsalt": name}), _no_warnings():
        figure = new_figure(width, height)
        axis = figure.subplots()
        draw(axis)
        offsets = _offsets(axis)
        held = io.BytesIO()
        # Otherwise the file says when it was made, and two reports of one plugin differ.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(held, format="svg", metadata=nothing)
    named = {(float(x), float(y)): encodable(printable(text)) for x, y, text in points}
    texts = [named.get(at, "") for at in offsets]
    return _inline(held.getvalue(), name, alt, texts)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep matplotlib from telling of letters that its font lacks, and of labels without room.

    The browser has the letters, and labels that are too long are a stranger's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        yield


def _offsets(axis: Any) -> list[tuple[float, float]]:
    for collection in axis.collections:
        if collection.get_gid() == "points":
            return [(float(x), float(y)) for x, y in collection.get_offsets()]
    return []


def _inline(source: bytes, name: str, alt: str, texts: Sequence[str]) -> Markup:
    """Return the SVG element of a file of matplotlib's, fit to stand in a page."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(source)  # noqa: S314 - what we have drawn ourselves
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    _name_points(root, texts)
    _prefix_ids(root, name)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    width = float(root.get("viewBox", "0 0 240 200").split()[2])
    root.set("role", "img")
    root.set("style", f"width: {width * _SCALE:.0f}px")
    text = ET.tostring(root, encoding="unicode")
    text = re.sub(rf"(?i){_INK}", "currentColor", text)
    return Markup(text.replace("<svg ", f'<svg aria-label="{markup(alt)}" ', 1))


def _name_points(root: ET.Element, texts: Sequence[str]) -> None:
    """Put a text on each point of a scatter plot; browsers show it where the mouse is."""
    group = next((e for e in root.iter() if e.get("id") == "points"), None)
    marks = [] if group is None else list(group.iter(f"{{{_SVG}}}use"))
    if len(marks) == len(texts):  # not so where many points are one picture
        for mark, text in zip(marks, texts, strict=True):
            ET.SubElement(mark, f"{{{_SVG}}}title").text = text


def _prefix_ids(root: ET.Element, name: str) -> None:
    """Make ids of a figure, and what refers to them, its own among the figures of a page."""
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
