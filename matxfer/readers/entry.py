"""What a reader yields, and the one place where a parser's exception becomes an error entry."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from matxfer.crystal import Crystal, CrystalError
from matxfer.errors import ErrorKind
from matxfer.readers.formats import plain_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from matxfer.readers.content import File

#: What the readers of single formats yield: frame, id, and the crystal or what is wrong with it.
Item: TypeAlias = tuple[int, str, Crystal | CrystalError]


#: Errors of the kinds that the formats share.
bad_cell = partial(CrystalError, kind=ErrorKind.BAD_CELL)
bad_coordinates = partial(CrystalError, kind=ErrorKind.BAD_COORDINATES)
unknown_species = partial(CrystalError, kind=ErrorKind.UNKNOWN_SPECIES)

_RUN_FILES = {"poscar", "contcar", "xdatcar", "outcar", "vasprun.xml"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One structure of one source, or the error that stands in its place.

    Parameters
    ----------
    source
        The path as the user gave it (or as a directory or glob was expanded); of a member of an
        archive ``archive.zip!member.cif``.
    frame
        0-based index in that source: CIF block, trajectory frame or table row.
    id
        Row id, database id, or the file's stem, with block name or frame number appended when the
        file holds several structures.
    crystal
        The structure, or None.
    error
        What is wrong, with source and frame filled in, or None. Exactly one of ``crystal`` and
        ``error`` is set.

    Raises
    ------
    ValueError
        If both or neither of ``crystal`` and ``error`` are given.
    """

    source: str
    frame: int
    id: str
    crystal: Crystal | None = None
    error: CrystalError | None = None

    def __post_init__(self) -> None:
        if (self.crystal is None) == (self.error is None):
            raise ValueError("an entry has either a crystal or an error; give exactly one")


def entry_of(source: str, item: Item) -> Entry:
    """Return the entry of one item of ``source``."""
    frame, name, result = item
    if isinstance(result, Crystal):
        return Entry(source, frame, name, crystal=result)
    return Entry(source, frame, name, error=result.located(source, frame))


def attempt(build: Callable[[], Crystal], what: str, remedy: str) -> Crystal | CrystalError:
    """Run ``build`` and return its crystal, or its failure as a value.

    Parameters
    ----------
    build
        Makes the crystal; whatever a library raises in it must not end the stream.
    what
        What was being read, for the message ("the POSCAR", "the structure in column 'cif'").
    remedy
        What to do if it is not a :class:`CrystalError` that says so itself.
    """
    try:
        return build()
    except CrystalError as error:
        return error
    except Exception as error:  # noqa: BLE001 - parsers raise anything; one file must not stop all
        return CrystalError(f"{what} could not be read ({describe(error)})", remedy)


def describe(error: BaseException) -> str:
    """Return an exception as one line, with its type: a bare message such as 'x' says little."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def stem_of(path: File) -> str:
    """Return what names the structure in the path: the file's name without its suffixes.

    Codes give all runs the same file names and users keep one run per folder, so a bare POSCAR
    is named after its folder; and what follows the dot of ``POSCAR.Si`` is part of the name.
    """
    name = path.name[: len(plain_name(path.name))]
    stem, dot, _ = name.rpartition(".")
    if name.lower() in _RUN_FILES and path.parent.name:
        return path.parent.name
    if not (dot and stem) or name.lower().startswith(("poscar.", "contcar.")):
        return name
    return stem
