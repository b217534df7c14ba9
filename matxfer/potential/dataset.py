"""Frames made ready for a training: read, checked, as graphs, and told of."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.copies import copies_of
from matxfer.data.table import SPLITS, TableError
from matxfer.potential.consistency import Finding, check_references, check_units
from matxfer.potential.frames import Frames, read_frames
from matxfer.potential.packed import PackedFrames
from matxfer.potential.references import energies_per_atom

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ase import Atoms

    from matxfer.potential.frames import Source
    from matxfer.potential.model import Potential

#: So many frames that cannot be used are named in the metadata.
_NAMED = 20


@dataclass(frozen=True, slots=True, eq=False)
class FrameData:
    """Frames as they were read and as graphs, and what was found out about them.

    Attributes
    ----------
    frames, packed
        The same frames in the same order.
    findings
        What seems wrong with them.
    copies
        See :func:`matxfer.data.copies.copies_of`.
    """

    frames: Frames
    packed: PackedFrames
    findings: list[Finding]
    copies: dict[str, Any]

    @property
    def elements(self) -> list[int]:
        """Atomic numbers of the training frames."""
        numbers = self.packed.graphs.select(self.packed.rows("train")).numbers
        return [int(z) for z in np.unique(numbers)]

    def facts(self) -> dict[str, Any]:
        """Return what the metadata say of the data."""
        parts, counts = np.unique(self.packed.split, return_counts=True)
        errors = self.packed.errors
        return {
            "frames": self.frames.name,
            "labels": [names for _, names in self.frames.labels],
            "rows": dict(zip(parts.tolist(), counts.tolist(), strict=True)),
            "errors": len(errors),
            "first_errors": [errors[row] for row in sorted(errors)[:_NAMED]],
            "findings": [finding.to_json() for finding in self.findings],
            **self.copies,
        }


def prepare(
    table: Source | Sequence[Source] | Sequence[Atoms] | Frames,
    potential: Potential,
    *,
    trained: bool,
    split_column: str | None = None,
    where: dict[str, list[Any]] | None = None,
    seed: int = 0,
    check: bool = True,
    on_graphs: Callable[[int], None] | None = None,
) -> FrameData:
    """Read, check and pack frames for the training of a potential.

    Parameters
    ----------
    table, split_column, where, seed
        See :func:`matxfer.potential.frames.read_frames`.
    potential
        What is to be trained; says the cutoff.
    trained
        Whether its energies mean something already: then they help to find other references.
    check
        Whether frames that are certainly in other units are refused; else that is a warning.
    on_graphs
        Called per graph.

    Raises
    ------
    TableError
        If the frames cannot be used.
    """
    frames = table
    if not isinstance(frames, Frames):
        frames = read_frames(frames, split_column=split_column, where=where, seed=seed)
    findings = check_units(frames)
    for finding in findings:
        if finding.certain and check:
            raise TableError(
                f"{finding.message}; if it is right as it is, say --no-check (check=False)"
            )
    cutoff = potential.backbone.graph_options.cutoff_angstrom
    packed = PackedFrames.build(frames, cutoff, on_graphs)
    _check_parts(frames, packed)
    predicted = None
    if trained:
        rows = np.flatnonzero(packed.graphs.nodes_per_graph > 0)
        predicted = np.full(len(frames), np.nan)
        predicted[rows] = energies_per_atom(potential, packed, rows)
    findings += check_references(frames, predicted)
    for finding in findings:
        warnings.warn(finding.message, stacklevel=3)
    parts = {part: packed.rows(part) for part in SPLITS}
    copies = copies_of(frames.source, frames.crystals, packed.energy_ev_per_atom, parts)
    return FrameData(frames, packed, findings, copies)


def _check_parts(frames: Frames, packed: PackedFrames) -> None:
    if packed.errors:
        first = packed.errors[min(packed.errors)]
        if len(packed.errors) == len(packed):
            raise TableError(f"no frame can be used; the first: {first}")
        warnings.warn(
            f"{len(packed.errors)} of {len(packed)} frames cannot be used and are left out; the "
            f"first: {first}",
            stacklevel=4,
        )
    for part in ("train", "val"):
        if not len(packed.rows(part)):
            raise TableError(
                f"{frames.source}: no frame is left in the part {part!r} of the split; give more "
                "frames (ten or more), or a column of train, val and test"
            )
