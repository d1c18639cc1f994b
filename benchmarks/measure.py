"""Shared code of the benchmarks: alternating timings, their spread, a Markdown table and a file of results."""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiddlehead.environment import describe_machine
from fiddlehead.figures import compare, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """The least, the median and the greatest of repeated measurements."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        values = sorted(values)
        return cls(values[0], statistics.median(values), values[-1])

    def __format__(self, spec: str) -> str:
        """The median, with the extremes behind it."""
        return f"{self.median:{spec}} ({self.min:{spec}} to {self.max:{spec}})"


def keep_freed_memory() -> None:
    """Keeps up to 1 GiB of freed memory in this process, where it has glibc, which would return it to the system."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def alternate(
    arms: Mapping[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Calls every arm once a round and returns the seconds of each call by `clock`.

    Each round starts with another arm: none of them always runs behind the same neighbour. Whatever slows the machine
    down for longer than a round slows all of them, and their ratio within a round is hardly touched.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            arms[name]()
            seconds[name].append(clock() - start)
    return seconds


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of the ratios within each round."""
    return Spread.of(a / b for a, b in zip(numerators, denominators, strict=True))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column holds names and whose others hold figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gpus_here() -> int:
    """GPUs of this machine, asked in another process: the parent of forks must not start CUDA."""
    ask = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout)


def save(
    name: str,
    figures: Mapping[str, Any],
    packages: Sequence[str],
    more: Mapping[str, Any] | None = None,
    folder: Path = RESULTS,
) -> None:
    """Writes `FOLDER/NAME.json`: the figures, what they were measured on, and `more` of that.

    Prints what has changed since the file that was there before.
    """
    results = {"figures": _plain(figures), "where": {**describe_machine(packages), **(more or {})}}
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.json"
    before = read(file) if file.exists() else None
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwrote {file}")
    if before is not None:
        print(f"since {before['where']['date']}:")
        print("\n".join(f"- {line}" for line in compare(before, results).lines()))


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def picture(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure in the style of the documentation, of a size in inches, and its axes; of several, an array of them."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from fiddlehead.runs.picture import STYLE

    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns)


def save_picture(figure: Figure, png: Path, where: Mapping[str, Any]) -> None:
    """Writes a picture that names the device and the versions."""
    from fiddlehead.runs.picture import DPI, measured_on, write_note

    write_note(figure, measured_on(where))
    png.parent.mkdir(exist_ok=True)
    figure.savefig(png, dpi=DPI)
    print(f"wrote {png}")
