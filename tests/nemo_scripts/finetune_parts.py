"""Each part is made in a function of its own, and the task is given all of them."""

import lightning.pytorch as pl
import nemo_run as run
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed


def weights():
    return run.Partial(llm.import_ckpt, model=llm.llama32_1b.model(), source="hf://meta-llama/Llama-3.2-1B")


def questions(size=8) -> run.Config[pl.LightningDataModule]:
    return run.Config(llm.SquadDataModule, seq_length=1024, micro_batch_size=1, global_batch_size=size)


def trainer() -> run.Config[nl.Trainer]:
    strategy = run.Config(nl.MegatronStrategy, tensor_model_parallel_size=1)
    made = run.Config(nl.Trainer, devices=1, max_steps=20, accelerator="gpu", strategy=strategy, plugins=bf16_mixed())
    made.log_every_n_steps = 1
    return made


def adam():
    config = run.Config(OptimizerConfig, optimizer="adam", lr=5e-6, adam_beta2=0.98, bf16=True)
    return run.Config(nl.MegatronOptimizerModule, config=config)


def tuning():
    return run.Partial(
        llm.finetune,
        model=run.Config(llm.LlamaModel, config=run.Config(llm.Llama32Config1B)),
        trainer=trainer(),
        data=questions(size=16),
        log=run.Config(nl.NeMoLogger, name="sft", log_dir="./results", wandb=None),
        peft=run.Config(llm.peft.LoRA, dim=8),
        optim=adam(),
        resume=run.Config(
            nl.AutoResume, restore_config=run.Config(nl.RestoreConfig, path="nemo://meta-llama/Llama-3.2-1B")
        ),
    )


if __name__ == "__main__":
    run.run(weights(), executor=run.LocalExecutor())
    run.run(tuning(), executor=run.LocalExecutor(ntasks_per_node=1, launcher="torchrun"))
