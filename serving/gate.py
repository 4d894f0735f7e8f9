"""The outermost layer of the server: request ids, the API key, the size of bodies; and the log."""

import base64
import contextlib
import hmac
import json
import logging
import re
import secrets
import time

import fastapi
from starlette.exceptions import HTTPException

from serving.protocol import APIError

log = logging.getLogger("server")


class Gate:
    """The outermost layer: a request id that the answer carries, the API key, the size of the body, and a line in the log."""

    def __init__(self, app: fastapi.FastAPI, api_key: str | None, max_body_bytes: int):
        self.app, self.api_key, self.max_body_bytes = app, api_key, max_body_bytes

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        begin, headers = time.perf_counter(), dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = (
            given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(16)
        )
        entry = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": None,
        }
        scope["log"] = entry
        received = 0

        async def limited_receive() -> dict:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise HTTPException(
                    413, f"the body has more than {self.max_body_bytes} bytes, which is the limit"
                )
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
                # A browser asks for a password; Chromium does not if Bearer is offered, too.
                refusal = APIError(
                    401,
                    "a valid API key is needed: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": 'Basic realm="the API key is the password"'},
                )
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


class JSONLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "event": record.getMessage(),
            **getattr(record, "entry", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
