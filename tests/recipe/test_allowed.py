"""A recipe file may name only a short list and what its reader allows; nothing else is imported or called."""

import contextlib
import functools
import importlib
import re
import sys
from pathlib import Path

import fiddle as fdl
import lightning.pytorch
import numpy  # noqa: F401  # its names are walked through
import pytest
import torch

import fiddlehead.bench  # so that its names, and what it imports, are walked through
import fiddlehead.cli
import fiddlehead.launch  # noqa: F401
from fiddlehead import training
from fiddlehead.errors import ConfigError
from fiddlehead.recipe import Recipe, reader
from fiddlehead.recipe.allowed import BY_NAME_ONLY, PARTS, TASKS, is_listed, named
from fiddlehead.recipe.edits import apply_overrides
from tests import recipe_parts

GOLDEN = Path(__file__).parents[1] / "recipes" / "golden" / "tiny_test.yaml"

FORMERLY = {
    "fiddlehead.training:AdamW": "fiddlehead.training.optim:AdamW",
    "fiddlehead.training:Checkpoint": "fiddlehead.training.checkpoint:Checkpoint",
}

RUNS_A_COMMAND = """
seed:
  _target_: builtins:list
  _args_:
  - _target_: torch.utils.data:DataLoader
    dataset: [system]
    batch_size: null
    collate_fn:
      _target_: torch.nn.utils._deprecation_utils:lazy_deprecated_import
      all: [system]
      old_module: os
      new_module: os
"""


