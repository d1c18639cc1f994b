"""The script of a job in a real bash: the variables of the job, and its output."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets as random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import secrets
from fiddlehead.launch.code import ship
from fiddlehead.launch.local import LocalExecutor
from fiddlehead.launch.script import job_script
from fiddlehead.launch.slurm import SlurmExecutor
from fiddlehead.recipe import project
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.workers import JOB_VARIABLES
from tests.launch.test_secrets import AWKWARD

JOB = """\
import json, os, sys
from pathlib import Path
seen = {"argv": sys.argv[1:], "cwd": os.getcwd(), "path": sys.path, "executable": sys.executable, "file": __file__}
seen["environment"] = {name: value for name, value in os.environ.items()}
Path(sys.argv[1]).with_name("seen.json").write_text(json.dumps(seen))
print("the job's output")
"""


@dataclass(frozen=True, kw_only=True)
class Cluster(LocalExecutor):
    """Runs here, under Slurm's name."""

    requeues: int = 0

    kind: ClassVar[str] = "slurm"
    start_lines = SlurmExecutor.start_lines
    where_lines = SlurmExecutor.where_lines
    requeue_lines = SlurmExecutor.requeue_lines


@dataclass(frozen=True, kw_only=True)
class Remote(Cluster):
    """Has the run directory elsewhere."""

    def place(self, run: RunDirectory) -> Path:
        return Path("/scratch/my runs") / run.name


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run directory beside a working directory whose `fiddlehead.job` writes down what it sees."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "FIDDLEHEAD_", "PYTHON"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FIDDLEHEAD_SECRETS", str(tmp_path / "secrets"))
    package = tmp_path / "my code" / "fiddlehead"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "job.py").write_text(JOB)
    monkeypatch.chdir(package.parent)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(project, "HOME", str(package.parent))
    run = RunDirectory(tmp_path / "it's runs" / "a")
    run.path.mkdir(parents=True)
    return run


def written(run: RunDirectory, executor: LocalExecutor, **arguments: Any) -> list[str]:
    """Writes the script with the working directory shipped, and returns the command that runs it."""
    copy = ship(Path.cwd(), run.code)
    run.script.write_text(job_script(run, executor, ["my.module"], copy=copy, **arguments))
    return ["bash", str(run.script)]


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd="/", capture_output=True, text=True, timeout=60
    )


def seen(run: RunDirectory, command: list[str], **environment: str) -> dict[str, Any]:
    """What the job saw."""
    result = start(command, **environment)
    assert result.returncode == 0, run.log.read_text()
    return json.loads((run.path / "seen.json").read_text())


def test_the_job_runs_the_shipped_code_where_it_was_launched(run: RunDirectory) -> None:
    command = written(run, LocalExecutor())
    Path("fiddlehead/job.py").write_text("raise SystemExit('the live tree')\n")
    found = seen(run, command, PYTHONPATH="/usr/lib/another")
    assert found["file"] == str(run.code / "fiddlehead" / "job.py")
    assert found["argv"] == [str(run.recipe), "--allow", "my.module"]
    assert found["cwd"] == str(Path.cwd()) and str(Path.cwd()) not in found["path"]
    assert found["path"].index(str(run.code)) < found["path"].index("/usr/lib/another")
    assert found["executable"] == sys.executable


@pytest.mark.parametrize("shipped", [True, False])
def test_the_working_directory_comes_after_all_that_is_installed(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, shipped: bool
) -> None:
    """A file that bears the name of a library's module is not that module in a job either."""
    package = Path("fiddlehead").rename(run.path.parent / "fiddlehead").parent
    for name in ("csv", "json", "sitecustomize", "fiddlehead"):
        Path(f"{name}.py").write_text("raise RuntimeError('the wrong one')\n")
    monkeypatch.setattr(project, "HOME", str(package))
    copy = ship(Path.cwd(), run.code) if shipped else None
    run.script.write_text(job_script(run, LocalExecutor(), ["mine:Model"], copy=copy))
    found = seen(run, ["bash", str(run.script)], PYTHONPATH=str(package))
    here = str(run.code if shipped else Path.cwd())
    assert here not in found["path"] and found["environment"]["FIDDLEHEAD_PROJECT"] == here


