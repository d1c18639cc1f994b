"""Containers on a real engine: that of `make test-docker`, of DOCKER_HOST, or at the usual socket.

The image is empty; Python and its packages are mounted from this machine, read-only, at their own paths.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import secrets as random_secrets
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fiddlehead
from fiddlehead.checkpoints.folder import newest_good
from fiddlehead.errors import ConfigError
from fiddlehead.files.atomic import write_atomically
from fiddlehead.launch import docker_engine, secrets, watch
from fiddlehead.launch.docker import DockerExecutor, _mounts, container_name, docker
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status, StopRequest, this_process

IMAGE = "fiddlehead-test:latest"
REPOSITORY = Path(fiddlehead.__file__).resolve().parents[2]
MOUNTS = tuple(f"{path}:ro" for path in sorted({"/usr", "/etc", sys.base_prefix, sys.prefix, str(REPOSITORY)}))
COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss")
FOREVER = "trainer.max_steps=100000"


# -- settings, for which no engine is needed


def test_all_wrong_settings_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        docker("", gpus=-1, shm_size="much", memory="16 GB", network="bridge")
    assert [problem.split("=")[0] for problem in error.value.problems] == [
        "image", "gpus", "shm_size", "memory", "network",
    ]  # fmt: skip


def test_an_unknown_setting_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown setting of docker 'shmsize'; did you mean 'shm_size'"):
        docker(IMAGE, shmsize="1g")


def test_a_container_runs_on_one_machine():
    """NeMo-Run's groups of containers, in which the first to end decides, are out of reach."""
    with pytest.raises(ConfigError, match="nodes=2: a container runs on one machine"):
        DockerExecutor(image=IMAGE, nodes=2)


def test_devices_and_gpus_follow_each_other():
    assert docker(IMAGE, gpus=4).devices_per_node() == 4
    assert docker(IMAGE).devices_per_node() == 0
    assert docker(IMAGE).fitted(2, "gpu").gpus == 2
    assert docker(IMAGE).fitted(2, "cpu").gpus == 0
    fitted = docker(IMAGE, gpus=4, ntasks_per_node=2).fitted(2, "gpu")
    assert (fitted.gpus, fitted.ntasks_per_node) == (4, 2)


@pytest.mark.parametrize("name", ["plain", "a b/c=1e-3,x", "x" * 80, "---", "ä"])
def test_names_are_those_of_containers_and_hosts(name, tmp_path):
    found = container_name(RunDirectory(tmp_path / name))
    assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?", found) and len(found) <= 32
    assert found != container_name(RunDirectory(tmp_path / "elsewhere" / name))


@pytest.mark.parametrize("text", ["data", "/a:b", "/a:/b:/c", "/a:/b:rx", ":/b", ""])
def test_a_mount_without_a_source_is_refused(text, run):
    with pytest.raises(ConfigError, match=r"executor\.mounts=.*: must be SOURCE\[:TARGET\]\[:ro\]"):
        docker(IMAGE, mounts=[text]).check(run)


def test_secrets_in_the_working_directory_are_covered(run, working_directory):
    """Unless the user mounts one: of two mounts in one place that counts. The folder of runs has none."""
    for name in (".env", "deploy/key.pem", "train.py", ".aws/config", "lib/site-packages/cacert.pem", ".git/a.pem"):
        (working_directory / name).parent.mkdir(parents=True, exist_ok=True)
        (working_directory / name).touch()
    inside = RunDirectory(working_directory / "runs" / "a")
    (inside.path / "old").mkdir(parents=True)
    (inside.path / "old" / "x.pem").touch()
    found = {mount.target: mount.source for mount in _mounts(inside, [])}
    covered = {target: source for target, source in found.items() if source in ("", os.devnull)}
    assert covered == {
        str(working_directory / ".env"): os.devnull,
        str(working_directory / "deploy" / "key.pem"): os.devnull,
        str(working_directory / ".aws"): "",
    }
    env = str(working_directory / ".env")
    assert {mount.target: mount.source for mount in _mounts(inside, [f"{env}:ro"])}[env] == env


