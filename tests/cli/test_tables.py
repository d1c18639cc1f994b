"""Tables on narrow terminals: cells wrap between words, and names stay whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fiddlehead.cli.common import add_row, table

PATHS = ["model.config.share_embeddings_and_output_weights", "seed", "optim.lr_scheduler.warmup_steps"]


def lines(made, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(made)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_name_is_broken_and_no_line_is_too_long(width: int) -> None:
    made = table("path", "value", "set at")
    for path in PATHS:
        add_row(made, path, "True", "fiddlehead/recipes/base.py:35")
    shown = lines(made, width)
    assert max(map(len, shown)) <= width
    assert all(any(path in line for line in shown) for path in PATHS)
    assert sum("fiddlehead/recipes/base.py:35" in line for line in shown) == 3
    assert not any(line.endswith(" ") for line in shown)


def test_a_long_text_wraps_between_words_and_a_long_path_behind_a_slash() -> None:
    made = table("name", "what")
    text = "It learns from pairs of answers, of which one is better than the other."
    path = "/home/somebody/a-project/with/a/long/name/runs/tiny-20261126-151924/recipe.yaml"
    add_row(made, "dpo", text)
    add_row(made, "file", path)
    shown = lines(made, 40)
    assert max(map(len, shown)) <= 40
    assert " ".join(" ".join(line[4:].split()) for line in shown[2:5]).startswith("It learns from pairs")
    assert "".join(line[7:] for line in shown if "/" in line) == path
    assert all(line.endswith("/") for line in shown if "/" in line and "yaml" not in line)


def test_a_line_that_is_indented_goes_on_two_columns_further_in() -> None:
    made = table("", "")
    add_row(made, "memory", "  data.micro_batch_size=1 optim.state_bits=8: 21.9 GiB")
    add_row(made, "", "  short")
    assert lines(made, 42) == [
        "memory     data.micro_batch_size=1",
        "             optim.state_bits=8: 21.9 GiB",
        "           short",
    ]


def test_optional_columns_are_left_out_where_there_is_no_room_for_them() -> None:
    made = table("name", "where", "what", optional=("where",))
    add_row(made, "tiny_uptrain", "fiddlehead/recipes/tiny.py:57", "A continuation of a converted demo, with 5 % more.")
    assert "where" in lines(made, 120)[0]
    assert "where" not in lines(made, 60)[0] and "fiddlehead/" not in "".join(lines(made, 60))


@pytest.mark.parametrize("width", [1, 5, 12])
def test_a_terminal_without_room_still_gets_everything(width: int) -> None:
    made = table("a", "b")
    add_row(made, "name", "a-very-long-word")
    assert "".join("".join(lines(made, width)).split()).replace("─", "") != ""


def test_wide_characters_and_markup_are_counted_and_shown_as_they_are() -> None:
    made = table("name", "what")
    add_row(made, "[bold]x", "数据" * 30)
    shown = lines(made, 40)
    assert "[bold]x" in "".join(shown) and all(sum(2 if c > "⺀" else 1 for c in line) <= 40 for line in shown)


def test_a_table_without_headers_has_no_empty_line_above_it() -> None:
    made = table("", "")
    add_row(made, "Python", "3.11")
    assert lines(made, 80) == ["Python   3.11"]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_remark_stands_below_its_row_where_it_has_no_room_and_a_very_long_name_takes_none(width: int) -> None:
    made = table("name", "state", "step", "loss", "elapsed", "", notes=True)
    reason = "stopped after step 92, which is saved: SIGTERM"
    add_row(made, "lr=5e-4-num_query_groups=1", "SUCCEEDED", "120", "2.9935", "0:00:43", "")
    add_row(made, "a-name-" * 28, "CANCELLED", "92", "2.2894", "0:05:07", reason)
    header, _, first, *rest = lines(made, width)
    assert first.split() == ["lr=5e-4-num_query_groups=1", "SUCCEEDED", "120", "2.9935", "0:00:43"]
    assert header.index("state") == first.index("SUCCEEDED") < 40
    assert "a-name-" * 28 in "".join(rest)
    assert sum(reason in line for line in rest) == 1
    assert (rest[-1] == f"  {reason}") == (width == 80)
