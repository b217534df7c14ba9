"""A plugin's card: as text for people, and as the README of its repository on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.files import POTENTIAL_KIND
from matxfer.plugin_files import META, WEIGHTS, read_plugin
from matxfer.sharing.listing import headline, target_of
from matxfer.terminal import coverage_line, figures_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matxfer.plugin_files import PluginFiles

#: Keys of the card's last section, where ``plugin.json`` has them.
_TRAINING = ("seconds", "command", "date")
_METRICS = {"mae": "MAE", "rmse": "RMSE", "r2": "R²"}


def card_text(path: str | Path) -> str:
    """Return what a plugin says of itself, section by section.

    Parameters
    ----------
    path
        Its folder, packed file or ``hf://user/name[@revision]``.

    Raises
    ------
    FormatError
        If it cannot be read.

    Examples
    --------
    >>> from matxfer.sharing import card_text
    >>> print(card_text("bulk-plugin").splitlines()[1].strip())
    bulk_modulus_gpa, GPa
    """
    files = read_plugin(path)
    facts = files.facts()
    size = sum(map(len, files.content.values())) / 1e6
    unit = facts.get("unit")
    lines = [
        f"{files.name}  ({files.path})",
        f"  {target_of(facts)}" + (f", {unit}" if unit else ""),
        f"  on {_base(facts)}, {facts.get('frozen_depth')} layers frozen",
        f"  {size:.2f} MB, format {facts.get('format')}"
        + (", packed" if files.path.is_file() else ""),
    ]
    if chosen := facts.get("chosen"):
        lines.append(f"  chosen: {chosen}")
    sections = {
        "errors": _errors(facts),
        "data": _data(facts),
        "training": _training(facts, files),
    }
    for title, section in sections.items():
        lines += ["", title, *(f"  {line}" for line in section)]
    return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """Return text without what could move a terminal's cursor; a stranger may have written it."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _base(facts: dict[str, Any]) -> str:
    base = facts.get("base")
    if not isinstance(base, dict):
        return "an unnamed model"
    return f"{base.get('name')} (sha256 {str(base.get('sha256', ''))[:12]}…)"


def _errors(facts: dict[str, Any]) -> Iterator[str]:
    try:
        if facts.get("kind") == POTENTIAL_KIND:
            for part in ("validation", "test"):
                named = facts[part]
                yield f"{part}: " + ", ".join(
                    f"{key.replace('_', ' ')} {value:.4g}" for key, value in named.items()
                )
            return
        for part, figures in facts["figures"].items():
            yield f"{part:4} {figures_line(figures)}"
            if "coverage" in figures:
                yield f"     {coverage_line(figures)}"
    except (KeyError, TypeError, AttributeError, ValueError):
        yield "not told, or not readable"


def _data(facts: dict[str, Any]) -> Iterator[str]:
    data = facts.get("data")
    if not isinstance(data, dict):
        yield "not told"
        return
    rows = data.get("rows")
    counts = ", ".join(f"{k} {v}" for k, v in rows.items()) if isinstance(rows, dict) else "?"
    split = data.get("split_column")
    yield f"{_table(data)}: {counts}" + (f" (column {split})" if split else "")
    if checksum := data.get("sha256"):
        yield f"sha256 of the table: {checksum}"
    if symbols := element_symbols(facts):
        yield f"{len(symbols)} elements: {' '.join(symbols)}"


def _table(data: dict[str, Any]) -> str:
    return str(data.get("table") or data.get("frames") or "a table without a name")


def element_symbols(facts: dict[str, Any]) -> list[str]:
    """Return the symbols of the elements that a plugin was trained on."""
    from ase.data import chemical_symbols

    numbers = facts.get("elements")
    if not isinstance(numbers, list):
        return []
    return [chemical_symbols[z] for z in numbers if isinstance(z, int) and 0 < z < 119]


