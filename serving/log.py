"""The server's log on stderr: what it says of a request, and the two forms a line may have.

People at a terminal get short lines (TextLines), everybody else one JSON object a line (JSONLines).
Keys, prompts and answers are never logged.
"""

import dataclasses
import json
import logging
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("server")

POLLED_PATHS = ("/health", "/metrics", "/pool", "/pool/events")
"""Pages and load balancers ask for these every second or two: too often for the log."""


@dataclass
class RequestLog:
    """What the log will say of one request; each layer fills in what it learns."""

    request_id: str
    method: str
    path: str
    status: int | None = None
    """of the answer; None if the client left before there was one"""
    seconds: float | None = None
    """from the request's head to the last byte of the answer"""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None
    """what ended a stream that had begun"""

    def fields(self) -> dict[str, Any]:
        """Return what is known, by name; status is always there."""
        known = {
            name: value for name, value in dataclasses.asdict(self).items() if value is not None
        }
        return {"status": None} | known

    def sentence(self) -> str:
        """Return a short line for people."""
        parts = [f"{self.method} {self.path} {self.status or 'not answered'}"]
        if self.seconds is not None:
            parts.append(f"in {self.seconds:.2f} s")
        if self.completion_tokens is not None:
            parts.append(f"({self.prompt_tokens} prompt + {self.completion_tokens} new tokens)")
        if self.error is not None:
            parts.append(f"error: {self.error}")
        return " ".join(parts)


# Each request is a task of its own, with a context of its own: what gate.py sets here is seen by
# the routes of the same request only.
current_request: ContextVar[RequestLog] = ContextVar("current_request")


def log_request(request: RequestLog) -> None:
    """Write the line of a request that has ended."""
    level = logging.DEBUG if request.path in POLLED_PATHS else logging.INFO
    log.log(level, "request", extra={"request": request})


class JSONLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the fields of the request or the event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "event": record.getMessage(),
        }
        request = getattr(record, "request", None)
        if request is not None:
            line |= request.fields()
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """Short lines for people: the time of day and a sentence, with a traceback if there is one."""

    default_time_format = "%H:%M:%S"
    default_msec_format = None

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        request = getattr(record, "request", None)
        sentence = record.getMessage() if request is None else request.sentence()
        if record.levelno >= logging.WARNING:
            sentence = f"{record.levelname}: {sentence}"
        line = f"{self.formatTime(record)} {sentence}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def wants_text(log_format: str) -> bool:
    """Return whether ServeConfig.log_format asks for text on this stderr."""
    return log_format == "text" or (log_format == "auto" and sys.stderr.isatty())


def set_up_logging(log_format: str) -> None:
    """Send all warnings, and what the server has to say, to stderr in the form log_format names."""
    handler = logging.StreamHandler()
    handler.setFormatter(TextLines() if wants_text(log_format) else JSONLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(logging.INFO)
