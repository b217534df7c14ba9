"""A stranger's description of a network: refused before there is memory for what it declares."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from conftest import TARGET
from torch import nn

from matxfer.files import FormatError, read_json, write_json
from matxfer.model import load_model
from matxfer.nn.bounds import SizeError, bounded_by
from matxfer.potential.model import load_potential
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin

#: Loads each folder in turn; says what came of it, how long it took and how much memory.
CHILD = """
import json, resource, sys, time
from matxfer.errors import MatxferError
from matxfer.model import load_model
from matxfer.potential.model import load_potential
from matxfer.transfer.plugin import load_plugin

jobs = json.load(sys.stdin)
base = load_model(jobs["base"])
load = {"model": load_model, "potential": load_potential, "plugin": lambda p: load_plugin(p, base)}
for kind, folder in jobs["honest"].items():
    load[kind](folder)
found = {}
for name, (kind, folder) in jobs["hostile"].items():
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        load[kind](folder)
        said = None
    except MatxferError as error:
        said = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    found[name] = [said, time.process_time() - start, grown / 1024]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def plugins(tiny_model, crystal_frame, tmp_path_factory):
    """Return the folders of a plugin of each kind of readout."""
    root = tmp_path_factory.mktemp("bounds")
    options = {"model": tiny_model, "split_column": "split"}
    finetune(crystal_frame, TARGET, root / "network", freeze=3, epochs=1, **options)
    finetune(crystal_frame, TARGET, root / "kernel", features="kernel_ridge", **options)
    return root


def put(data, path, value):
    *keys, last = path
    for key in keys:
        data = data[key]
    assert last in data or isinstance(data, list)
    data[last] = value


#: File, place of the claim, and what it says. Sizes are such that a machine has the memory.
MODELS = {
    "wide nodes": (("architecture", "node_dim"), 20_000),
    "wide edges": (("architecture", "edge_dim"), 20_000),
    "many Gaussians": (("architecture", "basis_size"), 20_000_000),
    "many layers": (("architecture", "n_layers"), 4000),
    "very many layers": (("architecture", "n_layers"), 10**6),
    "angles": (("architecture", "angular_dim"), 4000),
    "wide head": (("heads", 0, "hidden_dim"), 10_000_000),
    "widest head": (("heads", 0, "hidden_dim"), 10**12),
    "beyond 64 bits": (("heads", 0, "hidden_dim"), 10**30),
    "negative": (("architecture", "node_dim"), -(10**9)),
    "infinite": (("architecture", "node_dim"), float("inf")),
    "many heads": (("heads",), 2000),
}
NETWORKS = {
    "wide network": (("head", "readout", "hidden_dim"), 2_000_000),
    "many members": (("head", "readout", "members"), 200_000),
    "wide layers": (("head", "readout", "layer_dim"), 4_000_000),
    "training rows": (("uncertainty", "n_train"), 50_000_000),
    "covariance": (("uncertainty", "hidden_dim"), 6000),
    "components": (("uncertainty", "components"), 2_000_000),
    "frozen beyond": (("frozen_depth",), 10**12),
    "infinitely frozen": (("frozen_depth",), float("inf")),
    "a million layers read": (("head", "layers"), [0] * 10**6),
}
KERNELS = {
    "points": (("head", "readout", "shapes", "points"), [30_000, 10_000]),
    "projection": (("head", "readout", "shapes", "project"), [10**5, 4000]),
    "nine dimensions": (("head", "readout", "shapes", "dual"), [16] * 9),
    "kernel on many layers": (("head", "layers"), [3] * 10**6),
}


def hostile(folder, file, path, value):
    """Change one claim; the checksums stay those of the weights."""
    data = read_json(folder / file)
    if path == ("heads",):
        value = [data["heads"][0] | {"property": data["heads"][0]["property"] | {"name": f"p{k}"}}
                 for k in range(value)]  # fmt: skip
    put(data, path, value)
    write_json(folder / file, data)


