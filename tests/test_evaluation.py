"""Figures of merit: what they are, over which rows, and what cannot be compared."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from matxfer.crystal import CrystalError
from matxfer.data.properties import Property, property_of
from matxfer.data.table import TableError
from matxfer.evaluation import evaluate
from matxfer.metrics import regression_metrics
from matxfer.prediction import predict
from matxfer.transfer.finetune import finetune

TARGET = "debye_temperature_k"
ENERGY = "formation_energy_ev_per_atom"
BULK = "bulk_modulus_vrh_gpa"


@pytest.fixture(scope="module")
def predicted(tiny_model, table_crystals):
    """Return the predictions for the rows of the table, by the way of structures."""
    return predict(table_crystals, model=tiny_model)


@pytest.fixture(scope="module")
def plugin_folder(tiny_model, crystal_table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins") / "debye"
    finetune(
        crystal_table, TARGET, folder, model=tiny_model, split_column="split", freeze=1, epochs=3,
        learning_rate=3e-3, head_learning_rate=1e-2,
    )  # fmt: skip
    return folder


# -- metrics ----------------------------------------------------------------------------------
def test_metrics_by_hand():
    truth, found = np.array([1.0, 2.0, 4.0, 9.0]), np.array([1.0, 3.0, 2.0, 9.0])
    result = regression_metrics(truth, found, Property("x_ev", "eV"))
    assert result == pytest.approx(
        {"mae": 0.75, "rmse": np.sqrt(5 / 4), "r2": 1 - 5 / 38, "n": 4, "unit": "eV"}
    )


def test_metrics_against_other_formulas():
    rng = np.random.default_rng(0)
    truth = rng.normal(2, 3, 50)
    found = truth + rng.normal(0.5, 1, 50)
    result = regression_metrics(truth, found, Property("x", ""))
    assert result["mae"] == pytest.approx(np.median(np.abs(found - truth)), rel=0.5)
    assert result["mae"] == pytest.approx(np.linalg.norm(found - truth, 1) / 50)
    assert result["rmse"] == pytest.approx(np.linalg.norm(found - truth) / np.sqrt(50))
    # R² is one minus the unexplained share of the variance; it is not the correlation squared …
    unexplained = (result["rmse"] ** 2) / np.var(truth)
    assert result["r2"] == pytest.approx(1 - unexplained)
    assert result["r2"] < stats.pearsonr(truth, found).statistic ** 2
    # … unless the prediction is the best line.
    line = stats.linregress(found, truth)
    fitted = line.intercept + line.slope * found
    best = regression_metrics(truth, fitted, Property("x", ""))
    assert best["r2"] == pytest.approx(line.rvalue**2)


def test_metrics_leave_out_what_is_missing():
    truth, found = np.array([1.0, np.nan, 3.0, 5.0]), np.array([1.5, 2.0, np.nan, 4.0])
    result = regression_metrics(truth, found, Property("x_k", "K"))
    assert (result["n"], result["mae"]) == (2, 0.75)
    nothing = regression_metrics(truth, np.full(4, np.nan), Property("x_k", "K"))
    assert nothing == {"mae": None, "rmse": None, "r2": None, "n": 0, "unit": "K"}
    constant = regression_metrics(np.ones(3), np.arange(3.0), Property("x_k", "K"))
    assert constant["r2"] is None
    assert constant["mae"] == 2 / 3


@pytest.mark.parametrize(
    ("transform", "function"), [("log10", np.log10), ("log", np.log), ("log1p", np.log1p)]
)
def test_metrics_on_a_logarithmic_scale(transform, function):
    truth, found = np.array([10.0, 100.0, 30.0]), np.array([20.0, 50.0, 30.0])
    result = regression_metrics(truth, found, Property("x_gpa", "GPa", transform))
    expected = np.abs(function(found) - function(truth)).mean()
    assert result[f"mae_{transform}"] == pytest.approx(expected)
    assert result["mae"] == pytest.approx(20.0)
    # A zero has no logarithm: it counts in the unit alone.
    with_zero = regression_metrics(
        np.append(truth, -1.0), np.append(found, 1.0), Property("x_gpa", "GPa", transform)
    )
    assert with_zero["n"] == 4
    assert with_zero[f"mae_{transform}"] == pytest.approx(expected)
    assert not any(key.startswith("mae_") for key in regression_metrics(
        truth, found, Property("x_gpa", "GPa", "nonnegative")))  # fmt: skip


# -- the base's own heads ---------------------------------------------------------------------
@pytest.mark.parametrize("target", [ENERGY, BULK])
def test_all_rows(target, crystal_table, crystal_frame, tiny_model, predicted):
    truth, found = crystal_frame[target].to_numpy(), predicted[target].to_numpy()
    result = evaluate(crystal_table, target, model=tiny_model)
    assert result["n"] == 60
    assert result["mae"] == pytest.approx(np.abs(found - truth).mean(), rel=1e-5)
    assert result["rmse"] == pytest.approx(np.sqrt(((found - truth) ** 2).mean()), rel=1e-5)
    ratio = ((found - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
    assert result["r2"] == pytest.approx(1 - ratio, rel=1e-5)
    assert result["unit"] == property_of(target).unit
    assert result["excluded"] == {}
    assert ("mae_log10" in result) == (target == BULK)


@pytest.mark.parametrize("as_frame", [True, False])
def test_split_and_where(as_frame, crystal_table, crystal_frame, tiny_model, predicted):
    table = crystal_frame if as_frame else crystal_table
    error = np.abs(predicted[ENERGY] - crystal_frame[ENERGY])

    def check(rows, **options):
        result = evaluate(table, ENERGY, model=tiny_model, **options)
        assert result["n"] == rows.sum() > 0
        assert result["mae"] == pytest.approx(error[rows].mean(), rel=1e-5)

    split, family = crystal_frame["split"], crystal_frame["family"]
    check(split == "test", split_column="split")
    check(split == "val", split_column="split", split="val")
    check(family == "CsCl", where={"family": "CsCl"})
    check(
        (split == "train") & (family == "fcc"),
        where={"family": "fcc"}, split_column="split", split="train",
    )  # fmt: skip
    check((split == "val") & (family == "fcc"), where={"family": "fcc", "split": "val"})
    check(error == error, split="test")  # noqa: PLR0124 - without a column, all rows


def test_numbers_can_be_selected_too(crystal_frame, tiny_model):
    frame = crystal_frame.assign(fold=np.arange(60) % 3)
    assert evaluate(frame, ENERGY, model=tiny_model, where={"fold": "1"})["n"] == 20


def test_nothing_selected(crystal_table, tiny_model):
    with pytest.raises(TableError, match=r"crystals\.parquet: no row has family = 'bcc'; .*'CsCl'"):
        evaluate(crystal_table, ENERGY, model=tiny_model, where={"family": "bcc"})
    with pytest.raises(TableError, match=r"crystals\.parquet: no column 'fold'; the columns are"):
        evaluate(crystal_table, ENERGY, model=tiny_model, split_column="fold")
    with pytest.raises(TableError, match=r"no row has split = 'holdout'; it holds \['test', 'tr"):
        evaluate(crystal_table, ENERGY, model=tiny_model, split_column="split", split="holdout")


def test_excluded_rows_are_counted(crystal_frame, tiny_model, predicted):
    frame = crystal_frame.copy()
    frame.loc[[0, 1, 2], ENERGY] = np.nan
    frame.at[2, "lattice"] = None
    frame.at[3, "lattice"] = None
    frame.at[4, "numbers"] = np.full(2, 92)
    result = evaluate(frame, ENERGY, model=tiny_model)
    assert result["excluded"] == {
        "unreadable structure": 2,
        "element unknown to the model": 1,
        "no value": 2,
    }
    assert result["n"] == 55
    error = np.abs(predicted[ENERGY] - crystal_frame[ENERGY])[5:]
    assert result["mae"] == pytest.approx(error.mean(), rel=1e-5)


def test_progress_counts_graphs(crystal_frame, tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("MATXFER_CACHE", str(tmp_path))
    steps = []
    evaluate(crystal_frame, ENERGY, model=tiny_model, on_graphs=steps.append)
    assert sum(steps) == 60


# -- plugins ----------------------------------------------------------------------------------
def test_a_plugin_has_its_figures(plugin_folder, crystal_table, tiny_model):
    from matxfer.transfer.plugin import load_plugin

    plugin = load_plugin(plugin_folder, tiny_model)
    for part in ("val", "test"):
        figures = plugin.meta["figures"][part]
        assert figures["n"] == 6
        for given in (plugin, plugin_folder, str(plugin_folder)):
            result = evaluate(
                crystal_table, TARGET, given, model=tiny_model, split_column="split", split=part
            )
            for key in ("mae", "rmse", "r2"):
                assert result[key] == pytest.approx(figures[key], rel=1e-5)
            assert (result["n"], result["unit"]) == (6, "K")


def test_the_plugin_is_what_predicts(crystal_table, crystal_frame, tiny_model, tmp_path):
    """For a target that base and plugin both predict, the plugin's values are compared."""
    finetune(
        crystal_table, ENERGY, tmp_path / "p", model=tiny_model, split_column="split", epochs=3,
        learning_rate=1e-2,
    )  # fmt: skip
    values = predict(crystal_frame, tmp_path / "p", model=tiny_model)
    result = evaluate(crystal_table, ENERGY, tmp_path / "p", model=tiny_model)
    error = np.abs(values[f"{ENERGY}__p"] - crystal_frame[ENERGY])
    assert result["mae"] == pytest.approx(error.mean(), rel=1e-5)
    assert result["mae"] != pytest.approx(evaluate(crystal_table, ENERGY, model=tiny_model)["mae"])


