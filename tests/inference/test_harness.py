"""lm-evaluation-harness has the same results for our models as for the same models in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from fiddlehead.cli import main
from fiddlehead.data import ByteTokenizer, TokenizerFile
from fiddlehead.inference.text import Writer
from tests.models.hf_families import DEFAULT, config, transformers

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'fiddlehead[eval]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TASKS = Path(__file__).with_name("harness_tasks")


def save_tokenizer(folder: Path, kind: str) -> None:
    """The tokenizer of bytes; or one of words and bytes, with a token in front of every text."""
    ByteTokenizer().save(folder / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    if kind == "begin":
        made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        made.add_special_tokens(["<s>"])
        made.add_tokens([" tree", " a", "plant"])
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
        made.save(str(folder / "tokenizer.json"))
        settings["bos_token"] = "<s>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(params=["plain", "begin"])
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small random Llama in the working directory, with the tasks and their data."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(TASKS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    Path("hf").mkdir()
    save_tokenizer(Path("hf"), request.param)
    made = config(  # with as many tokens as the tokenizer has: transformers writes ids, too, that are not tokens
        "LlamaConfig", vocab_size=TokenizerFile("hf").vocab_size, rope_parameters=DEFAULT, initializer_range=0.3,
        max_position_embeddings=64, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(made).save_pretrained("hf")
    return Path("hf")


def evaluated(model: Any, names: list[str], **options: Any) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The scores, and what the model answered to each request."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=".", include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    assert found is not None
    answers = {
        name: [each["resps"] for each in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return found["results"], answers


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_scores_and_answers_are_those_of_transformers(model: Path, num_fewshot: int) -> None:
    from lm_eval.models.huggingface import HFLM

    from fiddlehead.inference.harness import HarnessModel

    names = ["plants", "letters", "rolling"]
    theirs = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=3)
    expected, expected_answers = evaluated(theirs, names, num_fewshot=num_fewshot)
    results, answers = evaluated(HarnessModel(Writer.open(model), batch_size=4), names, num_fewshot=num_fewshot)
    assert answers["letters"] == expected_answers["letters"]
    assert len({str(each) for each in answers["letters"]}) > 4  # or the model would say one thing to everything
    for name in ("plants", "rolling"):
        assert numbers(answers[name]) == pytest.approx(numbers(expected_answers[name]), rel=1e-4)
    for name in names:
        assert numbers(results[name]) == pytest.approx(numbers(expected[name]), rel=1e-5)
    assert 0 < results["plants"]["acc,none"] < 1


def type_command(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str, rc: int = 0) -> str:
    """What the command prints."""
    monkeypatch.setattr("sys.argv", ["fiddlehead", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    out, err = capsys.readouterr()
    assert (exit.value.code or 0) == rc, out + err
    return out if rc == 0 else err


@pytest.mark.parametrize("model", ["plain"], indirect=True)
def test_the_command_prints_a_table_or_json(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    typed = ["evaluate", "hf", "--tasks", "pl*,letters", "--tasks-dir", ".", "--limit", "5"]
    found = json.loads(type_command(monkeypatch, capsys, *typed, "--json"))
    assert found["results"].keys() == {"plants", "letters"}
    assert found["n-samples"]["plants"] == {"original": 20, "effective": 5}
    assert found["n-shot"]["plants"] == 0
    lines = type_command(monkeypatch, capsys, *typed, "--num-fewshot", "3").splitlines()
    (line,) = [line.split() for line in lines if " acc " in line]
    assert line[:4] == ["plants", "3", "5", "acc"] and 0 <= float(line[4]) <= 1


@pytest.mark.parametrize("model", ["plain"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        pytest.param(
            {},
            ["--tasks", "plnts,letters,lettrs"],
            ["unknown task 'plnts'; did you mean", "'plants'", "unknown task 'lettrs'; did you mean 'letters'"],
            marks=pytest.mark.slow,  # the harness reads all of its own tasks
        ),
        ({}, ["--tasks", "plants", "--tasks-dir", "none"], ["tasks_dir='none': there is no such folder"]),
        ({}, ["--tasks", "plants", "--file", "x"], ["give one of --file FILE and --tasks A,B"]),
        ({"plants.jsonl": "none.jsonl"}, ["--tasks", "plants"], ["tasks=plants: cannot be loaded: ", "none.jsonl"]),
        ({"max_gen_toks: 12": "max_gen_toks: 64"}, ["--tasks", "letters"], ["max_gen_toks=64: must be below"]),
        ({"max_gen_toks": "num_beams"}, ["--tasks", "letters"], ["generation_kwargs.num_beams: is not supported"]),
    ],
)
def test_mistakes_are_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, changes: dict[str, str], arguments: list[str], said: list
) -> None:
    for file in Path().glob("*.yaml"):
        text = file.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        file.write_text(text)
    typed = ["evaluate", "hf", *arguments, *([] if "--tasks-dir" in arguments else ["--tasks-dir", "."])]
    err = type_command(monkeypatch, capsys, *typed, rc=2)
    assert all(text in err for text in said), err
    assert "Traceback" not in err


@pytest.mark.parametrize("model", ["plain"], indirect=True)
def test_answers_are_drawn_anew_for_each_repeat(model: Path) -> None:
    text = Path("letters.yaml").read_text()
    Path("letters.yaml").write_text(
        text.replace("max_gen_toks: 12", "max_gen_toks: 12\n  do_sample: true") + "repeats: 3\n"
    )
    from fiddlehead.inference.harness import HarnessModel

    _, answers = evaluated(HarnessModel(Writer.open(model)), ["letters"])
    assert all(len(set(texts)) == 3 for ((*texts,),) in answers["letters"])


def numbers(values: Any) -> list[float]:
    """Every number in nested lists and dictionaries."""
    if isinstance(values, dict):
        return numbers(list(values.values()))
    if isinstance(values, list | tuple):
        return [number for value in values for number in numbers(value)]
    return [float(values)] if isinstance(values, bool | int | float) else []
