"""The resources of a Slurm cluster: partitions, their limits, nodes and GPUs, and accounts."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.launch.shell import Shell

_PROGRAMS = ("SALLOC", "SACCT", "SACCTMGR", "SBATCH", "SCONTROL", "SINFO", "SLURM", "SQUEUE", "SRUN")
WITHOUT_SETTINGS = (
    f"for _name in {' '.join(f'${{!{program}_@}}' for program in _PROGRAMS)}; do\n"
    "    case $_name in SLURM_CONF | SLURM_CONF_SERVER | SLURM_JWT) ;; *) unset $_name ;; esac\n"
    "done; unset _name\n"
)
"""Shell lines that unset Slurm's variables except those for the cluster's address and the user's identity. The others
change the form of answers or restrict them to a part of the cluster. They also override the options in a script of
sbatch, and a job inherits them for its tasks. They may come from the user, or from a job around us."""

_PRESENT = re.compile(r"(alloc|comp|idle|mix|plnd)[~#%!+-]*")
"""The states of nodes that take jobs, or will when others have ended; a sign tells of a node that saves power."""


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo shows it, with all its nodes in any state."""

    name: str
    time: str
    """The most that a job may take."""
    up: str
    """ "up", or why it takes no jobs."""
    gpus: tuple[int, ...]
    """The number on each node."""
    types: frozenset[str] = frozenset()
    """The types of its GPUs, as the cluster names them; "" for GPUs without a type."""
    away: int = 0
    """The number of nodes that take no jobs for now: down, drained, reserved, not responding."""

    @property
    def nodes(self) -> int:
        """How many nodes it has."""
        return len(self.gpus)

    def problems(self, nodes: int, time: str, gpus: int) -> list[Problem]:
        """Why it cannot take a job of this size."""
        found = [] if self.up == "up" else [Problem("executor.partition", self.name, f"is {self.up}")]
        limit, most = seconds(time), seconds(self.time)
        if most is not None and (limit is None or limit > most):
            found.append(Problem("executor.time", time, f"partition {self.name!r} allows {self.time}"))
        if nodes > self.nodes:
            found.append(Problem("executor.nodes", nodes, f"partition {self.name!r} has {self.nodes}"))
        enough = sum(count >= gpus for count in self.gpus)
        if gpus and enough < nodes <= self.nodes:
            if enough:
                found.append(Problem("executor.nodes", nodes, f"partition {self.name!r} has {enough} with {gpus} GPUs"))
            else:
                message = f"the nodes of partition {self.name!r} have at most {max(self.gpus)}"
                found.append(Problem("executor.gpus_per_node", gpus, message))
        return found


def warn_of_settings(shell: Shell) -> None:
    """Warns about environment variables that usually change a job, because they do not change this one."""
    answer = replace(shell, before="").ask('echo "${!SBATCH_@} ${SLURM_CLUSTERS:+SLURM_CLUSTERS}"')
    names = re.findall(r"\b(?:SBATCH_\w+|SLURM_CLUSTERS)\b", answer.out)
    if names:
        print(  # noqa: T201
            f"WARNING: sbatch does not get {', '.join(sorted(names))} of the environment on {shell.name}: the "
            "executor's settings count, such as executor.partition, or executor.additional_parameters for others",
            file=sys.stderr,
        )


def problems(
    shell: Shell, partition: str | None, account: str | None, nodes: int, time: str, gpus: int | None
) -> list[Problem]:
    """Why the cluster cannot run a job of this size, according to Slurm.

    Of several partitions, as in `a,b`, one is enough: Slurm takes the one that starts the job first.
    """
    try:
        of_each = [found.problems(nodes, time, gpus or 0) for found in _named(shell, partition)]
        found = [] if [] in of_each else [problem for each in of_each for problem in each]
    except ConfigError as error:
        found = [*error.problems]
    if account:
        answer = shell.ask('sacctmgr --noheader --parsable2 show assoc user="$(id -un)" format=account')
        accounts = sorted(set(answer.out.split())) if answer.code == 0 else []
        if accounts and account not in accounts:  # without accounting there are none
            found.append(Problem.unknown("executor.account", account, "account", accounts))
    return found


