"""Writes the tables of docs/attention.md from what the backends say: `python docs/attention_tables.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fiddlehead.attention import BACKENDS, AttentionSpec, Package, Packages, Target
from fiddlehead.attention.packages import NEWEST_KNOWN
from fiddlehead.attention.selection import preference
from fiddlehead.attention.switches import DETERMINISM, by_variable

PAGE = Path(__file__).with_name("attention.md")

PACKAGES = Packages("2.13.0", "9.19.0", **{name: Package(version) for name, version in NEWEST_KNOWN.items()})
CPU = Target("cpu", "cpu", packages=PACKAGES)
GPUS = {name: Target.gpu(name, PACKAGES) for name in ("a100", "l40s", "h100", "b200")}
LETTERS = {"A": GPUS["a100"], "L": GPUS["l40s"], "H": GPUS["h100"], "B": GPUS["b200"], "C": CPU}

BASE = AttentionSpec(dtype=torch.bfloat16, head_dim=128, num_attention_heads=32, num_query_groups=8)
FEATURES: dict[str, dict[str, Any]] = {
    "causal, grouped heads": {},
    "full": {"causal": False},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "head dim 64": {"head_dim": 64},
    "head dim 80": {"head_dim": 80},
    "head dim 192": {"head_dim": 192},
    "head dim 256": {"head_dim": 256},
    "more keys than queries": {"same_length": False},
    "sliding window": {"window_size": (1023, 0)},
    "window to both sides": {"window_size": (512, 512), "causal": False},
    "soft cap": {"softcap": 50.0},
    "ALiBi": {"alibi": True},
    "sinks": {"sinks": True},
    "dropout": {"dropout": 0.125},
    "padding mask": {"padding_mask": True},
    "packed": {"packed": True},
    "packed, sliding window": {"packed": True, "window_size": (1023, 0)},
    "cache, other lengths": {"cached": True, "same_length": False},
    "cache in pages of 256": {"cached": True, "same_length": False, "page_size": 256},
    "deterministic": {"deterministic": True},
}


def tables() -> dict[str, str]:
    """Each table in Markdown, by the name that its place in the page has."""
    return {"features": _features(), "order": _order(), "variables": _variables()}


def filled(page: str) -> str:
    """The page with its tables as they are now: each between `<!-- table NAME -->` and `<!-- end NAME -->`."""
    for name, made in tables().items():
        place = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        page, count = place.subn(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", page)
        if count != 1:
            raise ValueError(f"{PAGE.name}: has {count} places for the table {name}")
    return page


def _features() -> str:
    rows = ([name, *(_served(backend, asked) for backend in BACKENDS)] for name, asked in FEATURES.items())
    return "\n".join(_table(["", *(f"`{name}`" for name in BACKENDS)], rows))


def _served(backend: str, asked: dict[str, Any]) -> str:
    """The letters of the devices where the backend serves this, in brackets where it has no gradients."""
    letters = []
    for letter, target in LETTERS.items():
        spec = replace(BASE, dtype=torch.float32) if target is CPU else BASE
        spec = replace(spec, **asked)
        if BACKENDS[backend].why_not(spec, target) is None:
            letters.append(letter)
        elif BACKENDS[backend].why_not(replace(spec, training=False), target) is None:
            letters.append(f"({letter})")
    return " ".join(letters) or "-"


def _order() -> str:
    places = {
        "Ampere, Ada": GPUS["a100"],
        "Hopper": GPUS["h100"],
        "Blackwell": GPUS["b200"],
        "older": Target.gpu("t4", PACKAGES),
        "CPU": CPU,
    }
    rows = (
        [name, ", ".join(f"`{backend}`" for backend in preference(BASE, target))] for name, target in places.items()
    )
    return "\n".join(_table(["", "best first"], rows))


def _variables() -> str:
    rows = [
        [f"`{name}=0`", f"turns off {', '.join(f'`{x}`' for x in backends)}"]
        for name, backends in by_variable().items()
    ]
    rows.append([f"`{DETERMINISM}=0`", "turns off what does not give the same gradients each time"])
    return "\n".join(_table(["variable", "what it does"], rows))


def _table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
