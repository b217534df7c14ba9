"""Relaxing structures, many in a row: ASE's optimisers, a row of a table per structure."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.columns import CRYSTAL, RESULTS, Row
from matxfer.crystal import Crystal, CrystalError
from matxfer.errors import ErrorKind
from matxfer.forcefield import DomainWarning
from matxfer.options import COUNT, POSITIVE, check_choice, check_ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ase import Atoms

    from matxfer.calculator import MatxferCalculator
    from matxfer.readers import Entry

#: Names of ASE's optimisers by ours.
OPTIMIZERS = {"fire": "FIRE", "lbfgs": "LBFGS", "bfgs": "BFGS", "mdmin": "MDMin"}
#: Columns of the table; energies and volumes are those of the relaxed structure.
COLUMNS = (
    "id",
    "source",
    "frame",
    "formula",
    "n_sites",
    "converged",
    "steps",
    "energy_ev",
    "energy_ev_per_atom",
    "energy_change_ev_per_atom",
    "largest_force_ev_per_a",
    "largest_stress_ev_per_a3",
    "volume_angstrom3",
    "volume_change_fraction",
    "forces_std_ev_per_a",
    "warning",
    "error_kind",
    "error",
)


@dataclass(frozen=True, slots=True)
class RelaxOptions:
    """How structures are relaxed.

    Parameters
    ----------
    fmax_ev_per_a
        Largest force at which a structure is relaxed. Of a cell the same limit holds for the
        derivatives by its deformation over the number of atoms, see ASE's ``FrechetCellFilter``.
    steps
        At most so many.
    cell
        Whether the cells of crystals relax too; molecules and slabs keep theirs.
    optimizer
        ``fire``, ``lbfgs``, ``bfgs`` or ``mdmin``.
    pressure_gpa
        External pressure on a relaxing cell.

    Raises
    ------
    OptionError
        If one is out of its range.
    """

    fmax_ev_per_a: float = 0.02
    steps: int = 500
    cell: bool = True
    optimizer: str = "fire"
    pressure_gpa: float = 0.0

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        check_ranges(self, {"fmax_ev_per_a": POSITIVE, "steps": COUNT, "pressure_gpa": FINITE})


#: A pressure may pull.
FINITE = (lambda value: bool(np.isfinite(value)), "must be finite")


def relax(atoms: Atoms, options: RelaxOptions | None = None) -> tuple[bool, int]:
    """Relax atoms that have a calculator, in place; return whether that was reached, and steps.

    Raises
    ------
    CrystalError
        If they are no usable structure, or become none on the way.
    """
    import ase.optimize
    from ase.filters import FrechetCellFilter
    from ase.units import GPa

    options = options or RelaxOptions()
    target: Any = atoms
    if options.cell and atoms.pbc.all():
        # ASE scales the cell's derivatives by the number of atoms unless told otherwise.
        target = FrechetCellFilter(atoms, scalar_pressure=options.pressure_gpa * GPa)
    make = getattr(ase.optimize, OPTIMIZERS[options.optimizer])
    dynamics = make(target, logfile=None)
    try:
        with warnings.catch_warnings():
            # SciPy's, of 1e-12 in the logarithm of the cell's deformation, at every step.
            warnings.filterwarnings("ignore", "logm result may be inaccurate", RuntimeWarning)
            converged = dynamics.run(fmax=options.fmax_ev_per_a, steps=options.steps)
    except CrystalError as error:
        if dynamics.nsteps == 0:
            raise
        raise _astray(dynamics.nsteps, str(error)) from error
    except (ArithmeticError, np.linalg.LinAlgError, ValueError) as error:
        raise _astray(dynamics.nsteps, f"{type(error).__name__}: {error}") from error
    return bool(converged), int(dynamics.nsteps)


def _astray(steps: int, why: str) -> CrystalError:
    return CrystalError(
        f"the relaxation went astray after {steps} steps ({why})",
        "start from a structure closer to a minimum, or keep the cell",
        kind=ErrorKind.RELAXATION_FAILED,
    )


def relax_entries(
    entries: Iterable[Entry], calculator: MatxferCalculator, options: RelaxOptions
) -> Iterator[Row]:
    """Yield a row per entry with :data:`COLUMNS`, and the relaxed structure with its results.

    A structure that cannot be read or relaxed has its reason in ``error_kind`` and ``error``.
    """
    for entry in entries:
        row: Row = dict.fromkeys(COLUMNS)
        row |= {"id": entry.id, "source": entry.source, "frame": entry.frame}
        try:
            if entry.error is not None:
                raise entry.error
            assert entry.crystal is not None
            row |= {"formula": entry.crystal.formula, "n_sites": entry.crystal.n_sites}
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", DomainWarning)
                row |= _relaxed(entry.crystal, calculator, options)
            row["warning"] = _told(caught)
        except CrystalError as error:
            located = error.located(entry.source, entry.frame)
            row |= {"error_kind": str(error.kind), "error": str(located)}
        yield row


def _told(caught: list[warnings.WarningMessage]) -> str | None:
    """Return what was said of the training domain as one text, and pass other warnings on."""
    words = []
    for warning in caught:
        if issubclass(warning.category, DomainWarning):
            words.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return "; ".join(words) or None


def _relaxed(crystal: Crystal, calculator: MatxferCalculator, options: RelaxOptions) -> Row:
    assert calculator.forcefield is not None
    calculator.forcefield.forget_warnings()
    calculator.reset()
    atoms = crystal.to_ase()
    atoms.calc = calculator
    before = atoms.get_potential_energy()
    converged, steps = relax(atoms, options)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    results: dict[str, Any] = {"energy": energy, "forces": forces}
    n = len(atoms)
    row: Row = {
        "converged": int(converged),
        "steps": steps,
        "energy_ev": energy,
        "energy_ev_per_atom": energy / n,
        "energy_change_ev_per_atom": (energy - before) / n,
        "largest_force_ev_per_a": float(np.linalg.norm(forces, axis=1).max()),
        "forces_std_ev_per_a": calculator.results.get("uncertainty"),
        RESULTS: results,
        CRYSTAL: Crystal.from_ase(atoms, crystal.id),
    }
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress()
        row |= {
            "largest_stress_ev_per_a3": float(np.abs(results["stress"]).max()),
            "volume_angstrom3": float(atoms.get_volume()),
            "volume_change_fraction": atoms.get_volume() / crystal.volume_angstrom3 - 1,
        }
    return row
