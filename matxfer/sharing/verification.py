"""Whether a plugin can be trusted to be whole and of use here, before anything of it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import MatxferError
from matxfer.files import POTENTIAL_KIND, FormatError
from matxfer.plugin_files import META, NAMES, WEIGHTS, format_problem, name_of, read_plugin

if TYPE_CHECKING:
    from pathlib import Path

    from matxfer.plugin_files import PluginFiles

_PREFIXES = {"property": ("head.", "delta.", "uncertainty."), "potential": ("head.", "layers.")}
#: NumPy's names for safetensors' kinds of numbers; bfloat16 has none, its exponent is looked at.
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_BF16_INFINITE = 0x7F80


def verify(path: str | Path, model: str | Path | None = None) -> dict[str, Any]:
    """Check a plugin: names, sizes, formats, checksums, numbers, its base; then that it loads.

    Each step is only taken if those before it found nothing wrong.

    Parameters
    ----------
    path
        Its folder, packed file or ``hf://user/name[@revision]``.
    model
        Its base, by name or folder; ``None``: the one that it names.

    Returns
    -------
    dict
        For JSON: ``ok``, ``problems`` (each with ``file``, ``what`` and ``remedy``), ``notes``,
        and ``name``, ``kind``, ``format``, ``base`` and ``files`` as far as they were reached.

    Examples
    --------
    >>> from matxfer.sharing import verify
    >>> verify("bulk-plugin")["ok"]
    True
    >>> verify("nowhere")["problems"][0]["remedy"]
    'check the path, or fetch or train the plugin again'
    """
    found: dict[str, Any] = {"plugin": str(path), "ok": False, "problems": [], "notes": []}
    try:
        _check(found, path, model)
    except (MatxferError, OSError) as error:
        what, _, remedy = str(error).partition("; ")
        place = min((n for n in NAMES if n in what), key=what.index, default=str(path))
        found["problems"].append({"file": place, "what": what, "remedy": remedy})
    found["ok"] = not found["problems"]
    return found


def _check(found: dict[str, Any], path: str | Path, model: str | Path | None) -> None:
    files = read_plugin(path)
    facts = files.facts()
    kind = "potential" if facts.get("kind") == POTENTIAL_KIND else "property"
    sums = files.checksums()
    found |= {
        "name": files.name,
        "kind": kind,
        "format": facts.get("format"),
        "files": {n: {"bytes": len(d), "sha256": sums[n]} for n, d in files.content.items()},
    }
    found["notes"] += _notes(files, facts)
    if problem := format_problem(facts):
        raise FormatError(f"{files.place(META)}: {'; '.join(problem)}")
    if WEIGHTS not in files.content:
        raise FormatError(
            f"{files.place(WEIGHTS)}: there is no such file; fetch or train the plugin again"
        )
    files.check_weights(facts)
    _check_tensors(files, _PREFIXES[kind])
    base = facts.get("base")
    if not isinstance(base, dict) or not {"name", "sha256"} <= set(base):
        raise FormatError(f"{files.place(META)}: names no base; fetch or train the plugin again")
    found["base"] = {"name": str(base["name"]), "sha256": str(base["sha256"]), "found": False}
    _load(files, kind, model)
    found["base"]["found"] = True


def _notes(files: PluginFiles, facts: dict[str, Any]) -> list[str]:
    notes = []
    if files.path.is_dir():
        others = sorted(
            p.name for p in files.path.iterdir() if p.name not in NAMES and p.name[0] != "."
        )
        if others:
            notes.append(f"other files in the folder, which are not read: {', '.join(others)}")
    if "sha256" not in facts:
        notes.append(
            f"{META} names no checksum of the weights, as before matxfer kept it, so only their "
            f"format was checked; matxfer plugins pack {name_of(files.path)} adds it"
        )
    return notes


def _check_tensors(files: PluginFiles, prefixes: tuple[str, ...]) -> None:
    """Check the weights file itself: its header, its names, and that its numbers are numbers."""
    from safetensors import SafetensorError, deserialize

    place = files.place(WEIGHTS)
    try:
        tensors = deserialize(files.content[WEIGHTS])
    except (SafetensorError, ValueError, TypeError) as error:
        raise FormatError(
            f"{place}: not readable as safetensors ({error}); fetch or train the plugin again"
        ) from error
    for name, tensor in tensors:
        if not name.startswith(prefixes):
            raise FormatError(
                f"{place}: {name[:80]!r} does not belong into a plugin; fetch or train it again"
            )
        if not _is_finite(tensor["dtype"], bytes(tensor["data"])):
            raise FormatError(f"{place}: {name} holds infinities or NaN; train the plugin again")


def _is_finite(kind: str, data: bytes) -> bool:
    if kind == "BF16":
        bits = np.frombuffer(data, "<u2") & _BF16_INFINITE
        return not (bits == _BF16_INFINITE).any()
    if kind not in _FLOATS:
        return True
    return bool(np.isfinite(np.frombuffer(data, _FLOATS[kind])).all())


def _load(files: PluginFiles, kind: str, model: str | Path | None) -> None:
    """Load the plugin on its base, which compares the base's checksum and all shapes."""
    if kind == "potential":
        from matxfer.potential.model import load_potential
        from matxfer.potential.plugin import load_potential_plugin

        load_potential_plugin(files.path, load_potential(model) if model else None)
    else:
        from matxfer.model import load_model
        from matxfer.transfer.plugin import load_plugin

        load_plugin(files.path, load_model(model) if model else None)
