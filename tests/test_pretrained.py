"""The shipped weights: what the card promises, known answers for known materials, the targets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from matxfer import available_models, evaluate, finetune, load_model, predict

MODEL = "mp-base"
FORMATION = "formation_energy_ev_per_atom"


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def examples(repository, model):
    frame = predict(repository / "datasets" / "examples", model=model)
    assert frame.error.isna().all()
    return frame.set_index("id")


@pytest.mark.parametrize(
    ("name", "most_mb"), [(MODEL, 20), (f"{MODEL}-strict", 20), ("mp-small", 5)]
)
def test_card_says_where_the_weights_come_from(repository, name, most_mb):
    folder = repository / "pretrained" / name
    model = load_model(name)
    assert sum(f.stat().st_size for f in folder.iterdir()) < most_mb * 1e6
    card = json.loads((folder / "card.json").read_text())
    assert card["sha256"] == model.checksum
    backbone = dict(model.backbone.named_parameters())
    assert set(model.fisher()) == {
        f"{task}/{weight}" for task in model.heads for weight in backbone
    }
    for table in card["data"]:
        assert len(table["sha256"]) == 64
        if table["targets"]:  # the others teach denoising, without figures
            assert table["rows"]["train"] > table["rows"]["test"] > 0
    assert set(card["figures"]) == set(model.heads)
    assert {"licence", "citation", "command", "versions", "seed"} <= set(card)
    assert not re.search(r'"/|~/', json.dumps(card)), "a path of some machine"
    assert name in available_models()


# Formation energies and gaps of the Materials Project (PBE), eV/atom and eV.
@pytest.mark.parametrize(
    ("crystal", "energy", "tolerance"),
    [("NaCl", -2.105, 0.1), ("MgO", -3.065, 0.1), ("GaAs", -0.347, 0.1), ("Si", 0.0, 0.1)],
)
def test_formation_energies_of_known_crystals(examples, crystal, energy, tolerance):
    assert examples.loc[crystal, FORMATION] == pytest.approx(energy, abs=tolerance)


def test_gaps_and_moduli_of_known_crystals(examples):
    gap, bulk = examples.band_gap_ev, examples.bulk_modulus_vrh_gpa
    assert gap["NaCl"] > 4
    assert gap["MgO"] > 3.5
    assert gap["Cu"] < 0.2
    assert 0 < gap["Si"] < 1.1
    assert bulk["MgO"] == pytest.approx(151, rel=0.2)
    assert bulk["Si"] == pytest.approx(89, rel=0.2)
    assert bulk["NaCl"] == pytest.approx(24, rel=0.3)


@pytest.mark.data
def test_formation_energy_of_unseen_crystals(shared_data, model):
    pd = pytest.importorskip("pandas")
    table = pd.read_parquet(shared_data / "mp_formation_energy.parquet")
    test = table[(table.split == "test") & (table.structure_source == "crysxpp")]
    figures = evaluate(test.sample(600, random_state=0), FORMATION, model=model)
    assert figures["n"] == 600
    # 0.060 is the bound for all 4,000 rows; 600 of them scatter by a few meV.
    assert figures["mae"] < 0.065
    spread = float(np.abs(test[FORMATION] - test[FORMATION].median()).mean())
    assert figures["mae"] < 0.1 * spread


@pytest.mark.data
def test_a_plugin_on_two_dimensional_crystals(shared_data, model, tmp_path):
    table = shared_data / "small_tasks" / "jarvis_2d_eform.parquet"
    plugin = finetune(table, FORMATION, tmp_path / "plugin", model=model, split_column="split_0")
    figures = plugin.meta["figures"]["test"]
    assert figures["n"] == 94
    assert figures["mae"] < 0.13
    assert figures["mae"] < 0.3 * figures["mae_of_a_constant"]
    again = evaluate(
        table, FORMATION, Path(tmp_path / "plugin"), model=model, split_column="split_0"
    )
    assert again["mae"] == pytest.approx(figures["mae"], abs=1e-5)
