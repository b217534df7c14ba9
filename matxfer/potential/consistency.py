"""Whether frames can be what they say: units, signs, references of energy, offsets of stress."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import MAX_ATOMIC_NUMBER, Crystal
from matxfer.potential.labels import ENERGY, FORCES, STRESS
from matxfer.potential.work import MIN_PAIRS, Work, compare, pairs_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.potential.frames import Frames
    from matxfer.potential.work import Pairs

#: Half of the frames above these, and the unit is another: 80 times the bulk modulus of copper,
#: and forces of atoms in collision.
_STRESS_EV_PER_A3, _FORCE_EV_PER_A = 5.0, 40.0
_HARTREE, _BOHR, _KCAL, _KJ, _GPA = 27.211386, 0.529177, 23.060548, 96.485332, 160.21766
_OTHER_ENERGIES = {"hartree": _HARTREE, "rydberg": _HARTREE / 2}
_SMALL_ENERGIES = {"kcal/mol": _KCAL, "kJ/mol": _KJ, "meV": 1e3}
#: A factor this close to that of a unit is that of the unit.
_CLOSE = 0.15
#: Within these limits a factor is one: pairs of frames are not infinitely close.
_ONE = (0.6, 1.6)
#: Offsets of stress below it do no harm; 0.005 eV/Å³ are 8 kbar.
_PRESSURE_EV_PER_A3 = 0.005
#: Energies of two sets with another reference differ by more than so many eV/atom, and by so many
#: times their spread.
OFFSET_EV_PER_ATOM, OFFSET_SPREADS = 0.6, 10.0
#: Or they leave a gap of so many times that energy between them.
GAP = 1.5
#: The same where a potential has explained what comes of the structures.
EXPLAINED_OFFSET_EV_PER_ATOM = 0.2
#: Fewer frames are no set; and a set is no less than this part of all.
_SET, _PART = 5, 0.03
#: Atoms with so many times the usual room are in molecules or alone.
_THIN = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, or seems so, with a set of frames.

    Attributes
    ----------
    kind
        ``units``, ``references``, ``stress_offset`` or ``work``.
    message
        What, where, and what to do about it.
    certain
        Whether training on them can only go wrong.
    figures
        The numbers.
    """

    kind: str
    message: str
    certain: bool = False
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the finding as a JSON object."""
        return asdict(self)


def check_units(frames: Frames) -> list[Finding]:
    """Look for other units, signs and offsets than eV, eV/Å and eV/Å³, file by file."""
    found: list[Finding] = []
    usable = _usable(frames)
    for number, (source, labels) in enumerate(frames.labels):
        rows = np.flatnonzero(usable & (frames.file == number))
        if len(rows):
            place = _Place(Path(source).name, labels)
            found += _scales(frames, rows, place) or _work(frames, rows, place)
    return found


@dataclass(frozen=True, slots=True)
class _Place:
    """A file, and what it calls energy, forces and stress."""

    file: str
    labels: dict[str, str]

    def __getitem__(self, what: str) -> str:
        return repr(self.labels.get(what, what))


# -- scales that no matter has -----------------------------------------------------------------
def _scales(frames: Frames, rows: NDArray[np.int64], place: _Place) -> list[Finding]:
    found = []
    stress = np.abs(frames.stress_ev_per_a3[rows]).max((1, 2))
    stress = stress[np.isfinite(stress)]
    if len(stress) >= _SET and (typical := float(np.median(stress))) > _STRESS_EV_PER_A3:
        found.append(
            Finding(
                "units",
                f"{place.file}: half of the frames have a stress above {typical:.3g} in "
                f"{place[STRESS]}, which cannot be eV/Å³: divide GPa by 160.22, and VASP's kbar "
                "by -1602.2",
                certain=True,
                figures={"median_stress": typical},
            )
        )
    forces = [f for row in rows if (f := frames.forces_ev_per_a[row]) is not None]
    size = np.array([np.sqrt(np.square(f).mean()) for f in forces])
    if len(size) >= _SET and (typical := float(np.median(size))) > _FORCE_EV_PER_A:
        found.append(
            Finding(
                "units",
                f"{place.file}: half of the frames have forces above {typical:.3g} in "
                f"{place[FORCES]}, which cannot be eV/Å: divide kcal/mol/Å by 23.061, and multiply "
                "hartree/bohr by 51.422",
                certain=True,
                figures={"median_force": typical},
            )
        )
    return found or _intensive(frames, rows, place)


def _intensive(frames: Frames, rows: NDArray[np.int64], place: _Place) -> list[Finding]:
    """Find energies per atom where those of cells belong: they do not grow with the cells."""
    rows = rows[np.isfinite(frames.energy_ev[rows])]
    n_atoms = _atoms(frames, rows)
    sizes, counts = np.unique(n_atoms, return_counts=True)
    sizes = sizes[counts >= 3]
    if len(sizes) < 2 or sizes[-1] < 2 * sizes[0]:
        return []
    x, energy = _fractions(frames, rows), frames.energy_ev[rows]
    extensive = np.median(np.abs(energy - n_atoms * (x @ _references_of(x, energy / n_atoms))))
    intensive = np.median(np.abs(energy - x @ _references_of(x, energy)))
    if len(rows) < 3 * np.count_nonzero(x.any(axis=0)) or 20 * intensive > extensive:
        return []
    message = (
        f"{place.file}: {place[ENERGY]} does not grow with the number of atoms, so these are "
        "energies per atom; multiply them by it"
    )
    figures = {"left_per_cell": float(extensive), "left_per_atom": float(intensive)}
    return [Finding("units", message, certain=True, figures=figures)]


# -- the work between similar frames -------------------------------------------------------------
def _work(frames: Frames, rows: NDArray[np.int64], place: _Place) -> list[Finding]:
    pairs = pairs_of(frames, rows)
    work = compare(pairs)
    figures = {"pairs": work.pairs, "forces": work.forces, "stress": work.stress}
    off = [k for k in (work.forces, work.stress) if k is not None and not _is_one(k)]
    if not off:
        return _pressures(frames, rows, place)
    reason = _unit(work, pairs, place)
    if reason is not None:
        return [Finding("units", f"{place.file}: {reason}", certain=True, figures=figures)]
    what = place[FORCES] if work.forces in off else place[STRESS]
    message = (
        f"{place.file}: between similar frames the energies change by {off[0]:.3g} of the work "
        f"that {what} says: energies and {what} do not belong together; check units, signs and "
        "that all are from one calculation"
    )
    return [Finding("work", message, figures=figures)]


def _is_one(factor: float) -> bool:
    return _ONE[0] < factor < _ONE[1]


def _near(factor: float, unit: float) -> bool:
    return abs(factor / unit - 1) < _CLOSE


def _unit(work: Work, pairs: Pairs, place: _Place) -> str | None:
    """Say which units or signs explain the factors, if any do."""
    a, b = work.forces, work.stress
    if a is not None and not _is_one(a):
        if a < 0:
            flipped = _near(a, -1) or _is_one(-a)
            return (
                f"{place[FORCES]} has the other sign: these are gradients; negate them" * flipped
                or None
            )
        alike = b is None or _ONE[0] < b / a < _ONE[1]
        energies = [name for name, size in _OTHER_ENERGIES.items() if _near(a, 1 / size)]
        energies += [name for name, size in _SMALL_ENERGIES.items() if _near(a, size)]
        if _per_atom(pairs) and alike:
            energies.append("energies per atom (multiply by the number of atoms)")
        if energies and alike:
            return f"{place[ENERGY]} is not in eV: it fits {' or '.join(energies)}"
        forces = {
            "hartree/bohr (multiply by 51.422)": _HARTREE / _BOHR,
            "rydberg/bohr (multiply by 25.711)": _HARTREE / _BOHR / 2,
            "one per bohr, with energies in the same unit (eV, or both in hartree)": 1 / _BOHR,
            "kcal/mol/Å (divide by 23.061)": 1 / _KCAL,
            "kJ/mol/Å (divide by 96.485)": 1 / _KJ,
        }
        units = [name for name, factor in forces.items() if _near(a, factor)]
        return f"{place[FORCES]} is not in eV/Å: it fits {' or '.join(units)}" if units else None
    assert b is not None, "one of the factors is off"
    if _is_one(-b):
        return (
            f"{place[STRESS]} has the other sign: a compressed cell has a negative one; negate it"
        )
    stress = {"GPa (divide by 160.22)": 1 / _GPA, "kbar (divide by 1602.2)": 0.1 / _GPA}
    stress |= {f"{name}, of the other sign": -factor for name, factor in stress.items()}
    stress |= {
        f"another unit, or energies and forces in {name} and {name}/Å": size
        for name, size in _SMALL_ENERGIES.items()
    }
    volume = float(np.median(pairs.volume))
    stress |= {
        "a virial of ASE's sign (divide by the volume)": 1 / volume,
        "a virial (name it virial, or divide by minus the volume)": -1 / volume,
    }
    units = [name for name, factor in stress.items() if abs(b / factor - 1) < 2 * _CLOSE]
    return f"{place[STRESS]} is not in eV/Å³: it fits {' or '.join(units)}" if units else None


def _per_atom(pairs: Pairs) -> bool:
    """Say whether energies times the number of atoms are what the forces say."""
    factor = compare(replace(pairs, energy=pairs.energy * pairs.n_atoms)).forces
    return factor is not None and _near(factor, 1) and bool((pairs.n_atoms > 1).any())


def _pressures(frames: Frames, rows: NDArray[np.int64], place: _Place) -> list[Finding]:
    """Find stresses with a constant term on the diagonal, formula by formula."""
    if STRESS not in place.labels:
        return []
    formula = np.array([_crystal(frames, row).formula for row in rows])
    found = []
    for name, count in zip(*np.unique(formula, return_counts=True), strict=True):
        if count < MIN_PAIRS:
            continue
        work = compare(pairs_of(frames, rows[formula == name]))
        p = work.pressure_ev_per_a3
        if p is not None and abs(p) > _PRESSURE_EV_PER_A3:
            message = (
                f"{place.file}: the stresses of {name} are off by {-p:+.4f} eV/Å³ "
                f"({-p * _GPA:+.1f} GPa) on the diagonal from what the energies of strained cells "
                f"say; add {p:.4f} eV/Å³ to it, or train without stresses (--stress-weight 0)"
            )
            figures = {"formula": str(name), "pressure_ev_per_a3": p, "pairs": work.pairs}
            found.append(Finding("stress_offset", message, figures=figures))
    return found


# -- references of the energies ------------------------------------------------------------------
def check_references(
    frames: Frames, predicted_ev_per_atom: NDArray[np.float64] | None = None
) -> list[Finding]:
    """Find sets of frames whose energies have another zero than those of the others.

    Parameters
    ----------
    frames
        The frames; their groups and what an energy per element leaves tell the sets apart.
    predicted_ev_per_atom
        What a potential says of them, (n,), NaN where nothing: it makes the search sharper.
    """
    predicted = predicted_ev_per_atom
    rows = np.flatnonzero(_usable(frames))
    rows = rows[np.isfinite(frames.energy_ev[rows])]
    energy, least = frames.energy_ev[rows] / _atoms(frames, rows), OFFSET_EV_PER_ATOM
    if predicted is not None:
        known = np.isfinite(predicted[rows])
        rows, energy = rows[known], (energy - predicted[rows])[known]
        least = EXPLAINED_OFFSET_EV_PER_ATOM
    room = np.array([_crystal(frames, row).volume_angstrom3 for row in rows.tolist()]) / _atoms(
        frames, rows
    )
    if len(rows) < 2 * _SET:
        return []
    dense = room < _THIN * np.median(room)
    rows, energy = rows[dense], energy[dense]
    x, group = _fractions(frames, rows), frames.group[rows]
    found = []
    for name in np.unique(group):
        inside = group == name
        if told := _apart(x, energy, inside, least):
            found.append(_other_zero(f"group {str(name)!r}", int(inside.sum()), told, frames))
    if found:
        return found
    # Without a word of where they come from: where the energies leave the widest gap.
    left = energy - x @ _references_of(x, energy)
    order, few = np.argsort(left), _fewest(len(left))
    gaps = np.diff(left[order])[few - 1 : len(left) - few]
    if len(gaps) and gaps.max() > GAP * least:
        cut = few + int(np.argmax(gaps))
        inside = np.zeros(len(left), dtype=bool)
        inside[order[cut:] if 2 * cut > len(left) else order[:cut]] = True
        if told := _apart(x, energy, inside, least):
            what = f"some frames, the first of them frame {rows[np.flatnonzero(inside)[0]]}"
            found.append(_other_zero(what, int(inside.sum()), told, frames))
    return found


def _fewest(n: int) -> int:
    return max(_SET, round(_PART * n))


def _apart(
    x: NDArray[np.float64],
    energy: NDArray[np.float64],
    inside: NDArray[np.bool_],
    least_ev_per_atom: float,
) -> tuple[float, float] | None:
    """Return the offset of a set from all others, and the larger spread, if they are far apart."""
    count, others = int(inside.sum()), int((~inside).sum())
    foreign = x[inside].any(axis=0) & ~x[~inside].any(axis=0)
    if min(count, others) < _fewest(len(inside)) or bool(foreign.any()):
        return None
    left = energy - x @ _references_of(x[~inside], energy[~inside])
    offset = float(np.median(left[inside]))
    spread = max(_spread(left[inside] - offset), _spread(left[~inside]))
    apart = abs(offset) > max(least_ev_per_atom, OFFSET_SPREADS * spread)
    # Wide sets that no frame lies between are apart too.
    inner, outer = np.sign(offset) * left[inside], np.sign(offset) * left[~inside]
    gap = np.quantile(inner, 0.02) - np.quantile(outer, 0.98)
    apart |= bool(gap > GAP * least_ev_per_atom)
    return (offset, spread) if apart else None


def _other_zero(what: str, count: int, told: tuple[float, float], frames: Frames) -> Finding:
    offset, spread = told
    files = frames.name
    message = (
        f"{files}: the energies of {what} ({count} frames) lie {offset:+.3g} eV/atom from those of "
        f"the others, which spread by {spread:.2g}: another functional, pseudopotential or zero of "
        "energy; bring them to one reference, train on one of the sets, or without energies "
        "(--energy-weight 0)"
    )
    figures = {"offset_ev_per_atom": offset, "spread_ev_per_atom": spread, "frames": count}
    return Finding("references", message, figures=figures)


def _references_of(x: NDArray[np.float64], energy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fit an energy per element with least absolute deviations, (119,)."""
    weight = np.ones(len(x))
    found = np.zeros(x.shape[1])
    present = x.any(axis=0)
    kept = x[:, present]
    mean = float(np.median(energy))
    for _ in range(30):
        weighted = kept * weight[:, None]
        gram = weighted.T @ kept + 1e-4 * np.eye(kept.shape[1])
        found[present] = mean + np.linalg.solve(gram, weighted.T @ (energy - mean))
        left = np.abs(energy - x @ found)
        weight = 1 / np.maximum(left, 1e-3 * left.mean() + 1e-9)
        weight /= weight.mean()
    return found


def _spread(values: NDArray[np.float64]) -> float:
    """Return a spread that nine tenths of the values decide."""
    return float(np.quantile(np.abs(values), 0.9)) / 1.645


def _usable(frames: Frames) -> NDArray[np.bool_]:
    return np.array([isinstance(c, Crystal) for c in frames.crystals], dtype=bool)


def _crystal(frames: Frames, row: int) -> Crystal:
    crystal = frames.crystals[row]
    assert isinstance(crystal, Crystal), "only usable frames are looked at"
    return crystal


def _atoms(frames: Frames, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.array([_crystal(frames, row).n_sites for row in rows], dtype=np.float64)


def _fractions(frames: Frames, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the atomic fractions of frames, (n, 119)."""
    x = np.zeros((len(rows), MAX_ATOMIC_NUMBER + 1))
    for k, row in enumerate(rows):
        numbers = _crystal(frames, row).numbers
        np.add.at(x[k], numbers, 1 / len(numbers))
    return x
