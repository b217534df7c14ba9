"""Standard input as a source: ``cif:-``, ``poscar:-``, ``extxyz:-`` and ``jsonl:-``."""

from __future__ import annotations

import io
import re
import sys
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, TextIO

from matxfer.crystal import CrystalError
from matxfer.readers.content import MAX_PART_BYTES, Content, read_part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matxfer.readers.entry import Item

STEM = "stdin"
_BLOCK = re.compile(r"^data_(\S+)", re.IGNORECASE | re.MULTILINE)


def read_piped(kind: str, stream: BinaryIO | None = None) -> Iterator[Item]:
    """Yield the structures of standard input as they arrive.

    Parameters
    ----------
    kind
        ``cif`` (any number of blocks, so ``cat *.cif`` will do), ``poscar`` (one), ``extxyz``
        (frames) or ``jsonl`` (lines).
    stream
        Where to read instead, for tests.

    Raises
    ------
    CrystalError
        If there is nothing, or one structure is larger than 256 MiB.
    """
    binary = stream or sys.stdin.buffer
    if kind == "poscar":
        from matxfer.readers.atomistic import read_poscar

        yield from read_poscar(Content(PurePosixPath(f"{STEM}.poscar"), read_part(binary)))
        return
    text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace")
    if kind == "cif":
        yield from _cif_items(text)
    elif kind == "extxyz":
        from matxfer.readers.atomistic import items_of_xyz

        yield from items_of_xyz(text, STEM)
    elif kind == "jsonl":
        from matxfer.readers.json_lines import items_of_lines

        yield from items_of_lines(text, STEM)
    else:
        raise CrystalError(
            "standard input has no name that tells its format",
            "say --input-format cif, poscar, extxyz or jsonl (in Python: 'cif:-')",
        )


def _cif_items(stream: TextIO) -> Iterator[Item]:
    from matxfer.readers.cif import crystals_of_text

    frame = 0
    for text in cif_blocks(stream):
        # Blocks without atoms (global metadata) are passed over, as in a file.
        if "_atom_site" not in text.lower():
            continue
        name = _BLOCK.search(text)
        stem = f"{(name and name[1]) or STEM}:{frame}"
        try:
            ((_, _, result),) = crystals_of_text(text, stem)
        except CrystalError as error:
            result = error
        yield frame, stem, result
        frame += 1


def cif_blocks(stream: TextIO) -> Iterator[str]:
    """Cut a stream of CIF text before every ``data_``, except inside text fields.

    Raises
    ------
    CrystalError
        If one block is larger than 256 MiB.
    """
    lines: list[str] = []
    room = MAX_PART_BYTES
    field = started = False
    while line := stream.readline(room + 1):
        if line.startswith(";"):
            field = not field
        elif not field and line[:5].lower() == "data_":
            if started:
                yield "".join(lines)
                lines, room = [], MAX_PART_BYTES
            started = True
        lines.append(line)
        room -= len(line)
        if room < 0:
            raise CrystalError("too large: a CIF block without an end", "check what is piped in")
    if lines and not all(line.isspace() for line in lines):
        yield "".join(lines)
