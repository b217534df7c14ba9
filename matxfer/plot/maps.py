"""A map of fingerprints: crystals that the network takes for alike lie near one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import OptionError
from matxfer.plot import style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

METHODS = ("pca", "tsne", "none")


def embedding_map(
    features: Any,
    *,
    colour: Any = None,
    label: str = "",
    groups: Any = None,
    names: Any = None,
    method: str = "pca",
    interactive: bool = False,
    seed: int = 0,
    title: str | None = None,
    ax: Axes | None = None,
) -> Any:
    """Draw crystals as points of a plane, near those with like fingerprints.

    Parameters
    ----------
    features
        Fingerprints (n, D), such as :class:`matxfer.StructureFingerprint` gives; or group →
        fingerprints; or a :class:`matxfer.domain.Diagnosis`: source and target by the last layer.
    colour
        A number per crystal, (n,), such as a property or an error; drawn as colours.
    label
        Of the colours, with the unit; or the column name of a property.
    groups
        A word per crystal, (n,): colours and markers of their own (at most seven).
    names
        A text per crystal, (n,), such as a formula: shown where the mouse is, if ``interactive``.
    method
        ``"pca"``: principal components of the standardised features (exact, and new points could
        be added); ``"tsne"``: t-SNE (van der Maaten & Hinton, JMLR 9, 2579 (2008)), which shows
        groups, but no distances between them; ``"none"``: the features are coordinates already.
    interactive
        Whether to return a Plotly figure with ``names`` on hover instead; without Plotly, axes.
    seed
        Of t-SNE.
    title
        Above the figure.
    ax
        Axes to draw on; ``None``: a new figure.

    Returns
    -------
    Axes or plotly.graph_objects.Figure

    Raises
    ------
    OptionError
        If shapes do not agree, no row is finite, or there is no such method.

    Examples
    --------
    >>> import numpy as np
    >>> from matxfer import plot
    >>> features = np.array([[0.0, 1, 2], [1, 1, 0], [2, 0, 1]])
    >>> ax = plot.embedding_map(features, colour=[0.1, 0.5, 2.0], label="band_gap_ev")
    >>> ax.figure.axes[-1].get_ylabel()
    'band gap (eV)'
    """
    if method not in METHODS:
        raise OptionError(f"method is {method!r}, but must be one of {METHODS}")
    x, groups = _features(features, groups)
    n = len(x)
    hue = None if colour is None else np.asarray(colour, dtype=np.float64)
    kinds = None if groups is None else np.array([str(word) for word in groups])
    words = [str(k) for k in range(n)] if names is None else [str(word) for word in names]
    for what, given in (("colour", hue), ("groups", kinds), ("names", words)):
        if given is not None and len(given) != n:
            raise OptionError(f"{what} has {len(given)} entries, but there are {n} crystals")
    good: NDArray[np.bool_] = np.asarray(np.isfinite(x).all(axis=1))
    if not good.any():
        raise OptionError(f"embedding map: of {n} fingerprint(s) none is finite")
    at, axes_labels = _plane(x[good], method, seed)
    hue = None if hue is None else hue[good]
    kinds = None if kinds is None else kinds[good]
    words = [word for word, kept in zip(words, good, strict=True) if kept]
    name = style.label(label) if " " not in label else style.plain(label)
    if interactive and ax is None:
        made = _plotly(at, axes_labels, hue, name, kinds, words, title)
        if made is not None:
            return made
    with style.axes(ax) as axis:
        _points(axis, at, hue, name, kinds)
        axis.set_xlabel(axes_labels[0])
        axis.set_ylabel(axes_labels[1])
        if method == "tsne":
            axis.set_xticks([])
            axis.set_yticks([])
        if title:
            axis.set_title(style.plain(title))
    return axis


def _features(features: Any, groups: Any) -> tuple[Floats, Any]:
    """Return fingerprints (n, D) and the group of each, if they come in groups."""
    if hasattr(features, "source") and hasattr(features, "target"):
        layer = max(features.source.layers)
        features = {
            "source": features.source.layers[layer],
            "target": features.target.layers[layer],
        }
    if isinstance(features, dict):
        if not features:
            raise OptionError("embedding map: there is no group of fingerprints")
        groups = np.concatenate([np.full(len(v), k, dtype=object) for k, v in features.items()])
        features = np.concatenate([np.asarray(v, dtype=np.float64) for v in features.values()])
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or not x.size:
        raise OptionError(f"embedding map: expected fingerprints (n, D), found shape {x.shape}")
    return x, groups


def _plane(x: Floats, method: str, seed: int) -> tuple[Floats, tuple[str, str]]:
    """Return coordinates (n, 2) and what the axes are."""
    if method == "none":
        flat = np.column_stack([x, np.zeros(len(x))])[:, :2]
        return flat, ("component 1", "component 2")
    from sklearn.decomposition import PCA

    spread = x.std(axis=0)
    scaled = (x - x.mean(axis=0)) / np.where(spread > 0, spread, np.inf)
    if not scaled.any():  # one crystal, or copies of one
        return np.zeros((len(x), 2)), ("principal component 1", "principal component 2")
    if method == "tsne" and len(x) > 3:
        from sklearn.manifold import TSNE

        few = min(30.0, (len(x) - 1) / 3)
        at = TSNE(perplexity=few, init="pca", random_state=seed).fit_transform(scaled)
        return np.asarray(at, dtype=np.float64), ("t-SNE 1", "t-SNE 2")
    pca = PCA(min(2, *scaled.shape), random_state=seed)
    at = pca.fit_transform(scaled)
    share = [*pca.explained_variance_ratio_, 0.0]
    flat = np.column_stack([at, np.zeros(len(at))])[:, :2]
    named = [f"principal component {k + 1} ({share[k]:.0%} of variance)" for k in range(2)]
    return flat, (named[0], named[1])


def _points(axis: Any, at: Floats, hue: Floats | None, name: str, kinds: Any) -> None:
    size = float(np.clip(1500 / len(at), 5, 20))
    options: dict[str, Any] = {"s": size, "linewidths": 0, "rasterized": len(at) > 3000}
    if hue is not None:
        axis.scatter(*at[~np.isfinite(hue)].T, color=style.MISSING, **options)
        known = np.isfinite(hue)
        drawn = axis.scatter(*at[known].T, c=hue[known], cmap=style.SEQUENTIAL, **options)
        axis.figure.colorbar(drawn, ax=axis, label=name, aspect=30, pad=0.02)
    elif kinds is not None:
        present = list(dict.fromkeys(kinds.tolist()))
        shown = present if len(present) <= len(style.COLOURS) else _commonest(kinds)
        for k, kind in enumerate(shown):
            mine = kinds == kind if kind != _OTHERS else ~np.isin(kinds, shown)
            look = style.style(k) if kind != _OTHERS else {"color": style.MISSING}
            axis.scatter(
                *at[mine].T, label=f"{style.plain(kind)} (n = {mine.sum()})", alpha=0.6, **look,
                **options,
            )  # fmt: skip
        axis.legend(markerscale=1.5, handletextpad=0.2)
    else:
        axis.scatter(*at.T, color=style.COLOURS[0], alpha=0.6, **options)


_OTHERS = "others"


def _commonest(kinds: Any) -> list[str]:
    """Return the six commonest groups and one for the others."""
    found, count = np.unique(kinds, return_counts=True)
    order = np.argsort(-count, kind="stable")[: len(style.COLOURS) - 1]
    return [*(str(found[k]) for k in order), _OTHERS]


def _plotly(
    at: Floats, axes_labels: tuple[str, str], hue: Floats | None, name: str, kinds: Any,
    words: Sequence[str], title: str | None,
) -> Any:  # fmt: skip
    """Return a Plotly figure, or ``None`` without Plotly."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        return None
    from html import escape

    # Plotly reads texts as HTML, and names come from files.
    texts = np.array([escape(word) for word in words], dtype=object)
    figure = go.Figure()
    parts = [(None, np.ones(len(at), bool))]
    if hue is None and kinds is not None:
        parts = [(kind, kinds == kind) for kind in dict.fromkeys(kinds.tolist())]
    shapes = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
    for k, (kind, mine) in enumerate(parts):
        marker: dict[str, Any] = {
            "size": 6, "opacity": 0.75, "symbol": shapes[k % len(shapes)],
            "color": style.COLOURS[k % len(style.COLOURS)],
        }  # fmt: skip
        hover = "%{text}<extra></extra>"
        if hue is not None:
            bar = {"title": {"text": escape(name), "side": "right"}}
            marker |= {"color": hue[mine], "colorscale": style.SEQUENTIAL, "colorbar": bar}
            hover = "%{text}<br>%{marker.color:.4g}<extra></extra>"
        figure.add_trace(
            go.Scatter(
                x=at[mine, 0], y=at[mine, 1], text=texts[mine], mode="markers", marker=marker,
                name=None if kind is None else escape(str(kind)), hovertemplate=hover,
                showlegend=kind is not None,
            )
        )  # fmt: skip
    figure.update_layout(
        template="simple_white", width=640, height=480, title=title and escape(title),
        xaxis_title=axes_labels[0], yaxis_title=axes_labels[1], margin={"l": 60, "r": 20, "t": 40},
    )  # fmt: skip
    return figure
