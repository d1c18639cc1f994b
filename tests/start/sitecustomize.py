"""Runs at the start of every Python process of the tests.

It keeps torchmetrics from importing optional packages: Lightning imports torchmetrics, which imports transformers and
matplotlib.pyplot if they are installed. The tests start many processes in an environment with both packages; this saves
1.3 s of CPU time for each process.

If a server of `tests.warm` runs, our programs run in a fork of that server.

Nothing is imported here that not every interpreter imports anyway: `typing` alone would double what a start takes.
"""

from __future__ import annotations

import os
import sys


class _Torchmetrics:
    """Says that the two are missing, once torchmetrics is to be imported."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Finds nothing; the next finder does."""
        if fullname != "torchmetrics":
            return
        sys.meta_path.remove(self)
        from lightning_utilities.core.imports import RequirementCache

        check = RequirementCache._check_available

        def check_available(cache: RequirementCache) -> None:
            if (cache.requirement or "").partition(">")[0] in ("transformers", "matplotlib"):
                cache.available, cache.message = False, "left out in the tests"
            else:
                check(cache)

        RequirementCache._check_available = check_available


if not any(type(finder).__name__ == _Torchmetrics.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _Torchmetrics())


def _forked(address: str, arguments: list[str]) -> None:
    """Ends this process as a fork of the server that does its work: it has imported already what that needs."""
    import json
    import signal
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.connect(address)
        request = {"arguments": arguments, "environment": dict(os.environ), "cwd": os.getcwd()}
        message = json.dumps({**request, "group": 0, "adopted": False}).encode()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, lambda signum, _: os.kill(pid, signum))
        socket.send_fds(channel, [message], [0, 1, 2])
        pid = int(channel.recv(64))
        code = int(channel.recv(64))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


_arguments = sys.orig_argv[1:]
if (_address := os.environ.get("FIDDLEHEAD_TEST_SERVER")) and (
    _arguments == ["-"] or "fiddlehead.job" in _arguments[1:3] or _arguments[0].endswith("/bin/fiddlehead")
):
    _forked(_address, _arguments)
