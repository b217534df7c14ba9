"""Figures: what is drawn is what was given, labelled with its unit; odd inputs work or say why."""

from __future__ import annotations

import doctest
import importlib
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from matxfer import plot  # noqa: E402
from matxfer.data.properties import property_of  # noqa: E402
from matxfer.errors import OptionError  # noqa: E402
from matxfer.plot import style  # noqa: E402
from matxfer.plot.elements import element_residuals, place  # noqa: E402
from matxfer.plot.trust import _intervals, relative_errors  # noqa: E402
from matxfer.plot.values import values_of  # noqa: E402

RNG = np.random.default_rng(4)
MODULES = (
    "agreement",
    "atoms",
    "classes",
    "curves",
    "elements",
    "maps",
    "retention",
    "style",
    "trust",
)


@pytest.fixture(autouse=True)
def closed_figures():
    """Draw each figure to the end, so that what fails only there fails too, and close it."""
    yield
    for number in plt.get_fignums():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plt.figure(number).canvas.draw()
    plt.close("all")


def points(ax):
    return np.asarray(next(c for c in ax.collections if c.get_gid() == "points").get_offsets())


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings_run(name):
    failed, tried = doctest.testmod(importlib.import_module(f"matxfer.plot.{name}"))
    assert tried
    assert not failed


def test_every_public_function_takes_axes_and_returns_them():
    for name in plot.__all__:
        assert "ax" in getattr(plot, name).__annotations__, name
    assert set(plot.__all__) == set(dir(plot))
    with pytest.raises(AttributeError, match="no attribute 'pie'"):
        _ = plot.pie


# -- parity -----------------------------------------------------------------------------------
def test_parity_draws_the_rows_that_have_both_and_counts_the_others():
    truth, predicted = [1.0, 2.0, np.nan, 4.0], [1.5, 2.0, 3.0, np.inf]
    figure, given = plt.subplots()
    ax = plot.parity(truth, predicted, target="band_gap_ev", title="Gaps", ax=given)
    assert ax is given
    np.testing.assert_allclose(points(ax), [[1, 1.5], [2, 2]])
    text = ax.texts[0].get_text()
    assert "MAE 0.25 eV" in text
    assert "n = 2 (2 without)" in text
    assert "R² 0.5" in text  # 1 - 0.25 / 0.5
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("band gap (eV)", "predicted (eV)")
    assert ax.get_xlim() == ax.get_ylim()
    assert "Gaps" in [a.get_title() for a in figure.axes] + [c.get_title() for c in ax.child_axes]


def test_parity_reads_columns_and_their_intervals():
    frame = pd.DataFrame({"measured_gap_ev": [1.0, 2], "band_gap_ev": [1.1, 1.8]})
    frame["band_gap_ev_lo"], frame["band_gap_ev_hi"] = [0.9, 1.5], [1.3, np.inf]
    ax = plot.parity("measured_gap_ev", "band_gap_ev", data=frame)
    assert ax.get_xlabel() == "measured gap (eV)"
    (intervals,) = [c for c in ax.collections if c.get_label() == "intervals"]
    (segment,) = intervals.get_segments()  # that of the infinite one is not drawn
    np.testing.assert_allclose(segment, [[1, 0.9], [1, 1.3]])


def test_marginals_and_density_can_be_switched():
    x = RNG.normal(size=60)
    full, bare = (plot.parity(x, x, density=on, marginals=on) for on in (True, False))
    assert sum(p.get_height() for p in full.child_axes[0].patches) == 60
    assert len(np.unique(full.collections[-1].get_array())) > 10
    assert not bare.child_axes
    assert bare.collections[-1].get_array() is None


def test_density_is_highest_where_the_points_are():
    x = np.concatenate([RNG.normal(0, 0.1, 300), [5.0]])
    ax = plot.parity(x, x, density=True)
    crowd = ax.collections[-1].get_array()
    at = points(ax)
    assert crowd[at[:, 0] > 4].max() < crowd[np.abs(at[:, 0]) < 0.05].min()


