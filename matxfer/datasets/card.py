"""Dataset cards: where a public dataset is, its checksum, and what its columns mean in which unit.

A card is a file ``datasets/NAME.toml``. Its columns say the unit in which the source publishes
them; the name that a column gets in our table ends in its unit, and the two are compared as the
card is read.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.data.properties import unit_of
from matxfer.errors import MatxferError

if TYPE_CHECKING:
    from collections.abc import Callable

#: What a file of each type is called after its name.
FILE_TYPES = ("json.gz", "json")


class DatasetError(MatxferError):
    """A dataset that cannot be had: says which, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers.

    Parameters
    ----------
    source
        What the published file calls it.
    name
        What our table calls it; ends in the unit.
    unit
        Unit of the published values, ``log10(UNIT)`` if they are logarithms.
    """

    source: str
    name: str
    unit: str

    def conversion(self) -> Callable[[float], float]:
        """Return what turns a published value into the unit of the name.

        Raises
        ------
        DatasetError
            If the two units have nothing to do with each other.
        """
        wanted = unit_of(self.name)
        if self.unit == wanted:
            return float
        if wanted and self.unit == f"log10({wanted})":
            return _power_of_ten
        raise DatasetError(
            f"column {self.source!r} is in {self.unit or 'no unit'}, but the name {self.name!r} "
            f"says {wanted or 'no unit'}; correct the card"
        )


def _power_of_ten(exponent: float) -> float:
    return float(10.0**exponent)


@dataclass(frozen=True, slots=True)
class DatasetCard:
    """What is known of a public dataset.

    Parameters
    ----------
    name
        Name of the card's file.
    title, collection, licence, note
        What it holds, where it was collected, under which terms, and what to beware of.
    url, sha256, file_type
        Address of the file, the checksum of its bytes, and its type (see :data:`FILE_TYPES`).
    rows
        Number of rows as published.
    doi
        Publications to cite.
    columns
        Columns of numbers that go into our table.
    structure_column, id_column, formula_column
        Published columns of pymatgen structures, ids and formulas, ``""`` if there is none.
    text_columns
        Columns of text that go into our table as they are.
    other_columns
        Columns that do not.
    """

    name: str
    title: str
    collection: str
    licence: str
    url: str
    sha256: str
    file_type: str
    rows: int
    doi: tuple[str, ...]
    columns: tuple[Column, ...]
    structure_column: str = ""
    id_column: str = ""
    formula_column: str = ""
    text_columns: tuple[str, ...] = ()
    other_columns: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if self.file_type not in FILE_TYPES:
            raise DatasetError(f"file type {self.file_type!r}: must be one of {FILE_TYPES}")
        for column in self.columns:
            column.conversion()

    @property
    def file_name(self) -> str:
        """Name of the published file in our cache."""
        return f"{self.name}.{self.file_type}"

    @property
    def source_columns(self) -> list[str]:
        """Columns that the published file must have for the table to be made."""
        named = (self.structure_column, self.id_column, self.formula_column)
        return [
            *(column.source for column in self.columns),
            *self.text_columns,
            *(name for name in named if name),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the card as a JSON object."""
        from dataclasses import asdict

        return asdict(self)


def card_folders() -> list[Path]:
    """Return the folders that are searched for cards."""
    package = Path(__file__).resolve().parents[1]
    # As with the weights: inside an installed package, beside it in a checkout.
    return [package / "dataset_cards", package.parent / "datasets"]


def available_datasets() -> list[str]:
    """Return the names of the datasets that have a card."""
    return sorted({path.stem for folder in card_folders() for path in folder.glob("*.toml")})


def find_card(name: str) -> DatasetCard:
    """Return the card of a dataset.

    Parameters
    ----------
    name
        One of :func:`available_datasets`, or the path of a card of one's own (``.toml``).

    Raises
    ------
    DatasetError
        If there is no such card, or it is damaged.
    """
    if name.endswith(".toml"):
        return read_card(Path(name))
    known = available_datasets()
    if name not in known:
        near = [other for other in known if name.lower() in other.lower()]
        raise DatasetError(
            f"no dataset {name!r}; there are {', '.join(near or known)} (matxfer datasets list)"
        )
    path = next(p for folder in card_folders() if (p := folder / f"{name}.toml").is_file())
    return read_card(path)


def read_card(path: Path) -> DatasetCard:
    """Read a card.

    Raises
    ------
    DatasetError
        If the file is missing, is no card, or units and names in it disagree.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        data["columns"] = tuple(Column(**column) for column in data["columns"])
        lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
        return DatasetCard(path.stem, **(data | lists))
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path}: not readable as a dataset card ({error}); see the cards in the folder "
            "datasets, such as matbench_phonons.toml"
        ) from error
