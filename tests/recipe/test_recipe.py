"""Recipes: printing, comparing, sources, building, and use in NeMo-Run."""

import copy
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import fiddle as fdl
import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.recipe import MISSING, Difference, Recipe
from fiddlehead.recipe.edits import apply_overrides
from tests import recipe_parts as parts
from tests.recipe_parts import recipe


def test_str_is_one_path_and_value_a_line_without_defaults():
    assert str(recipe()).splitlines() == [
        "# tests.recipe_parts.pretrain",
        "model = Model(...)",
        "model.config = ModelConfig(...)",
        "model.config.num_layers = 4",
        "model.tokenizer = Tokenizer(...)",
        "model.tokenizer.path = Path('vocab')",
        "data = Data(...)",
        "data.tokenizer = <shared with model.tokenizer>",
        "data.paths = ['a', 'b']",
        "optim = Optim(...)",
        "optim.lr = 0.0003",
        "log = Log(...)",
        "odd = Odd(...)",
        "loss = Partial silu(...)",
        "loss.inplace = True",
        "anything = partial(torch.nn.functional.silu, inplace=False)",
    ]


def test_html_is_escaped():
    changed = recipe()
    changed.run_name = "<script>"
    page = changed._repr_html_()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "<td>optim.lr</td><td>0.0003</td><td>" in page
    assert "<script>" not in changed.diff(recipe())._repr_html_()


def test_a_notebook_shows_each_value_once_in_the_closed_section_of_its_argument():
    page = recipe()._repr_html_()
    sections = re.findall(r"<details><summary><strong>(.+?)</strong> (.+?)</summary>(.+?)</details>", page)
    shown = {name: re.findall(r"<tr><td>(.+?)</td><td>", table) for name, _, table in sections}
    listed = [line.partition(" = ")[0] for line in str(recipe()).splitlines()[1:]]
    assert list(shown) == [path for path in listed if "." not in path]
    for name, paths in shown.items():
        assert paths == ([path for path in listed if path.startswith(f"{name}.")] or [name])
    assert {name: note for name, note, _ in sections}["optim"] == "Optim(...), 1 value"


def test_diff_names_every_difference():
    left, right = recipe(), recipe()
    assert left.diff(right) == []
    right.optim.lr = 1e-3
    right.log.name = "other"
    right.data.paths = ("a", "b")
    right.odd = None
    assert left.diff(right) == [
        Difference("data.paths", ["a", "b"], ("a", "b")),
        Difference("optim.lr", 3e-4, 1e-3),
        Difference("log.name", "run", "other"),
        Difference("odd", left.diff(right)[3].left, None),
    ]
    lines = str(left.diff(right)).splitlines()
    assert lines[1].split() == ["optim.lr", "0.0003", "0.001"]
    assert len({line.index(value) for line, value in zip(lines[1:3], ("0.0003", "'run'"), strict=True)}) == 1


def test_diff_shows_what_only_one_side_has_set():
    left, right = recipe(), recipe()
    right.model.tokenizer = None
    assert Difference("model.tokenizer.path", Path("vocab"), MISSING) in left.diff(right)


def test_equal_means_the_same_call():
    changed = recipe()
    changed.seed = 1  # its default
    assert changed == recipe()
    for value in (1.0, True, 2):  # all but the last are == 1
        changed.seed = value
        assert changed != recipe()


def test_nan_equals_nan_but_sharing_counts():
    left, right = recipe(), recipe()
    left.optim.lr = right.optim.lr = math.nan
    right.optim.lr = float("nan")
    assert left == right
    right.data.tokenizer = copy.deepcopy(right.data.tokenizer)
    assert left != right


def test_a_plain_partial_of_the_same_call_is_equal():
    plain = fdl.Partial(parts.pretrain, seed=3)
    assert Recipe(parts.pretrain, seed=3) == plain
    assert plain == Recipe(parts.pretrain, seed=3)
    assert Recipe(parts.pretrain) != 3


def test_edits_reach_fields_that_are_none_or_default():
    changed = recipe()
    changed.optim.eps = 1e-6
    changed.model.config.num_query_groups = 2
    assert changed.build_arguments()["model"].config.num_query_groups == 2


def test_typos_are_refused_with_the_nearest_name():
    with pytest.raises(AttributeError, match="did you mean 'seed'"):
        recipe().sed = 3
    with pytest.raises(AttributeError, match="did you mean 'seed'"):
        _ = recipe().sed
    with pytest.raises(AttributeError, match="valid parameter names: lr"):
        recipe().optim.learning_rate = 3


def test_a_parameter_named_like_a_method_is_refused():
    def task(save=True):
        pass

    with pytest.raises(ConfigError, match="parameter 'save', which is a method"):
        Recipe(task)


