"""A model gets its optimizer in its constructor: by a recipe, and by Python."""

from __future__ import annotations

from typing import Any

import fiddle as fdl
import pytest
from lightning.pytorch import LightningDataModule, Trainer

from fiddlehead import tasks
from fiddlehead.data.random_tokens import RandomTokens
from fiddlehead.errors import ConfigError
from fiddlehead.models import TransformerConfig
from fiddlehead.recipes.finetune import dpo
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.training import AdamW, LanguageModel, Muon
from tests.training.conftest import Parts, plan_of, rows

SHAPE = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=64, seq_length=16)


class Scaled(LanguageModel):
    """A user's module, whose constructor knows nothing of optimizers."""

    def __init__(self, config: TransformerConfig, scale: float = 1.0) -> None:
        super().__init__(config)
        self.scale = scale

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self.scale * super().training_step(batch, batch_idx)


def quiet_trainer(**settings: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", max_epochs=-1, max_steps=2, use_distributed_sampler=False, **quiet, **settings)


@pytest.fixture
def data() -> LightningDataModule:
    made = RandomTokens(64, 16, 4, 4)
    made.model_vocab_size = 64
    return made


def test_a_recipe_builds_its_model_with_its_optimizer() -> None:
    recipe = tiny_test()
    fdl.update_callable(recipe.optim, Muon)
    built = recipe.build_arguments()
    assert type(built["optim"]) is Muon and built["model"].optim is built["optim"]
    recipe = dpo()
    recipe.model.init_from, recipe.trainer.accelerator = "weights", "cpu"
    recipe.trainer.devices = 1
    del recipe.trainer.strategy
    built = recipe.build_arguments()
    assert built["model"].optim is built["optim"] and built["model"].optim.lr == 5e-5


def test_a_model_with_an_optimizer_is_trained_by_lightning_alone(data: LightningDataModule) -> None:
    model = LanguageModel(SHAPE, optim=AdamW(lr=0.0625))
    trainer = quiet_trainer()
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 2 and trainer.optimizers[0].defaults["lr"] == 0.0625


def test_a_model_without_an_optimizer_says_that_it_needs_one(data: LightningDataModule) -> None:
    with pytest.raises(ConfigError, match=r"optim=None: a model that is trained needs an optimizer"):
        quiet_trainer().fit(LanguageModel(SHAPE), datamodule=data)


def test_a_module_whose_constructor_takes_no_optimizer_is_trained_with_that_of_the_task(parts: Parts) -> None:
    made = parts(max_steps=3, name="own")
    config = made["model"].config
    run = tasks.pretrain(**made | {"model": Scaled(config)})
    assert rows(run, "loss") == rows(tasks.pretrain(**parts(max_steps=3, name="ours")), "loss")


def test_two_optimizers_are_refused(parts: Parts) -> None:
    made = parts()
    config = made["model"].config
    plan_of(made | {"model": LanguageModel(config, optim=made["optim"])})
    with pytest.raises(ConfigError, match=r"^model: has another optimizer than optim; give only one of them$"):
        plan_of(made | {"model": LanguageModel(config, optim=Muon())})
