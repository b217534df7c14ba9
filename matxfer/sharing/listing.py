"""What plugins there are in a folder: a row for each, those that cannot be read too."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.errors import MatxferError
from matxfer.files import POTENTIAL_KIND, FormatError
from matxfer.plugin_files import (
    META,
    PACKED_SUFFIX,
    WEIGHTS,
    PluginFiles,
    format_problem,
    name_of,
    read_plugin,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What the errors of a potential's plugin are called, and by how much a unit for people is larger.
_POTENTIAL_ERRORS = (
    ("forces_mae_ev_per_a", 1.0, "eV/Å"),
    ("energy_mae_ev_per_atom", 1e3, "meV/atom"),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """A plugin in a few words; ``problem`` says why it cannot be used, if so.

    Examples
    --------
    >>> from matxfer.sharing import summary
    >>> summary("nowhere").problem
    'nowhere/plugin.json: there is no such file'
    """

    path: str
    name: str
    kind: str = "property"
    target: str = ""
    unit: str = ""
    base: str = ""
    test_error: float | None = None
    test_error_unit: str = ""
    test_rows: int | None = None
    megabytes: float | None = None
    format: int | None = None
    packed: bool = False
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all fields for JSON."""
        return asdict(self)


def find_plugins(folder: str | Path = ".") -> Iterator[Summary]:
    """Yield the plugins in a folder and in those below it, by path.

    Parameters
    ----------
    folder
        Where to look. Hidden folders and links to folders are passed over.

    Raises
    ------
    FormatError
        If there is no such folder.

    Examples
    --------
    >>> import matxfer, matxfer.sharing
    >>> plugin = matxfer.finetune(
    ...     "solids.parquet", "bulk_modulus_gpa", "found/bulk", model="mp-small",
    ...     strategy="features", features="ridge",
    ... )
    >>> [(p.name, p.target, p.unit, p.base) for p in matxfer.sharing.find_plugins("found")]
    [('bulk', 'bulk_modulus_gpa', 'GPa', 'mp-small')]
    """
    root = Path(folder)
    if not root.is_dir():
        raise FormatError(f"{root}: there is no such folder; give one that holds plugins")
    for here, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = Path(here)
        if META in files:
            yield summary(place)
        for name in sorted(files):
            if name.lower().endswith(PACKED_SUFFIX) and not name.startswith("."):
                yield summary(place / name)


def summary(path: str | Path) -> Summary:
    """Return what there is to know of a plugin at a glance; it never raises for a bad one.

    Examples
    --------
    >>> from matxfer.sharing import summary
    >>> plugin = summary("bulk-plugin")
    >>> plugin.target, plugin.base, plugin.format
    ('bulk_modulus_gpa', 'mp-small', 3)
    """
    place = Path(path)
    name = name_of(place)
    packed = place.is_file()
    if not packed and not (place / META).is_file() and not str(path).startswith("hf:/"):
        return Summary(str(path), name, problem=f"{place / META}: there is no such file")
    try:
        files = read_plugin(path)
        facts = files.facts()
    except (MatxferError, OSError) as error:
        return Summary(str(path), name, packed=packed, problem=str(error))
    problem = format_problem(facts)
    value, unit, rows = headline(facts)
    base = facts.get("base")
    number = facts.get("format")
    return Summary(
        str(path),
        files.name,
        kind="potential" if facts.get("kind") == POTENTIAL_KIND else "property",
        target=target_of(facts),
        unit=str(facts.get("unit", "")),
        base=str(base.get("name", "")) if isinstance(base, dict) else "",
        test_error=value,
        test_error_unit=unit,
        test_rows=rows,
        megabytes=round(sum(map(len, files.content.values())) / 1e6, 3),
        format=number if isinstance(number, int) else None,
        packed=packed,
        problem="; ".join(problem) if problem else _weights_problem(files, facts),
    )


def _weights_problem(files: PluginFiles, facts: dict[str, Any]) -> str | None:
    if WEIGHTS not in files.content:
        return f"{files.place(WEIGHTS)}: there is no such file; fetch or train the plugin again"
    try:
        files.check_weights(facts)
    except MatxferError as error:
        return str(error)
    return None


def target_of(facts: dict[str, Any]) -> str:
    """Return the property of a plugin, or what one of a potential predicts."""
    if facts.get("kind") == POTENTIAL_KIND:
        return "energy, forces, stress"
    return str(facts.get("target", ""))


def headline(facts: dict[str, Any]) -> tuple[float | None, str, int | None]:
    """Return a plugin's error on its test rows, its unit, and how many rows there were."""
    try:
        if facts.get("kind") == POTENTIAL_KIND:
            for key, scale, unit in _POTENTIAL_ERRORS:
                if (value := facts["test"].get(key)) is not None:
                    return scale * float(value), unit, facts["data"]["rows"].get("test")
            return None, "", None
        from matxfer.model import headline_figure

        figures = facts["figures"]["test"]
        if not figures.get("n"):
            return None, str(figures.get("unit", "")), 0
        return *headline_figure(figures), int(figures["n"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return None, "", None
