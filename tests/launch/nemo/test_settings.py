"""NeMo-Run's executors become ours, field by field, or are refused field by field."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from nemo_run.core.execution.launcher import FaultTolerance

from fiddlehead.cli.common import configure_executor
from fiddlehead.errors import ConfigError
from fiddlehead.launch import plan
from fiddlehead.launch.docker import DockerExecutor, docker
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.local import LocalExecutor, local
from fiddlehead.launch.nemo.accept import accepted
from fiddlehead.launch.nemo.fields import KINDS, PARTS
from fiddlehead.launch.nemo.settings import table
from fiddlehead.launch.slurm import SlurmExecutor, slurm
from fiddlehead.launch.slurm_script import batch_script
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run.directory import RunDirectory

PAGE = Path(__file__).parents[3] / "docs" / "nemo_run.md"


def of_slurm(**settings: Any) -> SlurmExecutor:
    return SlurmExecutor.of_nemo_run(run.SlurmExecutor(account="me", **settings))


def refused(executor: Any, kind: type[Executor] = SlurmExecutor) -> str:
    with pytest.raises(ConfigError) as error:
        kind.of_nemo_run(executor)
    return str(error.value)


@pytest.mark.parametrize("name", PARTS)
def test_every_field_that_nemo_run_has_is_in_the_table(name: str) -> None:
    module, _, kind = name.rpartition(".")
    fields = dataclasses.fields(getattr(importlib.import_module(module), kind))
    assert {field.name for field in fields} == set(PARTS[name])


def test_the_page_shows_the_table() -> None:
    begin, end = "<!-- the table: UPDATE_GOLDEN=1 writes it -->\n", "<!-- its end -->\n"
    before, rest = PAGE.read_text().split(begin)
    shown, after = rest.split(end)
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(f"{before}{begin}\n{table()}\n{end}{after}")
        return
    assert shown.strip() == table().strip()


def made(name: str) -> Any:
    """An executor of NeMo-Run's with its default settings."""
    module, _, kind = name.rpartition(".")
    required = {"slurm": {"account": "me"}, "docker": {"container_image": "image"}}.get(KINDS[name], {})
    return getattr(importlib.import_module(module), kind)(**required)


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in KINDS for field in PARTS[name] if PARTS[name][field].refused]
)
def test_a_field_that_cannot_be_had_is_refused_by_name(name: str, field: str) -> None:
    executor = made(name)
    setattr(executor, field, 7)
    with pytest.raises(ConfigError, match=rf"^{field}=7: .+") as error:
        accepted(executor)
    assert len(error.value.problems) == 1


def test_an_executor_with_default_settings_becomes_one_with_ours() -> None:
    ours = [accepted(made(name)) for name in KINDS]
    # NeMo-Run asks for ten minutes, and starts its tasks by srun.
    assert ours == [local(), docker("image"), slurm("me", nodes=1, time="00:10:00", launcher="srun")]


