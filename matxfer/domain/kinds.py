"""In what two sets of structures differ, in words: elements, classes, prototypes, size, room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.domain.structures import VACUUM_ANGSTROM, prototype_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from matxfer.crystal import Crystal
    from matxfer.domain.structures import StructureFacts
    from matxfer.pretraining.exclusion import Composition

#: A share of structures that differs by less is not named.
LEAST_SHARE = 0.15
#: The same for the largest difference of two cumulative distributions (Kolmogorov, Smirnov).
LEAST_DISTANCE = 0.2
#: p-value below which a difference is named, over the number of those looked at.
_LEVEL = 0.01
#: A table of no more elements than this is of few; so many times fewer than the source's.
_FEW_ELEMENTS, _FEWER = 8, 3
_NAMED = 6
#: From this share on there is one.
_ONE = 0.8
#: Space groups up to this number name no structure type.
_TRICLINIC = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """One difference.

    Attributes
    ----------
    name
        ``elements``, ``class``, ``prototype``, ``cell_size``, ``volume`` or ``vacuum``.
    words
        What it is, with the figures.
    size
        Difference of shares or of cumulative distributions, 0 to 1.
    """

    name: str
    words: str
    size: float


@dataclass(frozen=True, slots=True)
class Unseen:
    """Elements of the target that no structure of the source holds.

    Attributes
    ----------
    numbers
        Their atomic numbers, the most frequent first.
    share
        Share of target structures that hold one.
    p_value
        Chance that an element as frequent would be missing, for the number of elements looked at.
    """

    numbers: tuple[int, ...]
    share: float
    p_value: float

    @property
    def symbols(self) -> list[str]:
        """Chemical symbols."""
        from ase.data import chemical_symbols

        return [chemical_symbols[z] for z in self.numbers]

    def names_in(self, crystal: Crystal) -> list[str]:
        """Return those that a crystal holds."""
        present = set(crystal.numbers.tolist())
        return [s for z, s in zip(self.numbers, self.symbols, strict=True) if z in present]

    def to_json(self) -> dict[str, Any]:
        """Return the elements by symbol."""
        return {"elements": self.symbols, "share": self.share, "p_value": self.p_value}


def unseen_elements(source: Sequence[Composition], target: Sequence[Composition]) -> Unseen:
    """Find the target's elements that the source lacks.

    Polymorphs and copies come in groups, so compositions are counted, each once. An element of k
    compositions in both tables together would be in the target only with a chance of about f^k, f
    being the target's share of all compositions.
    """
    one, other = set(source), set(target)
    seen = {z for composition in one for z, _ in composition}
    counts: dict[int, int] = {}
    for composition in other:
        for z, _ in composition:
            counts[z] = counts.get(z, 0) + 1
    foreign = {z: k for z, k in counts.items() if z not in seen}
    if not foreign:
        return Unseen((), 0.0, 1.0)
    part = len(other) / (len(one) + len(other))
    tried = len(seen | set(counts))
    holds = [any(z in foreign for z, _ in composition) for composition in target]
    return Unseen(
        tuple(sorted(foreign, key=lambda z: (-foreign[z], z))),
        float(np.mean(holds)),
        min(1.0, tried * part ** max(foreign.values())),
    )


def name_kinds(source: StructureFacts, target: StructureFacts) -> list[Kind]:
    """Name the differences that are sure and large, the largest first."""
    found = [
        *_elements(source, target),
        *_classes(source, target),
        *_prototypes(source, target),
        *_vacuum(source, target),
        *_sizes(source, target),
    ]
    return sorted(found, key=lambda kind: -kind.size)


def _elements(source: StructureFacts, target: StructureFacts) -> list[Kind]:
    from ase.data import chemical_symbols

    here, there = target.fractions > 0, source.fractions > 0
    own, known = np.flatnonzero(here.any(axis=0)), np.flatnonzero(there.any(axis=0))
    if len(own) <= _FEW_ELEMENTS and len(known) >= _FEWER * len(own):
        names = ", ".join(chemical_symbols[z] for z in own)
        only = float(there[:, np.setdiff1d(known, own)].any(axis=1).mean())
        if only >= LEAST_SHARE:
            words = f"few elements: {names} only, against {len(known)} elements in the source"
            return [Kind("elements", words, only)]
    difference = here.mean(axis=0) - there.mean(axis=0)
    rows: list[str] = []
    for z in np.argsort(-np.abs(difference)):
        if abs(difference[z]) < LEAST_SHARE or len(rows) == _NAMED:
            break
        if _sure(here[:, z], there[:, z], here.shape[1]):
            share = f"{here[:, z].mean():.0%} against {there[:, z].mean():.0%}"
            rows.append(f"{chemical_symbols[z]} in {share}")
    if not rows:
        return []
    words = f"other elements: {', '.join(rows)} of the structures"
    return [Kind("elements", words, float(np.abs(difference).max()))]


def _classes(source: StructureFacts, target: StructureFacts) -> list[Kind]:
    kinds = np.unique(np.concatenate([source.kind, target.kind]))
    found = []
    for kind in kinds:
        here, there = target.kind == kind, source.kind == kind
        difference = float(here.mean() - there.mean())
        if abs(difference) >= LEAST_SHARE and _sure(here, there, len(kinds)):
            found.append((abs(difference), f"{kind} {here.mean():.0%} against {there.mean():.0%}"))
    if not found:
        return []
    found.sort(reverse=True)
    words = f"another chemistry: {', '.join(text for _, text in found[:_NAMED])}"
    return [Kind("class", words, found[0][0])]


def _prototypes(source: StructureFacts, target: StructureFacts) -> list[Kind]:
    """Name a structure type; where distortions hide it, the type of formula that most have."""
    # What has hardly any symmetry has only its composition in common.
    symmetric = [name for name in target.prototype if int(name.split()[1]) > _TRICLINIC]
    if not symmetric:
        return []
    names, counts = np.unique(symmetric, return_counts=True)
    most = str(names[np.argmax(counts)])
    formula, _ = most.split()
    formulas = [np.char.startswith(f.prototype, f"{formula} ") for f in (target, source)]
    if formulas[0].mean() > _ONE and len(formula) > 1:
        kind = "one type of formula"
        here, there, more = *formulas, f", most often {prototype_name(most)}"
        named = formula
    else:
        here, there = target.prototype == most, source.prototype == most
        kind = "one prototype" if here.mean() > _ONE else "a frequent prototype"
        named, more = prototype_name(most), ""
    difference = float(here.mean() - there.mean())
    if difference < LEAST_SHARE or not _sure(here, there, len(names)):
        return []
    words = f"{kind}: {named}, {here.mean():.0%} of the structures against {there.mean():.1%}{more}"
    return [Kind("prototype", words, difference)]


def _vacuum(source: StructureFacts, target: StructureFacts) -> list[Kind]:
    here, there = (f.vacuum_angstrom > VACUUM_ANGSTROM for f in (target, source))
    difference = float(here.mean() - there.mean())
    if abs(difference) < LEAST_SHARE or not _sure(here, there, 1):
        return []
    thick = float(np.median((target if difference > 0 else source).vacuum_angstrom))
    what = (
        f"vacuum, as of layers (2D), wires or molecules: {here.mean():.0%} of the structures "
        f"against {there.mean():.0%} have an empty gap of more than {VACUUM_ANGSTROM:g} Å (median "
        f"{thick:.0f} Å)"
    )
    return [Kind("vacuum", what if difference > 0 else f"less {what}", abs(difference))]


def _sizes(source: StructureFacts, target: StructureFacts) -> list[Kind]:
    from scipy.stats import ks_2samp

    found = []
    for name, field, larger, smaller, unit in (
        (
            "cell_size",
            "n_primitive",
            "larger cells",
            "smaller cells",
            "atoms in the primitive cell",
        ),
        ("volume", "volume_angstrom3", "more room", "less room", "Å³ per atom"),
    ):
        here, there = getattr(target, field), getattr(source, field)
        test = ks_2samp(here, there)
        if test.statistic < LEAST_DISTANCE or test.pvalue > _LEVEL / 2:
            continue
        a, b = float(np.median(here)), float(np.median(there))
        wide = np.ptp(np.quantile(here, [0.05, 0.95])) > np.ptp(np.quantile(there, [0.05, 0.95]))
        what = larger if a > b else smaller if a < b else f"{'wider' if wide else 'narrower'} range"
        words = f"{what}: {a:.3g} {unit} (median) against {b:.3g}"
        found.append(Kind(name, words, float(test.statistic)))
    return found


def _sure(here: NDArray[np.bool_], there: NDArray[np.bool_], tried: int) -> bool:
    """Say whether two shares differ (Fisher's exact test), for the number of those looked at."""
    from scipy.stats import fisher_exact

    table = [[here.sum(), (~here).sum()], [there.sum(), (~there).sum()]]
    return bool(fisher_exact(table)[1] * tried <= _LEVEL)