def test_a_modulus_is_drawn_on_a_logarithmic_scale_while_it_can_be():
    assert plot.parity([1, 10.0], [2, 9.0], target="bulk_modulus_vrh_gpa").get_xscale() == "log"
    assert plot.parity([0, 10.0], [2, 9.0], target="bulk_modulus_vrh_gpa").get_xscale() == "linear"
    assert plot.parity([1, 10.0], [2, 9.0], target="band_gap_ev").get_xscale() == "linear"
    with pytest.raises(OptionError, match="above zero"):
        plot.parity([0, 10.0], [2, 9.0], scale="log")
    with pytest.raises(OptionError, match="must be auto, linear or log"):
        plot.parity([1.0], [1.0], scale="cubic")


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0], [0.0, 0.0], [-1e-9], [1e9, 1e9]])
@pytest.mark.parametrize("density", [True, False])
def test_parity_of_one_row_and_of_equal_values(values, density):
    ax = plot.parity(values, values, density=density)
    low, high = ax.get_xlim()
    assert low < values[0] < high
    assert "R² –" in ax.texts[0].get_text()


def test_parity_says_what_is_wrong():
    with pytest.raises(OptionError, match="none has both"):
        plot.parity([np.nan, 1.0], [1.0, np.nan])
    with pytest.raises(OptionError, match="predicted has 1 entries, but truth has 2"):
        plot.parity([1.0, 2.0], [1.0])
    with pytest.raises(OptionError, match="no column 'gap'"):
        plot.parity("gap", "gap", data=pd.DataFrame({"x": [1]}))
    with pytest.raises(OptionError, match="no number"):
        plot.parity(["a"], [1.0])
    with pytest.raises(OptionError, match="or a plugin"):
        plot.parity([1.0])
    with pytest.raises(OptionError, match=r"array of \(1, 2\)"):
        plot.parity([[1.0, 2.0]], [1.0])


def test_a_plugin_that_is_not_saved_knows_its_property():
    kept = {"truth": [1.0, 2.0], "predicted": [1.1, 2.2], "rows": 2}
    head = SimpleNamespace(prop=property_of("band_gap_ev"))
    plugin = SimpleNamespace(meta={"predictions": {"test": kept}}, head=head)
    assert plot.parity(plugin).get_xlabel() == "band gap (eV)"


def test_missing_values_of_pandas_are_missing():
    frame = pd.DataFrame({"x": pd.array([1, None, 3], "Int64"), "y": [1.0, 2.0, None]})
    assert len(points(plot.parity("x", "y", data=frame))) == 1


def test_names_from_strangers_are_no_formulas():
    ax = plot.parity([1.0], [1.0], target=r"a_$\frac{_ev", title="$x^")
    plt.gcf().canvas.draw()
    assert r"\$" in ax.get_xlabel()  # matplotlib draws it as a dollar sign


# -- elements ---------------------------------------------------------------------------------
def test_places_of_the_elements_are_those_of_pymatgen():
    from pymatgen.core.periodic_table import Element

    for z in range(1, 104):
        element, (column, row) = Element.from_Z(z), place(z)
        if element.is_lanthanoid or element.is_actinoid:
            assert row > 7
        else:
            assert (column, row) == (element.group - 1, element.row - 1)
    assert len({place(z) for z in range(1, 104)}) == 103


def squares(ax):
    return {p.get_gid().removeprefix("element-"): p.get_facecolor() for p in ax.patches}


def test_residuals_by_element_against_a_loop():
    formulas = ["NaCl", "Na2O", "NaCl", "Fe2O3"] * 3
    residual = RNG.normal(size=12)
    found = element_residuals(residual, formulas)
    assert set(found) == {8, 11, 17, 26}
    np.testing.assert_allclose(found[11], residual[[k for k in range(12) if k % 4 != 3]])
    truth = np.zeros(12)
    ax = plot.residuals_by_element(truth, residual, formulas, target="x_ev", statistic="mean")
    bar = ax.figure.axes[-1]
    assert bar.get_xlabel() == "mean of predicted − true x (eV)"
    most = max(abs(np.mean(v)) for v in found.values())
    np.testing.assert_allclose(bar.get_xlim(), (-most, most))
    assert squares(ax)["K"] == matplotlib.colors.to_rgba(style.MISSING)
    assert squares(ax)["Na"] != squares(ax)["K"]


