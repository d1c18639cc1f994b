"""NeMo's names are answered with ours, on the command line and in Python."""

from __future__ import annotations

import copy
from typing import Any

import fiddle as fdl
import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch.docker import docker
from fiddlehead.launch.slurm import SlurmExecutor, slurm
from fiddlehead.models import LoRA
from fiddlehead.recipe import Recipe, catalog
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipe.nemo_names import NAMES, explain
from fiddlehead.recipe.slots import find_slot
from fiddlehead.recipes.llama import llama3_8b
from fiddlehead.training.distributed.parallel import Parallel

TUNED = llama3_8b.finetune_recipe()

TYPED = {
    "trainer.strategy.tensor_model_parallel_size=2": "trainer.strategy.tensor_parallel",
    "strategy.tensor_model_parallel_size=2": "trainer.strategy.tensor_parallel",
    "tensor_model_parallel_size=2": "trainer.strategy.tensor_parallel",
    "trainer.strategy.sequence_parallel=True": "always splits the sequence too",
    "trainer.strategy.ddp.overlap_grad_reduce=True": "FSDP2",
    "optim.config.lr=1e-4": "optim.lr",
    "optim.config.adam_beta2=0.98": "optim.betas[1]",
    "log.ckpt.save_top_k=3": "checkpoint.keep_best",
    "log.log_dir=x": "log.dir",
    "resume.restore_config.path=x": "model.init_from",
    "resume.resume_if_exists=True": "'auto' is true",
    "data.dataset_root=x": "data.paths",
    "peft.dim=8": "model.lora.rank",
    "model.config.recompute_granularity=full": "model.activation_checkpointing",
    "trainer.plugins.precision=x": "'bf16-mixed'",
    "model.lora=LoRA(dim=8)": "model.lora.rank",
    "model.lora.dim=8": "model.lora.rank",
}


@pytest.mark.parametrize("edit", TYPED)
def test_a_typed_name_of_nemo_is_answered_with_ours(edit: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(TUNED, [edit], find=catalog.find_part)
    assert TYPED[edit] in str(error.value) and len(str(error.value)) < 400


def set_at(recipe: Any, path: str, value: Any = 2) -> None:
    *above, last = path.split(".")
    for name in above:
        recipe = getattr(recipe, name)
    setattr(recipe, last, value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("trainer.strategy.tensor_model_parallel_size", "trainer.strategy.tensor_parallel"),
        ("trainer.strategy.sequence_parallel", "leave it out"),
        ("optim.config.lr", "optim.lr"),
        ("log.ckpt.save_top_k", "checkpoint.keep_best"),
        ("log.log_dir", "log.dir"),
        ("model.lora.dim", "model.lora.rank"),
        ("peft.dim", "model.lora"),
        ("data.dataset_root", "data.paths"),
        ("resume.restore_config.path", "; NeMo's resume.restore_config is model.init_from here"),
        ("resume.resume_if_exists", "'auto' is true"),
        ("resume.resume_from_path", "NeMo's resume.resume_from_path is resume here"),
        ("trainer.max_step", "did you mean 'max_steps'?"),
    ],
)
def test_a_name_of_nemo_in_python_is_answered_with_ours(path: str, said: str) -> None:
    with pytest.raises(AttributeError) as error:
        set_at(copy.deepcopy(TUNED), path)
    assert said in str(error.value) and len(str(error.value)) < 700


def test_a_name_of_nemo_in_a_constructor_is_answered_with_ours() -> None:
    with pytest.raises(TypeError, match=r"^LoRA has no dim; NeMo's peft.dim is model.lora.rank here$"):
        fdl.Config(LoRA, dim=8, alpha=16)
    with pytest.raises(TypeError) as error:
        fdl.Config(Parallel, tensor_model_parallel_size=2, pipeline_parallell=2)
    assert "trainer.strategy.tensor_parallel here" in str(error.value)
    assert "did you mean 'pipeline_parallel'?" in str(error.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'something'"):
        fdl.Config(LoRA, something=8)
    with pytest.raises(TypeError, match=r"missing|unexpected|callable"):
        fdl.Config(3, dim=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("resume.restore_config", "; NeMo's resume.restore_config is model.init_from here"),
        ("log.wandb.project", "; NeMo's log.wandb.project is log.wandb_project here"),
        ("resume.something", "has no attribute 'something'"),
    ],
)
def test_a_field_of_what_is_a_plain_value_here_is_explained(path: str, said: str) -> None:
    with pytest.raises(AttributeError) as error:
        set_at(copy.deepcopy(TUNED), path)
    assert explain(error.value).endswith(said)


def test_the_text_of_resume_is_still_a_text() -> None:
    recipe, other = copy.deepcopy(TUNED), copy.deepcopy(TUNED)
    recipe.resume = "runs/before"
    other.resume = recipe.resume
    assert other.resume == "runs/before" and "resume: runs/before\n" in other.to_yaml() and recipe == other
    assert copy.deepcopy(other.resume) == "runs/before"


def test_what_is_set_in_python_is_still_known_by_its_line() -> None:
    recipe = copy.deepcopy(TUNED)
    recipe.optim.lr = 1.0
    recipe.model.lora = fdl.Config(LoRA, rank=4)
    assert {recipe.sources()[path].split(":")[0] for path in ("optim.lr", "model.lora.rank")} == {
        "tests/recipe/test_nemo_names.py"
    }


def test_other_configurations_answer_as_before() -> None:
    class Other:
        def __init__(self, size: int = 1) -> None: ...

    with pytest.raises(AttributeError, match="No parameter named 'tensor_model_parallel_size'"):
        fdl.Config(Other).tensor_model_parallel_size = 2
    assert not hasattr(fdl.Config(LoRA), "dim")


def test_executors_answer_with_their_own_names() -> None:
    with pytest.raises(ConfigError, match=r"executor.container_image is executor.container here"):
        slurm(container_image="image")
    with pytest.raises(ConfigError, match=r"executor.volumes is executor.mounts here"):
        docker(image="image", volumes=["a:b"])
    with pytest.raises(ConfigError, match=r"executor.container_image is executor.container here"):
        apply_overrides(Recipe(SlurmExecutor), ["container_image=image"])


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.nemo)
def test_what_the_table_offers_exists(name: Any) -> None:
    assert name.ours or name.note
    if name.ours.startswith("executor."):
        fields = {**SlurmExecutor.__dataclass_fields__, "gpus": None, "mounts": None}
        assert name.ours.removeprefix("executor.") in fields
    elif name.ours.startswith("data.") and not name.ours.endswith(("packed", "template")):
        find_slot(llama3_8b(), name.ours)
    elif name.ours.startswith(("trainer", "optim", "log", "checkpoint", "model", "resume", "data")):
        find_slot(TUNED, name.ours)
