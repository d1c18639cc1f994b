"""Pretrains a large model on Slurm over SSH, in an experiment."""

import nemo_run as run
from nemo.collections import llm

ACCOUNT = "research"
NODES = 8


def cluster(user, host, nodes=NODES, time="04:00:00"):
    executor = run.SlurmExecutor(
        account=ACCOUNT,
        partition="batch",
        nodes=nodes,
        ntasks_per_node=8,
        gpus_per_node=8,
        time=time,
        mem="0",
        exclusive=True,
        container_image="nvcr.io/nvidia/nemo:25.07",
        container_mounts=["/data:/data"],
        tunnel=run.SSHTunnel(user=user, host=host, job_dir="/scratch/runs"),
        packager=run.GitArchivePackager(),
        retries=2,
    )
    executor.env_vars = {"NCCL_NVLS_ENABLE": "0"}
    return executor


recipe = llm.llama3_70b.pretrain_recipe(name="llama70b", dir="/data/runs", num_nodes=NODES, num_gpus_per_node=8)
recipe.trainer.strategy.context_parallel_size = 2
recipe.trainer.strategy.virtual_pipeline_model_parallel_size = None
recipe.trainer.max_steps = 100
recipe.log.ckpt.save_top_k = 3
recipe.log.ckpt.every_n_train_steps = 50

with run.Experiment("llama-70b") as exp:
    exp.add(recipe, executor=cluster("me", "login.example.com"), name="train")
    exp.run(detach=True)
