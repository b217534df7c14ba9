"""File formats in one place: versions, checksums, tensors as safetensors, metadata as JSON."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from matxfer.errors import MatxferError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MODEL_FORMAT = 1
PLUGIN_FORMAT = 3
ESTIMATOR_FORMAT = 1
#: What ``plugin.json`` says under ``kind`` where the plugin is that of a potential.
POTENTIAL_KIND = "potential"
_REMEDY = "check the path, or fetch or train the model or plugin again"


class FormatError(MatxferError):
    """A model or plugin folder that cannot be read: which file, what is wrong, what to do."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write indented JSON with a final newline, whole or not at all; flat lists in one line."""
    write_text(path, json_text(data))


def json_text(data: dict[str, Any]) -> str:
    """Return indented JSON with a final newline, flat lists in one line."""
    return _FLAT_LIST.sub(_in_one_line, json.dumps(data, indent=1, ensure_ascii=False)) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


#: A list without lists and objects in it. JSON writes line ends in texts as escapes, so that a
#: bracket at the end of a line is never part of one.
_FLAT_LIST = re.compile(r"\[\n[^\[\]{}]*\n *\]")


def _in_one_line(found: re.Match[str]) -> str:
    return re.sub(r"\n *", " ", found[0]).replace("[ ", "[", 1)[:-2] + "]"


def read_json(path: Path, expected_format: int | None = None) -> dict[str, Any]:
    """Read a JSON object and check its ``format`` version.

    Raises
    ------
    FormatError
        If the file is missing, is not a JSON object or has another version.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: not readable as JSON ({error}); {_REMEDY}") from error
    data = parse_json(content, str(path))
    if expected_format is not None and data.get("format") != expected_format:
        raise FormatError(
            f"{path}: format {data.get('format')!r}, but this version of matxfer reads "
            f"{expected_format}; install the matxfer version named in the file, or train it again"
        )
    return data


def parse_json(content: bytes, place: str) -> dict[str, Any]:
    """Read a JSON object from the bytes of a file.

    Raises
    ------
    FormatError
        If it is not one.
    """
    try:
        data = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{place}: not readable as JSON ({error}); {_REMEDY}") from error
    if not isinstance(data, dict):
        raise FormatError(
            f"{place}: expected a JSON object, found {type(data).__name__}; {_REMEDY}"
        )
    return data


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.part")
    # Copies: tensors that share memory, such as tied weights, are refused.
    save_file({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, temporary)
    temporary.chmod(0o644)  # weights are for everyone who may read the folder
    temporary.replace(path)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a safetensors file's tensors, from its header alone.

    Raises
    ------
    FormatError
        If it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: not readable as safetensors ({error}); {_REMEDY}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises
    ------
    FormatError
        If it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: not readable as safetensors ({error}); {_REMEDY}") from error
