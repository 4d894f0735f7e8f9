"""Tests of what a server does with the heaviest requests: they must not hold up the others.

Nothing is timed here: heavy_load.py does that. These tests look at what makes the difference.
"""

import asyncio
import gc
import json
import threading
import time
import weakref
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

import server as server_program
from config import EngineConfig
from running_server import TOKENIZER
from serving import protocol
from serving.pieces import ITEMS, PIECE_BYTES, in_turns, joined, json_fragments
from serving.request_model import MAX_ITEMS
from serving.routes import answer_validation_error
from serving.served_model import LONG_TEXT, SHORT_TEXT
from serving.turns import Turns

pytestmark = pytest.mark.slow

pytest_plugins = ["server_fixtures"]


# Large answers are made in pieces.


class Part(BaseModel):
    """A model with a list that may be an iterator instead."""

    name: str
    items: list[Any]
    missing: None = None


class Whole(BaseModel):
    """A model with models in it."""

    parts: list[Part]
    numbers: list[int]
    nothing: list[int]


ITEM_LISTS = [[], [None], [{"a€": -1.5}, {1: "\n"}], list(range(3 * ITEMS + 1))]


def test_pieces_are_the_same_json():
    """Catches: a comma too many, an empty list lost, a number or a character written otherwise."""
    parts = [Part(name=str(number), items=items) for number, items in enumerate(ITEM_LISTS)]
    whole = Whole(parts=parts, numbers=list(range(1000)), nothing=[])
    lazy_parts = [part.model_copy(update={"items": iter(part.items)}) for part in parts]
    lazy = whole.model_copy(update={"parts": lazy_parts})
    expected = whole.model_dump_json().encode()
    assert b"".join(json_fragments(whole)) == expected
    assert b"".join(joined(json_fragments(lazy))) == expected


def test_nobody_waits_for_a_large_answer():
    """Catches: an answer that is made as a whole before its first byte is sent, and pieces
    between which nobody else has a turn."""
    made = []
    ticks = []

    def items():
        for number in range(10_000):
            made.append(number)
            yield "x" * 100

    async def tick() -> None:
        while True:
            ticks.append(len(made))
            await asyncio.sleep(0)

    async def scenario() -> None:
        ticker = asyncio.create_task(tick())
        pieces = joined(json_fragments(Part.model_construct(name="", items=items())))
        sizes = [len(piece) async for piece in in_turns(pieces, Turns())]
        ticker.cancel()
        assert len(sizes) > 10
        assert max(sizes) < 2 * PIECE_BYTES
        # The first two pieces may follow each other, because nobody has been at work before.
        assert len(set(ticks)) >= len(sizes) - 2, "others had no turn between some pieces"

    asyncio.run(scenario())
    assert len(made) == 10_000


def test_heavy_work_goes_one_after_the_other():
    """Catches: heavy work of many in one turn of the loop, a queue that stops when one of those who
    wait in it goes away."""
    order = []

    async def work(name: str, turns: Turns) -> None:
        await turns.take()
        order.append(name)

    async def scenario() -> None:
        turns = Turns()
        tasks = [asyncio.create_task(work(name, turns)) for name in "abc"]
        await asyncio.sleep(0)
        assert order == ["a"]
        tasks[1].cancel()
        await asyncio.wait(tasks)

    asyncio.run(scenario())
    assert order == ["a", "c"]


def test_heavy_work_leaves_as_much_time_as_it_takes():
    """Catches: heavy work that follows heavy work without a rest, so that a request that needs
    several turns of the loop waits for one of them in each."""
    seconds = 0.05
    begins = []

    async def work(turns: Turns) -> None:
        await turns.take()
        begins.append(time.monotonic())
        time.sleep(seconds)  # it is heavy

    async def scenario() -> None:
        turns = Turns()
        await asyncio.gather(work(turns), work(turns))

    asyncio.run(scenario())
    assert begins[1] - begins[0] >= 1.9 * seconds


def test_large_answer_over_http(server):
    """Catches: pieces that are lost on their way, an answer that its client cannot read."""
    body = {"prompt": ["x" * 115] * 8, "max_tokens": 1, "prompt_logprobs": 20}
    assert server.complete(**body)["usage"]["prompt_tokens"] == 8 * 115
    response = server.post(**body)
    assert len(response.content) > 8 * PIECE_BYTES
    answer = protocol.Completion.model_validate_json(response.content)
    for choice in answer.choices:
        assert choice.prompt_logprobs[0] is None
        assert {len(entry) for entry in choice.prompt_logprobs[1:]} <= {20, 21}


