"""Backbones and models of installed packages, found by the names under which they are declared.

A package declares a backbone in its ``pyproject.toml``, and a model that it brings likewise::

    [project.entry-points."matxfer.backbones"]
    schnet = "my_package:SchNetBackbone"

    [project.entry-points."matxfer.models"]
    my-model = "my_package:folder_of_my_model"   # returns the folder, made on first use

Files name a backbone by that name alone, so a file from a stranger can choose among what the user
has installed, and no more.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from matxfer.errors import MatxferError, OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from matxfer.nn.backbone import BackboneModule

BACKBONES, MODELS = "matxfer.backbones", "matxfer.models"
#: What pyproject.toml declares of our own, known without it: a checkout that was not installed
#: anew has old metadata, and our names are nobody else's to take.
OURS = {
    BACKBONES: {
        "edge_gated": "matxfer.nn.network:EdgeGatedNetwork",
        "chgnet": "matxfer.backbones.chgnet:CHGNetBackbone [chgnet]",
        "sevennet": "matxfer.backbones.sevennet:SevenNetBackbone [sevennet]",
    },
    MODELS: {
        "chgnet": "matxfer.backbones.chgnet_model:folder [chgnet]",
        "chgnet-potential": "matxfer.backbones.chgnet_model:potential_folder [chgnet]",
        "sevennet": "matxfer.backbones.sevennet_model:folder [sevennet]",
        "sevennet-potential": "matxfer.backbones.sevennet_model:potential_folder [sevennet]",
    },
}


class MissingPackageError(MatxferError):
    """A backbone or model is declared, but what it needs is not installed."""


def declared(group: str) -> dict[str, EntryPoint]:
    """Return what installed packages declare in a group, by name, ours first.

    Raises
    ------
    OptionError
        If two packages declare the same name for different things.
    """
    found = {name: EntryPoint(name, value, group) for name, value in OURS[group].items()}
    for entry in entry_points(group=group):
        known = found.setdefault(entry.name, entry)
        if entry.value != known.value and entry.name not in OURS[group]:
            raise OptionError(
                f"{entry.name!r} in {group} is declared as {known.value!r} by {origin(known)} "
                f"and as {entry.value!r} by {origin(entry)}; uninstall one of them"
            )
    return found


def origin(entry: EntryPoint) -> str:
    """Return the package that declares an entry."""
    if entry.dist is not None:
        return str(entry.dist.name)
    return "matxfer" if entry.name in OURS[entry.group] else entry.module


def load(entry: EntryPoint) -> Any:
    """Import what an entry declares.

    Raises
    ------
    MissingPackageError
        If a package that it needs is not installed, with the command that installs it.
    OptionError
        If it cannot be imported for another reason.
    """
    try:
        return entry.load()
    except ModuleNotFoundError as error:
        raise missing(entry, error) from error
    except (ImportError, AttributeError) as error:
        raise OptionError(
            f"{entry.name!r} of {origin(entry)} cannot be imported from {entry.value!r} "
            f"({error}); install that package again"
        ) from error


def missing(entry: EntryPoint, error: ModuleNotFoundError) -> MissingPackageError:
    """Return the error that tells what to install."""
    wanted = f"{origin(entry)}[{','.join(entry.extras)}]" if entry.extras else error.name
    return MissingPackageError(
        f"{entry.name!r} needs the package {error.name!r}, which is not installed: "
        f"pip install '{wanted}'"
    )


def backbone_class(kind: object) -> type[BackboneModule]:
    """Return the class of a backbone by the name that an installed package declares.

    Raises
    ------
    OptionError
        If no package declares it, or it is no class with ``from_config``.
    MissingPackageError
        If its package is not complete.
    """
    known = declared(BACKBONES)
    if not isinstance(kind, str) or kind not in known:
        raise OptionError(
            f"no installed package declares a backbone {kind!r}; there are {sorted(known)}: "
            "install the package that it comes from"
        )
    found: type[BackboneModule] = load(known[kind])
    if not hasattr(found, "from_config"):
        raise OptionError(
            f"{known[kind].value}, declared as backbone {kind!r}, has no from_config; see "
            "matxfer.nn.backbone.BackboneModule"
        )
    return found


def build_backbone(config: dict[str, Any]) -> BackboneModule:
    """Build the network that a card describes, with random weights.

    Raises
    ------
    KeyError, TypeError, ValueError
        If the description lacks something or is of another network.
    """
    return backbone_class(config["kind"]).from_config(config)


def folder_of(name: str) -> Path | None:
    """Return the folder of a model that an installed package declares, None if there is none.

    Raises
    ------
    MissingPackageError
        If its package is not complete.
    """
    entry = declared(MODELS).get(name)
    if entry is None:
        return None
    try:
        folder: Path = load(entry)()
    except ModuleNotFoundError as error:
        raise missing(entry, error) from error
    return folder