def gpus_of_a_node(shell: Shell, partition: str | None, nodes: int) -> int:
    """The most GPUs that each of `nodes` nodes of a partition has.

    Raises:
        ConfigError: Slurm does not say.
    """
    try:
        named = _named(shell, partition)
    except ConfigError as error:
        advice = Problem("executor.gpus_per_node", None, "set the number of GPUs that the run has on each node")
        raise ConfigError(*error.problems, advice) from None
    return max(sorted(found.gpus, reverse=True)[min(nodes, found.nodes) - 1] for found in named)


def gpu_types(shell: Shell, partition: str | None) -> frozenset[str]:
    """The types of the GPUs of a partition, as the cluster names them; "" among them if some have none.

    Raises:
        ConfigError: Slurm does not say.
    """
    return frozenset().union(*(found.types for found in _named(shell, partition)))


def types_of_gpus(gres: str) -> list[str]:
    """The type of each kind of GPU in generic resources: `a100` in `gpu:a100:4(S:0-1)`, "" in `gpu:4`."""
    return re.findall(r"(?<!\w)gpu(?=[:,(]|$)(?::([^:,(\d][^:,(]*))?", gres)


def has_nodes_away(shell: Shell, partition: str | None) -> bool:
    """Whether some nodes of a partition accept no jobs for now."""
    return any(found.away for found in _named(shell, partition))


def count_gpus(gres: str) -> int:
    """The number of GPUs in generic resources, as in sinfo and sbatch: `gpu:a100:4(S:0-1),shard:8`."""
    return sum(int(count or 1) for count in re.findall(r"(?<!\w)gpu(?=[:,(]|$)(?::[^:,(\d][^:,(]*)?(?::(\d+))?", gres))


_TIMES = (
    "allowed: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, "
    "days-hours:minutes:seconds, UNLIMITED"
)


def seconds(time: str) -> int | None:
    """A time limit as sbatch reads it; None means no limit.

    Raises:
        ConfigError: it is not a time.
    """
    if time.lower() in ("unlimited", "infinite", "0"):
        return None
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?)|(?:(?:(\d+):)?(\d+):(\d+))|(\d+)", time)
    if not match:
        raise ConfigError(Problem("time", time, "is not a time limit; " + _TIMES))
    days, day_hours, day_minutes, day_seconds, hours, minutes, rest, only = (
        int(group or 0) for group in match.groups()
    )
    return ((days * 24 + day_hours + hours) * 60 + day_minutes + minutes + only) * 60 + day_seconds + rest


def rows(text: str, bars: int) -> list[list[str]]:
    """Parses the lines with this number of bars; other lines come from a login script."""
    return [line.split("|") for line in text.splitlines() if line.count("|") == bars]


def _named(shell: Shell, names: str | None) -> list[Partition]:
    """The partitions with these names, separated by commas; the default partition if None.

    Raises:
        ConfigError: sinfo fails, or there is no such partition, or no default.
    """
    answer = shell.ask("sinfo --all --noheader --format='%P|%l|%D|%G|%a|%t'")  # --all: hidden ones take jobs too
    if answer.code:
        raise ConfigError(Problem("executor", "slurm", f"sinfo on {shell.name}: {answer.said}"))
    table = [row for row in rows(answer.out, 5) if row[2].isdigit()]
    known = sorted({row[0].rstrip("*") for row in table})
    if names is None:
        wanted: Sequence[str] = [row[0].rstrip("*") for row in table if row[0].endswith("*")][:1]
        if not wanted:
            raise ConfigError(Problem("executor.partition", None, f"{shell.name} has no default", known))
    else:
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        wrong = [
            Problem.unknown("executor.partition", name, "partition", known) for name in wanted if name not in known
        ]
        if wrong or not wanted:
            raise ConfigError(*wrong or [Problem("executor.partition", names, "names no partition", known)])
    made = []
    for name in wanted:
        ours = [row for row in table if row[0].rstrip("*") == name]
        gpus = tuple(count_gpus(row[3]) for row in ours for _ in range(int(row[2])))
        types = frozenset(kind for row in ours for kind in types_of_gpus(row[3]))
        up = "up" if any(row[4] == "up" for row in ours) else ours[0][4]
        away = sum(int(row[2]) for row in ours if not _PRESENT.fullmatch(row[5]))
        made.append(Partition(name, ours[0][1], up, gpus, types, away))
    return made
