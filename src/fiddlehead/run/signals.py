"""Signals of a run: SIGTERM, SIGUSR1 and SIGINT ask it to stop.

A scheduler sends them to one process of a job, or to all of them, or twice. So while a run trains, whoever is
responsible on a node turns them into the run's stop file, at which the first rank looks after each step; the processes
that train ignore them.

A preempted job is requeued in these steps. The signal becomes a stop file that asks for it (`_request`, here). After
the step, `training.callbacks.stop` saves a checkpoint and raises StopRequested. The job then exits with code 75, and
the batch script (`launch/slurm_script.py`) requeues it. A launcher on this machine starts it again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from fiddlehead.errors import StopRequested
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

training = threading.Event()
"""Set from the first step on, in this process."""

_ignored = False
_unheard: StopRequest | None = None


def may_requeue() -> bool:
    """Whether this job is started again if it ends with exit code 75."""
    return int(os.environ.get("FIDDLEHEAD_REQUEUES") or 0) > 0


def stop_at_once(run: RunDirectory | None = None) -> None:
    """From now on a signal ends this process where it is: outside of training there is nothing to save."""

    def handle(signum: int, frame: FrameType | None) -> None:
        global _unheard
        # Kept, should a library catch the exception: before the first step it is asked for again.
        _unheard = (run and run.stop_request()) or _request(signum)
        raise without_a_step(_unheard)

    _install(handle)


def stop_after_step(run: RunDirectory) -> None:
    """From now on a signal asks `run` to save the step in hand and leave; a second SIGINT does not wait for that.

    In a process that ignores signals nothing changes, but for what a library has installed since.
    """
    training.set()
    if _ignored:
        _install(signal.SIG_IGN)
        return
    asked = interrupts = 0

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal asked, interrupts
        interrupts += signum == signal.SIGINT
        if interrupts > 1:
            raise StopRequested("stopped at once, by a second SIGINT; the checkpoints before it are whole")
        asked += 1
        if asked == 1 or signum == signal.SIGINT:
            ask(run, _request(signum))

    _install(handle)
    if _unheard is not None:
        ask(run, _unheard)


def watch_until_training(run: RunDirectory, leave: Callable[[StopRequest], None]) -> None:
    """Calls `leave`, in a thread, if the run is asked to stop before its first step; after that each step looks."""

    def watch() -> None:
        while not training.wait(0.2):
            request = run.stop_request()
            if request is not None:
                leave(request)
                return

    threading.Thread(target=watch, daemon=True).start()


def ignore() -> None:
    """From now on signals mean nothing to this process: another one is responsible, or all is done."""
    global _ignored
    _ignored = True
    _install(signal.SIG_IGN)


def heed_parent_only(worker: int = 0) -> None:
    """For a data loader's process: of the signals, only its parent's SIGTERM ends it.

    A scheduler signals these processes too, and if they ended, so would the step that is to be saved.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while True:
            if hasattr(signal, "sigwaitinfo"):
                received = signal.sigwaitinfo(SIGNALS)
                signum, sender = received.si_signo, received.si_pid
            else:  # macOS does not say who sent it, and has no scheduler
                signum, sender = signal.sigwait(SIGNALS), os.getppid()
            if signum == signal.SIGTERM and sender == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def ask(run: RunDirectory, request: StopRequest) -> None:
    """Writes the run's stop file; on a full disk, where the step could not be saved either, it says so."""
    try:
        run.request_stop(request)
    except OSError as error:
        print(f"WARNING: {request.reason} cannot stop the run: {error}", flush=True)  # noqa: T201


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Gives the signals back, when the block ends, to whom they belonged before it."""
    global _ignored, _unheard
    ignored = _ignored
    with handlers_restored():
        try:
            yield
        finally:
            training.clear()
            _ignored, _unheard = ignored, None


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """Restores the handlers of the signals when the block ends."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        yield
    finally:
        if _in_main_thread():
            for signum, handler in before.items():
                signal.signal(signum, handler)


def without_a_step(request: StopRequest) -> StopRequested:
    """What ends a process that was asked to stop before or after its training."""
    return StopRequested(f"stopped with no step in hand: {request.reason}", requeue=request.requeue)


def _request(signum: int) -> StopRequest:
    return StopRequest(signal.Signals(signum).name, requeue=signum != signal.SIGINT and may_requeue())


def _install(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    if _in_main_thread():  # no other may; a run there is stopped by its stop file only
        for signum in SIGNALS:
            signal.signal(signum, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
