"""POSCAR, (extended) XYZ and the other formats that ASE reads."""

from __future__ import annotations

import io
import re
from functools import partial
from typing import TYPE_CHECKING

from matxfer.crystal import Crystal, CrystalError
from matxfer.errors import ErrorKind
from matxfer.readers.content import MAX_PART_BYTES, Content, File, open_text, read_text
from matxfer.readers.entry import Item, attempt, describe, stem_of
from matxfer.readers.formats import ASE_BY_PATH

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from ase import Atoms

_POSCAR_REMEDY = "write the element symbols on line 6, above the numbers of atoms (VASP 5 format)"
#: Numbers of columns in an extended XYZ header, such as 3 in ``pos:R:3``.
_WIDTHS = re.compile(r":[SRILsril]:(\d+)")
_XYZ_REMEDY = "check the number of atoms and the columns of this frame"


def read_poscar(path: File) -> Iterator[Item]:
    """Yield the one structure of a POSCAR or CONTCAR.

    Raises
    ------
    CrystalError
        If the file is empty.
    """
    name = stem_of(path)
    text = read_text(path)
    build = partial(_crystal_of_poscar, text, name)
    yield 0, name, attempt(build, "the POSCAR", "check it against the format of VASP 5")


def _crystal_of_poscar(text: str, name: str) -> Crystal:
    from ase.data import atomic_numbers
    from ase.io.vasp import read_vasp

    lines = text.splitlines()
    if len(lines) < 8:
        raise CrystalError(f"the POSCAR has only {len(lines)} lines", "check that it is complete")
    species = lines[5].split("!")[0].split()
    # Without this line ASE guesses from the comment, and pymatgen counts H, He, Li, ...
    if not species or species[0].isdigit():
        raise CrystalError(
            "unknown species: the POSCAR has no line of elements",
            _POSCAR_REMEDY,
            kind=ErrorKind.UNKNOWN_SPECIES,
        )
    # POTCAR names such as Fe_pv, and Na_pv/6a2f546d as VASP 6 writes them, are understood.
    unknown = [s for s in species if atomic_numbers.get(s.split("/")[0].split("_")[0], 0) < 1]
    if unknown:
        raise CrystalError(
            f"unknown species {', '.join(unknown)} in the POSCAR",
            _POSCAR_REMEDY,
            kind=ErrorKind.UNKNOWN_SPECIES,
        )
    counts = lines[6].split("!")[0].split()
    if len(counts) != len(species):
        raise CrystalError(
            f"the POSCAR has {len(species)} species but {len(counts)} numbers of atoms",
            "give one number per species on line 7",
        )
    return Crystal.from_ase(read_vasp(io.StringIO(text)), id=name)


def read_xyz(path: File) -> Iterator[Item]:
    """Yield the frames of an XYZ or extended XYZ file, one at a time.

    A frame without a ``Lattice`` is a molecule (no periodicity). A frame that cannot be read
    gives an error and reading goes on, as long as the next frame's number of atoms is found.

    Raises
    ------
    CrystalError
        If the file is empty.
    """
    with open_text(path) as stream:
        yield from items_of_xyz(stream, stem_of(path))


def items_of_xyz(stream: TextIO, stem: str) -> Iterator[Item]:
    """Yield the frames of a stream; see :func:`read_xyz`."""
    frames = texts_of_xyz(stream)
    following = next(frames, None)
    if following is None:
        raise CrystalError(
            "the file is empty", "remove it, or write the structure again", kind=ErrorKind.EMPTY
        )
    frame = 0
    while following is not None:
        current, following = following, next(frames, None)
        name = stem if frame == 0 and following is None else f"{stem}:{frame}"
        if isinstance(current, CrystalError):
            yield frame, name, current
        else:
            build = partial(_crystal_of_xyz, current, name)
            yield frame, name, attempt(build, "the frame", _XYZ_REMEDY)
        frame += 1


