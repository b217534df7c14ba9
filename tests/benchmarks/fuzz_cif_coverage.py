"""Coverage-guided fuzzing of the fast CIF path, with Google's atheris (``pip install atheris``).

Atheris watches which branches of our modules a text reaches and goes on from the texts that reach
new ones. Whatever the fast path reads is compared with gemmi's own expansion of a small structure:
elements and volume have to agree. Options of libFuzzer may follow, such as ``-runs=200000`` or
``-max_total_time=600``; it keeps a failing text as ``crash-…`` in the working folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "datasets" / "examples"


def check(data: bytes) -> None:
    """Read a text by the fast path; raise if gemmi reads another crystal."""
    import gemmi
    import numpy as np
    from gemmi import cif

    from matxfer.crystal import Crystal, CrystalError
    from matxfer.readers.cif_fast import read_fast

    try:
        document = cif.read_string(data.decode("utf-8", "replace"), 0)
    except (ValueError, RuntimeError):
        return
    for block in document:
        try:
            found = read_fast(block)
            if found is None:
                continue
            crystal = Crystal(*found)
            crystal.check_distances()
        except CrystalError:
            continue
        try:
            small = gemmi.make_small_structure_from_block(block)
        except ValueError:
            continue  # an item that decides nothing for us
        if small.spacegroup is None or not len(small.sites):
            continue  # gemmi expands by its table of settings only, and wants labels
        numbers = sorted(site.element.atomic_number for site in small.get_all_unit_cell_sites())
        if numbers != sorted(crystal.numbers.tolist()):
            raise AssertionError(f"{len(numbers)} sites, not {crystal.n_sites}")
        if not np.isclose(small.cell.volume, crystal.volume_angstrom3, rtol=1e-4):
            raise AssertionError(f"{small.cell.volume} Å³, not {crystal.volume_angstrom3}")


def main() -> None:
    """Run libFuzzer on the examples."""
    try:
        import atheris
    except ImportError:
        sys.exit("this needs atheris: pip install atheris (Linux, Python 3.11 to 3.13)")
    with atheris.instrument_imports(include=["matxfer.readers", "matxfer.crystal"]):
        import matxfer.crystal
        import matxfer.readers.cif_fast  # noqa: F401 - imported to be instrumented
    corpus = Path("fuzz-corpus")
    corpus.mkdir(exist_ok=True)
    for path in EXAMPLES.glob("*.cif"):
        (corpus / path.name).write_bytes(path.read_bytes())
    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[1:]], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