def test_an_engine_that_is_not_there(run, monkeypatch, capsys):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(ConfigError) as error:
        docker(IMAGE, mounts=["/nowhere/else"]).check(run)
    missing, engine = error.value.problems
    assert missing == "executor.mounts: /nowhere/else does not exist"
    assert "no answer from the engine at unix:///nowhere/docker.sock; is it running?" in engine
    running = replace(this_process(1, "docker"), host="container")
    run.write_status(running)
    for _ in range(2):
        assert docker(IMAGE).states([run]) == [running]
    assert capsys.readouterr().err.count("the runs' own words are shown") == 1


def test_an_engine_that_one_may_not_use(run, monkeypatch):
    def refuse() -> None:  # root may use every socket
        raise docker_engine.UnreachableError("[Errno 13] Permission denied")

    monkeypatch.setattr(docker_engine, "reach", refuse)
    with pytest.raises(ConfigError, match="this user may not use it; the group `docker` may"):
        DockerExecutor(image=IMAGE).kill(run)


def test_a_launcher_that_hands_over_and_leaves_while_it_is_looked_at_has_not_died(run, monkeypatch):
    class Engine:
        """Has no container when it is asked; then the launcher starts it, and is gone."""

        class api:  # noqa: N801
            @staticmethod
            def containers(**filters):
                (run.path / "job_id").write_text(container_name(run))
                return []

    monkeypatch.setattr(docker_engine, "connect", lambda: contextlib.nullcontext(Engine()))
    (status,) = DockerExecutor(image=IMAGE).states([run])
    assert status and status.state is State.PENDING


# -- the engine


