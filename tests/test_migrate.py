"""Scripts of NeMo 2.0 become recipes and executors that plan without problems; nothing of a script is run."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest

from fiddlehead import launch
from fiddlehead.errors import ConfigError
from fiddlehead.launch.docker import DockerExecutor
from fiddlehead.launch.local import LocalExecutor
from fiddlehead.launch.nemo.accept import accepted
from fiddlehead.launch.slurm import SlurmExecutor
from fiddlehead.migrate import Migrated, migrate, write
from fiddlehead.plan.cards import CARDS
from fiddlehead.run.directory import RunDirectory

SCRIPTS = {file.stem: file for file in (Path(__file__).parent / "nemo_scripts").glob("*.py")}
GIVEN: dict[str, dict[str, Any]] = {
    "pretrain_options": {"out": "given"},
    "api_pretrain": {"data_path": "given"},
    "sizes_in_a_loop": {"tp": 2, "name": "b"},
}
"""The arguments of a script's function that have no default value."""


def migrated(name: str) -> Migrated:
    return migrate(SCRIPTS[name].read_text(), name)


def functions(text: str) -> dict[str, Any]:
    file = Path("generated.py")
    file.write_text(text)
    return runpy.run_path(str(file))


MADE: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "pretrain_local": (
        "make_recipe",
        {
            "trainer.strategy.tensor_parallel": 2,
            "trainer.devices": 2,
            "optim.lr": 2e-4,
            "data.val_samples": 2 * 512,
            "log.name": "small_llama",
            "log.dir": "checkpoints",
        },
        ["fiddlehead pretrain make_recipe data.paths=TOKENS executor=this_machine executor.devices=2"],
    ),
    "pretrain_slurm": (
        "pretrain_slurm",
        {"trainer.strategy.context_parallel": 2, "trainer.num_nodes": 8, "checkpoint.keep_best": 3},
        [
            "fiddlehead pretrain pretrain_slurm data.paths=TOKENS executor=cluster executor.user=me "
            "executor.host=login.example.com"
        ],
    ),
    "pretrain_mock": (
        "pretrain_mock",
        {
            "trainer.strategy.context_parallel": 2,
            "checkpoint.asynchronous": True,
            "optim.lr": 1e-3,
            "optim.lr_scheduler.min_lr": 1e-4,
            "data.seq_length": 2048,
            "trainer.precision": "bf16-mixed",
        },
        ["fiddlehead pretrain pretrain_mock data.paths=TOKENS executor=pretrain_mock_executor"],
    ),
    "finetune_lora": (
        "finetune_lora",
        {
            "model.lora.rank": 8,
            "model.lora.alpha": 16,
            "data.paths": "examples",
            "model.init_from": "Llama-3.1-8B",
        },
        [
            "fiddlehead import hf meta-llama/Llama-3.1-8B --out Llama-3.1-8B",
            "fiddlehead finetune finetune_lora executor=finetune_lora_executor",
        ],
    ),
    "finetune_full": (
        "tuning",
        {"model.lora": None, "trainer.devices": 4, "model.init_from": "Qwen2.5-7B", "optim.lr": 5e-6},
        [
            "fiddlehead import hf Qwen/Qwen2.5-7B --out Qwen2.5-7B",
            "fiddlehead finetune tuning data.paths=EXAMPLES executor=finetune_full_executor",
        ],
    ),
    "finetune_packed": (
        "finetune_packed",
        {"data.packed": True, "trainer.strategy.context_parallel": 2, "log.wandb": True},
        [
            "fiddlehead finetune finetune_packed data.paths=EXAMPLES model.init_from=WEIGHTS "
            "executor=finetune_packed_executor"
        ],
    ),
    "own_callback": (
        "own_callback",
        {"log.dir": "results", "checkpoint.every_n_steps": 100, "resume": "auto"},
        ["fiddlehead pretrain own_callback data.paths=TOKENS"],
    ),
    "pretrain_options": (
        "main",
        {
            "log.name": "llama3_8b-a",
            "log.dir": "given",
            "trainer.num_nodes": 2,
            "optim.lr": 2e-4,
            "optim.lr_scheduler.warmup_steps": 100,
            "log.nsys": "6:7",
        },
        [
            "fiddlehead pretrain 'main(out=...)' data.paths=TOKENS executor=cluster executor.nodes=2 "
            "executor.devices=8",
            "fiddlehead pretrain 'main(out=...)' data.paths=TOKENS executor=here executor.devices=8",
        ],
    ),
    "finetune_parts": (
        "tuning",
        {
            "trainer.devices": 1,
            "trainer.log_every_n_steps": 1,
            "data.global_batch_size": 16,
            "optim.betas": (0.9, 0.98),
            "model.lora.rank": 8,
            "model.init_from": "Llama-3.2-1B",
            "log.dir": "./results",
        },
        [
            "fiddlehead import hf meta-llama/Llama-3.2-1B --out Llama-3.2-1B",
            "fiddlehead finetune tuning data.paths=EXAMPLES executor=finetune_parts_executor",
        ],
    ),
    "api_pretrain": (
        "api_pretrain",
        {
            "model.config.num_layers": 4,
            "data.seq_length": 4096,
            "data.paths": "given",
            "data.micro_batch_size": 2,
            "trainer.strategy.tensor_parallel": 2,
            "trainer.devices": 4,
            "optim.betas": (0.9, 0.99),
            "optim.lr_scheduler.min_lr": 3e-5,
            "checkpoint.keep_best": 3,
            "log.wandb_group": "small",
            "log.tensorboard": True,
        },
        ["fiddlehead pretrain 'api_pretrain(data_path=...)'"],
    ),
    "sizes_in_a_loop": (
        "build_llama32_3b",
        {
            "log.dir": "/runs",
            "trainer.strategy.tensor_parallel": 2,
            "data.global_batch_size": 256,
            "checkpoint.every_n_minutes": 60,
            "checkpoint.keep_best": 2,
            "model.activation_checkpointing": "full",
        },
        [
            f"fiddlehead pretrain 'build_llama32_{size}(tp={tp}, name=\"llama-{size}\")' data.paths=TOKENS "
            "executor=sizes_in_a_loop_executor"
            for size, tp in (("1b", 1), ("3b", 2))
        ],
    ),
    "tiny_pretrain": (
        "tiny_pretrain",
        {"trainer.max_steps": 4, "optim.betas": (0.9, 0.98)},
        ["fiddlehead pretrain tiny_pretrain executor=tiny_pretrain_executor"],
    ),
    "tiny_finetune": (
        "tuned",
        {"model.lora.rank": 4, "data.seq_length": 64},
        ["fiddlehead finetune tuned executor=tiny_finetune_executor"],
    ),
}


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_script_becomes_a_recipe_that_plans_without_problems(name: str, working_directory: Path) -> None:
    made = migrated(name)
    function, values, steps = MADE[name]
    recipe = functions(made.recipe)[function](**GIVEN.get(name, {}))
    for path, value in values.items():
        found: Any = recipe
        for part in path.split("."):
            found = getattr(found, part)
        assert found == value, path
    assert made.steps == steps
    if name == "tiny_finetune":  # it begins with the run of another test
        return
    target: Any = CARDS["h100"] if recipe.trainer.accelerator == "gpu" else "unknown"
    assert not launch.plan(recipe, target=target).problems


