"""Which process of several this is, as torchrun and srun say it, or as the user does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Rank and number of processes, as launchers put them into the environment: torchrun (and
#: Lightning, which starts its processes so) and srun. What Slurm says of a whole job is not
#: looked at: a batch script without srun is one process, however many tasks the job may start.
_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


@dataclass(frozen=True, slots=True)
class Share:
    """The share of one process: every n-th part.

    Parameters
    ----------
    rank, size
        Number of this process, from 0, and how many there are.

    Raises
    ------
    OptionError
        If there is no such process.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise OptionError(
                f"rank {self.rank} of {self.size} processes: ranks are 0 … {self.size - 1}"
            )

    def owns(self, part: int) -> bool:
        """Say whether a part is this process' to do."""
        return part % self.size == self.rank


def share_of(
    rank: int | None = None,
    size: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Share:
    """Return the share that was asked for, else the one that a launcher gave.

    Parameters
    ----------
    rank, size
        What the user said (``--rank``, ``--world-size``), both or neither.
    environment
        Variables of the environment, by default those of this process.

    Raises
    ------
    OptionError
        If one of the two is missing, or they do not go together.
    """
    if (rank is None) != (size is None):
        raise OptionError("--rank and --world-size go together; give both")
    if rank is not None and size is not None:
        return Share(rank, size)
    environment = os.environ if environment is None else environment
    for rank_name, size_name in _LAUNCHERS:
        if rank_name in environment and size_name in environment:
            try:
                return Share(int(environment[rank_name]), int(environment[size_name]))
            except ValueError as error:
                raise OptionError(
                    f"{rank_name} and {size_name} in the environment are no share ({error})"
                ) from error
    return Share()
