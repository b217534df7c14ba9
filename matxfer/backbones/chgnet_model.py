"""The model ``chgnet``: the weights that the package ``chgnet`` carries, as a model folder of ours.

They are read once, by PyTorch's reader of tensors alone, which runs nothing of what it reads, and
written as safetensors with a card into matxfer's cache folder.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from matxfer.backbones.converted import converted_folder
from matxfer.files import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from matxfer.model import Model

RELEASE = "0.3.0"
WEIGHTS = f"pretrained/{RELEASE}/*.pth.tar"
#: What a scaler has of its own: CHGNet's energy is scaled by nothing.
_AFFINE = ("mean", "std")
#: What is known of the model; and the Fisher information, measured by us on Materials Project.
CARD = Path(__file__).with_name("chgnet_card.json")
FISHER = Path(__file__).with_name("chgnet_fisher.safetensors")
POTENTIAL_FISHER = Path(__file__).with_name("chgnet_potential_fisher.safetensors")


def folder() -> Path:
    """Return the folder of the model of properties, made on first use.

    Raises
    ------
    ModuleNotFoundError
        If the package ``chgnet`` is not installed.
    FormatError
        If its weights are not those that are known here.
    """
    return _folder("chgnet", FISHER)


def potential_folder() -> Path:
    """Return the folder of the potential, the same network; see :func:`folder`."""
    return _folder("chgnet-potential", POTENTIAL_FISHER)


def _folder(name: str, fisher: Path) -> Path:
    make = partial(model_of, as_potential=name.endswith("potential"))
    return converted_folder("chgnet", name, WEIGHTS, make, CARD, fisher)


def model_of(archive: Path, *, as_potential: bool = False) -> Model:
    """Return CHGNet with its energy per atom as the one property, or as a potential.

    Raises
    ------
    FormatError
        If the weights are of another network.
    """
    import torch

    from matxfer.backbones.chgnet import CHGNetBackbone
    from matxfer.model import Model
    from matxfer.nn.head import PropertyHead
    from matxfer.potential.model import ENERGY, Potential

    card = json.loads(CARD.read_text(encoding="utf-8"))
    try:
        saved = torch.load(archive, map_location="cpu", weights_only=True)["model"]["state_dict"]
        with torch.random.fork_rng(devices=[]):
            backbone = CHGNetBackbone()
            head = PropertyHead(ENERGY, backbone.node_dim, "deep_atomwise", backbone.node_dim)
        model: Model
        if as_potential:
            known = {k: v for k, v in card["card"].items() if k in ("note", "licence", "citation")}
            model = Potential(backbone, head, None, card["elements"], known | card["potential"])
        else:
            model = Model(backbone, [head], card["elements"], card["card"])
        model.load_state_dict(renamed(saved, ENERGY.name, model.state_dict()))
    except Exception as error:  # of a damaged archive, whatever the reader stumbles over
        raise FormatError(
            f"{archive}: not the weights of CHGNet {RELEASE} ({error}); install chgnet again"
        ) from error
    return model.eval().requires_grad_(False)


def renamed(saved: dict[str, Tensor], prop: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map CHGNet's tensors to ours; those of magnetic moments and of unread angles are left out.

    Parameters
    ----------
    saved
        CHGNet's state.
    prop
        Name of the property of the one head.
    own
        Our state, for tensors that CHGNet has not.
    """
    head = f"heads.{prop}."
    lists = {"atom_conv_layers": "atom", "bond_conv_layers": "bond", "angle_layers": "angle"}
    result: dict[str, Tensor] = {f"{head}scaler.{k}": own[f"{head}scaler.{k}"] for k in _AFFINE}
    for name, value in saved.items():
        first, _, rest = name.partition(".")
        if first in lists:
            k, _, rest = rest.partition(".")
            result[f"backbone.layers.{k}.{lists[first]}.{rest}"] = value
        elif first == "readout_norm":
            result[f"{head}readout.net.0.{rest}"] = value
        elif first == "mlp":  # its dropout, which does nothing, has a number as well
            _, number, leaf = rest.split(".")
            place = {"0": 1, "2": 3, "4": 5, "7": 7}[number]
            result[f"{head}readout.net.{place}.{leaf}"] = value
        elif first == "composition_model":
            reference = own[f"{head}scaler.reference"].clone()
            reference[1 : 1 + value.shape[1]] = value[0]
            result[f"{head}scaler.reference"] = reference
        elif first != "site_wise":
            result[f"backbone.embedding.{name}"] = value
    last = max(int(name.split(".")[1]) for name in saved if name.startswith("angle_layers."))
    unread = f"backbone.layers.{last}.angle."
    return {name: value for name, value in result.items() if not name.startswith(unread)}
