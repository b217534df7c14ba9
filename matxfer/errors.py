"""The one base of all errors that a user can cause and mend; anything else is a bug of ours."""

from __future__ import annotations

from enum import StrEnum


class MatxferError(ValueError):
    """Bad input, file or option: the message says what is wrong, where, and what to do."""


class OptionError(MatxferError):
    """An option out of its range, or options that do not go together."""


class StrictError(MatxferError):
    """The first structure that could not be predicted, where none was to fail."""


class ErrorKind(StrEnum):
    """Why a structure gave no prediction: the words in the column ``error_kind``.

    This is the whole list. :class:`matxfer.crystal.CrystalError` carries one of them from the place
    where the problem was found to the row.
    """

    #: There is no such file.
    MISSING_FILE = "missing_file"
    #: The format of the file is not one that is read here.
    UNSUPPORTED_FORMAT = "unsupported_format"
    #: The file, row or frame is damaged, incomplete or not of the format that its name says.
    UNREADABLE = "unreadable"
    #: There is no structure in the file, or no atom in the structure.
    EMPTY = "empty"
    #: A site is shared by several species, or partly empty.
    DISORDERED = "disordered"
    #: A site is no element: a dummy, a group, an unknown symbol or atomic number.
    UNKNOWN_SPECIES = "unknown_species"
    #: An element that the model has never seen.
    UNKNOWN_ELEMENT = "unknown_element"
    #: The cell is missing, not finite or without volume.
    BAD_CELL = "bad_cell"
    #: Coordinates are missing or not finite, or their number is not that of the atoms.
    BAD_COORDINATES = "bad_coordinates"
    #: Two atoms are closer than any bond.
    OVERLAPPING_ATOMS = "overlapping_atoms"
    #: Atoms or cell went astray while a structure was relaxed.
    RELAXATION_FAILED = "relaxation_failed"
    #: More atoms or neighbours than a batch may hold.
    TOO_LARGE = "too_large"
    #: The structure took longer than it may.
    TIMEOUT = "timeout"
    #: The process that worked on the structure died.
    WORKER_CRASH = "worker_crash"