def test_the_executors_of_nemo_run_s_pages_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    cluster = run.SlurmExecutor(
        account="your-account",
        partition="your-partition",
        ntasks_per_node=8,
        gpus_per_node=8,
        nodes=4,
        tunnel=run.SSHTunnel(host="your-slurm-host", user="your-user", job_dir="/runs", identity="/keys/mine"),
        container_image="nvcr.io/nvidia/nemo:24.12",
        time="00:30:00",
        env_vars={"TORCH_NCCL_AVOID_RECORD_STREAMS": "1", "HF_TOKEN": "secret"},
        container_mounts=["/data:/data"],
        packager=run.GitArchivePackager(),
        mem="0",
        exclusive=True,
        gres="gpu:8",
        srun_args=["--mpi=pmix"],
        retries=2,
    )
    assert accepted(cluster) == slurm(
        "your-account", "your-partition", 4, 8, "00:30:00", "nvcr.io/nvidia/nemo:24.12",
        ntasks_per_node=8, host="your-slurm-host", user="your-user", remote_dir="/runs", identity="/keys/mine",
        env_vars={"TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}, secrets=["HF_TOKEN"], container_mounts=["/data:/data"],
        mem="0", exclusive=True, gres="gpu:8", srun_args=["--mpi=pmix"], launcher="srun", requeues=2,
    )  # fmt: skip
    box = run.DockerExecutor(
        container_image="python:3.12",
        num_gpus=-1,
        runtime="nvidia",
        ipc_mode="host",
        shm_size="30g",
        volumes=["/local/path:/path/in/container"],
        env_vars={"PYTHONUNBUFFERED": "1"},
        packager=run.Packager(),
    )
    assert accepted(box) == docker(
        "python:3.12", 0, ["/local/path:/path/in/container"],
        shm_size="30g", env_vars={"PYTHONUNBUFFERED": "1"},
        additional_kwargs={"runtime": "nvidia", "ipc_mode": "host"},
    )  # fmt: skip
    here = run.LocalExecutor(ntasks_per_node=2, launcher="torchrun", env_vars={"NCCL_DEBUG": "WARN"})
    assert accepted(here) == local(2, env_vars={"NCCL_DEBUG": "WARN"})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"launcher": "torchrun", "ntasks_per_node": 8, "cpus_per_task": 64},
         {"launcher": "torchrun", "ntasks_per_node": 8, "cpus_per_task": 8}),
        ({"launcher": run.Torchrun(), "gpus_per_task": 4}, {"ntasks_per_node": 4, "gpus_per_node": 4}),
        ({"gpus_per_task": 1, "ntasks_per_node": 4, "cpus_per_task": 6}, {"gpus_per_node": 4, "cpus_per_task": 6}),
        ({"torchrun_nproc_per_node": 2, "launcher": "torchrun"}, {"ntasks_per_node": 2}),
        ({"signal": "B:SIGUSR1@90"}, {"save_before": 90}),
        ({"signal": "TERM"}, {"save_before": 60}),
        ({"time": "00:01:00"}, {"save_before": 30}),  # the default would be longer than that
        ({"container_env": ["A", "B"]}, {"srun_args": ["--container-env=A,B"]}),
        ({"segment": 4, "network": "sharp", "comment": "mine"},
         {"additional_parameters": {"segment": 4, "network": "sharp", "comment": "mine"}}),
        ({"mem_per_gpu": "80G", "additional_parameters": {"reservation": "r"}},
         {"additional_parameters": {"mem_per_gpu": "80G", "reservation": "r"}}),
        ({"setup_lines": "module load cuda", "job_name_prefix": "llm-"},
         {"setup_lines": "module load cuda", "job_name_prefix": "llm-"}),
        ({"tunnel": run.LocalTunnel(job_dir="/anywhere"), "packager": run.Packager()}, {"host": None}),
    ],
)  # fmt: skip
def test_a_field_of_slurm_s_becomes_ours(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    found = of_slurm(**theirs)
    assert {name: getattr(found, name) for name in ours} == ours


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"launcher": "ft"}, r"launcher='ft': a run that fails or is killed is queued again"),
        ({"launcher": FaultTolerance()}, r"launcher='FaultTolerance': a run that fails"),
        ({"launcher": run.Torchrun(rdzv_port=7)}, r"launcher.rdzv_port=7: each job finds"),
        ({"launcher": run.Torchrun(nsys_profile=True)}, r"launcher.nsys_profile=True: log.nsys"),
        ({"packager": run.GitArchivePackager(ref="v1", subpath="src")}, r"packager.ref='v1': .*\n?"),
        ({"packager": run.PatternPackager(include_pattern="/etc/*", relative_path="/etc")}, "include_pattern='/etc"),
        ({"exclusive": "user"}, r"exclusive='user'"),
        ({"gpus_per_task": 2, "ntasks_per_node": 4}, r"gpus_per_task=2: .*gpus_per_node=8"),
        ({"launcher": "torchrun", "ntasks_per_node": 8, "cpus_per_task": 12}, r"cpus_per_task=12: cannot be divided"),
        ({"signal": "USR1@soon"}, "signal='USR1@soon'"),
        ({"env_vars": ["A=1"]}, r"env_vars=\['A=1'\]: is not of the field's type, dict"),
        ({"env_vars": {"WANDB_API_KEY": "typed in"}}, r"env_vars.WANDB_API_KEY: .*export it where you launch"),
        ({"additional_parameters": {"dependency": "afterok:1"}}, r"additional_parameters.dependency: --after"),
        ({"tunnel": run.SSHTunnel(host="h", user="u", job_dir="/r", pre_command="x")}, r"tunnel.pre_command='x'"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_had_says_what_to_use_instead(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=said):
        of_slurm(**settings)


def test_a_field_that_is_empty_is_not_refused() -> None:
    assert of_slurm(array="", dependencies=None) == of_slurm()


def test_all_that_cannot_be_had_is_said_at_once() -> None:
    said = refused(run.SlurmExecutor(account="me", array="0-3", heterogeneous=True, dependencies=["slurm://x/1"]))
    assert [line.split("=")[0] for line in said.splitlines()] == ["array", "heterogeneous", "dependencies"]


def test_files_that_git_ignores_are_not_said_to_be_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    Path("kept").mkdir()
    Path("kept/code.py").touch()
    Path("kept/tokens.bin").touch()
    packager = run.PatternPackager(include_pattern=str(tmp_path / "kept"), relative_path=str(tmp_path))
    assert of_slurm(packager=packager)
    Path(".gitignore").write_text("*.bin\n")
    both = run.HybridPackager(sub_packagers={"code": run.GitArchivePackager(), "more": packager})
    assert "git ignores" in refused(run.SlurmExecutor(account="me", packager=packager))
    assert "sub_packagers.include_pattern" in refused(run.SlurmExecutor(account="me", packager=both))


def test_a_field_of_a_newer_nemo_run_is_refused_until_it_is_known() -> None:
    @dataclass(kw_only=True)
    class Newer(run.LocalExecutor):
        colour: str = "red"

    assert LocalExecutor.of_nemo_run(Newer()) == local()
    assert refused(Newer(colour="blue"), LocalExecutor).startswith("colour='blue': ")
    assert "is not a nemo_run.DockerExecutor" in refused(run.LocalExecutor(), DockerExecutor)


def test_the_prefix_of_a_job_s_name_is_in_slurm_s_script(tmp_path: Path) -> None:
    script = batch_script(of_slurm(job_name_prefix="llm-").fitted(1, "cpu"), RunDirectory(tmp_path / "first"))
    assert "#SBATCH --job-name=llm-first\n" in script


def test_limits_of_a_container_are_those_of_its_engine() -> None:
    ours = DockerExecutor.of_nemo_run(run.DockerExecutor(container_image="i", ulimits=["memlock=-1", "nofile:9:10"]))
    assert ours.additional_kwargs["ulimits"] == [
        {"Name": "memlock", "Soft": -1, "Hard": -1},
        {"Name": "nofile", "Soft": 9, "Hard": 10},
    ]
    said = refused(run.DockerExecutor(container_image="i", additional_kwargs={"detach": False}), DockerExecutor)
    assert said == "additional_kwargs.detach: the launcher decides it"
    said = refused(run.DockerExecutor(container_image="i", additional_kwargs={"tmpfs": {"/x"}}), DockerExecutor)
    assert said.startswith("additional_kwargs: cannot be written down with the run: ")


def test_a_plan_takes_an_executor_of_nemo_run_s() -> None:
    recipe = tiny_test()
    assert plan(recipe, run.LocalExecutor(ntasks_per_node=2)).executor == local(2)
    assert plan(recipe, run.Config(run.LocalExecutor, ntasks_per_node=2)).executor == local(2)
    problems = plan(recipe, run.LocalExecutor(retries=2)).problems
    assert [problem.path for problem in problems] == ["executor.retries"]


@pytest.mark.parametrize(
    "function",
    [
        "def theirs(nodes: int = 1) -> run.SlurmExecutor:\n"
        "    made = run.SlurmExecutor(account='me', nodes=nodes)\n    return made",
        "def theirs(nodes: int = 1):\n    return run.SlurmExecutor(account='me', nodes=nodes)",
        "def theirs(nodes: int = 1) -> run.Config[run.SlurmExecutor]:\n"
        "    return run.Config(run.SlurmExecutor, account='me', nodes=nodes)",
        "@run.cli.factory\n@run.autoconvert\ndef theirs(nodes: int = 1) -> run.SlurmExecutor:\n"
        "    return run.SlurmExecutor(account='me', nodes=nodes)",
    ],
)  # fmt: skip
def test_the_command_line_names_a_function_that_returns_one_of_nemo_run_s(
    function: str, working_directory: Path
) -> None:
    Path("launch").mkdir()
    Path("launch/mine.py").write_text(f"import nemo_run as run\n\n\n{function}\n")
    for name in ("theirs", "launch.mine:theirs"):
        executor, _ = configure_executor([f"executor={name}", "executor.nodes=3", "executor.partition=b"])
        assert isinstance(executor, SlurmExecutor) and (executor.nodes, executor.partition) == (3, "b")


def test_an_edit_by_nemo_run_s_name_says_what_is_meant_here() -> None:
    with pytest.raises(ConfigError) as error:
        configure_executor(["executor=slurm", "executor.container_image=x", "executor.array=0-3"])
    assert str(error.value).splitlines() == [
        "executor.container_image: is a field of NeMo-Run's executor; here it is `container`",
        "executor.array: is a field of NeMo-Run's executor; here it is refused: a run is one job; --sweep, or a loop, "
        "makes several runs",
    ]
