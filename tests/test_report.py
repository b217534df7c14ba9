"""The report of a plugin: what it shows, whatever a stranger's file says, and in a real browser."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TARGET
from typer.testing import CliRunner

from matxfer.errors import MatxferError, OptionError
from matxfer.estimator import TransferClassifier
from matxfer.files import FormatError, read_json, write_json
from matxfer.html import Markup, facts, join, table, tag
from matxfer.plot.values import of_record
from matxfer.prediction import predict
from matxfer.report import write_report
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

SCRIPT = "</title><script>document.title='pwned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def plugin(tiny_model, crystal_table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "mine"
    return finetune(
        crystal_table, TARGET, folder, model=tiny_model, split_column="split",
        source_data=crystal_table, freeze=3, epochs=4, patience=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def text(plugin, tmp_path_factory):
    """Return the page of the plugin as it is."""
    return page_of(plugin.folder, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def labels(crystal_frame):
    """Return classes that the tiny network can tell, not always."""
    value = crystal_frame[TARGET] * np.random.default_rng(1).lognormal(0, 0.3, len(crystal_frame))
    return pd.Series(np.where(value > value.median(), "stiff", "soft"), name="kind_of_solid")


@pytest.fixture(scope="module")
def classifier(tiny_model, crystal_frame, labels, tmp_path_factory):
    """Return the folder of a classifier and the classifier."""
    made = TransferClassifier(tiny_model, C=1.0).fit(crystal_frame, labels)
    folder = tmp_path_factory.mktemp("report") / "kinds"
    made.save(folder)
    return folder, made


@pytest.fixture
def kinds(classifier, tmp_path):
    """Return a copy of the classifier's folder that a test may spoil."""
    return Path(shutil.copytree(classifier[0], tmp_path / "kinds"))


@pytest.fixture
def folder(plugin, tmp_path):
    """Return a copy of the plugin's folder that a test may spoil."""
    return Path(shutil.copytree(plugin.folder, tmp_path / "mine"))


def change(folder, file="plugin.json", **changes):
    write_json(folder / file, read_json(folder / file) | changes)


def page_of(folder, tmp_path, **options):
    write_report(folder, tmp_path / "report.html", **options)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """What a browser would make elements of, with their attributes, and the text between."""

    def __init__(self, text):
        super().__init__()
        self.names, self.attributes, self.texts, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_data(self, data):
        self.texts.append(data)


