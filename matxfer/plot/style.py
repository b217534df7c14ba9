"""How all figures look: colours, markers, sizes, fonts, and labels with their units."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from matxfer.columns import printable
from matxfer.data.properties import UNIT_SUFFIXES, unit_of
from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Colours that the colour-blind tell apart (Okabe & Ito 2008), and a marker for each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Blue, white, orange: poles that the colour-blind tell apart; for values around zero.
DIVERGING = ("#2166AC", "#F7F7F7", "#B35806")
#: From dark to light, also in grey and for the colour-blind; for values that have an order.
SEQUENTIAL = "viridis"
#: What has no value; lines that are only for the eye.
MISSING, GUIDE = "#D4D4D4", "0.55"
#: One column of a journal, in inches.
WIDTH, HEIGHT = 3.3, 2.7
_LONGEST = 60
#: Settings of matplotlib under which every figure is drawn.
RC: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.facecolor": "inherit",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.7,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "svg.fonttype": "none",
}


def style(k: int) -> dict[str, Any]:
    """Return colour and marker of the k-th curve of a figure."""
    return {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}


def require_matplotlib() -> None:
    """Check that there is something to draw with.

    Raises
    ------
    OptionError
        If there is not.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise OptionError("figures need matplotlib: pip install 'matxfer[notebook]'") from None


def ink() -> Any:
    """Return the colour of axes and text, black unless the user's settings say otherwise."""
    from matplotlib import rcParams

    return rcParams["axes.edgecolor"]


@contextmanager
def axes(
    ax: Any = None, width: float = WIDTH, height: float = HEIGHT, **more: Any
) -> Iterator[Any]:
    """Give axes to draw on in our style: those given, or those of a new pyplot figure.

    What a program or notebook has set for its own figures stays as it is.

    Parameters
    ----------
    ax
        Matplotlib axes, or ``None``.
    width, height
        Of a new figure, in inches.
    **more
        Options for ``subplots``.
    """
    require_matplotlib()
    from matplotlib import rc_context

    if ax is None:
        import matplotlib.pyplot as plt

        # Loads the backend now: what a notebook's sets (interactive) would not outlive the context.
        plt.draw_if_interactive()
    with rc_context(RC):
        if ax is None:
            _, ax = plt.subplots(figsize=(width, height), layout="constrained", **more)
        yield ax


def new_figure(width: float, height: float) -> Any:
    """Return a figure made without pyplot: for files, whatever backend a program has."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(n: int, width: float = 4.2, height: float = 3.6) -> tuple[Any, list[Any]] | None:
    """Return a figure of n panels side by side, and these, or None without matplotlib."""
    try:
        figure = new_figure(width * n, height)
    except OptionError:
        return None
    from matplotlib import rc_context

    with rc_context(RC):
        return figure, list(figure.subplots(1, n, squeeze=False)[0])


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def png(figure: Any, dpi: int = 110) -> str:
    """Return a figure as a PNG in a data address, for a page or a notebook."""
    import base64
    import io

    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=dpi)
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode('ascii')}"


def plain(text: Any) -> str:
    """Return text that means itself: no formulas between dollar signs, no control characters.

    What is longer than a label can be is cut.
    """
    words = printable(str(text))
    if len(words) > _LONGEST:
        words = f"{words[: _LONGEST - 1]}…"
    return words.replace("$", r"\$")


def with_unit(words: str, unit: str) -> str:
    """Return words with a unit in brackets, if there is one."""
    return plain(f"{words} ({unit})" if unit else words)


#: Words of column names that are not written in small letters.
_SPELT = {"vrh": "VRH", "phdos": "PhDOS", "tc": "Tc", "pbe": "PBE", "hse": "HSE"}


def quantity(column: str) -> str:
    """Return what a column is about: its name without the unit, in words."""
    end = next((end for end in UNIT_SUFFIXES if column.endswith(end)), "")
    words = column.removesuffix(end).split("_")
    return " ".join(_SPELT.get(word, word) for word in words) or column


def signed(value: float, digits: int = 3) -> str:
    """Return a number as text, with a minus sign and not a hyphen."""
    return f"{value:.{digits}g}".replace("-", "−")


def label(column: str, prefix: str = "") -> str:
    """Return the label of an axis: what a column is about, and its unit.

    >>> from matxfer.plot.style import label
    >>> label("formation_energy_ev_per_atom", "predicted")
    'predicted formation energy (eV/atom)'
    """
    return with_unit(f"{prefix} {quantity(column)}".strip(), unit_of(column))


def diverging() -> Any:
    """Return the colours of values around zero."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("matxfer", DIVERGING)