@pytest.fixture
def run(working_directory: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run that is about to be submitted, by a launcher that is gone since."""
    keep_to(working_directory, monkeypatch)
    run = RunDirectory(working_directory / "runs" / "a run")
    return about_to_be_submitted(run)


def about_to_be_submitted(run: RunDirectory) -> RunDirectory:
    run.path.mkdir(parents=True)
    run.command.write_text("fiddlehead pretrain\n")
    run.write_status(replace(this_process(1, "docker"), state=State.PENDING, pid=2**22 + 1))
    return run


def keep_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the product writes outside of its run directories goes into `folder`; no secrets of the user's."""
    for name, sub in (("FIDDLEHEAD_CACHE", "cache"), ("FIDDLEHEAD_SECRETS", "secrets"), ("NEMORUN_HOME", "nemo_run")):
        monkeypatch.setenv(name, str(folder / sub))
    for name in secrets.ALWAYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """The engine, with the image of these tests."""
    import docker
    from docker.errors import DockerException

    try:
        docker_engine.reach()
        connected = docker.from_env()
    except (OSError, DockerException) as error:
        pytest.skip(f"needs a Docker engine: `make test-docker` starts one ({error})")
    with contextlib.closing(connected) as client:
        if not docker_engine.is_missing(client, IMAGE):
            client.images.remove(IMAGE, force=True)
        client.api.import_image_from_data(skeleton(), repository=IMAGE.partition(":")[0], tag="latest")
        with warnings.catch_warnings(action="ignore"):  # what NeMo-Run imports warns of itself
            import nemo_run  # noqa: F401
        yield client
        for container in client.containers.list(all=True, filters={"ancestor": IMAGE}):
            container.remove(force=True)
        client.images.remove(IMAGE, force=True)


def skeleton() -> bytes:
    """An archive of the folders and links that every Linux system has; the engine puts its `--init` into /sbin."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(folder)
        for name in ("bin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
    return archive.getvalue()


def containers(client, run: RunDirectory) -> list[dict]:
    return client.api.containers(all=True, filters={"label": f"{docker_engine.LABEL}={run.path}"})


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def submitted(run: RunDirectory, script: str, **settings: Any) -> DockerExecutor:
    """Submits a script, and notes the job's id as `launch` does."""
    run.script.write_text(script)
    executor = docker(IMAGE, mounts=MOUNTS, **settings)
    executor.check(run)
    write_atomically(run.path / "job_id", executor.submit(run) + "\n")
    return executor


def end(executor: DockerExecutor, run: RunDirectory, seconds: float = 20.0) -> Status:
    wait_until(lambda: (status := executor.states([run])[0]) and status.state.ended, seconds)
    (status,) = executor.states([run])
    assert status
    return status


@pytest.mark.docker
def test_a_container_without_a_final_status_has_died_with_its_exit_code(client, run):
    executor = docker(IMAGE, mounts=MOUNTS)
    (before,) = executor.states([run])
    assert before and before.state is State.DIED and "process" in before.reason  # that of its launcher
    executor = submitted(run, "sleep 1; exit 7")
    (at_once,) = executor.states([run])
    assert at_once and at_once.state is State.PENDING
    status = end(executor, run)
    assert (status.state, status.exit_code) == (State.DIED, 7)
    assert status.reason == "its container ended with exit code 7, before the job began"
    assert status.ended and 0.5 < status.ended - status.started < 20
    wait_until(lambda: not containers(client, run), 5)


@pytest.mark.docker
def test_a_killed_container_is_not_waited_for(client, run):
    executor = submitted(run, "sleep 1000")
    run.write_status(Status(State.RUNNING, host=container_name(run), pid=1, started=time.time(), executor="docker"))
    client.api.kill(run.job_id)
    status = end(executor, run, 5)
    assert (status.state, status.exit_code) == (State.DIED, 137)
    assert status.reason == "its container ended with exit code 137, and it has not said why"


@pytest.mark.docker
def test_running_out_of_memory_is_reported(client, run):
    script = "x=$(head -c 200m /dev/zero | tr '\\0' x); echo ${#x}"
    status = end(submitted(run, script, memory="50m"), run)
    assert status.state is State.DIED and status.reason.startswith("out of memory: ")


@pytest.mark.docker
def test_a_run_without_a_container_says_why(client, run):
    executor = submitted(run, f"echo 'error: executor.python: none' >> {shlex.quote(str(run.log))}; exit 2")
    status = end(executor, run)
    assert (status.state, status.exit_code, status.reason) == (State.FAILED, 2, "executor.python: none")
    run.request_stop(StopRequest("runs cancel"))
    (status,) = executor.states([run])
    assert status and status.state is State.CANCELLED
    by_hand = this_process(2, "docker")
    run.write_status(by_hand)
    assert executor.states([run]) == [by_hand]


@pytest.mark.docker
def test_an_earlier_attempts_id_is_not_this_ones(client, run):
    executor = submitted(run, "exit 0")
    assert end(executor, run).state is State.DIED
    run.write_status(pending := replace(this_process(2, "docker"), state=State.PENDING, submission=2))
    assert executor.states([run]) == [pending]  # this launcher is about to submit


@pytest.mark.docker
def test_kill_leaves_no_container(client, run):
    executor = submitted(run, "trap '' TERM; sleep 1000 & wait; sleep 1000")
    assert containers(client, run)
    executor.kill(run)
    assert not containers(client, run)
    executor.kill(run)  # again is not an error


@pytest.mark.docker
def test_the_remains_of_a_killed_launcher_do_no_harm(client, run):
    client.api.create_container(
        IMAGE, "true", name=container_name(run), labels={docker_engine.LABEL: str(run.path)}
    )  # fmt: skip
    assert end(submitted(run, "exit 3"), run).exit_code == 3


@pytest.mark.docker
def test_files_belong_to_the_user_whom_the_image_does_not_know(client, run, monkeypatch):
    if os.getuid() != 0:
        pytest.skip("needs root, to be somebody else")
    Path.cwd().chmod(0o755)
    for path in (run.path, Path(os.environ["FIDDLEHEAD_CACHE"])):
        path.mkdir(exist_ok=True)
        subprocess.run(["chown", "-R", "1234:2345", str(path)], check=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "getuid", lambda: 1234)
        patched.setattr(os, "getgid", lambda: 2345)
        patched.setattr(os, "getgroups", lambda: [3456])
        executor = submitted(
            run, f'cd {shlex.quote(str(run.path))} && id > id && touch "$FIDDLEHEAD_CACHE/x"; (echo > ../y) 2> refused'
        )
    end(executor, run)
    assert "uid=1234" in (run.path / "id").read_text() and "3456" in (run.path / "id").read_text()
    for path in (run.path / "id", Path(os.environ["FIDDLEHEAD_CACHE"]) / "x"):
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)
    assert "Read-only file system" in (run.path / "refused").read_text()  # the folder of runs


