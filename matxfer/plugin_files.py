"""A plugin's files: a folder of two, the same in one packed file, or on the Hugging Face Hub.

``plugin.json`` holds the SHA-256 of ``plugin.safetensors``, so that weights are never taken for
those of another file of facts. Everything is checked here before it is given to anybody: names,
sizes, checksums, versions. Nothing is unpacked to disk to be read, and no pickle is ever loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.files import PLUGIN_FORMAT, FormatError, json_text, parse_json
from matxfer.hub import is_remote, local_folder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_log = logging.getLogger(__name__)
WEIGHTS, META = "plugin.safetensors", "plugin.json"
#: In the order in which a packed file holds them.
NAMES = (META, WEIGHTS)
#: What the name of a packed file ends in.
PACKED_SUFFIX = ".matxfer.zip"
#: Formats that are read: 2 has its weights in half precision, 3 in 8 bits, where that is enough.
READABLE = (2, PLUGIN_FORMAT)
MIB = 1 << 20
#: Largest files that are read; plugins of the shipped models are smaller than 2 MiB.
LIMITS = {META: 16 * MIB, WEIGHTS: 512 * MIB}
_MADE_AGAIN = "fetch it again, or ask for it again"
_ENCRYPTED = 0x1


@dataclass(frozen=True, slots=True)
class PluginFiles:
    """What is in the two files of a plugin, read once.

    Parameters
    ----------
    path
        Its folder, or its packed file.
    content
        Bytes of each file by its name; the weights are missing where only facts were asked for.
    """

    path: Path
    content: dict[str, bytes]

    @property
    def name(self) -> str:
        """Name of the folder, or of the packed file without its suffix."""
        return name_of(self.path)

    def place(self, name: str) -> str:
        """Return what messages call one of the files."""
        return str(self.path / name)

    def facts(self) -> dict[str, Any]:
        """Return what ``plugin.json`` says, whatever its format, under the name of the folder."""
        facts = parse_json(self.content[META], self.place(META))
        return {**facts, "name": self.name} if "name" in facts else facts

    def meta(self) -> dict[str, Any]:
        """Return what ``plugin.json`` says.

        Raises
        ------
        FormatError
            If it is damaged, or of a format that is not read: what to do then.
        """
        facts = self.facts()
        if problem := format_problem(facts):
            raise FormatError(f"{self.place(META)}: {'; '.join(problem)}")
        return facts

    def checksums(self) -> dict[str, str]:
        """Return the SHA-256 of each file."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.content.items()}

    def check_weights(self, meta: dict[str, Any]) -> None:
        """Check that the weights are those that ``plugin.json`` is about.

        Raises
        ------
        FormatError
            If they are not. Files of matxfer before it kept the checksum pass.
        """
        named = meta.get("sha256")
        if named is None:
            if not self.path.is_dir():
                raise FormatError(f"{self.place(META)}: names no checksum; {_MADE_AGAIN}")
            return
        if named != hashlib.sha256(self.content[WEIGHTS]).hexdigest():
            raise FormatError(
                f"{self.place(WEIGHTS)}: the checksum differs from the one in {META}: the file is "
                "damaged, or was being written when something stopped it; fetch or train it again"
            )

    def tensors(self, meta: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weights, once their checksum has been compared.

        Raises
        ------
        FormatError
            If they are missing, damaged or others.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        if WEIGHTS not in self.content:
            raise FormatError(
                f"{self.place(WEIGHTS)}: not readable: there is no such file; fetch or train the "
                "plugin again"
            )
        self.check_weights(meta)
        how = f"sha256 {meta['sha256'][:12]}…" if "sha256" in meta else "without a checksum"
        _log.info("plugin %s: %s, %s", self.name, self.path, how)
        try:
            return load(self.content[WEIGHTS])
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise FormatError(
                f"{self.place(WEIGHTS)}: not readable as safetensors ({error}); fetch or train the "
                "plugin again"
            ) from error


def name_of(path: Path) -> str:
    """Return the name of a plugin by its folder or packed file."""
    if path.name.lower().endswith(PACKED_SUFFIX):
        return path.name[: -len(PACKED_SUFFIX)]
    return path.name or path.resolve().name


def format_problem(facts: dict[str, Any]) -> tuple[str, str] | None:
    """Return what is wrong with the format that ``plugin.json`` names, and what to do; or None."""
    found = facts.get("format")
    if found in READABLE and not isinstance(found, bool):
        return None
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        return f"its format is {found!r}, so this is no plugin of matxfer", "check the path"
    reads = " and ".join(map(str, READABLE))
    what = f"format {found}, but this version of matxfer reads {reads}"
    made_by = _made_by(facts)
    if found > PLUGIN_FORMAT:
        return what, f"install a newer one (pip install --upgrade matxfer{made_by})"
    command = facts.get("command")
    again = f"with the command that made it: {command}" if isinstance(command, str) else ""
    return what, f"train it again {again}".strip() + (f"; or install{made_by[1:]}" * bool(made_by))


def _made_by(facts: dict[str, Any]) -> str:
    told = facts.get("versions")
    if told is None and isinstance(facts.get("provenance"), dict):
        told = facts["provenance"].get("versions")
    version = told.get("matxfer") if isinstance(told, dict) else None
    return f"; matxfer {version} made it" if isinstance(version, str) else ""


# -- reading ----------------------------------------------------------------------------------
def read_plugin(path: str | Path, names: Iterable[str] = NAMES) -> PluginFiles:
    """Read the files of a plugin.

    Parameters
    ----------
    path
        Folder, packed file (``NAME.matxfer.zip``) or ``hf://user/name[@revision]``.
    names
        Which of the two are wanted.

    Raises
    ------
    FormatError
        If there is no ``plugin.json`` there, or the packed file is not what :func:`packed` makes.
    HubError
        If the Hub does not give it.
    """
    place = local_folder(str(path), NAMES, _check_folder) if is_remote(path) else Path(path)
    if place.is_file():
        return PluginFiles(place, {n: d for n, d in _of_packed(place).items() if n in set(names)})
    content = {}
    for name in names:
        try:
            with (place / name).open("rb") as file:
                content[name] = file.read(LIMITS[name] + 1)
        except OSError as error:
            if name == META:
                raise FormatError(
                    f"{place / META}: not readable as JSON ({error}); check the path, or fetch or "
                    "train the plugin again"
                ) from error
            continue  # those who need the weights say so
        _check_size(place / name, name, len(content[name]))
    return PluginFiles(place, content)


def _check_folder(folder: Path) -> None:
    """Check what came from the Hub before it is kept."""
    files = read_plugin(folder)
    files.check_weights(files.meta())


def weights_checksum(path: Path) -> str:
    """Return the SHA-256 of a plugin's weights."""
    return read_plugin(path).checksums()[WEIGHTS]


def _check_size(place: Path, name: str, size: int) -> None:
    if size > LIMITS[name]:
        raise FormatError(f"{place}: larger than {LIMITS[name] // MIB} MiB, so no plugin's file")


def _of_packed(path: Path) -> dict[str, bytes]:
    """Return the two files in a packed one; whatever else could be in an archive is refused."""
    if path.name in NAMES:
        raise FormatError(f"{path}: a plugin is its folder; give {path.parent}")
    if (size := path.stat().st_size) > sum(LIMITS.values()) + MIB:
        raise _refused(path, f"{size // MIB} MiB are more than a plugin has")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [info.filename for info in members]
            if sorted(names) != sorted(NAMES):
                odd = [repr(name[:80]) for name in names if name not in NAMES] or names
                raise _refused(path, f"it holds {', '.join(odd[:3]) or 'nothing'}")
            for info in members:
                if wrong := _wrong_with(info):
                    raise _refused(path, wrong)
            return {name: archive.read(name) for name in NAMES}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"{path}: not readable as a packed plugin ({error}); {_MADE_AGAIN}"
        ) from error


