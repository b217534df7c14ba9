"""Rows of a training weighed by how much they resemble structures that are to be predicted.

With weights w(x) = p_T(x) / p_S(x) a mean over source rows is one over the target (Shimodaira, J.
Stat. Plan. Inference 90, 227 (2000)). They go into the loss of readouts and layers, the least
squares of ridge and kernel ridge, the noise of a Gaussian process (σ²/w), the impurities of a
forest, the scaler's mean and reference energies, the errors on the validation rows, by which
everything is chosen (Sugiyama et al., JMLR 8, 985 (2007)), and the intervals. They help where a
model cannot be right everywhere; one that can needs none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from numpy.typing import NDArray

    from matxfer.data.packed import PackedGraphs
    from matxfer.model import Model
    from matxfer.transfer.task import Task

    #: Base model, graphs and rows → weights of the rows, and what is known of them: ``usable``,
    #: and ``words`` that say why not.
    Weigh: TypeAlias = Callable[
        [Model, PackedGraphs, NDArray[np.int64]], tuple[NDArray[np.float64], dict[str, Any]]
    ]


def weighed(task: Task, weigh: Weigh | None) -> tuple[Task, dict[str, Any] | None]:
    """Return a task whose rows have weights, and what is known of these.

    Parameters
    ----------
    task
        Without weights.
    weigh
        Such as :func:`matxfer.domain.weights_for`; it sees the structures of all parts, no values.
        ``None``: all rows count alike.

    Raises
    ------
    OptionError
        If the weights are too uneven to be used.
    """
    if weigh is None:
        return task, None
    rows = np.sort(np.concatenate(list(task.parts.values())))
    values, facts = weigh(task.base, task.graphs, rows)
    if not facts.get("usable", True):
        raise OptionError(
            f"{facts.get('words', 'the weights are too uneven')}; train without weights, or on "
            "rows that are more like the structures to be predicted"
        )
    weights = np.zeros(len(task.graphs))
    weights[rows] = values
    effective = {}
    for part, own in task.parts.items():
        if not len(own):
            continue
        if weights[own].sum() <= 0:
            raise OptionError(f"all rows of {part!r} have weights of zero")
        weights[own] /= weights[own].mean()
        effective[part] = float(len(own) ** 2 / (weights[own] ** 2).sum())
    return replace(task, weights=weights), facts | {"effective_rows_by_part": effective}
