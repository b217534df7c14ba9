"""Archives (zip, tar and compressed tar): the structure files in them, one at a time.

Nothing is ever unpacked to disk, so no name in an archive can point anywhere; links are not
followed. A member is read into memory up to a limit, whatever the archive says of its size.
"""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from matxfer.crystal import CrystalError
from matxfer.errors import ErrorKind
from matxfer.readers.content import MAX_PART_BYTES, MIB, Content, check_size, open_binary, read_part
from matxfer.readers.entry import describe
from matxfer.readers.formats import ASE_BY_PATH, NAMED_ONLY, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: A member's name, and its content or what is wrong with it.
Member: TypeAlias = tuple[str, Content | CrystalError]

_UNPACK = "unpack the archive first"
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _TarInfo(tarfile.TarInfo):
    """A header that refuses to be larger than any name or list of attributes."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _TarInfo:
        """Read a header; tarfile would read the whole text of an extended one into memory."""
        found = super().frombuf(buf, encoding, errors)
        if found.type in _HEADERS and found.size > MIB:
            raise CrystalError("an extended header of more than 1 MiB", "write the archive again")
        return found


def members(path: Path) -> Iterator[Member]:
    """Yield the structure files of an archive in its order, others passed over as in a folder.

    Parameters
    ----------
    path
        A zip file, or a tar file with or without compression; the content decides.

    Raises
    ------
    CrystalError
        If the archive cannot be read, or holds no structure files.
    """
    if path.stat().st_size == 0:
        raise CrystalError("the file is empty", "write the archive again", kind=ErrorKind.EMPTY)
    found = False
    with path.open("rb") as stream:
        zipped = stream.read(4).startswith(b"PK")
    for member in _of_zip(path) if zipped else _of_tar(path):
        found = True
        yield member
    if not found:
        raise CrystalError(
            "there are no structure files in this archive",
            "check its content and their suffixes",
            kind=ErrorKind.EMPTY,
        )


def _wanted(name: str) -> bool:
    """Return whether a member is read: as in a folder, known formats that are not hidden."""
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in path.parts)
    kind = kind_of(path)
    return kind is not None and not hidden and (kind == "archive" or kind not in NAMED_ONLY)


def _refusal(name: str) -> CrystalError | None:
    kind = kind_of(PurePosixPath(name)) or ""
    if kind in {"archive", "parquet", "db"} or kind.removeprefix("ase:") in ASE_BY_PATH:
        what = "archive" if kind == "archive" else f"{PurePosixPath(name).suffix} file"
        return CrystalError(f"an {what} inside an archive is not read", _UNPACK)
    return None


def _of_zip(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename
            if info.is_dir() or not _wanted(name):
                continue
            yield name, _refusal(name) or _of_zip_member(archive, info)


def _of_zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Content | CrystalError:
    if (info.external_attr >> 28) == 0o12:
        return CrystalError("a symbolic link inside an archive is not followed", _UNPACK)
    try:
        # What the header says is checked, and the size again as it is read.
        check_size(info.file_size, info.compress_size, MAX_PART_BYTES)
        with archive.open(info) as stream:
            return Content(PurePosixPath(info.filename), read_part(stream))
    except CrystalError as error:
        return error
    except Exception as error:  # noqa: BLE001 - one bad member must not hide the others
        return CrystalError(
            f"the member could not be read ({describe(error)})", "write the archive again"
        )


def _of_tar(path: Path) -> Iterator[Member]:
    with (
        open_binary(path) as stream,
        tarfile.open(fileobj=stream, mode="r|", tarinfo=_TarInfo) as archive,
    ):
        for info in archive:
            archive.members.clear()  # type: ignore[attr-defined] # else it keeps every header
            name = info.name
            if info.isdir() or not _wanted(name):
                continue
            yield name, _refusal(name) or _of_tar_member(archive, info)


def _of_tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Content | CrystalError:
    if not info.isreg() or info.issparse():
        return CrystalError("a link, device or sparse file inside an archive is not read", _UNPACK)
    if info.size > MAX_PART_BYTES:
        return CrystalError(f"too large: {info.size // MIB} MiB", _UNPACK, kind=ErrorKind.TOO_LARGE)
    stream = archive.extractfile(info)
    assert stream is not None
    data = read_part(stream)
    if len(data) != info.size:
        raise CrystalError("the archive ends in the middle of a file", "fetch it again")
    return Content(PurePosixPath(info.name), data)
