"""Pretrains on this machine, with recipe and executor made in functions of their own."""

import nemo_run as run
from nemo.collections import llm


def make_recipe(nodes: int = 1, gpus: int = 2):
    recipe = llm.llama32_1b.pretrain_recipe(
        dir="checkpoints", name="small_llama", num_nodes=nodes, num_gpus_per_node=gpus
    )
    recipe.trainer.max_steps = 40
    recipe.trainer.val_check_interval = 20
    recipe.trainer.limit_val_batches = 2
    recipe.trainer.strategy.tensor_model_parallel_size = 2
    recipe.trainer.strategy.sequence_parallel = True
    recipe.optim.config.lr = 2e-4
    recipe.optim.lr_scheduler.warmup_steps = 4
    return recipe


def this_machine(devices: int = 2) -> run.LocalExecutor:
    env_vars = {"NCCL_NVLS_ENABLE": "0", "NVTE_FUSED_ATTN": "1"}
    return run.LocalExecutor(ntasks_per_node=devices, launcher="torchrun", env_vars=env_vars)


def main():
    recipe = make_recipe()
    executor = this_machine(devices=recipe.trainer.devices)
    executor.env_vars["NCCL_DEBUG"] = "WARN"
    run.run(recipe, executor=executor, name="pretraining")


if __name__ == "__main__":
    main()
