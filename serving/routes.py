"""What the server answers: the routes, and errors in OpenAI's form. Start with create_app.

A route says what comes in and what goes out; ServedModel does the work.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastapi
import jax
import prometheus_client
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

from errors import UserError
from serving import protocol, status
from serving.api_errors import APIError, invalid_request, refused
from serving.chat import NO_CHAT_TEMPLATE
from serving.descriptions import describe
from serving.pool_events import event_stream, pool_frames
from serving.served_model import ServedModel

VERSION = "0.1.0"

# For the OpenAPI page: a 200 may also be a stream.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

PAGE_DIRECTORY = Path(__file__).parent / "page"
PAGE_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

# The page calls nobody but this server, and nobody may frame it.
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'self'; style-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def answer_api_error(request: fastapi.Request, error: APIError) -> Response:
    """Return the answer that the error is."""
    return error.response()


async def answer_user_error(request: fastapi.Request, error: UserError) -> Response:
    """Return a 400 for what SamplingParams, a limit or the engine refuses."""
    return refused(error).response()


async def answer_http_error(request: fastapi.Request, error: HTTPException) -> Response:
    """Return the answer for what Starlette refuses: an unknown path, a wrong method, ..."""
    headers = dict(error.headers or {})
    return APIError(error.status_code, str(error.detail), headers=headers).response()


async def answer_validation_error(
    request: fastapi.Request, error: RequestValidationError
) -> Response:
    """Return a 400 for a body that protocol.py does not allow."""
    response = invalid_request(error.errors()).response()
    # FastAPI's frames refer to the error, and the error to them: without this, a body of many
    # megabytes of small objects would stay until the garbage collector finds it.
    error.__traceback__ = None
    return response


async def answer_failure(request: fastapi.Request, error: Exception) -> Response:
    """Return a 500 that tells nothing of the inside; the log has the traceback."""
    return APIError(500, "internal error").response()


ERROR_ANSWERS: dict[int | type[Exception], Callable[[fastapi.Request, Any], Any]] = {
    APIError: answer_api_error,
    UserError: answer_user_error,
    HTTPException: answer_http_error,
    RequestValidationError: answer_validation_error,
    Exception: answer_failure,
}


def create_app(model: ServedModel) -> fastapi.FastAPI:
    """Return the application with all routes."""
    app = fastapi.FastAPI(
        title="JAX-nanoGPT-vLLM",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        exception_handlers=ERROR_ANSWERS,
        responses={"4XX": {"model": protocol.Error}, "5XX": {"model": protocol.Error}},
    )
    add_completions(app, model)
    add_chat(app, model)
    add_tokens(app, model)
    add_model(app, model)
    add_state(app, model)
    add_page(app)
    describe_fields(app)
    return app


def describe_fields(app: fastapi.FastAPI) -> None:
    """Let /openapi.json say of every field what it does."""
    make_schema = app.openapi

    def described() -> dict[str, Any]:
        schema = make_schema()
        describe(schema)
        return schema

    app.openapi = described  # type: ignore[method-assign]  # as FastAPI documents it


def add_completions(app: fastapi.FastAPI, model: ServedModel) -> None:
    """Add /v1/completions."""

    @app.post("/v1/completions", response_model=protocol.Completion, responses=STREAMED)
    async def completions(body: protocol.CompletionRequest) -> Response:
        """Continue one prompt or several."""
        return await model.complete(body)


def add_chat(app: fastapi.FastAPI, model: ServedModel) -> None:
    """Add /v1/chat/completions; without a template it says so, and is on no page."""
    path = "/v1/chat/completions"
    if model.template is None:
        add_refusal(app, path, NO_CHAT_TEMPLATE)
        return

    @app.post(path, response_model=protocol.ChatCompletion, responses=STREAMED)
    async def chat_completions(body: protocol.ChatRequest) -> Response:
        """Answer a conversation with the assistant's next turn."""
        return await model.chat(body)


def add_refusal(app: fastapi.FastAPI, path: str, sentence: str) -> None:
    """Add a route that answers 404 and the reason, whatever it is sent."""

    @app.post(path, include_in_schema=False)
    async def refuse() -> None:
        raise APIError(404, sentence)


def add_tokens(app: fastapi.FastAPI, model: ServedModel) -> None:
    """Add the vocabulary: /tokenize and /detokenize."""

    @app.post("/tokenize", response_model=protocol.Tokens)
    async def tokenize(body: protocol.TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation as the model would see it."""
        return await model.tokenize(body)

    @app.post("/detokenize")
    async def detokenize(body: protocol.DetokenizeRequest) -> protocol.Text:
        """Text of token ids."""
        return await model.detokenize(body)


def add_model(app: fastapi.FastAPI, model: ServedModel) -> None:
    """Add what is served, and by what."""

    @app.get("/v1/models")
    async def models() -> protocol.ModelList:
        """What is served."""
        return protocol.ModelList(data=[model.card()])

    @app.get("/v1/models/{name:path}")  # a name may hold slashes
    async def retrieve_model(name: str) -> protocol.ModelCard:
        """The model of this name."""
        return model.card(name)

    @app.get("/version")
    async def version() -> status.Version:
        """Versions of the server and of JAX."""
        return status.Version(version=VERSION, jax=jax.__version__)


def add_state(app: fastapi.FastAPI, model: ServedModel) -> None:
    """Add how the server is: health, metrics, the pages of the KV cache."""

    @app.get("/health")
    async def health() -> status.Health:
        """200 when a request sent now would be served, else 503 with the reason."""
        model.worker.require_ready()
        return status.Health()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters and histograms for Prometheus, under vLLM's names."""
        text = model.worker.metrics.text()
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/pool")
    async def pool() -> status.Pool:
        """Who holds which page of the KV cache, as of now."""
        return await model.pool()

    @app.get("/pool/events", response_model=status.Pool, responses=STREAMED)
    async def pool_events() -> Response:
        """Who holds which page, as server-sent events: now, and after each change."""
        model.worker.require_ready()
        return event_stream(pool_frames(model))


def add_page(app: fastapi.FastAPI) -> None:
    """Add a page to try the model on and to watch the page pool, and one that explains the API.

    All of their files are read now, so that a path can name no other."""
    contents = {path.name: path.read_bytes() for path in PAGE_DIRECTORY.iterdir()}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_file(contents, "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page_file(contents, "docs.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return page_file(contents, name)


def page_file(contents: dict[str, bytes], name: str) -> Response:
    """Return a file of the page. Raises APIError 404 if there is none of this name.

    The browser asks each time whether it is still the newest, because it has no version."""
    media_type = PAGE_MEDIA_TYPES.get(Path(name).suffix)
    if name not in contents or media_type is None:
        raise APIError(404, f"the page has no file {name!r}")
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
    return Response(contents[name], media_type=media_type, headers=headers)
