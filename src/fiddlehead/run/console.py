"""Prints the messages of a run, in its log and in the terminal."""

from __future__ import annotations

import logging
import warnings

from lightning.pytorch.utilities import rank_zero_only

# Lightning's remarks at start-up (devices it could use, tips) would drown what a run has to say; warnings stay.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# It warns that a new experiment is new.
logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)

# Of Lightning's own use of torch; nothing that a user could mend.
warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging interval")
warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.* is deprecated", module="lightning")
# On a login node, where Slurm's programs are; the launcher knows about them.
warnings.filterwarnings("ignore", message=r".*The `srun` command is available on your system but is not used")


def is_rank_zero() -> bool:
    """Whether this process is the first of its run."""
    return getattr(rank_zero_only, "rank", 0) == 0


def become_rank_zero() -> None:
    """Makes this process the first of a run of its own, whatever job it was in when Lightning was imported."""
    rank_zero_only.rank = 0  # type: ignore[attr-defined]


@rank_zero_only
def say(message: str) -> None:
    """Prints a line, on the first rank only, at once."""
    print(message, flush=True)  # noqa: T201
