"""A backend is one file: the package finds its own files, and `register` adds one of a user."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fiddlehead.attention import (
    BACKENDS,
    AttentionSpec,
    Packages,
    Target,
    attend,
    backend_choices,
    backends,
    explain,
    register,
    switches,
    unregister,
)
from fiddlehead.attention.tools.trial import trial, wrong
from fiddlehead.errors import ConfigError
from fiddlehead.models import TransformerConfig
from tests.attention.definition import Call

SPEC = AttentionSpec(dtype=torch.float32, head_dim=8, num_attention_heads=4, num_query_groups=2)
CPU = Target("cpu", "cpu", packages=Packages("2.11.0", None))
H100 = Target.gpu("h100", Packages("2.11.0", "9.19.0"))

FILE = """
import torch.nn.functional as F

NAME = "plain"
PLACE = 5
SWITCHES = ("PLAIN_ATTN",)
calls = []


def place(spec, target):
    return PLACE if target.device_type == "cpu" else None


def why_not(spec, target):
    if target.device_type != "cpu":
        return f"needs a CPU, not {target.device_type}"
    return "only plain calls" if spec.has_extras or spec.dropout or spec.window_size != (-1, -1) else None


def run(q, k, v, spec, scale, extras):
    calls.append(spec)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=spec.causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes away what a test registers."""
    for variable in ("PLAIN_ATTN", *switches.by_variable()):
        monkeypatch.delenv(variable, raising=False)
    known = set(BACKENDS)
    yield
    for name in set(BACKENDS) - known:
        unregister(name)
    for name in [name for name in sys.modules if name.startswith(f"{backends.__name__}.plain")]:
        del sys.modules[name]


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    """A backend in a file somewhere else."""
    path = tmp_path / "plain.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("plain", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_finds_its_own_and_lists_them_by_place() -> None:
    assert list(BACKENDS) == [
        *("flash2", "flash3", "flash4", "cudnn", "sdpa_flash", "sdpa_efficient", "flex", "reference")
    ]
    for name, backend in BACKENDS.items():
        assert isinstance(backend, ModuleType) and backend.__name__ == f"{backends.__name__}.{name}"
    assert switches.by_variable() == {
        "NVTE_FLASH_ATTN": ("flash2", "flash3", "flash4", "sdpa_flash"),
        "NVTE_FLASH_ATTN_V2": ("flash2",),
        "NVTE_FLASH_ATTN_V3": ("flash3",),
        "NVTE_FLASH_ATTN_V4": ("flash4",),
        "NVTE_FUSED_ATTN": ("cudnn",),
        "NVTE_UNFUSED_ATTN": ("reference",),
    }


def test_finding_backends_imports_only_torch() -> None:
    for path in Path(backends.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # imports inside of functions come later
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.partition(".")[0] for name in names}
            assert roots <= {"torch", "fiddlehead", *sys.stdlib_module_names}, path


def test_one_new_file_in_the_folder_is_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.py").write_text(FILE)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    assert [module.NAME for module in backends._modules() if module.NAME not in BACKENDS] == ["plain"]


def test_a_registered_backend_is_explained_chosen_and_run(plain: Any) -> None:
    q, k, v = Call(B=2, T=7, S=7).inputs()
    expected = attend(q, k, v)  # which is kept as served by another
    register(plain)
    assert backend_choices()[:3] == ("auto", "measured", "plain")
    choice = explain(SPEC, CPU)
    assert choice.rows()[0] == ("plain", "chosen", "") and choice.backend == "plain"
    assert explain(SPEC, H100).reasons["plain"] == "needs a CPU, not cuda"
    names = [name for name, _, _ in explain(SPEC, H100).rows()]
    assert names.index("plain") > names.index("reference")  # what is not worth trying comes behind the others
    for asked in ("auto", "plain"):
        before = len(plain.calls)
        torch.testing.assert_close(attend(q, k, v, backend=asked), expected)
        assert len(plain.calls) == before + 1
    assert not wrong(trial("plain", SPEC, torch.device("cpu")), SPEC)
    model = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "attention_backend": "plain"}
    assert TransformerConfig(**model).attention_backend == "plain"


def test_its_variable_turns_it_off_between_two_calls(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register(plain)
    q, k, v = Call(T=5, S=5).inputs()
    attend(q, k, v)
    monkeypatch.setenv("PLAIN_ATTN", "0")
    attend(q, k, v)
    assert len(plain.calls) == 1
    assert explain(SPEC, CPU).reasons["plain"] == "turned off by PLAIN_ATTN=0"


def test_a_compiled_function_sees_a_backend_that_is_registered_later(plain: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    q, k, v = Call(T=5, S=5).inputs()
    expected = compiled(q, k, v)
    plain.calls = None  # a list outside of the function that is compiled would be a side effect
    plain.run = lambda q, k, v, spec, scale, extras: 2 * BACKENDS["sdpa_flash"].run(q, k, v, spec, scale, extras)
    register(plain)
    torch.testing.assert_close(compiled(q, k, v), 2 * expected)


def test_registering_the_same_again_changes_nothing(plain: Any) -> None:
    register(plain)
    before = list(BACKENDS.items()), list(backends.VARIABLES)
    register(plain)
    assert (list(BACKENDS.items()), backends.VARIABLES) == before


def test_an_unregistered_backend_serves_no_calls_and_can_be_registered_again(plain: Any) -> None:
    q, k, v = Call(T=5, S=5).inputs()
    expected = attend(q, k, v)
    register(plain)
    attend(q, k, v)
    unregister("plain")
    torch.testing.assert_close(attend(q, k, v), expected)
    assert len(plain.calls) == 1 and "plain" not in backend_choices() and b"PLAIN_ATTN" not in backends.VARIABLES
    changed: Any = SimpleNamespace(**vars(plain) | {"run": lambda q, *rest: q + 1})
    register(changed)
    assert torch.equal(attend(q, k, v), q + 1)
    with pytest.raises(ConfigError, match="unknown attention backend 'plian'; did you mean 'plain'"):
        unregister("plian")


WHOLE: dict[str, Any] = {"NAME": "mine", "PLACE": 5, "SWITCHES": (), "place": print, "why_not": print, "run": print}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"NAME": "flash2"}, "NAME='flash2': is taken"),
        ({"NAME": "auto"}, "NAME='auto': must be an identifier"),
        ({"NAME": "my kernel"}, "NAME='my kernel': must be an identifier"),
        ({"NAME": 3}, "NAME=3: must be an identifier"),
        ({"PLACE": "first"}, "PLACE='first': must be a number"),
        ({"PLACE": True}, "PLACE=True: must be a number"),
        ({"SWITCHES": "MINE"}, "SWITCHES='MINE': must be a tuple"),
        ({"SWITCHES": (3,)}, r"SWITCHES=\(3,\): must be a tuple"),
        ({"run": None}, "run: must be functions"),
    ],
)
def test_what_is_not_a_backend_is_refused(changed: dict[str, Any], message: str) -> None:
    backend: Any = SimpleNamespace(**{**WHOLE, **changed})
    with pytest.raises(ConfigError, match=message):
        register(backend)
    assert "mine" not in BACKENDS


@pytest.mark.parametrize("name", WHOLE)
def test_an_incomplete_backend_is_refused_with_the_missing_name(name: str) -> None:
    part: Any = SimpleNamespace(**{key: value for key, value in WHOLE.items() if key != name})
    with pytest.raises(ConfigError, match=f"has no {name}; a backend needs NAME, PLACE, SWITCHES, place, why_not, run"):
        register(part)
