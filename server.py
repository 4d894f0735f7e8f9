"""Serve a model over HTTP, as OpenAI's API: python server.py --out_dir=DIR

This file puts the server together, holds its port, and ends it. What it answers is in
serving/routes.py; the engine has a thread of its own, see serving/worker.py.
"""

import cli
from config import EngineConfig
from serving.config import ServeConfig

if __name__ == "__main__":
    cli.run("server", ServeConfig)

import asyncio
import contextlib
import dataclasses
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from engine import Engine
from errors import UserError
from model import GPT
from serving.api_errors import unavailable
from serving.chat import load_template
from serving.gate import Gate
from serving.log import set_up_logging, wants_text
from serving.metrics import EngineCollector, Metrics
from serving.routes import create_app
from serving.served_model import ServedModel
from serving.turns import Turns
from serving.worker import Worker
from tokenizer import Tokenizer
from utils import open_model

log = logging.getLogger("server")

SWITCH_INTERVAL = 5e-4
"""Seconds after which a busy thread gives way to another that waits. With Python's 5 ms the event
loop would wait that long for the engine's thread at each turn."""

OBJECTS_BETWEEN_COLLECTIONS = 20_000
"""New objects after which the garbage collector looks at them. With Python's 700, to parse a long
list of lists takes twice the time."""

CONNECTION_TIMEOUT = 5
"""Seconds that uvicorn waits for connections to close once all requests have been answered."""

THREAD_TIMEOUT = 10
"""Seconds that the engine's thread has to end its last step."""

WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that mean all addresses of the machine, which no browser can open, and one it can."""


class Server(uvicorn.Server):
    """uvicorn's server and the engine's thread; at the end, no admitted request is lost."""

    def __init__(
        self,
        config: ServeConfig,
        make_engine: Callable[[], Engine],
        tokenizer: Tokenizer,
        max_model_len: int,
    ) -> None:
        """make_engine runs on the engine's thread, where it may take its time to compile.
        max_model_len: tokens of the model's context."""
        self.drain_timeout = config.drain_timeout
        self.drain_task: asyncio.Task | None = None
        metrics = Metrics(config.model_name, max_model_len)
        self.worker = Worker(make_engine, config, metrics, on_death=self.exit_soon)
        collector = EngineCollector(self.worker.stats_and_queued, metrics.labels, config.engine)
        metrics.registry.register(collector)
        template = load_template(config, tokenizer)
        model = ServedModel(config, self.worker, tokenizer, max_model_len, template)
        app = add_gate(create_app(model), config, model.turns)
        super().__init__(uvicorn_config(app))

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until all is drained.

        Raises RuntimeError if the engine died, or why it could not start, if it never was warm."""
        self.worker.start()
        await super().serve(sockets)
        was_warm = self.worker.stats is not None
        self.worker.stop()
        if was_warm:  # else it is in the compiler, and there is nothing to wait for
            await asyncio.to_thread(self.worker.thread.join, THREAD_TIMEOUT)
        if self.worker.error and was_warm:
            raise RuntimeError("the engine has died") from self.worker.error
        if self.worker.error:
            raise self.worker.error

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone: uvicorn would raise SIGTERM again at the end, and the exit code
        would not be 0."""
        yield

    def drain(self) -> None:
        """Admit nothing more, let what runs finish within drain_timeout, then exit.

        Called a second time, it does not wait. Runs on the event loop."""
        if self.worker.draining:
            log.info("stopping at once")
            self.exit_soon()
            return
        self.worker.begin_draining()
        log.info(
            "draining for up to %g s (requests open: %d); a second signal does not wait",
            self.drain_timeout,
            len(self.worker.open_jobs),
        )
        self.drain_task = asyncio.create_task(self._drain())

    def exit_soon(self) -> None:
        """Let uvicorn end at its next tick, a tenth of a second."""
        self.should_exit = True

    async def _drain(self) -> None:
        try:
            await asyncio.wait_for(self.worker.idle.wait(), self.drain_timeout)
        except TimeoutError:
            sentence = f"drain_timeout={self.drain_timeout} s are over"
            self.worker.fail_all(unavailable(f"the server is shutting down, and {sentence}"))
        self.exit_soon()


