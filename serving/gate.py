"""What stands in front of the routes: request ids, the API key, the size of bodies, the log.

Gate is plain ASGI (https://asgi.readthedocs.io): it wraps the channels that bring the request's
body and take the answer. It must not buffer either: answers are streamed.
"""

import base64
import contextlib
import hmac
import re
import secrets
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api_errors import APIError
from serving.log import RequestLog, current_request, log_request
from serving.turns import Turns

LARGE_BODY = 1 << 15
"""Bytes of a body that takes more than a millisecond to parse."""


class Gate:
    """An ASGI layer: gives each request an id and a line in the log, asks for the API key, and
    limits the body's size."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        max_body_bytes: int,
        turns: Turns | None = None,
    ) -> None:
        """turns: shared with others who have heavy work to do on the same event loop."""
        self.app = app
        self.turns = turns or Turns()
        self.api_key = api_key
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; other kinds of connections (websockets) are let go."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        request = RequestLog(choose_request_id(headers), scope["method"], scope["path"])
        current_request.set(request)
        begin = time.perf_counter()
        try:
            await self._admit(scope, headers, receive, tag_answer(send, request))
        finally:
            request.seconds = round(time.perf_counter() - begin, 4)
            log_request(request)

    async def _admit(self, scope: Scope, headers: dict, receive: Receive, send: Send) -> None:
        """Let the request through to the app if it shows the key; /health needs none."""
        if scope["path"] == "/health" or self._allows(headers.get(b"authorization", b"")):
            await self.app(scope, limit_body(receive, self.max_body_bytes, self.turns), send)
            return
        # A browser asks for a password; Chromium does not if Bearer is offered, too.
        refusal = APIError(
            401,
            "a valid API key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": 'Basic realm="the API key is the password"'},
        )
        await refusal.response()(scope, receive, send)

    def _allows(self, authorization: bytes) -> bool:
        """Return whether the header shows the key: as Bearer KEY, or as the password of Basic,
        which is how browsers send it. Compares in constant time."""
        if self.api_key is None:
            return True
        scheme, _, given_key = authorization.partition(b" ")
        if scheme.lower() == b"basic":
            with contextlib.suppress(ValueError):
                user_and_password = base64.b64decode(given_key)
                given_key = user_and_password.partition(b":")[2]
        return hmac.compare_digest(given_key, self.api_key.encode())


def choose_request_id(headers: dict[bytes, bytes]) -> str:
    """Return the client's X-Request-Id or, if it sent none that is safe to log, a random one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    is_safe = re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII)
    return given if is_safe else secrets.token_hex(16)


def limit_body(receive: Receive, max_bytes: int, turns: Turns) -> Receive:
    """Return a receive that raises HTTPException 413 once the body has more than max_bytes.

    The end of a large body comes in a turn of its own: who receives it will parse the body."""
    received = 0

    async def limited_receive() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise HTTPException(
                413, f"the body has more than {max_bytes} bytes, which is the limit"
            )
        is_end = message["type"] == "http.request" and not message.get("more_body", False)
        if is_end and received >= LARGE_BODY:
            await turns.take()
        return message

    return limited_receive


def tag_answer(send: Send, request: RequestLog) -> Send:
    """Return a send that adds X-Request-Id to the answer, and notes its status for the log."""
    id_header = (b"x-request-id", request.request_id.encode())

    async def tagging_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            request.status = message["status"]
            message["headers"] = [*message["headers"], id_header]
        await send(message)

    return tagging_send