def texts_of_xyz(stream: TextIO) -> Iterator[str | CrystalError]:
    """Cut a stream into the texts of single frames.

    ASE's reader is given one frame at a time because an exception ends its generator, and
    because it scans the whole file for frames before it yields the first.
    """
    while True:
        head = stream.readline(MAX_PART_BYTES)
        while head and head.isspace():
            head = stream.readline(MAX_PART_BYTES)
        if not head:
            return
        count = head.strip()
        if not (count.isdecimal() and len(count) < 12):
            yield CrystalError(
                f"{count[:40]!r} stands where the number of atoms of a frame belongs, so this and "
                "all later frames are not read",
                "check the number of atoms of the frame before it",
            )
            return
        # Line by line, and no list of the announced length: the number may be a lie.
        lines, room = [head], MAX_PART_BYTES
        while len(lines) < int(count) + 2 and (line := stream.readline(room + 1)):
            lines.append(line)
            room -= len(line)
            if room < 0:
                yield CrystalError(
                    f"too large: a frame of more than {MAX_PART_BYTES} characters, so this and "
                    "all later frames are not read",
                    "remove this frame",
                )
                return
        if len(lines) < int(count) + 2:
            yield CrystalError(
                f"the frame ends after {max(len(lines) - 2, 0)} of {count} atoms",
                "check that the file is complete",
            )
            return
        yield "".join(lines)


def _crystal_of_xyz(text: str, name: str) -> Crystal:
    return Crystal.from_ase(atoms_of_xyz(text), id=name)


def atoms_of_xyz(text: str) -> Atoms:
    """Return the atoms of one frame, with what was calculated of them.

    Raises
    ------
    CrystalError
        If its header announces columns that are not there; ASE raises anything else.
    """
    from ase.io.extxyz import read_xyz as read_frames

    _, comment, *rows = text.split("\n", 3)
    width = len(rows[0].split()) if rows else 0
    # ASE sets aside what the header announces.
    if any(len(n) > 6 or int(n) > width for n in _WIDTHS.findall(comment)):
        raise CrystalError("the header announces more columns than there are", _XYZ_REMEDY)
    atoms: Atoms = next(iter(read_frames(io.StringIO(text), slice(0, 1))))
    return atoms


def read_with_ase(path: File, kind: str) -> Iterator[Item]:
    """Yield the frames of a file in another format that ASE reads.

    After a frame that cannot be read ASE cannot go on; the error says so.

    Parameters
    ----------
    path
        The file.
    kind
        ASE's name of the format.

    Raises
    ------
    CrystalError
        If the file is empty or cannot be read.
    """
    stem = stem_of(path)
    frames = atoms_of_ase(path, kind)
    following = next(frames, None)
    frame = 0
    while following is not None:
        current, following = following, next(frames, None)
        name = stem if frame == 0 and following is None else f"{stem}:{frame}"
        if isinstance(current, CrystalError):
            yield frame, name, current
        else:
            build = partial(Crystal.from_ase, current, name)
            yield frame, name, attempt(build, "the frame", "check this frame")
        frame += 1


def atoms_of_ase(path: File, kind: str) -> Iterator[Atoms | CrystalError]:
    """Yield the frames of a file as ASE has them; see :func:`read_with_ase`."""
    from ase.io import iread

    if isinstance(path, Content) and kind in ASE_BY_PATH:
        raise CrystalError(f"ASE reads {kind!r} files from disk only", "unpack the archive first")
    if not isinstance(path, Content) and path.stat().st_size == 0:
        raise CrystalError(
            "the file is empty", "remove it, or write the structure again", kind=ErrorKind.EMPTY
        )
    try:
        # A text stream keeps ASE from guessing by name, from its "@" syntax and from compression.
        source = str(path) if kind in ASE_BY_PATH else io.StringIO(read_text(path))
        yield from iread(source, ":", format=kind, do_not_split_by_at_sign=True)
    except CrystalError as error:
        yield error
    except Exception as error:  # noqa: BLE001 - ASE's parsers raise anything
        yield CrystalError(
            f"ASE's reader for {kind!r} failed here and cannot go on ({describe(error)})",
            "check that the file is complete and of the format that its name says",
        )
