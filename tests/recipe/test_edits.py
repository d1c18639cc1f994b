"""Edits: every value is read as its parameter's annotation says, and nothing that was typed is lost."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

import fiddle as fdl
import lightning.pytorch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddlehead.errors import ConfigError
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipe.leaves import same
from tests import recipe_parts as parts
from tests.recipe_parts import recipe

FACTORIES = {
    name: getattr(parts, name) for name in ("tiny", "wsd", "broken", "whole", "Optim", "Log", "Strategy", "ModelConfig")
}


def find(name: str):
    if name in FACTORIES:
        return FACTORIES[name]
    raise ConfigError(f"unknown name {name!r}; did you mean something else?")


def edit(*overrides: str) -> Recipe:
    return apply_overrides(recipe(), overrides, find=find, allow=["tests", "torch.nn:Bilinear"])


def value_of(root: Recipe, path: str):
    value = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        edit(*overrides)
    assert "tests.recipe_parts" not in str(caught.value), "no dump of the recipe"
    return str(caught.value)


CONFIG = "model.config."


@pytest.mark.parametrize(
    ("override", "value"),
    [
        # A union keeps what was typed: an int is an int, a text a text.
        ("odd.interval=1", 1),
        ("odd.interval=1.0", 1.0),
        ("odd.interval=00:01:00", "00:01:00"),
        ("odd.share=1", 1),
        ("odd.share=0.5", 0.5),
        ("odd.share=None", None),
        ("odd.either=1", 1),
        ("odd.either=true", True),
        ("odd.implicit=None", None),
        ("odd.implicit=3", 3),
        # A text is a text; nothing is imported, called or configured.
        ("log.name=os.getcwd", "os.getcwd"),
        ("log.name=Config-v2", "Config-v2"),
        ('log.name="None"', "None"),
        ("log.name='null'", "null"),
        ("log.name=", ""),
        ("log.name=a=b", "a=b"),
        ("log.name=it's", "it's"),
        ("log.name= spaced ", " spaced "),
        ("log.name=[1, 2]", "[1, 2]"),
        ("log.name=3", "3"),
        ("log.name=Optim(lr=1)", "Optim(lr=1)"),
        ("log.tag=None", None),
        ("log.tag=none", "none"),
        ("run_name=second", "second"),
        # Numbers and switches.
        ("seed=1e3", 1000),
        ("seed=-1_000", -1000),
        ("log.every=10.0", 10),
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=3", 3.0),
        ("log.quiet=yes", True),
        ("log.quiet=False", False),
        ("log.quiet=0", False),
        # Containers.
        ("optim.betas=(0.9, 0.99)", (0.9, 0.99)),
        ("optim.betas=[0.9,0.99]", (0.9, 0.99)),
        ("optim.betas=0.9,0.99", (0.9, 0.99)),
        ("optim.betas[1]=0.5", (0.9, 0.5)),
        ("data.weights=1,2,3", (1.0, 2.0, 3.0)),
        ("data.paths=[a, 'b,c', d e]", ["a", "b,c", "d e"]),
        ("data.paths=a,b", ["a", "b"]),
        ("data.paths[-1]=z", ["a", "z"]),
        ("data.paths=[]", []),
        ("data.paths=a],b", ["a]", "b"]),
        (CONFIG + "extra={a: 1, 'b c': 2}", {"a": 1, "b c": 2}),
        (CONFIG + "names=x", ["x"]),
        # Enums, literals, dtypes, paths, callables, classes.
        (CONFIG + "color=BLUE", parts.Color.BLUE),
        (CONFIG + "color=b", parts.Color.BLUE),
        (CONFIG + "dtype=bfloat16", torch.bfloat16),
        (CONFIG + "dtype=bf16", torch.bfloat16),
        (CONFIG + "dtype=torch.bfloat16", torch.bfloat16),
        (CONFIG + "dtype=torch.bf16", torch.bfloat16),
        (CONFIG + "dtype=None", None),
        (CONFIG + "dtype_or_name=float32", torch.float32),
        (CONFIG + "dtype_or_name=from file", "from file"),
        (CONFIG + "activation=torch.nn.functional.silu", torch.nn.functional.silu),
        (CONFIG + "activation=torch.nn.functional:silu", torch.nn.functional.silu),
        (CONFIG + "kind=torch.nn.Bilinear", torch.nn.Bilinear),
        ("odd.level=high", "high"),
        ("odd.level=3", 3),
        ("odd.path=runs/a=b", Path("runs/a=b")),
        ("odd.wait=00:30:00", timedelta(minutes=30)),
        ("odd.positive=2", 2),
        ("odd.strategy=ddp", "ddp"),
        ("odd.parts=[]", []),
        # Without an annotation: a literal, or the text.
        ("log.note=3", 3),
        ("log.note=[1, 'a']", [1, "a"]),
        ("log.note=false", False),
        ("log.note=null", None),
        ("log.note=1e-3", 1e-3),
        ("log.note=os.getcwd", "os.getcwd"),
        ("odd.anything='3'", "3"),
    ],
)
def test_values_are_what_the_annotation_asks_for(override, value):
    path = override.partition("=")[0].partition("[")[0]
    assert same(value_of(edit(override), path), value)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed=1.5", "expects int, not '1.5'"),
        ("seed=true", "expects int, not 'true'"),
        ("seed=", "expects int, not nothing"),
        ("seed=None", "expects int, not 'None'"),
        ("seed='3'", "expects int, not '3'"),
        ("seed=1e999999999", "expects int"),
        ("optim.lr=1e-3,1e-4", "expects float, not '1e-3,1e-4'"),
        ("log.quiet=2", "expects bool, not '2'; write true or false"),
        ("log.name=None", "expects str, not 'None'; for that text write '\"None\"'"),
        ("log.note=", "expects a value; for an empty text write"),
        ("optim.betas=1,2,3", "that is 3 values, not 2"),
        ("optim.betas=None", "expects tuple[float, float], not 'None'"),
        ("optim.betas=(0.9, x)", "expects float, not 'x'"),
        ("optim.betas=(0.9", "')' is missing"),
        ("data.paths=[a, b", "']' is missing"),
        ("data.paths=[a,, b]", "a value is missing"),
        ("data.paths=[a]]", "']' has no opening bracket"),
        ("data.paths=[a], [b]", "']' has no opening bracket"),
        ("data.paths[2]=x", "data.paths has 2 members, none is [2]"),
        (CONFIG + "extra={a: x}", "expects int, not 'x'"),
        (CONFIG + "extra=[1]", "expects dict[str, int] | None, not '[1]'"),
        (CONFIG + "extra={a: 1, a: 2}", "two keys 'a'"),
        (CONFIG + "color=BLU", "unknown Color 'BLU'; did you mean 'BLUE'?"),
        (CONFIG + "dtype=bfloat61", "unknown dtype 'bfloat61'; did you mean 'bfloat16'?"),
        (CONFIG + "activation=torch.nn.functional.sillu", "did you mean 'torch.nn.functional:silu'?"),
        (CONFIG + "activation=no.such.module", "no.such.module is not trusted"),
        (CONFIG + "activation=tests.nowhere:f", "there is no module 'tests.nowhere'"),
        (CONFIG + "activation=os:system", "--allow os:system"),
        (CONFIG + "kind=collections:OrderedDict", "--allow collections:OrderedDict"),
        (CONFIG + "kind=torch.optim.AdamW", "expects type[torch.nn.modules.module.Module], not"),
        ("odd.level=hihg", "did you mean 'high'?"),
        ("odd.positive=0", "Input should be greater than 0"),
        ("odd.amount=3", "its type Decimal cannot be evaluated"),
        ("odd.path=", "expects Path, not nothing"),
        ("model=3", "expects Model | None, not '3'"),
        ("optim.lrr=3", "unknown parameter of Optim 'lrr'; did you mean 'lr'?"),
        ("log.betas=3", "unknown parameter of Log 'betas'; did you mean optim.betas?"),
        ("num_layers=3", "unknown parameter of pretrain 'num_layers'; did you mean model.config.num_layers?"),
        ("optim.config.betas=3", "unknown parameter of Optim 'config'; did you mean optim.betas?"),
        ("model.confg.num_layers=3", "'confg'; did you mean model.config.num_layers?"),
        ("tokenizer.path=x", "'tokenizer'; did you mean model.tokenizer.path?"),
        ("optim.path=x", "unknown parameter of Optim 'path'; did you mean model.tokenizer.path or odd.path?"),
        ("trainer.max_steps=3", "unknown parameter of pretrain 'trainer'; allowed: model, data"),
        ("seed.x=3", "seed is 1 (int) and has no field 'x'"),
        ("odd.share.x=3", "odd.share is None and has no field 'x'; set it whole first: odd.share=..."),
        (CONFIG + "extra.x=3", "model.config.extra is None"),
        (CONFIG + "names[0]=3", "model.config.names is not set"),
        ("seed", "not of the form path=value"),
        ("--seed=3", "not of the form path=value"),
        ("seed = 3", "without spaces around the sign"),
        ("=3", "not of the form path=value"),
        ("optim.=3", "not of the form path=value"),
        ("log.name=@missing.yaml", "'missing.yaml' cannot be read: No such file"),
        ("seed/=0", "1 / 0: division by zero"),
        ("seed/=3", "1 / 3 is 0.333"),
        ("seed*=x", "expects float, not 'x'"),
        ("log.quiet+=1", "+= needs a number, a list or a text, not False"),
        ("odd.share*=2", "odd.share is None; use = first"),
        ("log.name-=x", "-= needs a number, not 'run'"),
    ],
)
def test_mistakes_say_what_is_allowed(override, problem):
    message = refused(override)
    assert message.startswith(f"{override}: ")
    assert problem in message


def test_all_mistakes_come_together_and_the_recipe_stays():
    original = recipe()
    with pytest.raises(ConfigError) as caught:
        apply_overrides(original, ["seed=x", "optim.lr=1.0", "optim.esp=1"])
    assert len(caught.value.problems) == 2
    assert original == recipe()
    apply_overrides(original, ["optim.lr=1.0", "data.paths+=c", "model.config.num_layers=9"])
    assert original == recipe()


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["optim.lr*=2", "optim.lr*=2"], "optim.lr", 3e-4 * 2 * 2),
        (["optim.lr=1", "optim.lr/=4"], "optim.lr", 0.25),
        (["seed+=2", "seed*=3", "seed-=1", "seed/=2"], "seed", 4),
        (["seed=1e22", "seed/=1"], "seed", 10**22),
        (["odd.interval*=4", "odd.interval/=2"], "odd.interval", 2),
        (["log.name+=-a", "log.name+==b"], "log.name", "run-a=b"),
        (["data.paths+=c", "data.paths+=[d, e]", "data.paths+=f,g"], "data.paths", list("abcdefg")),
        (["data.weights+=1"], "data.weights", (1.0,)),
        (["optim.betas[0]-=0.4", "optim.betas[1]=0.5"], "optim.betas", (0.5, 0.5)),
        ([CONFIG + "extra={a: 1}", CONFIG + "extra[b]=2", CONFIG + "extra.a+=1"], CONFIG + "extra", {"a": 2, "b": 2}),
    ],
)
def test_operators_apply_in_order_each_time(overrides, path, value):
    assert same(value_of(edit(*overrides), path), value)


def test_a_default_is_never_changed_in_place():
    edit("data.weights+=1", "optim.betas[0]=0.1")
    assert parts.Data().weights == ()
    assert parts.Optim().betas == (0.9, 0.95)


def test_order_decides_and_a_discarded_edit_is_a_mistake():
    assert edit("model=tiny", CONFIG + "num_layers=7").model.config.num_layers == 7
    message = refused(CONFIG + "num_layers=7", "model=tiny")
    assert message == "model=tiny: discards the earlier model.config.num_layers=7; put this one first"
    assert "discards the earlier seed=1; give only one of them" in refused("seed=1", "seed=2")
    assert "discards" in refused("optim.betas[0]=0.1", "optim.betas=0.1,0.2")
    assert "discards" in refused("seed*=2", "seed=3")
    # A shared configuration is one place with two paths.
    assert "discards" in refused("model.tokenizer.path=a", "data.tokenizer.path=b")
    assert edit("model.tokenizer.path=a", "data.tokenizer=None").model.tokenizer.path == Path("a")


def test_factories_make_nested_configurations():
    assert edit("model=tiny").model == parts.tiny()
    changed = edit("model=tiny(num_layers=3, dtype=bf16)", "optim=tests.recipe_parts:wsd(lr=0.5)")
    assert changed.model == parts.tiny(3, torch.bfloat16)
    assert changed.optim.lr == 0.5
    assert edit("optim=Optim(betas=(0.1, 0.2))").optim == fdl.Config(parts.Optim, betas=(0.1, 0.2))
    assert edit("optim=tests.recipe_parts.Optim").optim == fdl.Config(parts.Optim)
    assert edit("odd.parts=[wsd, Optim(lr=2)]").odd.parts[1].lr == 2.0
    assert edit("odd.parts=[wsd]", "odd.parts+=Optim(lr=2)", "odd.parts[0].lr=3").odd.parts[0].lr == 3.0
    assert edit("model=None").model is None
    assert edit("anything=wsd").anything == "wsd"


def test_a_union_of_a_name_and_a_text_reads_both():
    assert edit("odd.strategy=Strategy").odd.strategy == "Strategy"
    assert edit("odd.strategy=Strategy(shards=2)", "odd.strategy.shards*=2").odd.strategy.shards == 4
    held = edit("odd.strategy=Strategy()")
    assert apply_overrides(held, ["odd.strategy=auto"], find=find).odd.strategy == "auto"
    assert apply_overrides(held, ["odd.strategy=Strategy"], find=find).odd.strategy == fdl.Config(parts.Strategy)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model=tinny", "unknown name 'tinny'"),
        ("model=tiny(3)", "'3' must be name=value"),
        ("model=tiny(num_layer=3)", "unknown argument of tiny 'num_layer'; did you mean 'num_layers'?"),
        ("model=tiny(num_layers=x)", "num_layers: expects int, not 'x'"),
        ("model=tiny(num_layers=1, num_layers=2)", "num_layers is given twice"),
        ("model=tiny(num_layers=1", "expects Model"),
        ("model=wsd", "expects Model | None, not a configuration of Optim"),
        ("model=broken", "broken returned 3, not a configuration"),
        ("odd.strategy=wsd(lr=1)", "expects Strategy | str, not a configuration of Optim"),
        ("odd.parts=[tiny]", "expects Optim, not a configuration of Model"),
        ("model=whole", "whole makes a whole recipe"),
        ("model=os:getcwd", "os:getcwd is not trusted"),
        ("loss=nothing", "unknown name 'nothing'"),
    ],
)
def test_mistakes_in_factories_are_refused(override, problem):
    assert problem in refused(override)


class Fields(TypedDict):
    a: int


def unusual(listed: [int] = None, fields: Fields | None = None, unique: set = frozenset(), seed: int = 3): ...  # type: ignore[valid-type]


@pytest.mark.parametrize(
    ("edits", "problem"),
    [
        (["listed=[1]"], "its type [<class 'int'>] cannot be evaluated"),
        (["fields=[1]"], "expects Fields | None, not '[1]'"),
        (["fields=Optim"], "expects Fields | None, not 'Optim'"),
        (["unique=[[1], {a: 1}]"], "expects set, not '[[1], {a: 1}]'"),
        (["seed=" + "9" * 2000, "seed*=" + "9" * 2000], "the result of *= is too large"),
    ],
)
def test_unusual_annotations_and_values_are_refused_without_a_traceback(edits, problem):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Recipe(unusual), edits, find=find)
    assert problem in str(caught.value)
    assert apply_overrides(Recipe(unusual), ["fields={a: 1}"], find=find).fields == {"a": 1}


def test_without_find_only_importable_names():
    with pytest.raises(ConfigError, match="unknown name 'tiny'; yours are written package"):
        apply_overrides(recipe(), ["model=tiny"])


def test_files(tmp_path):
    (tmp_path / "optim.yaml").write_text("_target_: tests.recipe_parts:Optim\nlr: 0.125\n")
    (tmp_path / "betas.yaml").write_text("[0.5, 0.25]")
    (tmp_path / "number.yaml").write_text("90")
    (tmp_path / "bad.yaml").write_text("a: 1\na: 2")
    (tmp_path / "evil.yaml").write_text("_target_: os:system\ncommand: ls")
    changed = edit(f"optim=@{tmp_path}/optim.yaml", f"optim.betas=@{tmp_path}/betas.yaml")
    assert (changed.optim.lr, changed.optim.betas) == (0.125, (0.5, 0.25))
    assert changed.sources()["optim.lr"] == f"{tmp_path}/optim.yaml:2"
    assert "not a configuration of Optim" in refused(f"model=@{tmp_path}/optim.yaml")
    assert "expects int, not [0.5, 0.25]" in refused(f"seed=@{tmp_path}/betas.yaml")
    assert "expects timedelta | None, not 90" in refused(f"odd.wait=@{tmp_path}/number.yaml"), "of no unit"
    assert "bad.yaml:2:1: duplicate key" in refused(f"optim=@{tmp_path}/bad.yaml")
    assert "not trusted" in refused(f"optim=@{tmp_path}/evil.yaml")


def test_callables_stay_references_where_a_partial_is():
    assert edit("loss=torch.nn.functional.relu").loss is torch.nn.functional.relu
    assert edit("loss.inplace=false").loss.inplace is False


def test_only_callable_fields_import(tmp_path):
    program = (
        "import sys\nfrom tests.recipe_parts import recipe\nfrom fiddlehead.recipe.edits import apply_overrides\n"
        "apply_overrides(recipe(), ['log.name=antigravity.x', 'log.note=antigravity:x', 'odd.strategy=antigravity.x',"
        " 'odd.path=antigravity.x', 'anything=antigravity.x'])\nassert 'antigravity' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env={**os.environ, "BROWSER": "true"})


class TestTrainer:
    """Lightning's own annotations."""

    def set(self, *overrides: str):
        return apply_overrides(Recipe(lightning.pytorch.Trainer), overrides)

    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("devices=2", 2),
            ("devices=auto", "auto"),
            ("devices=[0, 1]", [0, 1]),
            ("devices=0,1", "0,1"),
            ("limit_val_batches=1", 1),
            ("limit_val_batches=1.0", 1.0),
            ("precision=bf16-mixed", "bf16-mixed"),
            ("precision=16", 16),
            ("max_steps=1e3", 1000),
            ("val_check_interval=100", 100),
            ("val_check_interval=0.25", 0.25),
            ("val_check_interval={hours: 2}", {"hours": 2}),
            ("max_time=00:12:00:00", "00:12:00:00"),
            ("accelerator=cpu", "cpu"),
            ("strategy=ddp", "ddp"),
            ("logger=false", False),
            ("enable_progress_bar=no", False),
            ("enable_progress_bar=None", None),
            ("default_root_dir=/tmp/x", "/tmp/x"),
        ],
    )
    def test_values(self, override, value):
        name = override.partition("=")[0]
        assert same(getattr(self.set(override), name), value)

    def test_callbacks(self):
        timer = "lightning.pytorch.callbacks:Timer(duration=00:01:00:00)"
        alone = self.set(f"callbacks={timer}").callbacks
        assert alone == self.set(f"callbacks=[{timer}]").callbacks[0]
        assert alone.duration == "00:01:00:00"

    def test_mistakes(self):
        with pytest.raises(ConfigError, match="did you mean 'bf16-mixed'"):
            self.set("precision=bf16-mix")
        with pytest.raises(ConfigError, match="did you mean 'max_steps'"):
            self.set("max_step=3")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_reaches_a_str_field_as_it_is(text):
    if text in ("None", "null") or text.startswith("@") or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):
        return
    assert edit(f"log.name={text}").log.name == text


@settings(max_examples=200, deadline=None)
@given(st.integers() | st.floats() | st.lists(st.integers() | st.text() | st.booleans(), max_size=4))
def test_python_literals_reach_a_field_without_annotation(value):
    assert same(edit(f"log.note={value!r}").log.note, value)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["seed", "optim.betas", "data.paths", "model", "odd.parts", CONFIG + "extra"]),
    st.text("[](){}'\",=:a1. @"),
)
def test_no_text_is_a_crash(path, text):
    try:
        edit(f"{path}={text}")
    except ConfigError as error:
        assert str(error).startswith(path)
