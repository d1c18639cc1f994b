"""The sbatch script of a run: NeMo-Run's script, with the lines that requeue an interrupted job."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiddlehead.errors import Problem
from fiddlehead.files.paths import user_path
from fiddlehead.launch import nemo
from fiddlehead.run.directory import RunDirectory

if TYPE_CHECKING:
    from fiddlehead.launch.slurm import SlurmExecutor

PATIENCE = 300
"""Seconds that a job's other nodes get to save and leave when one has ended."""


OPTIONS = {
    **{name: f"is executor.{name}" for name in (
        "account", "constraint", "cpus_per_task", "exclude", "exclusive", "gpus_per_node", "gres", "mem", "nodelist",
        "nodes", "ntasks_per_node", "partition", "qos", "time",
    )},
    **dict.fromkeys(("gpus", "gpus_per_socket", "gpus_per_task"), "executor.gpus_per_node says how many GPUs"),
    **dict.fromkeys(("ntasks", "ntasks_per_gpu"), "executor.ntasks_per_node says how many processes"),
    **dict.fromkeys(("requeue", "no_requeue"), "executor.requeues says how often"),
    "array": "a run is one job; --sweep makes several runs",
    "clusters": "what was checked is this cluster; executor.host names another one",
    "dependency": "--after names the run to wait for",
    "kill_on_invalid_dep": "--after decides it",
    "signal": "executor.save_before says when the job is warned",
    "job_name": "is log.name",
    **dict.fromkeys(("chdir", "error", "open_mode", "output"), "a run keeps its output in its directory"),
    **dict.fromkeys(("export", "export_file"), "executor.env_vars and executor.secrets say what the job has"),
    **dict.fromkeys(("help", "parsable", "quiet", "test_only", "usage", "version", "wait", "wrap"),
                    "would keep the job from being submitted"),
}  # fmt: skip
"""The options of sbatch that only the launcher sets, and what to use instead."""


def sbatch_option_problems(parameters: Mapping[str, Any]) -> list[Problem]:
    """The problems of sbatch options: the launcher sets them itself (also abbreviated), or they do not exist."""
    problems = []
    for key in parameters:
        name = key.lstrip("-").replace("-", "_")
        ours = name if name in OPTIONS else next((option for option in OPTIONS if name and option.startswith(name)), "")
        if ours:
            problems.append(Problem(f"additional_parameters.{key}", message=OPTIONS[ours]))
        elif not re.fullmatch(r"[A-Za-z]\w*", name):
            problems.append(Problem(f"additional_parameters.{key}", message="is not an option of sbatch"))
    return problems


def batch_script(
    executor: SlurmExecutor, run: RunDirectory, after: Sequence[str] = (), after_any: Sequence[str] = ()
) -> str:
    """The script for sbatch. It starts `run.script` on every node, and requeues the job if that asks for it.

    Args:
        after: ids of jobs that must have succeeded first.
        after_any: ids of jobs that must have ended first, in any state.
    """
    place = executor.place(run)
    pyxis = _at_home(executor.container or "") if executor.container_runtime == "pyxis" else ""
    settings = {
        "account": executor.account or "",
        "partition": executor.partition,
        "time": executor.time,
        "nodes": executor.nodes or 1,
        "ntasks_per_node": _tasks(executor),
        "gpus_per_node": executor.gpus_per_node,
        "cpus_per_task": _cpus(executor),
        "qos": executor.qos,
        "mem": executor.mem,
        "constraint": executor.constraint,
        "exclude": executor.exclude,
        "exclusive": executor.exclusive or None,
        "gres": executor.gres,
        "signal": f"USR1@{executor.save_before}" if executor.save_before else None,
        "container_image": pyxis or None,
        "container_mounts": mounts(executor, run) if pyxis else [],
        "additional_parameters": {**_parameters(executor, after, after_any), **executor.additional_parameters},
        "srun_args": [*_srun_args(executor), *executor.srun_args],
        "setup_lines": _setup(executor, run),
    }
    output = str(place / run.scheduler_log.name).replace("%", "%%")
    return nemo.sbatch_script(executor.job_name_prefix + run.name, place, output, _command(executor, run), settings)


def mounts(executor: SlurmExecutor, run: RunDirectory) -> list[str]:
    """The container's mounts, SOURCE:TARGET; our own have the same paths."""
    place, keys = str(executor.place(run)), executor.secrets_file(run)
    own = [place, *([] if executor.host else [str(Path.cwd())]), *([keys] if _has_secrets(run, keys) else [])]
    return [*(f"{path}:{path}" for path in dict.fromkeys(own)), *map(_at_home, executor.container_mounts)]


def _at_home(written: str) -> str:
    """An image or a mount, with `~` expanded; an image may also be an address."""
    return str(user_path(written)) if written.startswith("~") else written


def _has_secrets(run: RunDirectory, file: str) -> bool:
    """Whether the job's script reads secrets: only then a secrets file exists to be mounted."""
    return run.script.exists() and file in run.script.read_text()