# Answers have a limit.


def test_limit_of_logprobs(server):
    """Catches: an answer that fills the memory, a limit that is one off or forgets a factor, a
    refusal that comes after the work or without the numbers."""
    limit = server.config.max_total_logprobs
    exact = {"prompt": [[1] * 20] * 2, "n": 5, "max_tokens": 90, "prompt_logprobs": 9}
    exact["logprobs"] = 19
    assert 2 * 5 * (20 * 10 + 90 * 20) == limit
    assert server.post(**exact).status_code == 200
    before = server.worker.stats
    for name, value in (
        ("prompt", [[1] * 20] * 3),
        ("prompt", [[1] * 20, [1] * 21]),
        ("n", 6),
        ("max_tokens", 91),
        ("prompt_logprobs", 10),
        ("logprobs", 20),
    ):
        response = server.post(**exact | {name: value}, stream=True)
        assert response.status_code == 400, name
        error = response.json()["error"]
        assert error["param"] == "prompt_logprobs"
        assert f" {limit}" in error["message"]
    assert f" {2 * 5 * (20 * 10 + 90 * 21)} " in error["message"]
    assert server.worker.stats == before, "something was computed"
    assert server.worker.queued == 0
    chat = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "n": 16}
    error = server.post("/v1/chat/completions", **chat, top_logprobs=20).json()["error"]
    assert error["param"] == "logprobs"


def test_limit_of_all_open_answers(server):
    """Catches: many large answers at once that fill the memory together, among them those whose
    readers are slow; small ones that are refused with them."""
    large = {"prompt": ["x" * 115] * 8, "max_tokens": 1, "prompt_logprobs": 20}
    with server.standing():
        clients = [server.connection({**large, "prompt": "x" * 115, "n": 8}) for _ in range(8)]
        server.until(lambda: len(server.worker.open_jobs) == 8, "arrived")
        refused = server.post(**large)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) > 0
    assert server.complete(prompt="a", max_tokens=1)
    server.until(lambda: server.worker.stats.running == 0, "computed")
    assert server.post(**large).status_code == 429, "the answers have not been read"
    for client in clients:
        client.close()
    server.until(lambda: not server.worker.open_jobs, "ended")
    assert server.post(**large).status_code == 200