def test_the_statistics_differ_and_few_materials_are_marked():
    args = ([0, 0, 0.0], [1, -1, 0.5], ["NaCl", "NaF", "KF"])
    labels = set()
    for statistic in ("mae", "mean", "count"):
        ax = plot.residuals_by_element(*args, target="gap_ev", statistic=statistic)
        labels.add(ax.figure.axes[-1].get_xlabel())
        assert len(ax.lines) == 4  # a dot per element: none is in five materials
    assert labels == {
        "mean absolute error of gap (eV)", "mean of predicted − true gap (eV)",
        "materials with the element",
    }  # fmt: skip
    seldom = plot.residuals_by_element(*args, least=2)
    assert squares(seldom)["K"] == matplotlib.colors.to_rgba(style.MISSING)
    assert squares(seldom)["F"] != squares(seldom)["K"]


def test_residuals_by_element_take_structures_of_all_libraries():
    from ase.build import bulk

    from matxfer.crystal import Crystal

    atoms = bulk("NaCl", "rocksalt", a=5.64)
    crystal = Crystal.from_ase(atoms)
    ax = plot.residuals_by_element(
        [0, 0, 0.0], [1, 2, 3.0], [atoms, crystal, crystal.to_pymatgen()]
    )
    assert squares(ax)["Cl"] != squares(ax)["O"]


def test_one_element_without_error_and_bad_formulas():
    plot.residuals_by_element([1.0], [1.0], ["Fe"])
    plot.periodic_table({})
    plot.periodic_table({"Fe": np.nan, 26: 1.0})
    with pytest.raises(OptionError, match="formula '<script>' cannot be read"):
        plot.residuals_by_element([1.0], [1.0], ["<script>"])
    with pytest.raises(OptionError, match="need the formulas"):
        plot.residuals_by_element([1.0], [1.0])
    with pytest.raises(OptionError, match="is no element"):
        plot.periodic_table({"Xx": 1.0})
    with pytest.raises(OptionError, match="must be one of"):
        plot.residuals_by_element([1.0], [1.0], ["Fe"], statistic="median")
    with pytest.raises(OptionError, match="neither a formula nor a structure"):
        plot.residuals_by_element([1.0], [1.0], [3.0])


def test_symbols_can_be_read_on_their_squares():
    """Contrast of at least 4.5, what WCAG asks of text."""

    def luminance(colour):
        c = np.array(matplotlib.colors.to_rgb(colour))
        return np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    ax = plot.periodic_table({z: z - 50.0 for z in range(1, 104)})
    for text, patch in zip(ax.texts, ax.patches, strict=True):
        pair = sorted([luminance(text.get_color()), luminance(patch.get_facecolor())])
        assert (pair[1] + 0.05) / (pair[0] + 0.05) > 4.5


# -- curves -----------------------------------------------------------------------------------
def test_training_curves_and_the_epoch_that_was_kept():
    ax = plot.training_curve({"a": [3.0, 1.0, 2.0], "b": [5.0, 4.0]}, best=1, label="MAE (eV)")
    curve, other, kept = ax.lines
    np.testing.assert_allclose(curve.get_xydata(), [[1, 3], [2, 1], [3, 2]])
    np.testing.assert_allclose(other.get_ydata(), [5, 4])
    np.testing.assert_allclose(kept.get_xydata(), [[2, 1]])
    assert kept.get_label() == "kept: epoch 2"
    assert ax.get_yscale() == "log"
    assert plot.training_curve({"a": [0.0, 1.0]}).get_yscale() == "linear"
    assert plot.training_curve([0.3]).lines[0].get_marker() == "o"
    rows = pd.DataFrame({"epoch": [0, 1], "train_loss": [2.0, 1.0], "val_loss": [3.0, 2.0]})
    assert [line.get_label() for line in plot.training_curve(rows).lines] == [
        "training",
        "validation",
    ]
    for nothing in ({}, [], {"a": []}, pd.DataFrame({"x": [1]})):
        with pytest.raises(OptionError, match="nothing was trained"):
            plot.training_curve(nothing)


