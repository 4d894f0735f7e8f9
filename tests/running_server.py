"""A server with a tiny model in a thread of this process, on a free port of 127.0.0.1.

So a test can reach its engine too: slow it down, let it stand still, let it die. The fixtures in
server_fixtures.py share one such server among the tests that do not end it.
"""

import asyncio
import contextlib
import json
import socket
import string
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from config import EngineConfig, GPTConfig
from engine import Engine
from model import GPT
from sequence import Output
from server import Server
from serving.config import ServeConfig
from serving.worker import Worker
from tokenizer import CharTokenizer

DEADLINE = 120  # seconds; generous, because CI machines are slow
COMPILING = 600  # seconds
TOKENIZER = CharTokenizer(string.printable[:95] + "\n€")
CONFIG = GPTConfig(block_size=128, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=32)
ENGINE = EngineConfig(page_size=8, kv_blocks=65, max_num_seqs=4, prefill_tokens=32)
SMALL_BUFFER = 1 << 14  # bytes in a socket's buffers, so that a slow reader is felt soon


class Running:
    """A server in a thread of its own, and what a test can do to it."""

    def __init__(self, model: GPT, **flags: Any) -> None:
        self.config = ServeConfig(
            out_dir=Path("out"), engine=ENGINE, served_model_name="tiny", **flags
        )
        self.model = model
        self.server = Server(self.config, self.make_engine, TOKENIZER, CONFIG.block_size)
        self.error: BaseException | None = None  # what ended the server
        self.may_step = threading.Event()  # cleared, the engine stands still before its next step
        self.may_step.set()
        self.step_seconds = 0.0  # so much longer each step takes, as with a larger model
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self._run, args=(listener,), daemon=True)
        self.thread.start()

    @property
    def worker(self) -> Worker:
        """The server's way to its engine."""
        return self.server.worker

    def make_engine(self) -> Engine:
        """Return an engine whose steps wait for may_step."""
        engine = Engine(self.model, TOKENIZER, ENGINE, progress=False)
        step = engine.step

        def gated_step() -> list[Output]:
            assert self.may_step.wait(DEADLINE)
            time.sleep(self.step_seconds)
            return step()

        engine.step = gated_step
        return engine

    def _run(self, listener: socket.socket) -> None:
        try:
            asyncio.run(self.server.serve([listener]))
        except BaseException as error:
            self.error = error

    def drain(self) -> None:
        """Do what SIGTERM does."""
        self.worker.loop.call_soon_threadsafe(self.server.drain)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> None:
        """Wait for a condition, or fail."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {seconds} s"
            time.sleep(0.005)

    def ready(self) -> "Running":
        """Wait until the server is warm."""
        self.until(lambda: self.worker.stats or self.error, "warm", COMPILING)
        assert self.get("/health").status_code == 200
        return self

    def ended(self) -> BaseException | None:
        """Wait until the server has ended, and return why, None if all was well."""
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()
        return self.error

    def get(self, path: str) -> requests.Response:
        """GET path."""
        return requests.get(self.url + path, timeout=DEADLINE)

    def post(self, path: str = "/v1/completions", **body: Any) -> requests.Response:
        """POST body to path."""
        return requests.post(self.url + path, json=body, timeout=DEADLINE)

    def complete(self, **body: Any) -> dict:
        """Return the answer to body, which must be good."""
        response = self.post(**body)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, **body: Any) -> dict:
        """Return the answer to a chat, which must be good."""
        return self.complete(path="/v1/chat/completions", **body)

    def pages_held(self) -> int:
        """Return how many pages sequences held after the last step."""
        return self.worker.stats.pages_held

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """The engine stands still inside."""
        self.may_step.clear()
        try:
            yield
        finally:
            self.may_step.set()

    def connection(self, body: dict) -> socket.socket:
        """Send a request on a connection of its own, of which nothing has been read."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        connection.settimeout(DEADLINE)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(completion_request(body))
        return connection


def completion_request(body: dict) -> bytes:
    """Return a request for /v1/completions as it goes over the wire."""
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def events(response: requests.Response) -> list:
    """Return the objects of a stream, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def asgi(
    app: Any, method: str, path: str, headers: list[tuple[bytes, bytes]] | None = None
) -> tuple[int, bytes]:
    """Return the status and the body of an answer, without a socket."""
    sent = []

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "http.request"}

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": headers or [],
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)
