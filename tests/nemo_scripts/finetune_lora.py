"""Imports weights and trains adapters on a folder of examples."""

import nemo_run as run
from nemo import lightning as nl
from nemo.collections import llm

if __name__ == "__main__":
    llm.import_ckpt(model=llm.LlamaModel(llm.Llama31Config8B()), source="hf://meta-llama/Llama-3.1-8B")
    recipe = llm.llama31_8b.finetune_recipe(
        dir="runs", name="lora", num_nodes=1, num_gpus_per_node=1, peft_scheme="lora", packed_sequence=False
    )
    recipe.data = run.Config(
        llm.FineTuningDataModule, dataset_root="examples", seq_length=2048, global_batch_size=8, micro_batch_size=1
    )
    recipe.peft = run.Config(llm.peft.LoRA, dim=8, alpha=16, target_modules=["linear_qkv"])
    recipe.resume.restore_config = run.Config(nl.RestoreConfig, path="nemo://meta-llama/Llama-3.1-8B")
    recipe.trainer.max_steps = 20
    recipe.trainer.limit_val_batches = 4
    run.run(recipe, executor=run.LocalExecutor(ntasks_per_node=1))