def test_every_line_that_says_something_is_in_the_report() -> None:
    for name, file in SCRIPTS.items():
        numbers = {number for number, _, _ in migrated(name).lines}
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if line.strip().startswith(("recipe.", "run.run", "exp.", "executor")):
                assert number in numbers, (name, line)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what NeMo-Run imports
def test_executors_are_the_script_s_own_and_accepted_as_they_are(working_directory: Path) -> None:
    local = accepted(functions(migrated("pretrain_local").launch)["this_machine"](devices=2))
    assert isinstance(local, LocalExecutor)
    assert (local.ntasks_per_node, local.env_vars["NVTE_FUSED_ATTN"]) == (2, "1")
    slurm = accepted(functions(migrated("pretrain_slurm").launch)["cluster"]("me", "login"))
    assert isinstance(slurm, SlurmExecutor)
    assert (slurm.account, slurm.nodes, slurm.container, slurm.requeues) == (
        "research",
        8,
        "nvcr.io/nvidia/nemo:25.07",
        2,
    )
    assert (slurm.user, slurm.host, slurm.remote_dir) == ("me", "login", "/scratch/runs")
    assert slurm.env_vars == {"NCCL_NVLS_ENABLE": "0"}
    docker = accepted(functions(migrated("finetune_packed").launch)["finetune_packed_executor"]())
    assert isinstance(docker, DockerExecutor)
    assert (docker.image, docker.gpus, docker.mounts) == ("nemo:25.07", 2, ["/data:/data"])


