"""The command line as it is typed, right and wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fiddlehead as fiddlehead_package
from fiddlehead.cli import main
from fiddlehead.errors import RunError
from fiddlehead.launch.shell import Answer, Shell
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status, this_process
from tests import warm


@pytest.fixture
def fiddlehead(tmp_path, monkeypatch, capsys):
    """Types a command in an empty directory, and returns what it prints, both streams.

    In this process, because importing torch and Lightning again for each command would take minutes. It asserts the
    exit code, and that no traceback is shown; a job that a command starts is a process of its own all the same.
    """
    for name, value in warm.everywhere().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    # Without the root of this repository, which pytest puts there and whose `recipes` would come first.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "pyproject.toml").exists()])
    before = set(sys.modules)

    def command(*arguments: str, rc: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["fiddlehead", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        assert (exit.value.code or 0) == rc, out + err
        assert "Traceback" not in out + err
        return out + err

    yield command
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("recipes", "evil"):
            del sys.modules[name]


def modules_after(code: str, folder: Path) -> set[str]:
    """What is imported in a process that starts in `folder` as the installed command does: its path is not there."""
    probe = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('MODULES', *sys.modules)"
    command = [sys.executable, "-P", "-c", probe]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert "the wrong one" not in result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("MODULES"))
    return set(line.split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["recipes"], ["runs"], ["pretrain", "--help"], ["bench", "--help"], ["--version"]]
)
def test_what_needs_no_torch_imports_none_and_nothing_that_lies_around(arguments, tmp_path):
    for name in (*sys.stdlib_module_names, "rich", "typer", "click", "yaml", "fiddlehead", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong one')\n")
    code = f"sys.argv = ['fiddlehead', *{arguments!r}]; from fiddlehead.cli import main; main()"
    loaded = modules_after(code, tmp_path)
    assert "typer" in loaded
    assert not loaded & {"torch", "lightning", "nemo_run", "wandb", "transformers", "numpy"}


ON_A_CPU = ("trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto", "model.compile=None")


def test_a_recipe_without_data_is_planned_and_written_and_says_what_is_missing(fiddlehead):
    assert "data.paths=None: there is no data" in fiddlehead("pretrain", "-f", "llama32_1b", "--dryrun")
    assert "data.paths=None: there is no data" in fiddlehead("pretrain", "-f", "llama32_1b", "--to-yaml", "l.yaml")
    assert "llama" not in fiddlehead("show", "@l.yaml") and Path("l.yaml").exists()
    assert "no data" not in fiddlehead("pretrain", "-f", "llama32_1b", "data.corpus=stdlib", "--dryrun")
    assert "no data" not in fiddlehead("pretrain", "-f", "tiny", "--dryrun")


def test_what_tokenize_recommends_can_be_trained_on(fiddlehead, tmp_path):
    (tmp_path / "a.txt").write_text("A text that is long enough for a window of 32 bytes, and alone.")
    output = fiddlehead("tokenize", "a.txt", "-t", "bytes", "-o", "my tokens", "--workers", "1")
    assert "no document fell into --val-fraction 0.01" in output
    edits = shlex.split(output.split("train on it with ")[1].splitlines()[0])
    assert edits == ["data.paths=my tokens", "data.tokenizer=None", "data.val_samples=0"]
    fiddlehead("pretrain", "-f", "tiny_test", *edits, "--dryrun")
    refused = fiddlehead("pretrain", "-f", "tiny_test", *edits[:2], "data.seq_length=99", "--dryrun", rc=2)
    assert "data.seq_length=99: needs 100 tokens, and the training split of my tokens has 64" in refused
    assert "the validation split of my tokens has 0 (val_samples=0 trains without validation)" in refused


def test_the_version_is_printed_and_nothing_else(fiddlehead):
    assert fiddlehead("--version") == f"{fiddlehead_package.__version__}\n"


def test_recipes_are_listed_without_being_imported(fiddlehead, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.py").write_text(
        'raise RuntimeError(\'imported\')\n\ndef my_run() -> Recipe:\n    """What I do."""\n    return pretrain()\n'
    )
    output = fiddlehead("recipes")
    assert "my_run" in output and "What I do." in output and "recipes/mine.py:3" in output
    assert "tiny_mqa" in output
    tasks = {line.split("  ")[0]: line for line in output.splitlines()}
    assert "pretrain, finetune" in tasks["llama3_8b"] and "pretrain" not in tasks["lora"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("gemma3_1", ["gemma3_1b", "gemma3_12b"]),
        ("llama*_70b", ["llama2_70b", "llama3_70b", "llama31_70b"]),
        ("tiny_m?a", ["tiny_mqa", "tiny_mha"]),
    ],
)
def test_recipes_are_found_by_part_of_their_name(fiddlehead, pattern, names):
    lines = fiddlehead("recipes", pattern).splitlines()
    assert {line.split()[0] for line in lines[2:] if line.strip()} == set(names)


def test_show_says_where_each_value_was_set(fiddlehead):
    output = fiddlehead("show", "tiny", "optim.lr=1e-3")
    line = next(line for line in output.splitlines() if line.startswith("optim.lr "))
    assert "0.001" in line and "command line: optim.lr=1e-3" in line
    line = next(line for line in output.splitlines() if line.startswith("trainer.val_check_interval"))
    assert "recipes/tiny.py:" in line


def test_diff_of_recipes_and_files(fiddlehead, tmp_path):
    output = fiddlehead("diff", "tiny", "tiny_mqa")
    assert "model.config.num_query_groups" in output and len(output.strip().splitlines()) == 3
    fiddlehead("pretrain", "-f", "tiny", "optim.lr=0.5", "--to-yaml", str(tmp_path / "t.yaml"))
    assert "optim.lr" in fiddlehead("diff", "tiny", str(tmp_path / "t.yaml"))
    assert "are the same" in fiddlehead("diff", "tiny", "tiny")


def test_a_plan_may_be_for_a_gpu_that_is_not_here(fiddlehead):
    output = fiddlehead("pretrain", "-f", "llama32_1b", "trainer.devices=1", "--dryrun", "--gpu", "h100")
    assert "cudnn on h100" in output and "fits: h100 has 79.2 GiB" in output
    output = fiddlehead("pretrain", "-f", "llama3_8b", "--dryrun", "--gpu", "mine=24,180,900", rc=2)
    assert "8 devices" in output and "does not fit: mine has 24.0 GiB" in output


def test_fit_takes_the_fastest_layout_and_says_what_it_changed(fiddlehead, tmp_path):
    run = ("pretrain", "-f", "llama32_1b", "trainer.devices=1", "--fit", "--gpu", "h200")
    output = fiddlehead(*run, "--dryrun")
    assert "--fit  " in output and "data.micro_batch_size=" in output and "fits: h200" in output
    output = fiddlehead(*run, "--to-yaml", str(tmp_path / "fitted.yaml"))
    assert "--fit: data.micro_batch_size=" in output
    changed = fiddlehead("diff", str(tmp_path / "fitted.yaml"), "llama32_1b")
    assert "data.micro_batch_size" in changed and "global_batch_size" not in changed
    assert "--fit exclude" in fiddlehead(*run[:-2], "--sweep", rc=2)


def test_dryrun_starts_nothing(fiddlehead, tmp_path):
    output = fiddlehead("pretrain", "-f", "tiny", "model.config.num_query_groups=1", "--dryrun")
    assert "4 heads in 1 groups" in output and "2,048 tokens" in output
    assert not list(tmp_path.iterdir())


def test_parts_and_executors_are_configured_by_name(fiddlehead):
    edits = ["optim.lr_scheduler=CosineAnnealing(warmup_steps=3)", "data.tokenizer=ByteTokenizer"]
    output = fiddlehead("pretrain", "-f", "tiny_test", *edits, "executor=local(ntasks_per_node=2)", "--dryrun")
    assert " in 3 steps, cosine to 0" in output and "257 tokens" in output and "2 devices" in output


def test_another_optimizer_is_a_part_by_name(fiddlehead):
    edits = ["optim=Muon", "optim.lr=2e-3", "optim.lr_scheduler=CosineAnnealing", "optim.lr_scheduler.warmup_steps=4"]
    assert "0 to 2e-3 in 4 steps, cosine to 0" in fiddlehead("pretrain", "-f", "tiny_test", *edits, "--dryrun")
    shown = fiddlehead("show", "tiny_test", *edits)
    assert "Muon(...)" in shown and "0.002" in shown


def test_text_from_users_is_not_read_as_markup(fiddlehead):
    assert "[bold]x" in fiddlehead("show", "tiny_test", "data.cache_dir=[bold]x")


def test_a_saved_recipe_runs_like_the_function(fiddlehead, tmp_path):
    fiddlehead("pretrain", "-f", "tiny", "trainer.max_steps=77", "--to-yaml", "t.yaml")
    assert "77 steps" in fiddlehead("pretrain", "--factory", "@t.yaml", "--dryrun")


def test_all_mistakes_of_a_recipe_at_once(fiddlehead):
    edits = ["model.config.num_query_groups=3", "optim.lr=-1", "data.micro_batch_size=7"]
    output = fiddlehead("pretrain", "-f", "tiny", *edits, "--dryrun", rc=2)
    assert "model.config.num_query_groups=3: does not divide num_attention_heads=4; allowed: 1, 2, 4, None" in output
    assert "optim.lr=-1.0: must be a finite number above 0" in output
    assert "data.global_batch_size=16" in output
    assert len(output.strip().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrain", "-f", "tiny", "--dryrn"], "--dryrun"),
        (["pretrain", "-f", "tinny"], "did you mean 'tiny'?"),
        (["pretrain", "-f", "tiny", "trainer.max_step=5"], "did you mean 'max_steps'?"),
        (["pretrain", "-f", "tiny", "trainer.max_steps=many"], "trainer.max_steps"),
        (["pretrain", "-f", "tiny", "trainer.max_steps=1.5"], "trainer.max_steps"),
        (["pretrain", "-f", "tiny", "trainer.max_steps"], "expected KEY=VALUE"),
        (["pretrain", "-f", "tiny", "model.config.num_query_groups=3", "--dryrun"], "allowed: 1, 2, 4, None"),
        (["pretrain", "-f", "tiny", "executor=slrm"], "unknown executor 'slrm'"),
        (["pretrain", "-f", "tiny", "executor=local", "executor.ntasks=2"], "ntasks_per_node"),
        (["pretrain", "-f", "tiny", "--direct", "executor=local"], "--direct"),
        (["pretrain", "-f", "tiny", "--direct", "--detach"], "exclude each other"),
        (
            ["pretrain", "-f", "tiny", "trainer.devices=2", "data.micro_batch_size=8", "--direct", "--yes"],
            "without an executor",
        ),
        (["pretrain", "-f", "@missing.yaml"], "there is no file missing.yaml"),
        (["pretrain", "-f", "no.such.module:recipe"], "there is no module"),
        (["pretrain", "-f", "fiddlehead.recipes.tiny:tinny"], "did you mean 'tiny'?"),
        (["pretrain", "-f", "tiny", "data.paths=/nowhere", "data.tokenizer=None", "--dryrun"], "/nowhere"),
        (["pretrain", "-f", "tiny_test", "data.paths=missing", "--dryrun"], "data.paths='missing'"),
        (["pretrain", "-f", "tiny", "resume=nosuch", "log.name=x", "--dryrun"], "unknown run 'nosuch'"),
        (["pretrain", "-f", "llama32_1b", "--dryrun", "--gpu", "h101"], "--gpu='h101'"),
        (["pretrain", "-f", "llama32_1b", "--gpu", "h100"], "--gpu goes with --dryrun"),
        (["pretrain", "-f", "tiny", "--dryrun", "--gpu", "h100"], "trainer.accelerator='cpu'"),
        (["pretrain", "-f", "tiny", "log.name=a/b", "--dryrun"], "log.name='a/b'"),
        (["pretrain", "-f", "tiny", "log.name=[/x]", "--dryrun"], "log.name='[/x]'"),
        (["pretrain", "-f", "tiny", "trainer.val_check_interval=0", "--dryrun"], "trainer.val_check_interval=0"),
        (["pretrain", "-f", "tiny", "trainer.devices=[0,1]", "--dryrun"], "trainer.devices=[0, 1]"),
        (["pretrain", "-f", "tiny", "trainer.devices=0", "--dryrun"], "trainer.devices=0"),
        (["pretrain", "-f", "tiny", "trainer.limit_train_batches=5", "--dryrun"], "trainer.limit_train_batches"),
        (["pretrain", "-f", "tiny", "trainer.enable_checkpointing=true", "--dryrun"], "trainer.enable_checkpointing"),
        (["pretrain", "-f", "tiny", "optim.lr=inf", "--dryrun"], "optim.lr=inf"),
        (
            ["pretrain", "-f", "tiny", "optim.lr_scheduler=CosineAnealing", "--dryrun"],
            "did you mean 'CosineAnnealing'?",
        ),
        (["pretrain", "-f", "tiny", "optim=Moun", "--dryrun"], "did you mean 'Muon'?"),
        (["pretrain", "-f", "tiny", "optim=ByteTokenizer", "--dryrun"], "expects Optim"),
        (["pretrain", "-f", "tiny", "optim=Muon", "trainer.precision=bf16-true", "--dryrun"], "optim=AdamW"),
        (["pretrain", "-f", "tiny", "executor=local", "executor=slurm", "--dryrun"], "discards the earlier"),
        (["runs", "--dir", "elsewhere", "show", "x"], "--dir elsewhere"),
        (["pretrain", "-f", "tiny", "optim.lr=1e-3,4e-3"], "not '1e-3,4e-3'; for a run with each value add --sweep"),
        (["pretrain", "-f", "tiny", "trainer.strategy=ddp,auto"], "add --sweep"),
        (["pretrain", "-f", "tiny", "data.tokenizer=mytok.json"], "is a file; write TokenizerFile(path=mytok.json)"),
        (["pretrain", "-f", "tiny", "optim=mine/adam.yaml"], "is a file; write @mine/adam.yaml"),
        (["pretrain", "-f", "llama32_1b", *ON_A_CPU], "data.paths=None: there is no data; give data.paths=DIR"),
        (["bench", "llama32_1b", *ON_A_CPU], "`fiddlehead bench` also takes --random-tokens"),
        (["pretrain", "-f", "tiny_test", "data.corpus=python"], "data.corpus=python: expects 'stdlib' | None"),
        (["finetune", "-f", "lora", "--dryrun"], "model.init_from=None: name the model to begin with"),
        (
            ["finetune", "-f", "dpo", "--dryrun"],
            "model.init_from=None: name a model that can answer already",
        ),
        (["finetune", "-f", "full", "--dryrun"], "data.paths: is empty"),
        (["finetune", "-f", "llama3_8b", "trainer.accelerator=cpu"], "model.init_from=None: adapters need a model"),
        (["finetune", "-f", "lora.finetune_recipe"], "lora is not a model's recipe"),
        (["pretrain", "-f", "llama3_8b(num_node=2)"], "did you mean 'num_nodes'?"),
        (["pretrain", "-f", "llama3_8b(num_nodes=two)"], "num_nodes"),
        (["pretrain", "-f", "llama3_8b(2)"], "'2' must be name=value"),
        (["pretrain", "-f", "llama3_8b(num_nodes=2"], "unknown recipe 'llama3_8b(num_nodes=2'"),
        (["pretrain", "-f", "llama3_8b(name=__import__('os').getcwd(), num_nodes=0)"], "num_nodes=0"),
        (["finetune", "-f", "llama3_8b(peft_scheme='lara')"], "'lora' | 'dora' | 'qlora' | 'none'"),
        (["pretrain", "-f", "tiny_test", "trainer.default_root_dir=x", "--dryrun"], "may not be set in a recipe file"),
        (["pretrain", "-f", "tiny_test", "--gpu", "", "--dryrun"], "--gpu='': is not a known GPU"),
        (["pretrain", "-f", "tiny_test", "--gpu", "", "--sweep", "seed=1,2"], "--gpu and --sweep exclude each other"),
        (["pretrain", "-f", "tiny", "trainer.limit_val_batches=5", "--dryrun"], "data.val_samples says how many"),
        (["pretrain", "-f", "tiny", "executor=slurm", "executor.container_image=x"], "here it is `container`"),
        (["pretrain"], "--factory"),
        (["show", "tinny"], "did you mean 'tiny'?"),
        (["recipes", "lamma3_8b"], "no recipe is called 'lamma3_8b'; did you mean 'llama3_8b' or "),
        (["recipes", "zzz*"], "no recipe is called 'zzz*'; `fiddlehead recipes` lists all"),
        (["generate", "nothing", "--prompt", "x"], "unknown run 'nothing'"),
        (["runs", "cancel", "nothing"], "unknown run 'nothing'"),
        (["runs", "shw"], "shw"),
        (["tokenize", "/nowhere", "--tokenizer", "bytes", "--out", "tokens"], "/nowhere"),
        (["trian"], "trian"),
    ],
)
def test_mistakes_are_a_few_lines_and_exit_code_2(fiddlehead, arguments, expected, tmp_path):
    output = fiddlehead(*arguments, rc=2)
    assert expected in output
    assert len(output.strip().splitlines()) <= 8
    assert not (tmp_path / "runs").exists()


def test_a_recipe_is_given_arguments_where_it_is_named(fiddlehead, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.py").write_text(
        "from fiddlehead.recipe import Recipe\nfrom fiddlehead.recipes.tiny import tiny_test\n\n\n"
        "def mine(layers: int, lr=0.1, *, sizes: tuple[int, ...] = ()) -> Recipe:\n    recipe = tiny_test()\n"
        "    recipe.model.config.num_layers, recipe.optim.lr = layers, lr\n"
        "    recipe.data.micro_batch_size = sum(sizes)\n    return recipe\n"
    )
    for called in ("mine(layers=5, lr=1e-2, sizes=[2, 2])", "recipes.mine:mine(layers=5,lr=1e-2,sizes=(2,2))"):
        shown = fiddlehead("show", called)
        assert re.search(r"num_layers +5 ", shown) and re.search(r"optim.lr +0.01 ", shown)
        assert re.search(r"micro_batch_size +4 ", shown)
    assert "missing a required argument: 'layers'" in fiddlehead("show", "mine()", rc=2)


def test_a_model_s_name_means_its_fine_tuning_where_that_is_typed(fiddlehead):
    planned = fiddlehead(
        "finetune", "-f", "llama3_8b(peft_scheme='dora', num_gpus_per_node=2)", "--dryrun", "--gpu", "h100"
    )
    assert "2 devices" in planned and "of them trained" in planned
    assert "the shape is model.config's, without weights" in planned
    assert "is a recipe to finetune" in fiddlehead("pretrain", "-f", "llama3_8b.finetune_recipe", rc=2)


def spoiled_run(folder: Path, name: str, file: str, content: bytes) -> None:
    run = RunDirectory(folder / "runs" / name)
    run.path.mkdir(parents=True)
    run.recipe.write_text("{}")
    run.write_status(Status(State.SUCCEEDED, started=1.0, ended=2.0, host="h", pid=1))
    run.metrics.write_text("step,loss,tokens_per_s\n1,5.5,10\n")
    (run.path / file).write_bytes(content)


def test_spoiled_runs_are_listed_beside_the_others_and_say_what_to_do(fiddlehead, tmp_path):
    spoiled_run(tmp_path, "whole", "command", b"fiddlehead\n")
    spoiled_run(tmp_path, "cut", "status", b'{"state": "SUCC')
    spoiled_run(tmp_path, "word", "metrics.csv", b"step,loss\n1,oops\n")
    spoiled_run(tmp_path, "bytes", "command", b"\xff")
    rows = {line.split()[0]: line for line in fiddlehead("runs").splitlines() if line.strip()}
    assert "5.5000" in rows["whole"] and "damaged" not in rows["whole"]
    assert "DAMAGED" in rows["cut"] and "SUCCEEDED" in rows["word"] and "SUCCEEDED" in rows["bytes"]
    output = fiddlehead("runs")
    for said in (
        "status: is damaged",
        "loss='oops' is not a number",
        "command: is damaged: is not valid UTF-8",
    ):
        assert said in " ".join(output.split())
    found = {run["name"]: run for run in json.loads(fiddlehead("runs", "--json"))}
    assert [bool(found[name]["damaged"]) for name in ("whole", "cut", "word", "bytes")] == [False, True, True, True]
    for name in ("cut", "word", "bytes"):
        assert "damaged" in fiddlehead("runs", "show", name)
    refused = fiddlehead("pretrain", "-f", "tiny_test", "log.name=cut", "--dryrun", rc=2)
    assert "goes on from its newest checkpoint" in refused
    assert "cut/status: is damaged" in fiddlehead("runs", "cancel", "cut", rc=2)
    fiddlehead("runs", "clean", "--state", "DAMAGED", "--yes")
    assert not (tmp_path / "runs" / "cut").exists() and (tmp_path / "runs" / "word").exists()


@pytest.mark.parametrize("error", [RunError("it is damaged"), OSError(errno.ENOSPC, "No space left on device", "out")])
def test_what_the_disk_refuses_is_a_line_and_exit_code_1(fiddlehead, monkeypatch, tmp_path, error):
    (tmp_path / "a.txt").write_text("text")

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fiddlehead.data.tokenize.tokenize", refuse)
    monkeypatch.setattr("fiddlehead.checkpoints.huggingface.convert.import_checkpoint", refuse)
    monkeypatch.setattr("fiddlehead.checkpoints.huggingface.convert.export_checkpoint", refuse)
    said = "error: it is damaged\n" if isinstance(error, RunError) else "error: No space left on device: out\n"
    assert fiddlehead("tokenize", "a.txt", "-t", "bytes", "-o", "out", rc=1) == said
    assert fiddlehead("import", "hf", "here", "-o", "out", rc=1) == said
    assert fiddlehead("export", "hf", "here", "out", rc=1) == said


def test_an_error_that_is_nobodys_keeps_its_traceback(fiddlehead, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("text")

    def broken(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    monkeypatch.setattr("fiddlehead.data.tokenize.tokenize", broken)
    monkeypatch.setattr(sys, "argv", ["fiddlehead", "tokenize", "a.txt", "-t", "bytes", "-o", "out"])
    with pytest.raises(FileNotFoundError):
        main()


def test_a_yaml_recipe_imports_nothing_unasked(fiddlehead, tmp_path):
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef pretrain(): pass\n")
    (tmp_path / "r.yaml").write_text("_target_: evil:pretrain\n_partial_: true\n")
    output = fiddlehead("pretrain", "-f", "@r.yaml", rc=2)
    assert "evil" in output and "allow" in output
    assert not (tmp_path / "ran").exists()


def test_a_directory_that_cannot_be_written(fiddlehead, tmp_path):
    (tmp_path / "file").write_text("")
    output = fiddlehead("pretrain", "-f", "tiny_test", "log.dir=file", "log.name=x", "--yes", rc=2)
    assert "log.dir" in output


def test_two_functions_of_one_name_are_refused(fiddlehead, tmp_path):
    (tmp_path / "recipes").mkdir()
    for name in ("a", "b"):
        (tmp_path / "recipes" / f"{name}.py").write_text(
            "from fiddlehead.recipe import Recipe\nfrom fiddlehead.recipes.tiny import tiny\n"
            "def same() -> Recipe:\n    return tiny()\n"
        )
    assert "ambiguous" in fiddlehead("show", "same", rc=2)


def test_a_users_recipe_comes_first_and_edits_apply_to_it(fiddlehead, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.py").write_text(
        "from fiddlehead.recipe import Recipe\nfrom fiddlehead.recipes.tiny import tiny as base\n"
        "def tiny() -> Recipe:\n    recipe = base()\n    recipe.trainer.max_steps = 7\n    return recipe\n"
    )
    assert "7 steps" in fiddlehead("pretrain", "-f", "tiny", "--dryrun")
    assert "70 steps" in fiddlehead("pretrain", "-f", "tiny", "trainer.max_steps*=10", "--dryrun")


def test_an_error_in_a_users_recipe_is_named_by_file_and_line(fiddlehead, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.py").write_text(
        "from fiddlehead.recipe import Recipe\nfrom fiddlehead.recipes.tiny import tiny\n"
        "def slip() -> Recipe:\n    recipe = tiny()\n    recipe.trainr.max_steps = 7\n    return recipe\n"
    )
    output = fiddlehead("pretrain", "-f", "slip", rc=2)
    assert "recipes/mine.py:5" in output and "'trainer'" in output
    (tmp_path / "recipes" / "mine.py").write_text("def slip() -> Recipe:\n    return (\n")
    assert "mine.py:2" in fiddlehead("recipes") and "mine.py:2" in fiddlehead("pretrain", "-f", "slip", rc=2)


def test_completion_knows_the_recipes():
    env = {"_FIDDLEHEAD_COMPLETE": "complete_bash", "COMP_WORDS": "fiddlehead pretrain --factory ti", "COMP_CWORD": "3"}
    code = "import sys; sys.argv[0] = 'fiddlehead'; from fiddlehead.cli import app; app(prog_name='fiddlehead')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)
    assert {"tiny", "tiny_mqa"} <= set(result.stdout.split())


@pytest.mark.slow
def test_continuing_says_what_it_means(fiddlehead, tmp_path):
    """An explicit resume is never dropped, a changed length says what becomes of the rate, secrets are not kept."""
    start = ["pretrain", "-f", "tiny_test", "log.name=a", "trainer.max_steps=10", "--yes"]
    assert "looks like a secret" in fiddlehead(*start, "executor.env_vars={SECRET_KEY: s3cr3tvalue}", rc=2)
    assert not (tmp_path / "runs").exists()
    fiddlehead(*start, "executor.env_vars={MINE: s3cr3tvalue}")
    assert "MINE" not in (tmp_path / "runs" / "a" / "command").read_text()  # it may be one nevertheless
    longer = ["pretrain", "-f", "tiny_test", "log.name=a", "trainer.max_steps=20", "--yes"]
    checkpoint = "resume=runs/a/checkpoints/step-00000010"
    assert "its own step-00000010" in fiddlehead(*longer, checkpoint, rc=2)
    assert "the learning rate goes on at 4.00e-3" in fiddlehead(*longer)
    output = fiddlehead("pretrain", "-f", "tiny_test", "log.name=b", checkpoint, "--yes")
    assert "continues from" in output and "30/30" in output
    first = next(line for line in output.splitlines() if "    11/30" in line)
    assert "lr 4.00e-3" in first  # and not the rate at which the shorter run ended


@pytest.mark.slow
def test_text_is_tokenized_trained_on_and_sampled_from(fiddlehead, tmp_path):
    """tokenize, pretrain on it, generate, and every `runs` command."""
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"def f{number}(x):\n    return x + {number}\n" * 30)
    texts = [str(tmp_path / f"{number}.txt") for number in range(40)]
    output = fiddlehead("tokenize", *texts, "-t", "bpe:300", "-o", "tokens", "--val-fraction", "0.2")
    assert "300" in output
    edits = ["data.paths=tokens", "data.tokenizer=None", "log.name=t", "log.tensorboard=true"]
    output = fiddlehead("pretrain", "-f", "tiny_test", *edits, "--yes")
    assert "validation: " in output
    assert list((tmp_path / "runs" / "t" / "tensorboard").iterdir())
    first = fiddlehead("generate", "t", "--prompt", "def ", "--max-new-tokens", "20")
    assert first.startswith("def ")
    assert fiddlehead("generate", "t", "--prompt", "def ", "--max-new-tokens", "20") == first
    assert "SUCCEEDED" in fiddlehead("runs")
    shown = fiddlehead("runs", "show", "t")
    assert "step-00000030" in shown and "val_loss" in shown
    assert "step     30/30" in fiddlehead("runs", "logs", "t")
    assert "not running" in fiddlehead("runs", "cancel", "t", rc=2)
    assert "nothing is left to train" in fiddlehead("runs", "rerun", "t")
    other = fiddlehead("pretrain", "-f", "tiny_test", *edits, "optim.lr=0.1", "--yes", rc=2)
    assert "another recipe's run" in other and "optim.lr" in other
    longer = fiddlehead("pretrain", "-f", "tiny_test", *edits, "trainer.max_steps=35", "--yes")
    assert "continues from" in longer and "35/35" in longer


# -- from a Mac


@pytest.mark.usefixtures("a_mac")
def test_a_mac_shows_a_recipe_and_plans_a_launch_on_a_cluster(fiddlehead, monkeypatch):
    asked = []

    def answer(shell: Shell, command: str, stdin: bytes) -> Answer:
        asked.append((shell.host, command))
        partitions = "cpu*|1-00:00:00|9|(null)|up|idle\n" if "sinfo" in command else ""
        return Answer(1 if "[ -e " in command else 0, partitions, "")

    monkeypatch.setattr(Shell, "_over_ssh", answer)
    assert "max_steps" in fiddlehead("show", "tiny_test")
    cluster = ["executor=slurm", "executor.host=login", "executor.remote_dir=/scratch/runs"]
    assert "would ship" in fiddlehead("pretrain", "-f", "tiny_test", *cluster, "--dryrun")
    assert {host for host, _ in asked} == {"login"} and any("sbatch --test-only" in command for _, command in asked)


@pytest.mark.usefixtures("a_mac")
def test_a_mac_knows_what_has_become_of_its_runs(fiddlehead, tmp_path):
    gone = {"pid": 2**30, "process_started": 179_000_000_000}
    elsewhere = {"host": "node1", "machine": "another-boot/pid:[1]", **gone}
    for name, words in {
        "goes": {}, "died": gone, "stopped": {"state": State.CANCELLED, **gone}, "far": elsewhere,
        "lost": {**elsewhere, "started": 1.0},
    }.items():  # fmt: skip
        run = RunDirectory(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.recipe.touch()
        run.command.write_text("fiddlehead pretrain\n")
        run.write_status(replace(this_process(1, "direct"), **words))
    states = {run["name"]: run["state"] for run in json.loads(fiddlehead("runs", "--json"))}
    assert states == {"goes": "RUNNING", "died": "DIED", "stopped": "CANCELLED", "far": "RUNNING", "lost": "DIED"}
    assert "RUNNING" in fiddlehead("runs", "show", "goes")
    assert f"process {2**30} is gone" in fiddlehead("runs", "show", "died")
    assert "written off" in fiddlehead("runs", "cancel", "--force", "far")