@pytest.mark.docker
@pytest.mark.parametrize("network", ["host", "nemo_run"])
def test_a_container_resolves_its_own_name(client, run, network):
    end(submitted(run, 'getent hosts "$(hostname)" > "${0%/*}/found"', network=network), run)
    assert container_name(run) in (run.path / "found").read_text()


@pytest.mark.docker
def test_a_container_is_neither_restarted_nor_kept(client, run):
    """Retries would keep the container; another attempt is the launcher's to start."""
    executor = submitted(run, 'echo >> "${0%/*}/starts"; sleep 1; exit 1', shm_size="123m")
    (found,) = containers(client, run)
    settings = client.api.inspect_container(found["Id"])["HostConfig"]
    assert settings["AutoRemove"] and settings["Init"] and not settings["Privileged"]
    assert settings["RestartPolicy"]["Name"] in ("", "no") and settings["ShmSize"] == 123 * 2**20
    assert end(executor, run).exit_code == 1
    assert (run.path / "starts").read_text() == "\n"


@pytest.mark.docker
@pytest.mark.parametrize("name", ["two words", "it's", 'say "x"', "$(touch y) `id`", "back\\slash", "a,b=c"])
def test_paths_reach_the_container_unchanged(client, run, name):
    strange = about_to_be_submitted(RunDirectory(run.path.parent / name))
    assert end(submitted(strange, 'echo "$0" > "${0%/*}/path"; exit 4'), strange).exit_code == 4
    assert (strange.path / "path").read_text() == f"{strange.script}\n"


@pytest.mark.docker
def test_a_local_image_is_not_pulled(client, run, monkeypatch):
    from docker.models.images import ImageCollection

    def pull(*arguments, **settings) -> None:
        raise AssertionError("it tried to pull")

    monkeypatch.setattr(ImageCollection, "pull", pull)
    assert end(submitted(run, "exit 5"), run).exit_code == 5


