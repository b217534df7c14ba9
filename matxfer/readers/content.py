"""Bytes of a file, wherever it lies, with bounds on what compressed ones may grow to."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, BinaryIO, TextIO, TypeAlias, cast

from matxfer.crystal import CrystalError
from matxfer.errors import ErrorKind

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 2**20
#: Largest member of an archive, frame of a trajectory, block or line of standard input.
MAX_PART_BYTES = 256 * MIB
#: Largest file that is read whole; the largest sets of structures in one JSON file are below.
MAX_FILE_BYTES = 4096 * MIB
#: Texts of structures shrink by 3 to 50; beyond this a file was made to fill the memory.
MAX_RATIO = 250
#: So much a compressed file may grow to whatever its ratio: a small repetitive file harms nobody.
FREE_BYTES = 64 * MIB

_OPENERS: tuple[tuple[bytes, Callable[[IO[bytes]], IO[bytes]]], ...] = (
    (b"\x1f\x8b", lambda file: cast("IO[bytes]", gzip.GzipFile(fileobj=file))),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)


@dataclass(frozen=True, slots=True)
class Content:
    """A file that is none of its own on disk, such as the member of an archive.

    Parameters
    ----------
    path
        Its name there. It is shown and never opened.
    data
        Its bytes.
    """

    path: PurePosixPath
    data: bytes

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.name

    @property
    def parent(self) -> PurePosixPath:
        """Folder of the path."""
        return self.path.parent


#: What the readers of single formats take.
File: TypeAlias = Path | Content


class Bounded(io.RawIOBase):
    """A decompressed stream that ends in an error when it grows out of all proportion.

    Parameters
    ----------
    stream
        The decompressed stream.
    compressed
        The stream below it, whose position says how much has been read so far.
    most
        Bytes in all; 0: any number.
    """

    def __init__(self, stream: IO[bytes], compressed: IO[bytes], most: int = 0) -> None:
        super().__init__()
        self.stream, self.compressed, self.most = stream, compressed, most
        self.count = 0

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill the buffer; see :class:`io.RawIOBase`."""
        data = self.stream.read(min(len(buffer), MIB))
        self.count += len(data)
        check_size(self.count, self.compressed.tell(), self.most)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the streams below too."""
        if not self.closed:
            self.stream.close()
            self.compressed.close()
        super().close()


def check_size(size: int, compressed: int, most: int = 0) -> None:
    """Raise a :class:`CrystalError` if ``size`` bytes are too many for so many compressed ones."""
    if size > FREE_BYTES and size > MAX_RATIO * max(compressed, 1):
        raise CrystalError(
            f"a decompression bomb: more than {MAX_RATIO} times its compressed size",
            "decompress it yourself if you know where it comes from",
            kind=ErrorKind.TOO_LARGE,
        )
    if most and size > most:
        raise CrystalError(
            f"too large: more than {most // MIB} MiB",
            "split it into smaller files",
            kind=ErrorKind.TOO_LARGE,
        )


def open_binary(file: File, most: int = 0) -> BinaryIO:
    """Open a file for reading, decompressed if it is gzip, bzip2 or xz.

    The content decides, not the suffix: renamed files are common.
    """
    raw = cast("BinaryIO", io.BytesIO(file.data) if isinstance(file, Content) else file.open("rb"))
    head = raw.read(6)
    raw.seek(0)
    for magic, opener in _OPENERS:
        if head.startswith(magic):
            return cast("BinaryIO", io.BufferedReader(Bounded(opener(raw), raw, most), MIB // 4))
    return raw


def read_part(stream: IO[bytes]) -> bytes:
    """Return all that a stream holds, at most 256 MiB, whatever anybody says of its size.

    Raises
    ------
    CrystalError
        If it is larger.
    """
    # In pieces: a buffered stream that is asked for so much at once sets it all aside first.
    pieces, size = [], 0
    while piece := stream.read(MIB):
        pieces.append(piece)
        size += len(piece)
        check_size(size, size, MAX_PART_BYTES)
    return b"".join(pieces)


def open_text(file: File) -> TextIO:
    """Open a file as text; bytes that are not UTF-8 only occur in comments and are replaced."""
    return io.TextIOWrapper(open_binary(file), encoding="utf-8-sig", errors="replace")


def read_text(file: File) -> str:
    """Return a file's text, decompressed where needed.

    Raises
    ------
    CrystalError
        If the file is empty or too large.
    """
    if isinstance(file, Path):
        size = file.stat().st_size
        check_size(size, size, MAX_FILE_BYTES)
    with open_binary(file, MAX_FILE_BYTES) as stream:
        data = stream.read()
    text = data.decode("utf-8-sig", errors="replace")
    if not text or text.isspace():
        raise CrystalError(
            "the file is empty", "remove it, or write the structure again", kind=ErrorKind.EMPTY
        )
    return text
