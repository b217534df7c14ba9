"""Reference energies of a potential: one per element, fitted to what composition explains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.nn.scaling import DIFFERENCE_RIDGE, TargetScaler, composition
from matxfer.potential.model import ENERGY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.potential.model import Potential
    from matxfer.potential.packed import PackedFrames


def fit_references(potential: Potential, frames: PackedFrames) -> None:
    """Set the references of an untrained potential from the training frames.

    The ridge of :class:`matxfer.nn.scaling.TargetScaler` settles elements that always occur
    together. The network starts from zero in units of 1 eV, so the first energies are the
    references and the repulsion.
    """
    rows = frames.rows("train")
    scaler = TargetScaler.fit(ENERGY, frames.energy_ev_per_atom[rows], frames.graphs.select(rows))
    scaler.std.fill_(1.0)
    potential.head.scaler = scaler
    last = potential.head.readout.net[-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()


def shift_references(potential: Potential, frames: PackedFrames) -> NDArray[np.float64]:
    """Move the references of a trained potential to those of other calculations.

    Only differences from its own energies are fitted, so forces stay as they are and what it knows
    of mixing is kept. Returns the shift of every element, (119,), in eV.
    """
    rows = frames.rows("train")
    told = frames.energy_ev_per_atom[rows]
    own = energies_per_atom(potential, frames, rows)
    known: NDArray[np.bool_] = np.isfinite(told)
    x = composition(frames.graphs.select(rows[known]))
    present = x.any(axis=0)
    difference = told[known] - own[known]
    mean = difference.mean() if len(difference) else 0.0
    gram = x[:, present].T @ x[:, present] + DIFFERENCE_RIDGE * np.eye(int(present.sum()))
    shift = np.zeros(x.shape[1])
    shift[present] = mean + np.linalg.solve(gram, x[:, present].T @ (difference - mean))
    reference = potential.head.scaler.reference
    reference += torch.from_numpy(shift).to(reference)
    return shift


def energies_per_atom(
    potential: Potential, frames: PackedFrames, rows: NDArray[np.int64], max_edges: int = 16_000
) -> NDArray[np.float64]:
    """Return what a potential says of frames, in eV/atom, (len(rows),)."""
    found = [np.zeros(0)]
    for index in frames.batches(rows, max_edges):
        graphs = frames.graphs.batch(index).to(potential.device)
        energy = potential.respond(graphs, forces=False).energy_ev.double().cpu().numpy()
        found.append(energy / frames.graphs.nodes_per_graph[index])
    return np.concatenate(found)
