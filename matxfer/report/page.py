"""One HTML page of a plugin: no script, nothing from a network, readable on paper and at night."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.errors import OptionError
from matxfer.files import write_text
from matxfer.html import Markup, tag
from matxfer.plot.style import require_matplotlib
from matxfer.report.about import headline, subject
from matxfer.report.parts import missing
from matxfer.report.record import Record, compare_with_source, load_for, measure, read_record
from matxfer.report.sections import all_sections

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from matxfer.estimator.classifier import TransferClassifier
    from matxfer.model import Model
    from matxfer.transfer.plugin import Plugin

#: A browser is told to load and to run nothing, whatever a name in the page may look like.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --rule: #ccc; --soft: #f3f5f7;
  --accent: #0072b2; --warn: #8a4b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #15181b; --rule: #444; --soft: #1f2428; --accent: #6ab7e8;
    --warn: #f0b35a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: break-word; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 0 0 .6rem; font-size: 1.15rem; color: var(--accent); }
.lead { margin: .3rem 0 0; font-size: 1.05rem; }
header { padding-bottom: .8rem; border-bottom: 2px solid var(--accent); }
section { padding: 1rem 0; border-bottom: 1px solid var(--rule); overflow-x: auto; }
table { margin: .4rem 0 .8rem; border-collapse: collapse; font-size: .88rem; }
caption { padding-bottom: .2rem; text-align: left; font-weight: 600; }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top;
  overflow-wrap: normal; }
thead th { border-bottom: 1px solid var(--rule); }
tbody th { font-weight: 500; opacity: .8; white-space: nowrap; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { font: .85em ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }
.wide td { white-space: nowrap; }
@media (max-width: 30rem) { tbody th { white-space: normal; } }
td code { overflow-wrap: anywhere; }
pre { padding: .6rem .8rem; background: var(--soft); overflow-x: auto; white-space: pre-wrap; }
figure { margin: .4rem 0; }
figcaption { max-width: 34rem; font-size: .82rem; opacity: .85; }
svg { max-width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.figures > figure { max-width: 100%; }
.missing { padding: .4rem .7rem; border-left: 3px solid var(--warn); background: var(--soft);
  font-size: .9rem; }
footer { padding: .8rem 0; font-size: .8rem; opacity: .75; }
@media print {
  :root { --ink: #000; --paper: #fff; --rule: #bbb; --soft: #f4f4f4; --accent: #004b78;
    --warn: #8a4b00; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  section { overflow: visible; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  @page { margin: 16mm; } }
"""


def write_report(
    plugin: str | Path | Plugin | TransferClassifier,
    output: str | Path,
    *,
    data: str | Path | pd.DataFrame | None = None,
    source_data: str | Path | pd.DataFrame | None = None,
    model: str | Path | Model | None = None,
    target: str | None = None,
    split_column: str | None = None,
    structure_column: str | None = None,
    sample: int = 300,
    on_progress: Callable[[int], None] | None = None,
) -> Record:
    """Write what is known of a plugin or classifier as one HTML page that opens without a network.

    Parameters
    ----------
    plugin
        A plugin or its folder, also one of a potential; or a
        :class:`matxfer.estimator.TransferClassifier` or the folder that it was saved to. Weights
        are loaded only with ``data`` or ``source_data``.
    output
        The page.
    data
        Table with the plugin's target: its rows are predicted anew and shown in place of those that
        the plugin keeps.
    source_data
        Table of source structures: errors of the source properties before and after and, with
        ``data``, the domain gap.
    model
        Base model; ``None``: the one that the plugin names.
    target
        Column of labels in ``data``, of a classifier; ``None``: that of the name of its y.
    split_column, structure_column
        Columns of ``data``; ``None``: the split column that the plugin was trained with.
    sample
        At most so many source and target structures are compared.
    on_progress
        Called with the number of structures done since the last call.

    Returns
    -------
    Record
        What the page shows.

    Raises
    ------
    FormatError
        If there is no such plugin.
    TableError
        If a table cannot be used.
    OptionError
        If matplotlib is missing, or an option is not for a plugin of this kind.
    """
    require_matplotlib()
    record = read_record(plugin)
    if target is not None and not record.is_classifier:
        raise OptionError(f"{record.name} knows its target; --target is for classifiers")
    if record.is_classifier:
        if source_data is not None:
            raise OptionError(
                f"{record.name} is a classifier: all layers of its base are frozen, so there is "
                "nothing of the source to lose; leave out --source-data, and compare structures "
                "with matxfer shift"
            )
        if data is not None:
            _measure_labels(record, plugin, data, model, target, split_column, structure_column)
    elif data is not None or source_data is not None:
        loaded = load_for(record, plugin, model)
        if data is not None:
            measure(
                record, loaded, data, split_column=split_column, structure_column=structure_column,
                on_progress=on_progress,
            )  # fmt: skip
        if source_data is not None:
            compare_with_source(
                record, loaded, source_data, data, sample=sample,
                structure_column=structure_column, on_progress=on_progress,
            )  # fmt: skip
    write_text(Path(output), page(record))
    return record


def _measure_labels(
    record: Record,
    classifier: Any,
    data: Any,
    model: Any,
    target: str | None,
    split_column: str | None,
    structure_column: str | None,
) -> None:
    # scikit-learn is of no use to other pages.
    from matxfer.report.labels import measure_labels

    measure_labels(
        record, classifier, data, target=target, model=model, split_column=split_column,
        structure_column=structure_column,
    )  # fmt: skip


def page(record: Record) -> str:
    """Return the page of a plugin or classifier."""
    title = f"{record.name}: {_of(record)}"
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="referrer" content="no-referrer">'),
        Markup('<link rel="icon" href="data:,">'),  # or else a server would be asked for one
        tag("title", title),
        Markup(f"<style>{_STYLE}</style>"),
    )
    body = tag("body", _header(record), tag("main", *all_sections(record)), _footer())
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _header(record: Record) -> Markup:
    lead: Any
    try:
        lead = tag("p", headline(record), class_="lead")
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        lead = missing(f"the figures of {record.file} cannot be read ({error!r:.120})")
    kind = "classifier" if record.is_classifier else "plugin"
    of = tag("p", f"A {kind} that predicts {_of(record)}", class_="lead")
    return tag("header", tag("h1", record.name), of, lead)


def _of(record: Record) -> str:
    """Return what is predicted; a stranger's file may say it in any type."""
    try:
        return subject(record)
    except (AttributeError, TypeError, ValueError, LookupError):
        return "something that cannot be read"


def _footer() -> Markup:
    from matxfer.provenance import versions

    made = f"Made by matxfer {versions()['matxfer']}. This page loads nothing from a network."
    return tag("footer", made)