def test_learning_curve_is_mean_and_range():
    frame = pd.DataFrame({"n": [10, 10, 100], "e": [1.0, 3.0, 0.5], "who": ["a", "a", "b"]})
    ax = plot.learning_curve("n", "e", groups="who", data=frame, label="test MAE (eV)")
    first, second = ax.containers
    np.testing.assert_allclose(first.lines[0].get_xydata(), [[10, 2]])
    np.testing.assert_allclose(first.lines[2][0].get_segments()[0], [[10, 1], [10, 3]])
    np.testing.assert_allclose(second.lines[0].get_xydata(), [[100, 0.5]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training rows", "test MAE (eV)")
    with pytest.raises(OptionError, match="no error of a known number"):
        plot.learning_curve([0], [np.nan])
    with pytest.raises(OptionError, match="give as many"):
        plot.learning_curve([1, 2], [1.0])


# -- retention --------------------------------------------------------------------------------
def test_retention_plane_joins_the_points_of_a_way():
    ax = plot.retention_plane(
        [0.3, 0.02, np.nan, 0.1], [20, 21, 22, 30.0], groups=["ewc", "ewc", "ewc", "l2sp"],
        strengths=[0, 1, 2, "K=2"], unit="meV/atom",
    )  # fmt: skip
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[30, 20], [2, 21]])
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[10, 30]])
    assert [text.get_text() for text in ax.texts] == ["1", "K=2"]
    assert ax.get_ylabel() == "test MAE (meV/atom)"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ewc", "l2sp"]
    with pytest.raises(OptionError, match="no point"):
        plot.retention_plane([np.nan], [1.0])
    with pytest.raises(OptionError, match="or plugins"):
        plot.retention_plane([0.1])
    with pytest.raises(OptionError, match="give as many"):
        plot.retention_plane([1.0], [1.0, 2.0])


def test_forgetting_needs_measured_errors():
    with pytest.raises(OptionError, match="fine-tune with source_data"):
        plot.forgetting({"drift": {}})
    errors = {"band_gap_ev": {"change": -0.25}, "x_ev": {"change": None}}
    (bar,) = plot.forgetting({"source_error": errors}).patches
    assert bar.get_width() == -25


# -- calibration ------------------------------------------------------------------------------
def normal_rows(n, seed, width=1.0):
    rng = np.random.default_rng(seed)
    spread, centre = rng.gamma(4, 0.1, n), rng.normal(size=n)
    reach = norm.ppf(0.95) * spread * width
    return centre + spread * rng.normal(size=n), centre, centre - reach, centre + reach


def curve_of(ax):
    return next(line for line in ax.lines if line.get_label() == "found").get_xydata() / 100


def test_calibration_of_a_normal_model_lies_on_the_diagonal_and_of_a_narrow_one_below():
    y, f, low, high = normal_rows(20_000, 0)
    good = curve_of(plot.calibration(y, f, lower=low, upper=high))
    np.testing.assert_allclose(good[:, 0], good[:, 1], atol=0.012)
    y, f, low, high = normal_rows(20_000, 0, width=0.5)
    narrow = plot.calibration(y, f, lower=low, upper=high)
    exact = 2 * norm.cdf(0.5 * norm.ppf((1 + curve_of(narrow)[:, 0]) / 2)) - 1
    np.testing.assert_allclose(curve_of(narrow)[:, 1], exact, atol=0.012)
    # With rows to calibrate on the same intervals are stretched to where they should be.
    mended = curve_of(plot.calibration(y, f, lower=low, upper=high,
                                       reference=normal_rows(20_000, 1, width=0.5)))  # fmt: skip
    np.testing.assert_allclose(mended[:, 0], mended[:, 1], atol=0.02)
    dot = next(line for line in narrow.lines if line.get_marker() == "o")
    inside = ((y >= low) & (y <= high)).mean()
    np.testing.assert_allclose(dot.get_xydata(), [[90, 100 * inside]])
    assert "90 %" in dot.get_label()


def test_the_shade_holds_calibrated_models_in_95_of_100_cases():
    outside, wide = [], []
    for seed in range(60):
        scores, reference = (
            relative_errors(values_of(y, f, lower=low, upper=high))
            for y, f, low, high in (normal_rows(40, seed), normal_rows(30, 1000 + seed))
        )
        nominal, reach, low, high = _intervals(40, 0.9, reference)
        coverage = (scores[None] <= reach[:, None]).mean(axis=1)
        outside.append((coverage < low) | (coverage > high))
        wide.append(high - low)
    assert 0.01 < np.mean(outside) <= 0.06
    assert nominal[-1] > 0.95  # of 30 rows the largest error bounds 30/31 of new ones
    # Counting the test rows alone would make too little of it.
    alone = np.mean(_intervals(40, 0.9, None)[3] - _intervals(40, 0.9, None)[2])
    assert np.mean(wide) > 1.2 * alone


