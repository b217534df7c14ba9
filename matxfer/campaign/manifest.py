"""``manifest.json``: what a folder of parts was computed from and with, and what is in it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matxfer.batch.units import count_of
from matxfer.errors import MatxferError
from matxfer.files import read_json
from matxfer.provenance import provenance
from matxfer.readers import expand
from matxfer.readers.formats import streamed_kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
_HEX = 16


class CampaignError(MatxferError):
    """A folder of parts that does not go with what was asked: what differs, and what to do."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What can be told of a list of files without reading them.

    Parameters
    ----------
    facts
        Number of files, bytes, and digests of names, sizes and times of change: equal facts are
        taken for equal inputs.
    structures
        How many structures there are, as far as names and tables tell it; None if they do not.
    """

    facts: dict[str, Any]
    structures: int | None


def look_at(inputs: Iterable[str | Path]) -> Inputs:
    """Return the facts about the files that the inputs stand for.

    Raises
    ------
    CampaignError
        If one of them is standard input, which cannot be read again.
    """
    names, sizes, times = (hashlib.sha256() for _ in range(3))
    files = total = structures = 0
    countable = True
    for path in expand(inputs):
        if streamed_kind(path) is not None:
            raise CampaignError(
                f"{path}: standard input cannot be gone on with after an interruption; "
                "write it into a file, or give -o FILE instead of a folder"
            )
        try:
            status = path.stat()
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:
            size, changed = -1, 0
        for digest, text in ((names, str(path)), (sizes, str(size)), (times, str(changed))):
            digest.update(text.encode(errors="surrogateescape") + b"\0")
        files += 1
        total += max(size, 0)
        count = count_of(path)
        countable &= count is not None
        structures += count or 0
    facts = {
        "files": files,
        "bytes": total,
        "names": names.hexdigest()[:_HEX],
        "sizes": sizes.hexdigest()[:_HEX],
        "times_of_change": times.hexdigest()[:_HEX],
    }
    return Inputs(facts, structures if countable else None)


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield what is not the same in two JSON values, one clause each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(before.get(key), now.get(key), inner)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for k, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{name}[{k}]")
    elif before != now:
        yield f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def begin(folder: Path, settings: dict[str, Any], *, resume: bool, alone: bool) -> None:
    """Write the manifest of a new folder, or check that an old one says the same.

    Several processes may do so at once; the first one writes.

    Parameters
    ----------
    settings
        All that decides the rows.
    resume
        Whether the folder may hold parts already.
    alone
        Whether this is the only process. Of several, all but the first find a manifest.

    Raises
    ------
    CampaignError
        If the folder belongs to another prediction, or to this one and ``resume`` is not set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    text = json.dumps(
        {
            "format": MANIFEST_FORMAT,
            "complete": False,
            "settings": settings,
            "provenance": provenance(),
        },
        indent=1,
        ensure_ascii=False,
    )
    if not path.exists():
        if any(folder.glob("part-*.parquet")):
            raise CampaignError(
                f"{folder}: there are parts, but no {MANIFEST} that says what they are; "
                "give another folder"
            )
        if _write_first(path, text):
            return
    before = read_json(path, MANIFEST_FORMAT).get("settings")
    different = list(differences(before, settings))
    if different:
        raise CampaignError(
            f"{folder}: this folder holds another prediction: {'; '.join(different[:5])}; "
            "give another folder, or go on with what it was begun with"
        )
    if alone and not resume:
        raise CampaignError(
            f"{folder}: this prediction has been begun already; go on with --resume, "
            "or give another folder"
        )


def finish(folder: Path, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the manifest of a folder that has all its parts, and return it.

    Parameters
    ----------
    parts
        Name, rows, and failed rows by kind, of each part.
    """
    path = folder / MANIFEST
    data = read_json(path, MANIFEST_FORMAT)
    kinds: dict[str, int] = {}
    for part in parts:
        for kind, count in part["errors"].items():
            kinds[kind] = kinds.get(kind, 0) + count
    data |= {
        "complete": True,
        "rows": sum(part["rows"] for part in parts),
        "failed": sum(kinds.values()),
        "errors": dict(sorted(kinds.items())),
        "parts": parts,
    }
    temporary = _temporary(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)
    return data


def _write_first(path: Path, text: str) -> bool:
    """Write a file, whole, unless another process has done so; return whether it was this one."""
    temporary = _temporary(path, text + "\n")
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        temporary.replace(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _temporary(path: Path, text: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary = path.with_name(os.path.basename(name))  # noqa: PTH119 - a name from the OS
    temporary.chmod(0o644)
    return temporary
