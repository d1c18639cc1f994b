"""Recipes and executors are found by reading files, and imported only when they are called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.recipe import catalog


@pytest.fixture(autouse=True)
def project(working_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's project as the working directory; what it imports is forgotten afterwards."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("recipes", "launch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = set(sys.modules)
    yield working_directory
    for name in set(sys.modules) - before:
        if not name.startswith("fiddlehead"):
            del sys.modules[name]


def write(file: str, text: str) -> Path:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def own(entries: list[catalog.Entry]) -> list[catalog.Entry]:
    return [entry for entry in entries if not entry.module.startswith("fiddlehead.")]


def test_a_module_that_cannot_be_imported_is_listed_all_the_same() -> None:
    file = write(
        "recipes/broken.py",
        'import no_such_module\nraise RuntimeError\n\n\ndef mine() -> Recipe:\n    """One line.\n\n    More."""\n',
    )
    (entry,) = own(catalog.recipes())
    assert (entry.name, entry.module, entry.line, entry.summary) == ("mine", "recipes.broken", 5, "One line.")
    assert entry.file == file.resolve()
    assert "recipes.broken" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        catalog.find_recipe("mine")


def test_only_public_functions_that_return_a_recipe_are_recipes() -> None:
    write(
        "recipes/some.py",
        """
def plain() -> Recipe: ...
def quoted() -> "Recipe": ...
def dotted() -> fiddlehead.recipe.Recipe: ...
def optional(size: int = 3, *, deep: bool = False) -> Recipe: ...
def any_number(*sizes: int, **more: int) -> Recipe: ...
def _private() -> Recipe: ...
def unsaid(): ...
def other() -> RecipeBook: ...
def skeleton(size: int) -> Recipe: ...
def keyword(*, size: int) -> Recipe: ...
class Inner:
    def method(self) -> Recipe: ...
""",
    )
    assert [entry.name for entry in own(catalog.recipes())] == [
        "plain",
        "quoted",
        "dotted",
        "optional",
        "any_number",
    ]


def test_executors_may_need_arguments() -> None:
    write("launch/mine.py", "def cluster(account: str) -> Executor: ...\ndef helper() -> str: ...\n")
    assert [entry.name for entry in own(catalog.executors())] == ["cluster"]


def test_an_executor_need_not_say_what_it_returns() -> None:
    write(
        "launch/mine.py",
        """
from fiddlehead.launch.slurm import slurm
def mycluster():
    return slurm(account="a", partition="b")
def helper():
    return 7
""",
    )
    assert [entry.name for entry in own(catalog.executors())] == ["mycluster"]


def test_the_task_is_seen_through_other_recipes() -> None:
    write(
        "recipes/family.py",
        """
def small() -> Recipe:
    return base.pretrain(model=1)
def large() -> Recipe:
    recipe = small()
    return recipe
def tuned() -> Recipe:
    return finetune(large)
def around() -> Recipe:
    return again()
def again() -> Recipe:
    return around()
def unknown() -> Recipe:
    return Recipe(something)
