"""Starts the runs of a sweep that was asked for on the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import typer

from fiddlehead.cli.common import add_row, show, table
from fiddlehead.cli.plan import show_plan
from fiddlehead.cli.start import Request, typed_command
from fiddlehead.cli.sweep import show_results
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.numbers import count, few_digits, scientific, short

if TYPE_CHECKING:
    from fiddlehead.launch import Plan
    from fiddlehead.launch.executor import Executor
    from fiddlehead.launch.sweep import Sweep, Variant
    from fiddlehead.plan.training import TrainingPlan
    from fiddlehead.run.status import Status


def start_sweep(request: Request, *, zipped: bool, max_running: int | None, metric: str) -> None:
    """Checks every run of a sweep, shows their total cost, and runs them.

    Args:
        metric: what the table of results is sorted by; "" chooses `val_loss` or `loss`.
    """
    from fiddlehead.launch import sweep as sweeps

    executor = request.executor
    if request.detach and not executor.queues:
        said = f"{request.where} queues nothing, so this command has to stay and start the runs"
        raise ConfigError(Problem("--sweep --detach", message=said))
    expanded = sweeps.expand(request.edits, "", zipped=zipped)
    first, title = request.load(expanded[0].edits(request.edits))
    name = first.log.name or f"{title}-{datetime.now():%Y%m%d-%H%M%S}"
    made = sweeps.Sweep(name, str(first.log.dir), sweeps.expand(request.edits, name, zipped=zipped))
    plans = _plans(request, made.variants)
    if not executor.queues and max_running is None:
        max_running = 1
    if not request.dryrun and (missing := sorted({reason for plan in plans for reason in plan.missing})):
        raise ConfigError(*missing)
    _show(request, made.variants, plans, max_running)
    if request.dryrun:
        if shipped := plans[0].dry_run():
            print(shipped.replace("shipped", "each would ship"))  # noqa: T201
        _refuse_unfit(request, made.variants, plans)
        return
    request.confirm()
    _run(request, made, plans, max_running, metric)


def _plans(request: Request, variants: Sequence[Variant]) -> list[Plan]:
    """The plan of each run; raises ConfigError with the problems of all."""
    from fiddlehead import launch

    plans: list[Plan] = []
    problems: list[Problem] = []
    for variant in variants:
        try:
            recipe, _ = request.load(variant.edits(request.edits))
            recipe.log.name = variant.name
            plans.append(launch.plan(recipe, request.executor))
            plans[-1].refuse_problems()
            if not request.dryrun:
                plans[-1].refuse_unfit(request.despite)
        except ConfigError as error:
            problems += error.of(variant.name).problems
    refuse(problems)
    return plans


def _show(request: Request, variants: Sequence[Variant], plans: Sequence[Plan], max_running: int | None) -> None:
    made = table("run", *variants[0].values)
    for variant in variants:
        add_row(made, variant.name, *variant.values.values())
    show(made)
    at_once = "all at once" if max_running is None else f"{max_running} at a time"
    notes = [("changed", sentence) for sentence in plans[0].changed]
    show_plan(f"{len(variants)} runs, {at_once}", request.where, [*_totals(plans, request.executor), *notes])


def _refuse_unfit(request: Request, variants: Sequence[Variant], plans: Sequence[Plan]) -> None:
    problems: list[Problem] = []
    for variant, plan in zip(variants, plans, strict=True):
        try:
            plan.refuse_unfit(request.despite)
        except ConfigError as error:
            problems += error.of(variant.name).problems
    refuse(problems)


def _run(request: Request, made: Sweep, plans: Sequence[Plan], max_running: int | None, metric: str) -> None:
    """Runs the sweep and shows its results; ends the command with an error if a run did not succeed."""
    from fiddlehead.launch import sweep as sweeps

    try:
        statuses = sweeps.run_all(
            made,
            plans,
            request.executor,
            max_running=max_running,
            allow=request.allow,
            despite=request.despite,
            command=typed_command(),
            report=None if request.detach else _Report(made),
        )
    except KeyboardInterrupt:
        print("cancelled; the runs have saved their last steps", file=sys.stderr)  # noqa: T201
        raise typer.Exit(130) from None
    if request.detach:
        print(f"started {len(plans)} runs; `fiddlehead runs sweep {made.name}` shows what came out")  # noqa: T201
        return
    show_results(made, metric)
    if failed := sweeps.failed(made, statuses):
        print(f"error: {len(failed)} of {len(statuses)} runs did not succeed: {', '.join(failed)}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1)


class _Report:
    """Prints the progress of a sweep: a line for each run that begins or ends."""

    def __init__(self, sweep: Sweep) -> None:
        self.runs = sweep.runs()
        self.said: dict[str, str] = {}

    def __call__(self, statuses: list[Status | None]) -> None:
        for run, status in zip(self.runs, statuses, strict=True):
            if status is not None and self.said.get(run.name) != status.state:
                self.said[run.name] = status.state
                done = sum(1 for other in statuses if other is not None and other.state.ended)
                reason = f": {status.reason}" if status.reason else ""
                print(f"[{done}/{len(self.runs)} ended] {run.name} {status.state}{reason}", flush=True)  # noqa: T201


def _totals(plans: Sequence[Plan], executor: Executor) -> list[tuple[str, str]]:
    """The tokens, FLOPs and GPU hours of all runs of a sweep."""
    from fiddlehead.plan.rows import as_rows

    trainings = [plan.training for plan in plans]
    tokens, flops = sum(each.tokens for each in trainings), sum(each.flops for each in trainings)
    rows = [("together", f"{short(tokens)} tokens, {scientific(flops)} FLOPs")]
    on_gpus = [plan.training for plan in plans if plan.recipe.trainer.accelerator in ("gpu", "cuda")]
    if on_gpus:
        rows += as_rows({"GPU hours": _gpu_hours(on_gpus)})
        if executor.time_limit:
            most = sum(each.world_size for each in trainings) * executor.time_limit / 3600
            rows.append(("", f"at most {most:,.1f} for an attempt of each, by executor.time"))
    return rows


def _gpu_hours(trainings: Sequence[TrainingPlan]) -> list[str]:
    """The GPU hours by the plans; of those that do not know their speed, by their FLOPs."""
    known = [each for each in trainings if each.gpu_hours is not None]
    lines = []
    if known:
        hours, cards = sum(each.gpu_hours or 0.0 for each in known), {each.card.name for each in known if each.card}
        lines.append(f"{few_digits(hours)} by the plans, on {', '.join(sorted(cards))}")
    if unknown := [each for each in trainings if each.gpu_hours is None]:
        hours = sum(each.flops for each in unknown) / (0.4 * 989e12) / 3600
        whose = f"of {count(len(unknown), 'run')} whose speed is not known" if known else "as the speed is not known"
        lines.append(f"about {few_digits(hours)} on H100s at 40 % MFU, {whose}")
    return lines
