"""Options of a command line choose the model, the sizes and where it runs."""

import argparse
from functools import partial

import nemo_run as run
from nemo.collections import llm
from nemo.lightning.run import plugins


def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="llama3_8b", choices=["llama3_8b", "mistral_7b"])
    parser.add_argument("--tag", type=str, default="a")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--peak-lr", type=float, default=2e-4)
    parser.add_argument("--out", required=True)
    parser.add_argument("--slurm", action="store_true")
    return parser


def cluster(account: str, nodes: int, devices: int, mounts: list[str] | None = None) -> run.SlurmExecutor:
    if not account:
        raise RuntimeError("an account is needed")
    env = {"NCCL_NVLS_ENABLE": "0"}
    volumes = []
    if mounts:
        volumes.extend(mounts)
    env |= {"TRANSFORMERS_OFFLINE": "1"}
    executor = run.SlurmExecutor(
        account=account,
        nodes=nodes,
        ntasks_per_node=devices,
        gpus_per_node=devices,
        packager=run.GitArchivePackager(subpath="examples"),
    )
    executor.container_mounts = volumes
    executor.env_vars = env
    return executor


def here(devices: int = 2):
    return run.LocalExecutor(ntasks_per_node=devices, launcher="torchrun")


def main():
    args = options().parse_args()
    label = f"{args.recipe}-{args.tag}"
    pretrain = partial(getattr(llm, args.recipe).pretrain_recipe, num_nodes=args.nodes)(name=label, dir=args.out)
    pretrain.optim.config.lr = args.peak_lr
    pretrain.trainer.max_steps = 1000
    pretrain.optim.lr_scheduler.warmup_steps = 0.1 * pretrain.trainer.max_steps
    if args.slurm:
        executor = cluster("", nodes=pretrain.trainer.num_nodes, devices=pretrain.trainer.devices)
    else:
        executor = here(devices=pretrain.trainer.devices)
    with run.Experiment(label) as exp:
        for _ in range(1):
            exp.add(pretrain, executor=executor, plugins=[plugins.NsysPlugin(start_step=5, end_step=6)])
        exp.run(sequential=True)


if __name__ == "__main__":
    main()
