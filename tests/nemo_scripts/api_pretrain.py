"""NeMo's API without recipes: objects and a call of the task."""

import argparse
from dataclasses import dataclass

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger


@dataclass
class Shallow(llm.Llama3Config8B):
    num_layers: int = 4
    seq_length: int = 4096


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-path", nargs="+", required=True)
    parser.add_argument("--devices", type=int, default=4)
    args = parser.parse_args()
    data = llm.PreTrainingDataModule(paths=args.data_path, seq_length=4096, global_batch_size=64, split="990,8,2")
    data.micro_batch_size = 2
    saving = nl.ModelCheckpoint(every_n_train_steps=200, save_top_k=3, monitor="val_loss")
    callbacks = [saving]
    callbacks.append(nl.pytorch.callbacks.GarbageCollectionCallback(100, 100))
    loggers = [TensorBoardLogger(save_dir="tb"), WandbLogger(project="llama", name="first", group="small")]
    strategy = nl.MegatronStrategy(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_dtype=torch.bfloat16)
    config = OptimizerConfig(optimizer="adam", lr=3e-4, adam_beta1=0.9, adam_beta2=0.99, bf16=True)
    schedule = nl.lr_scheduler.CosineAnnealingScheduler(max_steps=1000, warmup_steps=100, min_lr=3e-5)
    trainer = nl.Trainer(
        devices=args.devices,
        max_steps=1000,
        strategy=strategy,
        logger=loggers,
        callbacks=callbacks,
        plugins=nl.MegatronMixedPrecision(precision="bf16-mixed"),
    )
    llm.pretrain(
        model=llm.LlamaModel(Shallow(), tokenizer=data.tokenizer),
        data=data,
        trainer=trainer,
        log=nl.NeMoLogger(log_dir="logs"),
        optim=nl.MegatronOptimizerModule(config=config, lr_scheduler=schedule),
        tokenizer="data",
    )
