"""Errors as answers in OpenAI's form: raise APIError anywhere in a request, and that is the answer.

A user's mistake that the engine or SamplingParams finds is a UserError, and becomes one by
`refused`; what pydantic finds wrong with a body, by `invalid_request`.
"""

from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response

from errors import ContextLengthExceeded
from serving.protocol import Error, ErrorDetail

MAX_CHARACTERS = 2000
"""An error may quote what the client sent, but not a megabyte of it."""


class APIError(Exception):
    """An answer in OpenAI's error form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """param: the request's field that is wrong. code: OpenAI's word for what has happened."""
        super().__init__(message)
        self.status = status
        self.headers = headers
        detail = ErrorDetail(
            message=printable(message),
            type=error_type(status),
            param=None if param is None else printable(param),
            code=code,
        )
        self.body = Error(error=detail)

    def response(self) -> Response:
        """Return the answer."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def error_type(status: int) -> str:
    """Return OpenAI's name for the kind of error that a status code tells."""
    if status >= 500:
        return "server_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error"


def printable(text: str) -> str:
    """Return text cut to MAX_CHARACTERS, so that UTF-8 has bytes for all of it: JSON may hold
    half a surrogate pair, which becomes an escape such as \\ud800."""
    return text.encode("utf-8", "backslashreplace").decode()[:MAX_CHARACTERS]


def unavailable(message: str) -> APIError:
    """Return a 503: the request may be sent again, here or to another replica."""
    return APIError(503, message, headers={"Retry-After": "1"})


def refused(error: ValueError) -> APIError:
    """Return a 400 with the error's sentence and, of a UserError, the parameter it is about.

    Clients that shorten a prompt and try again recognise by the code that they should."""
    code = error.code if isinstance(error, ContextLengthExceeded) else None
    return APIError(400, str(error), param=getattr(error, "param", None), code=code)


def invalid_request(errors: Sequence[Any]) -> APIError:
    """Return a 400 from what pydantic has found wrong: its list of {"loc", "msg", "type"}.

    Where several types are allowed (texts or token ids), pydantic reports each attempt; the one
    that came closest found nothing wrong but the length, or went deepest."""
    nearest = max(errors, key=lambda error: (error["type"] == "too_long", len(error["loc"])))
    path = field_path(nearest["loc"])
    names = [part for part in path if isinstance(part, str)]
    where = written_path(path) or "the request"
    message = nearest["msg"]
    if nearest["type"] == "extra_forbidden":
        message = "there is no such parameter"
    if nearest["loc"] == ("body",):
        message = "its body must be a JSON object, with the header Content-Type: application/json"
    return APIError(400, f"{where}: {message}", param=names[0] if names else None)


def field_path(loc: tuple[str | int, ...]) -> list[str | int]:
    """Return where in the request's body an error is: names of fields and indices of lists.

    pydantic's loc begins with "body", and has an entry for each of several allowed types that it
    tried, as in ("body", "prompt", "list[int]", 0)."""
    return [part for part in loc[1:] if not is_type_name(part)]


def is_type_name(part: str | int) -> bool:
    """Return whether an entry of pydantic's loc is a type that was tried, not a field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "ToolChoice"))


def written_path(path: list[str | int]) -> str:
    """Return the path as one writes it, such as messages[0].content."""
    written = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return written.removeprefix(".")
