"""Fisher information of CHGNet's energy per atom, shipped with matxfer for EWC.

The mean over crystals drawn from the source table, without their labels: what is squared are
gradients of the output. σ is that of Gaussian errors of the published test error, 29 meV/atom. As
the number of source samples counts that of the materials in training, 90 % of 145,923, not that of
the frames: those of one relaxation are nearly the same.

    python tests/benchmarks/chgnet_fisher.py --samples 500
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from _table import random_crystals

from matxfer.backbones.chgnet_model import CARD, FISHER, RELEASE, model_of
from matxfer.data.store import pack_chunk
from matxfer.files import write_json, write_tensors
from matxfer.fisher import concentration, fisher_diagonal, total_fisher
from matxfer.runtime import use_threads

MAE_EV_PER_ATOM, MATERIALS = 0.029, int(0.9 * 145_923)


def main() -> None:
    """Measure, and write the two files beside the code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    use_threads(1)

    import chgnet

    package = Path(chgnet.__file__).parent
    model = model_of(next(package.glob(f"pretrained/{RELEASE}/*.pth.tar")))
    table = arguments.data / "mp_formation_energy.parquet"
    crystals = random_crystals(table, arguments.samples, arguments.seed)
    graphs, _ = pack_chunk(crystals, model.backbone.graph_options)
    known = ~graphs.has_elements_outside(model.elements)
    rows = np.flatnonzero(known & (graphs.nodes_per_graph > 0))
    noise = {name: MAE_EV_PER_ATOM * math.sqrt(math.pi / 2) for name in model.heads}
    fisher = fisher_diagonal(model, graphs, rows, noise)
    write_tensors(FISHER, {name: value.to(torch.bfloat16) for name, value in fisher.items()})
    card = json.loads(CARD.read_text(encoding="utf-8"))
    card["card"]["fisher"] = {
        "samples": len(rows),
        "source_size": MATERIALS,
        "noise_normalised": noise,
        "concentration": concentration(total_fisher(fisher)),
    }
    write_json(CARD, card)
    print(FISHER, {k: v for k, v in card["card"]["fisher"].items() if k != "concentration"})


if __name__ == "__main__":
    main()
