"""Jobs on a real Slurm cluster, from here and over SSH, with shell scripts instead of training."""

from __future__ import annotations

import getpass
import importlib
import os
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import shell
from fiddlehead.launch.slurm import SlurmExecutor, slurm
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status, StopRequest

pytestmark = pytest.mark.slurm

SAY = """say() {{
    printf '{{"state": "%s", "executor": "slurm", "exit_code": %s}}' $1 $2 > {place}/status.$SLURM_NODEID
    mv {place}/status.$SLURM_NODEID {place}/status
}}
cd {place}; exec >> log.txt 2>&1; echo "restart ${{SLURM_RESTART_COUNT:-0}}"
"""


@pytest.fixture(autouse=True, scope="module")
def cluster():
    """Any cluster will do: no test disturbs other jobs."""
    if subprocess.run("sinfo && squeue", shell=True, capture_output=True).returncode:
        pytest.skip("needs a Slurm cluster: tests/sandbox/slurm.sh starts one")
    with warnings.catch_warnings():  # of what NeMo-Run imports
        warnings.simplefilter("ignore")
        importlib.import_module("nemo_run")


@dataclass
class Jobs:
    """Runs whose job is a shell script."""

    folder: Path
    executor: SlurmExecutor
    sent: list[RunDirectory]

    def prepare(self, name: str, script: str, executor: SlurmExecutor | None = None) -> RunDirectory:
        """A run directory, ready for submission; `say STATE CODE` in the script writes the status."""
        executor = executor or self.executor
        run = RunDirectory(self.folder / name)
        run.path.mkdir(parents=True, exist_ok=True)
        run.recipe.touch()
        with run.command.open("a") as command:
            command.write("by a test\n")
        run.write_status(Status(State.PENDING, executor="slurm", started=time.time()))
        run.script.write_text(SAY.format(place=f"'{executor.place(run)}'") + script)
        executor.save(run)
        return run

    def submit(self, name: str, script: str, after: list[RunDirectory] | None = None, **settings) -> RunDirectory:
        """Sends such a run off."""
        executor = replace(self.executor, **settings)
        run = self.prepare(name, script, executor)
        executor.check(run)
        job_id = executor.submit(run, after=[before.job_id for before in after or ()])
        (run.path / "job_id").write_text(job_id + "\n")
        self.sent.append(run)
        return run

    def state(self, run: RunDirectory) -> Status:
        (status,) = self.executor.states([run])
        assert status is not None
        return status

    def wait(self, run: RunDirectory, *states: State, seconds: float = 60) -> Status:
        """Waits until a run is in one of these states, or has ended."""
        deadline = time.monotonic() + seconds
        while not ((status := self.state(run)).state in states or status.state.ended):
            assert time.monotonic() < deadline, f"{status}\n{everything(run)}"
            time.sleep(0.3)
        assert not states or status.state in states, f"{status}\n{everything(run)}"
        return status

    def printed(self, run: RunDirectory, text: str, times: int = 1, seconds: float = 60) -> None:
        """Waits until a run's log has this text, so many times."""
        deadline = time.monotonic() + seconds
        while not run.log.exists() or run.log.read_text().count(text) < times:
            assert time.monotonic() < deadline, f"{self.state(run)}\n{everything(run)}"
            self.state(run)  # over SSH, that is what brings the log
            time.sleep(0.3)


def everything(run: RunDirectory) -> str:
    """What a run and its script printed."""
    return "\n".join(file.read_text() for file in (run.scheduler_log, run.log) if file.exists())


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    monkeypatch.setenv("FIDDLEHEAD_SECRETS", str(tmp_path / "secrets"))
    jobs = Jobs(tmp_path / "my runs", slurm(time="5").fitted(1, "cpu"), [])
    yield jobs
    if jobs.sent:
        subprocess.run(["scancel", *(run.job_id for run in jobs.sent)], check=True)


def test_a_job_runs_and_ends(jobs: Jobs):
    run = jobs.submit("good", "say RUNNING null; sleep 2; say SUCCEEDED 0")
    assert jobs.wait(run, State.RUNNING).state is State.RUNNING
    assert jobs.wait(run).state is State.SUCCEEDED
    assert run.log.read_text() == "restart 0\n"
    deadline = time.monotonic() + 20
    while "job exited with code 0" not in run.scheduler_log.read_text():  # the script ends after the run
        assert time.monotonic() < deadline, everything(run)
        time.sleep(0.1)