@pytest.mark.parametrize(
    ("line", "kept", "said"),
    [
        ("run.SlurmExecutor(account='a', array='0-3')", "run.SlurmExecutor(account='a')", "a run is one job"),
        ("run.LocalExecutor(launcher='ft')", "run.LocalExecutor()", "is queued again without it"),
        ("run.LocalExecutor(launcher=run.FaultTolerance())", "run.LocalExecutor()", "is queued again without it"),
        ("run.LocalExecutor(launcher=run.Torchrun())", "run.LocalExecutor(launcher=run.Torchrun())", "as it is"),
        ("run.SlurmExecutor(acount='a')", "run.SlurmExecutor()", "did you mean 'account'?"),
        ("run.Config(run.LocalExecutor, ntasks_per_node=2)", "run.LocalExecutor(ntasks_per_node=2)", "as it is"),
        ("SlurmExecutor(account=site.ACCOUNT)", "run.SlurmExecutor()", "set account there"),
        ("SlurmExecutor(account=os.environ['A'])", "import os\n\nimport nemo_run as run", "as it is"),
        ("SlurmExecutor(nodes=recipe.trainer.num_nodes)", "run.SlurmExecutor(nodes=1)", "as it is"),
        ("run.LocalExecutor()\ne = run.SlurmExecutor()", "-> run.SlurmExecutor", "as it is"),
        ("run.DockerExecutor(args.image, num_gpus=2)", "run.DockerExecutor(num_gpus=2)", "arguments without names"),
        ("run.LeptonExecutor(nemo_run_dir='/n', mounts=[])", "(nemo_run_dir='/n', mounts=[])", "as it is"),
        ("run.LocalExecutor(packager=run.HybridPackager({'a': run.Packager()}))", "{'a': run.Packager()}", "as it is"),
        ("run.LocalExecutor()\ne.env_vars['A'] = '1'", "executor.env_vars['A'] = '1'", "the same line"),
        ("run.LocalExecutor()\ne.env_vars.update({'A': '1'})", "executor.env_vars.update({'A': '1'})", "the same line"),
        ("run.LocalExecutor()\ne.env_vars[args.a] = '1'", "return run.LocalExecutor()", "set executor.env_vars there"),
        ("run.LocalExecutor()\ne.retries = 2", "return run.LocalExecutor()", "`fiddlehead runs rerun`"),
    ],
)
def test_lines_of_an_executor_stay_if_they_can(line: str, kept: str, said: str) -> None:
    made = migrate(f"recipe = llm.llama3_8b.pretrain_recipe(name='x')\ne = {line}\n", "x")
    assert kept in made.launch and any(said in done for _, _, done in made.lines), (made.launch, made.lines)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (
            "PreTrainingDataModule, paths=['30', '/d/a', '70', '/d/b'], split='900,50,50', seq_length=64",
            ["paths = ['30', '/d/a', '70', '/d/b']", "split = '900,50,50'", "seq_length = 64"],
        ),
        ("PreTrainingDataModule, paths={'train': ['a'], 'validation': ['b']}", ["paths = {'train': ['a'], 'val"]),
        ("PreTrainingDataModule, paths=Path('/d/a')", ["paths = '/d/a'"]),
        (
            "FineTuningDataModule, dataset_root=Path('/d'), dataset_kwargs={'prompt_template': '{input} A: {output}'}",
            ["paths = '/d'", "prompt_template = '{input} A: {output}'"],
        ),
    ],
)
def test_nemo_s_data_is_named_as_it_is(data: str, lines: list[str], working_directory: Path) -> None:
    kind = "pretrain" if "PreTraining" in data else "finetune"
    text = f"recipe = llm.llama3_8b.{kind}_recipe(name='x')\nrecipe.data = run.Config(llm.{data})\n"
    made = migrate(text, "x")
    assert all(f"    recipe.data.{line}" in made.recipe for line in lines), made.recipe
    recipe = functions(made.recipe)["x"]()
    assert not any("not migrated" in done for _, _, done in made.lines)
    if kind == "pretrain":
        fdl.build(recipe.data)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("with run.Experiment('a') as exp:\n    exp.add(recipe, name='b')", "also take recipes as they are"),
        ("recipe.resume.restore_config = run.Config(nl.RestoreConfig, path='/r/step=10')", "`fiddlehead import nemo`"),
        ("recipe.resume.restore_config = run.Config(nl.RestoreConfig, path='nemo://a/b')", "~/.cache/nemo/models/a/b"),
        ("run.run(recipe, plugins=[PreemptionPlugin(preempt_time=60)])", "executor.save_before"),
        ("run.run(recipe, plugins=mine)", "they change the recipe and the executor"),
        ("recipe.data = run.Config(llm.SquadDataModule, seq_length=64)", "download its data as JSONL or Parquet"),
        ("recipe.data = run.Config(llm.FineTuningDataModule, dataset_kwargs={'label_key': 'a'})", "prompt_template"),
    ],
)
def test_what_is_to_be_done_is_said(line: str, said: str) -> None:
    made = migrate(f"recipe = llm.llama3_8b.finetune_recipe(name='x')\n{line}\n", "x")
    assert any(said in done for _, _, done in made.lines), made.lines


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what NeMo-Run imports
def test_an_executor_s_function_keeps_its_conditions_and_takes_what_the_recipe_says(working_directory: Path) -> None:
    launch_file = functions(migrated("pretrain_options").launch)
    executor = accepted(launch_file["cluster"]("me", nodes=2, devices=8, mounts=["/a:/b"]))
    assert isinstance(executor, SlurmExecutor)
    assert (executor.nodes, executor.container_mounts) == (2, ["/a:/b"])
    assert executor.env_vars == {"NCCL_NVLS_ENABLE": "0", "TRANSFORMERS_OFFLINE": "1"}
    local = accepted(functions(migrated("sizes_in_a_loop").launch)["sizes_in_a_loop_executor"]())
    assert local is not None and local.env_vars == {"A": "1", "B": "1"}