def test_copies_and_pickles_are_equal_and_independent():
    original = recipe()
    for twin in (original.clone(), copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert type(twin) is Recipe
        assert twin == original
        twin.optim.lr = 1.0
        assert original.optim.lr == 3e-4
        assert twin.model.tokenizer is twin.data.tokenizer


def test_sources_tell_file_command_line_and_default(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    changed = recipe()
    changed.optim.lr = 1.0
    line = sys._getframe().f_lineno - 1
    changed = apply_overrides(changed, ["optim.eps=1e-6", "data.paths[0]=x"])
    sources = changed.sources()
    assert sources["optim.lr"] == f"tests/recipe/test_recipe.py:{line}"
    assert sources["optim.eps"] == "command line: optim.eps=1e-6"
    assert sources["data.paths"] == "command line: data.paths[0]=x"
    assert sources["optim.betas"] == "default"
    assert sources["model.config.num_layers"].startswith("tests/recipe_parts.py:")
    changed.save(tmp_path / "recipe.yaml")
    loaded = Recipe.load(tmp_path / "recipe.yaml", allow=["tests"]).sources()
    row = next(i for i, text in enumerate((tmp_path / "recipe.yaml").read_text().splitlines(), 1) if " lr: " in text)
    assert loaded["optim.lr"] == f"{tmp_path / 'recipe.yaml'}:{row}"


def test_build_arguments_builds_shared_configurations_once():
    arguments = recipe().build_arguments()
    assert arguments["model"].tokenizer is arguments["data"].tokenizer
    assert arguments["data"].paths == ["a", "b"]
    assert arguments["loss"].func.__name__ == "silu"
    assert "seed" not in arguments


def test_all_problems_of_all_constructors_come_together():
    changed = recipe()
    changed.model.config.num_query_groups = 3
    changed.optim = fdl.Config(parts.ModelConfig, num_layers=0)
    changed.anything = {"x": [fdl.Config(parts.Model), fdl.Config(parts.Tokenizer.from_name, 3)]}
    with pytest.raises(ConfigError) as caught:
        changed.build_arguments()
    problems = [problem[:45] for problem in caught.value.problems]
    problems[3] = problems[3].replace("expected", "argument")  # Python's own words, which changed with 3.12
    assert problems == [
        "model.config.num_query_groups=3: does not div",
        "optim: ModelConfig: too few layers",
        "anything[x][0].config: is required by Model a",
        "anything[x][1]: Tokenizer.from_name: argument",
    ]
    assert isinstance(caught.value.__cause__, ConfigError)


def test_required_arguments_of_the_task_must_be_set_but_not_those_of_a_partial():
    with pytest.raises(ConfigError, match="out: is required by report and not set") as caught:
        Recipe(parts.report).build_arguments()
    assert len(caught.value.problems) == 2
    Recipe(parts.pretrain, loss=fdl.Partial(parts.report)).build_arguments()


def test_other_errors_are_bugs_and_pass_through():
    def bug():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        Recipe(parts.pretrain, model=fdl.Config(bug)).build_arguments()


def test_save_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "recipe.yaml"
    recipe().save(path)
    before = path.read_text()
    bad = recipe()
    bad.loss = lambda: None
    with pytest.raises(ConfigError):
        bad.save(path)
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["recipe.yaml"]


def test_load_of_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read"):
        Recipe.load(tmp_path / "missing.yaml")


def _run(program: str, tmp_path: Path) -> str:
    """Runs `program` as a script with tests importable and this interpreter first on PATH."""
    root = Path(__file__).parents[2]
    script = tmp_path / "script.py"
    script.write_text(program)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "NEMORUN_HOME": str(tmp_path / "nemo"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_importing_is_light(tmp_path):
    heavy = ("torch", "lightning", "nemo_run", "pydantic", "wandb")
    imports = "import sys, fiddlehead.recipe.edits\nfrom fiddlehead.recipe import Recipe"
    _run(f"{imports}\nassert not set({heavy}) & set(sys.modules)", tmp_path)


@pytest.mark.slow
def test_nemo_run_takes_a_recipe_as_it_is(tmp_path):
    output = _run(
        """
import os
from pathlib import Path
import fiddle as fdl
from fiddlehead.recipe import Recipe
from tests.recipe_parts import Optim, report

recipe = Recipe(report, optim=fdl.Config(Optim, lr=0.25), out="out.txt")  # before NeMo-Run is there
out = Path("out.txt")

if __name__ == "__main__":
    import nemo_run as run

    def ran():
        text = out.read_text()
        out.unlink()
        return text

    run.run(recipe, dryrun=True)
    assert not out.exists()
    run.run(recipe)
    assert ran() == "lr=0.25"

    recipe.optim = run.Config(Optim, lr=0.5)
    recipe.out = str(out.resolve())
    assert Recipe.from_yaml(recipe.to_yaml(), allow=["tests"]) == recipe
    assert recipe.build_arguments()["optim"].lr == 0.5
    assert recipe.sources()["optim.lr"].startswith("script.py:")
    executor = run.LocalExecutor(env_vars={"PYTHONPATH": os.environ["PYTHONPATH"]})
    run.run(recipe, executor=executor, name="one")
    assert ran() == "lr=0.5"
    with run.Experiment("two", executor=executor) as experiment:
        experiment.add(recipe, name="two")
        experiment.dryrun()
    saved = list(Path(os.environ["NEMORUN_HOME"]).rglob("*_config.yaml"))
    assert any("tests.recipe_parts.report" in file.read_text() for file in saved), saved
""",
        tmp_path,
    )
    assert "officially supported" not in output
    assert "Failed saving" not in output
