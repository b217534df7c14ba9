"""Predict a folder of CIF files with another package's shipped model, batched, on the CPU.

Called by batch_prediction.py, a package a process: ``python _peers.py megnet FOLDER``. Each needs
its package and its weights; what is missing ends it with a message.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

BATCH = 64


def structures(folder: Path) -> list[Any]:
    """Read the files as these packages' users do, with pymatgen."""
    from pymatgen.core import Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [Structure.from_file(path) for path in sorted(folder.glob("*.cif"))]


def matgl_model(name: str, crystals: Sequence[Any]) -> int:
    """Run a MatGL formation-energy model; one call per structure is all that its users have."""
    import matgl
    import torch

    model = matgl.load_model(name)
    done = 0
    with torch.no_grad():
        for crystal in crystals:
            model.predict_structure(crystal)
            done += 1
    return done


def megnet(crystals: Sequence[Any]) -> int:
    """Run MEGNet."""
    return matgl_model("MEGNet-MP-2018.6.1-Eform", crystals)


def m3gnet(crystals: Sequence[Any]) -> int:
    """Run M3GNet."""
    return matgl_model("M3GNet-MP-2018.6.1-Eform", crystals)


def alignn(crystals: Sequence[Any]) -> int:
    """Run ALIGNN's model of formation energies."""
    from alignn.pretrained import get_prediction
    from jarvis.core.atoms import pmg_to_atoms

    for crystal in crystals:
        get_prediction(model_name="jv_formation_energy_peratom_alignn", atoms=pmg_to_atoms(crystal))
    return len(crystals)


def chgnet(crystals: Sequence[Any]) -> int:
    """Run CHGNet, energies only."""
    from chgnet.model import CHGNet

    model = CHGNet.load(use_device="cpu", verbose=False)
    return len(model.predict_structure(list(crystals), task="e", batch_size=BATCH))


if __name__ == "__main__":
    package = {"megnet": megnet, "m3gnet": m3gnet, "alignn": alignn, "chgnet": chgnet}[sys.argv[1]]
    print(package(structures(Path(sys.argv[2]))))
