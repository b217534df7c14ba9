"""Rows weighed for a target: errors as on its structures, and models made for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.store import pack_chunk
from matxfer.domain.covariate import components
from matxfer.domain.sample import draw, read_collection, run_layers
from matxfer.domain.weights import density_ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.data.packed import PackedGraphs
    from matxfer.model import Model
    from matxfer.transfer.row_weights import Weigh


def weights_for(
    target: Any, *, sample: int = 1000, structure_column: str | None = None, seed: int = 0
) -> Weigh:
    """Return what weighs rows by how much they resemble a target.

    Parameters
    ----------
    target
        Structures of the target, labelled or not: whatever :func:`matxfer.predict` takes.
    sample
        At most so many of them are looked at.
    structure_column, seed
        As in :func:`matxfer.domain.diagnose`.

    Returns
    -------
    callable
        For ``weigh`` of :func:`matxfer.evaluate`, which warns where the weights are too uneven to
        be used, and of :func:`matxfer.finetune`, which refuses them.

    Examples
    --------
    >>> import matxfer
    >>> from matxfer.domain import weights_for
    >>> figures = matxfer.evaluate(
    ...     "solids.parquet", "bulk_modulus_gpa", "bulk-plugin", weigh=weights_for("examples")
    ... )
    >>> figures["weighted"]["unit"]
    'GPa'
    """
    found = read_collection(target, structure_column=structure_column)
    chosen = draw(np.arange(len(found)), sample, seed)
    crystals = [found.crystals[k] for k in chosen]

    def weigh(
        model: Model, graphs: PackedGraphs, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        last = model.backbone.n_layers
        own, _ = pack_chunk(crystals, model.backbone.graph_options)
        usable = np.flatnonzero(own.nodes_per_graph > 0)
        here = run_layers(model, graphs, rows, (last,))[0][last]
        there = run_layers(model, own, usable, (last,))[0][last]
        both = components(np.concatenate([here, there]))
        weights = density_ratio(both[: len(here)], both[len(here) :], seed=seed)
        words = f"{found.name}: {weights.words()}"
        return weights.values, weights.to_json() | {"words": words}

    return weigh