def add_gate(app: ASGIApp, config: ServeConfig, turns: Turns) -> ASGIApp:
    """Return app behind what every request must pass. CORS is outside: a browser's question what it
    may do comes without a key."""
    app = Gate(app, config.api_key, config.max_body_bytes, turns)
    if not config.cors_origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=config.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id"],
    )


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    """Return settings under which uvicorn logs nothing of its own."""
    return uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CONNECTION_TIMEOUT,
    )


def hold_port(host: str, port: int) -> socket.socket:
    """Return a socket that holds the port, but refuses connections until it listens.

    So a busy port is found before a model is loaded for it, and a client meanwhile is refused
    rather than kept waiting. Raises UserError if the port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    # The connections of a server that has just ended do not keep the port from the next.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    with port_errors(host, port):
        listener.bind((host, port))
    return listener


def listen(listener: socket.socket) -> None:
    """Accept connections from now on.

    Raises UserError if another server, started at the same time, was faster."""
    with port_errors(*listener.getsockname()[:2]):
        listener.listen()


@contextlib.contextmanager
def port_errors(host: str, port: int) -> Iterator[None]:
    """Raise UserError for what the system says against listening on this address."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use by another program: stop that, or choose "
                "another port with --port (0 takes a free one)",
                param="port",
            ) from error
        if error.errno == errno.EACCES:
            raise UserError(
                f"port {port} needs rights that this user does not have: choose one above 1023 "
                "with --port",
                param="port",
            ) from error
        raise UserError(
            f"cannot listen on host={host}: {error.strerror}: choose an address of this machine "
            "with --host",
            param="host",
        ) from error


def url_of(listener: socket.socket) -> str:
    """Return an address that a browser on this machine can open."""
    host, port = listener.getsockname()[:2]
    host = WILDCARD_HOSTS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def exit_past_busy_thread() -> NoReturn:
    """End the process, code 0, while the engine's thread is in the compiler or in a hanging step.

    No thread can be stopped in there, and Python's own way out would abort the process."""
    logging.shutdown()
    os._exit(0)


def start_engine(
    model: GPT, tokenizer: Tokenizer, config: EngineConfig, show_progress: bool
) -> Engine:
    """Return an engine, which takes its time to compile.

    What was made until then stays, so the garbage collector need not look at it again: it would
    keep all threads waiting while it does, for 0.3 s each time."""
    engine = Engine(model, tokenizer, config, progress=show_progress)
    gc.collect()
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    return engine


async def serve_until_signalled(server: Server, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, and what runs then to its end."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.drain)
    await server.serve([listener])


def main(config: ServeConfig) -> None:
    """Load the model and serve it until SIGINT or SIGTERM."""
    set_up_logging(config.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL)
    api_key = config.api_key or os.environ.get("NANOGPT_API_KEY")
    config = dataclasses.replace(config, api_key=api_key)
    listener = hold_port(config.host, config.port)
    log.info("loading %s", config.model_name)
    model, tokenizer, _ = open_model(config, config.engine.mesh)
    # A bar of what is compiled is for people only.
    show_progress = wants_text(config.log_format) and sys.stderr.isatty()
    make_engine = partial(start_engine, model, tokenizer, config.engine, show_progress)
    server = Server(config, make_engine, tokenizer, model.config.block_size)
    listen(listener)
    url = url_of(listener)
    log.info(
        "serving %s at %s (the API, and a page to try it)",
        config.model_name,
        url,
        extra={"fields": {"url": url}},
    )
    asyncio.run(serve_until_signalled(server, listener))
    log.info("stopped")
    if server.worker.thread.is_alive():
        exit_past_busy_thread()