def sections(text):
    return dict(re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", text, re.DOTALL))


# -- what a plugin keeps ------------------------------------------------------------------------
def test_a_plugin_keeps_the_predictions_of_its_held_out_rows(plugin, crystal_frame, tiny_model):
    for part in ("val", "test"):
        kept = plugin.meta["predictions"][part]
        rows = crystal_frame[crystal_frame.split == part]
        assert kept["id"] == rows.material_id.tolist()
        np.testing.assert_allclose(kept["truth"], rows[TARGET], rtol=1e-5)
        found = predict(rows, plugin, model=tiny_model)
        np.testing.assert_allclose(kept["predicted"], found[TARGET], rtol=1e-4)
        np.testing.assert_allclose(kept["std"], found[f"{TARGET}_std"], rtol=1e-3)
        np.testing.assert_allclose(kept["ood"], found["ood"], rtol=1e-3)
        assert kept["formula"] == found.formula.tolist()
        assert kept["lower"] == [None] * 6  # six rows are too few for intervals of 90 %
        assert np.isnan(of_record(plugin.meta, part).lower).all()
    assert set(plugin.meta["predictions"]) == {"val", "test"}


def test_so_many_rows_are_kept_and_no_more(tiny_model, crystal_frame):
    options = {"model": tiny_model, "split_column": "split", "features": "ridge"}
    few = finetune(crystal_frame, TARGET, keep_predictions=2, **options)
    kept = few.meta["predictions"]["test"]
    assert (kept["rows"], len(kept["truth"]), len(kept["id"])) == (6, 2, 2)
    none = finetune(crystal_frame, TARGET, keep_predictions=0, **options)
    assert "predictions" not in none.meta
    assert none.meta["figures"] == few.meta["figures"]
    with pytest.raises(OptionError, match="keep_predictions is -1"):
        finetune(crystal_frame, TARGET, keep_predictions=-1, **options)


def test_learning_curves_are_kept(plugin, tiny_model, crystal_frame):
    assert len(plugin.meta["history"]) == len(plugin.meta["train_history"]) == 4
    layers = finetune(crystal_frame, TARGET, model=tiny_model, split_column="split", freeze=1,
                      epochs=3, probe_first=False)  # fmt: skip
    curve = layers.meta["train_history"]
    assert len(curve) == len(layers.meta["history"]) == 3
    assert curve[-1] < curve[0]


def test_flat_lists_stand_in_one_line(plugin):
    text = (plugin.folder / "plugin.json").read_text(encoding="utf-8")
    assert json.loads(text) == plugin.meta
    assert len(text.splitlines()) < 250


def test_json_of_texts_with_brackets_is_read_back(tmp_path):
    data = {"a": ["[", "]\n", "\n [ ", "}"], "b": [[1, 2], []], "c": "[\n 1\n]", "d": [1.5, None]}
    write_json(tmp_path / "x.json", data)
    assert read_json(tmp_path / "x.json") == data
    assert '"d": [1.5, null]' in (tmp_path / "x.json").read_text()


# -- the page -----------------------------------------------------------------------------------
def test_the_page_says_what_the_plugin_says(plugin, text):
    found = sections(text)
    assert list(found) == [
        "What it is", "Data", "Predictions and truth", "Errors by element", "Calibration",
        "Training", "Retention of the source", "Source and target", "Provenance", "Use and cite",
    ]  # fmt: skip
    meta = plugin.meta
    assert meta["base"]["name"] in found["What it is"]
    assert meta["data"]["sha256"] in found["Data"]
    assert f"{meta['figures']['test']['mae']:.4g}" in found["Predictions and truth"]
    worst = meta["predictions"]["test"]["id"]
    assert all(name in found["Predictions and truth"] for name in worst)
    assert "debye temperature (K)" in text
    assert "n = 6" in found["Predictions and truth"]
    assert "finite interval" in found["Calibration"]  # too few rows for intervals
    assert "kept: epoch" in found["Training"]
    assert "change of the error" in found["Retention of the source"]
    assert "give --source-data and --data" in found["Source and target"]
    assert meta["versions"]["torch"] in found["Provenance"]
    assert "matxfer predict *.cif --plugin mine" in found["Use and cite"]
    elements = Elements(text)
    assert len(elements.ids) == len(set(elements.ids)) > 50
    assert not {"script", "iframe", "object", "embed", "link rel=stylesheet"} & set(elements.names)


def test_nothing_in_the_page_is_an_address_and_two_are_the_same(plugin, text, tmp_path):
    names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert "http" not in names.replace("http-equiv", "")
    assert "url(http" not in names
    assert str(plugin.folder.parent) not in text
    in_memory = write_report(plugin, tmp_path / "other.html")
    assert in_memory.name == "mine"
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == text


def test_points_have_names_on_hover(plugin, text):
    kept = plugin.meta["predictions"]["test"]
    first = f"{kept['id'][0]} {kept['formula'][0]}: {kept['truth'][0]:.4g}"
    assert re.search(rf"<use [^>]*><title>{re.escape(first)}", text)


def test_ink_follows_the_page(text):
    assert text.count("currentColor") > 20
    assert "#010203" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_an_older_plugin_says_what_is_missing(folder, tmp_path):
    meta = read_json(folder / "plugin.json")
    for key in ("predictions", "history", "train_history", "retention", "trials"):
        meta.pop(key, None)
    meta["format"] = 2
    meta["data"].pop("values")
    write_json(folder / "plugin.json", meta)
    found = sections(page_of(folder, tmp_path))
    assert "--data TABLE to predict its rows anew" in found["Predictions and truth"]
    assert f"{meta['figures']['test']['mae']:.4g}" in found["Predictions and truth"]
    assert "keeps no predictions" in found["Calibration"]
    assert "No learning curve" in found["Training"]
    assert "says nothing of the source" in found["Retention of the source"]
    assert "is of format 2" in found["Provenance"]


def test_a_plugin_of_a_potential_has_a_report(small_potential_plugins, tmp_path):
    changed = Path(shutil.copytree(small_potential_plugins[0], tmp_path / "pot"))
    errors = {"energy_mae_ev_per_atom": 0.01, "forces_mae_ev_per_a": 0.25}
    change(changed, test=errors, history=[0.5, 0.3], best_epoch=1)
    text = page_of(changed, tmp_path)
    assert "forces MAE 0.25 eV/Å on test frames" in text
    assert "kept: epoch 2" in sections(text)["Training"]
    with pytest.raises(OptionError, match="leave out --data"):
        write_report(changed, tmp_path / "x.html", data="table.csv")


# -- the page of a classifier -------------------------------------------------------------------
CLASSES = [
    "What it is", "Data", "Classes and probabilities", "Confusions", "Mistakes by element",
    "Calibration", "Provenance", "Use and cite",
]  # fmt: skip


def rows_of(section, caption):
    """Return the cells of the body of a table, as text."""
    found = re.search(
        rf"<caption>{caption}.*?</caption>.*?<tbody>(.*?)</tbody>", section, re.DOTALL
    )
    lines = re.findall(r"<tr>(.*?)</tr>", found[1])
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line) for line in lines]


