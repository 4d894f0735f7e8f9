"""A user's mistake, as an exception that carries what it is about, and the checks that raise it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A user's mistake, told in one sentence that holds the numbers and the way out."""

    param: str | None
    """Name of the flag, config field or request field that is wrong, where there is one."""

    def __init__(self, sentence: str, param: str | None = None) -> None:
        super().__init__(sentence)
        self.param = param


class ContextLengthExceeded(UserError):
    """A prompt, with the tokens that shall follow it, does not fit the model's context.

    Clients recognise the mistake by OpenAI's words, with which the sentence begins, or by OpenAI's
    code, with which it ends."""

    code = "context_length_exceeded"

    def __init__(self, context: int, reason: str, param: str | None = None) -> None:
        """context: tokens that the model can take. reason: what exceeds it, and the way out."""
        super().__init__(
            f"This model's maximum context length is {context} tokens, and {reason} ({self.code})",
            param,
        )


def require(condition: bool, sentence: str, param: str | None = None) -> None:
    """Raise UserError(sentence, param) unless the condition holds."""
    if not condition:
        raise UserError(sentence, param)


def require_at_least(config: Any, least: float, *names: str) -> None:
    """Raise UserError unless each of those fields of the config is at least so large, or None."""
    for name in names:
        value = getattr(config, name)
        enough = value is None or value >= least
        require(enough, f"{name}={value} must be at least {least}", param=name)


def require_fraction(config: Any, *names: str) -> None:
    """Raise UserError unless each of those fields of the config is in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{name}={value} must be in [0, 1)", param=name)


def read_text(path: Path, param: str | None = None) -> str:
    """Return the text of a UTF-8 file that a user has named. Raises UserError if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: convert it first, with iconv", param) from error


@contextlib.contextmanager
def about_file(path: Path) -> Iterator[None]:
    """Inside, an OSError names the file: the system does so where one is opened, but not later."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
