"""Options and arguments that name a model, a plugin or a dataset; a shell completes them.

What a shell asks has to be answered at once: nothing heavy is imported, and of folders only so many
are looked into.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matxfer.nn.registry import MODELS, declared
from matxfer.shipped import CARD, model_folders, models_in

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What makes a folder that of a plugin, and a file that of a packed one.
_META, _PACKED = "plugin.json", ".matxfer.zip"
#: A saved classifier has a report too.
_ESTIMATOR = "estimator.json"
#: So deep below what has been typed, and so many folders are looked into.
_DEPTH, _MOST = 3, 400


def model_names(incomplete: str) -> list[str]:
    """Return the shipped models, those of installed packages, and folders of models.

    Examples
    --------
    >>> from matxfer.cli_names import model_names
    >>> model_names("mp-s")
    ['mp-small']
    """
    named = [*models_in(model_folders()), *declared(MODELS)]
    found = sorted({name for name in named if name.startswith(incomplete)})
    return [*found, *_places(incomplete, CARD)]


def several_models(incomplete: str) -> list[str]:
    """Return the same for the last of names with commas between them."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in model_names(last)]


def plugin_places(incomplete: str) -> list[str]:
    """Return folders of plugins and packed ones, by their paths, as matxfer plugins list does."""
    return _places(incomplete, _META)


def report_places(incomplete: str) -> list[str]:
    """Return what has a report: plugins and saved classifiers."""
    return sorted({*_places(incomplete, _META), *_places(incomplete, _ESTIMATOR)})


def dataset_names(incomplete: str) -> list[str]:
    """Return the datasets that have a card."""
    from matxfer.datasets.card import available_datasets

    return [name for name in available_datasets() if name.startswith(incomplete)]


def _places(incomplete: str, file: str) -> list[str]:
    """Return paths that begin with what has been typed, of folders that hold a file."""
    typed = os.path.expanduser(incomplete) if incomplete.startswith("~/") else incomplete  # noqa: PTH111
    start, _, _ = typed.rpartition("/")
    root = Path(start or ("/" if typed.startswith("/") else "."))
    prefix = f"{start}/" if "/" in typed else ""
    found = [prefix + below for below in _below(root, file) if (prefix + below).startswith(typed)]
    if typed != incomplete:  # as it was typed, not as the shell would have it
        home = typed[: len(typed) - len(incomplete) + 1]
        found = [f"~{path.removeprefix(home)}" for path in found]
    return sorted(found)


def _below(root: Path, file: str) -> Iterator[str]:
    """Yield folders that hold a file, and packed plugins, by their paths below a root, near first.

    Hidden folders and links to folders are passed over, as in :mod:`matxfer.sharing.listing`.
    """
    waiting, looked = [("", 0)], 0
    while waiting and looked < _MOST:
        (here, depth), looked = waiting.pop(0), looked + 1
        try:
            entries = sorted(os.scandir(root / here), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            path = f"{here}{entry.name}"
            if entry.name.startswith(".") or not entry.name.isprintable():
                continue
            if entry.is_dir(follow_symlinks=False):
                if Path(entry.path, file).is_file():
                    yield path
                if depth < _DEPTH:
                    waiting.append((f"{path}/", depth + 1))
            elif file == _META and entry.name.endswith(_PACKED):
                yield path


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="Base model: a shipped one by name, or its folder.",
        autocompletion=model_names,
    ),
]
#: Where plugins may say which model is theirs.
ModelOfPlugins = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Base model, by name or folder (that of the plugin, or mp-base).",
        autocompletion=model_names,
    ),
]