def test_the_page_of_a_classifier_says_what_it_keeps(classifier, labels, tmp_path, tiny_model):
    folder, made = classifier
    found = sections(page_of(folder, tmp_path))
    assert list(found) == CLASSES
    kept = read_json(folder / "estimator.json")["predictions"]["folds"]
    truth, p = np.array(kept["truth"]), np.array(kept["probability"][1])
    # The oracle: counts and scores of the kept columns, by hand.
    assert sorted(truth) == sorted(labels)
    assert len(set(kept["id"])) == 60
    said = np.where(p > 0.5, "stiff", "soft")
    counts = rows_of(found["Confusions"], "Likeliest")
    for line, true in zip(counts, ("soft", "stiff"), strict=True):
        assert line[0] == true
        for cell, other in zip(line[1:3], ("soft", "stiff"), strict=True):
            assert cell.startswith(f"{((truth == true) & (said == other)).sum()} (")
        assert line[4] == f"{100 * (said[truth == true] == true).mean():.1f} %"
        assert line[5] == f"{100 * (truth[said == true] == true).mean():.1f} %"
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

    (figures,) = rows_of(found["Classes and probabilities"], "Figures")
    stiff = truth == "stiff"
    commonest = max(stiff.mean(), 1 - stiff.mean())
    expected = [roc_auc_score(stiff, p), (said == truth).mean(), commonest,
                brier_score_loss(stiff, p), log_loss(stiff, p)]  # fmt: skip
    np.testing.assert_allclose([float(cell) for cell in figures[1:6]], expected, rtol=2e-3)
    worst = max((p[k] if p[k] > 0.5 else 1 - p[k], k) for k in np.flatnonzero(said != truth))
    (first, *_) = rows_of(found["Classes and probabilities"], "Surest")
    assert first[0] == kept["id"][worst[1]]
    assert f"AUC {expected[0]:.3f}" in found["Classes and probabilities"]  # of the drawn curve
    assert "share that is stiff" in found["Calibration"]
    assert ["soft", "30", "50.0 %"] in rows_of(found["Data"], "Classes")
    assert tiny_model.checksum[:12] in found["What it is"]
    assert f"{made.temperature_:.4g}" in found["What it is"]
    assert "classifier.safetensors" in found["What it is"]
    assert "TransferClassifier.load(&#x27;kinds&#x27;)" in found["Use and cite"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A classifier that predicts kind_of_solid: soft or stiff" in text
    assert str(folder.parent) not in text
    elements = Elements(text)
    assert len(elements.ids) == len(set(elements.ids)) > 50
    assert not {"script", "iframe", "object", "embed"} & set(elements.names)


def test_a_classifier_keeps_so_many_samples_and_no_more(
    tiny_model, crystal_frame, labels, tmp_path
):
    for most in (7, 0):
        made = TransferClassifier(tiny_model, C=1.0, keep_predictions=most)
        made.fit(crystal_frame, labels).save(tmp_path / "c")
        kept = read_json(tmp_path / "c" / "estimator.json").get("predictions")
        found = sections(page_of(tmp_path / "c", tmp_path))
        assert "log loss" in found["Classes and probabilities"]
        if most:
            assert (kept["folds"]["rows"], len(kept["folds"]["truth"])) == (60, 7)
            assert "7 of 60 held-out samples" in found["Classes and probabilities"]
        else:
            assert kept is None
            assert "with keep_predictions=0" in found["Classes and probabilities"]
            assert "keeps no probabilities" in found["Calibration"]
            secret = (tmp_path / "c" / "estimator.json").read_text(encoding="utf-8")
            assert crystal_frame.material_id[0] not in secret
    with pytest.raises(OptionError, match="keep_predictions is -1"):
        made.set_params(keep_predictions=-1).fit(crystal_frame, labels)


def test_a_classifier_read_back_makes_the_same_page(classifier, tmp_path, tiny_model):
    folder, made = classifier
    back = TransferClassifier.load(folder, tiny_model)
    back.save(tmp_path / "kinds")
    before, after = (read_json(f / "estimator.json") for f in (folder, tmp_path / "kinds"))
    assert after["predictions"] == before["predictions"]
    assert after["figures"] == before["figures"]
    write_report(made, tmp_path / "a.html")
    write_report(back, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_classifier_of_before_has_a_page(kinds, tmp_path):
    said = read_json(kinds / "estimator.json")
    for key in ("predictions", "data", "elements", "provenance", "target", "layers", "temperature"):
        said.pop(key)
    write_json(kinds / "estimator.json", said)
    found = sections(page_of(kinds, tmp_path))
    assert "saved before it did" in found["Data"]
    assert "keeps no probabilities" in found["Confusions"]


def test_labels_of_a_table(classifier, crystal_frame, labels, tmp_path, tiny_model):
    folder, made = classifier
    table = crystal_frame.assign(kind_of_solid=labels)
    table.loc[3, "kind_of_solid"] = None
    record = write_report(
        folder, tmp_path / "r.html", data=table, model=tiny_model, split_column="split"
    )
    assert record.parts == ("test", "val", "train")
    rows = np.flatnonzero(crystal_frame.split == "test")
    probability = made.predict_proba(crystal_frame.iloc[rows])
    kept = record.meta["predictions"]["test"]
    np.testing.assert_allclose(np.transpose(kept["probability"]), probability, atol=1e-4)
    assert kept["truth"] == labels.iloc[rows].tolist()
    hit = (made.predict(crystal_frame.iloc[rows]) == labels.iloc[rows]).mean()
    assert record.meta["figures"]["test"]["accuracy"] == pytest.approx(hit)
    assert "1 of 60 rows were left out" in " ".join(record.notes)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"on {len(rows)} test rows" in text
    # Numbers for labels, another column, rows of one class.
    numbers = TransferClassifier(tiny_model, C=1.0).fit(crystal_frame, (labels == "soft") * 3)
    table = crystal_frame.assign(mine=(labels == "soft").astype(float) * 3)[labels == "soft"]
    record = write_report(numbers, tmp_path / "r.html", data=table, target="mine")
    assert record.parts == ("all rows",)
    assert record.meta["figures"]["all rows"]["auc"] is None
    assert "may have been trained on" in " ".join(record.notes)


def test_mistakes_with_classifiers_are_told(
    classifier, plugin, crystal_frame, tiny_model, tmp_path
):
    folder = classifier[0]
    page, options = tmp_path / "x.html", {"model": tiny_model}
    for given, more, error, words in (
        (folder, {"source_data": crystal_frame}, OptionError, "matxfer shift"),
        (folder, {"data": crystal_frame}, MatxferError, "no column 'kind_of_solid' of labels"),
        (folder, {"data": crystal_frame, "target": "material_id"}, MatxferError, "is none of the"),
        (plugin, {"data": crystal_frame, "target": TARGET}, OptionError, "is for classifiers"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            write_report(given, page, **more, **options)
    nameless = TransferClassifier(tiny_model, C=1.0).fit(crystal_frame, ["a", "b"] * 30)
    with pytest.raises(OptionError, match="--target COLUMN"):
        write_report(nameless, page, data=crystal_frame)
    write_json(tmp_path / "estimator.json", {"format": 1, "kind": "StructureFingerprint"})
    with pytest.raises(FormatError, match="of which there is no report"):
        write_report(tmp_path, page)
    assert not page.exists()


# -- strangers ----------------------------------------------------------------------------------
def hostile(folder):
    """Write texts that are no texts wherever a plugin may have some."""
    meta = read_json(folder / "plugin.json")

    def spoil(value):
        if isinstance(value, dict):
            return {k: spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(each) for each in value]
        return f"{value}{SCRIPT}$\\frac{{\x1b[31m\x00" if isinstance(value, str) else value

    spoilt = spoil({k: v for k, v in meta.items() if k != "head"})
    spoilt["target"] = spoilt["name"] = SCRIPT
    spoilt["head"] = meta["head"]
    spoilt["head"]["property"]["name"] = f"{SCRIPT}_ev"
    spoilt["data"] |= {SCRIPT: SCRIPT, "rows_excluded": {SCRIPT: 3}}
    spoilt["retention"]["drift"][SCRIPT] = {"mean_absolute_drift": 1.0, "unit": SCRIPT}
    spoilt["retention"]["source_error"][SCRIPT] = {"before": 1, "after": 2, "change": 1.0}
    spoilt["config"][SCRIPT] = SCRIPT
    for kept in spoilt["predictions"].values():
        kept["formula"] = ["NaCl"] * len(kept["truth"])
    write_json(folder / "plugin.json", spoilt)


def hostile_classifier(folder):
    """Write texts that are no texts wherever a classifier may have some."""
    said = read_json(folder / "estimator.json")
    of = {label: f"{label}{SCRIPT}$\\frac{{\x1b[31m\x00" for label in said["classes"]}
    said["classes"] = list(of.values())
    kept = said["predictions"]["folds"]
    kept["truth"] = [of[label] for label in kept["truth"]]
    kept["id"] = [f"{name}{SCRIPT}\x1b" for name in kept["id"]]
    said["target"] = said["base"]["name"] = SCRIPT
    said["params"][SCRIPT] = said["provenance"]["command"] = said["provenance"]["date"] = SCRIPT
    write_json(folder / "estimator.json", said)


@pytest.mark.parametrize("kind", ["plugin", "classifier"])
def test_texts_stay_texts(folder, kinds, tmp_path, kind):
    if kind == "plugin":
        hostile(folder)
    else:
        hostile_classifier(kinds)
        folder = kinds
    text = page_of(folder, tmp_path)
    elements = Elements(text)
    assert not {"script", "img", "iframe"} & set(elements.names)
    assert not [key for key, _ in elements.attributes if key.startswith("on")]
    assert "".join(elements.texts).count("<script>") > 5  # told, not run
    assert "\x1b" not in text
    assert "\x00" not in text


KEYS = (
    "base", "chosen", "config", "data", "elements", "figures", "format", "frozen_depth", "head",
    "history", "kind", "name", "predictions", "retention", "target", "trials", "uncertainty",
    "unit", "versions",
)  # fmt: skip


@pytest.fixture
def sketched(monkeypatch):
    """Draw on one figure that is never written, and no periodic tables: a page takes 0.1 s then."""
    from matplotlib.figure import Figure

    figure = Figure()

    def drawn(name, alt, draw, *_args, **_options):
        figure.clear()
        if name not in ("elements", "residuals"):
            draw(figure.subplots())
        return tag("svg")

    for module in ("classes", "parts", "quality", "source"):
        monkeypatch.setattr(f"matxfer.report.{module}.drawn", drawn)


@pytest.mark.parametrize("key", KEYS)
def test_values_of_other_types_are_told(folder, tmp_path, key, sketched):
    for value in ([1, "a", None], {"test": {"truth": "x", "n": "y"}}, float("nan")):
        change(folder, **{key: value})
        text = page_of(folder, tmp_path)
        assert len(sections(text)) == 10
        assert text.endswith("</html>\n")


CLASSIFIER_KEYS = (
    "C", "base", "classes", "data", "elements", "figures", "layers", "params", "predictions",
    "provenance", "target", "temperature",
)  # fmt: skip


@pytest.mark.parametrize("key", CLASSIFIER_KEYS)
def test_values_of_other_types_in_a_classifier_are_told(kinds, tmp_path, key, sketched):
    wrong = {"folds": {"truth": ["x"], "n": "y", "probability": [[1, 2]], "id": 3}}
    for value in ([1, "a", None], [["soft"], {}], wrong, float("nan"), 7):
        change(kinds, "estimator.json", **{key: value})
        assert list(sections(page_of(kinds, tmp_path))) == CLASSES


def test_columns_of_different_length_are_told(folder, tmp_path):
    kept = read_json(folder / "plugin.json")["predictions"]
    kept["test"]["predicted"] = kept["test"]["predicted"][:2]
    kept["val"]["truth"] = ["a"] * 6
    change(folder, predictions=kept)
    found = sections(page_of(folder, tmp_path))
    assert "missing" in found["Predictions and truth"]


# -- with tables --------------------------------------------------------------------------------
def test_a_table_at_hand_is_predicted_anew(
    plugin, crystal_table, crystal_frame, tmp_path, tiny_model
):
    record = write_report(plugin.folder, tmp_path / "r.html", data=crystal_table, model=tiny_model)
    assert record.parts == ("test", "val", "train")
    for part in ("val", "test"):
        was, now = plugin.meta["figures"][part], record.meta["figures"][part]
        np.testing.assert_allclose(now["mae"], was["mae"], rtol=1e-4)
    assert record.meta["predictions"]["train"]["rows"] == 48
    assert "the table that the plugin was trained on" in record.notes[0]
    other = crystal_frame.drop(columns="split").iloc[:12]
    record = write_report(plugin, tmp_path / "r.html", data=other)
    assert record.parts == ("all rows",)
    assert "may have been trained on" in record.notes[1]
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "on 12 all rows" not in text
    assert "on 12 rows" in text


def test_source_and_target_are_compared(plugin, crystal_table, tmp_path):
    record = write_report(
        plugin, tmp_path / "r.html", data=crystal_table, source_data=crystal_table, sample=40
    )
    found = sections((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert record.diagnosis.covariate.auc < 0.7  # the table against itself
    assert "crystals.parquet → crystals.parquet" in found["Source and target"]
    assert str(crystal_table.parent) not in found["Source and target"]
    assert "40 rows of crystals.parquet were drawn" in " ".join(record.notes)
    assert set(record.meta["retention"]["source_error"]) == {
        "formation_energy_ev_per_atom", "bulk_modulus_vrh_gpa",
    }  # fmt: skip


def test_mistakes_are_told_in_one_line(plugin, tmp_path):
    from matxfer.cli import app

    runner = CliRunner()
    base = ["--model", str(plugin.base.folder)]
    for arguments, error, words in (
        (["report", str(tmp_path)], FormatError, "there is no plugin.json"),
        (["report", str(plugin.folder), "--data", "nope.csv", *base], MatxferError, "nope.csv"),
        (["report", str(plugin.folder), "--data", "nope.csv"], FormatError, "no model 'tiny'"),
    ):
        result = runner.invoke(app, [*arguments, "-o", str(tmp_path / "x.html")])
        assert isinstance(result.exception, error)
        assert words in str(result.exception)
        assert not (tmp_path / "x.html").exists()
    result = runner.invoke(app, ["report", str(plugin.folder), "-o", str(tmp_path / "x.html")])
    assert result.exit_code == 0
    assert (tmp_path / "x.html").stat().st_size > 20_000


# -- HTML ---------------------------------------------------------------------------------------
def test_html_is_escaped_once():
    assert str(tag("p", "a & <b>", tag("b", "c"), title='"x"')) == (
        '<p title="&quot;x&quot;">a &amp; &lt;b&gt;<b>c</b></p>'
    )
    assert str(join(["<", Markup("<br>")])) == "&lt;<br>"
    text = str(table(("a", "b"), [("x", 1.0), ("y", -12345)], "t"))
    assert '<th scope="col">a</th><th scope="col" class="number">b</th>' in text
    assert '<td class="number">−12,345</td>' in text
    assert "<td>–</td>" in str(facts({"nothing": None}))
    assert "yes" in str(facts({"flag": True}))


# -- a real browser -----------------------------------------------------------------------------
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: apt-get install chromium"
)
_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--disable-domain-reliability", "--hide-scrollbars",
    "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def browse(page, tmp_path, *options):
    """Open a page; return its DOM, what the console said, and the addresses that it asked for.

    A browser asks for updates of its own; what a page asks for has an origin.
    """
    log, profile = tmp_path / "net.json", tmp_path / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    profile.mkdir()
    done = subprocess.run(
        [CHROMIUM, *_QUIET, f"--user-data-dir={profile}", f"--log-net-log={log}", *options,
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    requests = [
        event["params"]
        for event in json.loads(log.read_text(encoding="utf-8"))["events"]
        if "url" in event.get("params", {}) and "initiator" in event["params"]
    ]
    asked = {r["url"] for r in requests if r["initiator"] != "not an origin"}
    return done.stdout, console, asked


@pytest.fixture(scope="module")
def server():
    """Serve nothing, and remember who asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running.server_port, asked
    running.shutdown()


@needs_browser
def test_the_browser_test_sees_errors_and_requests(tmp_path, server):
    port, asked = server
    page = tmp_path / "bad.html"
    page.write_text(
        f'<title>x</title><img src="http://127.0.0.1:{port}/spy.png"><script>nonsense()</script>'
    )
    _, console, addresses = browse(page, tmp_path, "--dump-dom")
    assert any("nonsense is not defined" in line for line in console)
    assert any(f":{port}/spy.png" in address for address in addresses)
    assert "/spy.png" in asked


@needs_browser
@pytest.mark.parametrize("kind", ["honest", "hostile", "classifier", "hostile classifier"])
def test_a_browser_opens_it_without_a_word_and_asks_no_one(folder, kinds, tmp_path, kind, server):
    image = f'<img src="http://127.0.0.1:{server[0]}/spy">'
    if kind == "hostile":
        hostile(folder)
        change(folder, chosen=image, name="hostile")
    elif kind == "hostile classifier":
        hostile_classifier(kinds)
        change(kinds, "estimator.json", target=image)
    page_of(kinds if "classifier" in kind else folder, tmp_path)
    dom, console, asked = browse(tmp_path / "report.html", tmp_path, "--dump-dom")
    assert console == []
    assert asked == set()
    assert dom.count("<section>") == (8 if "classifier" in kind else 10)
    assert "<title>pwned" not in dom
    assert Elements(dom).names.count("svg") >= 4


@needs_browser
@pytest.mark.parametrize("kind", ["plugin", "classifier"])
def test_it_fits_narrow_and_wide_windows_and_paper(folder, kinds, tmp_path, kind):
    """Widths are measured in frames: a page of our own asks how wide the report has become."""
    text = page_of(folder if kind == "plugin" else kinds, tmp_path)
    # The report's policy allows no script; a copy without it may be looked into.
    free = re.sub(r"<meta http-equiv[^>]*>", "", text)
    free = free.replace("</body>", "<script>parent.postMessage(document.documentElement.scrollWidth"
                        " + ' of ' + innerWidth, '*')</script></body>")  # fmt: skip
    (tmp_path / "free.html").write_text(free, encoding="utf-8")
    frames = "".join(
        f'<iframe src="free.html" width="{w}" height="900" style="border:0"></iframe>'
        for w in (360, 1200)
    )
    (tmp_path / "frames.html").write_text(
        "<script>onmessage = e => { document.body.append(` [${e.data}] `) }</script><body>" + frames
    )
    dom, _, _ = browse(
        tmp_path / "frames.html", tmp_path, "--dump-dom", "--virtual-time-budget=5000"
    )
    found = re.findall(r"\[(\d+) of (\d+)\]", dom)
    assert sorted(int(w) for _, w in found) == [360, 1200]
    assert all(int(width) <= int(window) for width, window in found)
    paper = tmp_path / "report.pdf"
    browse(tmp_path / "report.html", tmp_path, f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")


def test_a_plugin_read_back_still_keeps_its_report(plugin, tiny_model):
    again = load_plugin(plugin.folder, tiny_model)
    assert again.meta["predictions"] == plugin.meta["predictions"]
    assert "test MAE" in repr(again.report)
