"""Before a run starts, the recipe is fitted to the executor; a run that does not fit leaves no files."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fiddle as fdl
import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer

from fiddlehead.cli.common import configure_executor
from fiddlehead.errors import ConfigError
from fiddlehead.launch import Plan, launch, plan
from fiddlehead.launch import slurm as slurm_module
from fiddlehead.launch.docker import docker
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.fitting import fit_to_executor, missing_here, yielded
from fiddlehead.launch.local import local
from fiddlehead.launch.shell import Answer
from fiddlehead.launch.slurm import slurm
from fiddlehead.launch.submit import write_run
from fiddlehead.launch.taken import refuse_taken
from fiddlehead.launch.watch import load_executor
from fiddlehead.plan.cards import Card
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipe.resumable import Resumable
from fiddlehead.recipes.finetune import dora, dpo, full, lora
from fiddlehead.recipes.llama import llama2_13b
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status
from fiddlehead.training import AdamW, Parallel


def test_the_trainer_follows_the_executor():
    recipe = fit_to_executor(tiny_test(), slurm(nodes=2, gpus_per_node=4))
    assert (recipe.trainer.num_nodes, recipe.trainer.devices) == (2, 4)
    recipe = tiny_test()
    recipe.trainer.devices = 3
    assert fit_to_executor(recipe, slurm()).trainer.devices == 3
    assert fit_to_executor(recipe, local()).trainer.devices == 3


def test_a_plan_for_a_card_has_the_executor_s_devices_or_the_recipe_s():
    card = Card.parse("h100")
    alone, on_two = plan(llama2_13b(), target=card), plan(llama2_13b(), local(ntasks_per_node=2), target=card)
    trainer = llama2_13b().trainer
    assert (alone.training.world_size, on_two.training.world_size) == (trainer.devices * trainer.num_nodes, 2)
    assert (alone.training.fits, on_two.training.fits) == (True, False)
    assert alone.to_dict()["training"]["card"]["name"] == "h100"


def test_a_contradiction_is_an_error():
    recipe = tiny_test()
    recipe.trainer.devices, recipe.trainer.num_nodes = 2, 3
    with pytest.raises(ConfigError) as error:
        fit_to_executor(recipe, slurm(nodes=2, gpus_per_node=4))
    assert len(error.value.problems) == 2
    assert "gives 4 on each node" in str(error.value) and "executor.nodes=2" in str(error.value)


@pytest.mark.parametrize(
    ("executor", "devices", "nodes"),
    [
        (docker("image", gpus=1), 1, 1),
        (slurm(nodes=4, gpus_per_node=4), 4, 4),
        (slurm(gres="gpu:a100:2"), 2, 2),  # its machines, where the executor names none
        (slurm(), 8, 2),
        (local(2), 2, 1),
        (None, 1, 1),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_the_executor_overrides_values_of_the_recipe(executor: Executor | None, devices: int, nodes: int):
    recipe = llama2_13b()  # 2 nodes of 8 GPUs
    fitted = fit_to_executor(recipe, executor)
    assert (fitted.trainer.devices, fitted.trainer.num_nodes) == (devices, nodes)
    assert fitted.data.global_batch_size == recipe.data.global_batch_size
    sentences = yielded(recipe, fitted)
    assert ("trainer.devices" in " ".join(sentences)) == (devices != 8)
    assert ("trainer.num_nodes" in " ".join(sentences)) == (nodes != 2)
    assert not yielded(fitted, fit_to_executor(fitted, executor))  # once is enough


@pytest.mark.parametrize("setting", ["trainer.devices=8", "trainer.num_nodes=2"])
def test_a_typed_value_is_not_overridden_even_if_it_equals_the_recipes(setting: str):
    recipe = apply_overrides(llama2_13b(), [setting])
    with pytest.raises(ConfigError, match=f"^{setting}: .*set one of them"):
        fit_to_executor(recipe, docker("image", gpus=1))


def test_a_run_may_go_on_on_other_devices_than_it_began_on(tmp_path: Path):
    run = RunDirectory(tmp_path)
    fit_to_executor(llama2_13b(), slurm()).save(run.recipe)
    for executor, edits in ((docker("image", gpus=1), []), (local(), ["trainer.accelerator=cpu"])):
        refuse_taken(run, fit_to_executor(apply_overrides(llama2_13b(), edits), executor))


def test_a_recipe_file_yields_as_its_function_does(tmp_path: Path):
    llama2_13b().save(tmp_path / "r.yaml")
    assert fit_to_executor(Recipe.load(tmp_path / "r.yaml"), docker("image", gpus=1)).trainer.devices == 1


@pytest.mark.parametrize("devices", [0, 2.5, True, "two", None, [0, 1]])
def test_devices_that_are_not_a_number_are_refused(devices):
    recipe = tiny_test()
    recipe.trainer.devices = devices
    with pytest.raises(ConfigError, match=r"^trainer.devices="):
        fit_to_executor(recipe, local())


@pytest.mark.parametrize("make", [full, lora, dora, dpo])
def test_fine_tuning_takes_all_gpus_of_where_it_runs(make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fiddlehead.launch.executor.gpus_here", lambda: 3)  # of a login node, which do not count
    monkeypatch.setattr("fiddlehead.launch.slurm_offer.gpus_of_a_node", lambda shell, partition, nodes: 4)
    for executor, gpus in ((slurm(), 4), (slurm(gpus_per_node=2), 2), (docker("i"), 3), (docker("i", gpus=2), 2)):
        fitted = fit_to_executor(make(), executor)
        assert (fitted.trainer.accelerator, fitted.trainer.devices) == ("gpu", gpus)
        asked = executor.fitted(gpus, "gpu")
        assert getattr(asked, "gpus_per_node", 0) == gpus or getattr(asked, "gpus", 0) == gpus
    assert fitted.trainer.strategy.__fn_or_cls__ is Parallel
    assert make is dpo or fitted.model.compile == "layers"


def test_on_a_cpu_nothing_is_compiled_that_only_the_recipe_wants_compiled():
    recipe = apply_overrides(lora(), ["trainer.accelerator=cpu"])
    fitted = fit_to_executor(recipe, local())
    assert (fitted.trainer.devices, fitted.model.compile) == (1, None)
    assert yielded(recipe, fitted) == ["model.compile=None; the recipe has 'layers'"]
    recipe = apply_overrides(recipe, ["model.compile=layers"])
    assert fit_to_executor(recipe, local()).model.compile == "layers"


@pytest.mark.parametrize("gpus", [0, 2])
def test_an_automatic_accelerator_is_the_gpus_or_else_the_cpu(gpus: int, monkeypatch: pytest.MonkeyPatch):
    recipe = apply_overrides(lora(), ["trainer.accelerator=auto"])
    monkeypatch.setattr("fiddlehead.launch.executor.gpus_here", lambda: gpus)
    fitted = fit_to_executor(recipe, local())
    assert (fitted.trainer.accelerator, fitted.trainer.devices) == (("gpu", 2) if gpus else ("cpu", 1))


def test_a_cluster_that_does_not_say_what_it_has_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fiddlehead.launch.slurm.slurm_offer.Shell.ask", lambda *_, **__: Answer(127, "", "no sinfo"))
    with pytest.raises(ConfigError, match=r"executor.gpus_per_node=None: set the number of GPUs"):
        fit_to_executor(lora(), slurm())


@pytest.mark.parametrize(
    ("executor", "warned"),
    [(local(), True), (slurm(host="login", remote_dir="/scratch/runs"), False)],
    ids=["here", "ssh"],
)
def test_a_run_whose_checkpoints_are_elsewhere_is_not_said_to_start_anew(
    executor: Executor, warned: bool, working_directory: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tiny_test()
    recipe.log.name = "a"
    run = RunDirectory(working_directory / "runs" / "a")
    recipe.save(run.recipe)
    run.write_status(Status(State.INTERRUPTED, attempt=2))
    plan(recipe, executor).refuse_problems()
    assert ("it starts again from step 0" in capsys.readouterr().out) == warned


def test_a_mode_that_wandb_does_not_know_is_refused_before_the_job(monkeypatch: pytest.MonkeyPatch):
    recipe = apply_overrides(tiny_test(), ["log.wandb=true"])
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(ConfigError, match=r"^log.WANDB_MODE='offlin': .*did you mean 'offline'"):
        plan(recipe).refuse_problems()
    monkeypatch.setenv("WANDB_MODE", "offline")
    plan(recipe).refuse_problems()
    with pytest.raises(ConfigError, match=r"^env_vars.WANDB_MODE='never': unknown mode"):
        slurm(env_vars={"WANDB_MODE": "never"})


@pytest.mark.parametrize("executor", [None, local()], ids=["direct", "local"])
def test_a_run_that_asks_for_gpus_and_finds_none_fails_at_once(
    executor: Executor | None, working_directory: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fiddlehead.launch.fitting.gpus_here", lambda: 0)
    with pytest.raises(ConfigError, match=r"^trainer.devices=.* no GPUs; set trainer.accelerator=cpu"):
        launch(llama2_13b(), executor)
    assert not list(working_directory.iterdir())
    made = plan(llama2_13b(), executor)
    assert missing_here(made.recipe) in made.missing
    assert made.training.parameters > 1e10  # which is shown all the same
    assert ("", f"it cannot start here: {missing_here(made.recipe)}") in made.rows()


@pytest.mark.parametrize(
    "around",
    [
        {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},
        {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "x"},
        {"LOCAL_RANK": "3"},
        {"RANK": "x", "WORLD_SIZE": "", "TORCHELASTIC_RUN_ID": "pod"},
        {"NODE_RANK": "one", "GROUP_RANK": "1", "LOCAL_RANK": "x"},
    ],
    ids=str,
)
def test_the_job_that_the_launcher_is_in_is_not_the_runs(around: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    assert plan(tiny_test()).training.world_size == 1
    assert {name: os.environ[name] for name in around} == around  # which is the program's own


def test_gpus_are_asked_for_as_the_recipe_needs_them():
    assert slurm().fitted(8, "gpu").gpus_per_node == 8  # type: ignore[attr-defined]
    assert slurm().fitted(8, "cpu").gpus_per_node is None  # type: ignore[attr-defined]
    assert docker("image").fitted(2, "gpu").gpus == 2  # type: ignore[attr-defined]


def test_what_is_no_executor_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"^a function is not a Recipe; call it: tiny_test\(\)$"):
        plan(tiny_test)
    with pytest.raises(ConfigError, match=r"^a builtins.function is not an executor; call it: local\(\); use one of"):
        launch(tiny_test(), local)
    with pytest.raises(ConfigError, match=r"^a builtins.str is not an executor; use one of fiddlehead.launch, or"):
        launch(tiny_test(), "local")


@pytest.mark.parametrize(
    "executor",
    [
        local(2, env_vars={"A": "b c"}),
        slurm("account", nodes=3, secrets=["TOKEN_OF_MINE"], additional_parameters={"reservation": "r"}),
        docker("image", mounts=["/data:/data:ro"]),
    ],
)
def test_settings_are_read_back(executor: Executor, tmp_path: Path):
    run = RunDirectory(tmp_path)
    executor.save(run)
    assert run.executor.stat().st_mode & 0o777 == 0o600
    loaded = load_executor(run)
    assert loaded is not None and json.dumps(vars(loaded)) == json.dumps(vars(executor))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: docker("image", mounts="/data"), "mounts='/data': expects Sequence[str]"),
        (lambda: docker("image", gpus="2"), "gpus='2': expects int"),
        (lambda: docker(None), "image=None: expects str"),  # type: ignore[arg-type]
        (lambda: docker("image", memory=200), "memory=200: expects str"),
        (lambda: local("2"), "ntasks_per_node='2': expects int"),  # type: ignore[arg-type]
        (lambda: local(python=Path("/bin/python")), "python='/bin/python': expects str, not Path("),
        (lambda: local(secrets="TOKEN"), "secrets='TOKEN': expects Sequence[str]"),
        (lambda: local(env_vars=[("A", "b")]), "env_vars=[('A', 'b')]: expects dict[str, str]"),
    ],
)
def test_settings_in_python_are_of_the_types_that_the_command_line_asks_for(make, said: str):
    with pytest.raises(ConfigError) as caught:
        make()
    assert len(caught.value.problems) == 1 and str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (["executor=slrum"], "unknown executor 'slrum'; did you mean 'slurm'"),
        (["executor=slurm", "executor.nods=2"], "did you mean 'nodes'"),
        (["executor=slurm", "executor.nodes=0"], "executor.nodes=0: must be 1 or more"),
        (["executor=slurm", "executor.time=tomorrow"], "executor.time='tomorrow'"),
        (["executor=slurm", "executor.env_vars.HF_TOKEN=x"], "looks like a secret"),
        (["executor=docker"], "executor.image: docker needs it"),
        (["executor=docker", "executor.image=x", "executor.nodes=2"], "executor.nodes=2"),
        (["executor=local", "executor.nodes=2"], "executor.nodes=2"),
        (["executor=slurm", "executor=local"], "give only one"),
    ],
)
def test_wrong_executor_settings_are_named(edits: list[str], said: str):
    with pytest.raises(ConfigError) as error:
        configure_executor(edits)
    assert said in str(error.value)


def test_settings_that_depend_on_each_other_are_checked_together():
    executor, _ = configure_executor(["executor=slurm", "executor.time=00:01:00", "executor.save_before=5"])
    assert (executor.time, executor.save_before) == ("00:01:00", 5)  # type: ignore[attr-defined]


def test_a_user_can_define_a_cluster(working_directory: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "launch"]:
        monkeypatch.delitem(sys.modules, name)
    (working_directory / "launch").mkdir()
    (working_directory / "launch" / "__init__.py").touch()  # the checkout that is tested has such a folder too
    (working_directory / "launch" / "mine.py").write_text(
        "from fiddlehead.launch.slurm import slurm\n\n\n"
        "def mycluster():\n    return slurm('a', partition='p', time='02:00:00')\n"
    )
    for prefix in ("executor", "run.executor"):
        executor, name = configure_executor([f"{prefix}=mycluster", f"{prefix}.nodes=4"])
        assert name == "mycluster" and executor.nodes == 4 and executor.account == "a"  # type: ignore[attr-defined]


def test_what_is_refused_leaves_no_directory(working_directory: Path, monkeypatch: pytest.MonkeyPatch):
    programs = working_directory / "bin"
    programs.mkdir()
    for name in ("bash", "git", "env"):
        (programs / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(programs))
    recipe = tiny_test()
    recipe.log.name = "a"
    with pytest.raises(ConfigError, match="there is no sbatch"):
        launch(recipe, slurm())
    with pytest.raises(ConfigError, match=r"executor.secrets: .*NOT_THERE"):
        launch(recipe, slurm(secrets=["NOT_THERE"]))
    with pytest.raises(ConfigError, match="there is no sbatch"):
        plan(recipe, slurm()).dry_run()
    assert not list((working_directory / "runs").glob("*"))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o750), (0o077, 0o700), (0o000, 0o770), (0o002, 0o770)])
@pytest.mark.parametrize("name", ["a", None])
def test_a_run_is_closed_to_others(name: str | None, umask: int, mode: int, working_directory: Path):
    recipe = tiny_test()
    recipe.log.name = name
    before = os.umask(umask)
    try:
        run = write_run(recipe, None, name="a", command=None)
        assert run.path.stat().st_mode & 0o777 == mode
        run.write_status(Status(State.SUCCEEDED))
        run.path.chmod(0o2755)  # it was made by another version, in a folder whose group is inherited
        recipe.log.name = run.name
        write_run(recipe, None, name=None, command=None)
        assert run.path.stat().st_mode & 0o7777 == 0o2750
    finally:
        os.umask(before)


def test_a_launch_numbers_its_attempt_and_forgets_what_earlier_ones_were_asked(working_directory: Path):
    recipe = tiny_test()
    recipe.log.name = "a"
    run = write_run(recipe, None, name=None, command=None)
    run.write_status(Status(State.CANCELLED, attempt=3))  # by an earlier version, which numbers nothing
    (run.path / "stop").touch()
    (run.path / "job_id").write_text("17\n")
    write_run(recipe, None, name=None, command=None)
    status = run.written_status()
    assert status and (status.state, status.attempt, status.submission) == (State.PENDING, 4, 4)
    assert run.stop_request() is None and not run.submitted


@pytest.mark.parametrize("start", [Plan.submit, Plan.dry_run])
def test_a_module_that_is_not_shipped_is_refused_before_the_cluster_is_asked(
    start, working_directory: Path, monkeypatch: pytest.MonkeyPatch
):
    subprocess.run(["git", "init", "--quiet"], check=True)
    (working_directory / ".gitignore").write_text("/unshipped_a.py\n")
    source = "from fiddlehead.training.optim import AdamW\nclass Mine(AdamW): ...\n"
    (working_directory / "unshipped_a.py").write_text(source)
    monkeypatch.setattr(sys, "path", [*sys.path, str(working_directory)])
    monkeypatch.setattr(slurm_module.SlurmExecutor, "check", lambda *_: pytest.fail("the cluster was asked"))
    recipe = tiny_test()
    recipe.log.name = "a"
    recipe.optim = fdl.Config(importlib.import_module("unshipped_a").Mine, lr=1e-3)
    try:
        with pytest.raises(
            ConfigError, match=r"^module unshipped_a .* the recipe names it: git ignores it \(\.gitignor"
        ):
            start(plan(recipe, slurm()))
    finally:
        del sys.modules["unshipped_a"]
    assert not list((working_directory / "runs").glob("*"))


def test_a_plan_changes_nothing_and_holds_everything(working_directory: Path):
    recipe = apply_overrides(tiny_test(), ["log.name=a"])
    before, executor = recipe.to_yaml(), local(2)
    made = plan(recipe, executor)
    assert (recipe.to_yaml(), executor) == (before, local(2)) and not list(working_directory.iterdir())
    assert (made.problems, made.missing, made.recipe.trainer.devices) == ((), (), 2)
    assert made.training.world_size == 2 and made.rows()[0][0] == "data"
    told = json.loads(json.dumps(made.to_dict()))
    assert told["executor"]["kind"] == "local" and told["training"]["world_size"] == 2 and told["changed"] == []
    assert Recipe.from_yaml(told["recipe"]) == made.recipe


def test_problems_are_in_the_plan_and_refused_by_all_that_it_can_do(working_directory: Path):
    recipe = apply_overrides(tiny_test(), ["trainer.max_steps=0", "model.config.num_query_groups=3"])
    made = plan(recipe, local())
    assert [problem.partition("=")[0] for problem in made.problems] == ["model.config.num_query_groups"]
    for act in (made.refuse_problems, made.rows, made.submit, made.dry_run, lambda: made.training):
        with pytest.raises(ConfigError, match=r"^model.config.num_query_groups=3"):
            act()
    assert made.to_dict()["problems"] == list(made.problems) and made.to_dict()["training"] is None
    assert not list(working_directory.iterdir())


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "optim",
            AdamW(lr=1e-3),
            "optim: a live fiddlehead.training.optim.adamw.AdamW cannot be written; use fdl.Config",
        ),
        ("optim.lr_scheduler", lambda *_: 1.0, "optim.lr_scheduler"),
        (
            "trainer.default_root_dir",
            "x",
            "trainer.default_root_dir: may not be set in a recipe file: it can be an addr",
        ),
    ],
)
@pytest.mark.parametrize("executor", [None, local()])
def test_what_a_run_s_recipe_file_cannot_have_is_refused_by_the_plan_and_a_dry_run_too(
    executor: Executor | None, path: str, value: object, said: str, working_directory: Path
):
    recipe = tiny_test()
    owner, _, name = path.rpartition(".")
    setattr(getattr(recipe, owner) if owner else recipe, name, value)
    with pytest.raises(ConfigError) as error:
        write_run(recipe, None, name=None, command=None)
    made = plan(recipe, executor)
    assert made.problems == error.value.problems and made.problems[0].startswith(said)
    for act in (made.dry_run, made.submit):
        with pytest.raises(ConfigError) as again:
            act()
        assert again.value.problems == error.value.problems


@pytest.mark.parametrize("interval", ["00:00:10:00", {"minutes": 10}, 1.0])
def test_an_interval_that_is_not_a_number_of_steps_is_refused_before_the_job(interval: object, working_directory: Path):
    made = tiny_test()
    made.trainer.val_check_interval = interval
    (problem,) = plan(made).problems
    assert ("`val_check_interval` should be an integer" if interval == 1.0 else "of steps, 1 or more") in problem


@pytest.mark.parametrize("recipe", [tiny_test, llama2_13b])
def test_what_lightning_would_replace_or_refuse_itself_is_refused_with_the_reason(recipe, working_directory: Path):
    made = recipe()
    made.trainer.precision, made.trainer.val_check_interval = "16-mixed", 0.25
    problems = plan(made, target="unknown").problems
    assert any("'16-mixed': the loss scaling of float16 hides" in problem for problem in problems)
    assert any("val_check_interval=0.25: must be a whole number of steps" in problem for problem in problems)
    assert (made.trainer.precision, made.trainer.val_check_interval) == ("16-mixed", 0.25)


def test_a_plan_is_submitted_as_often_as_one_likes(working_directory: Path):
    made = plan(apply_overrides(tiny_test(), ["trainer.max_steps=1"]))
    first, second = made.submit(name="a"), made.submit(name="a")
    assert first.path != second.path and made.recipe.log.name is None


@pytest.mark.parametrize("edit", ["model.config.num_layers=3", "trainer.precision=bf16-true"])
def test_a_checkpoint_of_another_model_is_refused_before_the_job(edit: str, working_directory: Path):
    settings = ["trainer.max_steps=2", "resume=a"]
    plan(apply_overrides(tiny_test(), [*settings[:1], "log.name=a"])).submit()
    assert not plan(apply_overrides(tiny_test(), settings)).problems
    (problem,) = plan(apply_overrides(tiny_test(), [*settings, edit])).problems
    assert problem.startswith(edit.partition("=")[0])


def test_a_name_that_was_taken_since_is_refused_when_it_is_submitted(working_directory: Path):
    made = plan(apply_overrides(tiny_test(), ["log.name=a"]))
    other = apply_overrides(tiny_test(), ["log.name=a", "optim.lr=1"])
    other.save(working_directory / "runs" / "a" / "recipe.yaml")
    with pytest.raises(ConfigError, match="is another recipe's run"):
        made.submit()


def test_what_makes_it_another_run_is_shown_as_one_writes_it(working_directory: Path):
    tiny_test().save(working_directory / "runs" / "a" / "recipe.yaml")
    changed = apply_overrides(tiny_test(), ["log.name=a"])
    changed.trainer.callbacks = [fdl.Config(Timer)]
    (problem,) = plan(changed).problems
    assert "  trainer.callbacks: [] before, <list of 1> now\n" in problem
    assert problem.endswith("  trainer.callbacks[0]: <not set> before, Timer(...) now")


@pytest.mark.parametrize(
    ("edit", "free"),
    [
        *((edit, True) for edit in ("model.compile=layers", "model.activation_checkpointing=full", "resume=never")),
        *(
            (edit, True)
            for edit in ("model.tiled_mlp=8", "model.tiled_attention=1", "model.activation_offloading=true")
        ),
        *((edit, True) for edit in ("data.micro_batch_size=1", "data.num_workers=1", "trainer.max_steps=9")),
        *((edit, True) for edit in ("log.tensorboard=true", "checkpoint.every_n_steps=7", "log.dir=there")),
        *((edit, True) for edit in ("model.config.attention_backend=reference", "trainer.val_check_interval=3")),
        *((edit, False) for edit in ("optim.lr=1", "seed=2", "data.seed=2", "data.global_batch_size=16")),
        *((edit, False) for edit in ("model.config.hidden_size=64", "trainer.gradient_clip_val=2")),
        *(
            (edit, False)
            for edit in ("optim.lr_scheduler.warmup_steps=1", "data.val_samples=9", "trainer.precision=bf16-mixed")
        ),
    ],
)
def test_each_field_declares_whether_a_change_makes_another_run(edit: str, free: bool, working_directory: Path):
    run = RunDirectory(working_directory / "runs" / "a")
    tiny_test().save(run.recipe)
    changed = apply_overrides(tiny_test(), [edit])
    assert changed.diff(tiny_test()), "it is a change"
    if free:
        refuse_taken(run, changed)
        return
    with pytest.raises(ConfigError, match="is another recipe's run"):
        refuse_taken(run, changed)


def test_a_user_s_own_part_says_what_may_change(working_directory: Path):
    run = RunDirectory(working_directory / "runs" / "a")
    recipe = tiny_test()
    recipe.optim = fdl.Config(Mine, lr=1e-3, note="before", other=1)
    recipe.save(run.recipe)
    recipe.optim.note = "now"
    refuse_taken(run, recipe)
    recipe.optim.other = 2
    with pytest.raises(ConfigError, match=r"optim\.other: 1 before, 2 now$"):
        refuse_taken(run, recipe)


class Mine(AdamW):
    """An optimizer with a note that makes no difference."""

    def __init__(self, note: Resumable[str] = "", other: int = 0, **settings: float) -> None:
        super().__init__(**settings)


def test_what_lightning_refuses_of_callbacks_is_a_problem_and_a_bug_of_a_users_is_not() -> None:
    recipe = tiny_test()
    recipe.trainer.callbacks += [fdl.Config(EarlyStopping, monitor="val_loss") for _ in range(2)]
    (problem,) = plan(recipe).problems
    assert problem.startswith("trainer: Trainer: Found more than one stateful callback of type `EarlyStopping`")
    recipe.trainer.callbacks[-1:] = [fdl.Config(Broken)]
    with pytest.raises(RuntimeError, match="a bug"):
        plan(recipe)


class Broken(Callback):
    """A part that cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("a bug")
