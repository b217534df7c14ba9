"""Networks of a stranger's description: never much larger than the weights that came with it.

What a JSON file says of widths and layers is only a claim, and a network is built before its
weights are filled in. While one is built, every tensor that is made from nothing is counted before
there is memory for it.
"""

from __future__ import annotations

from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: Numbers and tensors that a network makes beside its weights, such as grids.
_SPARE_NUMBERS, _SPARE_TENSORS = 1 << 20, 1000
#: Weights may be made twice, first with random values.
_TIMES = 2
#: Whole numbers up to this are nobody's harm, whatever they mean.
_HARMLESS = 4096
#: What makes a tensor of a shape that it is told.
_MAKERS = frozenset(
    (
        torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace,
        torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm, torch.zeros,
        Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_zeros,
    )
)  # fmt: skip


#: What building and filling a network raises where a description is not that of its weights.
DISAGREEMENTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
)


class SizeError(ValueError):
    """A description declares more than the weights can fill."""


@contextmanager
def bounded_by(weights: Mapping[str, Tensor], *declared: Any) -> Iterator[None]:
    """Let no more be built than some weights can fill, twice, and a little.

    Parameters
    ----------
    weights
        The tensors that are meant for the network.
    *declared
        What JSON files say of it: a whole number in there that is larger than the number of all
        weights is refused before anything is built.

    Raises
    ------
    SizeError
        Before memory is taken for what is too much.

    Examples
    --------
    >>> import torch
    >>> from matxfer.nn.bounds import bounded_by
    >>> with bounded_by({"weight": torch.zeros(8, 4)}):
    ...     layer = torch.nn.Linear(4, 8)
    ...     layer = torch.nn.Linear(10**6, 10**6)
    Traceback (most recent call last):
    matxfer.nn.bounds.SizeError: a tensor of shape [1000000, 1000000] is declared, but ...
    """
    total = sum(prod(tensor.shape) for tensor in weights.values())
    for number in _whole_numbers(declared):
        if abs(number) > max(total, _HARMLESS):
            raise SizeError(f"{number:.3e} is declared, but the weights are {total:,} numbers")
    with _Counting(total, len(weights)):
        yield


def _whole_numbers(data: Any) -> Iterator[int]:
    """Yield the whole numbers of a JSON tree."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, int):
            yield value


class _Counting(TorchFunctionMode):
    """Counts what is made from nothing, by how large it would be on a device without memory."""

    def __init__(self, total: int, tensors: int) -> None:
        super().__init__()
        self.total, self.tensors = total, tensors
        self.numbers_left = _TIMES * total + _SPARE_NUMBERS
        self.tensors_left = _TIMES * tensors + _SPARE_TENSORS

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Count a tensor before it is made."""
        del types
        kwargs = kwargs or {}
        if func in _MAKERS:
            self._count(func(*args, **{**kwargs, "device": "meta"}))
        return func(*args, **kwargs)

    def _count(self, like: Tensor) -> None:
        shape = list(like.shape)
        self.numbers_left -= prod(shape)
        self.tensors_left -= 1
        if self.numbers_left < 0:
            raise SizeError(
                f"a tensor of shape {shape} is declared, but the weights are {self.total:,} numbers"
            )
        if self.tensors_left < 0:
            raise SizeError(f"more layers are declared than the {self.tensors:,} weights can fill")
