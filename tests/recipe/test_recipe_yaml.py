"""The YAML form: exact round trips, errors with line and column, and nothing untrusted imported or called."""

import collections
import functools
import io
import math
import string
from pathlib import Path

import fiddle as fdl
import lightning.pytorch
import numpy
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Timer

from fiddlehead.errors import ConfigError
from fiddlehead.recipe import Recipe, reader, writer
from fiddlehead.recipe.leaves import same
from fiddlehead.tasks import finetune, pretrain
from tests import recipe_parts as parts
from tests.fuzz.damage import nested
from tests.recipe_parts import recipe

HEADER = "# fiddlehead recipe, format 1\n"
ALLOW = ["tests", "torch:tanh"]


def round_trip(value):
    return reader.load(writer.dump(value), allow=ALLOW)


def problems_of(text: str, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        reader.load(text, **options)
    return str(caught.value)


def test_the_yaml_form_is_this_text():
    changed = recipe()
    changed.model.config.color = parts.Color.BLUE
    changed.model.config.dtype = torch.bfloat16
    changed.optim.betas = (0.9, 0.999)
    assert changed.to_yaml() == (
        HEADER
        + """\
_target_: tests.recipe_parts:pretrain
_partial_: true
model:
  _target_: tests.recipe_parts:Model
  config:
    _target_: tests.recipe_parts:ModelConfig
    num_layers: 4
    dtype: !dtype bfloat16
    color: !enum tests.recipe_parts:Color.BLUE
  tokenizer: &id001
    _target_: tests.recipe_parts:Tokenizer
    path: !path vocab
data:
  _target_: tests.recipe_parts:Data
  tokenizer: *id001
  paths: [a, b]
optim:
  _target_: tests.recipe_parts:Optim
  lr: 0.0003
  betas: !tuple [0.9, 0.999]
log:
  _target_: tests.recipe_parts:Log
odd:
  _target_: tests.recipe_parts:Odd
loss:
  _target_: torch.nn.functional:silu
  _partial_: true
  inplace: true
anything: !partial
  _target_: torch.nn.functional:silu
  inplace: false
"""
    )
    assert Recipe.from_yaml(changed.to_yaml(), allow=["tests"]) == changed


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.text(string.digits + "eE.+-_:xn~ ", max_size=8)
    | st.sampled_from(
        ["yes", "No", "null", "None", "1e-3", "0o17", "2024-01-01", "1:30", "<<", "=", "_target_", "*a", "!x"]
    )
    | st.binary(max_size=20)
    | st.sampled_from([torch.bfloat16, torch.int8, torch.device("cuda:1"), torch.device("cpu")])
    | st.sampled_from([parts.Color.RED, parts.Tokenizer, parts.positional, torch.tanh, dict, torch.nn.functional.gelu])
    | st.builds(Path, st.text(string.ascii_letters + "/. -:", min_size=1))
)
KEYS = st.text(max_size=8) | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text(max_size=3))
NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=6).filter(lambda name: name not in "abc")


def _configs(values):
    call = st.tuples(values, values, st.lists(values, max_size=2), st.dictionaries(NAMES, values, max_size=2))
    return st.one_of(
        st.builds(lambda kind, note: kind(parts.Log, note=note), st.sampled_from([fdl.Config, fdl.Partial]), values),
        call.map(lambda each: fdl.Config(parts.positional, each[0], each[1], *each[2], **each[3])),
        st.builds(lambda value: functools.partial(parts.positional, [value], c=value), SCALARS),
    )


