"""A few steps of a small model on a CPU."""

import nemo_run as run
from nemo.collections import llm

STEPS = 4

recipe = llm.tiny_test.pretrain_recipe(name="tiny", dir="results")
recipe.trainer.max_steps = STEPS
recipe.trainer.val_check_interval = 2
recipe.optim.config.lr = 1e-3
recipe.optim.config.adam_beta2 = 0.98
recipe.log.ckpt.every_n_train_steps = 2

run.run(recipe, executor=run.LocalExecutor(launcher="torchrun"))
