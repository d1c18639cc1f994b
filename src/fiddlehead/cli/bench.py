"""`fiddlehead bench`: how fast a recipe trains here."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fiddlehead.cli.common import (
    AllowOption,
    DespiteOption,
    FactoryOption,
    WordsArgument,
    add_row,
    configure_executor,
    load_recipe,
    named_recipe,
    phases_table,
    show,
    split_executor,
    table,
)
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path
from fiddlehead.numbers import count, figure, short
from fiddlehead.run.prediction import difference

if TYPE_CHECKING:
    from fiddlehead.launch.executor import Executor
    from fiddlehead.recipe import Recipe

SETTLED = {
    "trainer.max_steps": "--steps and --warmup say how many",
    "trainer.log_every_n_steps": "there is a line at the first and at the last step",
    "data.val_samples": "there is no validation",
    "checkpoint": "nothing is saved",
    "log.name": "nothing is kept",
}
"""Edits that a benchmark would overrule, and why."""


HELP = """Time the training steps of a recipe: tokens/s, MFU, memory, and the time of each phase.

It is the recipe's own training with its data, batch sizes and devices, and your edits, on this machine or wherever \
executor=NAME is. Only validation and checkpoints are left out, and nothing is kept. On a GPU that `fiddlehead plan` \
knows, what was planned stands beside what was measured.

[bold]MFU[/bold] is the part of the GPU's peak that the model's own arithmetic takes; what PaLM, nanoGPT and \
torchtitan report is the one with full attention.

[bold]data[/bold] is how long the device waits for batches: try data.num_workers. If memory is left, try a larger \
data.micro_batch_size.

[bold]Is a change faster?[/bold]  Measure, change, and compare:

  fiddlehead bench llama32_1b --json > before.json

  fiddlehead bench llama32_1b data.micro_batch_size=2 --against before.json

[bold]--calibrate[/bold] measures which part of its peak this machine's GPU reaches in products, attention, the \
optimizer and, with several GPUs, the links between them. The plans for such GPUs use it.