def _wrong_with(info: zipfile.ZipInfo) -> str | None:
    """Return what a packed plugin does not have about a member; None if nothing."""
    name = info.filename
    if info.flag_bits & _ENCRYPTED:
        return f"{name} is encrypted"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        return f"{name} is a link or a folder"
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        return f"{name} is compressed"
    if info.file_size > LIMITS[name]:
        return f"{name} has more than {LIMITS[name] // MIB} MiB"
    return None


def _refused(path: Path, why: str) -> FormatError:
    return FormatError(
        f"{path}: {why}; a packed plugin holds {META} and {WEIGHTS}, stored as matxfer plugins "
        "pack does it, and nothing else, so this one is not opened"
    )


# -- writing ----------------------------------------------------------------------------------
def write_plugin(folder: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write the two files; return what ``plugin.json`` says, with the checksum of the weights.

    A kill at any moment leaves the old plugin, the new one, or one that is refused: never new
    weights that pass for those of the old file of facts.
    """
    from safetensors.torch import save

    weights = save({k: v.detach().contiguous().cpu() for k, v in tensors.items()})
    meta = with_checksum(meta, weights)
    write_files(folder, {META: json_bytes(meta), WEIGHTS: weights})
    return meta


def with_checksum(meta: dict[str, Any], weights: bytes) -> dict[str, Any]:
    """Return facts with the checksum of the weights that they are about."""
    return {**meta, "sha256": hashlib.sha256(weights).hexdigest()}


def json_bytes(meta: dict[str, Any]) -> bytes:
    """Return facts as ``plugin.json`` has them."""
    return json_text(meta).encode()


def write_files(folder: Path, content: dict[str, bytes]) -> None:
    """Write the two files into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f".{name}.part" for name in NAMES}
    for name, part in parts.items():
        part.write_bytes(content[name])
    try:  # old facts without a checksum could not tell that the weights are others
        keep = "sha256" in json.loads((folder / META).read_bytes())
    except (OSError, ValueError):
        keep = False
    if not keep:
        (folder / META).unlink(missing_ok=True)
    for name in (WEIGHTS, META):
        parts[name].replace(folder / name)


def packed(content: dict[str, bytes]) -> bytes:
    """Return the two files as one: a zip file, nothing compressed, the same bytes every time."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in NAMES:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content[name])
    return stream.getvalue()