VALUES = st.recursive(
    SCALARS,
    lambda values: (
        st.lists(values, max_size=3)
        | st.lists(values, max_size=3).map(tuple)
        | st.dictionaries(KEYS, values, max_size=3)
        | st.sets(st.integers() | st.text(max_size=3), max_size=3)
        | _configs(values)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_every_value_comes_back_as_it_was(value):
    original = Recipe(parts.pretrain, anything=value)
    text = original.to_yaml()
    loaded = Recipe.from_yaml(text, allow=ALLOW)
    assert loaded == original
    assert loaded.to_yaml() == text


@settings(max_examples=300, deadline=None)
@given(st.floats())
def test_floats_are_exact(value):
    loaded = round_trip([value])[0]
    assert same(loaded, value)
    assert math.copysign(1, loaded) == math.copysign(1, value) or math.isnan(value)


@settings(max_examples=200, deadline=None)
@given(st.text(string.printable, max_size=60))
def test_any_text_loads_or_is_a_config_error(text):
    try:
        reader.load(text)
    except ConfigError as error:
        assert str(error).startswith("recipe.yaml")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1E5", 1e5), ("-.inf", -math.inf), (".5", 0.5), ("12", 12)]
)
def test_numbers_are_numbers(text, value):
    loaded = reader.load(f"x: {text}")["x"]
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    "text", ["yes", "No", "on", "None", "nan", "0o17", "010", "0x1F", "1_000", "1:30", "2024-01-01"]
)
def test_what_reads_differently_elsewhere_must_be_quoted(text):
    assert f"recipe.yaml:1:4: [x]: {text} is ambiguous" in problems_of(f"x: {text}")
    assert reader.load(f"x: '{text}'") == {"x": text}


def test_a_configuration_used_twice_is_shared_again():
    loaded = Recipe.from_yaml(recipe().to_yaml(), allow=["tests"])
    assert loaded.model.tokenizer is loaded.data.tokenizer


def test_positional_arguments_survive():
    config = fdl.Config(parts.positional, 1, 2, 3, 4, c=5, d=6)
    loaded = round_trip(Recipe(parts.pretrain, anything=config)).anything
    assert fdl.build(loaded) == (1, 2, (3, 4), 5, {"d": 6})


def test_what_cannot_be_written_is_listed_with_paths():
    changed = recipe()
    changed.loss = lambda: None
    changed.model.config.extra = {"a": torch.zeros(1)}
    changed.data.paths = [1, io.StringIO()]
    changed.optim.lr = numpy.float64(1)

    def local():
        pass

    changed.log.name = local
    changed.anything = functools.partial(print, [collections.OrderedDict()], file=fdl.Config(parts.Log))
    changed.odd.parts = [fdl.ArgFactory(parts.Optim)]
    with pytest.raises(ConfigError) as caught:
        changed.to_yaml()
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "model.config.extra[a]",
        "data.paths[1]",
        "optim.lr",
        "log.name",
        "odd.parts[0]",
        "loss",
        "anything[0][0]",
        "anything.file",
    ]
    assert "use the plain float" in str(caught.value)
    assert "write a configuration that makes it" in str(caught.value)


def test_cycles_are_refused():
    changed = recipe()
    changed.model.config.extra = changed.model
    with pytest.raises(ConfigError, match=r"model\.config\.extra: contains itself"):
        changed.to_yaml()
    assert "contains itself" in problems_of("&a [*a]")


def test_functions_of_the_running_script_are_refused(monkeypatch):
    monkeypatch.setattr(parts.broken, "__module__", "__main__")
    with pytest.raises(ConfigError, match="move it to a module"):
        Recipe(parts.broken).to_yaml()


class Tag(fdl.Tag):
    """A tag."""


