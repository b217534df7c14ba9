"""The model ``sevennet``: SevenNet-0, the weights that the package ``sevenn`` carries.

They are read once, by PyTorch's reader of tensors alone, which runs nothing of what it reads, and
written as safetensors with a card into matxfer's cache folder.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from matxfer.backbones.converted import converted_folder
from matxfer.files import FormatError

if TYPE_CHECKING:
    from torch import Tensor

    from matxfer.backbones.sevennet import SevenNetBackbone
    from matxfer.model import Model

RELEASE = "11Jul2024"
WEIGHTS = f"pretrained_potentials/SevenNet_0__{RELEASE}/checkpoint_sevennet_0.pth"
#: What is known of the model; and the Fisher information, measured by us on Materials Project.
CARD = Path(__file__).with_name("sevennet_card.json")
FISHER = Path(__file__).with_name("sevennet_fisher.safetensors")
POTENTIAL_FISHER = Path(__file__).with_name("sevennet_potential_fisher.safetensors")
#: Arrays of NumPy among the options of the training, which are not looked at.
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")


class _Unread:
    """Stands for what a file holds and nobody reads: nothing of NumPy is called for it."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def folder() -> Path:
    """Return the folder of the model of properties, made on first use.

    Raises
    ------
    ModuleNotFoundError
        If the package ``sevenn`` is not installed.
    FormatError
        If its weights are not those that are known here.
    """
    return _folder("sevennet", FISHER)


def potential_folder() -> Path:
    """Return the folder of the potential, the same network; see :func:`folder`."""
    return _folder("sevennet-potential", POTENTIAL_FISHER)


def _folder(name: str, fisher: Path) -> Path:
    make = partial(model_of, as_potential=name.endswith("potential"))
    return converted_folder("sevenn", name, WEIGHTS, make, CARD, fisher)


def model_of(checkpoint: Path, *, as_potential: bool = False) -> Model:
    """Return SevenNet-0 with its energy per atom as the one property, or as a potential.

    Raises
    ------
    FormatError
        If the weights are of another network.
    """
    import torch

    from matxfer.backbones.sevennet import SevenNetBackbone
    from matxfer.model import Model
    from matxfer.nn.head import PropertyHead
    from matxfer.potential.model import ENERGY, Potential

    card = json.loads(CARD.read_text(encoding="utf-8"))
    try:
        with torch.serialization.safe_globals([(_Unread, name) for name in _ARRAYS]):
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):
            backbone = SevenNetBackbone()
            head = PropertyHead(ENERGY, backbone.node_dim, "linear_atomwise", backbone.node_dim)
        kinds: dict[int, int] = saved["config"]["_type_map"]
        model: Model
        if as_potential:
            known = {k: v for k, v in card["card"].items() if k in ("note", "licence", "citation")}
            model = Potential(backbone, head, None, kinds, known | card["potential"])
        else:
            model = Model(backbone, [head], kinds, card["card"])
        state = _in_present_order(saved, backbone)
        model.load_state_dict(renamed(state, kinds, ENERGY.name, model.state_dict()))
    except Exception as error:  # of a damaged file, whatever the reader stumbles over
        raise FormatError(
            f"{checkpoint}: not the weights of SevenNet-0 {RELEASE} ({error}); install sevenn again"
        ) from error
    return model.eval().requires_grad_(False)


def _in_present_order(saved: dict[str, Any], backbone: SevenNetBackbone) -> dict[str, Tensor]:
    """Return SevenNet's state with the order of paths and the signs that its package has now."""
    from sevenn.scripts.backward_compatibility import patch_state_dict_if_old

    layers: Any = backbone.layers
    modules = {f"{k}_convolution": layer.convolution for k, layer in enumerate(layers)}
    state: dict[str, Tensor] = patch_state_dict_if_old(
        saved["model_state_dict"], saved["config"], SimpleNamespace(_modules=modules)
    )
    return state


def renamed(
    saved: dict[str, Tensor], kinds: dict[int, int], prop: str, own: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Map SevenNet's tensors to ours.

    Its one-hot elements become rows by atomic number, and its two linear maps from scalars to an
    energy, with nothing between them, become one.

    Parameters
    ----------
    saved
        SevenNet's state.
    kinds
        Its number of each element, by atomic number.
    prop
        Name of the property of the one head.
    own
        Our state, for rows of elements that SevenNet does not know.
    """
    import torch

    head = f"heads.{prop}."
    at, rows = torch.tensor(list(kinds)), torch.tensor(list(kinds.values()))
    width = len(saved["reduce_hidden_to_energy.linear.weight"])
    # e3nn divides what a linear map gives by the root of the number of its inputs.
    first = _matrix(saved["reduce_input_to_hidden.linear.weight"], width)
    last = _matrix(saved["reduce_hidden_to_energy.linear.weight"], 1)
    element = _matrix(saved["onehot_to_feature_x.linear.weight"], len(first))  # (elements, scalars)
    table = torch.zeros_like(own["backbone.embedding.element.weight"])
    table[at] = element[rows]
    reference = torch.zeros_like(own[f"{head}scaler.reference"])
    reference[at] = saved["rescale_atomic_energy.shift"][rows]
    (scale,) = saved["rescale_atomic_energy.scale"].unique()
    result: dict[str, Any] = {
        "backbone.embedding.element.weight": table,
        "backbone.embedding.basis.coeffs": saved["edge_embedding.basis_function.coeffs"],
        f"{head}readout.net.0.weight": (first.double() @ last.double()).float().t(),
        f"{head}readout.net.0.bias": torch.zeros(1),
        f"{head}scaler.mean": torch.zeros(()),
        f"{head}scaler.std": scale,
        f"{head}scaler.reference": reference,
    }
    for name, value in saved.items():
        number, _, rest = name.partition("_")
        ours = f"backbone.layers.{number}.{rest}"
        if number.isdigit() and ours in own:  # the others are constants of e3nn
            result[ours] = value
    return result


def _matrix(weight: Tensor, n_out: int) -> Tensor:
    """Return a linear map of scalars, (in, out), from e3nn's flat weights."""
    matrix = weight.reshape(-1, n_out)
    scaled: Tensor = matrix / math.sqrt(len(matrix))
    return scaled