def test_errors_are_measured_on_the_scale_of_the_property():
    values = values_of([100.0], [10.0], target="bulk_modulus_vrh_gpa", lower=[5.0], upper=[20.0])
    np.testing.assert_allclose(relative_errors(values), 1 / np.log10(2))
    # A lower bound cut at zero says nothing of the reach.
    values = values_of([1.5], [0.2], target="band_gap_ev", lower=[0.0], upper=[1.2])
    np.testing.assert_allclose(relative_errors(values), 1.3)
    exact = values_of([1.0], [1.0], lower=[1.0], upper=[1.0])
    assert relative_errors(exact) == 0


def test_calibration_of_few_rows_and_without_intervals():
    plot.calibration([1.0], [1.1], lower=[0.9], upper=[1.3])
    plot.calibration([1.0], [1.1], lower=[0.9], upper=[1.3],
                     reference=([1.0], [1.0], [0.5], [1.5]))  # fmt: skip
    with pytest.raises(OptionError, match="needs the bounds"):
        plot.calibration([1.0], [1.1])
    with pytest.raises(OptionError, match="finite interval"):
        plot.calibration([1.0], [1.1], lower=[-np.inf], upper=[np.inf])
    with pytest.raises(OptionError, match="between 0 and 1"):
        plot.calibration([1.0], [1.1], lower=[0.9], upper=[1.3], level=90)


def test_reliability_against_a_loop():
    probability = RNG.random(500)
    label = np.where(RNG.random(500) < probability**2, "metal", "gap")
    ax = plot.reliability(label, probability, classes=["gap", "metal"], bins=5)
    at = ax.containers[0].lines[0].get_xydata()
    for k, (x, y) in enumerate(at):
        mine = (probability >= k / 5) & (probability < (k + 1) / 5)
        np.testing.assert_allclose(
            (x, y), (probability[mine].mean(), (label[mine] == "metal").mean())
        )
    from scipy.stats import binomtest

    bar = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    mine = probability < 0.2
    exact = binomtest(int((label[mine] == "metal").sum()), int(mine.sum())).proportion_ci(
        method="wilson"
    )
    np.testing.assert_allclose(bar, exact, atol=1e-4)
    assert ax.get_ylabel() == "share that is metal"
    assert "n = 500" in ax.texts[0].get_text()


def test_reliability_of_many_classes_and_of_nonsense():
    p = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [np.nan] * 3])
    ax = plot.reliability(["a", "c", "b"], p)
    assert ax.get_xlabel() == "probability of the likeliest class"
    np.testing.assert_allclose(ax.containers[0].lines[0].get_ydata(), [0, 1])
    plot.reliability([1], [0.5], classes=[0, 1])
    for labels, given, words in (
        ([0, 1], [0.5, 1.5], "between 0 and 1"),
        ([0, 0], [0.5, 0.5], "all labels are of one class"),
        ([0, 1], [[0.5], [0.5]], "of shape"),
        ([0, 1], [np.nan, np.nan], "no sample has probabilities"),
    ):
        with pytest.raises(OptionError, match=words):
            plot.reliability(labels, given)
    with pytest.raises(OptionError, match="label '2' is none of"):
        plot.reliability([0, 2], [0.5, 0.5], classes=[0, 1])


def test_roc_against_scikit_learn():
    from sklearn.metrics import roc_auc_score, roc_curve

    p = RNG.random(300).round(2)  # with ties
    label = np.where(RNG.random(300) < p, "metal", "gap")
    ax = plot.roc(label, p, classes=["gap", "metal"])
    curve = ax.lines[1]
    x, y, _ = roc_curve(label == "metal", p, drop_intermediate=False)
    np.testing.assert_allclose(curve.get_xydata(), np.column_stack([x, y]), atol=1e-12)
    area = roc_auc_score(label == "metal", p)
    assert curve.get_label() == f"metal ({(label == 'metal').sum()}): AUC {area:.3f}"
    three = RNG.dirichlet(np.ones(3), 200)
    kinds = RNG.choice(["a", "b", "b$"], 200, p=[0.2, 0.5, 0.3])
    ax = plot.roc(kinds, three)
    found = [text.get_text() for text in ax.get_legend().get_texts()]
    for k, name in enumerate(["a", "b", "b$"]):
        area = roc_auc_score(kinds == name, three[:, k])
        words = f"{name} ({(kinds == name).sum()}): AUC {area:.3f}".replace("$", r"\$")
        assert words in found
    assert found[0].startswith("b (")  # the commonest first
    with pytest.raises(OptionError, match="nothing to tell apart"):
        plot.roc(["a", "a"], [0.1, 0.2], classes=["a", "b"])
    many = np.full((20, 20), 0.05)
    assert len(plot.roc(np.arange(20), many).get_legend().get_texts()) == 7