def test_without_a_copy_it_runs_the_working_directory(run: RunDirectory) -> None:
    run.script.write_text(job_script(run, LocalExecutor(), [], copy=None))
    assert seen(run, ["bash", str(run.script)])["file"] == str(Path.cwd() / "fiddlehead" / "job.py")


def test_where_the_working_directory_is_missing_the_copy_has_one(run: RunDirectory, monkeypatch) -> None:
    command = written(run, LocalExecutor())
    Path.cwd().rename(run.path.parent / "moved")
    assert seen(run, command)["cwd"] == str(run.code)


def test_variables_and_secrets_arrive_as_they_are(run: RunDirectory) -> None:
    mine = {f"MY_{name}": value for name, value in AWKWARD.items() if name != "BYTES"}
    file = secrets.write(run, AWKWARD)
    environment = seen(run, written(run, LocalExecutor(env_vars=mine), secrets_file=str(file)))["environment"]
    assert {name: environment[name] for name in (*mine, *AWKWARD)} == {**mine, **AWKWARD}


@pytest.mark.parametrize("options", [(), ("-x",), ("-xv",), ("-eux",), ("-o", "posix")])
def test_a_secret_is_nowhere_but_in_its_file_and_the_job(run: RunDirectory, options: tuple[str, ...]) -> None:
    secret = random.token_hex(16)
    file = secrets.write(run, {"MY_TOKEN": f"{secret} and\nmore"})
    digest = hashlib.sha256(secret.encode()).hexdigest()
    text = f"import hashlib, os; assert hashlib.sha256(os.environ['COPIED'][:32].encode()).hexdigest() == '{digest}'\n"
    Path("fiddlehead/job.py").write_text(text)
    executor = LocalExecutor(setup_lines='export COPIED="$MY_TOKEN"', env_vars={"A": "1"})
    command = written(run, executor, secrets_file=str(file))
    result = start([command[0], *options, command[1]], **({} if options else {"SHELLOPTS": "xtrace"}))
    assert result.returncode == 0, run.log.read_text()
    assert secret not in result.stdout + result.stderr
    for path in run.path.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path


def test_a_missing_secrets_file_is_reported(run: RunDirectory) -> None:
    file = secrets.write(run, {"A": "1"})
    command = written(run, LocalExecutor(), secrets_file=str(file))
    secrets.remove(run)
    assert "A" not in seen(run, command)["environment"]
    assert f"warning: the secrets in {file} are gone" in run.log.read_text()