def _training(facts: dict[str, Any], files: PluginFiles) -> Iterator[str]:
    told = facts["provenance"] if isinstance(facts.get("provenance"), dict) else facts
    for key in _TRAINING:
        if key in told:
            yield f"{key}: {told[key]}"
    versions = told.get("versions")
    if isinstance(versions, dict):
        yield "versions: " + ", ".join(f"{k} {v}" for k, v in versions.items())
    yield f"sha256: {files.checksums().get(WEIGHTS, 'no weights')}"


# -- README of a repository -------------------------------------------------------------------
def readme(files: PluginFiles, repository: str, licence: str | None = None) -> str:
    """Return a model card for the Hub: YAML front matter, then text, all from ``plugin.json``.

    Parameters
    ----------
    files
        The plugin.
    repository
        ``user/name``.
    licence
        Identifier such as ``cc-by-4.0``; ``None``: unknown.
    """
    import yaml

    facts = files.facts()
    data = facts.get("data") if isinstance(facts.get("data"), dict) else {}
    base = facts.get("base") if isinstance(facts.get("base"), dict) else {}
    table = _table(data or {})
    front: dict[str, Any] = {
        "license": licence or "unknown",
        "library_name": "matxfer",
        "pipeline_tag": "tabular-regression",
        "tags": ["matxfer", "materials-science", "crystals", "transfer-learning"],
        "base_model": str((base or {}).get("name", "")),
        "datasets": [Path(table).stem],
        "model-index": [
            {
                "name": repository.partition("/")[2],
                "results": _results(facts, table),
            }
        ],
    }
    if not front["model-index"][0]["results"]:
        del front["model-index"]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{_body(files, facts, repository)}"


def _results(facts: dict[str, Any], table: str) -> list[dict[str, Any]]:
    """Return the errors on test rows as the Hub's ``model-index`` has them."""
    if facts.get("kind") == POTENTIAL_KIND:
        error, unit, rows = headline(facts)
        found = [] if error is None else [("mae", error, f"MAE of forces, {unit}")]
    else:
        try:
            test = facts["figures"]["test"]
            unit, rows = str(test.get("unit", "")), test["n"]
            found = [
                (key, float(test[key]), word + (f", {unit}" if unit and key != "r2" else ""))
                for key, word in _METRICS.items()
                if test.get(key) is not None
            ]
        except (KeyError, TypeError, AttributeError, ValueError):
            return []
    if not found:
        return []
    return [
        {
            "task": {"type": "tabular-regression", "name": target_of(facts)},
            "dataset": {"type": Path(table).stem, "name": f"{table}, {rows} test rows"},
            "metrics": [{"type": k, "value": v, "name": n} for k, v, n in found],
        }
    ]


def _body(files: PluginFiles, facts: dict[str, Any], repository: str) -> str:
    name, address = repository.partition("/")[2], f"hf://{repository}"
    what = target_of(facts)
    unit = f" ({facts['unit']})" if facts.get("unit") else ""
    uses = (
        f"matxfer relax *.cif -o relaxed.extxyz --plugin {address}\n"
        if facts.get("kind") == POTENTIAL_KIND
        else f"matxfer predict *.cif --plugin {address}\n"
    )
    blocks = {
        "Errors": _errors(facts),
        "Data": _data(facts),
        "Training": _training(facts, files),
    }
    text = "".join(
        f"\n## {title}\n\n```text\n{_plain(lines)}\n```\n" for title, lines in blocks.items()
    )
    return (
        f"# {name}\n\nA matxfer plugin for "
        f"{_plain([what])}{unit} of crystals, on the base model {_plain([_base(facts)])}. "
        f"It is a small file on top of that model ({META}, {WEIGHTS}), and its checksum is "
        "compared as it is loaded.\n\n"
        f"```sh\npip install 'matxfer[hub]'\n{uses}```\n{text}"
    )


def _plain(lines: Any) -> str:
    return "\n".join(printable(str(line)).replace("`", "'") for line in lines)
