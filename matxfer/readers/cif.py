"""CIF documents: blocks in, crystals out, by the fast path where it is sure."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from gemmi import cif

from matxfer.crystal import Crystal, CrystalError
from matxfer.readers.cif_careful import has_atoms, read_careful
from matxfer.readers.cif_fast import read_fast
from matxfer.readers.content import File, read_text
from matxfer.readers.entry import Item, attempt, describe, stem_of

if TYPE_CHECKING:
    from collections.abc import Iterator

#: An item whose value is several words without quotes.
_BARE = re.compile(r"(_\S+)\s+([^\s'\";#_]\S*\s+[^'#]*)")
_REMEDY = "check the CIF with a validator, or export it again"


def read_cif(path: File) -> Iterator[Item]:
    """Yield one item per block that has atoms.

    Blocks without any atoms (global metadata) are passed over if another block has some.

    Raises
    ------
    CrystalError
        If the file is empty or is no CIF.
    """
    yield from crystals_of_text(read_text(path), stem_of(path))


def crystals_of_text(text: str, stem: str) -> Iterator[Item]:
    """Yield the items of a CIF document.

    Parameters
    ----------
    text
        The document.
    stem
        Id of the structure; with several, the block's name is appended.

    Raises
    ------
    CrystalError
        If the text is no CIF.
    """
    document = _parse(text)
    blocks = [(i, document[i]) for i in range(len(document))]
    if len(blocks) > 1:
        blocks = [(i, block) for i, block in blocks if has_atoms(block)] or blocks[:1]
    names = [block.name for _, block in blocks]
    unique = len(set(names)) == len(names) and all(names)
    for i, block in blocks:
        name = stem if len(blocks) == 1 else f"{stem}:{block.name if unique else i}"
        yield i, name, attempt(partial(crystal_of_block, block, name), "the CIF block", _REMEDY)


def crystal_of_block(block: cif.Block, name: str = "") -> Crystal:
    """Return the crystal of one block.

    Raises
    ------
    CrystalError
        If the block holds no ordered crystal; see :func:`matxfer.readers.cif_careful.read_careful`.
    """
    lattice, numbers, frac = read_fast(block) or read_careful(block)
    return Crystal(lattice, numbers, frac, id=name)


def _parse(text: str) -> cif.Document:
    # Level 0: duplicate tags and missing values of items we never look at are no reason to refuse.
    try:
        document = cif.read_string(text, 0)
    except (ValueError, RuntimeError) as error:
        document = _repaired(text, describe(error))
    if len(document) == 0:
        raise CrystalError("there is no CIF data block (data_...)", "check that this is a CIF file")
    return document


def _repaired(text: str, problem: str) -> cif.Document:
    """Parse a text after quotes have been put round bare values of several words (``P 1``).

    pymatgen's lenient reader is not asked: it drops letters that it does not know and lines that it
    cannot place, and what is left may be another crystal.
    """
    lines, field = [], False
    for line in text.splitlines():
        field ^= line.startswith(";")
        match = None if field else _BARE.fullmatch(line.rstrip())
        lines.append(f"{match[1]} '{match[2]}'" if match else line)
    try:
        return cif.read_string("\n".join(lines), 0)
    except (ValueError, RuntimeError) as error:
        raise CrystalError(f"this is no valid CIF ({problem})", _REMEDY) from error
