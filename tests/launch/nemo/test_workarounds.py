"""NeMo-Run still needs each workaround in launch/nemo/: if a test fails, remove that workaround."""

from __future__ import annotations

import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what NeMo-Run imports
    import nemo_run
    from nemo_run.core.execution import docker, slurm
    from nemo_run.core.tunnel import client
    from nemo_run.run.torchx_backend.schedulers import api
    from nemo_run.run.torchx_backend.schedulers.local import PersistentLocalScheduler


def script(command: str = "true", folder: str = "/", **settings: Any) -> str:
    executor = slurm.SlurmExecutor(
        **{"account": "", "partition": "batch", "nodes": 1, "ntasks_per_node": 1, **settings},
        job_details=slurm.SlurmJobDetails(job_name="name", folder="/runs/name"),
        tunnel=slurm.LocalTunnel(job_dir=folder),
    )
    executor.job_dir = "nemo_run"
    request = slurm.SlurmBatchRequest(
        launch_cmd=["sbatch"], jobs=["name"], command_groups=[[command]], executor=executor, max_retries=0, extra_env={}
    )
    return request.materialize()


def test_words_of_the_srun_line_are_not_quoted() -> None:
    assert "--comment=two words" in script(srun_args=["--comment=two words"])
    assert "/images/two words.sqsh" in script(container_image="/images/two words.sqsh")


def test_without_a_container_the_job_would_begin_in_a_folder_of_nemo_run_s() -> None:
    assert "--chdir /nemo_run/code" in script()


def test_a_job_without_an_account_asks_for_an_empty_one() -> None:
    assert "#SBATCH --account=''\n" in script()


def test_a_folder_called_nemo_run_is_rewritten_wherever_it_is() -> None:
    assert "/home/me/runs/nemo_run/x" in script("/home/me/nemo_run/x", folder="/runs")


def test_a_container_would_run_its_command_in_a_pipeline_within_quotes() -> None:
    class Client:
        class containers:  # noqa: N801
            run = staticmethod(lambda image, command, **options: {"command": command, **options})

    executor = docker.DockerExecutor(container_image="image", network="host")
    executor.experiment_id = "name"
    container = docker.DockerContainer(name="name", command=["say", '"x"'], executor=executor, extra_env={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docker, "ensure_network", lambda **_: None)
        started: Any = container.run(Client(), "label")  # type: ignore[arg-type]
    assert started["command"].startswith('bash -c "say "x" 2>&1 | tee -a ')
    assert started["hostname"] == "name", "which the machine's own network cannot resolve"


def test_local_jobs_end_with_their_launcher() -> None:
    assert nemo_run.LocalExecutor not in nemo_run.Experiment._DETACH_SUPPORTED_EXECUTORS
    assert "kill" in inspect.getsource(PersistentLocalScheduler.close)


def test_an_experiment_takes_the_program_s_log_handlers(tmp_path: Path) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        root.handlers.clear()
        made = nemo_run.Experiment("x", executor=nemo_run.LocalExecutor(), base_dir=str(tmp_path), log_level="ERROR")
        assert (root.handlers, root.level) != ([], level)
        del made
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_a_tunnel_that_is_not_let_in_leaves_the_program() -> None:
    assert "sys.exit(" in inspect.getsource(client.SSHTunnel._authenticate)


def test_a_subclass_of_an_executor_has_no_scheduler() -> None:
    class Mine(nemo_run.LocalExecutor):
        pass

    with pytest.raises(KeyError):
        api.get_executor_str(Mine())
    assert "x in self._PARALLEL_SUPPORTED_EXECUTORS" in inspect.getsource(nemo_run.Experiment._run_dag)


def test_an_experiment_that_is_left_ends_its_jobs_even_if_it_is_detached() -> None:
    assert "finally:" in (source := inspect.getsource(nemo_run.Experiment.__exit__))
    assert source.index("self.detach:") < source.index("finally:") < source.index("self._cleanup(")
    assert "self._runner.close()" in inspect.getsource(nemo_run.Experiment._cleanup)
