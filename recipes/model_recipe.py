"""What makes a pretraining recipe of a model take NeMo's arguments, and fine-tune that model too."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any, Literal, Protocol

from fiddlehead.errors import Problem, refuse
from fiddlehead.numbers import is_whole
from fiddlehead.recipe import Recipe
from fiddlehead.recipes import finetune
from fiddlehead.recipes.base import laid_out
from fiddlehead.recipes.layouts import FINETUNING, Layout

PeftScheme = Literal["lora", "dora", "qlora", "none"] | None
Method = Literal["sft", "dpo"]

GPU = "h100"
"""The GPU for which the recipes' layouts are chosen."""
SEQ_LENGTH = 2048
"""The longest row of a fine-tuning recipe, in tokens."""
UNKNOWN_LAYOUT = {8: Layout(1, "full")}


class ModelRecipe(Protocol):
    """The pretraining recipe of a model, called with no arguments or with NeMo's; and its two recipes by NeMo's names.

    `name` and `dir` are `log.name` and `log.dir`. The GPUs change neither the global batch nor the objective: the
    micro-batch shrinks if they need it, and the plan says which number does not divide.
    """

    __name__: str
    gpu: str
    """The GPU for which its layout is chosen."""

    def __call__(
        self,
        *,
        name: str | None = None,
        dir: str | None = None,
        num_nodes: int | None = None,
        num_gpus_per_node: int | None = None,
    ) -> Recipe: ...

    @property
    def pretrain_recipe(self) -> Callable[..., Recipe]:
        """The same recipe."""
        ...

    @property
    def finetune_recipe(self) -> Callable[..., Recipe]:
        """The recipe that fine-tunes the model; see `fine_tuned`."""
        ...


def model_recipe(function: Callable[[], Recipe]) -> ModelRecipe:
    """Lets a recipe function of a model, which has no parameters, take NeMo's arguments; see `ModelRecipe`."""

    def pretrain_recipe(
        *,
        name: str | None = None,
        dir: str | None = None,
        num_nodes: int | None = None,
        num_gpus_per_node: int | None = None,
    ) -> Recipe:
        return placed(function(), name, dir, num_nodes, num_gpus_per_node)

    def finetune_recipe(
        *,
        name: str | None = None,
        dir: str | None = None,
        num_nodes: int | None = None,
        num_gpus_per_node: int | None = None,
        peft_scheme: PeftScheme = "lora",
        packed_sequence: bool | None = False,
        seq_length: int | None = None,
        method: Method = "sft",
    ) -> Recipe:
        gpus = (num_nodes or 1) * num_gpus_per_node if num_gpus_per_node else None
        recipe = fine_tuned(function(), function.__name__, peft_scheme, method, gpus)
        recipe.data.packed = bool(packed_sequence)
        if seq_length is not None:
            recipe.data.seq_length = seq_length
        return placed(recipe, name, dir, num_nodes, num_gpus_per_node)

    made: Any = _named(pretrain_recipe, function)
    made.gpu, made.pretrain_recipe = GPU, made
    made.finetune_recipe = _named(finetune_recipe, function)
    return made


def fine_tuned(
    pretraining: Recipe, model: str, peft_scheme: PeftScheme = "lora", method: Method = "sft", gpus: int | None = None
) -> Recipe:
    """The recipe that fine-tunes the model that `pretraining` trains; `model.init_from` and `data.paths` are to be set.

    Args:
        model: its name in `FINETUNING`; one for longer sequences has the name with `_64k` or the like.
        peft_scheme: "lora" or "dora" trains adapters; "qlora" does as "lora", with the frozen weights in 4 bits; "none"
            or None trains all weights.
        method: "sft" learns from answers, "dpo" from pairs of them.
        gpus: how many there are in all; None takes the fewest that have enough memory.
    """
    wrong = [
        Problem(name, given, "", allowed)
        for name, given, allowed in (
            ("peft_scheme", peft_scheme, ("lora", "dora", "qlora", "none", None)),
            ("method", method, ("sft", "dpo")),
        )
        if given not in allowed
    ]
    refuse(wrong)
    adapters = peft_scheme in ("lora", "dora", "qlora")
    recipe = finetune.dpo() if method == "dpo" else finetune.lora() if adapters else finetune.full()
    recipe.model.config = deepcopy(pretraining.model.config)
    if not adapters:
        recipe.model.lora = None
    else:
        recipe.model.lora.dora = peft_scheme == "dora"
        if peft_scheme == "qlora":
            recipe.model.lora.quantize_base = "nf4"
        if getattr(recipe.model.config, "num_moe_experts", None):  # no configuration: that of model.init_from
            recipe.model.lora.target_modules = ["linear_qkv", "linear_proj"]  # experts cannot have adapters
    if method == "dpo" and not adapters:
        recipe.optim.lr, recipe.optim.lr_scheduler.min_lr = 1e-6, 1e-7
    if pretraining.trainer.accelerator != "gpu":
        recipe.trainer.accelerator, recipe.trainer.precision = pretraining.trainer.accelerator, "32-true"
        del recipe.trainer.strategy, recipe.model.compile
    recipe.data.seq_length = min(SEQ_LENGTH, pretraining.data.seq_length)
    if recipe.trainer.accelerator != "gpu":
        return recipe
    known = FINETUNING.get(re.sub(r"_\d+k$", "", model), {})
    layouts = known.get("lora" if adapters else "full", UNKNOWN_LAYOUT)
    if peft_scheme == "qlora":
        layouts = known.get("qlora", layouts)
    fewest = min(layouts)
    layout = layouts[max((number for number in layouts if gpus and number <= gpus), default=fewest)]
    recipe.trainer.devices, recipe.trainer.num_nodes = min(8, fewest), math.ceil(fewest / 8)
    if method == "dpo":  # its answers are compared whole, and nothing of it can be recomputed
        layout = Layout(1)
    return laid_out(recipe, **layout._asdict())


def placed(
    recipe: Recipe, name: str | None, dir: str | None, num_nodes: int | None, num_gpus_per_node: int | None
) -> Recipe:
    """The recipe with a name and a folder for its runs and a number of GPUs; None keeps what it has."""
    for config, field, value in (
        (recipe.log, "name", name),
        (recipe.log, "dir", dir),
        (recipe.trainer, "num_nodes", num_nodes),
        (recipe.trainer, "devices", num_gpus_per_node),
    ):
        if value is not None:
            setattr(config, field, value)
    counts = {"num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node}
    refuse(
        Problem(field, count, "must be a whole number of 1 or more")
        for field, count in counts.items()
        if count is not None and not (is_whole(count) and count >= 1)
    )
    trainer, data = recipe.trainer, recipe.data
    if isinstance(trainer.devices, int):
        strategy = getattr(trainer, "strategy", None)
        shared = math.prod(getattr(strategy, field, 1) for field in ("tensor_parallel", "context_parallel"))
        ranks, rest = divmod(trainer.devices * trainer.num_nodes, shared)
        per_rank = 0 if rest or data.global_batch_size % ranks else data.global_batch_size // ranks
        micro = math.gcd(data.micro_batch_size, per_rank)  # of what does not divide, the plan says it
        if per_rank and micro != data.micro_batch_size:
            data.micro_batch_size = micro
    return recipe


def _named(recipe: Callable[..., Recipe], function: Callable[[], Recipe]) -> Any:
    """`recipe` with the name and the text of `function`, and its own parameters."""
    named: Any = wraps(function, assigned=("__module__", "__name__", "__qualname__", "__doc__"))(recipe)
    del named.__wrapped__  # whose parameters would be shown
    return named
