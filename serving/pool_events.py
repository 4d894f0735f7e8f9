"""The pool of pages as server-sent events, for the page that shows it."""

import asyncio
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from serving.api_errors import APIError
from serving.served_model import ServedModel

SHORTEST_REST = 0.03
"""Seconds between two events. A small model makes hundreds of steps a second."""

REST_RATIO = 20
"""Rests are at least so many times as long as it took to write an event: a large pool makes long
ones."""

HEARTBEAT = 15.0
"""Seconds of silence after which a comment is sent, so that proxies keep the connection."""


async def pool_frames(model: ServedModel) -> AsyncIterator[bytes]:
    """Yield the pool as it is now and after each change, until the server ends.

    What changes during a rest is told in one event."""
    loop = asyncio.get_running_loop()
    previous = b""
    with model.worker.watching() as changed:
        while model.worker.problem() is None:
            changed.clear()
            try:
                pool = await model.pool()
            except (APIError, TimeoutError):
                return  # the server ends, or its engine hangs: the client asks /health
            began = loop.time()
            frame = b"data: " + pool.model_dump_json().encode() + b"\n\n"
            if frame != previous:
                yield frame
            previous = frame
            await asyncio.sleep(max(SHORTEST_REST, REST_RATIO * (loop.time() - began)))
            while not await is_set(changed, HEARTBEAT):
                yield b": nothing has changed\n\n"


async def is_set(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, and return whether it was within so many seconds."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True


def event_stream(frames: AsyncIterator[bytes]) -> StreamingResponse:
    """Return an answer whose events neither a cache nor nginx may hold back."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(frames, media_type="text/event-stream", headers=headers)
