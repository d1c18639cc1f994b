"""NeMo-Run's DockerExecutor, taken over, on a real engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fiddlehead.launch import watch
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State
from tests.launch.test_docker import IMAGE, MOUNTS, REPOSITORY, client, command, finished, losses, project

__all__ = ["client", "project"]  # the fixtures, for pytest to find

THEIRS = f"""
import nemo_run as run


def theirs() -> run.DockerExecutor:
    return run.DockerExecutor(
        container_image="{IMAGE}",
        ipc_mode="host",
        shm_size="30g",
        ulimits=["nofile=512:1024"],
        volumes={[mount.replace(":ro", "") + ":" + mount for mount in MOUNTS]},
        env_vars={{"OMP_NUM_THREADS": "1", "PYTHONPATH": "{REPOSITORY}/src"}},
        packager=run.Packager(),
    )
"""
"""A user's file, from NeMo-Run's pages."""


@pytest.mark.docker
@pytest.mark.slow
def test_an_executor_that_is_taken_over_has_the_same_losses(client, project: Path) -> None:
    Path(project / "launch").mkdir(exist_ok=True)
    (project / "launch" / "theirs.py").write_text(THEIRS)
    probe = f'echo "$(ulimit -n) $(ulimit -Hn)" > {project}/runs/boxed/limits'
    words = ("pretrain", "-f", "tiny_test", "trainer.max_steps=5", "--yes")
    settings = ("executor=theirs", f"executor.python={sys.executable}", f"executor.setup_lines={probe!r}")
    result = finished(command(*words, "log.name=boxed", *settings), project)
    assert result.returncode == 0, result.stdout + result.stderr
    bare = command(*words, "log.name=bare", "executor=local", "executor.env_vars.OMP_NUM_THREADS=1")
    assert finished(bare, project).returncode == 0
    boxed = RunDirectory(project / "runs" / "boxed")
    (status,) = watch.states([boxed])
    assert status and (status.state, status.executor) == (State.SUCCEEDED, "docker")
    assert (boxed.path / "limits").read_text() == "512 1024\n"
    assert losses(boxed) == losses(RunDirectory(project / "runs" / "bare"))
