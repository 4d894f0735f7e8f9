"""Turns: heavy work on the event loop, one piece after the other, with rests between them.

To parse a body of a megabyte, or to write the next part of a large answer, keeps the event loop
for milliseconds. When many do so at once, everything else must have its turn between them.
"""

import asyncio

LONGEST_REST = 0.1
"""Seconds. A piece of work that took longer than this was held up itself."""


class Turns:
    """Lets those who have heavy work to do go one after the other, in order of arrival.

    After each piece of work the others have the event loop for as long as it took. Belongs to one
    event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def take(self) -> None:
        """Return when the caller may work until it waits for something next."""
        await self._lock.acquire()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._rest, loop.time())

    def _rest(self, began: float) -> None:
        """Let the next one go after a rest. The loop calls this when the work is done."""
        loop = asyncio.get_running_loop()
        rest = min(loop.time() - began, LONGEST_REST)
        loop.call_later(rest, self._lock.release)
