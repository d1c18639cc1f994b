"""Trains adapters on packed rows, in a container."""

import nemo_run as run
from nemo.collections import llm

recipe = llm.mistral_7b.finetune_recipe(
    name="packed", dir="runs", num_nodes=1, num_gpus_per_node=2, packed_sequence=True
)
recipe.trainer.strategy.context_parallel_size = 2
recipe.data.packed_sequence_specs = run.Config(
    llm.gpt.data.packed_sequence.PackedSequenceSpecs, packed_sequence_size=4096
)
recipe.trainer.log_every_n_steps = 5
recipe.log.wandb = run.Config(object, project="tuning")

executor = run.DockerExecutor(
    container_image="nemo:25.07", num_gpus=2, volumes=["/data:/data"], env_vars={"HF_HOME": "/data/hf"}
)
run.run(recipe, executor=executor)
