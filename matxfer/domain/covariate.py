"""Covariate shift: whether the target's structures are others than the source's, and in what."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.domain.kinds import Kind, Unseen, name_kinds
from matxfer.domain.sample import both, distinct
from matxfer.domain.two_sample import squared_distances, two_sample_tests
from matxfer.domain.weights import ImportanceWeights, density_ratio
from matxfer.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.domain.sample import Sample
    from matxfer.domain.two_sample import TestResult

    Floats = NDArray[np.float64]

#: Chance that any test says "shift" where there is none.
LEVEL = 0.01
#: A difference smaller than this area under the curve does not matter, however sure it is: of a
#: source and a target structure the right one is guessed in 55 of 100 cases, not 50.
MATERIAL_AUC = 0.55
#: The same for the discrepancy, as a share of the mean similarity within the tables.
MATERIAL_MMD = 0.02
#: The same for the share of target structures that hold an element unseen in the source.
MATERIAL_UNSEEN = 0.01
#: Principal components of the fingerprints that are compared.
COMPONENTS = 24
#: Fewer structures than this are no basis for a test.
FEWEST = 10
_NEIGHBOURS, _RIM, _FARTHEST = 5, 0.95, 10


@dataclass(frozen=True, slots=True, eq=False)
class CovariateShift:
    """What is known of the difference between two sets of structures.

    Attributes
    ----------
    shift
        Whether there is one that is sure and matters.
    p_value
        Of all tests together; the chance of a false alarm is at most :data:`LEVEL`.
    auc
        Largest area under the curve of the classifiers: how well target structures can be told
        from source structures (0.5: not at all; 1: always).
    tests
        Each test of each layer.
    unseen
        Elements of the target that are nowhere in the source.
    kinds
        In what they differ, in words, the largest first.
    weights
        Importance weights of the source structures that were compared.
    novelty
        Distance of each target structure to the nearest source structures, over the 95th
        percentile of the same distance within the source, (m,): 1 is the rim of the source.
    farthest
        The target structures farthest out.
    n_source, n_target, copies
        Distinct materials compared, and how many structures were copies of others: within the
        source, within the target, and shared by both.
    """

    shift: bool
    p_value: float
    auc: float
    tests: list[TestResult]
    unseen: Unseen
    kinds: list[Kind]
    weights: ImportanceWeights
    novelty: Floats
    farthest: list[dict[str, Any]]
    n_source: int
    n_target: int
    copies: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return all but what has one entry per structure."""
        return {
            "shift": self.shift,
            "p_value": self.p_value,
            "auc": self.auc,
            "tests": [asdict(test) for test in self.tests],
            "unseen_elements": self.unseen.to_json(),
            "kinds": [asdict(kind) for kind in self.kinds],
            "density_ratio": self.weights.to_json(),
            "beyond_the_source": float((self.novelty > 1).mean()),
            "farthest": self.farthest,
            "n_source": self.n_source,
            "n_target": self.n_target,
            "copies": self.copies,
        }


def covariate_shift(
    source: Sample, target: Sample, unseen: Unseen, *, permutations: int = 499, seed: int = 0
) -> CovariateShift:
    """Compare the structures of two samples.

    Parameters
    ----------
    source, target
        The samples.
    unseen
        Elements that the source lacks; known from all its structures, not from a sample.
    permutations, seed
        Of the tests.

    Raises
    ------
    OptionError
        If there are too few structures.
    """
    joint = both(source, target)
    n = len(source)
    kept, pair, copies = _without_copies(joint, n)
    is_target = kept >= n
    for name, count in (("source", int((~is_target).sum())), ("target", int(is_target.sum()))):
        if count < FEWEST:
            raise OptionError(
                f"the {name} has {count} distinct structure(s), copies counted once, but at least "
                f"{FEWEST} are needed to compare"
            )
    views = {f"layer {k}": components(x[kept]) for k, x in joint.layers.items()}
    p_value, tests = two_sample_tests(views, is_target, pair, permutations=permutations, seed=seed)
    auc = max(test.statistic for test in tests if test.method == "classifier")
    last = f"layer {max(joint.layers)}"
    apart = _relative_mmd(views, tests)
    # Fingerprints and elements are two families: each has half of the level.
    sure = p_value <= LEVEL / 2 and (auc >= MATERIAL_AUC or apart >= MATERIAL_MMD)
    foreign = unseen.p_value <= LEVEL / 2 and unseen.share >= MATERIAL_UNSEEN
    novelty = novelty_of(joint.layers[max(joint.layers)], n)
    shift = bool(sure or foreign)
    facts = joint.facts.take(kept)
    return CovariateShift(
        shift,
        min(1.0, 2 * min(p_value, unseen.p_value)),
        auc,
        tests,
        unseen,
        name_kinds(facts.take(np.flatnonzero(~is_target)), facts.take(np.flatnonzero(is_target)))
        if shift
        else [],
        density_ratio(views[last][~is_target], views[last][is_target], seed=seed),
        novelty,
        _farthest(target, novelty, unseen),
        int((~is_target).sum()),
        int(is_target.sum()),
        copies,
    )


