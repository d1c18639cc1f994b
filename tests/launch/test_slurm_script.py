"""The sbatch scripts as text in the repository, so a review sees changes in them or in NeMo-Run."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import slurm_script
from fiddlehead.launch.slurm import SlurmExecutor, slurm
from fiddlehead.launch.slurm_script import batch_script
from fiddlehead.run.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("nemo_run")

GOLDEN = Path(__file__).parent / "golden"
RUN = RunDirectory(Path("/home/me/project/runs/demo"))
IMAGE = "nvcr.io#nvidia/pytorch:25.10-py3"

CASES: dict[str, SlurmExecutor] = {
    "plain": slurm(partition="batch").fitted(1, "cpu"),
    "torchrun": slurm("research", "h100", nodes=4, time="1-12", exclusive=True, qos="high").fitted(8, "gpu"),
    "srun": slurm("research", "h100", nodes=2, launcher="srun", cpus_per_task=12, requeues=3).fitted(8, "gpu"),
    "pyxis": slurm("research", "h100", container=IMAGE, container_mounts=["/data:/data"]).fitted(8, "gpu"),
    "apptainer": slurm(container="/images/torch.sif", container_runtime="apptainer", requeues=0).fitted(2, "gpu"),
    "ssh": slurm(host="login.example.org", remote_dir="/scratch/me/runs", mem="64G", constraint="a|b").fitted(1, "cpu"),
    "options": slurm(
        gres="gpu:a100:2", nodelist="node[1-2]", exclude="node9", srun_args=["--mpi=pmix"], save_before=0,
        additional_parameters={"reservation": "my maintenance", "mem_per_gpu": "80G"},
    ).fitted(2, "gpu"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch):
    """The paths of the golden scripts."""
    monkeypatch.setattr(Path, "cwd", lambda: Path("/home/me/project"))
    monkeypatch.setenv("FIDDLEHEAD_SECRETS", "/home/me/.config/fiddlehead/secrets")


@pytest.mark.parametrize("name", CASES)
def test_the_sbatch_script_is_the_one_in_the_repository(name: str):
    file = GOLDEN / f"{name}.sh"
    script = batch_script(CASES[name], RUN)
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(script)
    assert script == file.read_text(), "UPDATE_GOLDEN=1 rewrites it, if the change is meant"


@pytest.mark.parametrize("name", CASES)
def test_bash_can_read_it(name: str):
    subprocess.run(["bash", "-n"], input=batch_script(CASES[name], RUN), text=True, check=True)


def srun_words(executor: SlurmExecutor, run: RunDirectory = RUN) -> list[str]:
    """The words of the line that starts the job, as bash reads them."""
    (line,) = [line for line in batch_script(executor, run).splitlines() if line.startswith("srun ")]
    return shlex.split(line)


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_paths_arrive_as_they_are(runtime: str):
    """NeMo-Run quotes none of them, and puts the run directory in place of `/nemo_run`, whose ever that is."""
    run = RunDirectory(Path("/home/me/nemo_run/my $HOME/demo it's"))
    words = srun_words(slurm(), run)
    assert words[words.index("--output") + 1] == str(run.scheduler_log)
    assert words[-2:] == ["bash", str(run.script)]
    words = srun_words(slurm(container="my image.sqsh", container_runtime=runtime, container_mounts=["/a b:/c"]), run)
    assert words[-2:] == ["bash", str(run.script)]
    assert "my image.sqsh" in words
    mounted = words[words.index("--container-mounts") + 1].split(",") if runtime == "pyxis" else words
    for mount in (f"{run.path}:{run.path}", "/a b:/c", "/home/me/project:/home/me/project"):
        assert mount in [word.removeprefix("--bind=") for word in mounted]


def test_the_script_contains_no_variable_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef")
    executor = slurm(env_vars={"MARK": "0123456789"}, secrets=["WANDB_API_KEY"], container=IMAGE)
    run = RunDirectory(tmp_path)
    assert str(executor.secrets_file(run)) not in batch_script(executor, run)
    run.script.write_text(f". {executor.secrets_file(run)}\n")  # what the job's script does if it has any
    script = batch_script(executor, run)
    assert "abcdef" not in script and "0123456789" not in script and "WANDB" not in script
    file = executor.secrets_file(run)
    assert f"rm -f {file}" in script and f"{file}:{file}" in script


def test_the_script_requeues_only_if_the_settings_allow_it():
    assert "#SBATCH --requeue" in batch_script(slurm(), RUN)
    assert "#SBATCH --no-requeue" in batch_script(slurm(requeues=0), RUN)
    assert "TORCHX_MAX_RETRIES=0" in batch_script(slurm(), RUN)


def test_a_job_is_cancelled_if_its_dependency_fails():
    script = batch_script(slurm(), RUN, after=["4", "5"], after_any=["6"])
    assert "#SBATCH --dependency=afterok:4:5,afterany:6\n" in script
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in script
    assert "dependency" not in batch_script(slurm(), RUN)


def test_the_script_asks_slurm_for_a_warning_before_the_time_limit():
    assert "#SBATCH --signal=USR1@300\n" in batch_script(slurm(save_before=300), RUN)


@pytest.mark.parametrize(
    ("settings", "cpus"),
    [
        ({}, 4),  # one for each process that the task starts
        ({"cpus_per_task": 6}, 24),
        ({"exclusive": True}, None),  # the node's
        ({"launcher": "srun"}, None),
        ({"launcher": "srun", "cpus_per_task": 6}, 6),
    ],
)
def test_the_processes_have_cpus(settings: dict, cpus: int | None):
    script = batch_script(slurm(**settings).fitted(4, "cpu"), RUN)
    assert (f"#SBATCH --cpus-per-task={cpus}\n" in script) if cpus else ("SBATCH --cpus-per-task" not in script)
    assert f"#SBATCH --ntasks-per-node={4 if settings.get('launcher') == 'srun' else 1}\n" in script


TRAP = """
scontrol() {{ echo "scontrol $*"; echo "Reason={reason}"; }}; sed() {{ :; }}; sleep() {{ :; }}
head_node=node1 SLURM_JOB_ID={job} SLURM_RESTART_COUNT={restarts}
{setup}
{end}
"""


def ended(
    tmp_path: Path,
    end: str,
    *,
    restarts: int = 0,
    job: int = 17,
    requeues: int = 2,
    state: str = "RUNNING",
    reason: str = "None",
):
    """Runs what goes before the job, in a shell that ends as `end` says; returns what it prints, and its exit code."""
    run = RunDirectory(tmp_path)
    (tmp_path / "status").write_text(f'{{\n  "state": "{state}",\n  "reason": "FAILED"\n}}')
    setup = slurm_script._setup(slurm(requeues=requeues), run)
    script = TRAP.format(setup=setup, end=end, restarts=restarts, job=job, reason=reason)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20)
    assert not done.stderr
    return done.stdout, done.returncode


@pytest.mark.parametrize(
    ("code", "restarts", "state", "again"),
    [
        (75, 0, "INTERRUPTED", True),
        (75, 1, "INTERRUPTED", True),
        (75, 2, "INTERRUPTED", False),  # as often as it may
        (137, 0, "RUNNING", True),
        (137, 0, "FAILED", False),  # another node's process was killed after the end
        (1, 0, "FAILED", False),
        (0, 0, "SUCCEEDED", False),
    ],
)
def test_some_exit_codes_requeue_the_job(tmp_path: Path, code: int, restarts: int, state: str, again: bool):
    output, returned = ended(tmp_path, f"exitcode={code}; exit {code}", restarts=restarts, state=state)
    assert ("scontrol requeue 17" in output) == again
    assert ("not queued again" in output) == (restarts == 2)
    assert returned == code


def test_a_shell_that_slurm_ends_queues_nothing(tmp_path: Path):
    """A cancelled job must not be queued again, and one that is preempted Slurm queues by itself."""
    output, returned = ended(tmp_path, "kill -TERM $$", state="INTERRUPTED")
    assert "requeue" not in output and returned == -15


def test_a_shell_that_slurm_ends_at_the_time_limit_queues_the_job(tmp_path: Path):
    """Slurm does not do that; the run has not left in time, and goes on from its newest checkpoint."""
    output, _ = ended(tmp_path, "kill -TERM $$", reason="TimeLimit")
    assert "scontrol requeue 17" in output
    output, _ = ended(tmp_path, "kill -TERM $$", reason="TimeLimit", state="CANCELLED")
    assert "requeue" not in output.replace("executor.requeues", "")


def test_sigusr1_does_not_end_the_script(tmp_path: Path):
    output, returned = ended(tmp_path, "kill -USR1 $$; exitcode=0; echo on")
    assert (output.splitlines()[-1], returned) == ("on", 0)


def test_each_job_and_attempt_has_its_own_port(tmp_path: Path):
    ports = {
        int(ended(tmp_path, "echo $MASTER_PORT", job=job, restarts=restarts)[0])
        for job in (1, 2, 3)
        for restarts in (0, 1)
    }
    assert len(ports) == 6 and all(20000 <= port < 30000 for port in ports)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"time": "soon"}, "time='soon': is not a time limit; allowed: minutes"),
        ({"time": "2"}, "save_before=120: must be less than time='2'"),
        ({"launcher": "mpi"}, "launcher='mpi': allowed: torchrun, srun"),
        ({"container_runtime": "docker"}, "container_runtime='docker': allowed: pyxis, apptainer"),
        ({"requeues": -1}, "requeues=-1: must be 0 or more"),
        ({"additional_parameters": {"array": "0-3"}}, "additional_parameters.array: a run is one job"),
        ({"additional_parameters": {"time": "9"}}, "additional_parameters.time: is executor.time"),
        ({"additional_parameters": {"--part": "p"}}, "additional_parameters.--part: is executor.partition"),
        ({"additional_parameters": {"job-name": "x"}}, "additional_parameters.job-name: is log.name"),
        ({"additional_parameters": {"export": "NONE"}}, "additional_parameters.export: executor.env_vars"),
        ({"additional_parameters": {"x\n#SBATCH --y": 1}}, "additional_parameters.x"),
        ({"time": 30}, "time=30: expects str, not 30"),
        ({"env_vars": {"OMP_NUM_THREADS": 4}}, "env_vars={'OMP_NUM_THREADS': 4}: expects str, not 4"),
        ({"srun_args": "--mpi=pmix"}, "srun_args='--mpi=pmix': expects Sequence[str]"),
        ({"nodes": True}, "nodes=True: expects"),
        ({"requeues": 2.5}, "requeues=2.5: expects int"),
        ({"partition": "a\n#SBATCH --qos=x"}, "partition='a"),
        ({"host": "there"}, "remote_dir='': must be an absolute path on there"),
        ({"user": "me"}, "user='me': is for a host"),
        ({"gpus": 4}, "unknown setting of slurm 'gpus'"),
        ({"nodes": 0}, "nodes=0: must be 1 or more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_impossible_setting_is_refused(settings: dict, said: str):
    """A job array is among them, because its jobs cannot be told apart."""
    with pytest.raises(ConfigError, match="^" + re.escape(said)):
        slurm(**settings)


def test_all_problems_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        slurm(time="soon", launcher="mpi", nodes=0)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("accelerator", "settings", "gpus"),
    [("gpu", {}, 4), ("cpu", {}, None), ("gpu", {"gres": "gpu:4"}, None), ("gpu", {"gpus_per_node": 8}, 8)],
)
def test_gpus_follow_the_recipe(accelerator: str, settings: dict, gpus: int | None):
    assert slurm(**settings).fitted(4, accelerator).gpus_per_node == gpus


def test_jobs_on_a_node_choose_ports_of_their_own(tmp_path: Path):
    """Whatever their numbers, and whoever else listens."""
    script = batch_script(CASES["plain"], RUN)
    choose = script[script.index("for try in") : script.index("done\n", script.index("for try in"))] + "done\n"
    with socket.socket() as busy, contextlib.ExitStack() as jobs:
        ports = []
        for number in (1, 1, 1 + 798, 1 + 625, 2):  # numbers that are 12768 / 16 apart begin with the same port
            job = subprocess.Popen(
                ["bash", "-c", f'{choose}echo "$MASTER_PORT"; read'], env={**os.environ, "SLURM_JOB_ID": str(number)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            jobs.enter_context(job)
            jobs.callback(job.kill)
            assert job.stdout is not None
            ports.append(int(job.stdout.readline()))
            jobs.callback(Path(f"/tmp/fiddlehead-port-{ports[-1]}").unlink, missing_ok=True)
            if len(ports) == 1:
                busy.bind(("127.0.0.1", ports[0] + 1))
                busy.listen()
        assert len({*ports, busy.getsockname()[1]}) == 6
