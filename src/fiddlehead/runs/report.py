"""A run as one page of HTML: its curves, its plan beside what was measured, and everything that it has recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from html import escape
from typing import Any

from fiddlehead.errors import ConfigError
from fiddlehead.files.foreign import read_json, read_object, reason
from fiddlehead.numbers import is_number
from fiddlehead.run import damage
from fiddlehead.run.directory import RunDirectory, last_lines
from fiddlehead.run.status import State, Status
from fiddlehead.runs.charts import figure
from fiddlehead.runs.curves import PALETTE, Chart, Curve, charts
from fiddlehead.runs.events import Event, read_events
from fiddlehead.runs.export import result_rows
from fiddlehead.runs.page import Html, page, table
from fiddlehead.runs.record import Record, read_run

PHASES = ("data", "forward", "backward", "optimizer")
SHOWN = 200
"""The most events, and the most samples, to show: the newest."""
UNITS = {
    "memory_gib": "memory (GiB)",
    "tokens_per_s": "tokens/s",
    "mfu": "MFU",
    "seconds_per_step": "seconds a step",
    "seconds_communication": "seconds of communication a step",
    "seconds_optimizer": "seconds of the optimizer a step",
}
"""The measurements that a plan predicts under the same name."""
STATE_CLASSES = {State.SUCCEEDED: "good", State.FAILED: "bad", State.DIED: "bad", State.DAMAGED: "bad"}


def report(run: RunDirectory, status: Status | None, where: str = "", *, refresh: int = 0, back: str = "") -> str:
    """The page of a run.

    Args:
        status: as `fiddlehead.launch.watch` knows it; None was never submitted.
        where: where it runs, or ran.
        refresh: as in `page`.
        back: the address of a page to go back to.
    """
    record = read_run(run)
    events, cut = read_events(run.log)
    problems = list(dict.fromkeys(map(str, [*damage.find(run), *record.problems])))
    sections = {
        "Curves": _curves(record),
        "Results": table(["metric", "final, and best"], result_rows([record])),
        "Plan and measurement": _plan(run, record, problems),
        "A step": _phases(record),
        "Attention": _attention(run, problems),
        "Data": _data(record),
        "Samples": _samples(events),
        "Events": _events(run, events, status, cut=cut),
        "Recipe": _recipe(run, record, problems),
        "Environment": _environment(run, record),
    }
    shown = {title: content for title, content in sections.items() if content}
    if problems:
        lines = "".join(f"<p class=bad>{escape(problem)}</p>" for problem in problems)
        shown = {"Problems": Html(lines), **shown}
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in shown)
    first = f'<a href="{escape(back, quote=True)}">all runs</a>' if back else ""
    body = "".join(f"<h2 id={_anchor(title)}>{title}</h2>{content}" for title, content in shown.items())
    head = f"<h1>{escape(run.name)}</h1>{_state(run, status, where)}<nav>{first}{links}</nav>"
    return page(f"{run.name} - fiddlehead", head + body, refresh=refresh)


def when(seconds: float) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def state_html(state: State | None) -> Html:
    """A state in its colour."""
    return Html(f'<span class="{STATE_CLASSES.get(state, "")}">{state}</span>') if state else Html("")


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _state(run: RunDirectory, status: Status | None, where: str) -> str:
    if status is None:
        return "<p>was never submitted</p>"
    parts = [f"attempt {status.attempt}", where, f"started {when(status.started)}"]
    if status.ended:
        parts.append(f"ended {when(status.ended)}, after {timedelta(seconds=round(status.ended - status.started))}")
    parts.append(f"step {run.last_step():,}")
    said = f"<p><strong>{state_html(status.state)}</strong> {escape(' · '.join(filter(None, parts)))}</p>"
    return said + (f"<p>{escape(status.reason)}</p>" if status.reason else "")


def _curves(record: Record) -> Html:
    known = record.history.columns
    drawn = charts([record], [name for name in ("loss", "val_loss") if name in known])
    if len(drawn) == 2:  # in one picture: they have the same unit
        both = [Curve(each.title, each.curves[0].xs, each.curves[0].ys) for each in drawn if each.curves]
        drawn = [Chart("loss and val_loss (nats per token)", drawn[0].x_label, both)]
    others = ("lr", "grad_norm", "tokens_per_s", "mfu", "memory_gib")
    if rest := [name for name in others if name in known]:
        drawn += charts([record], rest)
    phases = [Curve(name, *record.history.curve(f"seconds_{name}")) for name in (*PHASES, "communication")]
    if phases := [curve for curve in phases if curve.xs]:
        drawn.append(Chart("seconds of a step, by phase", "step", phases))
    return Html(f"<div class=charts>{''.join(map(figure, drawn))}</div>") if drawn else Html("<p>no metrics yet</p>")


def _plan(run: RunDirectory, record: Record, problems: list[str]) -> Html:
    """What `plan.json` predicts beside what was measured; the median of the rows is not moved by a slow first step."""
    file = run.path / "plan.json"
    if not file.exists():
        return Html("")
    try:
        plan = read_object(file)
    except ConfigError as error:
        problems += [problem for problem in error.problems if str(problem) not in problems]
        return Html("")
    rows = []
    for name, label in UNITS.items():
        planned, measured = plan.get(name), _median(record.history.points(name)[1])
        if is_number(planned):
            known = "" if measured is None else f"{measured:,.4g}"
            differs = f"{measured / planned - 1:+.1%}" if measured is not None and planned else ""
            rows.append([label, f"{planned:,.4g}", known, differs])
    if not rows:
        return Html("")
    others = {name: plan[name] for name in ("gpus", "gpu", "max_steps", "tokens_per_step") if plan.get(name)}
    said = ", ".join(f"{name} {value}" for name, value in others.items())
    made = table(["", "planned", "measured (median)", "difference"], rows)
    return Html(f"<p class=dim>planned for {escape(said)}</p>{made}")


def _median(values: Sequence[float]) -> float | None:
    finite = sorted(value for value in values if math.isfinite(value))
    return finite[len(finite) // 2] if finite else None


def _phases(record: Record) -> Html:
    """A bar of the phases of the newest logged step."""
    total = record.history.last("seconds_per_step")
    if not total or not math.isfinite(total) or total < 0:
        return Html("")
    found = {name: record.history.last(f"seconds_{name}") or 0.0 for name in PHASES}
    found["rest"] = max(0.0, total - sum(found.values()))
    parts, keys = "", ""
    for number, (name, seconds) in enumerate(found.items()):
        colour = PALETTE[number]
        parts += f'<span style="width:{100 * seconds / total:.2f}%;background:{colour}"></span>'
        share = f"{name} {1000 * seconds:,.1f} ms ({seconds / total:.0%})"
        keys += f'<li><span class=key style="background:{colour}"></span>{share}</li>'
    return Html(f"<p>{1000 * total:,.1f} ms</p><div class=bars>{parts}</div><ul class=legend>{keys}</ul>")


def _attention(run: RunDirectory, problems: list[str]) -> Html:
    file = run.path / "attention.json"
    if not file.exists():
        return Html("")
    try:
        entries = read_json(file)
        rows = [
            [
                _ranges(entry["layers"]),
                entry["during"],
                entry["backend"],
                entry["asked"],
                Html("<br>".join(f"{escape(str(name))}: {escape(str(why))}" for name, why in entry["reasons"].items())),
            ]
            for entry in entries
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{file}: does not say which kernels served: {reason(error)}")
        return Html("")
    return table(["layers", "during", "kernel", "asked for", "why not another"], rows)


def _ranges(layers: Sequence[int]) -> str:
    """Numbers in short: 0-3, 7."""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _data(record: Record) -> Html:
    rows = [[path, _text(value)] for path, value in record.recipe.items() if path.partition(".")[0] == "data"]
    files = [[name, Html(f"<code>{escape(sha256)}</code>")] for name, sha256 in record.data.items()]
    return Html(table(["", ""], rows) + table(["file", "SHA-256"], files))


def _samples(events: Sequence[Event]) -> Html:
    found = [event.text for event in events if event.kind == "sample"][-SHOWN:]
    return Html("".join(f"<pre>{escape(text)}</pre>" for text in found))


def _events(run: RunDirectory, events: Sequence[Event], status: Status | None, *, cut: bool) -> Html:
    found = [event for event in events if event.kind != "sample"]
    left = len(found) - SHOWN
    notes = ["the beginning of the log is too long ago, and was left out"] if cut else []
    notes += [f"{left:,} earlier events are in the log"] if left > 0 else []
    colours = {"warning": "warn", "error": "bad"}
    rows = [
        [
            Html(f'<span class="{colours.get(event.kind, "")}">{event.kind}</span>'),
            event.text + (f"  ({event.count:,} times)" if event.count > 1 else ""),
        ]
        for event in found[-SHOWN:]
    ]
    text = "".join(f"<p class=dim>{note}</p>" for note in notes) + table(["", ""], rows)
    if status is not None and status.state in (State.FAILED, State.DIED):
        tail = "\n".join(last_lines(run.log, 20))
        text += f"<h3>The end of the log</h3><pre>{escape(tail)}</pre>"
    return Html(text)


def _recipe(run: RunDirectory, record: Record, problems: list[str]) -> Html:
    sources: Mapping[str, Any] = {}
    if run.sources.exists():
        try:
            sources = read_object(run.sources)
        except ConfigError as error:
            problems += error.problems
    rows = [
        [path, _text(value), *([str(sources.get(path, ""))] if sources else [])]
        for path, value in record.recipe.items()
    ]
    commands = run.command.read_text(errors="replace") if run.command.is_file() else ""
    typed = f"<h3>Typed</h3><pre>{escape(commands)}</pre>" if commands else ""
    return Html(table(["path", "value", *(["set at"] if sources else [])], rows) + typed) if rows or typed else Html("")


def _environment(run: RunDirectory, record: Record) -> Html:
    git = record.environment.get("git")
    rows = [[name, _text(value)] for name, value in record.machine.items()]
    patch = ""
    if isinstance(git, Mapping):
        rows += [[f"git {name}", _text(value)] for name, value in git.items() if name != "patch" and value]
        patch = str(git.get("patch") or "")
    if record.shipped:
        rows += [[f"shipped {name}", _text(record.shipped[name])] for name in _SHIPPED if record.shipped.get(name)]
    packages = record.environment.get("packages")
    more = list(_details("Uncommitted changes", f"<pre>{escape(patch)}</pre>" if patch else ""))
    if isinstance(packages, Mapping):
        more += _details("Packages", table(["", ""], [[str(name), str(version)] for name, version in packages.items()]))
    rows.append(["directory", str(run.path)])
    return Html(table(["", ""], rows) + "".join(more))


_SHIPPED = ("root", "revision", "files", "bytes", "modified", "untracked", "left_out")


def _details(title: str, content: str) -> Iterator[str]:
    if content:
        yield f"<details><summary>{title}</summary>{content}</details>"


def _text(value: Any) -> str:
    """A value as a reader writes it."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
