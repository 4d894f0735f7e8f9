"""Serve a model over HTTP, as OpenAI's completions API: python server.py --out_dir=DIR

The routes, what stands in front of them, and how the process ends. The engine has a thread of its own: see worker.py.
"""

import config as configs

if __name__ == "__main__":  # flags first: --help and typos answer before JAX is loaded
    CONFIG = configs.parse(configs.ServeConfig)

import asyncio
import base64
import contextlib
import dataclasses
import hmac
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from itertools import islice
from pathlib import Path

import fastapi
import jax
import prometheus_client
import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import protocol
from config import ServeConfig
from engine import Engine, Logprobs, Output
from protocol import APIError, Choice, Completion, CompletionRequest, LogprobLists, Usage, refused, unavailable
from tokenizer import StreamDecoder, Tokenizer
from utils import open_model
from worker import Job, Metrics, Worker

VERSION = "0.1.0"
log = logging.getLogger("server")


class Sample:
    """One sample on its way out: what the engine brings becomes choices."""

    def __init__(self, body: CompletionRequest, tokenizer: Tokenizer, prompt: list[int], index: int):
        self.body, self.tokenizer, self.prompt, self.index = body, tokenizer, prompt, index
        self.tokens = -len(prompt) if body.echo else 0  # generated so far; echo brings the prompt's first
        self.decoder, self.offset = StreamDecoder(tokenizer), 0

    def choice(self, out: Output) -> Choice:
        self.tokens += len(out.token_ids)
        prompt = list(zip(self.prompt, out.prompt_logprobs or ()))  # on the first output, if asked for
        logprobs = prompt_logprobs = None
        if self.body.logprobs is not None:
            logprobs = self.lists((prompt if self.body.echo else []) + [(entry.token, entry) for entry in out.logprobs])
        if prompt and self.body.prompt_logprobs is not None:
            prompt_logprobs = [entry and {t: protocol.PromptLogprob(logprob=p, decoded_token=self.text(t))
                                          for t, p in likeliest(entry, self.body.prompt_logprobs).items()} for _, entry in prompt]
        return Choice(index=self.index, text=out.text, logprobs=logprobs, finish_reason=out.finish_reason,
                      prompt_logprobs=prompt_logprobs, token_ids=out.token_ids if self.body.return_token_ids else None)

    def lists(self, entries: list[tuple[int, Logprobs | None]]) -> LogprobLists:
        offsets = []
        for token, _ in entries:
            offsets.append(self.offset)
            self.offset += len(self.decoder.push([token]))
        tops = [entry and likeliest(entry, self.body.logprobs) for _, entry in entries]
        return LogprobLists(
            tokens=[self.text(token) for token, _ in entries], text_offset=offsets,
            token_logprobs=[entry and entry.logprob for _, entry in entries],
            top_logprobs=[top and {self.text(t): p for t, p in top.items()} for top in tops])

    def text(self, token: int) -> str:
        """Of one token, as OpenAI writes it: bytes that are no whole UTF-8 by their numbers."""
        text = self.tokenizer.token_bytes(token)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in text)


def likeliest(entry: Logprobs, k: int) -> dict[int, float]:
    """The k likeliest tokens, and the one that was taken."""
    return {**dict(islice(entry.top.items(), k)), entry.token: entry.logprob}


@contextlib.asynccontextmanager
async def attended(worker: Worker, job: Job, receive: Callable) -> AsyncIterator[None]:
    """Inside, the job fails as soon as its client goes away; at the end of it nothing of the job remains in the engine."""
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.fail(APIError(499, "the client has gone"))  # nginx's number for it; only the log sees it
    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        worker.end(job)


class EventStream(fastapi.responses.StreamingResponse):
    """Server-sent events from a job."""

    def __init__(self, events: AsyncIterator[str], worker: Worker, job: Job):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.worker, self.job = worker, job

    async def __call__(self, scope, receive, send) -> None:
        async with attended(self.worker, self.job, receive):
            await self.stream_response(send)


