"""Packs of graphs and the store on disk: the same arrays however they were made and kept."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import matxfer.data.store as store_module
from matxfer.crystal import Crystal, CrystalError
from matxfer.data.packed import PackedGraphs, flat_ranges
from matxfer.data.store import cache_folder, graph_store, store_key
from matxfer.graph import GRAPH_VERSION, GraphOptions, build_graph

OPTIONS = GraphOptions(cutoff_angstrom=3.5)
FIELDS = [field.name for field in dataclasses.fields(PackedGraphs)]


def tiny_crystals(n, seed=0):
    """Return n different crystals of one to three atoms; every 7th is without neighbours."""
    rng = np.random.default_rng(seed)
    sites = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]])
    return [
        Crystal(
            (20.0 if k % 7 == 3 else rng.uniform(2.8, 3.6)) * np.eye(3),
            rng.integers(1, 90, k % 3 + 1),
            sites[: k % 3 + 1],
            id=str(k),
        )
        for k in range(n)
    ]


def assert_same_pack(first, second):
    for name in FIELDS:
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype, name
        assert np.array_equal(one, other), name


@pytest.fixture(scope="module")
def graphs():
    return [build_graph(crystal, OPTIONS) for crystal in tiny_crystals(12)]


@pytest.fixture(scope="module")
def pack(graphs):
    """Return graphs 0 … 11 with a failed row between 5 and 6."""
    return PackedGraphs.pack([*graphs[:6], None, *graphs[6:]])


# -- packs ------------------------------------------------------------------------------------
def test_flat_ranges():
    offset = np.array([0, 2, 2, 5, 9])
    assert flat_ranges(offset, np.array([3, 1, 0])).tolist() == [5, 6, 7, 8, 0, 1]
    assert flat_ranges(offset, np.array([2, 2])).tolist() == [2, 3, 4, 2, 3, 4]
    assert flat_ranges(offset, np.zeros(0, np.int64)).tolist() == []
    assert flat_ranges(offset, np.array([1])).tolist() == []


def test_pack_holds_each_graph(graphs, pack):
    assert len(pack) == 13
    assert pack.nodes_per_graph[6] == pack.edges_per_graph[6] == 0
    for k, graph in enumerate(graphs):
        row = k + (k > 5)
        nodes = slice(pack.node_offset[row], pack.node_offset[row + 1])
        edges = slice(pack.edge_offset[row], pack.edge_offset[row + 1])
        assert np.array_equal(pack.numbers[nodes], graph.numbers)
        assert np.array_equal(pack.multiplicity[nodes], graph.multiplicity)
        assert np.array_equal(pack.position_angstrom[nodes], graph.position_angstrom)
        assert np.array_equal(pack.cell_angstrom[row], graph.cell_angstrom)
        assert np.array_equal(pack.sender[edges], graph.edge_index[0])
        assert np.array_equal(pack.receiver[edges], graph.edge_index[1])
        assert np.array_equal(pack.edge_vector_angstrom[edges], graph.edge_vector_angstrom)


@pytest.mark.parametrize(
    "rows", [[0], [3], [11, 0, 5], [4, 4], list(range(13)), [6, 1], [], [6]], ids=str
)
def test_batch_is_its_graphs_side_by_side(graphs, pack, rows):
    batch = pack.batch(np.array(rows, dtype=np.int64))
    expected = [([*graphs[:6], None, *graphs[6:]])[row] for row in rows]
    z, weight, index, vector, owner, shift = [], [], [], [], [], 0
    for k, graph in enumerate(expected):
        if graph is None:
            continue
        z += graph.numbers.tolist()
        weight += graph.multiplicity.tolist()
        index += (graph.edge_index.T + shift).tolist()
        vector += graph.edge_vector_angstrom.tolist()
        owner += [k] * graph.n_nodes
        shift += graph.n_nodes
    assert batch.num_graphs == len(rows)
    assert batch.z.tolist() == z
    assert batch.multiplicity.tolist() == weight
    assert batch.batch.tolist() == owner
    assert batch.edge_index.T.tolist() == index
    assert batch.edge_vector.tolist() == vector
    assert batch.edge_vector.shape == (len(index), 3)
    types = (batch.z, batch.multiplicity, batch.edge_index, batch.edge_vector, batch.batch)
    expected_types = (torch.int64, torch.float32, torch.int64, torch.float32, torch.int64)
    assert tuple(t.dtype for t in types) == expected_types
    again = batch.to("cpu")
    assert again.num_graphs == batch.num_graphs
    assert torch.equal(again.edge_index, batch.edge_index)


def test_select(graphs, pack):
    rows = np.array([8, 6, 2, 2])
    expected = PackedGraphs.pack([graphs[7], None, graphs[2], graphs[2]])
    assert_same_pack(pack.select(rows), expected)
    assert len(pack.select(np.zeros(0, np.int64))) == 0


def test_concatenate(graphs, pack):
    parts = [[*graphs[:4]], [], [*graphs[4:6], None], [*graphs[6:]]]
    assert_same_pack(PackedGraphs.concatenate([PackedGraphs.pack(p) for p in parts]), pack)
    assert PackedGraphs.concatenate([pack]) is pack
    empty = PackedGraphs.pack([])
    assert len(empty) == 0
    assert len(PackedGraphs.concatenate([empty, empty])) == 0


def test_save_and_load_memory_mapped(pack, tmp_path):
    pack.save(tmp_path / "p", {"note": "Å"})
    loaded, meta = PackedGraphs.load(tmp_path / "p")
    assert_same_pack(loaded, pack)
    assert meta["note"] == "Å"
    assert isinstance(loaded.edge_vector_angstrom, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        loaded.numbers[0] = 1
    batch = loaded.batch(np.array([0, 5]))
    batch.edge_vector.zero_()  # tensors of a batch belong to the batch
    assert_same_pack(loaded, pack)


def test_save_and_load_without_graphs(tmp_path):
    PackedGraphs.pack([None, None]).save(tmp_path)
    loaded, _ = PackedGraphs.load(tmp_path)
    assert loaded.nodes_per_graph.tolist() == [0, 0]


# -- damage -----------------------------------------------------------------------------------
def _truncate(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-7])


def _rewrite_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


DAMAGE = {
    "truncated edges": lambda f: _truncate(f, "edge_vector_angstrom.npy"),
    "truncated offsets": lambda f: _truncate(f, "node_offset.npy"),
    "empty file": lambda f: (f / "sender.npy").write_bytes(b""),
    "missing file": lambda f: (f / "numbers.npy").unlink(),
    "missing meta": lambda f: (f / "meta.json").unlink(),
    "truncated meta": lambda f: _truncate(f, "meta.json"),
    "other shape": lambda f: np.save(f / "numbers.npy", np.zeros(3, np.int16)),
    "other version": lambda f: _rewrite_meta(f, graph_version=GRAPH_VERSION + 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_rebuilt(damage, tmp_path):
    crystals = tiny_crystals(5)
    whole = graph_store(crystals, OPTIONS, cache=tmp_path)
    expected = whole.graphs.select(np.arange(5))  # in memory
    (folder,) = (tmp_path / "graphs").iterdir()
    del whole
    DAMAGE[damage](folder)
    with pytest.raises(ValueError, match="graph store"):
        PackedGraphs.load(folder)
    again = graph_store(crystals, OPTIONS, cache=tmp_path)
    assert_same_pack(again.graphs, expected)
    loaded, _ = PackedGraphs.load(folder)  # what lies on disk is whole again
    assert_same_pack(loaded, expected)
    assert [p.name for p in (tmp_path / "graphs").iterdir()] == [folder.name]


# -- the store --------------------------------------------------------------------------------
def test_built_once_then_opened(tmp_path, monkeypatch):
    crystals, progress = tiny_crystals(9), []
    first = graph_store(crystals, OPTIONS, cache=tmp_path, on_progress=progress.append)
    assert sum(progress) == 9

    def fail(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(store_module, "build_graph", fail)
    second = graph_store(crystals, OPTIONS, cache=tmp_path, on_progress=progress.append)
    assert_same_pack(first.graphs, second.graphs)
    assert isinstance(second.graphs.sender, np.memmap)
    assert sum(progress) == 9
    renamed = [crystal.with_id(f"other {k}") for k, crystal in enumerate(crystals)]
    graph_store(renamed, OPTIONS, cache=tmp_path)  # ids are no part of a graph
    with pytest.raises(AssertionError, match="built again"):
        graph_store(crystals[::-1], OPTIONS, cache=tmp_path)


def test_a_half_written_folder_is_never_used(tmp_path, monkeypatch):
    crystals = tiny_crystals(4)
    real, written = np.save, []

    def dies(file, array, **options):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(file)
        real(file, array, **options)

    monkeypatch.setattr(np, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        graph_store(crystals, OPTIONS, cache=tmp_path)
    assert len(written) == 5
    assert not list((tmp_path / "graphs").iterdir())  # the half is swept away
    monkeypatch.undo()
    # A process that was killed outright leaves its folder, under a name that nobody opens.
    name = store_key(crystals, OPTIONS)
    left = tmp_path / "graphs" / f".{name}-killed"
    left.mkdir(parents=True)
    (left / "meta.json").write_text("{}")
    store = graph_store(crystals, OPTIONS, cache=tmp_path)
    assert len(store.graphs) == 4
    assert (tmp_path / "graphs" / name / "meta.json").is_file()


def test_without_a_writable_cache_graphs_stay_in_memory(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    store = graph_store(tiny_crystals(3), OPTIONS, cache=blocked)
    assert len(store.graphs) == 3


def test_key_changes_with_every_option_and_coordinate():
    crystals = tiny_crystals(4)
    keys = {store_key(crystals, OPTIONS)}
    variants = [
        dataclasses.replace(OPTIONS, cutoff_angstrom=3.6),
        dataclasses.replace(OPTIONS, symmetry=False),
        dataclasses.replace(OPTIONS, symprec_angstrom=2e-4),
    ]
    assert len(variants) == len(dataclasses.fields(GraphOptions))
    keys |= {store_key(crystals, options) for options in variants}
    crystal, n_changes = crystals[2], 0
    names = ("lattice", "numbers", "frac_coords")
    for name in names:
        for k in range(getattr(crystal, name).size):
            arrays = {
                n: np.array(getattr(crystal, n)) for n in ("lattice", "numbers", "frac_coords")
            }
            flat = arrays[name].reshape(-1)
            flat[k] = flat[k] % 90 + 1 if name == "numbers" else np.nextafter(flat[k], 9)
            keys.add(store_key([*crystals[:2], Crystal(**arrays), crystals[3]], OPTIONS))
            n_changes += 1
    keys.add(store_key(crystals[:3], OPTIONS))
    keys.add(store_key(crystals[::-1], OPTIONS))
    keys.add(store_key([*crystals[:3], CrystalError("no cell")], OPTIONS))
    assert n_changes == 9 + 9 + 3
    assert len(keys) == 1 + len(variants) + n_changes + 3
    assert store_key(tiny_crystals(4), OPTIONS) == store_key(crystals, OPTIONS)


def test_key_changes_with_the_graph_version(monkeypatch):
    before = store_key(tiny_crystals(1), OPTIONS)
    monkeypatch.setattr(store_module, "GRAPH_VERSION", GRAPH_VERSION + 1)
    assert store_key(tiny_crystals(1), OPTIONS) != before


def test_errors_are_kept_per_row(tmp_path):
    good = tiny_crystals(3)
    overlapping = Crystal(4 * np.eye(3), [1, 1], [[0, 0, 0], [0.01, 0, 0]])
    rows = [good[0], CrystalError("no cell", "add one", "t.csv", 1), good[1], overlapping, good[2]]
    for _ in range(2):  # built, then opened
        store = graph_store(rows, OPTIONS, cache=tmp_path)
        assert sorted(store.errors) == [1, 3]
        assert store.errors[1] == "t.csv (frame 1): no cell; add one"
        assert "overlap" in store.errors[3]
        assert store.graphs.nodes_per_graph[[1, 3]].tolist() == [0, 0]
        assert_same_pack(
            store.graphs.select(np.array([0, 2, 4])),
            PackedGraphs.pack([build_graph(c, OPTIONS) for c in good]),
        )


def test_workers_give_the_same_arrays(tmp_path):
    """More structures than one chunk, and errors in the second one."""
    crystals = tiny_crystals(620)
    crystals[611] = CrystalError("lost", "find it")
    none = graph_store(crystals, OPTIONS, workers=0, cache=tmp_path / "a")
    two = graph_store(crystals, OPTIONS, workers=2, cache=tmp_path / "b")
    assert len(none.graphs) == 620
    assert_same_pack(none.graphs, two.graphs)
    assert none.errors == two.errors == {611: "lost; find it"}
    one = PackedGraphs.pack([build_graph(crystals[k], OPTIONS) for k in (7, 505, 619)])
    assert_same_pack(two.graphs.select(np.array([7, 505, 619])), one)


def test_no_structures_at_all(tmp_path):
    store = graph_store([], OPTIONS, cache=tmp_path)
    assert len(store.graphs) == 0
    assert store.errors == {}


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MATXFER_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("MATXFER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "matxfer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "matxfer")


def test_training_needs_no_structure_library(pack, tmp_path, repository):
    """With graphs at hand, a training node can do without pymatgen, ASE, vesin and moyo."""
    pack.save(tmp_path / "pack")
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path

        for name in ("pymatgen", "ase", "vesin", "moyopy", "gemmi", "torch_geometric"):
            sys.modules[name] = None  # importing it raises ImportError

        import numpy as np
        import torch

        import matxfer.pretraining.run
        from matxfer.data.packed import PackedGraphs
        from matxfer.nn.network import EdgeGatedNetwork
        from matxfer.nn.readout import PooledReadout

        graphs, _ = PackedGraphs.load(Path(sys.argv[1]))
        batch = graphs.batch(np.flatnonzero(graphs.nodes_per_graph))
        network, readout = EdgeGatedNetwork(2, 16, 8, 10), PooledReadout(16, 8)
        readout(network(batch).node, batch).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
        assert network.layers[0].edge.weight.grad.abs().sum() > 0
        try:
            import ase
        except ImportError:
            print("done without")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "pack")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done without"