@pytest.mark.docker
def test_everything_that_is_missing_is_reported_at_once(client, run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # there may be a GPU runtime's hook
    with pytest.raises(ConfigError) as error:
        docker("fiddlehead-test:lates", gpus=2, mounts=["/nowhere/a", "/nowhere/b:/b"]).check(run)
    image = next(problem for problem in error.value.problems if problem.startswith("executor.image="))
    assert "not on this machine, and cannot be pulled" in image and f"did you mean {IMAGE!r}?" in image
    others = set(error.value.problems) - {image}
    if "nvidia" not in client.info()["Runtimes"]:
        assert {"executor.gpus=2: the engine has no GPUs; install the NVIDIA Container Toolkit"} <= others
    assert {"executor.mounts: /nowhere/a does not exist", "executor.mounts: /nowhere/b does not exist"} <= others


@pytest.mark.docker
def test_what_the_engine_refuses_is_in_its_words_and_leaves_nothing(client, run):
    run.script.write_text("")
    with pytest.raises(ConfigError, match=r"executor='docker': the engine at .* refused: .*/nowhere"):
        docker(IMAGE, mounts=["/nowhere"]).submit(run)
    assert not containers(client, run)


@pytest.mark.docker
def test_an_image_without_bash_is_guessed(client, run):
    executor = docker(IMAGE)
    run.script.write_text("")
    write_atomically(run.path / "job_id", executor.submit(run))
    assert "has the image a bash?" in end(executor, run).reason


@pytest.mark.docker
def test_the_folders_of_the_image_are_not_hidden(client, run, monkeypatch):
    monkeypatch.chdir("/usr")
    with pytest.raises(ConfigError, match="the job would have this machine's /usr instead of the image's"):
        docker(IMAGE).check(run)


@pytest.mark.docker
def test_the_lock_of_another_user_is_reported(client, run, monkeypatch):
    """NeMo-Run takes one in the folder of temporary files."""

    def refuse(client, network) -> None:
        raise PermissionError(13, "Permission denied", "/tmp/nemorun_docker_network_lock")

    monkeypatch.setattr("nemo_run.core.execution.docker.ensure_network", refuse)
    with pytest.raises(ConfigError, match="/tmp/nemorun_docker_network_lock, which another user owns; set TMPDIR"):
        submitted(run, "")


# -- whole runs, by the command


@pytest.fixture
def project(tmp_path: Path, client, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working directory, with a recipe that fails at its fifth step."""
    keep_to(tmp_path, monkeypatch)
    project = tmp_path / "project"
    (project / "recipes").mkdir(parents=True)
    (project / "recipes" / "broken.py").write_text(BROKEN)
    return project


BROKEN = '''
import fiddle as fdl

from fiddlehead.recipe import Recipe
from fiddlehead.recipes.tiny import tiny_test


class Explodes:
    min_lr = 0.0
    warmup_steps = 0

    def __call__(self, step, max_steps, lr):
        if step == 5:
            raise RuntimeError("the fifth step")
        return 1.0


def broken() -> Recipe:
    """Fails at the fifth step."""
    recipe = tiny_test()
    recipe.optim.lr_scheduler = fdl.Config(Explodes)
    return recipe
'''


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from fiddlehead.cli import main; main()", *arguments]


def pretrain(name: str, *arguments: str, recipe: str = "tiny_test") -> list[str]:
    """The command of a run in a container, with one thread a process."""
    return command(
        "pretrain", "--factory", recipe, f"log.name={name}", "--yes", "executor=docker", f"executor.image={IMAGE}",
        f"executor.mounts={list(MOUNTS)}", f"executor.python={sys.executable}",
        "executor.env_vars.OMP_NUM_THREADS=1", *arguments,
    )  # fmt: skip


def finished(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300)


def losses(run: RunDirectory) -> list[tuple[str, ...]]:
    with run.metrics.open() as file:
        return [tuple(row[name] for name in COLUMNS) for row in csv.DictReader(file)]


@pytest.fixture
def training(project: Path, client) -> Iterator[tuple[RunDirectory, subprocess.Popen]]:
    """An attached run, in the middle of it, and its launcher."""
    run = RunDirectory(project / "runs" / "long")
    with subprocess.Popen(
        pretrain("long", FOREVER), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        wait_until(lambda: launcher.poll() is not None or run.last_metrics())
        yield run, launcher
        launcher.kill()


@pytest.mark.docker
@pytest.mark.slow
def test_a_container_trains_as_this_machine_does(client, project):
    note = "one two; $(touch x) `id` \"'\\\nsecond line"
    probe = 'df --output=size -B1 /dev/shm > $FIDDLEHEAD_CACHE/shm; printf %s "$note" > $FIDDLEHEAD_CACHE/note'
    result = finished(
        pretrain("boxed", f"executor.env_vars.note={note!r}", f"executor.setup_lines={probe!r}"), project
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    local = ["executor=local", "executor.env_vars={'OMP_NUM_THREADS': '1'}"]
    assert finished(command("pretrain", "-f", "tiny_test", "log.name=bare", "--yes", *local), project).returncode == 0
    boxed, bare = (RunDirectory(project / "runs" / name) for name in ("boxed", "bare"))
    assert losses(boxed) == losses(bare)
    (status,) = watch.states([boxed])
    assert status and (status.state, status.exit_code, status.executor) == (State.SUCCEEDED, 0, "docker")
    assert status.host == boxed.job_id == container_name(boxed)
    assert not containers(client, boxed)
    cache = Path(os.environ["FIDDLEHEAD_CACHE"])
    assert (cache / "note").read_text() == note
    assert int((cache / "shm").read_text().split()[1]) == 16 * 2**30
    # Row 4: what is shown is the job's output, all of it and nothing else.
    assert "validation: " in boxed.log.read_text() and '"exit_code"' not in boxed.log.read_text()
    assert boxed.log.read_text().rstrip() in result.stdout
    assert {(path.stat().st_uid, path.stat().st_gid) for path in boxed.path.rglob("*")} == {(os.getuid(), os.getgid())}


@pytest.mark.docker
@pytest.mark.slow
def test_two_processes_find_each_other_on_the_host_network(client, project):
    two = ["executor.ntasks_per_node=2", "trainer.max_steps=5"]
    result = finished(pretrain("boxed", "executor.network=host", *two), project)
    assert result.returncode == 0, result.stdout + result.stderr
    boxed = RunDirectory(project / "runs" / "boxed")
    assert (boxed.logs / "rank-1.txt").exists()
    assert losses(boxed)[4][0] == "5"


@pytest.mark.docker
@pytest.mark.slow
def test_ctrl_c_saves_the_step_and_removes_the_container(client, training):
    run, launcher = training
    began = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, output
    assert time.monotonic() - began < 15
    status = run.written_status()
    assert status and status.state is State.CANCELLED
    assert newest_good(run.checkpoints) == run.checkpoints / f"step-{run.last_step():08d}"
    wait_until(lambda: not containers(client, run), 5)


@pytest.mark.docker
@pytest.mark.slow
def test_a_killed_launcher_ends_its_container(client, training):
    run, launcher = training
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not containers(client, run), 15)
    status = run.written_status()
    assert status and status.state is State.CANCELLED and "its launcher is gone" in status.reason
    assert newest_good(run.checkpoints) == run.checkpoints / f"step-{run.last_step():08d}"


@pytest.mark.docker
@pytest.mark.slow
def test_docker_stop_saves_the_step(client, training):
    run, launcher = training
    client.api.stop(run.job_id, timeout=30)
    launcher.communicate(timeout=60)
    status = run.written_status()
    assert status and status.state is State.CANCELLED and "SIGTERM" in status.reason
    assert newest_good(run.checkpoints) == run.checkpoints / f"step-{run.last_step():08d}"


@pytest.mark.docker
@pytest.mark.slow
def test_docker_kill_makes_the_command_fail(client, training):
    run, launcher = training
    client.api.kill(run.job_id)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 137 and "its container ended with exit code 137" in output
    (status,) = watch.states([run])
    assert status and (status.state, status.exit_code) == (State.DIED, 137)


@pytest.mark.docker
@pytest.mark.slow
def test_a_failing_job_in_a_container_makes_the_command_fail(client, project):
    result = finished(pretrain("b", recipe="broken"), project)
    assert result.returncode == 1, result.stdout + result.stderr
    run = RunDirectory(project / "runs" / "b")
    (status,) = watch.states([run])
    assert status and (status.state, status.exit_code) == (State.FAILED, 1) and "the fifth step" in status.reason
    assert "Traceback" in run.log.read_text() and "Traceback" in result.stdout
    assert not containers(client, run)


@pytest.mark.docker
@pytest.mark.slow
def test_a_detached_container_continues_and_leaves_no_secrets(client, project, tmp_path, monkeypatch):
    values = {name: random_secrets.token_hex(16) for name in ("WANDB_API_KEY", "HF_TOKEN", "MINE")}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    probe = "for name in WANDB_API_KEY HF_TOKEN MINE; do printf %s ${!name} | sha256sum; done"
    result = finished(
        pretrain("away", FOREVER, "--detach", "executor.secrets=['MINE']", f"executor.setup_lines={probe!r}"), project
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = RunDirectory(project / "runs" / "away")
    (at_once,) = watch.states([run])
    assert at_once and at_once.state in (State.PENDING, State.RUNNING)  # though who wrote PENDING is gone
    wait_until(run.last_metrics)
    (status,) = watch.states([run])
    assert status and status.state is State.RUNNING
    shown = json.dumps(client.api.inspect_container(run.job_id)) + result.stdout + result.stderr
    shown += client.api.logs(run.job_id).decode()
    for value in values.values():
        assert hashlib.sha256(value.encode()).hexdigest() in run.log.read_text()  # it was there
        assert value not in shown
        for file in tmp_path.rglob("*"):  # with NeMo-Run's home, and the folder of secrets
            assert not file.is_file() or value.encode() not in file.read_bytes(), file
    cancelled = finished(command("runs", "cancel", "away"), project)
    assert cancelled.returncode == 0, cancelled.stderr
    status = run.written_status()
    assert status and status.state is State.CANCELLED
    wait_until(lambda: not containers(client, run), 5)