def test_a_script_that_only_converts_weights_becomes_commands() -> None:
    made = migrated("convert_only")
    assert (made.recipe, made.launch) == ("", "")
    assert made.steps == [
        "fiddlehead import hf mistralai/Mistral-7B-v0.3 --out /weights/mistral",
        "fiddlehead export hf /runs/tuned --out /out/tuned",
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("f(r, 1)", ["    f(recipe, 1)"]),
        ("steps = 7\nr.trainer.max_steps = 2 * steps", ["steps = 7", "    recipe.trainer.max_steps = 2 * steps"]),
        ("setattr(r.trainer, 'max_steps', 3)", ["    recipe.trainer.max_steps = 3"]),
        ("for each in ():\n    r.trainer.callbacks.append(each)", ["        recipe.trainer.callbacks.append(each)"]),
        ("r.trainer.max_steps //= 2", ["    recipe.trainer.max_steps = recipe.trainer.max_steps // 2"]),
        ("for n in (1, 2):\n    r.data.seed = n", ["    for n in (1, 2):\n        recipe.data.seed = n"]),
        ("r.optim = adam(min_lr=0.0)", ["recipe.optim.lr_scheduler.min_lr = 0.0", "recipe.optim.lr = 0.001"]),
        ("data = llm.MockDataModule()\nr.data = data", ["recipe.data.micro_batch_size = 4"]),
        (
            "r = llm.gemma2_2b.pretrain_recipe()\nrun.run(r)",
            ["def x() -> Recipe:\n    recipe = llama3_8b", "def x_2() -> Recipe:\n    recipe = gemma2_2b"],
        ),
        ("if True:\n    r.data.seed = 1\nelse:\n    r.data.seed = 2", ["    else:\n        recipe.data.seed = 2"]),
    ],
)
def test_the_means_of_python_are_followed(text: str, lines: list[str], working_directory: Path) -> None:
    made = migrate(
        "def f(recipe, seed): recipe.data.seed = seed\n"
        "def adam(min_lr): return llm.distributed_fused_adam_with_cosine_annealing(max_lr=1e-3, min_lr=min_lr)\n"
        f"r = llm.llama3_8b.pretrain_recipe()\n{text}\n",
        "x",
    )
    assert all(line in made.recipe for line in lines), made.recipe
    functions(made.recipe)["x"]()


