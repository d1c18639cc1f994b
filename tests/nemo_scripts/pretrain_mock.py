"""Times a model on random data, with the data module and the optimizer replaced."""

import nemo_run as run
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing

SEQ = 2048

recipe = llm.qwen3_600m.pretrain_recipe(name="timing", num_nodes=1, num_gpus_per_node=8)
recipe.data = run.Config(llm.MockDataModule, seq_length=SEQ, global_batch_size=16, micro_batch_size=1)
recipe.optim = distributed_fused_adam_with_cosine_annealing(max_lr=1e-3, min_lr=1e-4, warmup_steps=10)
recipe.trainer.strategy = run.Config(
    nl.MegatronStrategy, tensor_model_parallel_size=1, context_parallel_size=2, ckpt_async_save=True
)
recipe.trainer.max_steps = 50
recipe.trainer.plugins = run.Config(nl.MegatronMixedPrecision, precision="bf16-mixed")
recipe.log.tensorboard = None

if __name__ == "__main__":
    run.run(recipe, executor=run.LocalExecutor(ntasks_per_node=8, launcher="torchrun"))
