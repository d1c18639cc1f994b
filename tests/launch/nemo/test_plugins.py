"""NeMo's plugins, by their names, set the fields of a recipe and an executor that mean the same."""

from __future__ import annotations

from typing import Any

import nemo_run as run
import pytest
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import WandbLogger

from fiddlehead.errors import ConfigError
from fiddlehead.launch.nemo.plugins import (
    ConfigValidationPlugin,
    FaultTolerancePlugin,
    NsysPlugin,
    PerfEnvPlugin,
    PreemptionPlugin,
    WandbPlugin,
)
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.tiny import tiny_test


def slurm() -> run.SlurmExecutor:
    return run.SlurmExecutor(account="me", partition="batch")


def logger(name: str, **options: Any) -> run.Config[WandbLogger]:
    return run.Config(WandbLogger, name=name, **options)


def changed(executor: Any, *plugins: run.Plugin) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a recipe and of an executor that plugins change."""
    recipe, before = tiny_test(), executor.clone()
    for plugin in plugins:
        plugin.setup(recipe, executor)
    fields = {difference.path: difference.right for difference in tiny_test().diff(recipe)}
    settings = {name: value for name, value in vars(executor).items() if value != vars(before).get(name, value)}
    return fields, settings


def test_each_plugin_sets_what_means_the_same() -> None:
    stopping = run.Config(EarlyStopping, monitor="val_loss")
    fields, settings = changed(slurm(), PreemptionPlugin(preempt_time=120, callbacks=[stopping]))
    assert settings == {"signal": "USR1@120"} and fields["trainer.callbacks[0].monitor"] == "val_loss"
    assert changed(run.LocalExecutor(), PreemptionPlugin()) == ({}, {})
    assert changed(slurm(), FaultTolerancePlugin()) == ({}, {"retries": 2})
    assert changed(slurm(), NsysPlugin(start_step=9, end_step=11)) == ({"log.nsys": "10:12"}, {})
    traced = changed(slurm(), NsysPlugin(start_step=0, end_step=0, nsys_trace=["cuda"]))
    assert traced[0] == {"log.nsys": "1:1"} and traced[1]["launcher"].nsys_trace == ["cuda"]
    plugin = WandbPlugin(name="one", logger_fn=lambda name: logger(name, project="p", entity="e"), base_url="http://w")
    fields, settings = changed(run.LocalExecutor(), plugin)
    assert fields == {"log.name": "one", "log.wandb": True, "log.wandb_project": "p", "log.wandb_entity": "e"}
    assert settings == {"env_vars": {"WANDB_BASE_URL": "http://w"}}
    assert changed(slurm(), PerfEnvPlugin(), ConfigValidationPlugin()) == ({}, {})
    assert changed(slurm(), PerfEnvPlugin(nccl_pp_comm_chunksize=2**21))[1] == {
        "env_vars": {"NCCL_P2P_NET_CHUNKSIZE": "2097152"}
    }


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (FaultTolerancePlugin(), "plugins='FaultTolerancePlugin': a job of LocalExecutor is not queued again; "),
        (FaultTolerancePlugin(rank_heartbeat_timeout=9), "FaultTolerancePlugin.rank_heartbeat_timeout=9: a process "),
        (NsysPlugin(start_step=1, end_step=2, ranks=[0, 8]), r"NsysPlugin.ranks=\[0, 8\]: the first rank says when"),
        (PerfEnvPlugin(enable_vboost=True), "PerfEnvPlugin.enable_vboost=True: set the clocks in .* setup_lines"),
        (WandbPlugin(name="other"), "WandbPlugin.name='other': the run has one name, and log.name='mine'"),
        (WandbPlugin(logger_fn=lambda name: logger(name, log_model="all")), "WandbPlugin.logger_fn.log_model='all': "),
        (ConfigValidationPlugin(validate_wandb=True), "log.wandb=False: ConfigValidationPlugin.validate_wandb is set"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_means_nothing_here_is_refused_with_the_reason(plugin: run.Plugin, said: str) -> None:
    recipe = tiny_test()
    recipe.log.name = "mine"
    with pytest.raises(ConfigError, match=said):
        plugin.setup(recipe, run.LocalExecutor())
    with pytest.raises(ConfigError, match="is for recipes; add this task without it"):
        plugin.setup(run.Script(inline="true"), run.LocalExecutor())
    with pytest.raises(ConfigError, match="is for recipes"):
        plugin.setup(Recipe(print, "x"), run.LocalExecutor())
