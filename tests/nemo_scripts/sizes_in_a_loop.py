"""A run for each size of a table, with callbacks, and the folder from the environment."""

import os
from datetime import timedelta

import nemo_run as run
from lightning.pytorch.callbacks import EarlyStopping
from nemo import lightning as nl
from nemo.collections import llm
from nemo.utils.exp_manager import TimingCallback

SIZES = {"1b": (llm.llama32_1b, 1), "3b": (llm.llama32_3b, 2)}
OUT = os.environ.get("OUT", "/runs")
GBS, SEQ = 256, 4096


def shared(r, hours):
    r.trainer.callbacks.append(run.Config(TimingCallback))
    r.trainer.callbacks.append(run.Config(EarlyStopping, monitor="val_loss", patience=3))
    r.log.ckpt = run.Config(nl.ModelCheckpoint, save_top_k=2, train_time_interval=run.Config(timedelta, hours=hours))
    return r


def build(model, tp, name):
    r = model.pretrain_recipe(dir=OUT, name=name, num_nodes=1, num_gpus_per_node=8, performance_mode=True)
    shared(r, hours=1)
    r.trainer.strategy.tensor_model_parallel_size = tp
    r.data.global_batch_size = GBS
    r.data.seq_length = r.model.config.seq_length = SEQ
    if tp > 1:
        r.model.config.recompute_granularity = "full"
    return r


for size, (model, tp) in SIZES.items():
    with run.Experiment(f"sizes-{size}") as exp:
        executor = run.LocalExecutor(ntasks_per_node=8, env_vars={key: "1" for key in ("A", "B") if key})
        exp.add(build(model, tp, f"llama-{size}"), executor=executor, name=f"train_{size}")
        exp.run(detach=False)
