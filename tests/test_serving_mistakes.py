"""Tests of what the server refuses: mistakes in bodies, malformed bytes, missing keys."""

import base64
import json

import pytest
import requests

from running_server import DEADLINE, asgi
from serving.gate import Gate
from test_serving_answers import CHAT

pytestmark = pytest.mark.slow

pytest_plugins = ["server_fixtures"]

BAD = [
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "n": 17}, "n"),
    ({"prompt": "a", "top_p": 1.5}, "top_p"),
    ({"prompt": "a", "max_tokens": "4"}, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
    ({"prompt": "a", "best_of": True}, "best_of"),
    ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "top_k": -2}, "top_k"),
    ({"prompt": "a", "top_k": False}, "top_k"),
    ({"prompt": "a", "temprature": 1}, "temprature"),
    ({"prompt": "a", "max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
    ({"prompt": "a", "allowed_token_ids": [1000]}, "allowed_token_ids"),
    ({"prompt": "a", "bad_words": ["x" * n for n in range(95, 101)]}, "bad_words"),
    ({"prompt": "a", "bad_words": ["ж"]}, "bad_words"),
    ({"prompt": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"prompt": "a", "truncate_prompt_tokens": 0}, "prompt"),
    ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "ж"}, "prompt"),
    ({"prompt": ["a"] * 9}, "prompt"),
    ({"prompt": "a", "stop": ["x"] * 10_000}, "stop"),
    ({"prompt": "a", "stop": [""]}, "stop"),
    ({"prompt": "a", "stop": ["x" * 1000]}, "stop"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"1000": 1}}, "logit_bias"),
    ({"prompt": "a", "seed": 2**64}, "seed"),
    ({"prompt": "a", "stop_token_ids": [1000]}, "stop_token_ids"),
    ({"prompt": "a", "min_tokens": 20, "max_tokens": 5}, "min_tokens"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    (
        {"prompt": "a", "stream": True, "stream_options": {"padding": True}},
        "stream_options",
    ),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "frequency_penalty": 1e300}, "frequency_penalty"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
]


@pytest.mark.parametrize("body, param", BAD, ids=[json.dumps(body)[:40] for body, _ in BAD])
def test_mistakes_are_400_and_named(server, body, param):
    """Catches: a mistake that becomes a 500, is ignored, or is answered without saying where it
    is."""
    response = server.post(**body)
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}


def user(content, **more) -> dict:
    """A chat of one message."""
    return {"messages": [{"role": "user", "content": content, **more}]}


def called(arguments: str, role: str = "assistant") -> dict:
    """A chat that ends with a call of a function."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": role, "content": "x", "tool_calls": [call]}]}


BAD_CHATS = [
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice", "tool_choice"),
    ({"store": True}, "store", "store"),
    ({"modalities": ["text", "audio"]}, "modalities", "modalities"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "response_format"),
    (user([IMAGE]), "messages", "messages[0].content[0].type"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages", "messages[0].role"),
    (called("[]"), "messages", "no JSON object"),
    (called("[" * 50_000), "messages", "no JSON object"),
    (called('{"a": ' * 300 + "1" + "}" * 300), "messages", "no JSON object"),
    (called("{}", role="user"), "messages", "only the assistant"),
    (user("x", tool_calls=[{"id": "1"}]), "messages", "messages[0].tool_calls"),
    (user("x", refusal="no"), "messages", "messages[0].refusal"),
    (
        {"messages": [{"role": "assistant", "content": None}]},
        "messages",
        "messages[0]: a message needs",
    ),
    ({"messages": [{"role": "user"}]}, "messages", "messages[0]: a message needs"),
    ({"messages": CHAT[::-1]}, "messages", "system comes first"),
    (user("ж"), "messages", "ж"),
    ({"messages": []}, "messages", "messages"),
    (user("x" * 200), "messages", "128"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "one",
    ),
    ({"messages": "x"}, "messages", "messages"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"logprobs": 2}, "logprobs", "boolean"),
    ({"n": 17}, "n", "16"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens", "one of them"),
    ({"prompt": "x"}, "prompt", "prompt"),
    ({"max_completion_tokens": 10_000}, "max_completion_tokens", "10000"),
    ({"max_tokens": 10_000}, "max_tokens", "10000"),
    ({"top_p": 2}, "top_p", "top_p"),
    ({"stream_options": {}}, "stream_options", "stream"),
]


@pytest.mark.parametrize(
    "body, param, says", BAD_CHATS, ids=[json.dumps(body)[:40] for body, *_ in BAD_CHATS]
)
def test_mistakes_in_chats_are_400_and_named(server, body, param, says):
    """Catches: what is not supported ignored or answered by a 500, a refusal that does not say
    where."""
    response = server.post("/v1/chat/completions", **{"messages": CHAT} | body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert says in error["message"]


TOO_LONG = [
    ("/v1/completions", {"prompt": "a" * 129}, "prompt", "129"),
    ("/v1/completions", {"prompt": [1] * 200, "max_tokens": 1}, "prompt", "200"),
    ("/v1/completions", {"prompt": "a" * 128, "max_tokens": 1}, "prompt", "129"),
    ("/v1/completions", {"prompt": "a" * 100, "max_tokens": 100}, "max_tokens", "200"),
    ("/v1/completions", {"prompt": "a" * 1000}, "prompt", "334"),  # seen before it is encoded
    ("/v1/chat/completions", user("a" * 129), "messages", "146"),  # "user: ", and "assistant:"
    ("/v1/chat/completions", user("a" * 112), "messages", "129"),
    ("/v1/chat/completions", user("a" * 99) | {"max_tokens": 99}, "max_tokens", "215"),
]


@pytest.mark.parametrize("path, body, param, number", TOO_LONG)
def test_what_exceeds_the_context_is_recognised_by_clients(server, path, body, param, number):
    """Catches: a refusal by which litellm and LangChain do not see that a shorter prompt would do,
    one that does not say by how much or which field is too large."""
    response = server.post(path, **body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 128 tokens")
    assert "context_length_exceeded" in error["message"]  # LangChain reads nothing else
    assert error["param"] == param
    assert number in error["message"]


@pytest.mark.parametrize("body", [{"model": "x" * 9_000}, {"x" * 9_000: 1}])
def test_a_mistake_is_not_sent_back_as_a_whole(server, body):
    """Catches: a megabyte in the answer, and in the client's log, for each that was sent."""
    response = server.post(prompt="a", **body)
    assert response.status_code in (400, 404)
    assert len(response.content) < 5000
    assert "x" * 1000 in response.json()["error"]["message"]


