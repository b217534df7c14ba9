"""Pieces that sections share."""

from __future__ import annotations

from typing import Any

from matxfer.html import Markup, tag


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
