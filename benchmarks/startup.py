"""The start-up cost of the command: CPU seconds of short commands, and the time to a first step."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import Spread, save, table

FIDDLEHEAD = str(Path(sys.executable).with_name("fiddlehead"))
COMMANDS = {
    "fiddlehead --help": [FIDDLEHEAD, "--help"],
    "fiddlehead recipes": [FIDDLEHEAD, "recipes"],
    "fiddlehead pretrain --factory tiny --dryrun": [FIDDLEHEAD, "pretrain", "--factory", "tiny", "--dryrun"],
    "import nemo_run": [sys.executable, "-c", "import nemo_run"],
}
PLACES = {"--direct": "--direct", "executor=local": "executor=local"}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory:  # a folder without recipes of its own
        run(COMMANDS["fiddlehead recipes"], directory)  # bytecode and the disk's cache are warm from here on
        cpu = alternate({name: lambda c=command: run(c, directory) for name, command in COMMANDS.items()}, rounds)
        names = (f"run{i}" for i in range(10 * rounds))
        run(first_step_command("--direct", next(names)), directory)  # tokenizes the corpus if no run has yet
        first = alternate(
            {name: lambda p=place: first_step(p, next(names), directory) for name, place in PLACES.items()}, rounds
        )
    print(table(["command", "CPU seconds"], [[name, f"{spread:.2f}"] for name, spread in cpu.items()]))
    print()
    rows = [[f"pretrain --factory tiny {name}", f"{spread:.2f}"] for name, spread in first.items()]
    print(table(["command", "wall seconds to the first step's line"], rows))
    save(
        "startup",
        {"rounds": rounds, "cpu_seconds": cpu, "wall_seconds_to_first_step": first},
        ["torch", "lightning", "nemo-run", "typer"],
    )


def alternate(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, Spread]:
    """The spread of what each arm returns, the arms taking turns."""
    values: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            values[name].append(arm())
    return {name: Spread.of(collected) for name, collected in values.items()}


def run(command: list[str], directory: str) -> float:
    """User and system CPU seconds of a command and of the processes it waited for."""
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{errors.decode()}")
    return usage.ru_utime + usage.ru_stime


def first_step_command(place: str, name: str) -> list[str]:
    """A run of one step."""
    edits = ["trainer.max_steps=1", "optim.lr_scheduler.warmup_steps=0", "data.val_samples=0"]
    edits += [f"log.name={name}", "log.dir=runs"]
    return [FIDDLEHEAD, "pretrain", "--factory", "tiny", "--yes", place, *edits]


def first_step(place: str, name: str, directory: str) -> float:
    """Wall seconds from the command to the line of its first step."""
    command = first_step_command(place, name)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines, seconds = [], None
    for line in process.stdout:
        lines.append(line)
        if seconds is None and line.startswith("step      1/"):
            seconds = time.perf_counter() - start
    if process.wait() or seconds is None:
        raise SystemExit(f"{command} failed:\n{''.join(lines)}")
    return seconds


if __name__ == "__main__":
    main()
