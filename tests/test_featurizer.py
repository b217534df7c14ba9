"""The featurizer as matminer's users use it; with matminer itself where it is installed."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pandas as pd
import pytest
from ase.build import bulk
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from matxfer.errors import OptionError
from matxfer.estimator import FingerprintFeaturizer, StructureFingerprint, featurizer
from matxfer.estimator.samples import SampleError
from matxfer.transfer.activations import Activations


@pytest.fixture(scope="module")
def structures(table_crystals):
    return [c.to_pymatgen() for c in table_crystals[:8]]


@pytest.fixture
def mine(tiny_model_folder):
    return FingerprintFeaturizer(str(tiny_model_folder), layers=(1, 3), kind="pooled")


def expected(structures, folder):
    plain = StructureFingerprint(str(folder), layers=(1, 3), kind="pooled")
    return plain.fit_transform(structures)


def test_features_are_the_fingerprints(mine, structures, tiny_model_folder):
    found = mine.featurize_many(structures)
    assert all(type(row) is list and type(row[0]) is float for row in found)
    np.testing.assert_allclose(found, expected(structures, tiny_model_folder), atol=1e-6)
    one = mine.featurize(structures[3])
    np.testing.assert_allclose(one, found[3], atol=1e-5)
    assert len(mine.feature_labels()) == len(one) == 2 * 2 * 16
    assert len(set(mine.feature_labels())) == len(one)
    assert mine.feature_labels()[0] == "tiny mean_layer1_0"
    assert mine.feature_labels() is not mine.feature_labels()  # matminer appends to it
    for given in (tuple(structures), [(s,) for s in structures], pd.Series(structures),
                  pd.DataFrame({"s": structures}), [[s] for s in structures]):  # fmt: skip
        np.testing.assert_array_equal(mine.featurize_many(given), found)
    assert mine.featurize_many([]) == []
    assert mine.citations()
    assert all(c.startswith("@") for c in mine.citations())
    assert mine.implementors()


def test_many_structures_are_one_pass(mine, structures, monkeypatch, tmp_path):
    passes = []
    write = Activations._write
    monkeypatch.setattr(
        Activations, "_write", lambda self, i, f: passes.append(len(i)) or write(self, i, f)
    )
    monkeypatch.setenv("MATXFER_CACHE", str(tmp_path))
    mine.set_n_jobs(2)
    assert mine.n_jobs == 2
    frame = pd.DataFrame({"structure": structures})
    mine.featurize_dataframe(frame, "structure", pbar=False)
    assert passes == [8]
    assert not list(tmp_path.iterdir())  # few structures leave nothing behind
    monkeypatch.setattr(featurizer, "FEW", 4)
    mine.featurize_many(structures)
    assert {p.name for p in tmp_path.iterdir()} == {"activations", "graphs"}


def test_data_frames(mine, structures, tiny_model_folder):
    frame = pd.DataFrame({"structure": structures, "y": range(8)}, index=list("abcdefgh"))
    found = mine.featurize_dataframe(frame, "structure", pbar=False)
    assert found.columns.tolist() == ["structure", "y", *mine.feature_labels()]
    assert found.index.tolist() == list("abcdefgh")
    values = found[mine.feature_labels()].to_numpy()
    np.testing.assert_allclose(values, expected(structures, tiny_model_folder), atol=1e-6)
    again = mine.fit_featurize_dataframe(frame, "structure", pbar=False)
    pd.testing.assert_frame_equal(again.drop(columns="structure"), found.drop(columns="structure"))
    with pytest.raises(ValueError, match="exists in input dataframe"):
        mine.featurize_dataframe(found, "structure", pbar=False)
    assert mine.featurize_dataframe(frame, ["structure"], inplace=True, pbar=False) is None
    assert frame.shape == found.shape


def test_structures_that_cannot_be_used(mine, structures):
    bad = [structures[0], bulk("Au"), "text", structures[1], (1, 2)]
    with pytest.raises(SampleError, match=r"entry 1 cannot be used.*unknown to 'tiny'.*3 of 5"):
        mine.featurize_many(bad)
    with pytest.raises(SampleError, match="entry 0"):
        mine.featurize(bulk("Au"))
    found = mine.featurize_many(bad, ignore_errors=True, return_errors=True)
    assert [isinstance(row[-1], str) for row in found] == [False, True, True, False, True]
    assert np.isnan(np.array([row[:-1] for row in found], float)).all(axis=1).tolist() == [
        False, True, True, False, True,
    ]  # fmt: skip
    assert "2 objects where an entry is one structure" in found[4][-1]
    assert np.isnan(mine.transform(bad)[1]).all()
    with pytest.raises(ValueError, match="ignore_errors"):
        mine.featurize_many(bad, return_errors=True)
    frame = pd.DataFrame({"structure": pd.Series(bad[:2], dtype=object)})
    told = mine.featurize_dataframe(
        frame, "structure", ignore_errors=True, return_errors=True, pbar=False
    )["FingerprintFeaturizer Exceptions"]
    assert "unknown" in told[1]


def test_it_is_an_estimator(mine, structures, tiny_model_folder, tiny_model):
    copy = clone(mine)
    assert copy.get_params() == mine.get_params()
    wide = len(mine.featurize(structures[0]))
    mine.set_params(kind="statistics")  # without another fit
    assert len(mine.featurize(structures[0])) == 2 * wide == len(mine.feature_labels())
    assert mine.fit(structures) is mine
    assert make_pipeline(mine, StandardScaler()).fit_transform(structures).shape == (8, 2 * wide)
    data = pickle.dumps(mine)
    assert len(data) < 2000  # the weights stay at home
    np.testing.assert_array_equal(pickle.loads(data).transform(structures[:2]),
                                  mine.transform(structures[:2]))  # fmt: skip
    with pytest.raises(OptionError, match="layers are"):
        FingerprintFeaturizer(str(tiny_model_folder), layers=(9,)).feature_labels()
    with pytest.raises(OptionError, match="kind is"):
        FingerprintFeaturizer(tiny_model, kind="sum").featurize(structures[0])


def test_matminer_is_not_imported_for_the_others():
    import subprocess

    code = "import sys, matxfer.estimator as e; print('matminer' in sys.modules, e.__all__[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "FingerprintFeaturizer"]


# -- matminer itself --------------------------------------------------------------------------
@pytest.fixture
def base():
    return pytest.importorskip(
        "matminer.featurizers.base", reason="pip install 'matxfer[matminer]'"
    )


def test_it_is_one_of_matminers(base, mine, structures):
    assert isinstance(mine, base.BaseFeaturizer)
    frame = pd.DataFrame({"structure": structures})
    assert mine.precheck_dataframe(frame, "structure") == 1
    found = mine.featurize_dataframe(frame, "structure", multiindex=True, pbar=False)
    assert found.columns[-1][0] == "FingerprintFeaturizer"


def test_multiple_featurizers(base, mine, structures):
    from matminer.featurizers.structure import DensityFeatures

    frame = pd.DataFrame({"structure": structures})
    density = DensityFeatures(desired_features=["density"])
    for one_by_one in (False, True):
        both = base.MultipleFeaturizer([density, mine], iterate_over_entries=one_by_one)
        both.set_n_jobs(1)
        found = both.fit_featurize_dataframe(frame, "structure", pbar=False)
        assert found.columns.tolist() == ["structure", "density", *mine.feature_labels()]
        np.testing.assert_allclose(
            found[mine.feature_labels()], mine.featurize_many(structures), atol=1e-5
        )
        np.testing.assert_allclose(found["density"], [s.density for s in structures])
    assert set(mine.citations()) <= set(both.citations())


def test_processes_of_matminer(base, mine, structures):
    """By its default matminer forks and pickles; slow, but it must not hang."""
    many = base.MultipleFeaturizer([mine])
    many.set_n_jobs(2)
    found = many.featurize_many(structures[:3], pbar=False)
    np.testing.assert_allclose(found, mine.featurize_many(structures[:3]), atol=1e-5)
