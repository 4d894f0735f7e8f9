"""The heaviest requests that a server reads or answers; heavy_load.py and soak.py send them."""

import json
from typing import NamedTuple

COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"
ALTERNATIVES = 20  # the most per position
MOST_PROMPTS = 16  # more would not find room in the queue of the server that soak.py starts
NEW_TOKENS = 8


class Limits(NamedTuple):
    """What a server allows. The values are ServeConfig's defaults and the context of a model."""

    body_bytes: int = 2**20
    logprobs: int = 2**18
    context: int = 1024


class Heavy(NamedTuple):
    """A request."""

    path: str
    body: str
    """JSON"""


def heavy(path: str, **body: object) -> Heavy:
    """Return a request with a body without spaces."""
    return Heavy(path, json.dumps(body, separators=(",", ":")))


def long_completions(limits: Limits) -> list[Heavy]:
    """Return bodies of nearly the longest, each of which is much work of another kind."""
    room = limits.body_bytes - 200  # for the names of the fields
    text = ("the approach is naive " * room)[:room]
    ids = [1] * (room // 2)
    named_numbers = {f"x{number}": 0 for number in range(room // 12)}
    biases = dict.fromkeys(range(room // 12), 0)
    return [
        heavy(COMPLETIONS, prompt=text),
        heavy(COMPLETIONS, prompt="a" * room),
        heavy(COMPLETIONS, prompt=ids),
        heavy(COMPLETIONS, prompt=[*ids[4:], "a"]),
        heavy(COMPLETIONS, prompt=[[1]] * (room // 4)),
        heavy(COMPLETIONS, prompt=[{}] * (room // 3)),
        heavy(COMPLETIONS, prompt="a", logit_bias=biases),
        heavy(COMPLETIONS, prompt="a", **named_numbers),
        heavy("/tokenize", prompt=text),
        heavy("/detokenize", tokens=ids),
    ]


def long_chats(limits: Limits) -> list[Heavy]:
    """Return chats of nearly the longest bodies."""
    room = limits.body_bytes - 200
    one = {"role": "user", "content": "x" * room}
    many = [{"role": "user", "content": "x"}] * (room // 35)
    return [heavy(CHATS, messages=[one]), heavy(CHATS, messages=many)]


def large_completions(limits: Limits) -> list[Heavy]:
    """Return requests whose answers have nearly the most logprobs."""
    positions = limits.logprobs // (ALTERNATIVES + 1)
    prompt = [3 + number % 20 for number in range(limits.context - NEW_TOKENS)]
    prompts = max(1, min(MOST_PROMPTS, positions // limits.context))
    n = positions // (prompts * limits.context)
    scores = {"prompt_logprobs": ALTERNATIVES, "max_tokens": 1}
    many = {"prompt": [prompt] * prompts, "n": min(16, n)}
    few = {"prompt": [prompt] * max(1, prompts // 4), "n": min(16, 4 * n)}
    echo = {"logprobs": ALTERNATIVES, "echo": True, "max_tokens": NEW_TOKENS}
    return [
        heavy(COMPLETIONS, **many, **scores),
        heavy(COMPLETIONS, **few, **scores),
        heavy(COMPLETIONS, **many, stream=True, **scores),
        heavy(COMPLETIONS, **many, **echo),
    ]


def large_chats(limits: Limits) -> list[Heavy]:
    """Return chats whose answers have nearly the most logprobs."""
    new_tokens = limits.context - 100
    n = limits.logprobs // (ALTERNATIVES + 1) // new_tokens
    messages = [{"role": "user", "content": "a"}]
    scores = {"logprobs": True, "top_logprobs": ALTERNATIVES, "max_tokens": new_tokens}
    return [heavy(CHATS, messages=messages, n=min(16, n), **scores)]
