"""The effect of signals on the processes of a run."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize("system", ["linux", "macos"])
def test_a_data_loader_s_process_heeds_only_its_parent(system: str) -> None:
    """macOS has no sigwaitinfo, which says who sent a signal; so a SIGTERM counts there, whoever sent it."""
    code = (
        "import signal, time\n"
        + ("del signal.sigwaitinfo\n" if system == "macos" else "")
        + "from fiddlehead.run.signals import heed_parent_only\n"
        "heed_parent_only()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    for signum in (signal.SIGINT, signal.SIGUSR1):
        process.send_signal(signum)
    if system == "linux":
        subprocess.run(["bash", "-c", f"kill -TERM {process.pid}"], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, said) == (0, "")