def create_app(config: ServeConfig, worker: Worker, tokenizer: Tokenizer, max_model_len: int) -> fastapi.FastAPI:
    """The routes."""
    app = fastapi.FastAPI(title="JAX-nanoGPT-vLLM", version=VERSION, docs_url=None, redoc_url=None,
                          responses={"4XX": {"model": protocol.Error}, "5XX": {"model": protocol.Error}})
    started = int(time.time())
    html = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    @app.exception_handler(APIError)
    async def api_error(request, e: APIError) -> Response:
        return e.response()

    @app.exception_handler(HTTPException)
    async def http_error(request, e: HTTPException) -> Response:
        return APIError(e.status_code, str(e.detail), headers=e.headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request, e: RequestValidationError) -> Response:
        first = e.errors()[0]
        name = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
        message = "there is no such parameter" if first["type"] == "extra_forbidden" else first["msg"]
        if first["loc"] == ("body",):
            message = "its body must be a JSON object, with the header Content-Type: application/json"
        return APIError(400, f"{name or 'the request'}: {message}", param=name).response()

    @app.exception_handler(Exception)
    async def failed(request, e: Exception) -> Response:  # the log has the traceback
        return APIError(500, "internal error").response()

    def check(name: str, value: int, limit: int) -> None:
        if value > limit:
            raise APIError(400, f"{name}: {value} asked for, and this server allows {limit}", param=name)

    def check_model(name: str | None) -> None:
        if name not in (None, config.model_name):
            raise APIError(404, f"there is no model {name!r} here, only {config.model_name!r}", param="model",
                           code="model_not_found")

    async def encode(text: str) -> list[int]:
        try:
            return await asyncio.to_thread(tokenizer.encode, text)  # a long one must not hold up the others
        except ValueError as e:
            raise APIError(400, str(e), param="prompt") from e

    @app.post("/v1/completions", response_model=Completion, responses={200: {"content": {"text/event-stream": {}}}})
    async def completions(body: CompletionRequest, request: fastapi.Request) -> Response | Completion:
        check_model(body.model)
        check("n", body.n or 1, config.max_n)
        check("logprobs", body.logprobs or 0, config.max_logprobs)
        check("prompt_logprobs", body.prompt_logprobs or 0, config.max_logprobs)
        check("stop", len(body.stop) if isinstance(body.stop, list) else 0, config.max_stop)
        if body.stream_options and not body.stream:
            raise APIError(400, "stream_options: only for stream=true", param="stream_options")
        try:
            params = body.sampling_params()
        except ValueError as e:
            raise refused(e) from e
        several = isinstance(body.prompt, list) and body.prompt and not isinstance(body.prompt[0], int)
        prompts = body.prompt if several else [body.prompt]
        check("prompt", len(prompts), config.max_prompts)
        prompts = [await encode(p) if isinstance(p, str) else p for p in prompts]

        job = Job(request.scope["log"]["request_id"], prompts, params, bool(body.stream))
        answer = partial(Completion, id=f"cmpl-{job.request_id}", model=config.model_name)
        samples = {(i, k): Sample(body, tokenizer, prompt, i * params.n + k)
                   for i, prompt in enumerate(prompts) for k in range(params.n)}

        def usage() -> Usage:
            prompt, completion = sum(map(len, prompts)), sum(s.tokens for s in samples.values())
            request.scope["log"].update(prompt_tokens=prompt, completion_tokens=completion)
            return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

        async def events() -> AsyncIterator[str]:
            try:
                while job.unfinished or job.outputs:
                    for prompt, out in await job.next():
                        choice = samples[prompt, out.index].choice(out)
                        if choice.text or choice.logprobs or choice.token_ids or choice.finish_reason:
                            yield f"data: {answer(choices=[choice]).model_dump_json()}\n\n"
                whole = usage()
                if body.stream_options and body.stream_options.include_usage:
                    yield f"data: {answer(choices=[], usage=whole).model_dump_json()}\n\n"
                yield "data: [DONE]\n\n"
            except APIError as e:
                request.scope["log"]["error"] = str(e)
                yield f"data: {e.body.model_dump_json()}\n\n"

        await worker.submit(job)
        if body.stream:
            return EventStream(events(), worker, job)
        async with attended(worker, job, request.receive):
            outputs = await job.next()
        choices = [samples[prompt, out.index].choice(out) for prompt, out in outputs]
        return answer(choices=sorted(choices, key=lambda c: c.index), usage=usage())

    @app.get("/v1/models")
    async def models() -> protocol.ModelList:
        card = protocol.ModelCard(id=config.model_name, created=started, max_model_len=max_model_len)
        return protocol.ModelList(data=[card])

    @app.post("/tokenize")
    async def tokenize(body: protocol.TokenizeRequest) -> protocol.Tokens:
        check_model(body.model)
        tokens = await encode(body.prompt)
        return protocol.Tokens(tokens=tokens, count=len(tokens), max_model_len=max_model_len)

    @app.post("/detokenize")
    async def detokenize(body: protocol.DetokenizeRequest) -> protocol.Text:
        check_model(body.model)
        if wrong := [t for t in body.tokens if t >= tokenizer.vocab_size]:
            raise APIError(400, f"tokens has token {wrong[0]}, and the vocabulary ends at {tokenizer.vocab_size - 1}",
                           param="tokens")
        return protocol.Text(prompt=tokenizer.decode(body.tokens))

    @app.get("/health")
    async def health() -> protocol.Health:
        if problem := worker.problem():
            raise unavailable(problem)
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
        stats, pages, names = await worker.ask(lambda engine: (
            engine.stats(), engine.snapshot(), {i: job.request_id for i, (job, _) in worker.jobs.items()}))
        used = [protocol.Page(page=i, holders=holders, cached=cached)
                for i, (holders, cached) in enumerate(pages) if holders or cached]
        return protocol.Pool(pages=len(pages), page_size=config.engine.page_size, running=stats.running, waiting=stats.waiting,
                             requests=names, used=used)

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        """A page to try the model on, and to watch the page pool."""
        return HTMLResponse(html, headers={"Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
                                           "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"})

    return app


