"""`fiddlehead report` and `fiddlehead runs serve`: pages of runs."""

from __future__ import annotations

import sys

import typer

from fiddlehead.cli.runs import DirOption, RunsArgument
from fiddlehead.errors import ConfigError
from fiddlehead.files.paths import user_path
from fiddlehead.run.names import find_run


def report(
    names: list[str] = RunsArgument,
    out: str = typer.Option("", "--out", "-o", metavar="FILE", help="Where to write it; by default RUN/report.html."),
    directory: str = DirOption,
) -> None:
    """Write a run as one HTML page: curves, plan, phases, memory, kernels, data, samples, events, recipe.

    The page needs no network, and reads without JavaScript, which only zooms.

    Example:  fiddlehead report demo --out demo.html
    """
    from fiddlehead.launch import watch
    from fiddlehead.runs import report as reporting
    from fiddlehead.runs.export import write

    runs = [find_run(name, directory) for name in names]
    if out and len(runs) > 1:
        raise ConfigError("--out: names one file; leave it out, and each run gets its own report.html")
    for run, status in zip(runs, watch.states(runs), strict=True):
        text = reporting.report(run, status, watch.where(run, status) if status else "")
        file = user_path(out) if out else run.path / "report.html"
        write("--out", file, text)
        print(f"wrote {out or file}", file=sys.stderr)  # noqa: T201


def serve(
    port: int = typer.Option(8321, "--port", min=0, max=65535, help="The port; 0 takes a free one."),
    directory: str = DirOption,
) -> None:
    """Show all runs in a browser, from this machine only; Ctrl-C ends it.

    On a cluster, run it on the login node, and open it through a tunnel: ssh -L 8321:localhost:8321 LOGIN-NODE

    Example:  fiddlehead runs serve
    """
    from fiddlehead.launch import watch
    from fiddlehead.runs.serve import Runs, Server

    with Server(Runs(directory, watch.states), port) as server:
        print(f"open {server.address}  (Ctrl-C ends)", flush=True)  # noqa: T201
        server.serve_forever()
