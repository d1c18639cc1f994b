"""Every family against transformers: an imported model computes the same, and an export equals the import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fiddlehead.checkpoints.huggingface.convert import export_checkpoint, import_checkpoint
from fiddlehead.checkpoints.huggingface.files import HuggingFaceCheckpoint
from fiddlehead.checkpoints.weights import load_transformer, open_weights
from fiddlehead.models import Transformer
from tests.models.hf_families import FAMILIES, random_model, transformers


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal to within `tolerance` of the largest value."""
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def loaded(path: Path) -> Transformer:
    return load_transformer(open_weights(path)).eval()


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    checkpoint = import_checkpoint(str(tmp_path / "hf"), tmp_path / "ours", progress=False)
    ours = loaded(tmp_path / "ours")

    ids = torch.randint(1, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    expected, logits = theirs(ids).logits, ours(ids)
    assert close(logits, expected)
    for output in (expected, logits):
        F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert gradients_agree(ours, theirs, checkpoint)

    family = export_checkpoint(tmp_path / "ours", tmp_path / "back", shard_bytes=60_000, progress=False)
    assert family is checkpoint.family
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert torch.equal(again(ids).logits, expected)

    import_checkpoint(str(tmp_path / "back"), tmp_path / "ours2", progress=False)
    export_checkpoint(tmp_path / "ours2", tmp_path / "back2", shard_bytes=60_000, progress=False)
    assert files(tmp_path / "back") == files(tmp_path / "back2")


def gradients_agree(ours: Transformer, theirs: Any, checkpoint: HuggingFaceCheckpoint) -> bool:
    """Saved like parameters, the gradients of theirs are mapped as they are."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    folder = checkpoint.directory.with_name("gradients")
    theirs.save_pretrained(folder)
    mapped = HuggingFaceCheckpoint.open(folder)
    expected = {each: mapped.load(each) for each in mapped.mapped}
    return all(close(p.grad, expected[name], 5e-5) for name, p in ours.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shape_alone_finds_a_family_that_has_it(name: str, tmp_path: Path) -> None:
    """A run that was trained here has no `config.json` to go by; what is written for it must mean the same."""
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "hf")
    import_checkpoint(str(tmp_path / "hf"), tmp_path / "ours", progress=False)
    (tmp_path / "ours" / "huggingface" / "config.json").unlink()
    export_checkpoint(tmp_path / "ours", tmp_path / "back", progress=False)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    for length in (6, 13):
        ids = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(1))
        assert close(again(ids).logits, theirs(ids).logits)


def test_settings_written_the_older_way_are_read(tmp_path: Path) -> None:
    theirs = random_model("llama31")
    theirs.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    settings = json.loads(file.read_text())
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": settings.pop("dtype")}
    settings["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    new = HuggingFaceCheckpoint.open(tmp_path / "hf").config
    file.write_text(json.dumps(settings))
    assert HuggingFaceCheckpoint.open(tmp_path / "hf").config == new