def test_claims_are_refused_before_there_is_memory_for_them(
    tiny_model_folder, small_potential_folder, plugins, tmp_path
):
    honest = {"model": tiny_model_folder, "potential": small_potential_folder,
              "plugin": plugins / "network"}  # fmt: skip
    cases = [("model", tiny_model_folder, "card.json", MODELS),
             ("potential", small_potential_folder, "card.json",
              {k: v for k, v in MODELS.items() if k != "many heads"}),
             ("plugin", plugins / "network", "plugin.json", NETWORKS),
             ("plugin", plugins / "kernel", "plugin.json", KERNELS)]  # fmt: skip
    jobs = {}
    for kind, source, file, claims in cases:
        for name, (path, value) in claims.items():
            folder = tmp_path / f"{kind} {name}"
            shutil.copytree(source, folder)
            hostile(folder, file, path, value)
            jobs[folder.name] = kind, str(folder)
    told = {"base": str(tiny_model_folder), "honest": {k: str(v) for k, v in honest.items()}}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(told | {"hostile": jobs}),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == len(jobs) == 36
    for name, (said, seconds, megabytes) in found.items():
        assert said, f"{name} was loaded"
        assert "disagree" in said, name
        assert str(tmp_path / name) in said
        assert seconds < 5, f"{name} took {seconds:.1f} s"
        assert megabytes < 80, f"{name} took {megabytes:.0f} MB"


def test_zeros_make_no_room(tiny_model_folder, tmp_path):
    """A tensor without numbers may be as long as it likes, and allows for nothing."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(tiny_model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"x": torch.zeros(10**12, 0)}, folder / "model.safetensors")
    digest = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    card = read_json(folder / "card.json") | {"sha256": digest}
    card["architecture"]["node_dim"] = 10**9
    write_json(folder / "card.json", card)
    with pytest.raises(FormatError, match="declared, but the weights are"):
        load_model(folder)


def test_the_files_themselves_are_as_they_were(
    tiny_model_folder, small_potential_folder, plugins, crystal_frame, tiny_model
):
    """Honest ones load, and the caller's random numbers are not disturbed."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_model(tiny_model_folder)
    load_model("mp-base")
    load_potential(small_potential_folder)
    for name in ("network", "kernel"):
        found = load_plugin(plugins / name, tiny_model).meta
        assert found["figures"] == read_json(plugins / name / "plugin.json")["figures"]
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_counted():
    weights = {"w": torch.zeros(1000, 1000)}
    with bounded_by(weights, {"width": 1000, "note": ["x", 1.0e30, None]}):
        layer = nn.Linear(1000, 1000)
        grid = torch.linspace(0, 1, 10)
        empty = torch.empty(5, dtype=torch.int32)
    assert layer.weight.std() > 0
    np.testing.assert_allclose(grid.numpy(), np.linspace(0, 1, 10), atol=1e-6)
    assert (empty.dtype, empty.device.type) == (torch.int32, "cpu")
    for make in (
        lambda: torch.zeros(2000, 2000),
        lambda: torch.rand(2000, 2000),
        lambda: torch.full((2000, 2000), 1.0),
        lambda: torch.arange(10**8),
        lambda: torch.linspace(0, 1, 10**8),
        lambda: torch.eye(2000),
        lambda: torch.zeros(1).new_zeros((2000, 2000)),
        lambda: nn.Embedding(10**5, 100),
        lambda: [torch.zeros(1) for _ in range(2000)],
        lambda: [torch.zeros(1000, 1000) for _ in range(4)],  # each of them is small enough
    ):
        with pytest.raises(SizeError), bounded_by(weights):
            make()
    with pytest.raises(SizeError, match=r"1\.000e\+09 is declared"), bounded_by(weights, [10**9]):
        pytest.fail("built")
    torch.zeros(3000, 3000)  # outside nothing is counted