def test_another_model_is_404(server):
    """Catches: a model's name that is ignored."""
    response = server.post(model="gpt-5", prompt="a")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


MALFORMED = {
    "cut off": (b'{"prompt": "a"', "application/json", 400),
    "bad UTF-8": (b'{"prompt": "\xff"}', "application/json", 400),
    "deep": (b"[" * 50_000, "application/json", 400),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
    "huge number": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json", 400),
    "half a surrogate": (b'{"prompt": "\\ud800"}', "application/json", 400),
    "its name too": (b'{"\\ud800": 1, "prompt": "a"}', "application/json", 400),
    "empty": (b"", "application/json", 400),
    "text": (b'{"prompt": "a"}', "text/plain", 400),
    "10 MB": (b'"' + b"a" * 10_000_000 + b'"', "application/json", 413),
}


@pytest.mark.parametrize("data, content_type, status", MALFORMED.values(), ids=MALFORMED)
def test_malformed_bodies(server, data, content_type, status):
    """Catches: bytes that bring a handler down; an answer that is not in the error form, or shows a
    traceback or a path."""
    headers = {"Content-Type": content_type}
    url = f"{server.url}/v1/completions"
    response = requests.post(url, data=data, headers=headers, timeout=DEADLINE)
    assert response.status_code == status, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    assert len(response.text) < 3000


def test_request_id(server):
    """Catches: an answer that cannot be found in the log, and a header that a client could smuggle
    lines into the log with."""

    def post(request_id: str) -> requests.Response:
        headers = {"X-Request-Id": request_id}
        url = f"{server.url}/v1/completions"
        return requests.post(url, json={"prompt": "a"}, headers=headers, timeout=DEADLINE)

    assert post("mine-1").headers["x-request-id"] == "mine-1"
    assert post("mine-1").json()["id"] == "cmpl-mine-1"
    for bad in ("a b", "x" * 65, "{}"):
        assert post(bad).headers["x-request-id"] not in ("", bad)


KEY = "secret-ключ"


def basic(text: str) -> str:
    """The header by which a browser sends user:password."""
    return "Basic " + base64.b64encode(text.encode()).decode()


GOOD_KEYS = [f"Bearer {KEY}", f"bearer {KEY}", basic(f"anyone:{KEY}")]
BAD_KEYS = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer s",
    "Bearer secret",
    f"Bearer {KEY}x",
    f"Bearer x{KEY}",
    KEY,
    basic(KEY),
    basic("a:b"),
    basic("a:"),
    "Basic !",
]
GUARDED = [
    "/v1/completions",
    "/v1/models",
    "/metrics",
    "/pool",
    "/",
    "/openapi.json",
    "/health/",
    "//health",
    "/tokenize",
]


def test_api_key():
    """Catches: a route left open, a comparison that a prefix or another scheme passes."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def status(path: str, authorization: str | None) -> int:
        headers = [] if authorization is None else [(b"authorization", authorization.encode())]
        return asgi(Gate(app, KEY, 1000), "GET", path, headers)[0]

    for path in GUARDED:
        assert [status(path, key) for key in GOOD_KEYS] == [200] * len(GOOD_KEYS), path
        assert [status(path, key) for key in BAD_KEYS] == [401] * len(BAD_KEYS), path
    assert status("/health", None) == 200