def problems_of(text: str, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        reader.load(text, **options)
    return str(caught.value)


def test_a_recipe_file_cannot_put_a_function_call_together() -> None:
    """A loader of data calls what collates it: here that is what gives `os.system` out."""
    with pytest.raises(ConfigError) as caught:
        Recipe.from_yaml(GOLDEN.read_text() + RUNS_A_COMMAND)
    assert "DataLoader is not trusted" in str(caught.value) and "lazy_deprecated_import is not" in str(caught.value)


def every_name(*packages: str) -> set[str]:
    """All names, private ones too, of the modules of `packages` that are loaded, and of the classes in them."""
    found = set()
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.partition(".")[0] not in packages:
            continue
        found.update(
            f"{module_name}:{name}" for name in vars(module).get("__all__", ())
        )  # some are made when asked for
        for name, value in list(vars(module).items()):
            found.add(f"{module_name}:{name}")
            if issubclass(type(value), type) and value.__module__ == module_name:
                found.update(f"{module_name}:{name}.{inner}" for inner in vars(value))
    return found


def test_few_of_all_loaded_names_are_accepted() -> None:
    """Whoever adds to a list, or to a package, sees here what a stranger's file may now name."""
    accepted = set()
    names = every_name("torch", "lightning", "fiddlehead", "numpy", "fiddle", "builtins", "os", "functools", "operator")
    for name in names:
        with contextlib.suppress(ConfigError):
            named(name, task=True)
            accepted.add(name)
    assert len(names) > 50_000
    assert sorted(accepted) == (Path(__file__).parent / "accepted_names.txt").read_text().splitlines()


@pytest.mark.parametrize("module", ["checkpoint", "language_model", "loggers", "optim", "parallel", "preference"])
def test_names_that_earlier_versions_wrote_are_read(module: str) -> None:
    parts = {
        "checkpoint": ["Checkpoint"], "language_model": ["LanguageModel"], "loggers": ["Log"], "parallel": ["Parallel"],
        "optim": ["AdamW", "CosineAnnealing", "Muon", "WarmupStableDecay"], "preference": ["PreferenceModel"],
    }  # fmt: skip
    for part in parts[module]:
        assert named(f"fiddlehead.training.{module}:{part}") is getattr(training, part)


def test_a_recipe_that_an_earlier_version_wrote_is_read() -> None:
    now = GOLDEN.read_text()
    before = re.sub("fiddlehead.training:(AdamW|Checkpoint)", lambda part: FORMERLY[part[0]], now)
    assert before.count("fiddlehead.training.") == 2
    assert Recipe.from_yaml(before) == Recipe.from_yaml(now)


@pytest.mark.parametrize("form", ["_target_: {}", "x: !ref {}", "x: !partial {{_target_: '{}'}}", "x: !enum {}.A"])
@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "os.system",
        "subprocess:Popen",
        "builtins:eval",
        "builtins:getattr",
        "posix:system",
        "torchx:run",
        "torchvision.models:resnet18",
        "lightning_utilities.core.imports:module_available",
        "torch.os.system",
        "torch:os.system",
        "torch.os:system",
        "torch:load",
        "torch.load",
        "torch.serialization:load",
        "torch.jit:load",
        "torch.jit.load",
        "torch:jit.load",
        "torch.hub:load",
        "torch.hub.load",
        "torch.hub.load_state_dict_from_url",
        "torch.utils.cpp_extension:load",
        "torch.utils.cpp_extension.load_inline",
        "torch.utils.collect_env.run",
        "torch.utils.model_zoo.load_url",
        "torch.package.PackageImporter",
        "torch.storage:_load_from_bytes",
        "torch.distributed.run:main",
        "torch.distributed.launcher.api:elastic_launch",
        "torch.multiprocessing.spawn",
        "torch:from_file",
        "torch:compile",
        "torch.save",
        "torch.nn:Module.load_state_dict",
        "torch.nn.modules.module:torch.load",
        "torch.nn.functional:importlib.import_module",
        "torch.nn.functional:__builtins__",
        "torch.nn:Module.__init__",
        "torch.nn:Module.__subclasses__",
        "torch.nn.functional:relu.__globals__",
        "torch.utils.data:DataLoader.__class__",
        "lightning.pytorch:LightningModule.load_from_checkpoint",
        "lightning.pytorch.core.saving:_load_from_checkpoint",
        "lightning.fabric.utilities.cloud_io:_load",
        "lightning.fabric.plugins.io.torch_io:TorchCheckpointIO.load_checkpoint",
        "lightning.pytorch:seed_everything",
        "lightning.pytorch.cli:LightningCLI",
        "fiddlehead.recipe:Recipe.load",
        "fiddlehead.recipe.reader:load",
        "fiddlehead.recipe.allowed:locate",
        "fiddlehead.recipe.edits:apply_overrides",
        "fiddlehead.errors:difflib.get_close_matches",
        "fiddlehead.run.directory:os.system",
        "fiddlehead.run.directory:socket.socket",
        "fiddlehead.cli:main",
        "fiddlehead:launch",
        "torch.utils.data:DataLoader",
        "torch.nn.utils._deprecation_utils:lazy_deprecated_import",
        "torch.nn.attention._fa3:register_flash_attention_fa3",
        "torch.nn:Linear",
        "torch.nn.modules.linear.Linear",
        "torch.optim.lr_scheduler:LambdaLR",
        "torch.utils.data.dataset:Dataset",
        "torch.tanh",
        "lightning.pytorch.callbacks:LambdaCallback",
        "lightning.pytorch.callbacks:ModelCheckpoint",
        "lightning.pytorch.callbacks.on_exception_checkpoint:OnExceptionCheckpoint",
        "lightning.pytorch.loggers:WandbLogger",
        "lightning.pytorch:Trainer.fit",
        "functools:partial",
        "operator:methodcaller",
        "builtins:map",
        "builtins:type",
        "builtins:dict.fromkeys",
        "numpy:load",
        "antigravity:fly",
        "torch.onnx:export",
        "fiddlehead.models:Transformer",
        "fiddlehead.data:TokenFile",
        "fiddlehead.bench:benchmark",
        "fiddlehead.training.optim:math.sqrt",
        "fiddlehead.training:AdamW.build",
        "fiddlehead.recipes.tiny:tiny",
        "fiddlehead.tasks:pretrain",
        "tests.recipe_parts:Optim",
        "..:x",
        ":x",
        "torch:",
        "torch",
    ],
)
def test_what_is_not_listed_is_refused_and_not_imported(name: str, form: str) -> None:
    before = set(sys.modules)
    assert "recipe.yaml:1" in problems_of(form.format(name))
    assert set(sys.modules) == before


@pytest.mark.parametrize("tag", ["!dtype", "!device"])
@pytest.mark.parametrize("text", ["onnx", "_inductor", "__name__", "os", "load", "float", "cuda.os"])
def test_dtypes_and_devices_lead_nowhere_else(tag: str, text: str) -> None:
    before = set(sys.modules)
    if (tag, text) != ("!dtype", "float"):  # which is float32's other name
        assert "recipe.yaml:1:4" in problems_of(f"x: {tag} {text}")
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "name", ["run_program", "fdl.build", "Tokenizer.read", "Path", "TYPE_CHECKING", "__builtins__"]
)
def test_an_allowed_module_does_not_open_what_it_imports(name: str) -> None:
    assert "recipe.yaml:1" in problems_of(f"_target_: tests.recipe_parts:{name}", allow=["tests"])