def _tasks(executor: SlurmExecutor) -> int:
    """The number of processes that srun starts on each node."""
    return max(1, executor.ntasks_per_node) if executor.launcher == "srun" else 1


def _cpus(executor: SlurmExecutor) -> int | None:
    """CPUs for each of these processes; on a shared node, a process that starts others needs their CPUs too."""
    if executor.launcher == "srun" or (executor.exclusive and executor.cpus_per_task is None):
        return executor.cpus_per_task
    return (executor.cpus_per_task or 1) * max(1, executor.ntasks_per_node)


def _parameters(executor: SlurmExecutor, after: Sequence[str], after_any: Sequence[str]) -> dict[str, Any]:
    """Options of sbatch that NeMo-Run's executor has no field for."""
    parameters: dict[str, Any] = {"requeue" if executor.requeues else "no_requeue": True}
    if executor.nodelist:
        parameters["nodelist"] = executor.nodelist
    if after or after_any:
        kinds = (("afterok", after), ("afterany", after_any))
        parameters["dependency"] = ",".join(":".join((kind, *ids)) for kind, ids in kinds if ids)
        parameters["kill_on_invalid_dep"] = "yes"  # else one whose parent has failed waits for ever
    return parameters


def _srun_args(executor: SlurmExecutor) -> list[str]:
    """Options of srun, which override NeMo-Run's: a failed node must not end the others while they save."""
    arguments = ["--kill-on-bad-exit=0", f"--wait={PATIENCE}", "--open-mode=append"]
    if executor.launcher == "torchrun":
        return [*arguments, "--cpu-bind=none"]  # the processes that the one task starts need more than its core
    if executor.cpus_per_task:
        return [*arguments, f"--cpus-per-task={executor.cpus_per_task}"]  # which srun does not take from sbatch
    return arguments


def _command(executor: SlurmExecutor, run: RunDirectory) -> list[str]:
    """The command that srun starts."""
    script = ["bash", str(executor.place(run) / run.script.name)]
    if not executor.container or executor.container_runtime == "pyxis":
        return script
    binds = [f"--bind={mount}" for mount in mounts(executor, run)]
    return ["apptainer", "exec", "--nv", *binds, _at_home(executor.container), *script]


def _setup(executor: SlurmExecutor, run: RunDirectory) -> str:
    """Shell lines that run before the job."""
    secrets_file = executor.secrets_file(run)
    return _SETUP.format(
        requeues=executor.requeues,
        status=shlex.quote(str(executor.place(run) / "status")),
        remove=f"\n    rm -f {shlex.quote(secrets_file)}" if _has_secrets(run, secrets_file) else "",
    )


WHERE = """\
_where="${SLURM_JOB_ID:+slurm job $SLURM_JOB_ID}"
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then _where+=", restart $SLURM_RESTART_COUNT"; fi
if [ -z "$_where" ]; then _where="by hand"; fi"""
"""Shell lines that set `_where` to the number of the job, and of its restart."""


def requeue_lines(requeues: int) -> str:
    """Shell lines that tell a Slurm job how often it may be requeued; a job that is run by hand is not requeued."""
    if not requeues:
        return ""
    return f'if [ -n "$SLURM_JOB_ID" ]; then export FIDDLEHEAD_REQUEUES={requeues} _stopped=75; fi'


_SETUP = """\
ended() {{
    set +ex
    rm -f "/tmp/fiddlehead-port-$MASTER_PORT"
    if [ -z "$exitcode" ]; then
        # Slurm has ended this shell. It cancels the job, or queues it again by itself, but not at the time limit.
        if ! scontrol show job "$SLURM_JOB_ID" | grep -q Reason=TimeLimit; then return; fi
        exitcode=75
    fi
    # 75: saved, or worth another try; 137: killed, unless the run had ended by its own word.
    final='"state": "(SUCCEEDED|FAILED|CANCELLED)"'
    if [[ $exitcode == 75 || $exitcode == 137 ]] && ! grep -Eq "$final" {status}; then
        if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
            # The controller may be away for a while.
            for pause in 1 5 15 30 60; do
                echo "queueing the job again"
                if scontrol requeue "$SLURM_JOB_ID"; then return; fi
                sleep $pause
            done
        fi
        echo "not queued again: executor.requeues={requeues}"
    fi{remove}
}}
trap ended EXIT
trap : USR1  # it is for the job's processes
# The address by which Slurm knows the first node, where this shell runs, and a port there that no other run has: this
# shell holds its lock, and nobody listens at it.
export MASTER_ADDR=$(scontrol show node "$head_node" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
for try in {{0..999}}; do
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + ${{SLURM_RESTART_COUNT:-0}} + try) % 12768))
    {{ exec {{port_lock}}> "/tmp/fiddlehead-port-$MASTER_PORT"; }} 2> /dev/null || continue
    if flock --nonblock "$port_lock" && ! (: < "/dev/tcp/127.0.0.1/$MASTER_PORT") 2> /dev/null; then break; fi
    exec {{port_lock}}>&-
done"""