""",
    )
    tasks = {entry.name: entry.task for entry in own(catalog.recipes())}
    assert tasks == {
        "small": "pretrain",
        "large": "pretrain",
        "tuned": "finetune",
        "around": "",
        "again": "",
        "unknown": "",
    }


def test_the_user_s_own_come_before_the_built_in() -> None:
    built_in = catalog.recipes()[0].name
    write("recipes/mine.py", f"def {built_in}() -> 'Recipe':\n    return 'mine'\n")
    assert catalog.recipes()[0].module == "recipes.mine"
    assert catalog.find_recipe(built_in)() == "mine"


def test_a_name_that_two_files_have_is_ambiguous() -> None:
    for name in ("a", "b"):
        write(f"recipes/{name}.py", f"\n\ndef twice() -> 'Recipe':\n    return '{name}'\n")
    with pytest.raises(ConfigError) as error:
        catalog.find_recipe("twice")
    message = str(error.value)
    assert message.startswith("recipe 'twice' is ambiguous: ")
    assert all(f"{Path.cwd()}/recipes/{name}.py:3" in message for name in ("a", "b"))
    assert catalog.find_recipe("recipes.b:twice")() == "b"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    write("recipes/mine.py", "def my_llama() -> 'Recipe': ...\n")
    with pytest.raises(ConfigError, match="unknown recipe 'my_lama'; did you mean 'my_llama'"):
        catalog.find_recipe("my_lama")
    with pytest.raises(ConfigError, match="unknown executor"):
        catalog.find_executor("my_llama")


BROKEN = {
    "syntax": (b"x = 1\ndef f(:\ndef mine(): pass\n", ":2: "),
    "utf-8": (b"x = '\xff'\ndef mine(): pass\n", ":1: "),
    "null": (b"x = '\0'\ndef mine(): pass\n", ":"),
    "deep": (b"x = " + b"-" * 100_000 + b"1\ndef mine(): pass\n", ":"),
    "link": (None, ": it is a link to nowhere"),
    "folder": (None, ": Is a directory"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_not_python_stops_nobody_who_did_not_ask_for_it(kind: str) -> None:
    content, said = BROKEN[kind]
    built_in = catalog.recipes()[0].name
    file = Path.cwd() / "recipes" / "bad.py"
    file.parent.mkdir()
    if content is not None:
        file.write_bytes(content)
    elif kind == "link":
        file.symlink_to("nowhere")
    else:
        file.mkdir()
    write("recipes/good.py", "def good() -> 'Recipe':\n    return 'good'\n")
    assert [entry.name for entry in own(catalog.recipes())] == ["good"]
    assert catalog.find_recipe("good")() == "good" and catalog.find_recipe(built_in)
    (broken,) = catalog.broken_recipes()
    assert str(broken).startswith(f"{file}{said}")
    with pytest.raises(ConfigError) as asked:
        catalog.find_recipe("mine")
    assert str(broken) in str(asked.value)


def test_a_broken_file_that_has_the_name_is_not_passed_over_for_a_built_in_recipe() -> None:
    built_in = catalog.recipes()[0].name
    write("recipes/bad.py", f"def {built_in}() -> Recipe:\n    return (\n")
    with pytest.raises(ConfigError, match=rf"recipe '{built_in}': .*/recipes/bad.py:2: "):
        catalog.find_recipe(built_in)


def test_a_function_that_may_be_a_recipe_is_not_passed_over_for_a_built_in_one() -> None:
    file = write("recipes/mine.py", "def tiny():\n    return 1\ndef full(model):\n    return 2\n").resolve()
    with pytest.raises(ConfigError, match=rf"^recipe 'tiny': {file}:1: tiny does not say what it returns"):
        catalog.find_recipe("tiny")
    assert catalog.find_recipe("full").__module__ == "fiddlehead.recipes.finetune"  # a helper of the user's


def test_what_an_editor_leaves_is_passed_over() -> None:
    write("recipes/mine.py", "def mine() -> 'Recipe': ...\n")
    Path("recipes/.#mine.py").symlink_to("somebody@host.1234:5678")
    write("recipes/.mine.py", "def (")
    assert [entry.name for entry in own(catalog.recipes())] == ["mine"]
    assert catalog.broken_recipes() == []


@pytest.mark.parametrize(
    ("definition", "why"),
    [
        ("def mine():", "mine does not say what it returns; write `def mine(...) -> Recipe:`"),
        ("def mine() -> int:", "mine says that it returns int; write `def mine(...) -> Recipe:`"),
        ("def mine(size: int) -> Recipe:", "mine has arguments without a default"),
        ("def mine(*, size: int) -> Recipe:", "mine has arguments without a default"),
    ],
)
def test_a_function_that_is_not_a_recipe_is_named_with_the_reason(definition: str, why: str) -> None:
    file = write("recipes/some.py", f"x = 1\n{definition}\n    return 1\n").resolve()
    with pytest.raises(ConfigError) as error:
        catalog.find_recipe("mine")
    assert str(error.value).startswith(f"recipe 'mine': {file}:2: {why}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of packages that NeMo-Run imports
def test_a_function_that_returns_an_executor_need_not_say_so() -> None:
    body = "    if n > 1:\n        return run.LocalExecutor()\n    made = run.SlurmExecutor()\n    return made\n"
    write("launch/some.py", f"import nemo_run as run\ndef mine(n: int = 1):\n{body}def other():\n    return x\n")
    assert catalog.find_executor("mine").__name__ == "mine"
    with pytest.raises(ConfigError, match="-> Executor"):
        catalog.find_executor("other")


def test_a_function_that_is_not_an_executor_or_a_part_is_named_too() -> None:
    write("launch/some.py", "def mine():\n    return 1\n")
    write("recipes/some.py", "def part():\n    return 1\n")
    with pytest.raises(ConfigError, match=r"executor 'mine': .*/launch/some.py:1: .* -> Executor"):
        catalog.find_executor("mine")
    with pytest.raises(ConfigError, match=r"part of a recipe 'part': .*/recipes/some.py:1: .* -> Config"):
        catalog.find_part("part")


def test_a_part_has_a_short_name_and_a_whole_one_but_nothing_else_is_imported() -> None:
    write("recipes/some.py", "def part() -> 'Config':\n    return 1\ndef helper():\n    return 2\n")
    assert catalog.find_part("part")() == catalog.find_part("recipes.some:part")() == 1
    for name in ("recipes.some:helper", "os:getcwd", "antigravity:fly"):
        with pytest.raises(ConfigError, match="unknown part"):
            catalog.find_part(name)
    assert "antigravity" not in sys.modules


def test_what_is_installed_comes_before_the_working_directory() -> None:
    """A file that bears the name of a library's module is never that module."""
    for name in ("csv", "rich", "torch", "queue"):
        write(f"{name}.py", "raise RuntimeError('the wrong one')\n")
    write("beside.py", "value = 7\n")
    write("recipes/mine.py", "import csv, queue, rich, beside\ndef mine() -> 'Recipe':\n    return beside.value\n")
    assert catalog.find_recipe("mine")() == 7


