"""Files of frames: structures with everything that is told of each, as one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.crystal import Crystal, CrystalError
from matxfer.data.table import TableError, crystals_or_errors, open_table, rows_where
from matxfer.errors import ErrorKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pandas as pd
    from ase import Atoms

_REMEDY = "correct this frame or remove it"


#: What messages call atoms that come from no file.
IN_MEMORY = "<atoms>"


def read_frame_file(
    table: str | Path | pd.DataFrame | list[Atoms], where: dict[str, list[Any]] | None = None
) -> tuple[pd.DataFrame, list[Crystal | CrystalError], str]:
    """Read a table, an extended XYZ file or another file whose frames ASE reads with results.

    Parameters
    ----------
    table
        The file, or a data frame; or ASE atoms, whose calculators have been asked already.
    where
        Values that a row must have in other columns to be read; in extended XYZ what stands in
        the line above the atoms is a column.

    Returns
    -------
    frame
        What is told of each structure; its index counts the frames of the file.
    crystals
        The structures, or what is wrong with them.
    source
        What messages call the file.

    Raises
    ------
    TableError
        If the file is of no such kind, or no frame is left.
    """
    from matxfer.readers import is_table

    if isinstance(table, str | Path) and not is_table(table):
        frame, crystals = _frames_of_atoms(_atoms_of(Path(table)), str(table))
        source = str(table)
    elif isinstance(table, list):
        frame, crystals = _frames_of_atoms(table, IN_MEMORY)
        source = IN_MEMORY
    else:
        frame, source = open_table(table)
        frame, crystals = frame.reset_index(drop=True), []
    if not len(frame):
        raise TableError(f"{source}: there are no frames; check how the file was written")
    if where:
        frame = rows_where(frame, _as_in_table(where, frame), source)
    if crystals:
        return frame, [crystals[row] for row in frame.index], source
    return frame, _crystals_of_table(frame, source), source


def _as_in_table(where: dict[str, list[Any]], frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Return conditions whose texts (of a command line) are the values that they stand for."""
    found = dict(where)
    for column, values in where.items():
        if column in frame.columns:
            present = {str(value): value for value in frame[column].drop_duplicates()}
            found[column] = [present.get(v, v) if isinstance(v, str) else v for v in values]
    return found


def _crystals_of_table(frame: pd.DataFrame, source: str) -> list[Crystal | CrystalError]:
    from matxfer.readers import crystals_of_table

    found = crystals_or_errors(crystals_of_table(frame, source))
    return [
        # Counted in the file, not in what is left of it.
        CrystalError(c.reason, c.remedy, c.source, row, c.kind)
        if isinstance(c, CrystalError)
        else c
        for row, c in zip(frame.index.tolist(), found, strict=True)
    ]


def _frames_of_atoms(
    frames: Iterable[Atoms | CrystalError], source: str
) -> tuple[pd.DataFrame, list[Crystal | CrystalError]]:
    import pandas as pd

    from matxfer.readers.entry import attempt

    rows: list[dict[str, Any]] = []
    crystals: list[Crystal | CrystalError] = []
    for number, atoms in enumerate(frames):
        told: dict[str, Any] = {}
        result: Crystal | CrystalError
        if isinstance(atoms, CrystalError):
            result = atoms
        else:
            name = f"{Path(source).name}:{number}"
            result = attempt(lambda a=atoms, n=name: Crystal.from_ase(a, n), "the frame", _REMEDY)  # type: ignore[misc]
            told = _told_of(atoms)
        if isinstance(result, CrystalError):
            result = result.located(source, number)
        rows.append(told)
        crystals.append(result)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: pd.Series([row.get(name) for row in rows], dtype=object) for name in names}
    return pd.DataFrame(columns, index=range(len(rows))), crystals


def _told_of(atoms: Atoms) -> dict[str, Any]:
    """Return what a frame says besides its structure: results of a calculator go last."""
    told = {str(name): value for name, value in atoms.info.items()}
    own = ("numbers", "positions")
    told |= {name: value for name, value in atoms.arrays.items() if name not in own}
    results = getattr(atoms.calc, "results", {})
    return told | {name: value for name, value in results.items() if value is not None}


def _atoms_of(path: Path) -> Iterator[Atoms | CrystalError]:
    from matxfer.readers import atomistic
    from matxfer.readers.content import open_text
    from matxfer.readers.entry import describe
    from matxfer.readers.formats import kind_of

    if not path.is_file():
        raise CrystalError(
            "there is no such file", "check the path", str(path), kind=ErrorKind.MISSING_FILE
        )
    kind = kind_of(path) or ""
    if kind.startswith("ase:"):
        yield from atomistic.atoms_of_ase(path, kind.removeprefix("ase:"))
        return
    if kind != "xyz":
        raise TableError(
            f"{path}: frames are read from tables (.parquet, .csv), extended XYZ and the outputs "
            "that ASE reads (.traj, OUTCAR, vasprun.xml, .pwo); write one of these, e.g. by "
            "ase.io.write('frames.extxyz', frames)"
        )
    with open_text(path) as stream:
        for text in atomistic.texts_of_xyz(stream):
            if isinstance(text, CrystalError):
                yield text
                continue
            try:
                yield atomistic.atoms_of_xyz(text)
            except CrystalError as error:
                yield error
            except Exception as error:  # noqa: BLE001 - parsers raise anything
                yield CrystalError(f"the frame could not be read ({describe(error)})", _REMEDY)