def test_probabilities_by_class_are_counted():
    p = RNG.random(100)
    label = RNG.choice(["gap", "metal"], 100)
    ax = plot.probabilities_by_class(label, p, classes=["gap", "metal"], bins=4)
    assert ax.get_xlabel() == "predicted probability of metal"
    for k, name in enumerate(("gap", "metal")):
        bars = ax.containers[2 * k] if len(ax.containers) == 4 else ax.containers[k]
        heights = [bar.get_height() for bar in bars][:4]
        assert heights == np.histogram(p[label == name], 4, (0, 1))[0].tolist()
    three = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    ax = plot.probabilities_by_class(["a", "c"], three, classes=["a", "b", "c"], bins=10)
    assert ax.get_xlabel() == "probability of its class"
    assert ax.get_xlim() == (0, 1)


# -- the map ----------------------------------------------------------------------------------
def test_the_map_shows_the_two_largest_variances():
    x = RNG.normal(size=(80, 6))
    x[:, 3] = x[:, 0] + 0.01 * RNG.normal(size=80)  # a pair that varies together comes first
    ax = plot.embedding_map(x)
    at = np.asarray(ax.collections[0].get_offsets())
    scaled = (x - x.mean(0)) / x.std(0)
    _, size, axes = np.linalg.svd(scaled, full_matrices=False)
    np.testing.assert_allclose(np.abs(at), np.abs(scaled @ axes[:2].T), atol=1e-6)
    share = size[0] ** 2 / (size**2).sum()
    assert ax.get_xlabel() == f"principal component 1 ({share:.0%} of variance)"


def test_groups_colours_and_methods_of_the_map():
    x = {"oxides": RNG.normal(0, 1, (30, 5)), "halides": RNG.normal(4, 1, (20, 5))}
    ax = plot.embedding_map(x)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "oxides (n = 30)", "halides (n = 20)",
    ]  # fmt: skip
    both = np.concatenate(list(x.values()))
    colour = np.arange(50.0)
    colour[7] = np.nan
    ax = plot.embedding_map(both, colour=colour, label="band_gap_ev", method="tsne")
    assert ax.get_xlabel() == "t-SNE 1"
    grey, coloured = ax.collections[:2]
    assert (len(grey.get_offsets()), len(coloured.get_offsets())) == (1, 49)
    assert ax.figure.axes[-1].get_ylabel() == "band gap (eV)"
    ax = plot.embedding_map(both[:, :2], method="none")
    np.testing.assert_allclose(ax.collections[0].get_offsets(), both[:, :2])
    many = plot.embedding_map(both, groups=[f"g{k % 9}" for k in range(50)])
    assert len(many.get_legend().get_texts()) == 7  # six and the others
    assert sum(len(c.get_offsets()) for c in many.collections) == 50


