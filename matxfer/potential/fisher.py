"""Fisher information of a potential: how much each weight matters to energies and forces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from matxfer.fisher import output_fisher

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphBatch
    from matxfer.data.packed import PackedGraphs
    from matxfer.potential.model import Potential


def potential_fisher(
    potential: Potential,
    graphs: PackedGraphs,
    rows: NDArray[np.int64],
    noise: dict[str, float],
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the mean diagonal Fisher information of the layers per frame.

    A frame has one energy per atom and 3n forces. With a random vector v of unit variance per
    component, the squared gradient of v·F has the sum over all forces of squared gradients as its
    mean (Hutchinson's estimator), so one differentiation tells of all 3n of them.

    Parameters
    ----------
    potential
        The potential.
    graphs, rows
        Frames to average over; no labels are needed.
    noise
        σ of ``"energy"`` in eV/atom and of ``"forces"`` in eV/Å, the spread of its errors.
    seed
        Of the random vectors.

    Returns
    -------
    dict
        ``"energy/<backbone parameter>"`` and ``"forces/…"`` → tensor of the parameter's shape.
    """
    generator = torch.Generator().manual_seed(seed)

    def outputs(batch: GraphBatch) -> dict[str, Tensor]:
        response = potential.respond(batch, create_graph=True)
        forces = response.forces_ev_per_a
        v = torch.randn(forces.shape, generator=generator).to(forces)
        return {
            "energy": response.energy_ev / len(batch.z),
            "forces": (v * forces).sum()[None],
        }

    potential.eval()
    return output_fisher(potential.backbone, outputs, graphs, rows, noise)