def test_another_column_of_the_same_unit(plugin_folder, crystal_frame, tiny_model):
    frame = crystal_frame.rename(columns={TARGET: "einstein_temperature_k"})
    told = f"'einstein_temperature_k' is compared with predictions of '{TARGET}'"
    with pytest.warns(UserWarning, match=told):
        result = evaluate(frame, "einstein_temperature_k", plugin_folder, model=tiny_model)
    same = evaluate(crystal_frame, TARGET, plugin_folder, model=tiny_model)
    assert result == same
    assert result["unit"] == "K"


@pytest.mark.parametrize("column", [ENERGY, BULK, "family"])
def test_units_must_agree(column, plugin_folder, crystal_table, tiny_model):
    pattern = rf"'debye' predicts '{TARGET}' in 'K', which cannot be compared .*'{column}' in"
    with pytest.raises(TableError, match=pattern):
        evaluate(crystal_table, column, plugin_folder, model=tiny_model)


def test_units_of_another_size(crystal_frame, tiny_model):
    """A plugin in meV/atom is not compared with a column in eV/atom, and says what to do."""
    frame = crystal_frame.assign(exfoliation_energy_mev_per_atom=crystal_frame[TARGET] / 10)
    plugin = finetune(
        frame, "exfoliation_energy_mev_per_atom", model=tiny_model, split_column="split",
        features="ridge",
    )  # fmt: skip
    frame["exfoliation_energy_ev_per_atom"] = frame["exfoliation_energy_mev_per_atom"] / 1000
    pattern = r"in 'meV/atom', which cannot be compared .*in 'eV/atom'; convert the values to 'meV"
    with pytest.raises(TableError, match=pattern):
        evaluate(frame, "exfoliation_energy_ev_per_atom", plugin)


def test_nobody_predicts_the_target(crystal_table, tiny_model):
    with pytest.raises(TableError, match=r"'tiny' does not predict 'debye.*band_gap_ev.*--plugin"):
        evaluate(crystal_table, TARGET, model=tiny_model)


def test_missing_tables_and_columns(plugin_folder, crystal_frame, tiny_model, tmp_path):
    with pytest.raises(CrystalError, match=r"none\.parquet: there is no such file; check"):
        evaluate(tmp_path / "none.parquet", ENERGY, model=tiny_model)
    with pytest.raises(TableError, match=rf"no column '{TARGET}'; the columns are"):
        evaluate(crystal_frame.drop(columns=TARGET), TARGET, plugin_folder, model=tiny_model)
    garbled = crystal_frame.astype({ENERGY: object})
    garbled.at[3, ENERGY] = "n/a?"
    with pytest.raises(TableError, match=r"row 3 of column .* is 'n/a\?', which is not a number"):
        evaluate(garbled, ENERGY, model=tiny_model)
