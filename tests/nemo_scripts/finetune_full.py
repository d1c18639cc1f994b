"""Trains all weights on a public set of questions, in an experiment of two tasks."""

import nemo_run as run
from nemo.collections import llm


def importing():
    return run.Partial(llm.import_ckpt, model=llm.qwen25_7b.model(), source="hf://Qwen/Qwen2.5-7B", overwrite=False)


def tuning():
    recipe = llm.qwen25_7b.finetune_recipe(dir="/runs", name="full", num_nodes=1, num_gpus_per_node=4, peft_scheme=None)
    recipe.data = run.Config(llm.DollyDataModule, seq_length=2048, global_batch_size=16, micro_batch_size=2)
    recipe.trainer.strategy.tensor_model_parallel_size = 1
    recipe.trainer.val_check_interval = 1.0
    recipe.trainer.max_epochs = 1
    recipe.optim.config.lr = 5e-6
    return recipe


if __name__ == "__main__":
    executor = run.LocalExecutor(ntasks_per_node=4, launcher="torchrun")
    with run.Experiment("qwen") as exp:
        exp.add(importing(), executor=run.LocalExecutor(), name="import")
        exp.add(tuning(), executor=executor, name="tune")
        exp.run(sequential=True)
