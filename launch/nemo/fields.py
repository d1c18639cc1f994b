"""Each field of NeMo-Run's executors, packagers, tunnels and launchers, and what becomes of it.

A field becomes a setting of ours, is refused, or has nothing to decide here. docs/nemo_run.md shows it as tables.
NeMo-Run is not imported: its classes are known by name.
"""

from __future__ import annotations

from fiddlehead.launch.nemo import takes
from fiddlehead.launch.nemo.takes import Field

_SHIPPED = "the working tree is shipped, with uncommitted changes"
_LAUNCHER = "nemo_run.core.execution.launcher."
_PACKAGING = "nemo_run.core.packaging."
LAUNCHERS = ("torchrun",)
"""The names of launchers that are taken over."""
ADVICE = {
    "ft": "a run that fails or is killed is queued again without it; leave it out",
    "FaultTolerance": "a run that fails or is killed is queued again without it; leave it out",
    "SlurmRay": "a job is not a Ray cluster; use 'torchrun' or None",
    "SlurmTemplate": "the script is not a template; use setup_lines",
    "slurm_ray": "a job is not a Ray cluster; use 'torchrun' or None",
    "slurm_template": "the script is not a template; use setup_lines",
}
"""What to use instead of launchers that are refused."""
OF_NEMO_RUN = takes.unused("set by NeMo-Run's experiments; a run has a directory of its own, `log.dir`/`log.name`")
"""Fields that are not a user's."""
_GROUPS = takes.unused("for groups of tasks only; each run is a job of its own")
_NO_RETRIES = takes.refused("a run that has ended is continued with `fiddlehead runs rerun`, or started again by hand")
_TASKS = Field("`ntasks_per_node`; 1 follows `trainer.devices`", takes.more_than_one)
_ANY = {
    "packager": Field(_SHIPPED, is_part=True),
    "launcher": Field("the job starts one process for each device", is_part=True),
    "env_vars": Field(
        "`env_vars`; `secrets` for names that look secret and are exported with the same value", takes.variables
    ),
    "retries": _NO_RETRIES,
    **dict.fromkeys(("experiment_id", "job_dir", "experiment_dir", "_launcher_setup"), OF_NEMO_RUN),
}  # fmt: skip
_LOCAL = {
    **_ANY,
    "packager": takes.unused("the job imports the working tree itself"),
    "ntasks_per_node": _TASKS,
    "nodes": takes.same("nodes", "there is one machine"),
}
_DOCKER = {
    **_ANY,
    "container_image": takes.same("image"),
    "ntasks_per_node": _TASKS,
    "runtime": takes.argument("runtime"),
    "num_gpus": Field(
        "`gpus`; -1 gives the GPUs that the recipe uses", lambda owner, value: {"gpus": max(0, value or 0)}
    ),
    "shm_size": takes.same("shm_size"),
    "ulimits": Field("`additional_kwargs`, `ulimits`", takes.ulimits),
    "ipc_mode": takes.argument("ipc_mode"),
    "healthcheck": takes.refused("the run says itself whether it lives; leave it out"),
    "privileged": takes.argument("privileged"),
    "network": takes.same("network"),
    "additional_kwargs": takes.same("additional_kwargs"),
    "volumes": takes.same("mounts"),
    **dict.fromkeys(("job_name", "run_as_group", "resource_group"), OF_NEMO_RUN),
}
_SLURM = {
    **_ANY,
    "launcher": Field("`launcher`: `torchrun`; `srun` if it has none", takes.started, is_part=True),
    "retries": Field(
        "`requeues`; 0 leaves the default, which is 1000", lambda owner, value: {"requeues": value} if value else {}
    ),
    **{
        name: takes.same(name)
        for name in (
            "account", "partition", "job_name_prefix", "nodes", "gpus_per_node", "qos", "mem", "constraint",
            "exclude", "gres", "container_mounts", "additional_parameters", "srun_args",
        )
    },
    "time": takes.same("time", "of one attempt"),
    "ntasks_per_node": Field(
        "`ntasks_per_node`; 1 follows `gpus_per_node`, or `trainer.devices` if that is not set", takes.processes
    ),
    "torchrun_nproc_per_node": takes.unused("`ntasks_per_node`"),
    "gpus_per_task": Field("`gpus_per_node`; refused above 1 if there are several tasks", takes.gpus_per_task),
    "cpus_per_task": Field("`cpus_per_task`, of which each process gets its part if a task starts several", takes.cpus),
    **{
        name: takes.option(name)
        for name in ("cpus_per_gpu", "mem_per_gpu", "mem_per_cpu", "comment", "segment", "network")
    },
    "signal": Field("`save_before`, its seconds; the signal is always `USR1`", takes.signal),
    "exclusive": Field("`exclusive`; refused if it is a text", takes.exclusive),
    "array": takes.refused("a run is one job; --sweep, or a loop, makes several runs"),
    "open_mode": takes.refused("all attempts are appended to one log"),
    "container_image": takes.same("container"),
    "container_env": Field("`srun_args`, `--container-env`", takes.container_variables),
    "heterogeneous": takes.refused("the nodes of a run are alike; leave it out"),
    "het_group_indices": takes.refused("the nodes of a run are alike; leave it out"),
    "memory_measure": takes.refused("the memory of each GPU is in the run's metrics; leave it out"),
    "job_details": takes.refused("a run keeps its output in its directory, `log.dir`/`log.name`"),
    "tunnel": Field("of an `SSHTunnel`, `host`, `user`, `port`, `identity` and `remote_dir`", is_part=True),
    "dependencies": takes.refused("name the runs themselves: launch(..., after=[run]), or --after"),
    "dependency_type": takes.refused("after=[run] waits for success, after_any=[run] for any end"),
    **dict.fromkeys(("wait_time_for_group_job", "monitor_group_job", "monitor_group_job_wait_time"), _GROUPS),
    "setup_lines": takes.same("setup_lines", "they run on every node"),
    "ray_template": takes.refused("a job is not a Ray cluster; leave it out"),
    "poll_estimated_start_time": takes.unused("a command that follows a run says why it waits"),
    "stderr_to_stdout": takes.refused("errors are in the log, with the output"),
    **dict.fromkeys(("job_name", "resource_group", "run_as_group"), OF_NEMO_RUN),
}  # fmt: skip
_PACKAGER = {
    "debug": takes.refused("the job runs without torchrun's flags; leave it out"),
    "symlink_from_remote_dir": takes.refused("the code is shipped from here; leave it out"),
}
_NSYS = {
    "nsys_profile": takes.refused("log.nsys='10:12' profiles these steps"),
    **dict.fromkeys(
        ("nsys_folder", "nsys_filename", "nsys_trace", "nsys_extra_args", "nsys_gpu_metrics"),
        takes.unused("for `nsys_profile` only"),
    ),
}
_TUNNEL = {"packaging_jobs": OF_NEMO_RUN}
KINDS = {
    "nemo_run.core.execution.local.LocalExecutor": "local",
    "nemo_run.core.execution.docker.DockerExecutor": "docker",
    "nemo_run.core.execution.slurm.SlurmExecutor": "slurm",
}
"""The executors that are taken over, and our kinds that take them."""
PARTS: dict[str, dict[str, Field]] = {
    **dict(zip(KINDS, (_LOCAL, _DOCKER, _SLURM), strict=True)),
    _PACKAGING + "base.Packager": _PACKAGER,
    _PACKAGING + "git.GitArchivePackager": {
        **_PACKAGER,
        "basepath": takes.refused("the working directory is shipped; start there"),
        "subpath": Field("the job starts where the launch does; refused if that is another folder", takes.subpath),
        "ref": takes.refused("the working tree is shipped as it is; check that revision out"),
        "include_submodules": takes.unused("submodules are shipped"),
        "include_pattern": Field("files of the working directory are shipped, unless git ignores them", takes.pattern),
        "include_pattern_relative_path": takes.unused("files keep their paths"),
        "check_uncommitted_changes": takes.unused("uncommitted changes are shipped"),
        "check_untracked_files": takes.unused("untracked files are shipped, unless git ignores them"),
    },
    _PACKAGING + "pattern.PatternPackager": {
        **_PACKAGER,
        "include_pattern": Field("files of the working directory are shipped, unless git ignores them", takes.pattern),
        "relative_path": takes.unused("files keep their paths"),
    },
    _PACKAGING + "hybrid.HybridPackager": {
        **_PACKAGER,
        "sub_packagers": Field("each as if it were the only one", is_part=True),
        "extract_at_root": takes.unused("files keep their paths"),
    },
    "nemo_run.core.tunnel.client.LocalTunnel": {
        **_TUNNEL,
        **dict.fromkeys(("job_dir", "host", "user"), takes.unused("runs are in `log.dir`")),
    },
    "nemo_run.core.tunnel.client.SSHTunnel": {
        **_TUNNEL,
        "job_dir": takes.same("remote_dir"),
        **{name: takes.same(name) for name in ("host", "user", "port", "identity")},
        "shell": takes.refused("commands run in the login shell; leave it out"),
        "pre_command": takes.refused("set the PATH in the login shell's own files, so that `ssh HOST sbatch` finds it"),
    },
    _LAUNCHER + "Launcher": _NSYS,
    _LAUNCHER + "Torchrun": {
        **_NSYS,
        **dict.fromkeys(
            ("rdzv_backend", "rdzv_port", "rdzv_id"),
            takes.refused("each job finds an address and a free port; leave it out"),
        ),
    },
}  # fmt: skip
"""Each class that is taken over, by name, and what becomes of each of its fields."""