def test_allowing_matches_whole_names() -> None:
    for allow in ("test", "tests.recipe", "tests.recipe_parts:Opt", "tests.recipe_parts:Optim.x", "tests:recipe_parts"):
        assert "not trusted" in problems_of("_target_: tests.recipe_parts:Optim", allow=[allow])
    for allow in ("tests", "tests.recipe_parts", "tests.recipe_parts:Optim", "tests.recipe_parts.Optim"):
        reader.load("_target_: tests.recipe_parts:Optim", allow=[allow])
        reader.load("_target_: tests.recipe_parts.Optim", allow=[allow])
    assert "not trusted" in problems_of("_target_: tests.recipe_parts:Model", allow=["tests.recipe_parts:Optim"])


@pytest.mark.parametrize(
    "package", ["torch", "lightning", "numpy", "os", "builtins", "fiddlehead.run.directory", "fiddle", "functools"]
)
def test_large_packages_are_allowed_by_name_only(package: str) -> None:
    module = importlib.import_module(package)
    name = next(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
    assert f"--allow {package}:{name}" in problems_of(f"_target_: {package}:{name}", allow=[package])
    assert package.partition(".")[0] in BY_NAME_ONLY


def test_a_name_of_a_large_package_can_be_allowed() -> None:
    assert reader.load("x: !ref torch.tanh", allow=["torch:tanh"]) == {"x": torch.tanh}
    assert reader.load("x: !ref torch.nn:Linear", allow=["torch.nn:Linear"]) == {"x": torch.nn.Linear}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("torch.nn.functional:sillu", "did you mean 'torch.nn.functional:silu'? Else, if you trust"),
        ("fiddlehead:AdamW", "did you mean 'fiddlehead.training:AdamW'"),
        ("lightning.pytorch.callbacks:Timr", "did you mean 'lightning.pytorch.callbacks:Timer'"),
        ("mine.models:Wide", "--allow mine.models"),
        ("mine.models.Wide", "--allow mine.models.Wide"),
    ],
)
def test_the_error_says_what_was_meant_or_how_to_allow_it(name: str, meant: str) -> None:
    assert meant in problems_of(f"_target_: {name}")


@pytest.mark.parametrize(
    "name",
    [
        "lightning.pytorch:Trainer",
        "lightning:Trainer",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.trainer.trainer:Trainer",
        "lightning.pytorch.callbacks.early_stopping:EarlyStopping",
        "torch.optim:AdamW",
        "torch.optim.adamw:AdamW",
        "torch.nn.functional.silu",
        "torch.nn.functional.gelu",
        "builtins:dict",
        "fiddlehead.models:TransformerConfig",
        "fiddlehead.data:ByteTokenizer",
        "fiddlehead.training.optim.AdamW",
    ],
)
def test_listed_names_load_by_the_name_of_their_package_and_their_own(name: str) -> None:
    assert callable(reader.load(f"x: !ref {name}")["x"])


def test_every_part_that_this_package_exports_is_listed() -> None:
    """A new part is listed, or is none: these make or need what a recipe has no words for."""
    others = {"GlobalBatchSampler", "NonFiniteError", "TokenFile", "Transformer"}
    for package in ("fiddlehead.data", "fiddlehead.models", "fiddlehead.training"):
        assert {*importlib.import_module(package).__all__} - others == set(PARTS[package])
    for package, names in (*PARTS.items(), *TASKS.items()):
        assert all(is_listed(getattr(importlib.import_module(package), name), task=True) for name in names)


def test_a_task_stands_at_the_root_only() -> None:
    text = GOLDEN.read_text()
    assert Recipe.from_yaml(text)
    for place in ("model", "seed", "data"):
        head, _, tail = text.partition(f"{place}:\n") if f"{place}:\n" in text else (text, "", "")
        nested = (
            f"{head}{place}:\n  _target_: fiddlehead.tasks:pretrain\n  x: 1\n"
            if tail
            else f"{text}{place}:\n  _target_: fiddlehead.tasks:pretrain\n"
        )
        with pytest.raises(ConfigError, match="pretrain is not trusted"):
            Recipe.from_yaml(nested)


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("seed", "{_target_: builtins:list}", "seed: expects int, not a configuration of list"),
        ("resume", "!ref torch.nn.functional:gelu", "resume: expects str | Path, not torch"),
        ("resume", "!partial {_target_: builtins:dict}", "resume: expects str | Path, not dict"),
        ("log", "{_target_: fiddlehead.training:AdamW}", "log: expects Log, not a configuration of AdamW"),
        ("log", "{_target_: fiddlehead.training:Log, _partial_: true}", "log: expects Log, not fiddlehead"),
        ("log", "[{_target_: fiddlehead.training:Log}]", "log: expects Log, not a list"),
        ("log", "{_target_: fiddlehead.training:Log, name: {_target_: builtins:str}}", ""),
        ("log", "{_target_: fiddlehead.training:Log, name: {_target_: builtins:dict}}", "log.name: expects str"),
        (
            "optim",
            "{_target_: fiddlehead.training:AdamW, lr_scheduler: {_target_: fiddlehead.models:TransformerConfig}}",
            "optim.lr_scheduler: expects Schedule, not a configuration of TransformerConfig",
        ),
        (
            "trainer",
            "{_target_: lightning.pytorch:Trainer, callbacks: [{_target_: fiddlehead.training:Log}]}",
            "trainer.callbacks: expects Callback, not a configuration of Log",
        ),
        ("trainer", "{_target_: lightning.pytorch:Trainer, callbacks: {a: !ref builtins:dict}}", "not a dict"),
        ("trainer", "{_target_: lightning.pytorch:Trainer, profiler: !ref builtins:dict}", "trainer.profiler: expects"),
        ("trainer", "{_target_: lightning:Trainer, callbacks: [{_target_: lightning.pytorch.callbacks:Timer}]}", ""),
    ],
)
def test_what_is_listed_stands_where_an_annotation_asks_for_it(place: str, value: str, problem: str) -> None:
    text = f"_target_: fiddlehead.tasks:pretrain\n_partial_: true\n{place}: {value}\n"
    if not problem:
        Recipe.from_yaml(text)
        return
    with pytest.raises(ConfigError) as caught:
        Recipe.from_yaml(text)
    assert problem in str(caught.value)


