"""What the name of a file says about its format: the one place where formats are told apart."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable

CIF = (".cif", ".mcif")
TABLES = (".parquet", ".csv", ".csv.gz")
POSCAR = (".vasp", ".poscar", ".contcar")
XYZ = (".xyz", ".extxyz")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
#: ASE's names of further formats, by suffix and by file name. Formats that do not state the
#: elements (LAMMPS data) or that ASE reads by unpickling stay out.
ASE_SUFFIXES = {
    ".traj": "traj",
    ".xsf": "xsf",
    ".gen": "gen",
    ".res": "res",
    ".cfg": "cfg",
    ".cell": "castep-cell",
    ".pwi": "espresso-in",
    ".pwo": "espresso-out",
}
ASE_NAMES = {
    "xdatcar": "vasp-xdatcar",
    "outcar": "vasp-out",
    "vasprun.xml": "vasp-xml",
}
#: Formats that ASE reads from a path only, so neither compressed nor from an archive.
ASE_BY_PATH = {"traj", "res"}
_COMPRESSED = (".gz", ".bz2", ".xz")

SUPPORTED = (
    f"supported are {', '.join((*CIF, *POSCAR, *XYZ, '.json', '.jsonl', '.db', *TABLES))}, "
    f"{', '.join(ASE_SUFFIXES)}, files named POSCAR, CONTCAR, XDATCAR, OUTCAR or vasprun.xml, "
    f".gz, .bz2 and .xz of single files, and archives ({', '.join(ARCHIVES)})"
)
#: Formats that standard input can have; :func:`standard_input` names it.
STREAMED = ("cif", "poscar", "extxyz", "jsonl")
#: Formats that are read only when they are named, since in a folder of structures they hold
#: something else: labels, earlier predictions, a copy of the folder.
NAMED_ONLY = frozenset({"csv", "jsonl", "archive"})


def plain_name(name: str) -> str:
    """Return a file's name in lower case, without the suffix of a compression."""
    name = name.lower()
    return next((name.removesuffix(end) for end in _COMPRESSED if name.endswith(end)), name)


def kind_of(path: PurePath) -> str | None:  # noqa: PLR0911 - one return per format
    """Return the format by the file's name: ours, or ``ase:`` and ASE's name; None if unknown."""
    name = path.name.lower()
    if name.endswith(ARCHIVES):
        return "archive"
    plain = plain_name(name)
    suffix = PurePath(plain).suffix
    if suffix in CIF:
        return "cif"
    if suffix in XYZ:
        return "xyz"
    if suffix in {".csv", ".json", ".jsonl"}:
        return suffix[1:]
    if name.endswith((".parquet", ".db")):
        return name.rpartition(".")[2]
    if (ase := ASE_SUFFIXES.get(suffix)) and not (ase in ASE_BY_PATH and plain != name):
        return f"ase:{ase}"
    if plain in ASE_NAMES:
        return f"ase:{ASE_NAMES[plain]}"
    if suffix in POSCAR or _named_poscar(plain):
        return "poscar"
    return None


def _named_poscar(name: str) -> bool:
    """Return whether a name is one like POSCAR, POSCAR_001, POSCAR.orig or Si-CONTCAR."""
    names = ("poscar", "contcar")
    return name.startswith(names) or name.endswith(names)


def standard_input(kind: str) -> str:
    """Return the input that stands for standard input in a format, such as ``cif:-``.

    Parameters
    ----------
    kind
        One of :data:`STREAMED`.
    """
    return f"{kind}:-"


def with_standard_input(inputs: Iterable[str], kind: str | None) -> list[str]:
    """Return inputs of a command line, ``-`` said with its format.

    Raises
    ------
    OptionError
        If a format is given without ``-``, or ``-`` twice or without a format of :data:`STREAMED`.
    """
    inputs = list(inputs)
    if ("-" in inputs) != (kind is not None) or inputs.count("-") > 1:
        raise OptionError(
            "standard input: give one - and --input-format cif, poscar, extxyz, jsonl"
        )
    if kind is not None and kind not in STREAMED:
        raise OptionError(f"--input-format {kind!r}: use one of {', '.join(STREAMED)}")
    return [standard_input(kind) if kind and name == "-" else name for name in inputs]


def streamed_kind(path: PurePath) -> str | None:
    """Return the format of ``cif:-`` and the like, ``""`` of a bare ``-``, else None."""
    kind, colon, dash = str(path).rpartition(":")
    if dash != "-" or (colon and kind not in STREAMED):
        return None
    return kind
