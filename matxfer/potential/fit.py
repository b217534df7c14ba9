"""Making a general potential from a property model, and a plugin from a general potential."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.crystal import Crystal
from matxfer.data.table import TableError
from matxfer.errors import OptionError
from matxfer.fisher import total_fisher
from matxfer.model import find_model, is_potential, load_model
from matxfer.potential.config import PotentialConfig
from matxfer.potential.dataset import FrameData, prepare
from matxfer.potential.errors import measure
from matxfer.potential.fisher import potential_fisher
from matxfer.potential.frames import Frames, read_frames
from matxfer.potential.model import Potential, load_potential, potential_from
from matxfer.potential.packed import PackedFrames
from matxfer.potential.plugin import PotentialPlugin
from matxfer.potential.references import fit_references, shift_references
from matxfer.potential.relaxed import relaxed_frames
from matxfer.potential.training import train_potential
from matxfer.provenance import provenance
from matxfer.transfer.ewc import EWCPenalty
from matxfer.transfer.freezing import check_depth, trainable_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ase import Atoms

    from matxfer.potential.frames import Source

    Progress = Callable[[int], None]
    OnData = Callable[[FrameData], None]
    OnBest = Callable[[dict[str, float]], None]

#: Frames over which Fisher information is averaged.
FISHER_FRAMES = 500


def make_potential(
    table: Source | Sequence[Source] | Sequence[Atoms] | Frames,
    folder: str | Path,
    *,
    model: str | Path | None = "mp-small",
    architecture: dict[str, Any] | None = None,
    split_column: str | None = None,
    where: dict[str, list[Any]] | None = None,
    relaxed: Source | None = None,
    relaxed_where: dict[str, list[Any]] | None = None,
    n_relaxed: int = 6000,
    licence: str = "",
    check: bool = True,
    on_graphs: Progress | None = None,
    on_data: OnData | None = None,
    on_best: OnBest | None = None,
    **options: Any,
) -> Potential:
    """Train a general potential on frames and write it to a folder.

    Parameters
    ----------
    table
        Frames, see :func:`matxfer.potential.frames.read_frames`.
    folder
        Where to; the best epoch so far is there from the first one on.
    model
        Property model whose layers are the start, or a potential to go on with; None: random
        layers in the shape of ``architecture``.
    split_column, where
        Column of the split; values that a row must have in other columns.
    relaxed, relaxed_where, n_relaxed
        Table of relaxed structures that have neither forces nor stress
        (:mod:`matxfer.potential.relaxed`), which of its rows, and how many at most. Formulas of
        the frames that are validated or tested on are left out.
    licence
        Of the data, for the card.
    check
        Whether frames that are certainly in other units are refused; else that is a warning.
    on_graphs, on_data, on_best
        Called per graph, with the frames when they are ready, and with the validation errors of
        each best epoch.
    options
        Of :class:`PotentialConfig`.
    """
    config = PotentialConfig(**options)
    torch.manual_seed(config.seed)
    started = time.monotonic()
    potential = _start(model, architecture)
    check_depth(potential.backbone, config.freeze)
    trained = model is not None and _is_potential(model)
    data = prepare(
        table,
        potential,
        trained=trained,
        split_column=split_column,
        where=where,
        seed=config.seed,
        check=check,
        on_graphs=on_graphs,
    )
    packed, train = data.packed, data.packed.rows("train")
    _require_both(data)
    if on_data is not None:
        on_data(data)
    if not trained:
        fit_references(potential, packed)
    potential.elements |= set(data.elements)
    if relaxed is not None:
        at_rest = _at_rest(relaxed, relaxed_where, n_relaxed, data, config, potential)
        potential.elements |= {int(z) for z in np.unique(at_rest.graphs.numbers)}
        potential.card["relaxed"] = {
            "table": Path(relaxed).name if isinstance(relaxed, str | Path) else "data frame",
            "where": relaxed_where or {},
            "rows": len(at_rest) - len(at_rest.errors),
        }
        packed = PackedFrames.concatenate([packed, at_rest])
    _trainable(potential, config.freeze)
    potential.card |= {
        "data": {
            **data.facts(),
            "split_column": split_column,
            "where": where or {},
            "licence": licence,
        },
        "start": str(model) if model else "random",
        "configuration": asdict(config),
    }

    def keep(best: Potential, figures: dict[str, float]) -> None:
        best.card["validation"] = figures
        best.save(folder)
        if on_best is not None:
            on_best(figures)

    fit = train_potential(potential, packed, config, on_best=keep)
    potential.requires_grad_(False)
    validation = measure(potential, packed, "val")
    noise = {
        "energy": validation["energy_rmse_ev_per_atom"],
        "forces": validation["forces_rmse_ev_per_a"],
    }
    chosen = np.random.default_rng(config.seed).permutation(train)[:FISHER_FRAMES]
    fisher = total_fisher(potential_fisher(potential, packed.graphs, chosen, noise))
    potential.card |= {
        "validation": validation,
        "test": measure(potential, packed, "test"),
        "fisher": {"samples": len(chosen), "noise": noise, "n_source": len(train)},
        "epochs": len(fit.history),
        "provenance": provenance(time.monotonic() - started),
    }
    potential.save(folder, fisher)
    return potential


def _at_rest(
    table: Source,
    where: dict[str, list[Any]] | None,
    n: int,
    data: FrameData,
    config: PotentialConfig,
    potential: Potential,
) -> PackedFrames:
    """Return packed relaxed structures without the formulas that are validated or tested on."""
    frames = data.frames
    held_out = {
        crystal.formula
        for crystal, part in zip(frames.crystals, frames.split, strict=True)
        if part in ("val", "test") and isinstance(crystal, Crystal)
    }
    found = relaxed_frames(table, where=where, n=n, leave_out=held_out, seed=config.seed)
    return PackedFrames.build(found, potential.backbone.graph_options.cutoff_angstrom)


def finetune_potential(
    table: Source | Sequence[Source] | Sequence[Atoms] | Frames,
    folder: str | Path | None = None,
    *,
    potential: str | Path | Potential = "mp-potential",
    split_column: str | None = None,
    where: dict[str, list[Any]] | None = None,
    source_data: str | Path | Frames | None = None,
    check: bool = True,
    on_graphs: Progress | None = None,
    on_data: OnData | None = None,
    on_best: OnBest | None = None,
    **options: Any,
) -> PotentialPlugin:
    """Train a plugin of a general potential on frames.

    Parameters
    ----------
    table
        Frames, see :func:`matxfer.potential.frames.read_frames`.
    folder
        Where to write it; None: nowhere.
    potential
        The general one, by name, folder or as it is.
    split_column, where
        As in :func:`make_potential`.
    source_data
        Frames of the general potential, whose ``test`` part tells what has been forgotten.
    check, on_graphs, on_data, on_best
        As in :func:`make_potential`.
    options
        Of :class:`PotentialConfig`.

    Raises
    ------
    TableError, OptionError, FormatError
        If the frames, the options or the potential cannot be used.

    Examples
    --------
    >>> import matxfer
    >>> from ase.build import bulk
    >>> from ase.calculators.emt import EMT
    >>> frames = []
    >>> for k in range(20):
    ...     atoms = bulk("Cu", a=3.5 + 0.02 * k, cubic=True)
    ...     atoms.rattle(0.05, seed=k)
    ...     atoms.calc = EMT()
    ...     _ = atoms.get_forces()  # what is learned is what has been computed
    ...     frames.append(atoms)
    >>> matxfer.finetune_potential(frames, "cu-plugin", freeze=2, epochs=1)
    PotentialPlugin('cu-plugin' on 'mp-potential', 2 of 3 layers frozen)
    """
    config = PotentialConfig(**options)
    torch.manual_seed(config.seed)
    started = time.monotonic()
    base = potential if isinstance(potential, Potential) else load_potential(potential)
    plugin = PotentialPlugin(base, config.freeze)
    data = prepare(
        table,
        base,
        trained=True,
        split_column=split_column,
        where=where,
        seed=config.seed,
        check=check,
        on_graphs=on_graphs,
    )
    packed = data.packed
    _warn_of_new_elements(base, data, config)
    if on_data is not None:
        on_data(data)
    if folder is not None:  # better now than after the training
        Path(folder).mkdir(parents=True, exist_ok=True)
    plugin.potential.elements |= set(data.elements)
    if config.strategy == "scratch":
        head = base.head
        fresh = potential_from(
            None, base.backbone.config(), head.hidden_dim, readout=head.readout.kind
        )
        plugin.potential.backbone.load_state_dict(fresh.backbone.state_dict())
        plugin.potential.head.load_state_dict(fresh.head.state_dict())
        fit_references(plugin.potential, packed)
        shift = np.zeros(0)
    else:
        shift = shift_references(plugin.potential, packed)
    before = {part: measure(plugin.potential, packed, part) for part in ("val", "test")}
    penalty = _penalty(plugin, config, len(packed.rows("train")))
    fit = train_potential(
        plugin.potential, packed, config, penalty, on_best and (lambda _, figures: on_best(figures))
    )
    plugin.potential.requires_grad_(False)
    plugin.meta |= {
        "data": data.facts(),
        "elements": data.elements,
        "reference_shift_ev": {str(z): float(shift[z]) for z in np.flatnonzero(shift)},
        "configuration": asdict(config),
        "best_epoch": fit.best_epoch,
        "history": fit.history,
        "validation_before": before["val"],
        "test_before": before["test"],
        "validation": measure(plugin.potential, packed, "val"),
        "test": measure(plugin.potential, packed, "test"),
        "seconds_per_epoch": fit.seconds_per_epoch,
        "provenance": provenance(time.monotonic() - started),
    }
    if source_data is not None:
        plugin.meta["retention"] = retention(plugin, source_data)
    if folder is not None:
        plugin.save(folder)
    return plugin


def retention(
    plugin: PotentialPlugin, source: str | Path | Frames | PackedFrames
) -> dict[str, Any]:
    """Return the errors of the general potential on its test frames before and after a plugin."""
    if not isinstance(source, PackedFrames):
        card = {"data": {}, "configuration": {"seed": 0}} | plugin.base.card
        frames = (
            source
            if isinstance(source, Frames)
            else read_frames(
                source,
                split_column=card["data"].get("split_column"),
                where=card["data"].get("where"),
                seed=card["configuration"]["seed"],
            )
        )
        source = PackedFrames.build(frames, plugin.base.backbone.graph_options.cutoff_angstrom)
    return {
        "before": measure(plugin.base, source, "test"),
        "after": measure(plugin.on_the_base_head(), source, "test"),
    }


def _penalty(plugin: PotentialPlugin, config: PotentialConfig, n_train: int) -> EWCPenalty | None:
    if config.retain == "none":
        return None
    if config.freeze == plugin.base.backbone.n_layers:
        raise OptionError("all layers are frozen: there is nothing to retain")
    fisher = plugin.base.fisher()
    ratio = int(plugin.base.card["fisher"]["n_source"]) / max(n_train, 1)
    return EWCPenalty(plugin.potential.backbone, fisher, config.strength, ratio)


def _require_both(data: FrameData) -> None:
    """Refuse frames that a general potential cannot be made of."""
    frames = data.frames
    for part in ("train", "val"):
        rows = data.packed.rows(part)
        energies = np.isfinite(frames.energy_ev[rows]).any()
        forces = any(frames.forces_ev_per_a[row] is not None for row in rows)
        for what, there in (("energies", energies), ("forces", forces)):
            if not there:
                raise TableError(
                    f"{frames.source}: there are no {what} in the part {part!r} of the split; a "
                    "general potential needs energies and forces"
                )


def _warn_of_new_elements(base: Potential, data: FrameData, config: PotentialConfig) -> None:
    new = [z for z in data.elements if z not in base.elements]
    if new and config.freeze and config.strategy == "finetune":
        from ase.data import chemical_symbols

        names = ", ".join(chemical_symbols[z] for z in new)
        warnings.warn(
            f"the potential has never seen {names}, whose embedding is frozen at random numbers; "
            "train all layers (--freeze 0)",
            stacklevel=3,
        )


def _start(model: str | Path | None, architecture: dict[str, Any] | None) -> Potential:
    if model is None:
        config = architecture or load_model("mp-small").backbone.config()
        return potential_from(None, config)
    if _is_potential(model):
        return load_potential(model)
    start = load_model(model)
    return potential_from(start, start.backbone.config())


def _is_potential(model: str | Path) -> bool:
    return is_potential(find_model(model)[1])


def _trainable(potential: Potential, depth: int) -> None:
    potential.requires_grad_(False)
    potential.head.requires_grad_(True)
    for _, block in trainable_blocks(potential.backbone, depth):
        block.requires_grad_(True)
