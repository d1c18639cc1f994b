"""The shell script that runs a job on each of its nodes, for every executor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from fiddlehead.errors import ConfigError
from fiddlehead.launch.code import CodeCopy
from fiddlehead.launch.executor import Executor
from fiddlehead.recipe import project
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.workers import JOB_VARIABLES


def job_script(
    run: RunDirectory,
    executor: Executor,
    allow: Sequence[str],
    *,
    copy: CodeCopy | None,
    secrets_file: str = "",
    lock: Path | None = None,
    nsys: str | None = None,
) -> str:
    """The text of `run.script`. It also works in macOS's bash 3.2; `bash RUN/job.sh` repeats the run by hand.

    A node's output is appended to the run's log (other nodes: `logs/node-K.txt`) below a line that says when and where
    it started. Variables keep every character.

    Args:
        allow: additional names that the job's recipe may use.
        copy: the code to import; None means the working directory itself.
        secrets_file: the path that `Executor.deliver_secrets` returned.
        lock: the lock that the launcher holds while it lives, if the job must end with the launcher.
        nsys: the steps, FIRST:LAST, that Nsight Systems profiles on the first node; None for none.

    Raises:
        ConfigError: the run directory's path cannot be used.
    """
    place = executor.place(run)

    def there(path: Path | str) -> str:
        """A path of the run directory as the job sees it."""
        return str(place / Path(path).relative_to(run.path))

    work = Path.cwd()
    if copy is None:
        code = [str(work)] if project.comes_first(work) else []
    else:
        code = [there(folder) for folder in copy.python_path()]
    for folder in code:
        if ":" in folder:
            raise ConfigError(f"{folder!r} has a colon in it, and PYTHONPATH cannot hold that; move it, or log.dir")
    counterpart = str(work) if copy is None else there(copy.counterpart(work))
    options = "".join(f" --allow {quote(name)}" for name in allow)
    parts = [
        _HEAD.format(name=" ".join(run.name.split())),
        executor.start_lines(),
        _OUTPUT.format(log=quote(there(run.log)), logs=quote(there(run.logs)), where=executor.where_lines()),
        _SECRETS.format(file=quote(secrets_file)) if secrets_file else "",
        _variables(executor, quote(there(lock)) if lock else ""),
        _HOME,
        f"cd {quote(str(work))} 2> /dev/null || cd {quote(counterpart)} || exit 1\n",
        _interpreter(executor),
        f'export PYTHONPATH={quote(":".join(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"' if code else "",
        f"export PYTHONSAFEPATH=1 {project.VARIABLE}={quote(counterpart)}\n",
        _CHECK,
        "trap '' USR1  # Slurm's warning must not kill Python before it listens; where it is missed, SIGTERM follows",
        *([] if nsys is None else [_nsys(there(run.path / "profile"), nsys)]),
        f'exec {_UNDER * (nsys is not None)}"$_python" -u -m fiddlehead.job {quote(there(run.recipe))}{options}\n',
    ]
    return "".join(part + "\n" for part in parts if part).rstrip("\n") + "\n"


_HEAD = """\
#!/bin/bash
# The job of run {name}, on one node; to repeat it by hand: bash job.sh
# No tracing, whoever asked for it: secrets would be printed.
{{ set +euxv; }} 2> /dev/null
"""

_OUTPUT = """\
_log={log}
mkdir -p {logs}
if [ "${{SLURM_STEP_NUM_TASKS:-1}}" -gt "${{SLURM_STEP_NUM_NODES:-1}}" ] && [ "${{SLURM_PROCID:-0}}" -gt 0 ]; then
    _log={logs}/rank-$SLURM_PROCID.txt
elif [ "${{SLURM_NODEID:-0}}" -gt 0 ]; then
    _log={logs}/node-$SLURM_NODEID.txt
fi
if [ -t 1 ]; then echo "the output goes to $_log"; fi
exec < /dev/null >> "$_log" 2>&1 || exit 1
# An attempt that was killed may have left half a line.
if [ -n "$(tail -c 1 "$_log")" ]; then echo; fi
{where}
echo "=== started $(date +%Y-%m-%dT%H:%M:%S%z) on $HOSTNAME ($_where)"
"""

_SECRETS = """\
if [ -r {file} ]; then
    . {file}
