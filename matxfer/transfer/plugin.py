"""A plugin: a head and the later layers of one base model, adapted to one property; its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from matxfer.errors import OptionError
from matxfer.files import PLUGIN_FORMAT, POTENTIAL_KIND, FormatError
from matxfer.html import card
from matxfer.model import Model, base_of, check_base, load_model
from matxfer.nn.bounds import DISAGREEMENTS, bounded_by
from matxfer.nn.ensemble import ReadoutEnsemble
from matxfer.nn.plugin_head import PluginHead, source_outputs
from matxfer.plugin_files import read_plugin, write_plugin
from matxfer.transfer.freezing import adaptable_copy, trainable_names
from matxfer.transfer.rounding import kept, restored
from matxfer.transfer.summary import Report, errors_table, overview
from matxfer.transfer.uncertainty import Uncertainty

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphLike
    from matxfer.nn.backbone import Features
    from matxfer.nn.plugin_head import Evaluation


class Plugin:
    """One property on top of a base model.

    Parameters
    ----------
    base
        The model it belongs to.
    depth
        Number of frozen layers, shared with the base.
    head
        Layers it reads, readout and scaler.
    meta
        What ``plugin.json`` says besides: provenance, figures, retention, elements seen.

    Attributes
    ----------
    backbone
        The base's first ``depth`` layers (the same memory) and layers of its own above them.
    delta
        Differences of its layers from the base's as its file holds them, once they are rounded.
    uncertainty
        Spread, intervals and out-of-domain score of its predictions, once they are calibrated.

    Examples
    --------
    >>> import matxfer
    >>> plugin = matxfer.load_plugin("bulk-plugin")
    >>> plugin.target, plugin.depth, plugin.base.name, plugin.meta["data"]["table"]
    ('bulk_modulus_gpa', 3, 'mp-small', 'solids.parquet')
    >>> plugin.save("copies/bulk")
    """

    def __init__(
        self, base: Model, depth: int, head: PluginHead, meta: dict[str, Any] | None = None
    ) -> None:
        self.base = base
        self.depth = depth
        self.head = head
        self.meta = meta or {}
        self.uncertainty: Uncertainty | None = None
        self.backbone = adaptable_copy(base.backbone, depth)
        self.folder: Path | None = None
        self.delta: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        """Name of the plugin's folder, or of its property while it has none."""
        return str(self.meta.get("name", self.head.prop.name))

    @property
    def target(self) -> str:
        """Column name of the property."""
        return self.head.prop.name

    @property
    def runs_no_layer(self) -> bool:
        """Whether its head reads frozen layers alone, so that kept activations say all."""
        return 0 < self.depth >= max(self.head.layers)

    def eval(self) -> Plugin:
        """Switch to prediction."""
        self.backbone.eval().requires_grad_(False)
        self.head.eval().requires_grad_(False)
        return self

    def features(self, graphs: GraphLike, prefix: Features | None) -> Features:
        """Return the last layer's features, from those after ``depth`` layers if given."""
        start = prefix if prefix is not None else self.backbone.embed(graphs)
        first = self.depth if prefix is not None else 0
        return self.backbone.run(graphs, start, first, self.backbone.n_layers)

    def nodes(
        self,
        graphs: GraphLike,
        prefix: Features | None = None,
        below: Mapping[int, Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the node features (N, F) of the layers that the head reads.

        Parameters
        ----------
        prefix
            Features after ``depth`` layers, if they are known.
        below
            With ``prefix``: node features of the frozen layers 0 … depth, by layer.
        """
        found = dict(below or {})
        state, first = prefix, self.depth
        if state is None:
            state, first = self.backbone.embed(graphs), 0
        found[first] = state.node
        last = max(self.head.layers)  # nothing above it is of use
        states = self.backbone.states(graphs, state, first, last)
        found |= {k: state.node for k, state in enumerate(states, first + 1)}
        return [found[k] for k in self.head.layers]

    def values(self, graphs: GraphLike) -> NDArray[np.float64]:
        """Return predictions in the property's unit, shape (B,), from the graphs alone."""
        return predict_all(self.base, [self], graphs)[-1]

    def described(
        self, found: Evaluation, nodes: Sequence[Tensor], graphs: GraphLike
    ) -> list[NDArray[np.float64]]:
        """Return values in the unit and, once calibrated, spread, bounds and score, each (B,)."""
        scaler = self.head.scaler
        columns = [scaler.to_unit(found.fitted)]
        if self.uncertainty is not None:
            columns += self.uncertainty.of(scaler, found, nodes, graphs)
        return columns

    def round(self) -> dict[str, Tensor]:
        """Round the weights to what the files hold, so that a plugin read back is the same.

        Returns
        -------
        dict
            The differences of the changed layers from the base as :mod:`matxfer.transfer.rounding`
            keeps them. Weights that are rounded already stay as they are: a second rounding of
            what differences lead to might give others.
        """
        own, base = self.backbone.state_dict(), self.base.backbone.state_dict()
        if not _is_sum(own, base, restored(self.delta)):
            changed = [name for name, value in own.items() if not torch.equal(value, base[name])]
            delta = kept({name: own[name] - base[name] for name in changed})
            with torch.no_grad():
                for name, change in restored(delta).items():
                    own[name].copy_(base[name] + change)
            self.delta = delta
        if isinstance(self.head.readout, ReadoutEnsemble):
            readout = self.head.readout.state_dict()
            for name, value in restored(kept(readout)).items():
                readout[name].copy_(value)
        return self.delta

    def __repr__(self) -> str:
        return (
            f"Plugin({self.name!r}: {self.target} on {self.base.name!r}, "
            f"{self.depth} of {self.backbone.n_layers} layers frozen)"
        )

    @property
    def report(self) -> Report:
        """Errors, intervals, trials and retention, to be printed or shown."""
        return Report({"name": self.name, **self._facts(), **self.meta})

    def _repr_html_(self) -> str:
        about = overview(self._facts() | self.meta)
        return card(f"Plugin {self.name}", about, errors_table(self.meta))

    def _facts(self) -> dict[str, Any]:
        """Return what a file says of the plugin itself, besides its format and name."""
        prop, scaler = self.head.prop, self.head.scaler
        return {
            "base": {"name": self.base.name, "sha256": self.base.checksum},
            "frozen_depth": self.depth,
            "target": prop.name,
            "unit": prop.unit,
            "transform": prop.transform,
            "scaler": {
                "mean": float(scaler.mean),
                "std": float(scaler.std),
                "element_references": bool(scaler.reference.any()),
            },
            "head": self.head.to_json(),
            "uncertainty": self.uncertainty and self.uncertainty.to_json(),
        }

    # -- files --------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Write ``plugin.safetensors`` (head and changed layers) and ``plugin.json``."""
        folder = Path(folder)
        delta = self.round()
        readout = self.head.readout.state_dict()
        if isinstance(self.head.readout, ReadoutEnsemble):  # a kernel's sums need all their digits
            readout = kept(readout)
        tensors = {f"head.readout.{k}": v for k, v in readout.items()}
        tensors |= {f"head.scaler.{k}": v for k, v in self.head.scaler.state_dict().items()}
        tensors |= {f"delta.{k}": v for k, v in delta.items()}
        if self.uncertainty is not None:
            tensors |= {f"uncertainty.{k}": v for k, v in self.uncertainty.state_dict().items()}
        meta = {
            "format": PLUGIN_FORMAT,
            "name": folder.name,
            **self._facts(),
            **{k: v for k, v in self.meta.items() if k not in _DERIVED},
        }
        self.meta = write_plugin(folder, meta, tensors)
        self.folder = folder


_DERIVED = (
    "format", "name", "base", "frozen_depth", "target", "unit", "transform", "scaler", "head",
    "uncertainty",
)  # fmt: skip


def _is_sum(
    own: Mapping[str, Tensor], base: Mapping[str, Tensor], delta: Mapping[str, Tensor]
) -> bool:
    """Say whether weights are those of the base plus differences, to the last bit."""
    return all(
        torch.equal(value, base[name] + delta[name] if name in delta else base[name])
        for name, value in own.items()
    )


def load_plugin(path: str | Path, model: Model | None = None) -> Plugin:
    """Load a plugin, and the base model that it names unless one is given.

    Parameters
    ----------
    path
        Its folder, its packed file (``NAME.matxfer.zip``) or ``hf://user/name[@revision]``.
    model
        Its base; ``None``: the one that it names, by name, or the consolidated model beside it.

    Raises
    ------
    FormatError
        If files are missing or damaged, or the base is not the one it was trained on.

    Examples
    --------
    >>> import matxfer
    >>> matxfer.load_plugin("bulk-plugin")
    Plugin('bulk-plugin': bulk_modulus_gpa on 'mp-small', 3 of 3 layers frozen)
    """
    files = read_plugin(path)
    folder, meta = files.path, files.meta()
    if meta.get("kind") == POTENTIAL_KIND:
        raise FormatError(
            f"{folder}: is a plugin of a potential, which predicts energies, forces and stresses: "
            "use MatxferCalculator(plugin=…), matxfer relax or matxfer md"
        )
    tensors = files.tensors(meta)
    try:
        base = model or load_model(base_of(folder, meta["base"]))
        check_base(folder, meta["base"], base)
        # Loading must not disturb the caller's seeds.
        described = {key: meta[key] for key in ("head", "uncertainty")}
        with torch.random.fork_rng(devices=[]), bounded_by(tensors, described):
            head = PluginHead.from_json(meta["head"])
            uncertainty = meta["uncertainty"] and Uncertainty.from_json(meta["uncertainty"])
        plugin = Plugin(base, int(meta["frozen_depth"]), head, meta)
        head.load_state_dict(restored(_under("head.", tensors)))
        plugin.delta = _under("delta.", tensors)
        delta = restored(plugin.delta)
        allowed = trainable_names(plugin.backbone, plugin.depth)
        known = ("head.", "delta.", "uncertainty.")
        foreign = {key for key in tensors if not key.startswith(known)}
        if unknown := sorted(set(delta) - allowed | foreign):
            raise ValueError(f"{unknown[0]} does not belong to the head or a trainable layer")
        head.check_width(base.backbone.node_dim)
        if outside := set(head.layers) - set(range(base.backbone.n_layers + 1)):
            raise ValueError(f"the head reads layer {min(outside)}, which is not there")
        own, before = plugin.backbone.state_dict(), base.backbone.state_dict()
        for name, change in delta.items():
            if change.shape != own[name].shape:
                raise ValueError(f"size mismatch for {name}")
            own[name].copy_(before[name] + change)  # a tied weight has two names
        if uncertainty:
            uncertainty.load_state_dict(_under("uncertainty.", tensors))
            plugin.uncertainty = uncertainty
    except DISAGREEMENTS as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"{folder}: plugin.json and its weights disagree ({error}); fetch or train it again"
        ) from error
    plugin.folder = folder
    return plugin.eval()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def column_names(model: Model, plugins: Iterable[Plugin]) -> list[str]:
    """Return the column of each plugin: its property, made unique where others have it too."""
    taken = set(model.heads)
    names = []
    for plugin in plugins:
        name = plugin.target
        if name in taken:
            name = f"{plugin.target}__{plugin.name}"
        if name in taken:
            raise OptionError(f"two plugins are called {plugin.name!r}; rename one's folder")
        taken.add(name)
        names.append(name)
    return names


def predict_all(
    model: Model, plugins: Iterable[Plugin], graphs: GraphLike
) -> list[NDArray[np.float64]]:
    """Predict the source properties and all plugins with one pass of the base network.

    Returns
    -------
    list of (B,) arrays
        First the model's properties in their order, then one array per plugin.
    """
    plugins = list(plugins)
    values, states = _pass(model, plugins, graphs)
    for plugin, (nodes, source) in zip(plugins, states, strict=True):
        values.append(plugin.head.values(nodes, graphs, source))
    return values


def predict_columns(
    model: Model, plugins: Iterable[Plugin], graphs: GraphLike
) -> dict[str, NDArray[np.float64]]:
    """Predict as :func:`predict_all`, with spread, interval and out-of-domain score, by column."""
    plugins = list(plugins)
    values, states = _pass(model, plugins, graphs)
    columns = dict(zip(model.heads, values, strict=True))
    names = prediction_columns(model, plugins)
    for plugin, (nodes, source), own in zip(plugins, states, names, strict=True):
        found = plugin.head.evaluate(nodes, graphs, source)
        columns |= dict(zip(own, plugin.described(found, nodes, graphs), strict=True))
    return columns


def prediction_columns(model: Model, plugins: Iterable[Plugin]) -> list[list[str]]:
    """Return the columns of each plugin: value, spread, bounds of the interval, domain score.

    With a single plugin the score is called ``ood``, with several it bears the property's name.
    """
    plugins = list(plugins)
    columns = []
    for plugin, name in zip(plugins, column_names(model, plugins), strict=True):
        score = "ood" if len(plugins) == 1 else f"{name}_ood"
        calibrated = [f"{name}_std", f"{name}_lo", f"{name}_hi", score]
        columns.append([name, *(calibrated if plugin.uncertainty is not None else [])])
    return columns


def _pass(
    model: Model, plugins: list[Plugin], graphs: GraphLike
) -> tuple[list[NDArray[np.float64]], list[tuple[list[Tensor], Tensor | None]]]:
    """Run the base once; return its values, and each plugin's node features and source value."""
    backbone = model.backbone
    state = backbone.embed(graphs)
    nodes, prefixes = {0: state.node}, {0: state}
    depths = {plugin.depth for plugin in plugins}
    for k, later in enumerate(backbone.states(graphs, state, 0, backbone.n_layers), 1):
        state = later
        nodes[k] = state.node
        if k in depths:
            prefixes[k] = state
    sources = source_outputs(model.heads, state.node, graphs)
    values = [
        head.scaler.to_unit(sources[name].double().cpu().numpy())
        for name, head in model.heads.items()
    ]
    found = []
    for plugin in plugins:
        prefix = prefixes[plugin.depth] if plugin.depth else None  # K = 0: an embedding of its own
        below = {k: nodes[k] for k in range(plugin.depth + 1)} if plugin.depth else None
        found.append((plugin.nodes(graphs, prefix, below), sources.get(plugin.head.source or "")))
    return values, found