def test_the_end_of_a_job_is_known_even_if_it_wrote_no_status(jobs: Jobs):
    failed = jobs.submit("failed", "say RUNNING null; exit 3")
    killed = jobs.submit("killed", "say RUNNING null; kill -9 $$", requeues=0)
    quiet = jobs.submit("quiet", "exit 0")
    refused = jobs.submit("refused", "echo 'error: executor.python: there is none'; exit 2")
    status = jobs.wait(failed)
    assert (status.state, status.exit_code) == (State.FAILED, 3)
    assert jobs.wait(killed).state is State.DIED
    assert jobs.wait(quiet).state is State.SUCCEEDED
    assert jobs.wait(refused).reason == "executor.python: there is none"


def test_exit_code_75_requeues_a_job_which_is_pending_meanwhile(jobs: Jobs):
    again = 'if [ "${SLURM_RESTART_COUNT:-0}" -lt 1 ]; then say INTERRUPTED 75; exit 75; fi; say SUCCEEDED 0'
    run = jobs.submit("again", again)
    never = jobs.submit("never", "say INTERRUPTED 75; exit 75", requeues=0)
    assert jobs.wait(run, State.PENDING, State.INTERRUPTED)
    assert jobs.wait(run, seconds=180).state is State.SUCCEEDED
    assert run.log.read_text() == "restart 0\nrestart 1\n"
    status = jobs.wait(never)
    assert status.state is State.FAILED and "requeue limit reached" in status.reason


def test_the_warning_signal_reaches_the_job_and_does_not_end_it(jobs: Jobs):
    """Slurm's own, sent as `--signal` does, and one for every process of the job."""
    catch = "trap 'echo caught' USR1; say RUNNING null; echo ready; for _ in $(seq 60); do sleep 0.5; done"
    run = jobs.submit("warned", catch)
    jobs.printed(run, "ready")
    for count, full in enumerate(([], ["--full"]), start=1):
        subprocess.run(["scancel", "--signal=USR1", *full, run.job_id], check=True)
        jobs.printed(run, "caught", count)
    assert jobs.state(run).state is State.RUNNING


@pytest.mark.slow
def test_a_job_that_does_not_leave_in_time_is_queued_again_too(jobs: Jobs):
    stubborn = (
        "say RUNNING null; trap '' TERM USR1; if [ -z $SLURM_RESTART_COUNT ]; then sleep 300; fi; say SUCCEEDED 0"
    )
    run = jobs.submit("stubborn", stubborn, time="1", save_before=10)
    assert jobs.wait(run, seconds=240).state is State.SUCCEEDED
    assert run.log.read_text() == "restart 0\nrestart 1\n"


def test_the_two_nodes_know_each_other_and_a_failed_one_does_not_kill_the_other(jobs: Jobs):
    script = """
echo "$SLURM_NODEID of $SLURM_NNODES at $MASTER_ADDR:$MASTER_PORT" > node-$SLURM_NODEID
if [ $SLURM_NODEID = 1 ]; then exit 1; fi
sleep 3; say SUCCEEDED 0; echo saved"""
    run = jobs.submit("two", script, nodes=2)
    jobs.printed(run, "saved")
    first, second = ((run.path / f"node-{node}").read_text() for node in (0, 1))
    assert first.removeprefix("0") == second.removeprefix("1")
    assert first.startswith("0 of 2 at ") and socket.getaddrinfo(first.split()[-1].split(":")[0], None)


@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", ["0"]), ("srun", ["0", "1", "2"])])
def test_the_requested_number_of_processes_is_started(jobs: Jobs, launcher: str, ranks: list[str]):
    run = jobs.submit("ranks", "echo rank $SLURM_PROCID", launcher=launcher, ntasks_per_node=3)
    jobs.wait(run)
    assert sorted(line.split()[1] for line in run.log.read_text().splitlines() if line.startswith("rank")) == ranks