@pytest.mark.parametrize("method", ["pca", "tsne", "none"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_map_of_few_or_equal_crystals(rows, method):
    plot.embedding_map(np.ones((rows, 4)), method=method)
    plot.embedding_map(np.arange(rows * 4.0).reshape(rows, 4), method=method)


def test_the_map_says_what_is_wrong():
    for features, more, words in (
        (np.full((2, 3), np.nan), {}, "none is finite"),
        (np.zeros(3), {}, "found shape"),
        (np.zeros((2, 3)), {"colour": [1.0]}, "colour has 1 entries"),
        (np.zeros((2, 3)), {"method": "umap"}, "must be one of"),
        ({}, {}, "no group"),
    ):
        with pytest.raises(OptionError, match=words):
            plot.embedding_map(features, **more)


def test_the_interactive_map_has_names_on_hover_escaped():
    pytest.importorskip("plotly")
    names = ["NaCl", "<script>alert(1)</script>", "Si"]
    x = RNG.normal(size=(3, 4))
    figure = plot.embedding_map(
        x, names=names, colour=[1, 2, 3.0], label="gap_ev", interactive=True
    )
    (trace,) = figure.data
    assert list(trace.text) == ["NaCl", "&lt;script&gt;alert(1)&lt;/script&gt;", "Si"]
    assert "%{text}" in trace.hovertemplate
    assert trace.marker.colorbar.title.text == "gap (eV)"
    grouped = plot.embedding_map(x, groups=["a", "b", "a"], interactive=True)
    assert [len(t.x) for t in grouped.data] == [2, 1]
    flat = plot.embedding_map(x, groups=["a", "b", "a"], interactive=True, ax=plt.subplots()[1])
    assert flat.get_legend() is not None  # axes are matplotlib's


# -- atoms ------------------------------------------------------------------------------------
def test_contributions_are_the_colours_of_the_atoms():
    from ase.build import bulk

    atoms = bulk("NaCl", "rocksalt", a=5.64)
    ax = plot.contributions(atoms, [1.0, 3.0], label="share (eV)")
    discs = [p for p in ax.patches if hasattr(p, "radius")]
    colours = {tuple(np.round(d.get_facecolor(), 3)) for d in discs}
    scale = plt.get_cmap(style.SEQUENTIAL)
    assert colours == {tuple(np.round(scale(v), 3)) for v in (0.0, 1.0)}
    assert {t.get_text() for t in ax.texts} == {"Na", "Cl"}
    for text in ax.texts:  # a symbol stands on the disc of its atom
        disc = min(discs, key=lambda d: np.hypot(*np.subtract(d.center, text.get_position())))
        value = [1.0, 3.0][["Na", "Cl"].index(text.get_text())]
        np.testing.assert_allclose(disc.get_facecolor(), scale((value - 1) / 2), atol=1e-3)
    bars = plot.contributions(atoms, [1.0, 3.0], label="share (eV)", kind="bars")
    assert [b.get_height() for b in bars.patches] == [1, 3]
    assert [t.get_text() for t in bars.get_xticklabels()] == ["Na1", "Cl2"]


def test_contributions_come_from_a_calculator_and_only_of_means(tiny_model):
    from ase.build import bulk

    from matxfer.calculator import MatxferCalculator

    atoms = bulk("NaCl", "rocksalt", a=5.64)
    atoms.calc = MatxferCalculator(tiny_model)
    ax = plot.contributions(atoms, kind="bars")
    energy = atoms.calc.get_property("formation_energy_ev_per_atom", atoms)
    np.testing.assert_allclose(np.mean([b.get_height() for b in ax.patches]), energy, atol=1e-5)
    assert ax.get_ylabel() == "contribution to formation energy (eV/atom)"
    with pytest.raises(OptionError, match="'band_gap_ev' has no contributions of atoms"):
        plot.contributions(atoms, "band_gap_ev")


def test_contributions_of_odd_structures():
    from ase import Atoms

    from matxfer.crystal import Crystal

    one = Crystal(3 * np.eye(3), [26], [[0, 0, 0]])
    plot.contributions(one, [-1.0], label="a (eV)", title="one")
    plot.contributions(one.to_pymatgen(), [0.0])
    plot.contributions(Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]]), [0.0, 1.0])
    for structure, values, words in (
        (one, [1.0, 2.0], "but there are 1 atoms"),
        (one, [np.nan], "not finite"),
        (one, None, "give contributions"),
        ("Fe", [1.0], "is no structure"),
    ):
        with pytest.raises(OptionError, match=words):
            plot.contributions(structure, values)
    with pytest.raises(OptionError, match="must be structure or bars"):
        plot.contributions(one, [1.0], kind="pie")


# -- style ------------------------------------------------------------------------------------
def test_the_settings_of_the_user_stay():
    before = dict(plt.rcParams)
    plot.parity([1.0, 2.0], [1.0, 2.0])
    assert dict(plt.rcParams) == before


def test_without_matplotlib_the_remedy_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match="pip install 'matxfer"):
        plot.parity([1.0], [1.0])


def test_labels():
    assert style.label("bulk_modulus_vrh_gpa") == "bulk modulus VRH (GPa)"
    assert style.label("poisson_ratio", "true") == "true poisson ratio"
    assert style.label("log_last_phdos_peak_per_cm") == "log last PhDOS peak (ln(1/cm))"
    assert style.quantity("_ev") == "_ev" or style.quantity("_ev")
    assert style.plain("a\x1b[31m") == "a\\x1b[31m"
