"""`plan` and `Plan`: everything that is known about a run before it starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fiddlehead import notebook
from fiddlehead.errors import UNSET, ConfigError, Problem, refuse
from fiddlehead.files.paths import user_path
from fiddlehead.launch import preview, submit
from fiddlehead.launch.built import built
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.fitting import (
    fit_to_executor,
    missing_here,
    missing_nsys,
    missing_trackers,
    nsys_problems,
    setting_problems,
    yielded,
)
from fiddlehead.launch.nemo.accept import accepted, uncalled
from fiddlehead.launch.taken import refuse_taken
from fiddlehead.launch.target import card_of, target_of
from fiddlehead.recipe import Recipe
from fiddlehead.run import RunDirectory

if TYPE_CHECKING:
    from pathlib import Path

    from fiddlehead.attention import Target
    from fiddlehead.plan.cards import Card
    from fiddlehead.plan.resume import Start
    from fiddlehead.plan.training import TrainingPlan
    from fiddlehead.run.prediction import Prediction

UNKNOWN = "not known here, so nobody has checked whether it fits; --gpu NAME plans for one"
_NAMELESS = ".nameless"
"""A placeholder for the name of a run that has none yet; no run can have this name."""


@dataclass(frozen=True)
class Plan:
    """Everything that is known about a run before it starts; `plan` makes it."""

    recipe: Recipe
    """The recipe as it will run: its trainer uses the machines and devices of the executor."""
    executor: Executor | None
    """Where it runs, completed for the recipe; None means this process."""
    problems: tuple[Problem, ...] = ()
    """The problems of the recipe and its executor."""
    missing: tuple[str, ...] = ()
    """What is missing for a start: weights to begin with, training data, or GPUs on this machine."""
    changed: tuple[str, ...] = ()
    """The values of the recipe that the executor has overridden, a sentence for each."""
    known: TrainingPlan | None = None
    """The value of `training`; None if there are problems."""
    start: Path | None = None
    """The checkpoint from which it starts, if that is known; None for a fresh start."""
    step: int = 0
    """How many steps that checkpoint has finished."""
    awaits_start: bool = False
    """Whether the checkpoint from which it starts is not known here: it is on another machine, or not made yet."""

    def refuse_problems(self) -> None:
        """Raises ConfigError with all problems, if there are any."""
        refuse(self.problems)

    @property
    def training(self) -> TrainingPlan:
        """Sizes, kernels and memory.

        Raises:
            ConfigError: there are problems.
        """
        if self.known is None:
            raise ConfigError(*self.problems)
        return self.known

    @property
    def refusals(self) -> dict[str, Problem]:
        """Why `submit` refuses to start it although nothing is wrong with it, by the names that `despite` takes.

        Its GPU is too small, or its time limit too short for a step and a checkpoint. Where the GPU is not known,
        nothing is refused.

        Raises:
            ConfigError: there are problems.
        """
        from fiddlehead.plan.refusals import refusals

        trainer, limit = self.recipe.trainer, None if self.executor is None else self.executor.time_limit
        return refusals(self.training, int(trainer.num_nodes), limit)

    def refuse_unfit(self, despite: Sequence[str] = ()) -> None:
        """Raises ConfigError with the `refusals` whose names are not in `despite`."""
        from fiddlehead.plan.refusals import standing

        refuse(standing(self.refusals, despite))

    def refuse_start(self, despite: Sequence[str] = ()) -> None:
        """As `refuse_unfit`, also with all that is missing."""
        from fiddlehead.plan.refusals import standing

        refuse([*self.missing, *standing(self.refusals, despite)])

    def prediction(self, despite: Sequence[str] = ()) -> Prediction:
        """What `submit` writes down of the plan, for a comparison with the run."""
        from fiddlehead.plan.refusals import predict

        return predict(self.training, despite)

    def rows(self, *, name: str | None = None, usd_per_gpu_hour: float | None = None) -> list[tuple[str, str]]:
        """Section and text of each line of a summary; only the first line of a section has its name.

        Args:
            name: as of `submit`.
            usd_per_gpu_hour: what a GPU costs, to say also what the run costs.

        Raises:
            ConfigError: there are problems.
        """
        from fiddlehead.plan.rows import as_rows, resume_lines

        run = self.run_directory(name)
        where = [f"{run.path}, {'in this process' if self.executor is None else f'executor {self.executor.kind}'}"]
        if self.executor is not None and self.executor.keeps_runs_elsewhere:
            where.append(f"a mirror of {self.executor.place(run)}, where the job is")
        where += [f"changed: {sentence}" for sentence in self.changed]
        where += [f"it cannot start here: {reason}" for reason in self.missing if reason not in self.training.missing]
        if self.training.memory is not None and self.training.card is None:
            where.append(f"GPU: {UNKNOWN}")
        # The remedies, which a refusal also names, are in the section of the memory.
        where += [f"would be refused: {problem.splitlines()[0]}" for problem in self.refusals.values()]
        resume = resume_lines(self.training, self.start, None if self.awaits_start else self.step)
        return as_rows({**self.training.sections(usd_per_gpu_hour), "resume": resume, "where": where})

    def run_directory(self, name: str | None = None) -> RunDirectory:
        """Where the run will be; for a run without `log.name`, DATE-TIME stands for those of its start.

        Args:
            name: as of `submit`.
        """
        log = self.recipe.log
        named = log.name or f"{name or self.recipe.__fn_or_cls__.__name__}-DATE-TIME"
        return RunDirectory((user_path(log.dir) / named).absolute())

    def _repr_html_(self) -> str:
        rows = [("problem", str(problem)) for problem in self.problems] or self.rows()
        return notebook.STYLE + notebook.table((), rows)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; the recipe as YAML."""
        return {
            "recipe": self.recipe.to_yaml(),
            "executor": None if self.executor is None else self.executor.to_dict(),
            "problems": list(self.problems),
            "missing": list(self.missing),
            "changed": list(self.changed),
            "refusals": {} if self.known is None else self.refusals,
            "resume": {
                "from": None if self.start is None else str(self.start),
                "step": None if self.awaits_start else self.step,
            },
            "where": str(self.run_directory().path),
            "training": None if self.known is None else self.known.to_dict(),
        }

    def submit(
        self,
        *,
        name: str | None = None,
        detach: bool = False,
        allow: Sequence[str] = (),
        despite: Sequence[str] = (),
        command: str | None = None,
        after: Sequence[RunDirectory] = (),
        after_any: Sequence[RunDirectory] = (),
    ) -> RunDirectory:
        """Starts the run, and waits for it unless told to detach.

        Args:
            name: the run's name, to which date and time are added, if `recipe.log.name` is None; by default the task's
                name.
            detach: return as soon as the job is submitted.
            allow: names that the job's recipe may use, besides its own classes and functions.
            despite: the names of `refusals` to override: "memory", "time".
            command: the command line to record.
            after: runs that must succeed first; only for an executor that queues jobs, and with the same executor.
            after_any: such runs that must end first, in any state.

        Raises:
            ConfigError: there are problems, something is missing, one of `refusals` is not overridden, the run's name
                was taken meanwhile, or the executor cannot run it. Nothing was started.
            RunFailedError: the run did not succeed.
        """
        self.refuse_problems()
        self.refuse_start(despite)
        prediction = self.prediction(despite)
        if self.executor is None:
            if after or after_any:
                raise ConfigError("a run in this process starts at once; name an executor for one that waits")
            return submit.run_here(self.recipe, prediction, name=name, allow=allow, command=command)
        return submit.run_elsewhere(
            self.recipe, self.executor, prediction,
            name=name, detach=detach, allow=allow, command=command, after=after, after_any=after_any,
        )  # fmt: skip

    def scripts(self, *, name: str | None = None, allow: Sequence[str] = ()) -> dict[str, str]:
        """The scripts and commands that `submit` would use, by name: "sbatch.sh" or "docker", and "job.sh".

        Nothing is asked, and no secret is in them.

        Args:
            name, allow: as of `submit`; DATE-TIME stands for those of the start.

        Raises:
            ConfigError: there are problems, or there is no executor.
        """
        self.refuse_problems()
        if self.executor is None:
            raise ConfigError("a run in this process has no script; name an executor, such as executor=slurm")
        return preview.scripts(self.recipe, self.executor, self.run_directory(name), allow)

    def dry_run(self) -> str:
        """Does everything that `submit` does before it submits the job, in a folder that is then deleted.

        Returns a sentence about what would be shipped; "" if nothing would be.

        Raises:
            ConfigError: there are problems, the data that the recipe names is not here, or the executor cannot do it.
        """
        self.refuse_problems()
        # What is named, and is not here.
        refuse(each for each in self.training.missing if each.given not in (None, UNSET))
        return "" if self.executor is None else submit.rehearse(self.recipe, self.executor)