@pytest.mark.parametrize(
    ("environment", "log"),
    [
        ({}, "log.txt"),
        ({"SLURM_NODEID": "2", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NUM_NODES": "3"},
         "logs/node-2.txt"),
        ({"SLURM_NODEID": "1", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"},
         "logs/rank-5.txt"),
        ({"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"},
         "log.txt"),
    ],
)  # fmt: skip
def test_each_attempt_is_appended_under_a_line_of_its_own(
    run: RunDirectory, environment: dict[str, str], log: str
) -> None:
    command = written(run, Cluster())
    file = run.path / log
    file.parent.mkdir(exist_ok=True)
    file.write_text("an earlier attempt, kil")
    for restart in ("0", "2"):
        job = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": restart, **environment}
        assert start(command, **job).stdout == ""
    lines = file.read_text().splitlines()
    time_and_host = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} on \S+"
    assert lines[0] == "an earlier attempt, kil"
    assert re.fullmatch(rf"=== started {time_and_host} \(slurm job 17\)", lines[1])
    assert re.fullmatch(rf"=== started {time_and_host} \(slurm job 17, restart 2\)", lines[3])
    assert lines[2] == lines[4] == "the job's output" and len(lines) == 5


def test_a_launchers_own_slurm_job_is_not_the_jobs(run: RunDirectory) -> None:
    command = written(run, LocalExecutor())
    around = dict.fromkeys((*JOB_VARIABLES, "MASTER_ADDR", "SLURM_NODEID", "SLURM_PROCID", "SLURM_JOB_ID"), "1")
    found = seen(run, command, **around)
    assert not set(around) & set(found["environment"])
    assert run.log.read_text().splitlines()[0].endswith(" (local)")


def test_requeues_are_for_slurm(run: RunDirectory) -> None:
    command = written(run, Cluster(requeues=5))
    assert seen(run, command, SLURM_JOB_ID="3")["environment"]["FIDDLEHEAD_REQUEUES"] == "5"
    assert "FIDDLEHEAD_REQUEUES" not in seen(run, command)["environment"]
    assert run.log.read_text().splitlines()[2].endswith(" (by hand)")


def test_the_lock_counts_only_while_a_launcher_has_it(run: RunDirectory) -> None:
    """By hand, nobody holds it, and the job would end at once."""
    command = written(run, LocalExecutor(), lock=run.launcher_lock)
    assert "FIDDLEHEAD_LAUNCHER_LOCK" not in seen(run, command)["environment"]
    with run.launcher_lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert seen(run, command)["environment"]["FIDDLEHEAD_LAUNCHER_LOCK"] == str(run.launcher_lock)
        fcntl.flock(file, fcntl.LOCK_SH)  # an earlier job, which saw its launcher end, and ends too
        assert "FIDDLEHEAD_LAUNCHER_LOCK" not in seen(run, command)["environment"]


def test_a_user_without_a_name_or_home_gets_them(run: RunDirectory) -> None:
    command = ["env", "-u", "USER", "-u", "LOGNAME", "-u", "HOME", *written(run, LocalExecutor())]
    environment = seen(run, command)["environment"]
    assert environment["USER"] == environment["LOGNAME"] == subprocess.check_output(["id", "-un"], text=True).strip()
    assert environment["HOME"] not in ("", "/") and os.access(environment["HOME"], os.W_OK)
    os.rmdir(environment["HOME"])
    own = seen(run, written(run, LocalExecutor()), USER="me", LOGNAME="you", HOME="/tmp")["environment"]
    assert (own["USER"], own["LOGNAME"], own["HOME"]) == ("me", "you", "/tmp")


@pytest.mark.parametrize("kind", ["absent", "its base is gone"])
def test_a_missing_interpreter_is_said_in_one_sentence(run: RunDirectory, tmp_path: Path, kind: str) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    if kind != "absent":
        python.parent.mkdir(parents=True)
        python.symlink_to("/opt/gone/python3.11")
    result = start(written(run, LocalExecutor(python=str(python))))
    assert result.returncode == 2
    host = os.uname().nodename
    said = run.log.read_text().splitlines()[1:]
    assert said == [
        f"error: executor.python: there is no Python {python} on {host}; set executor.python to one that is there, or "
        "executor.setup_lines to what provides one"
    ]


def test_an_interpreter_without_this_package_is_said(run: RunDirectory) -> None:
    Path("fiddlehead/__init__.py").write_text("import nothing_of_the_kind\n")
    result = start(written(run, LocalExecutor()))
    assert result.returncode == 2
    assert (
        "cannot import fiddlehead (ModuleNotFoundError: No module named 'nothing_of_the_kind');" in run.log.read_text()
    )


def test_an_environment_that_setup_lines_activate_is_used(run: RunDirectory, tmp_path: Path) -> None:
    activated = tmp_path / "other" / "bin"
    activated.mkdir(parents=True)
    (activated / "python").symlink_to(sys.executable)
    executor = LocalExecutor(setup_lines=f'echo "in $PWD"\nPATH={activated}:$PATH\n')
    assert seen(run, written(run, executor))["executable"] == str(activated / "python")
    assert f"in {Path.cwd()}" in run.log.read_text()
    named = LocalExecutor(setup_lines=executor.setup_lines, python=sys.executable)
    assert seen(run, written(run, named))["executable"] == sys.executable


def test_where_the_launchers_interpreter_is_missing_the_nodes_is_used(run: RunDirectory, tmp_path, monkeypatch) -> None:
    activated = tmp_path / "bin"
    activated.mkdir()
    (activated / "python3").symlink_to(sys.executable)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/opt/launcher/bin/python")
        command = written(run, LocalExecutor())
    found = seen(run, command, PATH=f"{activated}:/usr/bin:/bin")
    assert found["executable"] != "/opt/launcher/bin/python"
    assert "as /opt/launcher/bin/python is not on" in run.log.read_text()


@pytest.mark.parametrize(("requeues", "exit_code"), [(3, 75), (0, 130)])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_before_python_runs(run: RunDirectory, requeues: int, exit_code: int, signum: int) -> None:
    command = written(run, Cluster(setup_lines="echo waiting; sleep 0.5", requeues=requeues))
    process = subprocess.Popen(command, env={**os.environ, "SLURM_JOB_ID": "3"})
    while not run.log.exists() or "waiting" not in run.log.read_text():
        time.sleep(0.01)
    process.send_signal(signum)
    assert process.wait(10) == exit_code
    assert "the job's output" not in run.log.read_text()


def test_a_warning_signal_does_not_kill_python_before_it_listens(run: RunDirectory) -> None:
    Path("fiddlehead/job.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')")
    assert start(written(run, LocalExecutor())).returncode == 0
    assert run.log.read_text().endswith("alive\n")


def test_all_paths_of_the_run_directory_are_the_jobs(run: RunDirectory) -> None:
    copy = ship(Path.cwd(), run.code)
    text = job_script(run, Remote(), [], copy=copy, secrets_file="/home/me/secrets/a", lock=run.launcher_lock)
    assert str(run.path) not in text.replace("'\"'\"'", "'")
    assert text.splitlines()[-1] == "exec \"$_python\" -u -m fiddlehead.job '/scratch/my runs/a/recipe.yaml'"
    assert "PYTHONPATH='/scratch/my runs/a/code'" in text


def test_a_path_that_python_cannot_have_is_refused(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a:b").mkdir()
    monkeypatch.chdir("a:b")
    job_script(run, LocalExecutor(), [], copy=None)
    monkeypatch.setattr(project, "HOME", str(Path.cwd()))
    with pytest.raises(ConfigError, match="a:b' has a colon in it"):
        job_script(run, LocalExecutor(), [], copy=None)


NSYS = f"""\
#!{sys.executable}
import os, sys
print("nsys", *sys.argv[1:], flush=True)
os.execvp(sys.argv[9], sys.argv[9:])
"""


@pytest.mark.parametrize("rank", ["0", "3"])
def test_the_first_node_s_job_runs_under_nsys_if_steps_are_to_be_profiled(
    run: RunDirectory, tmp_path: Path, rank: str
) -> None:
    """A stand-in for nsys prints its arguments, and runs the program that follows them."""
    stand_in = tmp_path / "tools" / "nsys"
    stand_in.parent.mkdir()
    stand_in.write_text(NSYS)
    stand_in.chmod(0o700)
    executor = Cluster(setup_lines=f"PATH={stand_in.parent}:$PATH")
    run.script.write_text(job_script(run, executor, [], copy=None, nsys="10:12"))
    found = seen(run, ["bash", str(run.script)], SLURM_PROCID=rank, SLURM_JOB_ID="3")
    assert found["argv"] == [str(run.recipe)]
    said = [line for line in run.log.read_text().splitlines() if line.startswith("nsys ")]
    folder = run.path / "profile"
    expected = (
        "nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --capture-range=cudaProfilerApi "
        f"--capture-range-end=stop --force-overwrite=true --output={folder}/nsys-steps-10-12 {sys.executable} -u -m "
        f"fiddlehead.job {run.recipe}"
    )
    assert said == ([expected] if rank == "0" else []) and folder.exists() == (rank == "0")


def test_a_node_without_nsys_says_so(run: RunDirectory) -> None:
    run.script.write_text(job_script(run, LocalExecutor(), [], copy=None, nsys="10:12"))
    assert start(["bash", str(run.script)], PATH="/usr/bin:/bin").returncode == 2
    assert "error: log.nsys: there is no nsys on " in run.log.read_text()