def test_anything_importable_has_a_path() -> None:
    write("mypackage/deep.py", "def f() -> int:\n    return 7\nvalue = 3\n")
    assert catalog.find_recipe("mypackage.deep:f")() == 7
    assert catalog.find_executor("mypackage.deep:f")() == 7


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("mypackage.deep:g_function", "unknown function 'g_function'; did you mean 'f_function'"),
        ("mypackage.deep:value", "unknown function 'value'"),
        ("mypackage.deep:", "unknown function ''"),
        ("mypackage.shallow:f", "there is no module 'mypackage.shallow'"),
        ("nowhere:f", "there is no module 'nowhere'"),
        (":f", "there is no module ''"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path: str, said: str) -> None:
    write("mypackage/deep.py", "def f_function() -> int:\n    return 7\nvalue = 3\n")
    with pytest.raises(ConfigError) as error:
        catalog.import_by_path(path)
    assert repr(path) in str(error.value) and said in str(error.value)


def test_built_in_recipes_are_found_from_anywhere() -> None:
    entries = catalog.recipes()
    assert entries and all(entry.module.startswith("fiddlehead.recipes.") and entry.summary for entry in entries)
    assert not any(entry.module.endswith("__init__") for entry in entries + catalog.executors())


def test_a_recipe_with_arguments_of_its_own_is_found_where_it_is_called() -> None:
    write("recipes/mine.py", "def mine(size: int) -> 'Recipe':\n    return f'mine of {size}'\n")
    with pytest.raises(ConfigError, match=r"recipe 'mine': .*mine.py:1: mine has arguments without a default.*'mine\("):
        catalog.find_recipe("mine")
    assert catalog.find_recipe("mine", called=True)(3) == "mine of 3"


def test_a_model_s_recipes_are_found_by_nemo_s_names() -> None:
    tuned = catalog.find_recipe("llama3_8b.finetune_recipe")()
    assert tuned == catalog.find_recipe("fiddlehead.recipes.llama:llama3_8b").finetune_recipe()
    assert catalog.find_recipe("llama3_8b.pretrain_recipe")() == catalog.find_recipe("llama3_8b")()
    with pytest.raises(ConfigError, match=r"recipe 'lora.finetune_recipe': lora is not a model's recipe"):
        catalog.find_recipe("lora.finetune_recipe")
