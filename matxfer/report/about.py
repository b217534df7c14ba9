"""What a plugin is, its data, where it came from, how it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matxfer.errors import MatxferError
from matxfer.html import facts, join, table, tag
from matxfer.plot.style import quantity
from matxfer.report.classes import classes_headline, classes_subject
from matxfer.report.parts import elements_figure, files_table, listed, missing
from matxfer.report.record import ALL
from matxfer.transfer.summary import overview

if TYPE_CHECKING:
    from matxfer.report.record import Record


def headline(record: Record) -> str:
    """Return the one figure of a plugin, in words."""
    if record.is_classifier:
        return classes_headline(record)
    meta = record.meta
    for part in record.parts:
        figures = (meta.get("figures") or {}).get(part) or {}
        if figures.get("n"):
            unit = f" {figures['unit']}" if figures.get("unit") else ""
            of = "" if part == ALL else f"{part} "
            return f"MAE {float(figures['mae']):.3g}{unit} on {int(figures['n']):,} {of}rows"
    if record.is_potential and meta.get("test"):
        error = meta["test"].get("forces_mae_ev_per_a")
        return "" if error is None else f"forces MAE {float(error):.3g} eV/Å on test frames"
    return ""


def subject(record: Record) -> str:
    """Return what the plugin predicts, in words."""
    if record.is_classifier:
        return classes_subject(record)
    if record.is_potential:
        return "energies, forces and stresses"
    unit = record.meta.get("unit")
    return f"{quantity(str(record.meta.get('target', 'unknown')))}{f' ({unit})' if unit else ''}"


def about_section(record: Record) -> Any:
    """Return what the plugin is, and its files."""
    meta = record.meta
    parts = [overview(meta)]
    if record.is_potential:
        base = meta.get("base") or {}
        parts = [
            facts(
                {
                    "kind": "potential: energies, forces, stresses",
                    "base potential": f"{base.get('name')} ({str(base.get('sha256'))[:12]}…)",
                    "frozen layers": meta.get("frozen_depth"),
                }
            )
        ]
    parts.append(files_table(record.files))
    return join(parts)


def data_section(record: Record) -> Any:
    """Return rows, split, checksum and elements of the training table."""
    meta, data = record.meta, record.meta.get("data") or {}
    if not data:
        return missing("plugin.json says nothing of the data")
    name = data.get("table") or data.get("frames")
    about = {
        "table": name,
        "SHA-256": tag("code", data["sha256"]) if data.get("sha256") else None,
        "split": data.get("split_column") or "at random",
        "left out": listed(data.get("rows_excluded")) or "nothing",
    }
    if "copies" in data:
        about["copies of materials"] = data["copies"]
    if "leak" in data:
        val, test = (data["leak"].get(part, 0) for part in ("val", "test"))
        told = f"{val} of val, {test} of test: their errors flatter" if val or test else "none"
        about["materials in two parts of the split"] = told
    values = data.get("values") or {}
    target, unit = meta.get("target"), meta.get("unit")
    of = f" ({unit})" if unit else ""
    rows: list[tuple[Any, ...]] = []
    for part, count in (data.get("rows") or {}).items():
        span = values.get(part) or {}
        rows.append((part, count, span.get("min"), span.get("median"), span.get("max")))
    head: tuple[str, ...] = ("rows of", "n", f"smallest{of}", "median", "largest")
    if not values:
        head, rows = head[:2], [each[:2] for each in rows]
    parts: list[Any] = [facts(about), table(head, rows, None if record.is_potential else target)]
    parts.append(elements_figure(meta.get("elements") or ()))
    return join(parts)


def provenance_section(record: Record) -> Any:
    """Return command, date, versions, seconds and the notes of this report."""
    meta = record.meta
    origin = meta.get("provenance") or meta
    seconds = origin.get("seconds")
    about = {
        "command": tag("code", origin["command"]) if origin.get("command") else None,
        "date": origin.get("date"),
        "took": None if seconds is None else f"{float(seconds):,.1f} s",
        "versions": listed(origin.get("versions"), " "),
    }
    config = meta.get("config") or meta.get("configuration") or {}
    about["seed"] = config.get("seed", config.get("random_state"))
    settings = tag(
        "details",
        tag("summary", "All settings"),
        facts({key: _setting(value) for key, value in config.items()}),
    )
    notes = [tag("p", note) for note in record.notes]
    return join([facts(about), settings if config else "", *notes])


def _setting(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def use_section(record: Record) -> Any:
    """Return commands to use the plugin, and what to cite."""
    name = record.name
    if record.is_classifier:
        lines = [
            "from matxfer import TransferClassifier",
            f"classifier = TransferClassifier.load({name!r})",
            "classifier.predict_proba(structures)  # a column for each of classifier.classes_",
        ]
    elif record.is_potential:
        lines = [
            f"matxfer relax *.cif -o relaxed.extxyz --plugin {name}",
            f"matxfer md start.cif -o run.extxyz --ensemble nvt --temperature 300 --plugin {name}",
        ]
    else:
        lines = [
            f"matxfer predict *.cif --plugin {name}",
            f"matxfer evaluate TABLE --target {record.meta.get('target')} --plugin {name}",
        ]
    base = record.meta.get("base") or {}
    parts = [
        tag("pre", tag("code", "\n".join(lines))),
        tag(
            "p",
            "Cite matxfer (CITATION.cff), the data behind the base model and the table that this "
            "was trained on. The base model must be the one with the checksum above; no code is "
            "loaded.",
        ),
    ]
    citations, licence = _citations(base)
    if licence:
        parts.append(tag("p", f"Licence of the base model {base.get('name')}: {licence}"))
    if citations:
        parts.append(tag("ul", *(tag("li", each) for each in citations)))
    return join(parts)


def _citations(base: dict[str, Any]) -> tuple[list[str], str]:
    """Return what the card of the base model says, if it is here and is the one meant."""
    from matxfer.model import find_model

    try:
        card = find_model(str(base.get("name")))[1]
    except MatxferError:
        return [], ""
    if card.get("sha256") != base.get("sha256"):
        return [], ""
    return [str(each) for each in card.get("citation", [])], str(card.get("licence", ""))