# Long prompts are not encoded for nothing, and not on the event loop.


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/v1/completions", {"prompt": "a" * 90_000}, "prompt"),
        ("/v1/completions", {"prompt": ["b", "a" * 90_000]}, "prompt"),
        ("/v1/completions", {"prompt": [1] * 30_000}, "prompt"),
        ("/v1/completions", {"prompt": [[2], [1] * 30_000]}, "prompt"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a" * 90_000}]},
            "messages",
        ),
    ],
)
def test_what_cannot_fit_is_not_encoded(server, monkeypatch, path, body, param):
    """Catches: a prompt of a megabyte that is encoded or brought to the engine to be refused."""

    def refuse(*_):
        raise AssertionError("it was encoded")

    monkeypatch.setattr(TOKENIZER, "encode", refuse)
    monkeypatch.setattr(server.worker, "submit", refuse)
    response = server.post(path, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "128" in error["message"]


@pytest.mark.parametrize("size, thread", [(SHORT_TEXT // 2, "Thread"), (SHORT_TEXT * 2, "encoder")])
def test_where_texts_are_encoded(server, monkeypatch, size, thread):
    """Catches: long texts that are encoded on the event loop, or short ones that wait for them."""
    encode = TOKENIZER.encode
    threads = []

    def noted_encode(text: str) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(text)

    monkeypatch.setattr(TOKENIZER, "encode", noted_encode)
    assert server.post("/tokenize", prompt="a" * size).json()["count"] == size
    [name] = threads
    assert name.startswith(thread)


def test_long_texts_keep_no_others_waiting(server, monkeypatch):
    """Catches: a text of ordinary length that waits for texts of a megabyte."""
    encode = TOKENIZER.encode
    may_go_on = threading.Event()

    def slow_encode(text: str) -> list[int]:
        assert len(text) <= LONG_TEXT or may_go_on.wait(60)
        return encode(text)

    monkeypatch.setattr(TOKENIZER, "encode", slow_encode)
    model = server_program.ServedModel(server.config, server.worker, TOKENIZER, 128)

    async def scenario() -> None:
        long = [asyncio.create_task(model._encode(["a" * (LONG_TEXT + 1)])) for _ in range(4)]
        await asyncio.wait_for(model._encode(["a" * (SHORT_TEXT + 1)]), 60)
        assert not any(task.done() for task in long)
        may_go_on.set()
        await asyncio.gather(*long)

    asyncio.run(scenario())


# Bodies full of mistakes.


MANY = 20_000
MESSAGE = {"role": "user", "content": "x"}
UNKNOWN = {f"x{i}": 0 for i in range(MANY)}
CHAT = {"messages": [MESSAGE]}
FULL_OF_MISTAKES = [
    (protocol.CompletionRequest, {"prompt": [1] * MANY + ["a"]}),
    (protocol.CompletionRequest, {"prompt": ["a"] + [1] * MANY}),
    (protocol.CompletionRequest, {"prompt": [None] * MANY}),
    (protocol.CompletionRequest, {"prompt": [None] * MAX_ITEMS}),
    (protocol.CompletionRequest, {"prompt": [[1]] * MANY}),
    (protocol.CompletionRequest, {"prompt": [["a"] * MANY]}),
    (protocol.CompletionRequest, {"prompt": ["a"] * MANY}),
    (protocol.CompletionRequest, {"prompt": "a", "stop": [1] * MANY}),
    (protocol.CompletionRequest, {"prompt": "a", "stop": ["a"] * MANY}),
    (protocol.CompletionRequest, {"prompt": "a", "stop_token_ids": ["a"] * MANY}),
    (protocol.CompletionRequest, {"prompt": "a", "logit_bias": {str(i): "" for i in range(MANY)}}),
    (protocol.CompletionRequest, {"prompt": "a", **UNKNOWN}),
    (protocol.CompletionRequest, {"prompt": "a", "response_format": UNKNOWN}),
    (protocol.CompletionRequest, {"prompt": "a", "structured_outputs": UNKNOWN}),
    (protocol.CompletionRequest, {"prompt": "a", "structured_outputs": {"choice": [1] * MANY}}),
    (protocol.ChatRequest, {"messages": [1] * MANY}),
    (protocol.ChatRequest, {"messages": [1] * MAX_ITEMS}),
    (protocol.ChatRequest, {"messages": [MESSAGE] * MANY}),
    (protocol.ChatRequest, {"messages": [MESSAGE | {"content": [1] * MANY}]}),
    (protocol.ChatRequest, {"messages": [MESSAGE | UNKNOWN]}),
    (protocol.ChatRequest, {"messages": [MESSAGE | {"tool_calls": [UNKNOWN]}]}),
    (protocol.ChatRequest, CHAT | {"tools": [UNKNOWN]}),
    (protocol.ChatRequest, CHAT | {"tools": [1] * MANY}),
    (protocol.ChatRequest, CHAT | {"tool_choice": UNKNOWN}),
    (protocol.DetokenizeRequest, {"tokens": [""] * MANY}),
]


@pytest.mark.parametrize(
    "request_type, body", FULL_OF_MISTAKES, ids=[json.dumps(b)[:40] for _, b in FULL_OF_MISTAKES]
)
def test_few_mistakes_are_enough(request_type, body):
    """Catches: half a million mistakes described one by one, which takes seconds and gigabytes."""
    with pytest.raises(ValidationError) as refusal:
        request_type.model_validate(body)
    assert refusal.value.error_count() < 10


def test_too_long_a_list_is_told_as_such(server):
    """Catches: a list of too many texts that is called no number."""
    error = server.post(prompt=["a"] * 10_000).json()["error"]
    assert error["param"] == "prompt"
    assert "4096" in error["message"]
    assert "10000" in error["message"]


def test_refused_body_is_forgotten():
    """Catches: bodies of many megabytes that stay until the garbage collector comes by."""

    class Body(dict):
        """A body that can be watched."""

    def refuse(body: Body) -> None:
        error = RequestValidationError([{"loc": ("body",), "msg": "", "type": ""}], body=body)
        raise error  # its traceback refers to this frame, and the frame to it

    def answer() -> weakref.ref:
        body = Body()
        try:
            refuse(body)
        except RequestValidationError as error:
            asyncio.run(answer_validation_error(None, error))
        return weakref.ref(body)

    gc.disable()
    try:
        assert answer()() is None
    finally:
        gc.enable()


def test_collections_skip_what_stays(monkeypatch):
    """Catches: a garbage collector that looks at all of JAX while requests wait."""
    monkeypatch.setattr(server_program, "Engine", lambda *_, **__: "engine")
    threshold = gc.get_threshold()
    try:
        assert server_program.start_engine(None, TOKENIZER, EngineConfig(), False) == "engine"
        assert gc.get_freeze_count() > 10_000
        assert gc.get_threshold()[0] > 10_000
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)
