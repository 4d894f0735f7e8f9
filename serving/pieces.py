"""JSON in pieces: an answer of many megabytes is never held as a whole, and never made in one go.

Start with json_fragments. Where a list is long, and its items are large, a writer of answers puts
an iterator in its place, which makes the items when they are written.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from pydantic_core import to_json

from serving.turns import Turns

PIECE_BYTES = 1 << 16
"""A piece has about so many bytes: a few milliseconds of work, and what a socket's buffer holds."""

ITEMS = 32
"""Items of a list that are made at a time: of the largest, with 20 logprobs each, about a piece."""


def json_fragments(value: Any) -> Iterator[bytes]:
    """Yield the JSON of value, which may be a pydantic model, bit by bit.

    An iterator in it becomes a list."""
    if isinstance(value, BaseModel):
        yield from _model_fragments(value)
    elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
        yield from _models_fragments(value)
    elif isinstance(value, (list, Iterator)):
        yield from _items_fragments(value)
    else:
        yield to_json(value, inf_nan_mode="null")


def _model_fragments(model: BaseModel) -> Iterator[bytes]:
    """Yield a model, whose fields may be long."""
    opening = b"{"
    for name, value in model:
        yield opening + to_json(name) + b":"
        yield from json_fragments(value)
        opening = b","
    yield b"}"


def _models_fragments(models: list[BaseModel]) -> Iterator[bytes]:
    """Yield a list of models, whose fields may be long."""
    opening = b"["
    for model in models:
        yield opening
        yield from _model_fragments(model)
        opening = b","
    yield b"]"


def _items_fragments(items: Iterable[Any]) -> Iterator[bytes]:
    """Yield a list of small items, ITEMS at a time."""
    remaining = iter(items)
    opening = b"["
    while batch := list(islice(remaining, ITEMS)):
        yield opening + to_json(batch, inf_nan_mode="null")[1:-1]
        opening = b","
    yield b"[]" if opening == b"[" else b"]"


def joined(fragments: Iterable[bytes]) -> Iterator[bytes]:
    """Yield fragments joined to pieces of PIECE_BYTES or a little more; the last may be shorter."""
    piece = bytearray()
    for fragment in fragments:
        piece += fragment
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


async def in_turns(pieces: Iterable[bytes], turns: Turns) -> AsyncIterator[bytes]:
    """Yield pieces, with room for everybody else's work after each that is not short."""
    for piece in pieces:
        yield piece
        if len(piece) >= PIECE_BYTES:
            await turns.take()


def json_response(value: Any, turns: Turns) -> Response:
    """Return value as an answer; a long one is made while it is sent."""
    pieces = joined(json_fragments(value))
    first = next(pieces)
    second = next(pieces, None)
    if second is None:
        return Response(first, media_type="application/json")
    remaining = in_turns(chain([first, second], pieces), turns)
    return StreamingResponse(remaining, media_type="application/json")
