"""Where the figures of a file come from: model, plugins, checksums, units and versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.columns import INTEGERS, TEXTS
from matxfer.data.properties import unit_of
from matxfer.plugin_files import weights_checksum
from matxfer.provenance import versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matxfer.model import Model
    from matxfer.transfer.plugin import Plugin

#: Under this name it stands in the metadata of Parquet files and ASE databases.
KEY = "matxfer"
#: What is added to the name of a file that has no place for it (CSV, JSON lines, extxyz).
SIDECAR_SUFFIX = ".meta.json"
_ENDS = ("_std", "_lo", "_hi")


def describe_prediction(
    model: Model, plugins: Iterable[Plugin], columns: Sequence[str], **choices: Any
) -> dict[str, Any]:
    """Return what a file of predictions says about itself.

    Parameters
    ----------
    model, plugins
        What predicts. Checksums are SHA-256 of the files of weights.
    columns
        The columns that are written.
    **choices
        Further facts, such as the filter; those that are None are left out.

    Returns
    -------
    A dictionary for JSON. There is no date in it: the same run writes the same file again.
    """
    return {
        "model": {"name": model.name, "sha256": model.checksum},
        "plugins": [_plugin(plugin) for plugin in plugins],
        "units": {c: unit_of_column(c) for c in columns if c not in TEXTS | INTEGERS},
        "versions": versions(),
        **{name: choice for name, choice in choices.items() if choice is not None},
    }


def _plugin(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "target": plugin.target,
        "unit": plugin.meta.get("unit", unit_of(plugin.target)),
        "sha256": "" if plugin.folder is None else weights_checksum(plugin.folder),
    }


def unit_of_column(column: str) -> str:
    """Return the unit of a column of predictions, ``""`` if it has none (``ood``)."""
    if column == "ood" or column.endswith("_ood"):
        return ""
    property_, _, _ = column.partition("__")
    for end in _ENDS:
        property_ = property_.removesuffix(end)
    return unit_of(property_)


def sidecar_of(path: str | Path) -> Path:
    """Return the file of facts beside a file: ``out.csv.meta.json`` of ``out.csv``."""
    path = Path(path)
    return path.with_name(f"{path.name}{SIDECAR_SUFFIX}")


def write_sidecar(path: str | Path, metadata: dict[str, Any]) -> None:
    """Write the facts beside a file."""
    text = json.dumps(metadata, ensure_ascii=False, indent=2)
    sidecar_of(path).write_text(f"{text}\n", encoding="utf-8")
