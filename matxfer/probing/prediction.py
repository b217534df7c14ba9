"""Task affinity without training against the measured gain: whether cheap scores are right."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.probing.cells import SCORES

if TYPE_CHECKING:
    from collections.abc import Sequence

    Row = dict[str, Any]


def affinity_rows(cells: Sequence[Row], target: str) -> list[Row]:
    """Return, for each score, how well it orders the cells and the sources of a target.

    Parameters
    ----------
    cells
        Of one target and number of training rows, with ``scores``.

    Returns
    -------
    list
        ``rank_correlation`` (Spearman's ρ) of score and gain over ``n`` cells, random weights among
        them, with its ``p_value``; ``of_sources``: the same over the sources, each by its best
        score and with its gain at the depth chosen on validation rows; ``pick``: the source of the
        largest score, and ``regret``: by which share its error is above that of the best source.
    """
    deep = [row for row in cells if row["depth"] is not None and row["scores"]]
    chosen = {row["source"]: row for row in cells if row["chosen"] and row["is_source"]}
    made = []
    for name in SCORES:
        all_scores = [row["scores"][name] for row in deep]
        rho, p = _spearman(all_scores, [row["gain"] for row in deep])
        best = {
            source: max(
                (row["scores"][name] for row in deep if row["source"] == source),
                default=-math.inf,
            )
            for source in chosen
        }
        of_sources, _ = _spearman(
            [best[source] for source in chosen], [row["gain"] for row in chosen.values()]
        )
        pick = max(best, key=lambda source: best[source])
        least = min(row["test_mae"] for row in chosen.values())
        made.append(
            {
                "target": target,
                "score": name,
                "n": len(deep),
                "rank_correlation": rho,
                "p_value": p,
                "n_sources": len(chosen),
                "of_sources": of_sources,
                "pick": pick,
                "regret": chosen[pick]["test_mae"] / least - 1 if least > 0 else 0.0,
            }
        )
    return made


def mean_scores(records: Sequence[Row]) -> dict[str, float] | None:
    """Return the mean of each score over the records of a cell, ``None`` where there is none."""
    known = [record["scores"] for record in records]
    if not known or any(scores is None for scores in known):
        return None
    return {name: statistics.mean(scores[name] for scores in known) for name in SCORES}


def _spearman(one: Sequence[float], other: Sequence[float]) -> tuple[float | None, float | None]:
    from scipy.stats import spearmanr

    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None, None
    found = spearmanr(one, other)
    return float(found.statistic), float(found.pvalue)