PLUGINS = """
executor = run.SlurmExecutor(account="me", nodes=2)
plugins = [PreemptionPlugin(preempt_time=120), run.Config(NsysPlugin, start_step=9, end_step=11)]
plugins.append(WandbPlugin(name="w", logger_fn=partial(wandb_logger, project="ferns", entity=args.entity)))
more = FaultTolerancePlugin()
with run.Experiment("a", executor=executor) as exp:
    exp.add(recipe, executor=executor, plugins=plugins + [more, PerfEnvPlugin(enable_vboost=True)])
"""


@pytest.mark.parametrize("relayed", [False, True])
def test_plugins_become_lines_of_the_recipe_and_the_executor(relayed: bool, working_directory: Path) -> None:
    first = "recipe = llm.llama3_8b.pretrain_recipe(name='x')"
    if relayed:
        first = f"def f():\n    {first}\n    return recipe\nrecipe = f()"
    made = migrate(first + PLUGINS, "x")
    log = functions(made.recipe)["f" if relayed else "x"]().log
    assert (log.nsys, log.wandb, log.wandb_project, log.wandb_entity) == ("10:12", True, "ferns", None)
    assert "executor.signal = 'USR1@120'\n    executor.retries = 2" in made.launch
    said = {text.partition("(")[0]: done for _, text, done in made.lines}
    assert said["PerfEnvPlugin"].startswith("PerfEnvPlugin: leave it out")
    assert said["WandbPlugin"].startswith("recipe.log.wandb;")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("recipe.trainer.strategy.sequence_parallel = True", "always splits the sequence too"),
        ("recipe.trainer.callbacks.append(run.Config(Mine))", "Mine; a callback"),
        ("recipe.optim.config.lr = args.lr", "the recipe does not know args.lr; set optim.lr"),
        ("recipe.trainer.max_steps = open('steps').read()", "the recipe does not know open('steps').read()"),
        ("recipe.trainer.max_stepz = 3", "did you mean"),
        ("recipe.trainer.max_epochs = 2", "a run ends by steps"),
        ("for x in open('a'): recipe.trainer.max_steps = x", "write it as lines of the recipe"),
        ("if site.BIG: recipe.trainer.max_steps = 1", "write it as lines of the recipe"),
        ("recipe.data.tokenizer = run.Config(AutoTokenizer, 'a')", "a dataset and a model come with theirs"),
        ("print(1)", "left out"),
    ],
)
def test_what_cannot_be_migrated_is_said_with_what_to_do(line: str, said: str) -> None:
    made = migrate(f"recipe = llm.llama3_8b.pretrain_recipe(name='x')\n{line}\n", "x")
    assert any(number == 2 and said in done for number, _, done in made.lines), made.lines
    assert "recipe.trainer" not in made.recipe and "recipe.optim" not in made.recipe


