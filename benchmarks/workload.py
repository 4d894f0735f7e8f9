"""Jobs: lists of requests of random lengths, and how they fill padded batches.

What `bench.py generate` and its contenders share, and in part `bench.py serve`.
"""

from typing import Any, NamedTuple

import numpy as np

from errors import require

Range = tuple[int, int]  # the fewest and the most, both included


def require_ranges(config: Any, *names: str) -> None:
    """Raise UserError unless those fields of the config are ranges of positive numbers."""
    for name in names:
        low, high = getattr(config, name)
        require(
            1 <= low <= high,
            f"{name}={low} {high}: the first must be at least 1, the second no less than it",
            param=name,
        )


def random_length(rng: np.random.Generator, bounds: Range) -> int:
    """Draw a number of tokens, every one in the range as likely as the others."""
    low, high = bounds
    return int(rng.integers(low, high, endpoint=True))


class Request(NamedTuple):
    """A prompt, and how many tokens are to follow it."""

    prompt: list[int]
    output_tokens: int


def total_output(requests: list[Request]) -> int:
    """Return how many tokens a job asks for."""
    return sum(request.output_tokens for request in requests)


class Batch(NamedTuple):
    """Prompts that run together, and the tokens of the longest output, which all wait for."""

    prompts: list[list[int]]
    longest_output: int


def batches_of(requests: list[Request], size: int) -> list[list[Request]]:
    """Cut a job into groups of `size` requests, in their order; the last may be smaller."""
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def padded_batches(requests: list[Request], size: int) -> list[Batch]:
    """Return the batches that a generate without continuous batching makes of a job."""
    return [
        Batch([r.prompt for r in batch], max(r.output_tokens for r in batch))
        for batch in batches_of(requests, size)
    ]


def dense_utilization(requests: list[Request], size: int) -> float:
    """Return the share of a dense cache's slots that hold tokens of unfinished rows.

    Its rows are as long as the batch's longest prompt and longest output together; the share is
    a mean over the steps of all batches."""
    shares = []
    for batch in batches_of(requests, size):
        prompts = np.array([len(r.prompt) for r in batch])
        outputs = np.array([r.output_tokens for r in batch])
        slots = len(batch) * (prompts.max() + outputs.max())
        for step in range(outputs.max()):
            unfinished = outputs > step
            shares.append((prompts + step)[unfinished].sum() / slots)
    return float(np.mean(shares))