def test_fiddle_tags_are_refused():
    changed = recipe()
    fdl.add_tag(changed.optim, "lr", Tag)
    with pytest.raises(ConfigError, match="optim: Fiddle's tags cannot be written"):
        changed.to_yaml()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\n b: 2", "recipe.yaml:2:3: mapping values are not allowed here"),
        ("a: 1\nb: 2\na: 3", "recipe.yaml:3:1: duplicate key 'a'"),
        ("a: 1\nb: {c: 1, c: 2}", "recipe.yaml:2:11: [b]: duplicate key 'c'"),
        ("x:\n  <<: {a: 1}", "merge keys"),
        ("x: !enum tests.recipe_parts:Color.BLU", "unknown member of Color 'BLU'; did you mean 'BLUE'?"),
        ("x: !dtype bfloat61", "unknown dtype 'bfloat61'; did you mean 'bfloat16'?"),
        ("x: !device toaster", "'toaster' is not a device"),
        ("x: !nonsense 1", "unknown tag !nonsense"),
        ("_target_: tests.recipe_parts:Optimm", "has no 'Optimm'; did you mean 'Optim'?"),
        ("_target_: tests.recipe_partz:Optim", "there is no module 'tests.recipe_partz'"),
        (
            "_target_: tests.recipe_parts:Optim\nlrr: 1",
            "recipe.yaml:2:6: lrr: unknown parameter of Optim 'lrr'; did you",
        ),
        ("_target_: tests.recipe_parts:Optim\n_args_: [1]", "Optim takes 0 arguments in _args_, not 1"),
        ("_target_: 3", "_target_ must be package.module:name"),
        ("_target_: no name", "not of the form package.module:name"),
        ("_target_: tests.recipe_parts:Optim\n_partial_: 1", "_partial_ must be true or false"),
        ("# fiddlehead recipe, format 2\nx: 1", "written in format 2; this version of fiddlehead reads up to 1"),
        ("", "empty"),
        ("[" * 3000, "nested too deeply"),
        ("[" * 101 + "]" * 101, "nested too deeply, in more than 100 levels"),
        ("x: " + "{a: " * 400 + "}" * 400, "nested too deeply, in more than 100 levels"),
        ("\x00", "recipe.yaml"),
    ],
)
def test_mistakes_have_their_place(text, problem):
    assert problem in problems_of(text, allow=["tests"])


def test_all_mistakes_come_together():
    text = "_target_: tests.recipe_parts:Optim\nlrr: 1\nbetas: yes\neps: {a: 1, a: 2}"
    assert len(problems_of(text, allow=["tests"]).splitlines()) == 3


def test_a_hundred_levels_are_read():
    assert reader.load("[" * 100 + "]" * 100) == nested(99, [])


def test_a_file_of_aliases_cannot_grow_without_bounds():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "more than 100000 values" in problems_of("\n".join(lines))


def test_the_root_must_be_a_partial():
    with pytest.raises(ConfigError, match="not a recipe"):
        Recipe.from_yaml("_target_: tests.recipe_parts:Optim", allow=["tests"])


def test_loading_calls_nothing(monkeypatch):
    called = []
    monkeypatch.setattr(parts.Optim, "__init__", lambda self, lr=1: called.append(lr))
    monkeypatch.setattr(parts, "broken", functools.wraps(parts.broken)(lambda: called.append(1)))
    reader.load("a: {_target_: tests.recipe_parts:Optim, lr: 1}\nb: !ref tests.recipe_parts:broken", allow=["tests"])
    assert called == []


def test_yaml_objects_are_refused():
    assert "unknown tag" in problems_of("!!python/object/apply:os.system [ls]")
    assert "unknown tag" in problems_of("x: !!python/name:os.system ''")


def test_static_and_class_methods_of_allowed_classes_load():
    loaded = reader.load("_target_: tests.recipe_parts:Tokenizer.from_name\nname: x", allow=["tests"])
    assert fdl.build(loaded).path == Path("x")


def test_names_to_allow_lists_the_recipe_s_own_names():
    assert recipe().names_to_allow() == [
        f"tests.recipe_parts:{name}"
        for name in ("Data", "Log", "Model", "ModelConfig", "Odd", "Optim", "Tokenizer", "pretrain")
    ]
    assert (
        Recipe(pretrain, trainer=fdl.Config(lightning.pytorch.Trainer, callbacks=[fdl.Config(Timer)])).names_to_allow()
        == []
    )
    named = Recipe(lightning.pytorch.Trainer, plugins={"a": [parts.Color.RED, functools.partial(yaml.dump)]})
    assert named.names_to_allow() == ["tests.recipe_parts:Color", "yaml:dump"]
    nested = Recipe(pretrain, model=fdl.Config(finetune))
    assert nested.names_to_allow() == ["fiddlehead.tasks:finetune"], "a task is only what a whole recipe is for"
