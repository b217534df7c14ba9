"""Forgetting: what a fine-tuning gained on the target, and what it cost on the source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import OptionError
from matxfer.plot import style
from matxfer.plot.values import column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes


def retention_plane(
    source: Any,
    target: Any = None,
    *,
    groups: Any = None,
    strengths: Any = None,
    data: Any = None,
    unit: str = "",
    what: str = "test MAE",
    tolerance: float | None = 0.05,
    title: str | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw target errors against changes of the source errors: down and left is better.

    Parameters
    ----------
    source
        Relative change of the source errors (0.05: 5 % larger), (n,), or the name of a column; or
        plugins that were fine-tuned with ``source_data``: their mean change.
    target
        Target errors, (n,), or the name of a column.
    groups
        Way of retaining of each point, (n,); the points of one are joined in their order.
    strengths
        Strength λ of each, (n,), written beside the point unless it is zero; or words.
    data
        Data frame of the columns.
    unit
        Of the target errors.
    what
        What the target errors are.
    tolerance
        A source change that is taken for harmless: a dotted line.
    title
        Above the figure.
    legend
        Whether to name the groups.
    ax
        Axes to draw on; ``None``: a new figure.

    Returns
    -------
    Axes

    Raises
    ------
    OptionError
        If lengths differ, there is no point, or a plugin says nothing of source errors.

    Examples
    --------
    >>> from matxfer import plot
    >>> ax = plot.retention_plane([0.4, 0.1, 0.0], [20, 21, 30], groups=["ewc"] * 3,
    ...                           strengths=[0, 1, 10], unit="meV/atom")
    >>> [text.get_text() for text in ax.texts]
    ['1', '10']
    """
    if target is None:
        source, target, groups, strengths, unit = _of_plugins(source)
    x, y = (np.asarray(column(each, data), dtype=np.float64) for each in (source, target))
    names = _words(groups, data, len(x))
    marks = column(strengths, data)
    marks = [0] * len(x) if marks is None else list(marks)
    if not len(x) == len(y) == len(names) == len(marks):
        raise OptionError(
            f"{len(x)} source changes, {len(y)} target errors, {len(names)} groups and "
            f"{len(marks)} strengths; give as many of each"
        )
    good = np.isfinite(x) & np.isfinite(y)
    if not good.any():
        raise OptionError("retention plane: there is no point to draw")
    with style.axes(ax) as axis:
        for k, name in enumerate(dict.fromkeys(names)):
            mine = [i for i in range(len(x)) if good[i] and names[i] == name]
            look = style.style(k)
            axis.plot(
                100 * x[mine], y[mine], label=style.plain(name) or None, linewidth=0.9, **look
            )
            for i in mine:
                if text := _strength(marks[i]):
                    axis.annotate(
                        text, (100 * x[i], y[i]), (3, 3), textcoords="offset points", fontsize=6,
                        color=look["color"], parse_math=False,
                    )  # fmt: skip
        # Damage spans decades, and what is held stays around zero.
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter("{x:g}")
        if tolerance is not None:
            axis.axvline(
                100 * tolerance, color=style.GUIDE, linewidth=0.8, linestyle=":", label="_tolerance"
            )
        axis.set_xlabel("mean change of the source errors (%)")
        axis.set_ylabel(style.with_unit(what, unit))
        if legend and any(names):
            axis.legend(title="numbers: λ" if any(map(_is_number, marks)) else None).set_zorder(1)
        if title:
            axis.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def forgetting(plugin: Any, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw how the errors of each source property would change, were the base to share the layers.

    Parameters
    ----------
    plugin
        Fine-tuned with ``source_data``; or its ``meta["retention"]``.
    title
        Above the figure.
    ax
        Axes to draw on; ``None``: a new figure.

    Returns
    -------
    Axes

    Raises
    ------
    OptionError
        If no source error was measured.

    Examples
    --------
    >>> from matxfer import plot
    >>> errors = {"band_gap_ev": {"before": 0.20, "after": 0.21, "change": 0.05}}
    >>> ax = plot.forgetting({"source_error": errors})
    >>> [round(float(bar.get_width()), 3) for bar in ax.patches]
    [5.0]
    """
    retention = plugin if isinstance(plugin, dict) else plugin.meta.get("retention", {})
    errors = retention.get("source_error") or {}
    changes = {
        name: 100 * float(entry["change"])
        for name, entry in errors.items()
        if entry.get("change") is not None
    }
    if not changes:
        raise OptionError(
            "no source error was measured: fine-tune with source_data, a table of source "
            "structures with the source properties"
        )
    with style.axes(ax, height=0.8 + 0.3 * len(changes)) as axis:
        places = np.arange(len(changes))[::-1]
        sizes = np.array(list(changes.values()))
        colours = [style.COLOURS[1] if size > 0 else style.COLOURS[0] for size in sizes]
        axis.barh(places, sizes, height=0.6, color=colours)
        for place, size in zip(places, sizes, strict=True):
            axis.annotate(
                f"{size:+.1f} %".replace("-", "−"), (size, place), (3 if size >= 0 else -3, 0),
                textcoords="offset points", va="center", ha="left" if size >= 0 else "right",
                fontsize=7,
            )  # fmt: skip
        axis.axvline(0, color=style.ink(), linewidth=0.7)
        axis.set_yticks(places, [style.plain(style.quantity(name)) for name in changes])
        axis.margins(x=0.45)
        axis.set_xlabel("change of the error (%)")
        if title:
            axis.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def _of_plugins(
    plugins: Any,
) -> tuple[list[float], list[float], list[str], list[Any], str]:
    """Return source changes, test errors, ways, strengths and the unit of plugins."""
    source, target, groups, strengths = [], [], [], []
    unit = ""
    for plugin in list(plugins):
        meta = getattr(plugin, "meta", None)
        if not isinstance(meta, dict):
            raise OptionError("give changes of the source errors and target errors, or plugins")
        errors = meta.get("retention", {}).get("source_error") or {}
        changes = [entry["change"] for entry in errors.values() if entry["change"] is not None]
        if not changes:
            raise OptionError(
                f"plugin {plugin.name!r} was not fine-tuned with source_data, so no source error "
                "is known; give it, or changes of the source errors and target errors"
            )
        config, figures = meta["config"], meta["figures"]["test"]
        source.append(float(np.mean(changes)))
        target.append(float(figures["mae"]))
        groups.append(config["retain"] if config["retain"] != "none" else "nothing retained")
        strengths.append(config["strength"] if config["retain"] != "none" else 0)
        unit = figures["unit"]
    return source, target, groups, strengths, unit


def _is_number(mark: Any) -> bool:
    return not isinstance(mark, str) and bool(mark)


def _strength(mark: Any) -> str:
    if isinstance(mark, str):
        return mark
    return f"{mark:g}" if mark else ""


def _words(given: Any, data: Any, n: int) -> Sequence[str]:
    words = column(given, data)
    return [""] * n if words is None else [str(word) for word in words]
