"""One base model for all plugins of a call: the one given, or the one that they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matxfer.files import FormatError
from matxfer.model import DEFAULT_MODEL, Model, load_model
from matxfer.transfer.plugin import Plugin, load_plugin

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def with_base(
    plugins: Iterable[str | Path | Plugin], model: str | Path | Model | None = None
) -> tuple[Model, list[Plugin]]:
    """Return the base model and its plugins, loaded where they are folders.

    Parameters
    ----------
    plugins
        Plugins or their folders.
    model
        Base model, its name or its folder; ``None``: that of the first plugin, or without plugins
        the default model.

    Raises
    ------
    FormatError
        If a plugin cannot be read or belongs to another model.
    """
    waiting = list(plugins)
    base = model if isinstance(model, Model | None) else load_model(model)
    if base is None and waiting:
        first = waiting[0]
        waiting[0] = first = first if isinstance(first, Plugin) else load_plugin(first)
        base = first.base
    base = base or load_model(DEFAULT_MODEL)
    found = [p if isinstance(p, Plugin) else load_plugin(p, base) for p in waiting]
    for plugin in found:
        known = bool(base.checksum) and plugin.base.checksum == base.checksum
        if plugin.base is not base and not known:
            raise FormatError(
                f"plugin {plugin.name!r} belongs to model {plugin.base.name!r} "
                f"({plugin.base.checksum[:12]}…), but {base.name!r} ({base.checksum[:12]}…) was "
                "given; give the model it was trained on, or fine-tune again"
            )
    return base, found