Example:  fiddlehead bench tiny --steps 50
"""


def bench(
    words: list[str] = WordsArgument,
    factory: str = FactoryOption,
    steps: int = typer.Option(20, "--steps", min=1, help="Number of timed steps."),
    warmup: int = typer.Option(5, "--warmup", min=1, help="Number of steps before them that are not timed."),
    random_tokens: bool = typer.Option(False, "--random-tokens", help="Train on random tokens: no corpus is read."),
    direct: bool = typer.Option(False, "--direct", help="Run in this process, without an executor."),
    as_json: bool = typer.Option(False, "--json", help="Print the figures as JSON on stdout, and all else on stderr."),
    against: Path = typer.Option(
        None, "--against", metavar="FILE", parser=user_path, help="Show the change since an earlier --json."
    ),
    calibrate: bool = typer.Option(
        False, "--calibrate", help="Measure the GPU of this machine for its plans, in about a minute; without a recipe."
    ),
    allow: list[str] = AllowOption,
    despite: list[str] = DespiteOption,
) -> None:
    """Time the training steps of a recipe: tokens/s, MFU, memory, and the time of each phase."""
    if calibrate:
        if factory or words:
            raise ConfigError("--calibrate measures this machine, not a recipe; leave the recipe out")
        _calibrate(as_json=as_json)
        return
    factory, edits = named_recipe(factory, words or (), "bench")
    edits, executor_edits = split_executor(edits)
    if direct and executor_edits:
        raise ConfigError(f"--direct runs without an executor; leave out {' '.join(executor_edits)}")
    for edit in edits:
        for path, why in SETTLED.items():
            if edit.startswith((f"{path}=", f"{path}.")):
                raise ConfigError(Problem(edit, message=why))
    from fiddlehead import figures

    before = None if against is None else figures.read(against)
    executor = None if direct else configure_executor(executor_edits)[0]
    recipe, name = load_recipe(factory, edits, allow or ())
    from fiddlehead.bench import as_benchmark

    recipe = as_benchmark(recipe, steps=steps, warmup=warmup, random_tokens=random_tokens)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        results = _run(recipe, name, executor, allow or (), despite or ())
        results["what"] = {"recipe": name, "edits": edits, **results["what"]}
        _show(results, before)
    if as_json:
        if before is not None:
            changes = figures.compare(before, results).changes
            results["changes"] = {change.name: change.relative for change in changes}
        print(json.dumps(results, indent=1))  # noqa: T201


def _calibrate(*, as_json: bool) -> None:
    """Measures which part of its peak the GPU here reaches, and keeps it for plans."""
    import torch

    from fiddlehead.plan import calibration
    from fiddlehead.plan.reached import reached

    device, card = calibration.here()
    print(f"measuring {card.name}, which takes about a minute", file=sys.stderr)  # noqa: T201
    before = reached(card)
    found = calibration.calibrate(device, card, gpus=max(1, torch.cuda.device_count()))
    file = calibration.keep(card, found)
    if as_json:
        print(json.dumps({"gpu": card.name, "reached": found}, indent=1))  # noqa: T201
        return
    made = table(card.name, "of its peak", "planned before")
    for name, part in found.items():
        add_row(made, name, f"{part:.1%}", f"{before[name]:.1%}")
    show(made)
    print(f"kept in {file}; plans for this GPU use it")  # noqa: T201


def _run(
    recipe: Recipe, name: str, executor: Executor | None, allow: Sequence[str], despite: Sequence[str]
) -> dict[str, Any]:
    """Returns the results of a run, whose directory is deleted."""
    from fiddlehead import launch
    from fiddlehead.bench import RESULTS
    from fiddlehead.launch import secrets

    run, parent = None, user_path(recipe.log.dir)
    new = not parent.exists()
    recipe.log.name = None
    try:
        run = launch.launch(recipe, executor, name=f"bench-{name}", allow=allow, despite=despite)
        return json.loads((run.path / RESULTS).read_text())
    except launch.RunFailedError as failure:
        run = failure.run
        print(f"error: {failure.status.reason or failure.status.state}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(failure.status.exit_code or 1) from None
    finally:
        if run is not None:
            secrets.remove(run)
            shutil.rmtree(run.path, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # something else is there by now
                parent.rmdir()


def _show(results: dict[str, Any], before: dict[str, Any] | None) -> None:
    from fiddlehead.figures import compare

    figures, what = results["figures"], results["what"]
    comparison = None if before is None else compare(before, results)
    changes = {} if comparison is None else {change.name: change for change in comparison.changes}
    title = f"{count(what['steps'], 'step')} of {count(what['tokens_per_step'], 'token')}"
    planned = results.get("plan", {})
    columns = [*(["plan", "difference"] if planned else []), *(["before", "change"] if before else [])]
    made = table(" ".join([what["recipe"], *what["edits"]]), title, *columns)
    for label, name, shown in ROWS:
        if name not in figures:
            continue
        cells = [shown(figures[name])]
        if planned:
            cells += _beside_plan(name, figures[name], planned.get(name), shown)
        if before is not None:
            old = before["figures"].get(name)
            cells += ["" if old is None else shown(old), str(changes.get(name, ""))]
        add_row(made, label, *cells)
    if "mfu" not in figures:
        add_row(made, "MFU", f"unknown, as is the peak of a {what['device']}")
    for label, text in _conditions(what, results["where"]):
        add_row(made, label, text)
    mean = what["tokens_per_step"] / figures["tokens_per_s"]
    show(made, "", phases_table(figures | {"seconds_per_step": mean}))
    for condition in comparison.conditions if comparison else ():
        print(f"measured differently: {condition}")  # noqa: T201


def _beside_plan(name: str, measured: Any, planned: float | None, shown: Callable[[Any], str]) -> list[str]:
    """The planned figure, and by how much the measured one differs from it; empty if it was not planned."""
    if planned is None:
        return ["", ""]
    if name == "seconds_per_step":
        return [f"{1000 * planned:,.1f} ms", difference(planned, measured["median"])]
    return [shown(planned), difference(planned, measured)]


def _milliseconds(spread: dict[str, float]) -> str:
    median, least, greatest = (f"{1000 * spread[name]:,.1f}" for name in ("median", "min", "max"))
    return f"{median} ms ({least} to {greatest})"


ROWS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("tokens/s", "tokens_per_s", "{:,.0f}".format),
    ("tokens/s on each device", "tokens_per_s_per_device", "{:,.0f}".format),
    ("a step", "seconds_per_step", _milliseconds),
    ("MFU, causal attention", "mfu", "{:.1%}".format),
    ("MFU, full attention", "mfu_full", "{:.1%}".format),
    ("TFLOP/s on each device", "tflops_per_s", lambda value: figure(value, 3)),
    ("memory, at most", "memory_gib", "{:,.2f} GiB".format),
    ("memory, reserved", "memory_reserved_gib", "{:,.2f} GiB".format),
    ("the first step ended after", "seconds_to_first_step", "{:,.1f} s".format),
]
"""For each figure: its label in the table, its name, and its format."""


def _conditions(what: dict[str, Any], where: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The conditions of the figures."""
    yield "model", f"{short(what['parameters'])} parameters, {what['precision']}, {'; '.join(what['attention'])}"
    yield "on", f"{what['devices']} x {what['device']}, {what['strategy']}"
    if not where["gpus"]:
        threads = count(what["threads"], "thread")
        yield "", f"{where['cpu']}, {threads}, load {where['load_average']:.1f} on {where['cores']} cores"
    if where["gpus"]:
        slowest = min(where["gpus"], key=lambda gpu: gpu.get("sm_mhz", 0))
        clocks = [f"{slowest[key]:,.0f} {unit}" for key, unit in CLOCKS.items() if key in slowest]
        yield "clocks at the end", ", ".join(clocks)
    yield "versions", ", ".join(f"{name} {version}" for name, version in where["versions"].items())


CLOCKS = {
    "sm_mhz": "MHz",
    "max_sm_mhz": "MHz at most",
    "memory_mhz": "MHz memory",
    "watts": "W",
    "max_watts": "W at most",
    "celsius": "°C",
}
