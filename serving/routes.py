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
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from errors import UserError
from serving import protocol, status
from serving.api_errors import APIError, invalid_request, refused
from serving.chat import NO_CHAT_TEMPLATE
from serving.served_model import ServedModel

VERSION = "0.1.0"

# For the OpenAPI page: a 200 may also be a stream.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

# The page calls nobody but this server, and nobody may frame it.
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"
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
    return app


def add_completions(app: fastapi.FastAPI, model: ServedModel) -> None:
    """Add /v1/completions."""

    @app.post("/v1/completions", response_model=protocol.Completion, responses=STREAMED)
    async def completions(body: protocol.CompletionRequest) -> Response:
        return await model.complete(body)


def add_chat(app: fastapi.FastAPI, model: ServedModel) -> None:
    """Add /v1/chat/completions; without a template it says so, and is on no page."""
    path = "/v1/chat/completions"
    if model.template is None:
        add_refusal(app, path, NO_CHAT_TEMPLATE)
        return

    @app.post(path, response_model=protocol.ChatCompletion, responses=STREAMED)
    async def chat_completions(body: protocol.ChatRequest) -> Response:
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
        return await model.tokenize(body)

    @app.post("/detokenize")
    async def detokenize(body: protocol.DetokenizeRequest) -> protocol.Text:
        return await model.detokenize(body)


def add_model(app: fastapi.FastAPI, model: ServedModel) -> None:
    """Add what is served, and by what."""

    @app.get("/v1/models")
    async def models() -> protocol.ModelList:
        return protocol.ModelList(data=[model.card()])

    @app.get("/v1/models/{name:path}")  # a name may hold slashes
    async def retrieve_model(name: str) -> protocol.ModelCard:
        return model.card(name)

    @app.get("/version")
    async def version() -> status.Version:
        return status.Version(version=VERSION, jax=jax.__version__)


def add_state(app: fastapi.FastAPI, model: ServedModel) -> None:
    """Add how the server is: health, metrics, the pages of the KV cache."""

    @app.get("/health")
    async def health() -> status.Health:
        model.worker.require_ready()
        return status.Health()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        text = model.worker.metrics.text()
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/pool")
    async def pool() -> status.Pool:
        """Who holds which page of the KV cache, as of now."""
        return await model.pool()


def add_page(app: fastapi.FastAPI) -> None:
    """Add a page to try the model on, and to watch the page pool."""
    html = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY})
