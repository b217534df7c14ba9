"""Errors of a potential on frames: per atom, per force component, per stress component."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from matxfer.potential.model import Potential, Response
    from matxfer.potential.packed import FrameBatch, PackedFrames


def differences(response: Response, batch: FrameBatch) -> dict[str, Tensor]:
    """Return prediction less calculation of every frame, flat, without those not calculated.

    ``energy`` in eV/atom, ``forces`` in eV/Å by component, ``stress`` in eV/Å³ by component.
    """
    stress = response.virial_ev / batch.volume_angstrom3[:, None, None]
    all_ = {
        "energy": (response.energy_ev - batch.energy_ev) / batch.n_atoms,
        "forces": response.forces_ev_per_a - batch.forces_ev_per_a,
        "stress": stress - batch.stress_ev_per_a3,
    }
    return {name: error[error.isfinite()] for name, error in all_.items()}


@dataclass(slots=True)
class ErrorSums:
    """Sums of absolute and squared errors over batches."""

    absolute: dict[str, float] = field(default_factory=dict)
    squared: dict[str, float] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def add(self, errors: dict[str, Tensor]) -> None:
        """Add the errors of a batch."""
        for name, found in errors.items():
            error = found.detach().double()
            for sums, value in (
                (self.absolute, float(error.abs().sum())),
                (self.squared, float(error.square().sum())),
            ):
                sums[name] = sums.get(name, 0.0) + value
            self.count[name] = self.count.get(name, 0) + error.numel()

    def figures(self) -> dict[str, float]:
        """Return mean absolute and root mean square errors, with their units in the names."""
        units = {"energy": "ev_per_atom", "forces": "ev_per_a", "stress": "ev_per_a3"}
        found = {}
        for name, unit in units.items():
            if n := self.count.get(name, 0):
                found[f"{name}_mae_{unit}"] = self.absolute[name] / n
                found[f"{name}_rmse_{unit}"] = (self.squared[name] / n) ** 0.5
        return found


def measure(
    potential: Potential, frames: PackedFrames, part: str, max_edges: int = 16_000
) -> dict[str, float]:
    """Return the errors of a potential on a part of the frames, see :class:`ErrorSums`."""
    sums = ErrorSums()
    for index in frames.batches(frames.rows(part), max_edges):
        batch = frames.batch(index).to(potential.device)
        sums.add(differences(potential.respond(batch.graphs), batch))
    with torch.no_grad():
        return sums.figures()
