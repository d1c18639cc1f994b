"""Starts Python programs as forks of a server that has done the heavy imports.

Each program is a real process: its id, parent, group, streams, working directory, environment, arguments and exit are
the same as for a new interpreter. The same holds for the workers that a job starts. This saves the seconds for
importing PyTorch, Lightning and NeMo-Run. Tests of importing, or of a new interpreter, start a new one.

Run as a script, this file is the server. A request is one message: JSON, and the three standard streams. For `Popen`,
the asking process adopts orphans meanwhile, so it becomes the parent of the new process. If something else, such as a
shell, starts a Python program, that process stays: `tests.start.sitecustomize` asks for a fork, passes signals on to
it, and ends in the same way. Both first get the new process's id.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

SERVER = "FIDDLEHEAD_TEST_SERVER"
"""The environment variable that names the socket of a server to `tests.start.sitecustomize`."""
IMPORTED = (
    "fiddlehead.cli",
    "fiddlehead.job",
    "fiddlehead.launch.local",
    "fiddlehead.recipes.tiny",
    "fiddlehead.tasks",
)
LINUX = sys.platform == "linux"
"""Elsewhere no process adopts another: a new interpreter is started."""
PDEATHSIG, SUBREAPER = 1, 36

libc = ctypes.CDLL(None)
_ENVIRONMENT = dict(os.environ)
"""When this is imported: no test's."""
_EXECUTE_CHILD = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


# -- in the process that asks


@cache
def address() -> str:
    """Where this process's server listens, which is started first."""
    folder = tempfile.mkdtemp(prefix="warm-")
    server = subprocess.Popen(
        [sys.executable, __file__, f"{folder}/socket"], env=_ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )

    @atexit.register
    def end() -> None:
        server.kill()
        server.communicate()
        shutil.rmtree(folder)

    assert server.stdout is not None and server.stdout.readline() == "ready\n", "its traceback says why"
    return f"{folder}/socket"


def everywhere() -> dict[str, str]:
    """The environment variable with which a program of ours is a fork, whoever starts it; nothing but on Linux."""
    return {SERVER: address()} if LINUX else {}


