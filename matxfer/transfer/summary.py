"""What is known of a finished plugin, for people: as lines, and as tables in a notebook."""

from __future__ import annotations

from typing import Any

from matxfer.errors import MatxferError
from matxfer.html import Markup, card, facts, table, tag
from matxfer.terminal import figures_line, plugin_lines


class Report:
    """Errors, intervals, trials and retention of a plugin; ``print`` it, or show it in a notebook.

    Parameters
    ----------
    meta
        What ``plugin.json`` says.

    Examples
    --------
    >>> from matxfer.transfer.summary import Report
    >>> errors = {"mae": 0.05, "rmse": 0.07, "r2": 0.99, "n": 94, "unit": "eV"}
    >>> Report({"name": "gaps", "figures": {"test": errors}})
    Report('gaps', test MAE 0.05 eV  RMSE 0.07 eV  R² 0.9900  n 94)
    """

    def __init__(self, meta: dict[str, Any]) -> None:
        self.meta = meta

    @property
    def figures(self) -> dict[str, Any]:
        """Errors of the ``val`` and the ``test`` rows."""
        return dict(self.meta.get("figures") or {})

    @property
    def retention(self) -> dict[str, Any]:
        """What became of the source predictions, were the base to share the layers."""
        return dict(self.meta.get("retention") or {})

    @property
    def trials(self) -> list[dict[str, Any]]:
        """What ``auto`` tried, with the validation errors."""
        return list(self.meta.get("trials") or [])

    def __repr__(self) -> str:
        test = self.figures.get("test")
        line = f"test {figures_line(test)}" if test else "no figures"
        return f"Report({str(self.meta.get('name', 'unnamed'))!r}, {line})"

    def __str__(self) -> str:
        complete = {"chosen", "figures", "retention"} <= set(self.meta)
        return "\n".join(plugin_lines(self.meta)) if complete else repr(self)

    def _repr_html_(self) -> str:
        parts = [errors_table(self.meta), trials_table(self.meta), retention_table(self.meta)]
        picture = _parity(self.meta)
        side = tag("div", *(part for part in parts if part is not None))
        style = "display: flex; flex-wrap: wrap; gap: 1.5em; align-items: flex-start"
        shown = side if picture is None else tag("div", side, picture, style=style)
        return card(f"Report of {self.meta.get('name', 'unnamed')}", shown)


def overview(meta: dict[str, Any]) -> Markup:
    """Return what a plugin is, as a table."""
    base = meta.get("base") or {}
    unit = meta.get("unit")
    first = (meta.get("consolidated") or {}).get("trained_on") or {}
    return facts(
        {
            "property": f"{meta.get('target', '–')}{f' ({unit})' if unit else ''}",
            "base model": f"{base.get('name', '–')} ({str(base.get('sha256', ''))[:12]}…)",
            "frozen layers": meta.get("frozen_depth"),
            "fitted scale": meta.get("transform"),
            "chosen": meta.get("chosen"),
            **({"trained on, before the base was consolidated": first["name"]} if first else {}),
        }
    )


def errors_table(meta: dict[str, Any]) -> Markup | None:
    """Return the errors of the validation and the test rows beside those of a constant."""
    found = [(part, each) for part, each in (meta.get("figures") or {}).items() if each.get("n")]
    if not found:
        return None
    unit = found[0][1].get("unit")
    of = f" ({unit})" if unit else ""
    columns = ["rows", f"MAE{of}", f"RMSE{of}", "R²", "n", f"MAE of a constant{of}"]
    logs = sorted({key for _, each in found for key in each if key.startswith("mae_log")})
    columns += [f"MAE of {key.removeprefix('mae_')}" for key in logs]
    keys = ["mae", "rmse", "r2", "n", "mae_of_a_constant", *logs]
    covered = [each for _, each in found if "coverage" in each]
    if covered:
        columns.append(f"{covered[0].get('coverage_level', 0.9):.0%} intervals hold")
    rows = [[part, *(each.get(key) for key in keys)] for part, each in found]
    if covered:
        rows = [
            [*row, _share(each.get("coverage"))] for row, (_, each) in zip(rows, found, strict=True)
        ]
    return table(columns, rows, "Errors")


def trials_table(meta: dict[str, Any]) -> Markup | None:
    """Return what ``auto`` tried, if it did."""
    if not meta.get("trials"):
        return None
    rows = []
    named = [t for t in meta["trials"] if t["tried"] == meta.get("chosen")]
    best = min(named, key=lambda trial: float(trial["val_mae"]), default=None)
    for k, trial in enumerate(meta["trials"], 1):
        name: Any = trial["tried"]
        if trial is best:  # a mean of two readouts may be called as one of them
            name = tag("strong", f"{name} (chosen)")
        rows.append((str(k), name, trial["val_mae"], trial.get("seconds")))
    return table(("trial", "tried", "validation MAE", "seconds"), rows, "Strategies tried")


def retention_table(meta: dict[str, Any]) -> Markup | None:
    """Return what became of the source predictions, were the base to share the layers."""
    retention = meta.get("retention") or {}
    drift, errors = retention.get("drift") or {}, retention.get("source_error") or {}
    if not drift:
        return None
    head = ["source property", "mean drift", "unit"]
    if errors:
        head += ["error before", "after", "change"]
    rows = []
    for name, entry in drift.items():
        row = [name, entry.get("mean_absolute_drift"), entry.get("unit")]
        if errors:
            known = errors.get(name) or {}
            row += [known.get("before"), known.get("after"), _share(known.get("change"), sign=True)]
        rows.append(row)
    return table(head, rows, "The source, were the base to share the layers")


def _share(value: Any, *, sign: bool = False) -> str | None:
    if value is None:
        return None
    return f"{100 * float(value):{'+' if sign else ''}.1f} %".replace("-", "−")


def _parity(meta: dict[str, Any]) -> Markup | None:
    """Return a small figure of the test rows, if the plugin keeps them and it can be drawn."""
    from matxfer.plot.agreement import draw_parity
    from matxfer.plot.style import panels, png
    from matxfer.plot.values import of_record

    made = panels(1, 2.5, 2.4)
    if made is None:
        return None
    figure, (axis,) = made
    try:
        draw_parity(axis, of_record(meta), marginals=False)
    except MatxferError:
        return None
    return tag("img", src=png(figure), alt="predictions against true values, test rows")
