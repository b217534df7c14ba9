"""What the machine can do at best, what a step asks of it, and on what its time goes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable

#: Kinds of operations of a training step, and how the names of their operations begin.
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "mv", "linear", "matmul"),
    "gathers by edge (index_select)": ("index_select", "index", "embedding", "gather"),
    "scatters by edge (index_add)": ("index_add", "scatter", "index_put", "embedding_dense"),
    "activations": ("sigmoid", "silu", "softplus", "exp", "tanh"),
    "products and sums, element by element": (
        *("mul", "add", "sub", "rsub", "div", "neg", "pow", "rsqrt", "square", "addcmul"),
        *("clamp", "where", "abs", "sgn", "sqrt"),
    ),
    "copies, joins, changes of type": ("copy", "cat", "clone", "stack", "slice_backward"),
    "sums over an axis": ("sum", "mean", "linalg_vector_norm", "norm"),
    "layer and batch norms": ("native_layer_norm", "native_batch_norm", "batch_norm"),
    "fresh memory, zeros": ("empty", "zero", "fill", "new_", "resize", "ones"),
    "optimiser": ("_foreach", "_fused", "lerp", "addcdiv", "Optimizer"),
}
_BY_LENGTH = sorted(
    ((p, kind) for kind, all_ in KINDS.items() for p in all_), key=lambda x: -len(x[0])
)


class Machine:
    """FLOP/s of a large matrix product, bytes/s of a large copy: the best of all turns."""

    def __init__(self, size: int = 1536, copy_mb: int = 256) -> None:
        single = torch.randn(size, size)
        half, block, other = single.bfloat16(), *torch.ones(2, copy_mb * 2**18)
        self.work: dict[str, tuple[int, Callable[[], object]]] = {
            "float32": (2 * size**3, lambda: single @ single),
            "bfloat16": (2 * size**3, lambda: half @ half),
            "copy": (2 * block.nbytes, lambda: other.copy_(block)),
        }
        self.best = dict.fromkeys(self.work, 0.0)

    def turn(self) -> None:
        """Measure once more."""
        for what, (amount, work) in self.work.items():
            start = time.perf_counter()
            work()
            self.best[what] = max(self.best[what], amount / (time.perf_counter() - start))

    def __str__(self) -> str:
        parts = ", ".join(f"{what} {rate / 1e9:.0f} G/s" for what, rate in self.best.items())
        return f"{parts} (FLOP of a large matrix product; bytes read and written by a large copy)"


class Traffic(TorchDispatchMode):
    """Adds up the sizes of what every operation reads and writes; views move nothing."""

    bytes = 0
    _WRITES_ONLY = ("new_zeros", "zeros_like", "ones_like", "new_full", "full_like")
    _MOVES_NOTHING = ("empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided")
    _MOVES_NOTHING += ("_unsafe_view", "detach", "alias", "lift_fresh", "_local_scalar_dense")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self._MOVES_NOTHING:
            moved = out if name in self._WRITES_ONLY else (args, kwargs, out)
            tensors = [t for t in tree_leaves(moved) if isinstance(t, torch.Tensor)]
            # An expanded tensor is no larger than what it is made of.
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        return out


def count(work: Callable[[], None]) -> tuple[float, float]:
    """Return the FLOPs (of matrix products) and the bytes of some work, forward and backward."""
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        work()
    return float(flops.get_total_flops()), float(traffic.bytes)


def kind_of(name: str) -> str:
    """Return the kind of an operation of the profiler: that of the longest matching beginning."""
    plain = name.removeprefix("aten::")
    return next((kind for begin, kind in _BY_LENGTH if plain.startswith(begin)), "everything else")


def shares(work: Callable[[], None]) -> dict[str, float]:
    """Return which share of the profiled time each kind of operation has, by its own time."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    spent: dict[str, float] = {}
    for event in profiled.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: time_us / total for kind, time_us in spent.items()}
