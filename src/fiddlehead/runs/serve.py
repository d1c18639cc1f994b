"""Shows runs in a browser: a server on this machine that only reads.

Three things keep others out. It listens on the loopback address only. It answers only if the browser asked for
`localhost`, so that a foreign page whose name was pointed here gets nothing. And it wants the token that it has
printed, because other users of the machine can reach the loopback address too.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from html import escape
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import list_runs
from fiddlehead.run.status import Status
from fiddlehead.runs.compare import show_value
from fiddlehead.runs.export import json_value
from fiddlehead.runs.page import Html, page, policy, script, table
from fiddlehead.runs.report import report, state_html, when

HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""The names by which a browser may ask for this server, with any port: a tunnel may have another one."""
REFRESH = 10
"""Seconds after which a browser asks again for a page that may have changed."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
States = Callable[[Sequence[RunDirectory]], list[Status | None]]


class Runs:
    """The runs of a folder, as their files are now. A run whose files have not changed is not read again."""

    def __init__(self, directory: str | Path, states: States) -> None:
        self.directory, self.states = directory, states
        self._known: dict[Path, tuple[tuple, dict[str, Any]]] = {}

    def facts(self) -> list[dict[str, Any]]:
        """Name, state and newest metrics of each run, the newest run first."""
        runs = list_runs(self.directory)[::-1]
        found = [self._facts(run) for run in runs]
        changing = [run for run, facts in zip(runs, found, strict=True) if not facts["ended"]]
        statuses = dict(zip((run.path for run in changing), self.states(changing), strict=True))
        return [
            facts if run.path not in statuses else {**facts, **_status(statuses[run.path])}
            for run, facts in zip(runs, found, strict=True)
        ]

    def find(self, name: str) -> RunDirectory | None:
        """The run with this name; only a name in the folder leads to one."""
        return next((run for run in list_runs(self.directory) if run.name == name), None)

    def _facts(self, run: RunDirectory) -> dict[str, Any]:
        stamp = tuple(_stamp(run.path / name) for name in ("status", "metrics.csv"))
        known = self._known.get(run.path)
        if known is None or known[0] != stamp:
            try:
                status = run.written_status()
            except ConfigError:
                status = None  # `states` calls it damaged
            metrics = json_value({name: float(value) for name, value in run.last_metrics().items()})
            known = stamp, {"name": run.name, **_status(status), "metrics": metrics}
            self._known[run.path] = known
        return known[1]


class Server(ThreadingHTTPServer):
    """Serves the pages of runs on the loopback address."""

    daemon_threads = True

    def __init__(self, runs: Runs, port: int) -> None:
        self.runs, self.token = runs, secrets.token_urlsafe(24)
        self.cookie = f"fiddlehead-{sha256(self.token.encode()).hexdigest()[:8]}"
        """Of its own: cookies of one host hold for all its ports."""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(Problem("--port", port, f"cannot listen there: {error}; choose another")) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a browser that has left; of another error, its traceback is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """The address to open, with the token."""
        return f"http://localhost:{self.server_address[1]}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; the server's other methods are answered with 501."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "fiddlehead", ""
    timeout = 30

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if not self._asked_for_here():
            self._send(403, "text/plain", "this server answers to localhost only\n")
        elif token := parse_qs(address.query).get("token"):
            self._take(token[0], address.path)
        elif not self._known():
            self._send(403, "text/plain", "open the address that `fiddlehead runs serve` has printed, with its token\n")
        else:
            try:
                code, kind, text = self._answer(unquote(address.path))
            except (ConfigError, OSError) as error:  # a run was deleted meanwhile, or a file system stumbles
                code, kind, text = 500, "text/plain", f"{error}\n"
            self._send(code, kind, text)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the requests would bury what the command has printed."""

    def _asked_for_here(self) -> bool:
        """Whether the request is for this machine by one of its own names, and does not come from another page."""
        names = self.headers.get_all("Host") or []
        host = names[0].lower() if len(names) == 1 else ""
        name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "0")
        foreign = self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        navigates = self.headers.get("Sec-Fetch-Mode") == "navigate"
        origin = self.headers.get("Origin", f"http://{host}").lower()
        return name in HOSTS and port.isdecimal() and origin == f"http://{host}" and (not foreign or navigates)

    def _take(self, token: str, path: str) -> None:
        """Keeps a right token in a cookie, and leads to the address without it."""
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._send(403, "text/plain", "the token is not that of this server\n")
            return
        cookie = f"{self.server.cookie}={token}; Path=/; HttpOnly; SameSite=Strict"
        where = "/" + path.lstrip("/\\")  # never another host
        self._send(303, "text/plain", "", {"Set-Cookie": cookie, "Location": where})

    def _known(self) -> bool:
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.server.token.encode())

    def _answer(self, path: str) -> tuple[int, str, str]:
        """The status, the type and the content of an answer."""
        runs = self.server.runs
        if path == "/":
            return 200, "text/html", list_page(runs)
        if path == "/runs.json":
            return 200, "application/json", json.dumps(runs.facts(), allow_nan=False)
        if path.startswith("/run/") and (run := runs.find(path.removeprefix("/run/"))) is not None:
            (status,) = runs.states([run])
            refresh = 0 if status is None or status.state.ended else 3 * REFRESH
            return 200, "text/html", report(run, status, refresh=refresh, back="/")
        return 404, "text/plain", "there is no such page\n"

    def _send(self, code: int, kind: str, text: str, headers: dict[str, str] | None = None) -> None:
        content = text.encode(errors="replace")
        self.send_response(code)
        own = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
        own["Content-Security-Policy"] = f"{policy(script())}; frame-ancestors 'none'"
        for name, value in {**HEADERS, **own, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def list_page(runs: Runs) -> str:
    """The page with all runs."""
    rows = [
        [
            _link(facts["name"]),
            state_html(facts["state"]),
            *(_metric(facts["metrics"], name) for name in ("step", "loss", "val_loss", "tokens_per_s")),
            when(facts["started"]) if facts["started"] else "",
            facts["reason"].split("\n")[0][:100],
        ]
        for facts in runs.facts()
    ]
    now = time.strftime("%H:%M:%S")
    made = table(["run", "state", "step", "loss", "val_loss", "tokens/s", "started", ""], rows, "list")
    head = f"<h1>{len(rows):,} runs in {escape(str(runs.directory))}</h1><p class=dim>{now}, anew every {REFRESH} s</p>"
    return page("fiddlehead runs", head + made, zooms=False, refresh=REFRESH)


def _link(name: str) -> Html:
    return Html(f'<a href="/run/{quote(name, safe="", errors="replace")}">{escape(show_value(name))}</a>')


def _metric(metrics: dict[str, float | None], name: str) -> Any:
    value = metrics.get(name)
    if value is None:
        return ""
    return int(value) if name in ("step", "tokens_per_s") else f"{value:.4f}"


def _status(status: Status | None) -> dict[str, Any]:
    if status is None:
        return {"state": None, "started": 0.0, "ended": None, "reason": "", "attempt": 0}
    known = asdict(status)
    return {name: known[name] for name in ("state", "started", "ended", "reason", "attempt")}


def _stamp(file: Path) -> tuple[int, int, int]:
    """The size, time and inode of a file; zeros if there is none."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ino