def test_nothing_of_a_script_is_run_or_carried_that_runs(working_directory: Path) -> None:
    text = (
        "X = __import__('os').system('touch ran')\nY = eval('1')\n"
        "def f(a=__import__('os').system('touch ran')): pass\n"
        "recipe = llm.llama3_8b.pretrain_recipe(name=exec('1'), num_nodes=1)\n"
    )
    made = migrate(text, "x")
    assert "__import__" not in made.recipe + made.launch and "eval" not in made.recipe and "exec" not in made.recipe
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:", "it is not valid Python"),
        ("x = 1", "no line of it makes a recipe"),
        ("r = llm.llama3_9b.pretrain_recipe()", "line 1: unknown model 'llama3_9b'; did you mean 'llama3_8b'?"),
        ("r = llm.llama3_8b.finetune_recipe(peft_scheme='lora'", "it is not valid Python"),
        ("r = llm.gpt3_175b.pretrain_recipe(name='a')\n\0", "it is not valid Python"),
    ],
)
def test_what_is_no_script_of_nemo_s_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        migrate(text, "x")
    assert said in str(error.value)


HEAD = "from nemo.collections import llm\nimport nemo_run as run\nfrom itertools import product\n"
RECIPE = "recipe = llm.llama3_8b.pretrain_recipe(name='a')\n"


@pytest.mark.parametrize(
    "text",
    [
        "class Llama3Config8B(llm.Llama3Config8B):\n    seq_length = 4\nmodel = llm.LlamaModel(Llama3Config8B())\n"
        "llm.pretrain(model=model, data=None)\n",
        RECIPE + "for a, b in product(range(30_000_000), range(10)):\n    run.run(recipe)\n",
        RECIPE + "".join(f"{' ' * n}for x{n} in range(60):\n" for n in range(3)) + "   run.run(recipe)\n",
        "def f(x):\n    return run.Config(Foo, f(f(x)), f(f(x)))\n" + RECIPE + "recipe.data = f(1)\n",
        RECIPE + "def f(a=1, /, c=3):\n    return run.Config(Foo, a, c)\nrecipe.data = f(1, **{'c': 2})\n",
    ],
    ids=["a base of the same name", "a long product", "nested loops", "a function of itself", "positional only"],
)
def test_odd_python_ends_soon_and_in_a_valid_file(text: str) -> None:
    migrated = migrate(HEAD + text, "1b-x")
    compile(migrated.recipe, "run_1b_x.py", "exec")


def test_texts_of_a_script_are_quoted_in_commands_and_no_line_of_it_moves_a_file() -> None:
    source = "hf://a/b; touch OWNED"
    text = f"llm.import_ckpt(model=llm.llama3_8b.model(), source={source!r})\nX = Path('a').replace('b')\n"
    migrated = migrate(HEAD + "from pathlib import Path\n" + text + RECIPE + "recipe.log.log_dir = X\n", "a")
    assert all(shlex.split(step)[:5] != step.split()[:5] for step in migrated.steps if "touch" in step)
    assert "replace(" not in migrated.recipe


def test_names_of_the_script_do_not_hide_those_of_the_files(working_directory: Path) -> None:
    text = "fdl = 4\ndef llama3_8b():\n    r = llm.llama3_8b.pretrain_recipe(name='a')\n"
    made = migrate(HEAD + text + "    r.trainer.max_steps = fdl\n    return r\nrun.run(llama3_8b())\n", "a").recipe
    assert "def llama3_8b_() -> Recipe:" in made and "recipe = llama3_8b.pretrain_recipe(" in made
    assert "recipe.trainer.max_steps = fdl_" in made and "fdl_ = 4" in made


