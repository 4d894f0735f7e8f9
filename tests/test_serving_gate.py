"""Tests of what stands in front of the routes: the size of bodies, keys, CORS, headers, the log."""

import asyncio
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.exceptions import HTTPException

from running_server import CONFIG, DEADLINE, TOKENIZER
from server import Server
from serving.config import ServeConfig
from serving.gate import LARGE_BODY, Gate
from serving.log import JSONLines, RequestLog
from serving.turns import Turns

pytest_plugins = ["server_fixtures"]

ORIGIN = "https://page.example"


class Channel:
    """The two ends of an ASGI connection: messages to receive, and those that were sent."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.messages = [
            {"type": "http.request", "body": piece, "more_body": number + 1 < len(pieces)}
            for number, piece in enumerate(pieces)
        ]
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        """Return the next message."""
        return self.messages.pop(0)

    async def send(self, message: dict[str, Any]) -> None:
        """Keep a message."""
        self.sent.append(message)

    @property
    def status(self) -> int:
        """The answer's status."""
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers."""
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}


def scope(method: str = "POST", path: str = "/x", **headers: str) -> dict[str, Any]:
    """A request's head."""
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": pairs,
    }


async def read_body(scope, receive, send) -> None:
    """An app that reads the whole body and answers 200, or 413 if it is told so."""
    status = 200
    try:
        while (await receive()).get("more_body"):
            pass
    except HTTPException as error:
        status = error.status_code
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


# Bodies.


@pytest.mark.parametrize("pieces, status", [(100, 200), (101, 413)])
def test_body_in_many_small_pieces(pieces, status):
    """Catches: a limit that each piece passes, or that a whole body is one byte short of."""
    channel = Channel([b"x"] * pieces)
    asyncio.run(Gate(read_body, None, 100)(scope(), channel.receive, channel.send))
    assert channel.status == status


