"""What each atom contributes to a prediction, on the structure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.properties import unit_of
from matxfer.errors import OptionError
from matxfer.plot import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

#: Ends of what :class:`matxfer.MatxferCalculator` calls contributions.
_PER_ATOM = "_contributions"
_VIEW = "12x,-22y,0z"


def contributions(
    structure: Any,
    values: Any = None,
    *,
    label: str = "",
    kind: str = "structure",
    rotation: str = _VIEW,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what each atom contributes to a property that is a mean over atoms.

    Only such properties have contributions: energies per atom by default. Where the readout looks
    at statistics of the atoms (gaps, moduli), or the property is fitted on a logarithmic scale,
    the network says nothing of single atoms, and this raises an error.

    Parameters
    ----------
    structure
        ASE atoms, a :class:`matxfer.Crystal` or a pymatgen structure. Atoms with a
        :class:`matxfer.MatxferCalculator` know their contributions.
    values
        Contributions (n_atoms,); or the name of a property that the calculator of the atoms
        predicts; ``None``: the first one that has contributions.
    label
        Of the colours, with the unit; of a property it is known.
    kind
        ``"structure"``: atoms in their cell, coloured; ``"bars"``: a bar per atom.
    rotation
        View of the structure, as in ASE.
    title
        Above the figure.
    ax
        Axes to draw on; ``None``: a new figure.

    Returns
    -------
    Axes

    Raises
    ------
    OptionError
        If there are no contributions, or not one per atom.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from matxfer import plot
    >>> ax = plot.contributions(bulk("NaCl", "rocksalt", a=5.64), [-1.5, -2.3], label="E_f (eV)")
    >>> ax.figure.axes[-1].get_ylabel()
    'E_f (eV)'
    """
    if kind not in ("structure", "bars"):
        raise OptionError(f"kind is {kind!r}, but must be structure or bars")
    atoms = _atoms(structure)
    if values is None or isinstance(values, str):
        values, label = _predicted(atoms, values, label)
    each = np.asarray(values, dtype=np.float64)
    if each.shape != (len(atoms),):
        raise OptionError(
            f"contributions are of shape {each.shape}, but there are {len(atoms)} atoms"
        )
    if not np.isfinite(each).all():
        raise OptionError("a contribution is not finite")
    with style.axes(ax) as axis:
        if kind == "structure":
            _structure(axis, atoms, each, label, rotation)
        else:
            _bars(axis, atoms, each, label)
        if title:
            axis.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def _atoms(structure: Any) -> Any:
    """Return ASE atoms of a structure."""
    if hasattr(structure, "get_positions"):
        return structure
    if hasattr(structure, "to_ase"):
        return structure.to_ase()
    if hasattr(structure, "to_ase_atoms"):
        return structure.to_ase_atoms()
    raise OptionError(
        f"a {type(structure).__name__} is no structure; give ASE atoms, a Crystal or pymatgen's"
    )


def _predicted(atoms: Any, name: str | None, label: str) -> tuple[Any, str]:
    """Ask the calculator of the atoms."""
    offered = getattr(atoms.calc, "implemented_properties", ())
    known = [each.removesuffix(_PER_ATOM) for each in offered if each.endswith(_PER_ATOM)]
    if not known:
        raise OptionError(
            "give contributions, or atoms with a MatxferCalculator one of whose properties is a "
            "mean over atoms (formation_energy_ev_per_atom of the base models)"
        )
    chosen = (name or known[0]).removesuffix(_PER_ATOM)
    if chosen not in known:
        raise OptionError(
            f"{chosen!r} has no contributions of atoms: it is not a mean over atoms (its readout "
            f"looks at all of them at once, or its scale is not linear); there are {known}"
        )
    values = atoms.calc.get_property(f"{chosen}{_PER_ATOM}", atoms)
    words = f"contribution to {style.quantity(chosen)}"
    return values, label or style.with_unit(words, unit_of(chosen))


def _colours(each: Floats) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # Contributions have no natural zero: what matters is which atoms are above the others.
    spread = np.ptp(each)
    margin = 0.0 if spread > 0 else 0.5 * (abs(each[0]) or 1.0)
    return ScalarMappable(Normalize(each.min() - margin, each.max() + margin), style.SEQUENTIAL)


def _structure(axis: Any, atoms: Any, each: Floats, label: str, rotation: str) -> None:
    from ase.data import covalent_radii
    from ase.visualize.plot import plot_atoms

    scale = _colours(each)
    before = len(axis.patches)
    plot_atoms(
        atoms, axis, rotation=rotation, radii=0.5 * covalent_radii[atoms.numbers],
        colors=scale.to_rgba(each), show_unit_cell=2 if atoms.cell.rank == 3 else 0,
    )  # fmt: skip
    _symbols(axis, atoms, axis.patches[before:], rotation, scale, each)
    axis.axis("off")
    axis.figure.colorbar(scale, ax=axis, label=style.plain(label), aspect=30, pad=0.02)


def _symbols(axis: Any, atoms: Any, patches: Any, rotation: str, scale: Any, each: Floats) -> None:
    """Write each atom's symbol on its disc, below the discs in front of it."""
    from ase.utils import rotate

    from matxfer.plot.elements import readable_on

    depth = (atoms.positions @ rotate(rotation))[:, 2]
    order = np.argsort(depth, kind="stable")  # ASE paints from the back to the front
    discs = [patch for patch in patches if hasattr(patch, "radius")]
    for rank, patch in enumerate(patches):
        patch.set_zorder(1 + 0.001 * rank)
    if len(discs) != len(atoms):
        return
    for atom, disc in zip(order, discs, strict=True):
        axis.text(
            *disc.center, atoms.symbols[atom], ha="center", va="center", fontsize=7,
            color=readable_on(scale.to_rgba(each[atom])), zorder=disc.get_zorder() + 0.0005,
        )  # fmt: skip


def _bars(axis: Any, atoms: Any, each: Floats, label: str) -> None:
    names = [f"{symbol}{k + 1}" for k, symbol in enumerate(atoms.get_chemical_symbols())]
    places = np.arange(len(each))
    axis.bar(places, each, color=style.COLOURS[0], width=0.7)
    axis.axhline(
        each.mean(), color=style.GUIDE, linestyle="--", label=f"mean {style.signed(each.mean())}"
    )
    axis.axhline(0, color="black", linewidth=0.7)
    step = max(1, len(each) // 12)
    axis.set_xticks(places[::step], names[::step])
    axis.set_xlabel("atom")
    axis.set_ylabel(style.plain(label))
    axis.legend()