def test_what_a_script_does_in_the_end_is_migrated_and_rounds_that_are_left_are_not() -> None:
    text = RECIPE + "try:\n    pass\nexcept OSError:\n    pass\nfinally:\n    recipe.trainer.max_steps = 9\n"
    loop = "for n in [1, 2]:\n    if n == 2:\n        continue\n    run.run(recipe, name=f'x_{n}')\n"
    migrated = migrate(HEAD + text + loop, "a")
    assert "recipe.trainer.max_steps = 9" in migrated.recipe and "x_2" not in "".join(migrated.steps)
    assert any("after an error" in str(line) for line in migrated.lines)


def test_a_command_names_the_arguments_that_a_script_gives() -> None:
    text = (
        "def f(lr, n=1):\n    r = llm.tiny_test.pretrain_recipe(name='x')\n    r.optim.config.lr = lr\n    return r\n"
    )
    made = migrate(f"{text}for lr in [1e-3, 2e-3]:\n    run.run(f(lr, n=2), executor=run.LocalExecutor())\n", "x")
    assert made.steps == [f"fiddlehead pretrain 'f(lr={lr}, n=2)' executor=x_executor" for lr in (0.001, 0.002)]


def test_names_that_a_script_gives_to_its_imports_are_understood() -> None:
    text = (
        "import nemo_run as nr\nfrom nemo.collections import llm as L\n"
        "from nemo.collections.llm.recipes import mixtral_8x7b as mx\n"
        "a = L.llama3_8b.pretrain_recipe(name='a')\nnr.run(a, executor=nr.LocalExecutor())\n"
        "b = mx.pretrain_recipe(name='b')\nall_of_them = [b]\nfor each in all_of_them:\n    nr.run(each)\n"
    )
    made = migrate(text, "x")
    assert "llama3_8b.pretrain_recipe" in made.recipe and "mixtral_8x7b.pretrain_recipe" in made.recipe
    assert made.steps[0].endswith("executor=x_executor") and made.steps[1].startswith("fiddlehead pretrain x_2")


def test_existing_files_stay_unless_told(working_directory: Path) -> None:
    made = migrated("tiny_pretrain")
    files = write(made, working_directory, "mine")
    assert [str(file.relative_to(working_directory)) for file in files] == ["recipes/mine.py", "launch/mine.py"]
    files[1].unlink()
    files[0].write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"recipes/mine.py exists; --overwrite replaces it"):
        write(made, working_directory, "mine")
    assert files[0].read_text() == "x = 1\n" and not files[1].exists()
    write(made, working_directory, "mine", overwrite=True)
    assert files[0].read_text() == made.recipe


def test_the_command_writes_beside_the_script_and_the_two_smallest_train(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fiddlehead.cli import main

    for name in ("tiny_pretrain", "tiny_finetune"):
        Path(f"{name}.py").write_text(SCRIPTS[name].read_text())
        monkeypatch.setattr(sys, "argv", ["fiddlehead", "migrate", f"{name}.py"])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        assert f"fiddlehead {'pretrain' if name == 'tiny_pretrain' else 'finetune'} " in capsys.readouterr().out
    Path("examples").mkdir()
    for file, count in (("training", 6), ("validation", 2)):
        lines = [json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) for n in range(count)]
        Path(f"examples/{file}.jsonl").write_text("\n".join(lines))
    recipes = Path("recipes")
    base = runpy.run_path(str(recipes / "tiny_pretrain.py"))["tiny_pretrain"]()
    base.data.tokenizer = None
    run = base.launch()
    assert isinstance(run, RunDirectory) and run.path.name == "tiny"
    tuned = runpy.run_path(str(recipes / "tiny_finetune.py"))["tuned"]()
    assert tuned.launch().path.name == "tuned"
