"""Plans a recipe that is added to an experiment of NeMo-Run's, before NeMo-Run starts anything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.launch.executor import Executor, gpus_here
from fiddlehead.launch.local import LocalExecutor
from fiddlehead.launch.nemo.accept import accepted
from fiddlehead.launch.planning import Plan, plan
from fiddlehead.recipe import Recipe

_FILES = ("data.paths", "data.val_paths", "data.tokenizer", "model.init_from")
"""The fields that name files, which another machine, or an earlier task, may have."""


@dataclass(frozen=True, kw_only=True)
class Started(LocalExecutor):
    """The processes that NeMo-Run starts; 0 follows the recipe, whose other processes the job then starts."""

    nodes: int = 0

    def problems(self) -> list[Problem]:
        """None: there is nothing that a user has set."""
        return []


@dataclass(frozen=True, kw_only=True)
class StartedElsewhere(Started):
    """Processes that NeMo-Run starts on another machine, or in a container."""

    gpus: int = 0
    """The GPUs of a node; 0 if that is not known."""
    known: Executor | None = None
    """Our executor for the same job, which knows the kind of its GPUs and its time; None if there is none."""

    ships_code: ClassVar[bool] = True

    @property
    def time_limit(self) -> int | None:
        """As `Executor.time_limit`."""
        return None if self.known is None else self.known.time_limit

    def gpus_of_a_node(self, nodes: int = 1) -> int:
        """The executor's own number, or else that of this machine."""
        return self.gpus or gpus_here()

    def gpu_types(self) -> Collection[str]:
        """As `Executor.gpu_types`."""
        return () if self.known is None else self.known.gpu_types()


def refuse_unfit(recipe: Recipe, executor: Any, *, first: bool, despite: Sequence[str] = ()) -> None:
    """Raises ConfigError if a task of an experiment would fail, as far as that is known before it starts.

    Args:
        executor: NeMo-Run's, as the plugins of the task have changed it.
        first: no other task of the experiment can make files for it.
        despite: as of `Plan.submit`.
    """
    nodes = recipe.trainer.num_nodes
    if not started_by(executor).nodes and nodes != 1:
        message = f"{type(executor).__name__} starts one process; several nodes need its launcher='torchrun', or Slurm"
        raise ConfigError(Problem("trainer.num_nodes", nodes, message))
    shared = _shares_files(executor)
    made = _plan(recipe, executor, waits=not (first and shared), shared=shared)
    if first and shared:
        refuse([*made.problems, *made.missing])
    refuse(each for each in made.problems if each.path not in _FILES)
    if made.problems:
        made = _plan(_without(recipe, made.problems), executor, waits=True, shared=shared)
        refuse(each for each in made.problems if not each.path.startswith("data."))  # of data that is not here
    if not made.problems:
        _refuse_unfit(made, despite)


def _without(recipe: Recipe, problems: Sequence[Problem]) -> Recipe:
    """The recipe without the files that have problems here: the rest can still be planned."""
    recipe = recipe.clone()
    for each in problems:
        section, _, name = each.path.rpartition(".")
        if section in ("data", "model"):
            setattr(getattr(recipe, section), name, None)
    return recipe


def _refuse_unfit(made: Plan, despite: Sequence[str]) -> None:
    """As `Plan.refuse_unfit`, which says how to start it all the same, in an experiment."""
    try:
        made.refuse_unfit(despite)
    except ConfigError as error:
        names = [*despite, *(name for name in made.refusals if name not in despite)]
        message = f"DespitePlugin(despite={names!r}) of fiddlehead.launch.nemo.plugins adds it all the same"
        raise ConfigError(*error.problems, Problem("plugins", message=message)) from None


def _plan(recipe: Recipe, executor: Any, *, waits: bool, shared: bool) -> Plan:
    if not shared:
        recipe = recipe.clone()
        recipe.log.dir = "."
    return plan(recipe, started_by(executor), waits=waits)


def _shares_files(executor: Any) -> bool:
    """Whether a job sees this machine's files at their own paths."""
    import nemo_run

    if isinstance(executor, nemo_run.SlurmExecutor):
        return not executor.container_image and not isinstance(executor.tunnel, nemo_run.SSHTunnel)
    return isinstance(executor, nemo_run.LocalExecutor)


def started_by(executor: Any) -> Started:
    """The nodes and the processes on each that NeMo-Run's executor will start: by torchrun, or as tasks of Slurm."""
    import nemo_run

    torchrun = isinstance(executor.get_launcher(), nemo_run.Torchrun)
    if isinstance(executor, nemo_run.SlurmExecutor):
        tasks = executor.nproc_per_node() if torchrun else executor.ntasks_per_node
        nodes, processes = executor.nodes, tasks if torchrun or tasks > 1 else 0
    else:
        nodes, processes = (executor.nnodes(), executor.nproc_per_node()) if torchrun else (0, 0)
    if isinstance(executor, nemo_run.LocalExecutor):
        return Started(nodes=nodes, ntasks_per_node=processes)
    gpus = next((value for name in ("gpus_per_node", "num_gpus") if (value := getattr(executor, name, None))), 0)
    try:
        known = accepted(executor)
    except ConfigError:  # a field that only NeMo-Run knows; the job is its own
        known = None
    return StartedElsewhere(nodes=nodes, ntasks_per_node=processes, gpus=max(0, gpus), known=known)
