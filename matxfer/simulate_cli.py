"""The commands ``matxfer relax`` and ``matxfer md``: structures in, structures out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matxfer.cli_names import model_names, plugin_places
from matxfer.errors import OptionError
from matxfer.terminal import (
    StructureColumn,
    integers,
    interruptible,
    plain_warnings,
    progress_on_terminal,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TextIO

    from ase import Atoms

    from matxfer.calculator import MatxferCalculator
    from matxfer.columns import Row
    from matxfer.crystal import Crystal

#: Exit codes besides 0 and those of :mod:`matxfer.predict_cli`: a run was stopped by a limit.
NOTHING, STOPPED = 1, 3

PotentialName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Potential, by name or folder (that of the plugin).",
        autocompletion=model_names,
    ),
]
PotentialPlugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Folder of a plugin of a potential; several: an ensemble.",
        autocompletion=plugin_places,
    ),
]
Precision = Annotated[str, typer.Option(help="float32 or float64.")]
Skin = Annotated[float, typer.Option(help="Skin of the neighbour list, Å.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …")]


def relax(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Structure files, tables, folders or globs.", metavar="INPUT..."),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="OUT.extxyz or .db: the relaxed structures.")
    ],
    table: Annotated[
        str | None,
        typer.Option(help="OUT.csv, .parquet or .jsonl: a row per structure, failures too."),
    ] = None,
    model: PotentialName = None,
    plugin: PotentialPlugins = None,
    fmax: Annotated[float, typer.Option(help="Largest force of a relaxed structure, eV/Å.")] = 0.02,
    steps: Annotated[int, typer.Option(help="At most so many per structure.")] = 500,
    cell: Annotated[
        bool, typer.Option("--cell/--no-cell", help="Relax the cells of crystals too.")
    ] = True,
    pressure_gpa: Annotated[float, typer.Option(help="External pressure on the cell.")] = 0.0,
    optimizer: Annotated[str, typer.Option(help="fire, lbfgs, bfgs or mdmin.")] = "fire",
    structure_column: StructureColumn = None,
    dtype: Precision = "float32",
    skin: Skin = 0.5,
    device: Device = None,
) -> None:
    """Relax crystals and molecules with a potential, one after the other.

    The output holds the relaxed structures with energy, forces and stress. What could not be read
    or relaxed is left out there: its reason is in OUT.errors.csv, and in --table, which has a row
    for every structure. A structure that needs more steps is written as it is, with converged = 0.
    After Ctrl-C the structures so far are in OUT.part, and their rows in the table.

    Exit codes: 0 done; 1 no structure could be relaxed; 2 wrong options or files; 130 interrupted.
    """
    from matxfer.output import holds_structures, output_format
    from matxfer.readers import read
    from matxfer.relaxation import RelaxOptions, relax_entries

    if not holds_structures(output):
        raise OptionError(f"{output}: relaxed structures go into .extxyz or .db; see --table")
    if table is not None and (output_format(table) not in {"csv", "parquet", "jsonl"}):
        raise OptionError(f"{table}: the table is .csv, .parquet or .jsonl")
    options = RelaxOptions(fmax, steps, cell, optimizer, pressure_gpa)
    calculator = _calculator(model, plugin, skin, device, dtype)
    rows = relax_entries(read(inputs, structure_column=structure_column), calculator, options)
    kept: list[Row] = []
    with plain_warnings(), interruptible(f"; the structures so far are in {output}.part"):
        _write(_kept(rows, kept), kept, output, table, _facts(calculator, relax=options))
    failed = sum(row["error"] is not None for row in kept)
    unfinished = sum(row["converged"] == 0 for row in kept)
    say(
        f"{output}: {len(kept) - failed:,} of {len(kept):,} structures"
        + (f", {unfinished:,} of them not converged in {steps:,} steps" if unfinished else "")
        + (f"; {failed:,} failed, see {table or f'{output}.errors.csv'}" if failed else "")
    )
    if failed == len(kept):
        raise typer.Exit(NOTHING)


def md(
    input_: Annotated[str, typer.Argument(help="File of one structure.", metavar="INPUT")],
    output: Annotated[str, typer.Option("-o", "--output", help="TRAJ.extxyz.")],
    ensemble: Annotated[str, typer.Option(help="nve, nvt (Bussi) or npt (MTK).")] = "nvt",
    temperature: Annotated[float, typer.Option(help="K.")] = 300.0,
    steps: Annotated[int, typer.Option(help="Steps of the run.")] = 1000,
    timestep_fs: Annotated[float, typer.Option(help="Of a step.")] = 1.0,
    pressure_gpa: Annotated[float, typer.Option(help="Of npt.")] = 0.0,
    damping_fs: Annotated[
        float, typer.Option(help="Time of the thermostat; the barostat takes ten times as long.")
    ] = 100.0,
    interval: Annotated[int, typer.Option(help="Steps between frames.")] = 10,
    max_uncertainty: Annotated[
        float | None,
        typer.Option(help="Stop where several plugins disagree by more on a force, eV/Å."),
    ] = None,
    supercell: Annotated[
        str | None, typer.Option(help="Repeat the cell first, such as 2,2,2.")
    ] = None,
    frame: Annotated[
        int | None, typer.Option(help="Which structure of the file, from 0, if there are more.")
    ] = None,
    model: PotentialName = None,
    plugin: PotentialPlugins = None,
    seed: Annotated[int, typer.Option(help="Of velocities and thermostat.")] = 0,
    structure_column: StructureColumn = None,
    dtype: Precision = "float32",
    skin: Skin = 0.5,
    device: Device = None,
) -> None:
    """Run molecular dynamics of one structure.

    Frames have positions, momenta, energy, forces and stress, and step, time, temperature,
    energies and pressure in their comment line. They are written as they come: Ctrl-C keeps them.

    Exit codes: 0 done; 2 wrong options or files; 3 stopped by --max-uncertainty; 130 interrupted.
    """
    from matxfer.crystal import CrystalError
    from matxfer.dynamics import MDOptions, UncertainError, run_md

    if Path(output).suffix.lower() not in {".extxyz", ".xyz"}:
        raise OptionError(f"{output}: the trajectory is an extended XYZ file, OUT.extxyz")
    options = MDOptions(
        ensemble, temperature, steps, timestep_fs, pressure_gpa, damping_fs, interval,
        max_uncertainty, seed,
    )  # fmt: skip
    atoms = _one_structure(input_, frame, structure_column).to_ase()
    if supercell is not None:
        atoms = atoms.repeat(_times(supercell))
    atoms.calc = calculator = _calculator(model, plugin, skin, device, dtype)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    progress = progress_on_terminal("step", steps)
    with (
        plain_warnings(),
        interruptible(f"; the frames so far are in {output}"),
        Path(output).open("w", encoding="utf-8") as file,
        progress as advance,
    ):
        done = 0

        def on_frame(facts: dict[str, float]) -> None:
            nonlocal done
            _write_frame(file, atoms, facts)
            advance(int(facts["step"]) - done, 0)
            done = int(facts["step"])

        try:
            last = run_md(atoms, options, on_frame)
        except UncertainError as error:
            say(f"stopped after step {done:,}: {error}; the frames are in {output}")
            raise typer.Exit(STOPPED) from None
        except CrystalError as error:
            error.reason = f"after step {done:,}: {error.reason}"
            raise
    from matxfer.output_metadata import write_sidecar

    write_sidecar(Path(output), _facts(calculator, md=options))
    say(
        f"{output}: {steps:,} steps; at the end {last['temperature_k']:.0f} K, "
        f"{last['total_energy_ev']:.6g} eV in all"
    )


# -- what goes in -----------------------------------------------------------------------------
def _calculator(
    model: str | None, plugin: list[str] | None, skin: float, device: str | None, dtype: str
) -> MatxferCalculator:
    from matxfer.calculator import MatxferCalculator
    from matxfer.potential.model import DEFAULT_POTENTIAL

    potential = model or (None if plugin else DEFAULT_POTENTIAL)
    calculator = MatxferCalculator(
        plugins=plugin or [], potential=potential, skin_angstrom=skin, device=device, dtype=dtype
    )
    if calculator.plugins or calculator.forcefield is None:
        raise OptionError(
            "a plugin of a property has no forces; give plugins of potentials, "
            "or predict properties with matxfer predict"
        )
    return calculator


def _one_structure(path: str, frame: int | None, structure_column: str | None) -> Crystal:
    from itertools import islice

    from matxfer.readers import read

    entries = read([path], structure_column=structure_column)
    found = list(islice(entries, 2) if frame is None else islice(entries, frame, frame + 1))
    if not found:
        raise OptionError(f"{path}: there is no structure {frame or 0}")
    if len(found) > 1:
        raise OptionError(f"{path}: holds several structures; say which with --frame, from 0")
    if found[0].error is not None:
        raise found[0].error
    assert found[0].crystal is not None
    return found[0].crystal


def _times(text: str) -> tuple[int, int, int]:
    times = integers("--supercell", text)
    if len(times) != 3 or min(times) < 1:
        raise OptionError(f"--supercell {text!r}: write three whole numbers, such as 2,2,2")
    return times[0], times[1], times[2]


# -- what goes out ----------------------------------------------------------------------------
def _kept(rows: Iterable[Row], kept: list[Row]) -> Iterator[Row]:
    """Pass rows on, and keep what they say without the structures."""
    from matxfer.relaxation import COLUMNS

    with progress_on_terminal("relaxing", None) as advance:
        for row in rows:
            kept.append({column: row[column] for column in COLUMNS})
            advance(1, int(row["error"] is not None))
            yield row


def _write(
    rows: Iterable[Row], kept: list[Row], output: str, table: str | None, facts: dict[str, Any]
) -> None:
    from matxfer.output import write_rows
    from matxfer.relaxation import COLUMNS

    try:
        write_rows(rows, COLUMNS, output, facts)
    finally:
        if table is not None:
            write_rows(kept, COLUMNS, table, facts)


def _write_frame(file: TextIO, atoms: Atoms, facts: dict[str, float]) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io.extxyz import write_xyz

    frame = atoms.copy()
    frame.info = dict(facts)
    names = ("energy", "forces", "stress")
    results = {n: atoms.calc.results[n] for n in names if n in atoms.calc.results}
    frame.calc = SinglePointCalculator(frame, **results)
    write_xyz(file, [frame])
    file.flush()


def _facts(calculator: MatxferCalculator, **options: Any) -> dict[str, Any]:
    """Return where the figures come from."""
    from dataclasses import asdict

    from matxfer.provenance import versions

    assert calculator.forcefield is not None
    members = [
        {"name": m.name, "sha256": getattr(m, "checksum", None) or _checksum(m.folder)}
        for m in calculator.forcefield.members
    ]
    return {
        "potentials": members,
        **{name: asdict(given) for name, given in options.items()},
        "versions": versions(),
    }


def _checksum(folder: Path | None) -> str:
    from matxfer.plugin_files import weights_checksum

    return weights_checksum(folder) if folder is not None else ""