def test_body_that_says_nothing_of_its_length(server):
    """Catches: a limit that only a Content-Length is held against."""

    def pieces():
        yield b'{"prompt": "'
        for _ in range(server.config.max_body_bytes // 1000):
            yield b"a" * 1000
        yield b'"}'

    url = f"{server.url}/v1/completions"
    headers = {"Content-Type": "application/json"}
    response = requests.post(url, data=pieces(), headers=headers, timeout=DEADLINE)
    assert response.status_code == 413
    assert str(server.config.max_body_bytes) in response.json()["error"]["message"]


def test_large_bodies_come_one_after_the_other():
    """Catches: many bodies that are parsed in one turn of the event loop, so that nobody else
    is served for seconds; small ones that wait for large ones."""
    ended = []

    async def app(scope, receive, send) -> None:
        await read_body(scope, receive, send)
        ended.append(scope["path"])

    async def scenario() -> None:
        gate = Gate(app, None, 10 * LARGE_BODY, Turns())
        large = [
            (scope(path=f"/large{number}"), Channel([b"x" * LARGE_BODY])) for number in range(4)
        ]
        small = (scope(path="/small"), Channel([b"x"]))
        tasks = [
            asyncio.create_task(gate(request, channel.receive, channel.send))
            for request, channel in [*large, small]
        ]
        ended_by_turn = []
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            ended_by_turn.append(len(ended))
        steps = [after - before for before, after in itertools.pairwise(ended_by_turn)]
        assert max(steps) == 1, "two large bodies in one turn"

    asyncio.run(scenario())
    assert ended[:2] == ["/large0", "/small"]
    assert ended[2:] == ["/large1", "/large2", "/large3"]


# Keys and other origins.


@pytest.fixture(scope="module")
def guarded():
    """The layers of a server with a key that a page of another origin may call."""
    config = ServeConfig(out_dir=Path("out"), api_key="secret", cors_origins=(ORIGIN,))
    server = Server(config, lambda: None, TOKENIZER, CONFIG.block_size)
    return server.config.app


def ask(app, method: str, path: str, **headers: str) -> Channel:
    """The channel after a request without a body."""
    channel = Channel([b""])
    asyncio.run(app(scope(method, path, **headers), channel.receive, channel.send))
    return channel


def test_preflight_needs_no_key(guarded):
    """Catches: a browser that is asked for a key before it may ask whether it may show one."""
    preflight = {
        "origin": ORIGIN,
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization,content-type",
    }
    answer = ask(guarded, "OPTIONS", "/v1/completions", **preflight)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    other = preflight | {"origin": "https://elsewhere.example"}
    assert "access-control-allow-origin" not in ask(guarded, "OPTIONS", "/x", **other).headers


def test_refusal_without_a_key(guarded):
    """Catches: a 401 that a page of another origin cannot read, or of which a browser does not
    know that it may ask for the password."""
    answer = ask(guarded, "GET", "/v1/models", origin=ORIGIN)
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Basic realm=")
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["access-control-expose-headers"] == "X-Request-Id"
    assert answer.headers["x-request-id"]
    assert json.loads(answer.sent[1]["body"])["error"]["code"] == "invalid_api_key"


# Headers and the log.


def test_headers_of_a_stream(server):
    """Catches: a stream that nginx holds back, or a cache keeps."""
    response = server.post(prompt="a", max_tokens=2, stream=True)
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["content-type"].startswith("text/event-stream")


def test_headers_of_an_answer(server):
    """Catches: a short answer without its length, which HTTP/1.0 ends by closing the connection."""
    response = server.post(prompt="a", max_tokens=2)
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["content-type"] == "application/json"


def test_busy_answers_say_when_to_come_again(server):
    """Catches: a 503 or 429 without Retry-After, for which clients hammer or give up."""
    server.worker.draining = True
    try:
        refused = [server.post(prompt="a"), server.get("/health")]
    finally:
        server.worker.draining = False
    assert [response.status_code for response in refused] == [503, 503]
    assert all(int(response.headers["retry-after"]) > 0 for response in refused)


@pytest.mark.parametrize(
    "body, status, counts",
    [
        ({"prompt": "abc", "max_tokens": 4, "n": 2}, 200, (3, 8)),
        ({"prompt": "abc", "max_tokens": 4, "stream": True}, 200, (3, 4)),
        ({"prompt": "abc", "top_p": 3}, 400, (None, None)),
    ],
)
def test_line_of_a_request(server, caplog, body, status, counts):
    """Catches: a field of the log that is lost, or another request's."""
    with caplog.at_level(logging.DEBUG, "server"):
        headers = {"X-Request-Id": "id-7"}
        url = f"{server.url}/v1/completions"
        requests.post(url, json=body, headers=headers, timeout=DEADLINE)
        server.until(lambda: lines_of(caplog, "id-7"), "logged")
    [line] = lines_of(caplog, "id-7")
    assert line["event"] == "request"
    assert line["level"] == "INFO"
    assert line["method"] == "POST"
    assert line["path"] == "/v1/completions"
    assert line["status"] == status
    assert 0 < line["seconds"] < DEADLINE
    assert (line.get("prompt_tokens"), line.get("completion_tokens")) == counts
    assert "error" not in line


def test_line_of_a_client_that_left(server, caplog):
    """Catches: a request that ends without a line, or one that looks answered."""
    with caplog.at_level(logging.DEBUG, "server"):
        with server.standing():
            client = server.connection({"prompt": "abc", "max_tokens": 4})
            server.until(lambda: server.worker.open_jobs, "arrived")
            client.close()
            server.until(lambda: lines_of(caplog), "logged")
    [line] = lines_of(caplog)
    assert line["status"] in (None, 499)


def lines_of(caplog, request_id: str | None = None) -> list[dict]:
    """The lines of requests in the log."""
    records = [record for record in caplog.records if hasattr(record, "request")]
    lines = [json.loads(JSONLines().format(record)) for record in records]
    return [line for line in lines if request_id in (None, line["request_id"])]


def test_a_wrong_method_is_told_the_right_one(server):
    """Catches: a 405 without the header that says what is allowed, which HTTP asks for."""
    answer = requests.get(f"{server.url}/v1/completions", timeout=DEADLINE)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_log_tells_zeros():
    """Catches: a request of no new tokens whose line looks like that of one that made none of its
    own, such as /health."""
    known = {"status": 200, "seconds": 0.0, "prompt_tokens": 3, "completion_tokens": 0}
    fields = RequestLog("an-id", "POST", "/v1/completions", **known).fields()
    assert {name: fields.get(name) for name in known} == known
    assert "error" not in fields
