"""`fiddlehead runs sync`: W&B's own client sends offline records to a server in this test."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status
from tests import warm

RECORD = """
import sys, wandb
folder, run_id, *losses = sys.argv[1:]
run = wandb.init(dir=folder, id=run_id, project="p", mode="offline", resume="allow")
for loss in losses:
    run.log({"loss": float(loss)})
run.finish()
"""


class Server(ThreadingHTTPServer):
    """As much of W&B as it takes to receive runs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuses = False
        self.histories: dict[str, list[str]] = {}
        """By the run's id: its logged values, a JSON text for each step."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def losses(self) -> dict[str, list[float]]:
        return {name: [json.loads(line)["loss"] for line in lines] for name, lines in self.histories.items()}

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """What a GraphQL request gets."""
        if operation == "RunResumeStatus":
            lines = self.histories.get(given["name"])
            known = {
                "id": "1", "name": given["name"], "summaryMetrics": "{}", "displayName": "d", "logLineCount": 0,
                "historyLineCount": len(lines or ()), "historyTail": json.dumps((lines or [])[-1:]),
                "eventsLineCount": 0, "eventsTail": "[]", "config": "{}", "wandbConfig": '{"t": {"1": 1}}',
            }  # fmt: skip
            return {"model": {"id": "1", "bucket": None if lines is None else known}}
        if operation == "UpsertBucket":
            self.histories.setdefault(given["name"], [])
            project = {"id": "1", "name": given["project"], "entity": {"id": "1", "name": "me"}}
            return {"upsertBucket": {"bucket": {"id": "1", "name": given["name"], "project": project}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in given["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is not worth a traceback."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.refuses:
            self.reply(401, {"errors": [{"message": "not you"}]})
        elif self.path == "/graphql":
            asked = json.loads(body)
            self.reply(200, {"data": self.server.answer(asked.get("operationName"), asked.get("variables"))})
        else:
            if self.path.endswith("/file_stream"):
                new = json.loads(body).get("files", {}).get("wandb-history.jsonl")
                if new:
                    self.server.histories[self.path.split("/")[-2]][new["offset"] :] = new["content"]
            self.reply(200, {})

    do_PUT = do_POST  # noqa: N815

    def reply(self, code: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has ended."""
    run = RunDirectory(tmp_path / "runs" / "a")
    run.path.mkdir(parents=True)
    run.recipe.write_text("")
    run.write_status(Status(State.SUCCEEDED, ended=time.time()))
    return run


def record(run: RunDirectory, *losses: float) -> None:
    """An attempt of the run, on a node without a network."""
    command = [sys.executable, "-c", RECORD, str(run.path), run.wandb_id, *map(str, losses)]
    warm.run(command, check=True, env={**os.environ, "WANDB_SILENT": "true"}, timeout=60)
    time.sleep(1)  # the folders of attempts are named by the second


def sync(run: RunDirectory, server: Server, *names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fiddlehead.cli import main; main()", "runs", "sync", *names]
    key = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": server.url, "WANDB_MODE": "offline"}
    return warm.run(
        command, cwd=run.path.parents[1], env={**os.environ, **key}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
@pytest.mark.long
def test_all_attempts_become_one_run_and_are_sent_once(run: RunDirectory, server: Server):
    record(run, 3, 2.5)
    record(run, 2)
    result = sync(run, server)
    assert result.returncode == 0 and "a: 2 attempts" in result.stdout, result.stdout + result.stderr
    assert server.losses() == {run.wandb_id: [3, 2.5, 2]}
    assert "nothing was recorded offline that has not been sent" in sync(run, server).stdout
    record(run, 1.5)
    assert sync(run, server, "a").returncode == 0
    assert server.losses() == {run.wandb_id: [3, 2.5, 2, 1.5]}


@pytest.mark.slow
def test_a_failed_sync_is_an_error_and_can_be_repeated(run: RunDirectory, server: Server):
    record(run, 3)
    server.refuses = True
    result = sync(run, server)
    assert result.returncode == 1 and "error: not sent: a" in result.stderr, result.stdout + result.stderr
    server.refuses = False
    assert sync(run, server).returncode == 0
    assert server.losses() == {run.wandb_id: [3]}


def test_a_run_that_goes_on_is_sent_when_it_has_ended(run: RunDirectory, server: Server):
    """What it has recorded so far would be marked as sent, and the rest never be."""
    run.write_status(Status(State.RUNNING, host=f"not-{socket.gethostname()}", started=time.time()))
    (run.path / "wandb" / "offline-run-20260101_100000-abc").mkdir(parents=True)
    result = sync(run, server)
    assert result.returncode == 0 and "a: is going on (RUNNING)" in result.stdout
    assert server.histories == {}
