"""A callback of the script's own, a schedule of checkpoints, and fdl.build by hand."""

import fiddle as fdl
import nemo_run as run
from lightning.pytorch.callbacks import Callback
from nemo import lightning as nl
from nemo.collections import llm


class StopEarly(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step > 10


recipe = llm.gemma2_2b.pretrain_recipe(name="callbacks", num_nodes=1, num_gpus_per_node=8)
recipe.trainer.callbacks.append(run.Config(StopEarly))
recipe.log = run.Config(
    nl.NeMoLogger,
    log_dir="results",
    ckpt=run.Config(nl.ModelCheckpoint, every_n_train_steps=100, save_top_k=2, save_last=True, monitor="val_loss"),
)
recipe.resume = run.Config(nl.AutoResume, resume_if_exists=True, resume_ignore_no_checkpoint=True)
recipe.trainer.val_check_interval = 100

if __name__ == "__main__":
    task = fdl.build(recipe)
    task()
