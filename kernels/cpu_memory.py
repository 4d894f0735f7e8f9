"""How a Linux process holds its memory, where that costs a CPU time: start with `use_huge_pages`.

Both functions ask the C library for what makes a process faster and changes no number. Where the
system has no such thing they do nothing.
"""

import ctypes
import logging
import sys
from collections.abc import Iterable

import jax

log = logging.getLogger(__name__)

HUGE_PAGE = 2 << 20  # bytes
MADV_COLLAPSE = 25  # from Linux's mman.h; since Linux 6.1
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
LARGEST_INT = 2**31 - 1
NEIGHBOURS = 1 << 16  # bytes at most between arrays that count as one span


def use_huge_pages(arrays: Iterable[jax.Array]) -> int:
    """Let the system hold arrays of this CPU in pages of 2 MiB; return how many pages it moved.

    A read of memory needs the place of its page, and a processor knows that of some thousand pages:
    reading weights once a step from pages of 4 KiB takes some 15 % longer. Arrays that lie side by
    side share pages. They keep their addresses."""
    if sys.platform != "linux":
        return 0
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for start, end in spans(arrays):
        first = -(-start // HUGE_PAGE) * HUGE_PAGE
        for page in range(first, end // HUGE_PAGE * HUGE_PAGE, HUGE_PAGE):
            moved += libc.madvise(page, HUGE_PAGE, MADV_COLLAPSE) == 0
    log.debug("cpu_memory: %d huge pages", moved)
    return moved


def spans(arrays: Iterable[jax.Array]) -> list[tuple[int, int]]:
    """Return where arrays begin and end in memory, ascending; neighbours are one span."""
    merged: list[tuple[int, int]] = []
    for start, size in sorted((array.unsafe_buffer_pointer(), array.nbytes) for array in arrays):
        end = start + size
        if merged and start - merged[-1][1] <= NEIGHBOURS:
            start, _ = merged.pop()
        merged.append((start, end))
    return merged


def keep_freed_memory() -> None:
    """Let this process keep what it frees, instead of giving it back to the system.

    XLA asks for its temporary arrays anew at each call. glibc takes those above 32 MiB from the
    system and gives them back each time, and the system clears every page of them: with 64
    sequences in a step that took longer than the sampling itself."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, LARGEST_INT)
