"""`fiddlehead attention explain` and `fiddlehead doctor`, as they are typed."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from fiddlehead import launch
from fiddlehead.attention import BACKENDS, Package, switches
from fiddlehead.attention.tools import doctor
from fiddlehead.attention.tools.doctor import Finding, Report
from fiddlehead.cli import main
from fiddlehead.models import adapted_mlp, gated_mlp, mlp_choice
from fiddlehead.recipe.catalog import find_recipe
from fiddlehead.recipe.edits import apply_overrides

NEMO = ("--assume", "cudnn=9.19.0", "--assume", "flash-attn=2.8.3", "--assume", "flash-attn-4=none")


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    """Types a command in an empty directory; returns what it prints on stdout, and on stderr if it fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in (*switches.by_variable(), switches.DETERMINISM):
        monkeypatch.delenv(name, raising=False)

    def command(*arguments: str, rc: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["fiddlehead", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        assert (exit.value.code or 0) == rc, out + err
        return out if rc in (0, 1) else err

    return command


@pytest.fixture
def explained(typed):
    """What `attention explain --json` says."""

    def explain(*arguments: str, rc: int = 0) -> dict:
        return json.loads(typed("attention", "explain", "--json", "-f", *arguments, rc=rc))

    return explain


def verdicts(layer: dict) -> dict[str, str]:
    return {backend["name"]: backend["verdict"] for backend in layer["backends"]}


@pytest.mark.parametrize(("gpu", "backend"), [("a100", "flash2"), ("h100", "cudnn"), ("b200", "cudnn")])
def test_a_gpu_that_is_not_here_is_explained(explained, gpu, backend):
    answer = explained("llama3_8b", "--gpu", gpu, *NEMO)
    (layer,) = answer["layers"]
    assert layer["layers"] == list(range(32)) and layer["backend"] == backend
    assert verdicts(layer).keys() == BACKENDS.keys()
    assert [name for name, verdict in verdicts(layer).items() if verdict == "chosen"] == [backend]
    assert all(entry["reason"] for entry in layer["backends"] if entry["verdict"] == "dropped")
    assert (layer["spec"]["dtype"], layer["spec"]["length"]) == ("bfloat16", 8192)
    assert layer["packages"]["flash2"]["version"] == "2.8.3" and layer["packages"]["flash4"]["version"] is None
    sizes = {entry["name"]: entry["extra_bytes"] for entry in layer["backends"]}
    assert 50 * sizes[backend] < sizes["reference"]
    assert (answer["seq_length"], answer["micro_batch_size"]) == (8192, 2)


def test_the_table_says_what_was_assumed_and_marks_the_choice(typed):
    output = typed("attention", "explain", "-f", "llama3_8b", "--gpu", "H100", *NEMO)
    assert "h100, sm90: as --gpu says" in output
    assert "cuDNN 9.19.0, flash-attn 2.8.3, flash-attn-3 none, flash-attn-4 none (as --assume says" in output
    assert "layers 0-31: bfloat16, 32/8 heads of 128" in output
    lines = {line.removeprefix("->").split()[0]: line for line in output.splitlines() if line.strip()}
    assert lines["cudnn"].startswith("-> ") and "chosen" in lines["cudnn"] and "836.0 MiB" in lines["cudnn"]
    assert "flash-attn-4 is not installed" in lines["flash4"]
    assert "GiB" in lines["reference"]


def test_edits_change_the_layers(explained):
    edits = ("model.config.num_layers=4", "model.config.window_size=(1023,0)", "model.config.window_attn_skip_freq=2")
    answer = explained("llama3_8b", *edits, "data.separate_documents=true", "--gpu", "h100", *NEMO)
    windowed, full = answer["layers"]
    assert (windowed["layers"], full["layers"]) == ([0, 2], [1, 3])
    assert windowed["spec"]["window_size"] == [1023, 0] and windowed["spec"]["packed"]
    assert windowed["backend"] == full["backend"] == "flash2"
    assert "window" in windowed["reasons"]["cudnn"] and "packed" in full["reasons"]["cudnn"]


RANKS = [*("data.seq_length=1024", "--gpu", "h100", "--assume", "cudnn=9.19.0"), *("--assume", "flash-attn-4=4.0.0b36")]


@pytest.mark.parametrize(
    ("sizes", "heads", "backend"),
    [((1, 1), (32, 8), "cudnn"), ((8, 1), (4, 1), "flash4"), ((4, 1), (8, 2), "cudnn"), ((2, 4), (4, 1), "flash4")],
)
def test_the_kernel_is_that_of_the_heads_that_a_rank_has(explained, typed, sizes, heads, backend):
    names = ("tensor_parallel", "context_parallel")
    edits = [f"trainer.strategy.{name}={size}" for name, size in zip(names, sizes, strict=True)]
    answer = explained("llama3_8b", *edits, *RANKS)
    assert tuple(answer[name] for name in names) == sizes
    (layer,) = answer["layers"]
    assert (layer["spec"]["num_attention_heads"], layer["spec"]["num_query_groups"]) == heads
    assert (layer["backend"], layer["lengths"], layer["during"]) == (backend, [1024], "training")
    assert [call["during"] for call in answer["other_calls"]] == ["validation"]
    output = typed("attention", "explain", "-f", "llama3_8b", *edits, "trainer.strategy.pipeline_parallel=2", *RANKS)
    shared = f"attends with {heads[0]} of 32 query heads and {heads[1]} of 8 key/value heads, on whole sequences"
    assert (shared in output) == (sizes != (1, 1)) and "0: layers 0-16; 1: layers 17-31" in output


@pytest.mark.filterwarnings("ignore:.precision=bf16. is supported for historical reasons")
@pytest.mark.parametrize(
    "edits",
    [
        [],
        ["trainer.deterministic=true"],
        ["trainer.precision=bf16", "data.separate_documents=true", "model.config.attention_dropout=0.1"],
        ["model.config.window_size=(20,0)", "model.config.window_attn_skip_freq=2", "data.separate_documents=true"],
        ["data.val_samples=0", "trainer.precision=32"],
    ],
)
def test_it_says_what_the_plan_says(explained, edits):
    answer = explained("tiny", *edits)
    recipe = apply_overrides(find_recipe("tiny")(), edits)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        plan = launch.plan(recipe).training
    finally:
        torch.use_deterministic_algorithms(before)
    said = [{key: value for key, value in layer.items() if key != "backends"} for layer in answer["layers"]]
    planned = json.loads(json.dumps([served.to_dict() for served in plan.attention]))
    assert said + answer["other_calls"] == planned


def test_adapters_and_preferences_are_explained_by_the_weights_they_begin_with(explained, typed):
    assert "init_from" in typed("attention", "explain", "-f", "dpo", rc=2)  # they are not there
    edits = ["model.init_from=weights", "model.lora.target_modules=[linear_fc1]"]
    edits += ["model.config=TransformerConfig", "model.config.num_layers=3"]
    edits += ["model.config.hidden_size=64", "model.config.num_attention_heads=2", "model.config.attention_dropout=0.1"]
    answer = explained("dpo", *edits, "--gpu", "h100", *NEMO)
    found = [(layer["layers"], layer["spec"]["training"]) for layer in answer["layers"]]
    assert found == [([0], False), ([1, 2], True)]  # the first comes before every adapter
    assert {call["during"] for call in answer["other_calls"]} == {"training", "validation", "comparison"}


def test_without_a_gpu_one_is_assumed_for_a_recipe_that_wants_one(explained, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert explained("tiny")["layers"][0]["target"]["name"] == "cpu"
    answer = explained("llama32_1b", *NEMO)
    assert answer["layers"][0]["target"]["name"] == "h100" and "no GPU here" in answer["note"]
    assert explained("llama32_1b", "trainer.accelerator=auto")["layers"][0]["target"]["name"] == "cpu"


def test_variables_in_effect_are_named(explained, typed, monkeypatch):
    arguments = ("llama3_8b", "--gpu", "h100", *NEMO)
    assert explained(*arguments)["variables"] == {}
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    answer = explained(*arguments)
    assert answer["variables"] == {"NVTE_FUSED_ATTN=0": "turns off cudnn"}
    assert answer["layers"][0]["backend"] == "flash2"
    assert answer["layers"][0]["reasons"]["cudnn"] == "turned off by NVTE_FUSED_ATTN=0"
    monkeypatch.setenv("NVTE_FLASH_ATTN", "1")  # changes nothing
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    output = typed("attention", "explain", "-f", *arguments)
    assert "gradients that are the same each time" in output and "NVTE_FLASH_ATTN=" not in output
    assert "training, deterministic" in output


def test_a_backend_asked_for_by_name(explained, typed):
    asked = "model.config.attention_backend="
    answer = explained("llama3_8b", asked + "flash2", "--gpu", "h100", *NEMO)
    assert verdicts(answer["layers"][0])["cudnn"] == "not asked for" and answer["layers"][0]["backend"] == "flash2"
    answer = explained("llama3_8b", asked + "flash4", "--gpu", "h100", *NEMO, rc=1)
    assert answer["layers"][0]["backend"] is None
    output = typed("attention", "explain", "-f", "llama3_8b", asked + "flash4", "--gpu", "h100", *NEMO, rc=1)
    assert "nothing serves attention_backend='flash4': the run would be refused" in output
    answer = explained("llama3_8b", asked + "measured", "--gpu", "h100", *NEMO)
    assert answer["layers"][0]["backend"] is None and verdicts(answer["layers"][0])["cudnn"] == "kept"


def test_a_version_newer_than_what_was_tried_is_used_with_a_note(explained):
    answer = explained("llama3_8b", "--gpu", "a100", "--assume", "flash-attn=2.99.0")
    entry = next(entry for entry in answer["layers"][0]["backends"] if entry["name"] == "flash2")
    assert entry["verdict"] == "chosen" and entry["reason"].startswith("newer than 2.")


def test_a_recipe_file_is_explained_as_its_recipe(explained, typed):
    typed("pretrain", "-f", "tiny_test", "--to-yaml", "saved.yaml")
    assert explained("@saved.yaml")["layers"] == explained("tiny_test")["layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10"], "error: gpu='h10': unknown GPU 'h10'; did you mean 'h100'?"),
        (["--assume", "flash-attn"], "error: --assume flash-attn: expected NAME=VERSION or NAME=none"),
        (["--assume", "flash-attn=new"], "error: --assume flash-attn=new: expected NAME=VERSION"),
        (["--assume", "flash-atn=2.8"], "error: --assume flash-atn=2.8: unknown package 'flash-atn'; did you mean"),
        (["--assume", "torch=none"], "error: --assume torch=none: nothing runs without it"),
        (["model.config.num_query_groups=3"], "error: model.config.num_query_groups=3: does not divide"),
        (["model.config.attention_backend=cudn"], "error: model.config.attention_backend='cudn': unknown backend"),
        (
            ["trainer.strategy=Parallel", "trainer.strategy.tensor_parallel=3", "data.seq_length=8190"],
            "error: trainer.strategy.tensor_parallel=3: must divide num_attention_heads=32",
        ),
        (["data.micro_batch_size=0"], "error: data.micro_batch_size=0: must be a whole number of 1 or more"),
        (["trainer.precision=16-mixed"], "error: trainer.precision='16-mixed': unknown precision '16-mixed'"),
    ],
)
def test_a_mistake_is_one_line(typed, arguments, message):
    error = typed("attention", "explain", "-f", "llama32_1b", *arguments, rc=2)
    assert error.startswith(message) and error.count("\n") == 1