def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run`, with `Popen` of this module."""
    everywhere()  # which starts a process itself
    with mock.patch.object(subprocess, "Popen", Popen):
        return subprocess.run(command, **settings)


class Popen(subprocess.Popen[Any]):
    """As `subprocess.Popen`, but this interpreter with `-c`, or as a job, does not import again what is heavy."""

    address = staticmethod(address)

    def _execute_child(self, *arguments: Any) -> None:
        given = _EXECUTE_CHILD.bind(self, *arguments).arguments
        python, *command = map(os.fspath, given["args"])
        is_known = command[:1] == ["-c"] or "fiddlehead.job" in command[1:3]
        if python != sys.executable or not is_known or not LINUX:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        request = {
            "arguments": command,
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "cwd": os.fspath(given["cwd"] or os.getcwd()),
            "group": 0 if given["start_new_session"] else os.getpgrp(),
            "adopted": True,
        }
        pipes = ("p2cread", "c2pwrite", "errwrite")
        streams = [own if given[name] == -1 else given[name] for own, name in enumerate(pipes)]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel, _adopting_orphans():
            channel.connect(self.address())
            socket.send_fds(channel, [json.dumps(request).encode()], streams)
            self.pid = int(channel.recv(64))
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in _PIPES))  # type: ignore[attr-defined]


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    libc.prctl(SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(SUBREAPER, 0)


# -- in the server, and what it forks


def main() -> None:
    """Serves until it is killed; in a process that is to be a new one, returns when its program has ended."""
    path = sys.argv[1]
    for name in IMPORTED:
        importlib.import_module(name)
    with warnings.catch_warnings(action="ignore"):  # what NeMo-Run imports warns of itself
        importlib.import_module("nemo_run")
    cli, catalog = importlib.import_module("fiddlehead.cli"), importlib.import_module("fiddlehead.recipe.catalog")
    cli.command.made_of(cli.app)  # which each command would make again
    catalog.recipes(), catalog.executors()
    gc.collect()
    gc.freeze()
    own = {os.path.dirname(__file__), *os.environ["PYTHONPATH"].split(os.pathsep)}
    path_of_all = [entry for entry in sys.path if entry not in own]
    listener = _listening(path)
    print("ready", flush=True)
    request = _serve(listener)
    _become(request, path_of_all)
    is_job = "fiddlehead.job" in request["arguments"][1:3]
    if is_job and "FIDDLEHEAD_PARENT" not in os.environ:  # it may start workers
        mine = f"{path}-{os.getpid()}"
        listener = _listening(mine)
        if os.fork():
            listener.close()
            Popen.address = staticmethod(lambda: mine)  # type: ignore[assignment]
            subprocess.Popen = Popen  # type: ignore[misc]
        else:
            _stand_by()
            request = _serve(listener)
            _become(request, path_of_all)
    _leave(_run(request["arguments"]), 0.0 if is_job else 0.5)


def _listening(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    return listener


def _stand_by() -> None:
    """Makes this process, which forks a job's workers, end with the job, outside of its group and folder."""
    libc.prctl(PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)
    os.chdir("/")
    with open(os.devnull, "r+") as nothing:
        for stream in range(3):
            os.dup2(nothing.fileno(), stream)


def _serve(listener: socket.socket) -> dict[str, Any]:
    """Forks for each request, and returns it in the process that is to be the new one."""
    while True:
        channel, _ = listener.accept()
        if not os.fork():
            break
        channel.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    listener.close()
    with channel:
        message, streams, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        request = json.loads(message)
        between = os.getpid()
        if pid := os.fork():
            if not request["adopted"]:
                _watch(channel, pid)
            os._exit(0)
        while request["adopted"] and os.getppid() == between:
            time.sleep(0.0005)
        channel.send(str(os.getpid()).encode())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return request


def _watch(channel: socket.socket, pid: int) -> None:
    """Waits for the end of a process and says how it ended; ends it if the other end of the channel is gone."""
    end = os.pidfd_open(pid)
    ready, _, _ = select.select([channel, end], [], [])
    if end not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        channel.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(request: dict[str, Any], path_of_all: list[str]) -> None:
    """Takes over what a request says, and what an import would have read from its environment."""
    os.setpgid(0, request["group"]) if request["group"] else os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:] = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *path_of_all]

    import torch
    from lightning.fabric.utilities import rank_zero
    from nemo_run.config import set_nemorun_home

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0  # type: ignore[attr-defined]
    set_nemorun_home(os.environ.get("NEMORUN_HOME", "~/.nemo_run"))


def _run(arguments: list[str]) -> int:
    """Does what an interpreter does with its arguments, and returns the exit code."""
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        arguments = arguments[1:]
    how, *rest = arguments
    if how == "-m" or "PYTHONSAFEPATH" not in os.environ:
        where = {"-m": os.getcwd(), "-c": "", "-": ""}
        sys.path.insert(0, where[how] if how in where else os.path.dirname(os.path.realpath(how)))
    sys.argv = rest if how == "-m" else [how, *rest[how == "-c" :]]
    try:
        if how == "-m":
            del sys.modules[rest[0]]  # it is to run as __main__
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif how in ("-c", "-"):
            sys.modules["__main__"] = types.ModuleType("__main__")
            name, code = ("<string>", rest[0]) if how == "-c" else ("<stdin>", sys.stdin.read())
            exec(compile(code, name, "exec"), sys.modules["__main__"].__dict__)
        else:
            runpy.run_path(how, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        return int(end.code or 0)
    return 0


def _leave(code: int, patience: float) -> None:
    """Ends as an interpreter does, but does not clear its memory, which would take half a second of computing.

    A launcher so long outlives its job, which says that it has ended shortly before it does: `patience` stands for it.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    end = time.monotonic() + patience
    with contextlib.suppress(ChildProcessError):  # there is none any more
        while time.monotonic() < end:
            os.waitpid(-1, os.WNOHANG)
            time.sleep(0.005)
    os._exit(code)


if __name__ == "__main__":
    main()
