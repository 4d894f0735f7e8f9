"""Conversations as tokens to learn from: what the assistant says is learned, all else is read.

Start with `encode_conversation`. Each token has a mark in a file beside the tokens, see
token_files.py. No JAX in here.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from errors import UserError, require
from tokenizer import Tokenizer
from training.token_files import BEGINS, LEARNED

Message = dict[str, str]
Render = Callable[[list[Message], bool], list[int]]
"""Returns the tokens of messages by a chat template; with True they end as an assistant's turn
begins."""

ROLES = ("system", "developer", "user", "assistant")
EVERY = 10
"""Without files to validate on, one of so many conversations validates."""


class MarkedTokens(NamedTuple):
    """A conversation's tokens, and a mark for each."""

    ids: list[int]
    marks: np.ndarray
    """uint8: BEGINS on the first token, LEARNED on what the assistant says."""


def read_conversations(files: Iterable[Path]) -> Iterator[tuple[str, list[Message]]]:
    """Yield where each conversation stands, FILE:LINE, and its messages. Raises UserError."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8: {error.reason}", param="input") from error
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                place = f"{file}:{number}"
                yield place, read_messages(line, place)


def read_messages(line: str, place: str) -> list[Message]:
    """Return the messages of a line of JSON. Raises UserError if it is no conversation."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}", param="input") from error
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f'{place} must be a conversation, {{"messages": [{{"role": ..., "content": ...}}, '
            "...]}",
            param="input",
        )
    for message in messages:
        require_message(message, place)
    require(
        any(message["role"] == "assistant" for message in messages),
        f"{place} has no message of the assistant, so there is nothing to learn",
        param="input",
    )
    return messages


def require_message(message: Any, place: str) -> None:
    """Raise UserError if this is no message: a role and a text, and nothing else."""
    require(
        isinstance(message, dict) and message.keys() == {"role", "content"},
        f"{place}: each message must have role and content, and nothing else",
        param="input",
    )
    require(
        message["role"] in ROLES and isinstance(message["content"], str),
        f"{place}: a role must be one of {', '.join(ROLES)}, and its content a text",
        param="input",
    )


def encode_conversation(
    messages: list[Message], render: Render, tokenizer: Tokenizer, place: str
) -> MarkedTokens:
    """Return a conversation's tokens as the model will see them when it is served.

    Learned are the tokens of each assistant's turn from where it begins to the token that ends it,
    so that the model learns to stop, too. Raises UserError if the template changes earlier turns
    when later ones come: then it is not clear what to learn."""
    ids = render(messages, False)
    marks = np.zeros(len(ids), np.uint8)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:number], True) if number else []
        after = render(messages[: number + 1], False)
        require(
            bool(before) and after[: len(before)] == before and ids[: len(after)] == after,
            f"{place}: the chat template writes the turns before message {number + 1} in another "
            "way than when they came: such a template cannot be learned from",
            param="init_from",
        )
        end = end_of_turn(after, len(before), tokenizer)
        marks[len(before) : end] |= LEARNED
    marks[0] |= BEGINS
    return MarkedTokens(ids, marks)


def end_of_turn(ids: list[int], start: int, tokenizer: Tokenizer) -> int:
    """Return where the turn that begins at `start` ends: after its last token that ends an answer
    or, if it has none, with ids. What a template writes behind that is not learned."""
    for position in range(len(ids) - 1, start - 1, -1):
        if ids[position] in tokenizer.stop_ids:
            return position + 1
    return len(ids)


def split_conversations(
    conversations: list[MarkedTokens], held_out: list[MarkedTokens]
) -> dict[str, list[MarkedTokens]]:
    """Return what trains and what validates: held_out or, if there are none, every tenth."""
    if held_out:
        return {"train": conversations, "val": held_out}
    return {
        "train": [c for i, c in enumerate(conversations) if i % EVERY != EVERY - 1],
        "val": conversations[EVERY - 1 :: EVERY],
    }
