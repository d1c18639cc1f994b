"""A run's log on a terminal: one line of progress that changes, and what stays."""

from __future__ import annotations

import io
import re

import pytest

from fiddlehead.run import terminal
from fiddlehead.run.terminal import Live, progress_line, shown_on

METRICS = {
    "loss": 3.0192, "lr": 4.44e-05, "grad_norm": 0.58, "tokens_per_s": 13912.4, "seconds_per_step": 2.0, "mfu": 0.471,
}  # fmt: skip


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that it shows, without colours."""
        text = re.sub(r"\x1b\[\d+m", "", self.getvalue())
        return [re.split(r"\r\x1b\[2K", line)[-1] for line in text.split("\n")]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def line(step: int, last: int = 400) -> str:
    return progress_line(METRICS, step, last) + "\n"


def test_a_line_of_progress_replaces_the_one_before_and_one_in_twenty_stays() -> None:
    screen = Terminal()
    with shown_on(screen) as shown:
        for step in range(10, 401, 10):
            shown.write(line(step))
            shown.flush()
            assert screen.screen()[-1].startswith(f"step {step}/400" if step < 400 else "")
    steps = [int(shown.split()[1].split("/")[0]) for shown in screen.screen() if shown]
    assert steps == list(range(20, 401, 20))


def test_another_line_keeps_the_progress_above_it_and_is_never_mixed_with_it() -> None:
    screen = Terminal()
    with shown_on(screen) as shown:
        shown.write("=== started\n" + line(1)[:30])
        shown.flush()
        shown.write(line(1)[30:])
        shown.flush()
        shown.write("step      1  validation loss 3.3\n" + line(2))
        shown.flush()
        shown.write("WARNING: a thing\nthe end, without a new line")
    lines = screen.screen()
    assert [text.split("  ")[0].split(" [")[0] for text in lines] == [
        "=== started", "step 1/400", "step", "step 2/400", "WARNING: a thing", "the end, without a new line",
    ]  # fmt: skip


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120])
def test_a_line_of_progress_fits_the_terminal_and_keeps_what_matters_most(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Terminal()
    shown = Live(screen)
    shown.write(line(123_456, 300_000))
    shown.flush()
    text = screen.screen()[-1]
    assert len(text) < columns and text.startswith("step 123456/300000") and "loss 3.0192" in text
    wanted = {80: ["13,912 tok/s", "MFU 47.1%", "left 98:04:48"], 100: ["lr 4.44e-5"], 120: ["|g| 0.58"]}
    assert all(part in text for least, parts in wanted.items() if columns >= least for part in parts)


def test_the_time_left_runs_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    screen = Terminal()
    shown = Live(screen)
    shown.write(line(100, 200))
    shown.flush()
    assert screen.screen()[-1].endswith("left 3:20")
    now += 12
    shown.flush()
    assert screen.screen()[-1].endswith("left 3:08")
    now += 1000
    shown.flush()
    assert screen.screen()[-1].endswith("left 0:00")


@pytest.mark.parametrize(
    ("text", "code"),
    [("error: no", "31"), ("WARNING: no", "33"), ("validation: 3.5 nats/byte", "32"), ("run here: starts anew", None)],
)
def test_colours_say_what_a_line_means_unless_the_user_wants_none(
    text: str, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    coloured, plain = Terminal(), Terminal()
    Live(coloured).write(text + "\n")
    monkeypatch.setenv("NO_COLOR", "1")
    Live(plain).write(text + "\n")
    assert coloured.getvalue() == (f"\x1b[{code}m{text}\x1b[0m\n" if code else f"{text}\n")
    assert plain.getvalue() == f"{text}\n"


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_where_a_line_cannot_be_rewritten_a_log_is_copied_as_it_is(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    stream = Terminal() if term == "dumb" else io.StringIO()
    with shown_on(stream) as shown:
        shown.write("a\n" + line(1) + "unfinished")
    assert stream.getvalue() == "a\n" + line(1) + "unfinished"