def test_secrets_are_not_in_the_jobs_environment_and_their_file_is_removed(jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef123")
    monkeypatch.setenv("MINE", "abcdef456")
    executor = replace(jobs.executor, secrets=("MINE",))
    run = jobs.prepare("hidden", "")
    file = Path(executor.deliver_secrets(run, {"MINE": "abcdef456"}))
    assert file.stat().st_mode & 0o777 == 0o600
    run = jobs.submit("hidden", f"test -r {file} && env && say SUCCEEDED 0 && sleep 1", secrets=("MINE",))
    jobs.wait(run, State.SUCCEEDED)
    jobs.printed(run, "SLURM_JOB_ID")
    assert "abcdef" not in everything(run)
    deadline = time.monotonic() + 20
    while file.exists():  # the script removes it, whoever asks for the state
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_jobs_that_wait_for_a_failed_job_are_cancelled(jobs: Jobs):
    parent = jobs.submit("parent", "sleep 3; say FAILED 1; exit 1")
    child = jobs.submit("child", "say SUCCEEDED 0", after=[parent])
    grandchild = jobs.submit("grandchild", "say SUCCEEDED 0", after=[child])
    assert jobs.state(grandchild).state is State.PENDING
    for run in (child, grandchild):
        assert jobs.wait(run).state is State.CANCELLED
        assert not run.log.exists()


def test_a_killed_job_is_not_queued_again(jobs: Jobs):
    run = jobs.submit(
        "killed", "trap 'say INTERRUPTED 75; exit 75' TERM; say RUNNING null; echo ready; sleep 60 & wait"
    )
    jobs.printed(run, "ready")
    jobs.executor.kill(run)
    jobs.executor.kill(run)  # no matter
    assert jobs.wait(run).state is State.CANCELLED
    assert run.log.read_text().count("restart") == 1


def test_what_the_cluster_refuses_is_said_before(jobs: Jobs):
    wrong = replace(jobs.executor, partition="no-such", nodes=99)
    with pytest.raises(ConfigError, match=r"executor.partition='no-such': unknown partition 'no-such'"):
        wrong.check(jobs.prepare("wrong", "", wrong))
    for settings, said in (
        ({"nodes": 99}, "executor.nodes=99"),
        ({"gpus_per_node": 99}, "executor.gpus_per_node=99"),
        ({"constraint": "no-such"}, "sbatch refuses the job: .*feature"),
        ({"additional_parameters": {"no_such": "x"}}, "sbatch refuses the job: .*no-such"),
        ({"container": "an-image"}, "has no Pyxis"),
    ):
        executor = replace(jobs.executor, **settings)
        with pytest.raises(ConfigError, match=said):
            executor.check(jobs.prepare("wrong", "", executor))


def test_thirty_states_are_found_in_two_seconds(jobs: Jobs):
    executor = replace(jobs.executor, additional_parameters={"hold": True})
    run = jobs.submit("held", "", additional_parameters={"hold": True})
    runs = [run]
    for number in range(29):
        copy = jobs.prepare(f"held-{number}", "", executor)
        job_id = executor.submit(copy)
        (copy.path / "job_id").write_text(job_id)
        jobs.sent.append(copy)
        runs.append(copy)
    began = time.monotonic()
    found = executor.states(runs)
    assert time.monotonic() - began < 2
    assert [status and status.state for status in found] == [State.PENDING] * 30
    assert found[0] and "JobHeldUser" in found[0].reason


# --- over SSH


@pytest.fixture
def login_node(tmp_path: Path) -> Iterator[dict]:
    """An sshd on this machine's loopback, and the settings that lead there."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None:
        pytest.skip("needs sshd: apt-get install openssh-server")
    folder = tmp_path / "ssh"
    folder.mkdir()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    settings = [
        f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host", f"AuthorizedKeysFile {folder}/user.pub",
        "StrictModes no", "UsePAM no", "PermitRootLogin yes", "PasswordAuthentication no", f"PidFile {folder}/pid",
        "KbdInteractiveAuthentication no", f"SetEnv SLURM_CONF={os.environ.get('SLURM_CONF', '/etc/slurm/slurm.conf')}",
    ]  # fmt: skip
    (folder / "sshd_config").write_text("\n".join(settings) + "\n")
    Path("/run/sshd").mkdir(exist_ok=True)  # where it looks for privilege separation
    server = subprocess.Popen([sshd, "-D", "-f", str(folder / "sshd_config")], stderr=subprocess.PIPE)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield {
            "host": "127.0.0.1", "port": port, "user": getpass.getuser(), "identity": str(folder / "user"),
            "remote_dir": str(tmp_path / "there"),
        }  # fmt: skip
    finally:
        for tunnel in shell._tunnels.values():
            tunnel.cleanup()
        server.terminate()
        server.communicate()


@pytest.fixture
def remote_jobs(jobs: Jobs, login_node: dict) -> Jobs:
    jobs.executor = replace(jobs.executor, **login_node)
    return jobs


def test_over_ssh_a_run_is_sent_followed_and_mirrored(remote_jobs: Jobs, login_node: dict):
    script = """
mkdir -p checkpoints logs; echo large > checkpoints/weights; cat code/marker
say RUNNING null; echo step > metrics.csv; echo 1 >> metrics.csv; echo other > logs/rank-1.txt; echo ready
while [ ! -e go ]; do sleep 0.2; done
echo 2 >> metrics.csv; echo 'the end'; say SUCCEEDED 0"""
    run = remote_jobs.prepare("far", script)
    (run.path / "code").mkdir()
    (run.path / "code" / "marker").write_text("the code that is shipped\n")
    run = remote_jobs.submit("far", script)
    there = Path(login_node["remote_dir"]) / "far"
    remote_jobs.printed(run, "ready")
    assert remote_jobs.state(run).state is State.RUNNING
    assert run.last_metrics() == {"step": "1"}
    (there / "go").touch()
    assert remote_jobs.wait(run).state is State.SUCCEEDED
    assert run.log.read_text() == (there / "log.txt").read_text()
    assert "the code that is shipped\n" in run.log.read_text() and run.log.read_text().endswith("the end\n")
    assert run.last_metrics() == {"step": "2"}
    assert (run.logs / "rank-1.txt").read_text() == "other\n"
    assert not run.checkpoints.exists() and not (there / "job_id").exists()


def test_over_ssh_a_stop_is_passed_on(remote_jobs: Jobs):
    wait = (
        "say RUNNING null; echo ready; while [ ! -e stop ]; do sleep 0.2; done; cat stop; say CANCELLED 130; exit 130"
    )
    run = remote_jobs.submit("stopped", wait)
    remote_jobs.printed(run, "ready")
    run.request_stop(StopRequest("cancelled by the user"))
    assert remote_jobs.wait(run).state is State.CANCELLED
    assert "cancelled by the user" in run.log.read_text()


def test_over_ssh_secrets_are_readable_by_the_user_only(remote_jobs: Jobs):
    run = remote_jobs.prepare("hidden", "")
    value = 'it\'s "$(id)"\n`id`'
    file = Path(remote_jobs.executor.deliver_secrets(run, {"MINE": value}))
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    assert not file.is_relative_to(remote_jobs.executor.place(run))
    shown = subprocess.run(["bash", "-c", f'. {file}; printf %s "$MINE"'], capture_output=True, text=True, check=True)
    assert shown.stdout == value
    run = remote_jobs.submit("hidden", f"[ -r '{file}' ] && say SUCCEEDED 0")
    assert remote_jobs.wait(run).state is State.SUCCEEDED
    assert not file.exists()


def test_over_ssh_another_runs_directory_is_not_taken(remote_jobs: Jobs, login_node: dict):
    executor = remote_jobs.executor
    there = Path(login_node["remote_dir"]) / "mine"
    there.mkdir(parents=True)
    (there / "recipe.yaml").touch()
    run = remote_jobs.prepare("mine", "")
    with pytest.raises(ConfigError, match=r"log.name='mine': .* is another run"):
        executor.check(run)
    shutil.rmtree(there)
    remote_jobs.wait(remote_jobs.submit("mine", "say SUCCEEDED 0"), State.SUCCEEDED)
    remote_jobs.wait(remote_jobs.submit("mine", "say SUCCEEDED 0"), State.SUCCEEDED)  # again, the same run


def test_over_ssh_a_key_that_is_not_accepted_is_said(
    remote_jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """NeMo-Run asks for a password, and ends the program when there is none."""

    def no_terminal(*_: str) -> str:
        raise EOFError

    monkeypatch.setattr("getpass.getpass", no_terminal)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "wrong")], check=True)
    executor = replace(remote_jobs.executor, identity=str(tmp_path / "wrong"))
    run = remote_jobs.prepare("locked-out", "", executor)
    with pytest.raises(ConfigError, match=r"executor.host='127.0.0.1': cannot connect .* no key"):
        executor.check(run)
    with pytest.raises(ConfigError, match=r"executor.host='127.0.0.1': cannot connect .*refused|Unable to connect"):
        replace(executor, port=1).check(run)


def test_over_ssh_a_lost_connection_is_warned_of_and_made_again(remote_jobs: Jobs, capsys: pytest.CaptureFixture):
    run = remote_jobs.submit("cut", "say RUNNING null; echo ready; sleep 60")
    remote_jobs.printed(run, "ready")
    for tunnel in shell._tunnels.values():
        tunnel.cleanup()
    assert remote_jobs.state(run).state is State.RUNNING
    capsys.readouterr()
    unreachable = replace(remote_jobs.executor, port=1)
    assert unreachable.states([run]) == [run.written_status()]
    assert "does not say what has become of its runs" in capsys.readouterr().err