class Gate:
    """The outermost layer: a request id that the answer carries, the API key, the size of the body, and a line in the log."""

    def __init__(self, app: fastapi.FastAPI, api_key: str | None, max_body_bytes: int):
        self.app, self.api_key, self.max_body_bytes = app, api_key, max_body_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        begin, headers = time.perf_counter(), dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(16)
        entry = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": None}
        scope["log"] = entry
        received = 0

        async def limited_receive() -> dict:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise HTTPException(413, f"the body has more than {self.max_body_bytes} bytes, which is the limit")
            return message

        async def send_with_id(message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if scope["path"] == "/health" or self.allows(headers.get(b"authorization", b"")):
                await self.app(scope, limited_receive, send_with_id)
            else:
                refusal = APIError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                                   headers={"WWW-Authenticate": 'Basic realm="the API key is the password", Bearer'})
                await refusal.response()(scope, receive, send_with_id)
        finally:
            entry["seconds"] = round(time.perf_counter() - begin, 4)
            often = scope["path"] in ("/health", "/metrics", "/pool")
            log.log(logging.DEBUG if often else logging.INFO, "request", extra={"entry": entry})

    def allows(self, authorization: bytes) -> bool:
        """Bearer KEY, or a browser's Basic with KEY as the password. Compared in constant time."""
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() == b"basic":
            with contextlib.suppress(ValueError):
                given = base64.b64decode(given).partition(b":")[2]
        return self.api_key is None or hmac.compare_digest(given, self.api_key.encode())


class Server(uvicorn.Server):
    """uvicorn's server, together with the engine's thread, and an end at which nothing admitted is lost."""

    def __init__(self, config: ServeConfig, make_engine: Callable[[], Engine], tokenizer: Tokenizer, max_model_len: int):
        metrics = Metrics(config.model_name)
        self.worker = Worker(make_engine, config, metrics)
        metrics.stats = lambda: self.worker.stats and (self.worker.stats, self.worker.queued)
        self.worker.on_death = lambda: setattr(self, "should_exit", True)
        app = Gate(create_app(config, self.worker, tokenizer, max_model_len), config.api_key, config.max_body_bytes)
        if config.cors_origins:
            app = CORSMiddleware(app, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"],
                                 expose_headers=["X-Request-Id"])
        super().__init__(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, server_header=False,
                                        timeout_graceful_shutdown=5))
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
        return contextlib.nullcontext()  # uvicorn's would raise SIGTERM again at the end: no exit code 0

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
            self.worker.fail_all(unavailable(f"the server is shutting down, and drain_timeout={self.drain_timeout} s are over"))
        self.should_exit = True


class JSONLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "event": record.getMessage(),
                **getattr(record, "entry", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def main(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)
    sys.setswitchinterval(5e-4)  # seconds; by default the event loop waits 5 ms for a busy engine thread to give way
    config = dataclasses.replace(config, api_key=config.api_key or os.environ.get("NANOGPT_API_KEY"))
    model, tokenizer, _ = open_model(config)
    listener = socket.create_server((config.host, config.port), family=socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    log.info("serving %s at http://%s:%d", config.model_name, *listener.getsockname()[:2])

    async def run() -> None:
        make_engine = lambda: Engine(model, tokenizer, config.engine, progress=False)
        server = Server(config, make_engine, tokenizer, model.config.block_size)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, server.drain)
        await server.serve([listener])
    asyncio.run(run())


if __name__ == "__main__":
    with configs.user_errors():
        main(CONFIG)