def plan(
    recipe: Recipe,
    executor: Any = None,
    *,
    target: Target | Card | str | None = None,
    waits: bool = False,
) -> Plan:
    """Plans a run before it starts. It does not change the recipe, and writes nothing.

    Args:
        executor: where it runs, one of ours or of NeMo-Run's; None means this process.
        target: plans for devices of this kind instead, also for absent ones: as many as the executor has, or without
            an executor as many as the recipe has. A text names a GPU as `Card.parse` takes it, or is "unknown".
        waits: the run waits for others, so the checkpoint from which it resumes need not exist yet.

    The plan's `problems` list what is wrong.

    Raises:
        ConfigError: no such GPU is known, or `recipe` is not a `Recipe`.
    """
    if not isinstance(recipe, Recipe):  # such as a function that makes one
        raise ConfigError(Problem("", message=f"a {type(recipe).__name__} is not a Recipe{uncalled(recipe)}"))
    target = target_of(target)
    try:
        executor = accepted(executor)
    except ConfigError as error:
        return Plan(recipe, None, error.under("executor").problems)
    try:
        recipe.to_yaml()  # as a launch writes it
        refuse(setting_problems(recipe))
        as_it_is = target is not None and executor is None
        fitted = recipe.clone() if as_it_is else fit_to_executor(recipe, executor)
    except ConfigError as error:
        return Plan(recipe, executor, error.problems)
    here = target is None and (executor is None or not executor.ships_code)
    lacking = missing_here(fitted) if here else ""
    if target is None and not (here and not lacking):
        target = card_of(executor, fitted) or "unknown"
    try:
        refuse(nsys_problems(fitted))
        training = _plan_training(fitted, target)
        awaits = waits or (executor is not None and executor.keeps_runs_elsewhere)
        start = _start(fitted, waits=awaits)
        if start is not None and not training.missing:
            start.refuse_others(training.config, training.optimizer.kind, str(fitted.trainer.precision))
            start.base(fitted.model.init_from)
    except ConfigError as error:
        return Plan(fitted, executor, error.problems)
    if executor is not None:
        trainer = fitted.trainer
        executor = executor.fitted(int(trainer.devices), str(trainer.accelerator), int(trainer.num_nodes))
    tools = [] if as_it_is else [missing_nsys(fitted, executor), *missing_trackers(fitted, executor)]
    missing = tuple(filter(None, (lacking, *tools, *training.missing)))
    return Plan(
        fitted,
        executor,
        missing=missing,
        changed=tuple(yielded(recipe, fitted)),
        known=training,
        start=None if start is None else start.path,
        step=0 if start is None else start.step,
        awaits_start=awaits and recipe.resume != "never",
    )


def _plan_training(recipe: Recipe, target: Target | Card | Literal["unknown"] | None) -> TrainingPlan:
    """Plans the training of a recipe; the arguments and errors are those of `built` and `plan_training`."""
    from fiddlehead.plan.training import plan_training

    with built(recipe, target) as (parts, device):
        return plan_training(**parts, target=device)


def _start(recipe: Recipe, *, waits: bool) -> Start | None:
    """The checkpoint from which a run starts; None for a fresh start, and with `waits`.

    Raises:
        ConfigError: the run's directory cannot be written or is taken, or there is no checkpoint to resume.
    """
    from fiddlehead.plan.resume import Start, resume_point

    directory = user_path(recipe.log.dir).absolute()
    try:
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        if not os.access(existing, os.W_OK) or not existing.is_dir():
            raise ConfigError(Problem("log.dir", recipe.log.dir, f"{existing} cannot be written"))
        run = RunDirectory(directory / (recipe.log.name or _NAMELESS))
        refuse_taken(run, recipe)
    except OSError as error:
        raise ConfigError(Problem("log.dir", recipe.log.dir, f"{error.strerror} ({error.filename})")) from error
    found = None if waits else resume_point(run, recipe.resume)
    return None if found is None else Start.read(found)
