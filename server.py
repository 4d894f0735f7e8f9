"""Serve a model over HTTP, as OpenAI's API: python server.py --out_dir=DIR

The routes, what stands in front of them, and how the process ends. The engine has a thread of its own: see worker.py.
"""

import cli
from config import ServeConfig

if __name__ == "__main__":
    cli.run("server", ServeConfig)

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fastapi
import jax
import prometheus_client
import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from engine import Engine
from errors import require
from sequence import SamplingParams
from serving import protocol
from serving.answers import ChatSample, EventStream, Sample, TextSample, Writer, attended
from serving.chat import ChatTemplate, load_template
from serving.gate import Gate, JSONLines
from serving.protocol import APIError, GenerationRequest, invalid_request, refused, unavailable
from serving.worker import Job, Metrics, Worker
from tokenizer import Tokenizer
from utils import open_model

VERSION = "0.1.0"
log = logging.getLogger("server")


class Front:
    """What the routes have in common."""

    def __init__(
        self, config: ServeConfig, worker: Worker, tokenizer: Tokenizer, max_model_len: int
    ):
        self.config, self.worker, self.tokenizer, self.max_model_len = (
            config,
            worker,
            tokenizer,
            max_model_len,
        )
        self.started = int(time.time())

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.config.model_name):
            raise APIError(
                404,
                f"there is no model {name!r} here, only {self.config.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def check(self, body: GenerationRequest, **limits: tuple[int | None, int]) -> None:
        """Of what is asked for, as NAME=(value, limit) and what all have."""
        self.check_model(body.model)
        stops = len(body.stop) if isinstance(body.stop, list) else None
        limits |= {"n": (body.n, self.config.max_n), "stop": (stops, self.config.max_stop)}
        for name, (value, limit) in limits.items():
            if value is not None and value > limit:
                raise APIError(
                    400, f"{name}: {value} asked for, and this server allows {limit}", param=name
                )
        if body.stream_options and not body.stream:
            raise APIError(400, "stream_options: only for stream=true", param="stream_options")

    async def encode(self, text: str) -> list[int]:
        try:
            return await asyncio.to_thread(
                self.tokenizer.encode, text
            )  # a long one must not hold up the others
        except ValueError as e:
            raise APIError(400, str(e), param="prompt") from e

    async def generate(
        self,
        request: fastapi.Request,
        kind: type[Sample],
        body: GenerationRequest,
        prompts: list[list[int]],
        params: Callable[[], SamplingParams],
    ) -> EventStream | protocol.Answer:
        try:
            params = params()
        except ValueError as e:
            raise refused(e) from e
        job = Job(request.scope["log"]["request_id"], prompts, params, bool(body.stream))
        writer = Writer(
            kind, body, job, self.tokenizer, self.config.model_name, request.scope["log"]
        )
        await self.worker.submit(job)
        if body.stream:
            return EventStream(writer.events(), self.worker, job)
        async with attended(self.worker, job, request.receive):
            return await writer.whole()


STREAMED = {200: {"content": {"text/event-stream": {}}}}


def add_completions(app: fastapi.FastAPI, front: Front) -> None:
    """/v1/completions"""

    @app.post("/v1/completions", response_model=protocol.Completion, responses=STREAMED)
    async def completions(body: protocol.CompletionRequest, request: fastapi.Request):
        several = (
            isinstance(body.prompt, list) and body.prompt and not isinstance(body.prompt[0], int)
        )
        prompts, limits = body.prompt if several else [body.prompt], front.config
        front.check(
            body,
            prompt=(len(prompts), limits.max_prompts),
            logprobs=(body.logprobs, limits.max_logprobs),
            prompt_logprobs=(body.prompt_logprobs, limits.max_logprobs),
        )
        prompts = [await front.encode(p) if isinstance(p, str) else p for p in prompts]
        return await front.generate(request, TextSample, body, prompts, body.sampling_params)


def add_chat(app: fastapi.FastAPI, front: Front, template: ChatTemplate | None) -> None:
    """/v1/chat/completions, if there is a template."""
    path = "/v1/chat/completions"
    if template is None:

        @app.post(path, include_in_schema=False)
        async def no_chat():
            raise APIError(
                404,
                "this server has no chat template: start it with --chat_template=FILE, or with an "
                "--init_from=DIR that brings one in tokenizer_config.json or chat_template.jinja",
            )

        return

    @app.post(path, response_model=protocol.ChatCompletion, responses=STREAMED)
    async def chat_completions(body: protocol.ChatRequest, request: fastapi.Request):
        front.check(body, top_logprobs=(body.top_logprobs, front.config.max_logprobs))
        front.worker.check()  # its pages are counted once it is warm
        messages = [message.plain() for message in body.messages]
        try:
            prompt = await asyncio.to_thread(
                template.encode, messages, body.add_generation_prompt is not False
            )
            require(bool(prompt), "the chat template makes an empty prompt of these messages")
        except ValueError as e:
            raise APIError(400, str(e), param="messages") from e
        size = min(front.max_model_len, front.worker.stats.pages * front.config.engine.page_size)
        room = max(1, size - len(prompt))  # if there is none, the engine says it with its numbers
        return await front.generate(
            request, ChatSample, body, [prompt], partial(body.sampling_params, room)
        )


def add_tokens(app: fastapi.FastAPI, front: Front) -> None:
    """The vocabulary: /tokenize and /detokenize."""

    @app.post("/tokenize")
    async def tokenize(body: protocol.TokenizeRequest) -> protocol.Tokens:
        front.check_model(body.model)
        tokens = await front.encode(body.prompt)
        return protocol.Tokens(tokens=tokens, count=len(tokens), max_model_len=front.max_model_len)

    @app.post("/detokenize")
    async def detokenize(body: protocol.DetokenizeRequest) -> protocol.Text:
        front.check_model(body.model)
        if wrong := [t for t in body.tokens if t >= front.tokenizer.vocab_size]:
            raise APIError(
                400,
                f"tokens has token {wrong[0]}, and the vocabulary ends at {front.tokenizer.vocab_size - 1}",
                param="tokens",
            )
        return protocol.Text(prompt=front.tokenizer.decode(body.tokens))


def add_state(app: fastapi.FastAPI, front: Front) -> None:
    """How the server is: models, health, metrics, version, pool."""
    worker = front.worker

    @app.get("/v1/models")
    async def models() -> protocol.ModelList:
        card = protocol.ModelCard(
            id=front.config.model_name, created=front.started, max_model_len=front.max_model_len
        )
        return protocol.ModelList(data=[card])

    @app.get("/health")
    async def health() -> protocol.Health:
        worker.check()
        return protocol.Health()

    @app.get("/metrics", response_class=fastapi.responses.PlainTextResponse)
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(worker.metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> protocol.Version:
        return protocol.Version(version=VERSION, jax=jax.__version__)

    @app.get("/pool")
    async def pool() -> protocol.Pool:
        """Who holds which page of the KV cache, as of now."""
        stats, pages, names = await worker.ask(
            lambda engine: (
                engine.stats(),
                engine.snapshot(),
                {i: job.request_id for i, (job, _) in worker.jobs.items()},
            )
        )
        used = [
            protocol.Page(page=i, holders=holders, cached=cached)
            for i, (holders, cached) in enumerate(pages)
            if holders or cached
        ]
        return protocol.Pool(
            pages=len(pages),
            page_size=front.config.engine.page_size,
            running=stats.running,
            waiting=stats.waiting,
            requests=names,
            used=used,
        )


def add_page(app: fastapi.FastAPI) -> None:
    """A page to try the model on, and to watch the page pool."""
    html = (Path(__file__).parent / "serving" / "page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(
            html,
            headers={
                "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
                "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"
            },
        )


def add_error_form(app: fastapi.FastAPI) -> None:
    """Whatever goes wrong is answered in OpenAI's error form."""

    @app.exception_handler(APIError)
    async def api_error(request, e: APIError) -> Response:
        return e.response()

    @app.exception_handler(HTTPException)
    async def http_error(request, e: HTTPException) -> Response:
        return APIError(e.status_code, str(e.detail), headers=e.headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request, e: RequestValidationError) -> Response:
        return invalid_request(e.errors()).response()

    @app.exception_handler(Exception)
    async def failed(request, e: Exception) -> Response:  # the log has the traceback
        return APIError(500, "internal error").response()


def create_app(front: Front, template: ChatTemplate | None) -> fastapi.FastAPI:
    """All routes."""
    app = fastapi.FastAPI(
        title="JAX-nanoGPT-vLLM",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": protocol.Error}, "5XX": {"model": protocol.Error}},
    )
    add_error_form(app)
    add_completions(app, front)
    add_chat(app, front, template)
    add_tokens(app, front)
    add_state(app, front)
    add_page(app)
    return app


class Server(uvicorn.Server):
    """uvicorn's server, together with the engine's thread, and an end at which nothing admitted is lost."""

    def __init__(
        self,
        config: ServeConfig,
        make_engine: Callable[[], Engine],
        tokenizer: Tokenizer,
        max_model_len: int,
    ):
        metrics = Metrics(config.model_name)
        self.worker = Worker(make_engine, config, metrics)
        metrics.stats = lambda: self.worker.stats and (self.worker.stats, self.worker.queued)
        self.worker.on_death = lambda: setattr(self, "should_exit", True)
        app = create_app(
            Front(config, self.worker, tokenizer, max_model_len), load_template(config, tokenizer)
        )
        app = Gate(app, config.api_key, config.max_body_bytes)
        if config.cors_origins:
            app = CORSMiddleware(
                app,
                allow_origins=config.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id"],
            )
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        self.drain_timeout = config.drain_timeout

    async def serve(self, sockets: list[socket.socket]) -> None:
        """Returns after drain. Raises RuntimeError if the engine died; why it could not start, if it never was warm."""
        self.worker.start()
        await super().serve(sockets)
        self.worker.stop()
        await asyncio.to_thread(self.worker.join, 10)
        if self.worker.error and self.worker.stats:
            raise RuntimeError("the engine has died") from self.worker.error
        if self.worker.error:
            raise self.worker.error

    def capture_signals(self) -> contextlib.AbstractContextManager:
        return (
            contextlib.nullcontext()
        )  # uvicorn's would raise SIGTERM again at the end: no exit code 0

    def drain(self) -> None:
        """Admits nothing more and lets what runs finish, for drain_timeout; called again, it does not wait."""
        if self.worker.draining:
            self.should_exit = True
        self.worker.draining = True
        self.drained = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await asyncio.wait_for(self.worker.idle.wait(), self.drain_timeout)
        except TimeoutError:
            self.worker.fail_all(
                unavailable(
                    f"the server is shutting down, and drain_timeout={self.drain_timeout} s are over"
                )
            )
        self.should_exit = True


def main(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)
    sys.setswitchinterval(
        5e-4
    )  # seconds; by default the event loop waits 5 ms for a busy engine thread to give way
    config = dataclasses.replace(
        config, api_key=config.api_key or os.environ.get("NANOGPT_API_KEY")
    )
    model, tokenizer, _ = open_model(config)
    listener = socket.create_server(
        (config.host, config.port), family=socket.AF_INET6 if ":" in config.host else socket.AF_INET
    )
    log.info("serving %s at http://%s:%d", config.model_name, *listener.getsockname()[:2])

    async def run() -> None:
        make_engine = lambda: Engine(model, tokenizer, config.engine, progress=False)
        server = Server(config, make_engine, tokenizer, model.config.block_size)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, server.drain)
        await server.serve([listener])

    asyncio.run(run())
