"""Ways to keep what the source needs while a plugin's layers are trained.

``ewc``: a penalty on every weight, as stiff as its Fisher information
(:mod:`matxfer.transfer.ewc`). ``l2sp``: the same stiffness for all, the mean of the Fisher
information, so that strengths compare (Li et al., ICML 2018). ``distill``: on the target structures
the source heads shall say what they said before (Li & Hoiem, ECCV 2016). ``replay``: they shall
stay right on source structures, which have to be at hand; without labels, say what they said
before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.errors import OptionError
from matxfer.files import FormatError
from matxfer.fisher import total_fisher
from matxfer.transfer.ewc import EWCPenalty

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from matxfer.data.batch import GraphLike
    from matxfer.data.packed import PackedGraphs
    from matxfer.model import Model
    from matxfer.transfer.activations import Activations
    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.plugin import Plugin

#: Ways that need source structures at hand.
RETENTIONS_WITH_SOURCE = ("replay", "ewc+replay")


@dataclass(frozen=True, slots=True, eq=False)
class SourceData:
    """Source structures at hand.

    Attributes
    ----------
    graphs, activations
        Their graphs and what the base makes of them.
    values
        For each source property its values in its unit, (G,), NaN where unknown; may be empty.
    """

    graphs: PackedGraphs
    activations: Activations
    values: dict[str, NDArray[np.float64]]


class Retention:
    """What is added to the loss of a fine-tuning.

    Parameters
    ----------
    plugin
        Its trainable layers are held.
    config
        Says which way and how strongly.
    n_train
        Number of target rows.
    source
        Source structures, for ``replay``.

    Raises
    ------
    ValueError
        If ``replay`` is asked for without source structures.
    FormatError
        If ``ewc`` is asked for and the base has no Fisher information.
    """

    def __init__(
        self,
        plugin: Plugin,
        config: FinetuneConfig,
        n_train: int,
        source: SourceData | None = None,
    ) -> None:
        base, ways = plugin.base, config.retain.split("+")
        self.plugin, self.strength = plugin, float(config.strength)
        self.penalty: EWCPenalty | None = None
        if {"ewc", "l2sp"} & set(ways):
            fisher = total_fisher(base.fisher())
            if "l2sp" in ways:
                fisher = _evenly(fisher, plugin.backbone)
            ratio = source_size(base) / n_train
            self.penalty = EWCPenalty(plugin.backbone, fisher, self.strength, ratio)
        self.distills = "distill" in ways
        self.replay: _Replay | None = None
        if "replay" in ways:
            if source is None:
                raise OptionError(
                    "replay needs source structures: give a table of them (--source-data), or "
                    "choose ewc, which needs none"
                )
            self.replay = _Replay(base, source, config.batch_size, config.seed)

    def __call__(self, graphs: GraphLike, node: Tensor | None, before: Tensor | None) -> Tensor:
        """Return the term for one step.

        Parameters
        ----------
        graphs, node
            A batch of target structures and its last-layer features under the present weights.
        before
            What the source heads said of it under the base's weights, normalised, (T, B).
        """
        total = torch.zeros(())
        if self.penalty is not None:
            total = total + self.penalty()
        if self.distills:
            assert node is not None, "distillation looks at the last layer"
            assert before is not None, "distillation needs what the base said"
            now = source_head_outputs(self.plugin.base, node, graphs)
            total = total + self.strength * (now - before).abs().mean()
        if self.replay is not None:
            total = total + self.strength * self.replay.loss(self.plugin)
        return total


def source_head_outputs(base: Model, node: Tensor, graphs: GraphLike) -> Tensor:
    """Return the normalised outputs of all source heads, (T, B)."""
    return torch.stack([head(node, graphs) for head in base.heads.values()])


class _Replay:
    """Random batches of source structures: the loss of the source heads on a plugin's layers."""

    def __init__(self, base: Model, source: SourceData, batch_size: int, seed: int) -> None:
        self.base, self.source, self.batch_size = base, source, batch_size
        self.rows = np.flatnonzero(source.graphs.nodes_per_graph > 0)
        self.rng = np.random.default_rng(seed)
        targets = []
        for name, head in base.heads.items():
            if name in source.values:
                targets.append(head.scaler.normalised(source.values[name], source.graphs))
            else:
                fitted = source.activations.source(name)
                targets.append(head.scaler.normalised_fitted(fitted, source.graphs))
        self.targets = torch.from_numpy(np.stack(targets))  # (T, G)

    def loss(self, plugin: Plugin) -> Tensor:
        """Return the mean absolute error of a random batch, in units of the targets' spread."""
        size = min(self.batch_size, len(self.rows))
        index = self.rng.choice(self.rows, size, replace=False)
        graphs = self.source.graphs.batch(index)
        prefix, _ = self.source.activations.start(index, plugin.depth)
        outputs = source_head_outputs(self.base, plugin.features(graphs, prefix).node, graphs)
        wanted = self.targets[:, torch.from_numpy(index)]
        known = torch.isfinite(wanted)
        error = (outputs - torch.where(known, wanted, outputs.detach())).abs()
        return error.sum() / known.sum().clamp(min=1)


def _evenly(fisher: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Spread the Fisher information of the trainable weights evenly over them."""
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    total = sum(float(fisher[name].sum()) for name in trained)
    mean = total / max(sum(fisher[name].numel() for name in trained), 1)
    return {name: torch.full_like(value, mean) for name, value in fisher.items()}


def source_size(base: Model) -> int:
    """Return the number of source samples that a model's Fisher information stands for.

    Raises
    ------
    FormatError
        If its card does not say.
    """
    size = base.card.get("fisher", {}).get("source_size")
    if size is None:
        raise FormatError(
            f"model {base.name!r}: card.json does not say fisher.source_size, the number of source "
            "samples that the strength refers to; write it there"
        )
    return int(size)
