"""The server of runs: what it shows, and whom it answers."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.launch import watch
from fiddlehead.run.status import State
from fiddlehead.runs.serve import Runs, Server
from tests.runs.samples import HOSTILE, made

Ask = Callable[..., http.client.HTTPResponse]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "runs").mkdir()
    with Server(Runs(tmp_path / "runs", watch.states), 0) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


@pytest.fixture
def ask(server: Server) -> Iterator[Ask]:
    """Asks the server, with its token unless another cookie is given; `text` of the answer is its content."""
    open_ones = []

    def request(path: str, method: str = "GET", **headers: str | None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
        open_ones.append(connection)
        known = {"Host": "localhost:9000", "Cookie": f"{server.cookie}={server.token}"}
        known |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host=True)
        for name, value in known.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        answer.text = answer.read().decode()  # type: ignore[attr-defined]
        return answer

    yield request
    for connection in open_ones:
        connection.close()


def test_runs_are_shown_as_they_are_now(tmp_path: Path, ask: Ask):
    assert "0 runs in" in ask("/").text
    run = made(tmp_path, "first")
    page = ask("/").text
    assert "1 runs in" in page and "SUCCEEDED" in page and 'href="/run/first"' in page
    (facts,) = json.loads(ask("/runs.json").text)
    assert (facts["name"], facts["state"], facts["metrics"]["step"]) == ("first", "SUCCEEDED", 40)
    with run.metrics.open("a") as file:
        file.write("41,1.25,,,,,,,,\n")
    assert "1.2500" in ask("/").text and "<svg" in ask("/run/first").text
    status = run.written_status()
    assert status is not None
    run.write_status(replace(status, state=State.RUNNING, ended=None, pid=2**22 + 1, host="gone"))
    assert "DIED" in ask("/").text and json.loads(ask("/runs.json").text)[0]["state"] == "DIED"
    (run.path / "status").write_text("{")
    assert "DAMAGED" in ask("/").text and "is damaged" in ask("/run/first").text
    shutil.rmtree(run.path)
    assert "0 runs in" in ask("/").text and ask("/run/first").status == 404


def test_the_token_is_wanted_and_becomes_a_cookie(server: Server, ask: Ask):
    assert (
        ask("/", Cookie=None).status
        == ask("/", Cookie="a=b").status
        == ask("/", Cookie=f"{server.cookie}=x").status
        == 403
    )
    assert ask("/?token=x", Cookie=None).status == ask("/?token=%C3%BC", Cookie=None).status == 403
    answer = ask(f"//evil.example/?token={server.token}", Cookie=None)
    assert (answer.status, answer.getheader("Location")) == (303, "/evil.example/")
    answer = ask(f"/?token={server.token}", Cookie=None)
    cookie = answer.getheader("Set-Cookie")
    assert (answer.status, answer.getheader("Location")) == (303, "/") and cookie is not None
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert ask("/", Cookie=cookie.partition(";")[0]).status == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8321", "127.0.0.1:9000", "[::1]:80", "LOCALHOST:1"])
def test_it_answers_by_its_own_names_through_any_port(ask: Ask, host: str):
    assert ask("/", Host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8321",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "localhost:80@evil.example",
        "",
        None,
        "localhost:",
        "[::1",
        "0.0.0.0",
    ],
)
def test_a_name_that_was_pointed_here_gets_nothing(tmp_path: Path, ask: Ask, host: str | None):
    made(tmp_path, "first")
    answer = ask("/", Host=host)
    assert answer.status == 403 and "first" not in answer.text


def test_no_other_page_reads_it(ask: Ask):
    answer = ask("/", Origin="http://evil.example")
    assert not [name for name, _ in answer.getheaders() if name.lower().startswith("access-control")]
    assert answer.getheader("X-Frame-Options") == "DENY" and "frame-ancestors 'none'" in answer.getheader(
        "Content-Security-Policy"
    )
    assert answer.getheader("Cross-Origin-Resource-Policy") == "same-origin"
    assert ask("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors").status == 403
    for origin in ("http://evil.example", "http://localhost:9001", "null"):
        assert ask("/runs.json", Origin=origin).status == 403
    assert ask("/runs.json", Origin="http://localhost:9000").status == 200
    assert ask("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_it_only_reads(ask: Ask, method: str):
    assert ask("/", method).status == 501
    assert ask("/", "HEAD").text == ""


@pytest.mark.parametrize(
    "path", ["/run/../secret", "/run/..%2Fsecret", "/run/%2Fetc", "/run/", "/run/a%00", "/etc/passwd", "/run/."]
)
def test_only_the_folder_of_runs_is_shown(tmp_path: Path, ask: Ask, path: str):
    made(tmp_path, "first")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "recipe.yaml").write_text("a: 1\n")
    assert ask(path).status == 404


def test_hostile_names_are_text_and_lead_to_their_pages(tmp_path: Path, ask: Ask):
    name = HOSTILE.replace("/", "_") + " #?%"
    run = made(tmp_path, name)
    status = run.written_status()
    assert status is not None
    run.write_status(replace(status, reason=HOSTILE))
    page = ask("/").text
    assert "<script" not in page and "&lt;script&gt;" in page
    link = page.split('href="')[1].split('"')[0]
    assert ask(link).status == 200


def test_it_listens_on_the_loopback_address_only(server: Server, tmp_path: Path):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"--port=\d+: cannot listen there"):
        Server(server.runs, server.server_address[1])


def test_two_thousand_runs_are_listed_in_two_seconds(tmp_path: Path, ask: Ask):
    first = made(tmp_path, "run-0")
    for number in range(1, 2000):
        shutil.copytree(first.path, first.path.with_name(f"run-{number}"))
    began = time.process_time()
    assert "2,000 runs in" in ask("/").text
    assert time.process_time() - began < 2
    began = time.process_time()
    ask("/")
    assert time.process_time() - began < 1  # nothing has changed
