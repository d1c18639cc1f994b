"""Executors that are not taken over: NeMo-Run's Experiment starts the run's script, and knows the job's state."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.launch.executor import Executor, gpus_here, on_host
from fiddlehead.launch.nemo import experiment_of, hand_over
from fiddlehead.launch.reconcile import Answer, Phase
from fiddlehead.recipe import trust
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status

_PHASES = {
    **dict.fromkeys(("UNSUBMITTED", "SUBMITTED", "PENDING"), Phase.WAITING),
    "RUNNING": Phase.RUNNING,
    **dict.fromkeys(("SUCCEEDED", "FAILED", "CANCELLED"), Phase.ENDED),
}
"""NeMo-Run's words for the states of a job; of another one, such as UNKNOWN, the run's own word counts."""

_RANK = """\
unset "${!SLURM_@}"
SLURM_PROCID=$RANK SLURM_STEP_NUM_TASKS=$WORLD_SIZE  # for this script only, and not exported
"""


@dataclass(frozen=True, kw_only=True)
class HandedExecutor(Executor):
    """An executor of NeMo-Run's, used as it is. The job's id is the experiment's."""

    name: str
    """The executor's class."""
    theirs: Any = None
    """The executor itself. It may hold secrets, so it is not saved with the run; NeMo-Run keeps it."""

    kind: ClassVar[str] = "nemo_run"

    @classmethod
    def of_nemo_run(cls, executor: Any) -> Self:
        """Hands an executor over. On one node, the job itself starts a process for each device."""
        nodes, processes = (_count(executor, name) for name in ("nnodes", "nproc_per_node"))
        theirs = executor.clone()
        # Only NeMo-Run knows how the nodes find each other there: its torchrun starts all processes.
        theirs.launcher = "torchrun" if nodes > 1 else None
        name = f"{type(executor).__module__}.{type(executor).__qualname__}"
        return cls(name=name, theirs=theirs, nodes=nodes, ntasks_per_node=processes if nodes * processes > 1 else 0)

    @property
    def started_by_torchrun(self) -> bool:
        """As `Executor.started_by_torchrun`."""
        return (self.nodes or 1) > 1

    def start_lines(self) -> str:
        """As `Executor.start_lines`. Of torchrun's processes, the script is told the rank as Slurm would tell it."""
        return _RANK if self.started_by_torchrun else super().start_lines()

    def gpus_of_a_node(self, nodes: int = 1) -> int:
        """The number of GPUs in the executor's own settings, or else of this machine."""
        named = getattr(self.theirs, "gpus_per_node", None)
        return named if isinstance(named, int) and named else gpus_here()

    def to_dict(self) -> dict[str, Any]:
        """As `Executor.to_dict`, without the executor itself."""
        settings = super(HandedExecutor, replace(self, theirs=None)).to_dict()
        return {name: value for name, value in settings.items() if name != "theirs"}

    @classmethod
    def where(cls, run: RunDirectory, status: Status) -> str:
        """NeMo-Run's experiment, and the machine."""
        return f"nemo_run {run.job_id}{on_host(status)}".replace("  ", " ")

    def check(self, run: RunDirectory) -> None:
        """Nothing is asked: only NeMo-Run knows where the job goes."""
        if self.theirs is None:
            message = f"{self.name} is not saved with the run; start it again with its log.name and that executor"
            raise ConfigError(Problem("executor", self.kind, message))

    def submit(self, run: RunDirectory, *, after: Sequence[str] = (), after_any: Sequence[str] = ()) -> str:
        """Starts the run's script in an experiment, and returns its id.

        Raises:
            ConfigError: NeMo-Run refuses it, or it should wait for another job.
        """
        if after or after_any:
            message = "does not wait for other runs here; use the dependencies of a run.Experiment"
            raise ConfigError(Problem("executor", self.name, message))
        script, place = shlex.quote(str(run.script)), shlex.quote(str(run.path))
        missing = f"echo error: {place} is not to be seen on $HOSTNAME: mount the folder of runs at this path"
        lines = f"if [ ! -r {script} ]; then {missing}; exit 2; fi\nexec bash {script}"
        title = re.sub(r"[^A-Za-z0-9]+", "-", run.name).strip("-") or "run"
        return hand_over(title, self.theirs, lines)

    def ask(self, going: Mapping[RunDirectory, Status]) -> Mapping[RunDirectory, Answer]:
        """What NeMo-Run says of each run's job; the run's own word counts until it is submitted."""
        return {run: _answer(run, status) for run, status in going.items()}

    def kill(self, run: RunDirectory) -> None:
        """Cancels the experiment's job."""
        if (experiment := _experiment(run)) is not None:
            experiment.cancel("job")


def _answer(run: RunDirectory, status: Status) -> Answer:
    if not run.submitted:
        return Answer(Phase.LAUNCHING)
    experiment = _experiment(run)
    if experiment is None:
        return Answer(Phase.PROCESS)
    said = str(experiment.status(return_dict=True)["job"]["status"])
    phase = _PHASES.get(said, Phase.PROCESS)
    if phase is Phase.RUNNING and status.state is not State.PENDING:
        return Answer(Phase.PROCESS)  # the run's lock is newer than what NeMo-Run has written down
    state = {"SUCCEEDED": State.SUCCEEDED, "CANCELLED": State.CANCELLED}.get(said, State.DIED)
    return Answer(phase, f"NeMo-Run says {said}", state=state)


def _experiment(run: RunDirectory) -> Any:
    """The experiment of a run that this user has launched; None for others, whose files may come from anybody."""
    return experiment_of(run.job_id) if run.job_id and trust.knows_executor(run) else None


def _count(executor: Any, name: str) -> int:
    """What an executor says of its nodes or processes; 1 if it does not say."""
    try:
        return int(getattr(executor, name)())
    except NotImplementedError:
        return 1