class Mine(lightning.pytorch.Trainer):
    """A user's own."""


@pytest.mark.parametrize("trainer", [lightning.pytorch.Trainer, Mine])
@pytest.mark.parametrize(
    ("name", "value"), [("default_root_dir", "reference::http://evil.example/x.json"), ("model_registry", "evil/model")]
)
def test_a_file_cannot_say_what_lightning_opens_or_where_it_sends_to(trainer: type, name: str, value: str) -> None:
    recipe = Recipe(recipe_parts.pretrain, anything=fdl.Config(trainer, max_steps=1))
    text = recipe.to_yaml()
    with pytest.raises(ConfigError, match=f"anything.{name}: may not be set in a recipe file"):
        Recipe.from_yaml(f"{text.rstrip()}\n  {name}: '{value}'\n", allow=["tests"])
    nested = f"_target_: tests.recipe.test_allowed:Mine\n  {name}: '{value}'\n"
    with pytest.raises(ConfigError, match="may not be set in a recipe file"):
        reader.load(f"x: !partial\n  {nested}", allow=["tests"])
    setattr(recipe.anything, name, value)
    with pytest.raises(ConfigError, match=f"anything.{name}: may not be set in a recipe file"):
        recipe.to_yaml()


def test_what_a_file_may_not_set_is_not_written_into_a_partial_either() -> None:
    trainer = functools.partial(lightning.pytorch.Trainer, default_root_dir="x")
    with pytest.raises(ConfigError, match=r"anything\.default_root_dir: may not be set in a recipe file"):
        Recipe(recipe_parts.pretrain, anything=trainer).to_yaml()


def test_what_is_allowed_may_stand_anywhere() -> None:
    """A user's own part may do what another does without being one."""
    text = "_target_: fiddlehead.tasks:pretrain\n_partial_: true\ndata: {_target_: tests.recipe_parts:Data}\n"
    assert fdl.get_callable(Recipe.from_yaml(text, allow=["tests"]).data) is recipe_parts.Data


@pytest.mark.parametrize(
    "edit",
    [
        "optim=os:system",
        "optim=os:system(command='touch ran')",
        "optim=torch.hub:load(repo_or_dir=x)",
        "model.config.activation=os:system",
        "model.config.activation=antigravity:fly",
        "trainer.callbacks=[lightning.pytorch.callbacks:LambdaCallback(on_fit_start=os:abort)]",
    ],
)
def test_an_edit_names_what_a_file_may_name(edit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(
        recipe_parts.pretrain,
        model=fdl.Config(recipe_parts.Model, config=fdl.Config(recipe_parts.ModelConfig)),
        optim=fdl.Config(recipe_parts.Optim),
        anything=fdl.Config(lightning.pytorch.Trainer),
    )
    edit = edit.replace("trainer.", "anything.")
    with pytest.raises(ConfigError):
        apply_overrides(recipe, [edit], allow=["tests"])
    assert "antigravity" not in sys.modules and not list(tmp_path.iterdir())


def test_a_file_within_a_file_and_its_tasks(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("_target_: fiddlehead.tasks:pretrain\n")
    with pytest.raises(ConfigError, match="pretrain is not trusted"):
        apply_overrides(Recipe.from_yaml(GOLDEN.read_text()), [f"data=@{tmp_path}/evil.yaml"])