REPORT = Report(
    {"PyTorch": "2.11.0"},
    (
        Finding("cudnn", "9.19.0", "works", error=2.5e-3),
        Finding("flash2", "2.8.3", "broken", "its import fails: undefined [symbol]"),
        Finding("flash4", None, "unavailable", "flash-attn-4 is not installed"),
    ),
    ('pip install "fiddlehead[flash]"',),
)


def test_the_doctor_prints_what_it_found(typed, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda _progress: REPORT)
    output = typed("doctor", rc=1)
    for text in (
        "PyTorch",
        "2.5e-03",
        "broken: its import fails: undefined [symbol]",
        "unavailable: flash-attn-4 is not",
        'pip install "fiddlehead[flash]"',
    ):
        assert text in output
    answer = json.loads(typed("doctor", "--json", rc=1))
    assert answer["findings"][1]["state"] == "broken" and answer["healthy"] is False
    monkeypatch.setattr(doctor, "examine", lambda _progress: Report({}, REPORT.findings[:1], ()))
    assert json.loads(typed("doctor", "--json"))["healthy"] is True


def test_the_doctor_tries_the_feed_forward(typed, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda _progress: Report({}, REPORT.findings[:1], ()))
    assert "quack (feed-forward)" in typed("doctor")
    monkeypatch.setattr(mlp_choice, "why_not_there", lambda target: None)
    monkeypatch.setattr(adapted_mlp, "tried", lambda: (Package("3.6.0"), 0.004))
    for package, error, state in (
        (Package("0.6.5"), 0.003, "works"),
        (
            Package("0.6.5", "its products fail: TypeError: no key"),
            None,
            "broken: quack-kernels 0.6.5 is installed but",
        ),
        (Package(), None, "unavailable: quack-kernels is not installed"),
    ):
        monkeypatch.setattr(gated_mlp, "tried", lambda found=(package, error): found)
        output = typed("doctor", rc=1 if state.startswith("broken") else 0)
        assert state in output
        assert ("pip install --upgrade" in output) == state.startswith("broken")
    monkeypatch.setattr(gated_mlp, "tried", lambda: (Package("0.6.5"), 0.003))
    monkeypatch.setattr(adapted_mlp, "tried", lambda: (Package("3.6.0", "its products are wrong here: da2 by 1"), 1.0))
    assert "triton 3.6.0 is installed but its products are wrong here" in typed("doctor", rc=1)
    monkeypatch.setattr(doctor, "examine", lambda _progress: REPORT)
    assert "not tried: CUDA does not work in this process" in typed("doctor", rc=1)


def test_the_doctor_says_so_if_pytorch_itself_is_broken(typed, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiddlehead.attention.tools.doctor", None)
    monkeypatch.delattr("fiddlehead.attention.tools.doctor")
    assert typed("doctor", rc=1) == ""
