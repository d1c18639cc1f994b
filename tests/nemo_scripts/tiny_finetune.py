"""A few steps of adapters on a small model on a CPU."""

import nemo_run as run
from nemo import lightning as nl
from nemo.collections import llm


def tuned():
    recipe = llm.tiny_test.finetune_recipe(name="tuned", dir="results", peft_scheme="dora")
    recipe.data = run.Config(llm.FineTuningDataModule, dataset_root="examples", global_batch_size=2, micro_batch_size=2)
    recipe.data.seq_length = 64
    recipe.resume.restore_config = run.Config(nl.RestoreConfig, path="results/tiny")
    recipe.peft = run.Config(llm.peft.LoRA, dim=4, alpha=8)
    recipe.trainer.max_steps = 2
    recipe.trainer.log_every_n_steps = 1
    return recipe


run.run(tuned(), executor=run.LocalExecutor())