def components(x: Floats, n: int = COMPONENTS) -> Floats:
    """Return principal components of features of equal weight, in units of their mean spread."""
    from sklearn.decomposition import PCA

    spread = x.std(axis=0)
    scaled = (x - x.mean(axis=0)) * np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0)
    size = max(min(n, len(x) - 1, x.shape[1]), 1)
    pca = PCA(size, svd_solver="covariance_eigh" if len(x) > x.shape[1] else "full")
    found = pca.fit_transform(scaled)
    return np.asarray(found / np.sqrt(max(float(pca.explained_variance_.mean()), 1e-12)))


def novelty_of(x: Floats, n_source: int) -> Floats:
    """Return how far out the rows after the first ``n_source`` are, (m,); 1: the source's rim."""
    found = components(x)
    own = squared_distances(found[:n_source], found[:n_source])
    np.fill_diagonal(own, np.inf)
    k = min(_NEIGHBOURS, n_source - 1)
    within = np.sqrt(np.partition(own, k - 1, axis=1)[:, :k]).mean(axis=1)
    across = squared_distances(found[n_source:], found[:n_source])
    distance = np.sqrt(np.partition(across, k - 1, axis=1)[:, :k]).mean(axis=1)
    return np.asarray(distance / max(float(np.quantile(within, _RIM)), 1e-12))


def _without_copies(
    joint: Sample, n_source: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[str, int]]:
    """Return the rows kept (one per material and table), their partners, and counts."""
    label = distinct(joint, joint.layers[max(joint.layers)].std(axis=0))
    is_target = np.arange(len(joint)) >= n_source
    _, kept = np.unique(np.stack([is_target, label]), axis=1, return_index=True)
    kept = np.sort(kept)
    position: dict[int, int] = {}
    pair = np.full(len(kept), -1)
    for k, row in enumerate(kept.tolist()):
        other = position.setdefault(int(label[row]), k)
        if other != k:
            pair[k], pair[other] = other, k
    copies = {
        "source": n_source - int((kept < n_source).sum()),
        "target": len(joint) - n_source - int((kept >= n_source).sum()),
        "shared": int((pair >= 0).sum()) // 2,
    }
    return kept, pair, copies


def _relative_mmd(views: dict[str, Floats], tests: list[TestResult]) -> float:
    """Return the largest discrepancy over the mean similarity of any two structures."""
    from matxfer.domain.two_sample import median_distance

    largest = 0.0
    for test in tests:
        if test.method == "mmd":
            x = views[test.view]
            width = median_distance(x, np.random.default_rng(0))
            similarity = np.exp(-0.5 * squared_distances(x, x) / width**2).mean()
            largest = max(largest, test.statistic / float(similarity))
    return largest


def _farthest(target: Sample, novelty: Floats, unseen: Unseen) -> list[dict[str, Any]]:
    """Return the structures farthest out, with what is new in them."""
    rows = np.argsort(-novelty)[:_FARTHEST].tolist()
    return [
        {
            "id": target.crystals[k].id,
            "formula": target.crystals[k].formula,
            "novelty": float(novelty[k]),
            "unseen_elements": unseen.names_in(target.crystals[k]),
        }
        for k in rows
    ]
