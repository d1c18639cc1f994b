"""A choice of a backend as text, in a notebook, and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fiddlehead.attention import BACKENDS, AttentionSpec, Choice, Package, Packages, Target, explain

SPEC = AttentionSpec(dtype=torch.bfloat16, head_dim=128, num_attention_heads=32, num_query_groups=8)
H100 = Target.gpu("h100", Packages("2.11.0", "9.19.0", flash2=Package("2.8.3")))


def test_the_text_has_every_backend_in_order_of_preference() -> None:
    heading, *lines = str(explain(SPEC, H100)).splitlines()
    assert heading == f"{SPEC} on h100"
    names = [line.split()[0] for line in lines]
    assert sorted(names) == sorted(BACKENDS) and names[-1] == "reference"
    assert "  cudnn           chosen" in lines and "  flash2          kept" in lines
    assert "  flash4          dropped: flash-attn-4 is not installed" in lines
    assert names.index("flash4") < names.index("cudnn") < names.index("flash2")


def test_a_notebook_shows_a_table_in_which_nothing_is_markup() -> None:
    choice = explain(SPEC, replace(H100, name="<b>&"))
    page = replace(choice, reasons={**choice.reasons, "flash4": "undefined <symbol>"})._repr_html_()
    assert "<td>cudnn</td><td>chosen</td><td></td>" in page
    assert "<td>flash4</td><td>dropped</td><td>undefined &lt;symbol&gt;</td>" in page
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page
    assert page.count("<tr>") == 1 + len(BACKENDS)


def verdicts(choice: Choice) -> dict[str, str]:
    return {name: verdict for name, verdict, _ in choice.rows()}


def test_what_was_asked_for_decides_what_is_chosen() -> None:
    named = explain(SPEC, H100, "flash2")
    assert verdicts(named)["flash2"] == "chosen" and verdicts(named)["cudnn"] == "not asked for"
    measured = explain(SPEC, H100, "measured")
    assert measured.measured and "chosen" not in verdicts(measured).values()
    assert measured.to_dict()["backend"] is None and measured.to_dict()["candidates"][0] == "cudnn"
    impossible = explain(SPEC, H100, "flash4")
    assert verdicts(impossible)["flash4"] == "dropped" and "chosen" not in verdicts(impossible).values()


@pytest.mark.parametrize(("version", "note"), [("2.8.3", ""), ("2.99.1", "newer than 2.")])
def test_a_version_that_was_never_tried_has_a_note(version: str, note: str) -> None:
    packages = replace(H100.packages, flash2=Package(version))
    rows = {name: reason for name, _, reason in explain(SPEC, replace(H100, packages=packages)).rows()}
    assert rows["flash2"].startswith(note) and bool(rows["flash2"]) == bool(note)


def test_the_json_says_what_decided() -> None:
    choice = explain(SPEC, H100)
    answer = json.loads(json.dumps(choice.to_dict()))
    assert answer["backend"] == "cudnn" and answer["asked"] == "auto"
    assert answer["reasons"] == choice.reasons
    assert answer["spec"]["dtype"] == "bfloat16" and answer["spec"]["window_size"] == [-1, -1]
    assert answer["target"] == {"device_type": "cuda", "name": "h100", "capability": [9, 0]}
    assert answer["packages"]["flash2"] == {"version": "2.8.3", "problem": None}
