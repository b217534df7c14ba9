"""What remedies did to pairs of tables, over several seeds: verdicts, tables, one true sentence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from _table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: In the names of pairs between which rules do not differ.
COVARIATE = "(covariate)"
VERDICTS = ("helps", "no difference", "harms", "refused")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one remedy did to one pair: a trial for each seed."""

    pair: str
    base: str
    remedy: str
    trials: list[dict[str, Any]]

    @property
    def changes(self) -> list[float]:
        """Relative changes of the error, of the seeds that did not refuse."""
        return [-t["gain"] / t["before"] for t in self.trials if t["gain"] is not None]

    @property
    def verdict(self) -> str:
        """What most seeds say; ``no difference`` if none has more than half."""
        first, count = Counter(t["verdict"] for t in self.trials).most_common(1)[0]
        return first if 2 * count > len(self.trials) else "no difference"

    @property
    def needs_values(self) -> bool:
        """Whether target values are what it learns from."""
        return self.remedy.startswith(("correction", "fine-tuning"))

    def row(self) -> Sequence[object]:
        """Return the cells of a table."""
        means = [
            f"{np.mean([t[k] for t in self.trials if t[k] is not None]):.4g}"
            if self.changes
            else "–"
            for k in ("before", "after")
        ]
        counts = Counter(t["verdict"] for t in self.trials)
        said = [counts[verdict] or "" for verdict in VERDICTS]
        return (self.pair, self.base, self.remedy, *means, percent(self.changes), *said)


def percent(changes: Sequence[float]) -> str:
    """Return mean and sample standard deviation of relative changes."""
    spread = f" ± {np.std(changes, ddof=1):.1%}" if len(changes) > 1 else ""
    return f"{np.mean(changes):+.1%}{spread}" if changes else "–"


def outcomes(records: Iterable[dict[str, Any]]) -> list[Outcome]:
    """Return what each remedy did to each pair, pairs in their order."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        for trial in record["tried"]:
            name = "correction" if trial["name"].startswith("correction") else trial["name"]
            found.setdefault((record["pair"], record["base"], name), []).append(trial)
    return [Outcome(*key, trials) for key, trials in found.items()]


def told(found: Sequence[Outcome]) -> str:
    """Say in a sentence or two what is true of the real pairs."""

    def count(rows: Sequence[Outcome]) -> str:
        verdicts = Counter(o.verdict for o in rows)
        words = zip(VERDICTS, ("help", "no difference", "harm", "refused"), strict=True)
        said = [f"{verdicts[verdict]} {word}" for verdict, word in words if verdicts[verdict]]
        return f"of {len(rows)}: {', '.join(said) or 'none'}"

    fixed = [o for o in found if o.remedy == "correction"]
    ruled = [o for o in fixed if COVARIATE not in o.pair]
    alike = [o for o in fixed if COVARIATE in o.pair]
    tuned = [o for o in found if o.remedy.startswith("fine-tuning")]
    alone = [o for o in found if not o.needs_values]
    share = sum(o.verdict == "helps" for o in alone) / max(len(alone), 1)
    most = "does not help here" if share < 0.5 else "helps here"
    return (
        f"Most domain adaptation without target values {most} ({count(alone)}). Against the "
        f"base's own predictions: corrections from target values where rules differ "
        f"({count(ruled)}) and where they do not ({count(alike)}); fine-tuning on the same rows "
        f"({count(tuned)})."
    )


def tables(found: Sequence[Outcome], planted: Sequence[str], null: str) -> tuple[str, list[Table]]:
    """Return what is true, and the tables."""
    apart = (*planted, null)
    real = [o for o in found if o.pair not in apart]
    short = Table(
        "Remedies over the real pairs",
        ("remedy", *VERDICTS, "largest gain", "largest harm"),
        note="Number of pairs by what most of their seeds say (of trials, one for each seed). Gain "
        "and harm: change of the mean absolute error on target rows that nothing was fitted to, "
        "mean over the seeds of a pair. Corrections and fine-tuning learn from labelled target "
        "rows; the others see target structures alone.",
    )
    for remedy in dict.fromkeys(o.remedy for o in real):
        own = [o for o in real if o.remedy == remedy]
        counts = Counter(o.verdict for o in own)
        ends = sorted((float(np.mean(o.changes)), o.pair) for o in own if o.changes)
        best, worst = (ends[0], ends[-1]) if ends else ((0.0, ""), (0.0, ""))
        gain, harm = (
            f"{x:+.1%} ({pair})" if sign * x > 0 else "–"
            for (x, pair), sign in ((best, -1), (worst, 1))
        )
        trials = Counter(t["verdict"] for o in own for t in o.trials)
        cells = [f"{counts[verdict]} ({trials[verdict]})" for verdict in VERDICTS]
        short.rows.append((remedy, *cells, gain, harm))
    chance = [t for o in found if o.pair == null for t in o.trials]
    counts = Counter(t["verdict"] for t in chance)
    columns = ("pair", "base", "remedy", "without", "with", "change", *VERDICTS)
    control = Table(
        "Controls", columns,
        note=f"Of {len(chance)} trials between random halves {counts['helps']} say that a remedy "
        f"helps and {counts['harms']} that it harms. Planted: a line is trained on a parabola, "
        "where weights are known to be right; and a target far from the source.",
    )  # fmt: skip
    every = Table(
        "Pair by pair", columns,
        note="Mean absolute errors without and with the remedy, means over the seeds; change: mean "
        "± standard deviation over the seeds, whose samples overlap; then how many seeds say what. "
        "Fine-tuning starts from the base's prediction only where that is of the very quantity, so "
        "not for HSE and GLLB-SC gaps; these structures' PBE gaps are mostly known to the base.",
    )  # fmt: skip
    control.rows += [o.row() for o in found if o.pair in apart]
    every.rows += [o.row() for o in real]
    return told(real), [short, control, every]