else
    echo "warning: the secrets in "{file}" are gone, as after a run's end; those of this environment are used"
fi
"""

_HOME = """\
# A container's user may have no entry in /etc/passwd.
if [ "${HOME:-/}" = / ]; then HOME=$(mktemp -d); fi
if [ -z "$USER" ]; then USER=$(id -un 2> /dev/null || echo "user$UID"); fi
export HOME USER LOGNAME="${LOGNAME:-$USER}" PYTHONUNBUFFERED=1
"""

_CHECK = """\
if ! type -P "$_python" > /dev/null; then
    echo "error: executor.python: there is no Python $_python on $HOSTNAME;" \\
        "set executor.python to one that is there, or executor.setup_lines to what provides one"
    exit 2
fi
if ! _error=$("$_python" -c 'import fiddlehead' 2>&1); then
    echo "error: executor.python: $_python on $HOSTNAME cannot import fiddlehead (${_error##*$'\\n'});" \\
        "install it there, or set executor.python or executor.setup_lines to an environment that has it"
    exit 2
fi
"""

_NSYS = """\
_nsys=()
if [ "${{SLURM_PROCID:-0}}" = 0 ]; then  # the first node, whose first rank says which steps are recorded
    if ! type -P nsys > /dev/null; then
        echo "error: log.nsys: there is no nsys on $HOSTNAME; install NVIDIA Nsight Systems there, or load it in" \\
            "executor.setup_lines"
        exit 2
    fi
    mkdir -p {folder}
    _nsys=(nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --capture-range=cudaProfilerApi
        --capture-range-end=stop --force-overwrite=true --output={report})
fi
"""
_UNDER = '${_nsys[@]+"${_nsys[@]}"} '
"""The command before Python's, if it has words: bash 3.2 and 4.3 take an empty array for one that is not set."""


def _nsys(folder: str, steps: str) -> str:
    """Shell lines that set `_nsys` to the command under which the job runs."""
    report = f"{folder}/nsys-steps-{steps.replace(':', '-')}"
    return _NSYS.format(folder=quote(folder), report=quote(report))


def _variables(executor: Executor, lock: str) -> str:
    """Shell lines for the environment of the job, and for a request to stop before Python runs."""
    own = [name for name in JOB_VARIABLES if not executor.started_by_torchrun or name.startswith("FIDDLEHEAD_")]
    lines = [
        f"unset {' '.join(own)}",
        "_stopped=130",
    ]
    lines += [f"export {name}={quote(value)}" for name, value in executor.env_vars.items()]
    if lock:
        # Run by hand, the script has no launcher. An earlier job, which ends, may share the lock for a moment.
        # macOS has no `flock`: there the job looks.
        free = f"flock --shared --nonblock {lock} true 2> /dev/null"
        lines.append(f"if ! {free}; then export FIDDLEHEAD_LAUNCHER_LOCK={lock}; fi")
    if requeue := executor.requeue_lines():
        lines.append(requeue)
    lines.append("trap 'exit $_stopped' INT TERM USR1")
    return "\n".join(lines) + "\n"


def _interpreter(executor: Executor) -> str:
    """Shell lines that run `setup_lines` and set `_python`."""
    setup = executor.setup_lines.rstrip("\n")
    if executor.python:
        # The home is the one where the job runs.
        home, path = ('"$HOME"', executor.python[1:]) if executor.python.startswith("~/") else ("", executor.python)
        return f"{setup}\n_python={home}{quote(path)}\n".lstrip("\n")
    return _INTERPRETER.format(setup=setup, here=quote(sys.executable))


_INTERPRETER = """\
_before=$(type -P python)
{setup}
_python={here}
if [ "$(type -P python)" != "$_before" ]; then  # an environment that the lines above activate is the one that is meant
    _python=$(type -P python)
elif ! type -P "$_python" > /dev/null && _found=$(type -P python || type -P python3); then
    echo "this job runs under $_found, as $_python is not on $HOSTNAME"
    _python=$_found
fi
"""
