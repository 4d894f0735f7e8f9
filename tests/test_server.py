"""Tests of server.py. One server runs in this process, on a free port of 127.0.0.1, so that a test can reach its engine too."""

import asyncio
import base64
import configparser
import contextlib
import http.client
import json
import math
import os
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import soak
from flax import nnx

import cli
from benchmarks import serving as bench
from benchmarks.serving import BenchServeConfig
from config import EngineConfig, GPTConfig, ServeConfig
from engine import Engine
from model import GPT
from sequence import SamplingParams
from server import Front, Server, create_app
from serving.gate import Gate
from tokenizer import CharTokenizer

DEADLINE = 120  # seconds; generous, because CI machines are slow
COMPILING = 600
ROOT = Path(__file__).parents[1]
TOKENIZER = CharTokenizer(string.printable[:95] + "\n€")
CONFIG = GPTConfig(block_size=128, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=32)
ENGINE = EngineConfig(page_size=8, kv_blocks=65, max_num_seqs=4, prefill_tokens=32)
TEMPLATE = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% if m.role == "system" and not loop.first %}{{ raise_exception("system comes first") }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


class Running:
    """A server in a thread of its own."""

    def __init__(self, model: GPT, **flags):
        self.config = ServeConfig(
            out_dir=Path("out"), engine=ENGINE, served_model_name="tiny", **flags
        )
        self.server = Server(self.config, self.make_engine, TOKENIZER, CONFIG.block_size)
        self.model, self.error, self.gate, self.step_seconds = model, None, threading.Event(), 0.0
        self.gate.set()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14
        )  # so that a slow reader is felt soon
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.run, args=(listener,), daemon=True)
        self.thread.start()

    def make_engine(self) -> Engine:
        engine = Engine(self.model, TOKENIZER, ENGINE, progress=False)
        step = engine.step

        def gated_step():  # clear the gate, and the engine stands still before its next step
            assert self.gate.wait(DEADLINE)
            time.sleep(self.step_seconds)  # to be as slow as a larger model
            return step()

        engine.step = gated_step
        return engine

    def run(self, listener) -> None:
        try:
            asyncio.run(self.server.serve([listener]))
        except BaseException as e:
            self.error = e

    def drain(self) -> None:
        self.server.worker.loop.call_soon_threadsafe(self.server.drain)

    def until(self, condition, what: str, seconds: float = DEADLINE) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {seconds} s"
            time.sleep(0.005)

    def ready(self) -> "Running":
        self.until(lambda: self.server.worker.stats or self.error, "warm", COMPILING)
        assert requests.get(f"{self.url}/health", timeout=DEADLINE).status_code == 200
        return self

    def post(self, path="/v1/completions", **body) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=DEADLINE)

    def complete(self, **body) -> dict:
        response = self.post(**body)
        assert response.status_code == 200, response.text
        return response.json()

    def pages_held(self) -> int:
        return self.server.worker.stats.pages_held

    @contextlib.contextmanager
    def standing(self):
        """The engine stands still inside."""
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()

    def connection(self, body: dict) -> socket.socket:
        """A request on a connection of its own, of which nothing has been read."""
        data = json.dumps(body).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        connection.settimeout(DEADLINE)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
        )
        return connection


@pytest.fixture(scope="module")
def model():
    return GPT(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    template = tmp_path_factory.mktemp("chat") / "template.jinja"
    template.write_text(TEMPLATE)
    running = Running(
        model, max_waiting=16, max_prompts=8, max_body_bytes=100_000, chat_template=template
    ).ready()
    yield running
    running.drain()
    running.thread.join(DEADLINE)
    assert not running.thread.is_alive() and running.error is None


@pytest.fixture(scope="module")
def offline(model):
    """The same model without HTTP."""
    return Engine(model, TOKENIZER, ENGINE, progress=False)


def events(response: requests.Response) -> list:
    """The objects of a stream, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_prompt_forms(server):
    """Catches: a list of numbers taken for several prompts, choices in order of arrival, a usage that counts the echo."""
    same = dict(max_tokens=4, temperature=0)
    texts = [server.complete(prompt=p, **same)["choices"][0]["text"] for p in ("abc", "xyz")]
    ids = [TOKENIZER.encode(p) for p in ("abc", "xyz")]
    assert server.complete(prompt=ids[0], **same)["choices"][0]["text"] == texts[0]
    for prompt in (["abc", "xyz"], ids):
        answer = server.complete(prompt=prompt, n=2, echo=True, **same)
        assert [c["text"] for c in answer["choices"]] == ["abc" + texts[0]] * 2 + [
            "xyz" + texts[1]
        ] * 2
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 16, "total_tokens": 22}


def test_every_sampling_parameter_arrives(server, offline):
    """Catches: a parameter that is accepted and ignored, or arrives under another name."""
    fields = dict(
        max_tokens=24,
        min_tokens=20,
        temperature=1.5,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        presence_penalty=0.3,
        logit_bias={5: 2.0, 7: -100.0},
        seed=123,
        stop=("e",),
        stop_token_ids=(9,),
        ignore_eos=True,
        n=2,
        logprobs=3,
        prompt_logprobs=2,
        echo=True,
    )
    assert fields.keys() == SamplingParams.__dataclass_fields__.keys()
    body = fields | {"stop": ["e"], "stop_token_ids": [9], "return_token_ids": True}
    # echo together with logprobs reports the prompt's logprobs with as many alternatives.
    [expected] = offline.generate(
        [TOKENIZER.encode("The ")],
        SamplingParams(**fields | {"prompt_logprobs": 3}),
        progress=False,
    )
    answer = server.complete(prompt="The ", **body)
    for choice, out in zip(answer["choices"], expected, strict=True):
        assert (choice["token_ids"], choice["text"], choice["finish_reason"]) == (
            out.token_ids,
            out.text,
            out.finish_reason,
        )
        assert choice["logprobs"]["token_logprobs"][4:] == pytest.approx(
            [p.logprob for p in out.logprobs]
        )
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["token_logprobs"][1:4] == pytest.approx(
            [p.logprob for p in out.prompt_logprobs[1:]]
        )
        assert all(3 <= len(top) <= 4 for top in choice["logprobs"]["top_logprobs"][1:])
        assert all(2 <= len(top) <= 3 for top in choice["prompt_logprobs"][1:])
    for (
        name,
        value,
    ) in (
        fields.items()
    ):  # each one alone makes a difference, or is refused alone, or is neutral here
        assert server.post(prompt="The ", **{name: body[name]}).status_code in (200, 400)


def test_logprob_lists(server):
    """Catches: offsets that count bytes, and tokens without a text of their own."""
    choice = server.complete(prompt="a€b", max_tokens=2, echo=True, logprobs=0)["choices"][0]
    lists = choice["logprobs"]
    assert "".join(lists["tokens"]) == choice["text"] and lists["text_offset"] == [0, 1, 2, 3, 4]
    for token, logprob, top in list(
        zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"])
    )[1:]:
        assert top == {token: logprob}


@pytest.mark.parametrize("extra", [{}, {"logprobs": 1, "echo": True}, {"stop": ["q", "zz"]}])
def test_stream_is_the_whole_in_pieces(server, extra):
    """Catches: text lost or doubled between chunks, offsets that start anew in each, a last chunk without its reason."""
    body = dict(prompt=["abc", "de"], max_tokens=24, seed=3, n=2, return_token_ids=True, **extra)
    whole = server.complete(**body)
    chunks = events(server.post(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    for index, expected in enumerate(whole["choices"]):
        pieces = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert len(pieces) > 1
        assert "".join(p["text"] for p in pieces) == expected["text"]
        assert sum((p["token_ids"] for p in pieces), []) == expected["token_ids"]
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [
            expected["finish_reason"]
        ]
        if "logprobs" in extra:
            for name, values in expected["logprobs"].items():
                assert sum((p["logprobs"][name] for p in pieces), []) == values


def test_streamed_prompt_logprobs_do_not_wait_for_text(server):
    """Catches: prompt logprobs that are lost because the first token's text is withheld: it could begin a stop string."""
    body = dict(
        prompt="abc",
        max_tokens=3,
        prompt_logprobs=1,
        logit_bias={TOKENIZER.ids["q"]: 100.0},
        stop=["qz"],
    )
    [whole] = server.complete(**body)["choices"]
    pieces = [chunk["choices"][0] for chunk in events(server.post(**body, stream=True))]
    assert whole["text"] == "qqq" == "".join(p["text"] for p in pieces) and pieces[0]["text"] == ""
    assert (
        pieces[0]["prompt_logprobs"] == whole["prompt_logprobs"]
        and len(whole["prompt_logprobs"]) == 3
    )


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
]


def test_chat_is_the_completion_of_its_template(server):
    """Catches: a chat that is rendered or sampled otherwise than its text would be, parameters of it that do not arrive."""
    fields = dict(
        temperature=0.9,
        top_k=30,
        top_p=0.9,
        min_p=0.01,
        seed=5,
        n=2,
        stop=["q"],
        frequency_penalty=0.5,
        presence_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={5: 2.0},
        min_tokens=3,
        stop_token_ids=[9],
        ignore_eos=True,
        return_token_ids=True,
    )
    text = server.complete(
        prompt="system: be brief\nuser: a\nb\nassistant:", max_tokens=20, logprobs=3, **fields
    )
    chat = server.complete(
        path="/v1/chat/completions",
        messages=CHAT,
        max_completion_tokens=20,
        logprobs=True,
        top_logprobs=3,
        **fields,
    )
    assert chat["usage"] == text["usage"] and chat["object"] == "chat.completion"
    for ours, theirs in zip(chat["choices"], text["choices"], strict=True):
        assert ours["message"] == {"role": "assistant", "content": theirs["text"]}
        for name in ("index", "finish_reason", "token_ids"):
            assert ours[name] == theirs[name]
        scored = ours["logprobs"]["content"]
        assert [s["logprob"] for s in scored] == theirs["logprobs"]["token_logprobs"]
        assert [s["token"] for s in scored] == theirs["logprobs"]["tokens"]
        for entry, top in zip(scored, theirs["logprobs"]["top_logprobs"], strict=True):
            assert (
                bytes(entry["bytes"]).decode() == entry["token"] and len(entry["top_logprobs"]) == 3
            )
            assert top.items() >= {t["token"]: t["logprob"] for t in entry["top_logprobs"]}.items()
    # Without a limit it may go on to the end of the context. Both names of the limit do the same.
    chat = lambda **body: server.complete(
        path="/v1/chat/completions", messages=CHAT[:1], temperature=0, **body
    )
    assert chat()["usage"]["total_tokens"] == CONFIG.block_size
    assert chat(max_tokens=3)["choices"] == chat(max_completion_tokens=3)["choices"]
    lengths = [
        chat(max_tokens=3, add_generation_prompt=add)["usage"]["prompt_tokens"]
        for add in (True, False)
    ]
    assert lengths[0] - lengths[1] == len("assistant:")


@pytest.mark.parametrize(
    "extra", [{}, {"logprobs": True, "top_logprobs": 1}, {"stop": ["q", "zz"]}]
)
def test_streamed_chat_is_the_whole_in_pieces(server, extra):
    """Catches: text or logprobs lost between chunks, a role that is not said first or said twice."""
    body = dict(
        path="/v1/chat/completions",
        messages=CHAT,
        max_tokens=24,
        seed=3,
        n=2,
        return_token_ids=True,
        **extra,
    )
    whole = server.complete(**body)
    chunks = events(server.post(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and len(
        {(c["id"], c["created"]) for c in chunks}
    ) == 1
    for index, expected in enumerate(whole["choices"]):
        pieces = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert "".join(p["delta"]["content"] for p in pieces) == expected["message"]["content"]
        assert [p["delta"]["role"] for p in pieces] == ["assistant"] + [None] * (
            len(pieces) - 1
        ) and len(pieces) > 1
        assert sum((p["token_ids"] for p in pieces), []) == expected["token_ids"]
        assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [
            expected["finish_reason"]
        ]
        if "logprobs" in extra:
            assert (
                sum((p["logprobs"]["content"] for p in pieces), [])
                == expected["logprobs"]["content"]
            )


IMAGE = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
BAD_CHATS = [
    ({"tools": []}, "tools", "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format", "response_format"),
    (
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        "messages",
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages", "messages[0].name"),
    ({"messages": [{"role": "user"}]}, "messages", "messages[0].content"),
    ({"messages": CHAT[::-1]}, "messages", "system comes first"),
    ({"messages": [{"role": "user", "content": "ж"}]}, "messages", "ж"),
    ({"messages": []}, "messages", "messages"),
    ({"messages": [{"role": "user", "content": "x" * 200}]}, None, "128"),
    ({"messages": "x"}, "messages", "messages"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"logprobs": 2}, "logprobs", "boolean"),
    ({"n": 17}, "n", "16"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens", "one of them"),
    ({"prompt": "x"}, "prompt", "prompt"),
    ({"max_completion_tokens": 10_000}, None, "10000"),
    ({"top_p": 2}, "top_p", "top_p"),
    ({"stream_options": {}}, "stream_options", "stream"),
]


@pytest.mark.parametrize(
    "body, param, says", BAD_CHATS, ids=[json.dumps(body)[:40] for body, *_ in BAD_CHATS]
)
def test_mistakes_in_chats_are_400_and_named(server, body, param, says):
    """Catches: what is not supported ignored or answered by a 500, a refusal that does not say where."""
    response = server.post("/v1/chat/completions", **{"messages": CHAT} | body)
    assert response.status_code == 400, response.text
    assert (
        response.json()["error"]["param"] == param and says in response.json()["error"]["message"]
    ), response.text


def test_no_chat_without_a_template():
    """Catches: a chat route that guesses a template, or a page that promises it."""
    app = create_app(Front(ServeConfig(out_dir=Path("out")), None, TOKENIZER, 128), None)
    assert "/v1/chat/completions" not in app.openapi()["paths"]
    status, body = asgi(app, "POST", "/v1/chat/completions")
    assert status == 404 and "--chat_template=FILE" in json.loads(body)["error"]["message"]


def asgi(app, method: str, path: str, headers: list = []) -> tuple[int, bytes]:
    """The status and body of an answer, without a socket."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": headers,
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent)


def test_concurrent_answers_equal_answers_alone(server, offline):
    """Catches: outputs that go to another's request, and a result that depends on the company it is computed in."""

    def body(i: int) -> dict:
        return dict(max_tokens=4 + i % 13, seed=i, temperature=i % 3 / 2, logprobs=1, n=1 + i % 2)

    prompts = [(string.ascii_letters * 2)[i : i + 1 + 5 * i % 37] for i in range(64)]

    def ask(i: int) -> list[dict]:
        while (
            response := server.post(prompt=prompts[i], return_token_ids=True, **body(i))
        ).status_code == 429:
            time.sleep(float(response.headers["Retry-After"]) / 20)
        return response.json()["choices"]

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    for i, choices in enumerate(answers):
        [alone] = offline.generate(
            [TOKENIZER.encode(prompts[i])], SamplingParams(**body(i)), progress=False
        )
        for choice, out in zip(choices, alone, strict=True):
            assert choice["token_ids"] == out.token_ids and choice["text"] == out.text
            assert choice["logprobs"]["token_logprobs"] == [p.logprob for p in out.logprobs]
    assert server.pages_held() == 0


BAD = [
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "n": 17}, "n"),
    ({"prompt": "a", "top_p": 1.5}, "top_p"),
    ({"prompt": "a", "max_tokens": "4"}, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 10**30}, None),
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
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "frequency_penalty": 1e300}, "frequency_penalty"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
]


@pytest.mark.parametrize("body, param", BAD, ids=[json.dumps(body)[:40] for body, _ in BAD])
def test_mistakes_are_400_and_named(server, body, param):
    """Catches: a mistake that becomes a 500, is ignored, or is answered without saying where it is."""
    response = server.post(**body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error", response.text
    assert error["param"] == param


def test_errors_hold_both_numbers(server):
    """Catches: a refusal that does not say by how much."""
    message = server.post(prompt="a" * 100, max_tokens=100).json()["error"]["message"]
    assert "100" in message and "128" in message
    response = server.post(model="gpt-5", prompt="a")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "data, content_type, status",
    [
        (b'{"prompt": "a"', "json", 400),
        (b'{"prompt": "\xff"}', "json", 400),
        (b"[" * 50_000, "json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "json", 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "json", 400),
        (b'{"prompt": "\\ud800"}', "json", 400),
        (b'{"\\ud800": 1, "prompt": "a"}', "json", 400),
        (b"", "json", 400),
        (b'{"prompt": "a"}', "plain", 400),
        (b'"' + b"a" * 10_000_000 + b'"', "json", 413),
    ],
    ids=[
        "cut off",
        "bad UTF-8",
        "deep",
        "NaN",
        "huge number",
        "half a surrogate",
        "its name too",
        "empty",
        "text",
        "10 MB",
    ],
)
def test_malformed_bodies(server, data, content_type, status):
    """Catches: bytes that bring a handler down; an answer that is not in the error form, or shows a traceback or a path."""
    headers = {"Content-Type": {"json": "application/json", "plain": "text/plain"}[content_type]}
    response = requests.post(
        f"{server.url}/v1/completions", data=data, headers=headers, timeout=DEADLINE
    )
    assert response.status_code == status, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert (
        "Traceback" not in response.text
        and ".py" not in response.text
        and len(response.text) < 3000
    )


def test_other_routes(server):
    """Catches: routes that the page, lm-eval or a load balancer calls, gone or changed."""
    tokens = server.post("/tokenize", prompt="a€b").json()
    assert tokens == {"tokens": TOKENIZER.encode("a€b"), "count": 3, "max_model_len": 128}
    assert server.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": "a€b"}
    assert server.post("/detokenize", tokens=[10**6]).status_code == 400
    get = lambda path: requests.get(server.url + path, timeout=DEADLINE)
    assert get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert get("/version").json().keys() == {"version", "jax"}
    assert (
        "<title>" in get("/").text
        and "default-src 'none'" in get("/").headers["content-security-policy"]
    )
    assert get("/openapi.json").json()["paths"].keys() >= {
        "/v1/completions",
        "/health",
        "/metrics",
        "/tokenize",
    }
    for path, status in (
        ("/nowhere", 404),
        ("/v1/completions", 405),
        ("/v1/chat/completions", 405),
    ):
        assert get(path).status_code == status and "error" in get(path).json()


def test_request_id(server):
    """Catches: an answer that cannot be found in the log, and a header that a client could smuggle lines into the log with."""
    post = lambda given: requests.post(
        f"{server.url}/v1/completions",
        json={"prompt": "a"},
        headers={"X-Request-Id": given},
        timeout=DEADLINE,
    )
    assert (
        post("mine-1").headers["x-request-id"] == "mine-1"
        and post("mine-1").json()["id"] == "cmpl-mine-1"
    )
    for bad in ("a b", "x" * 65, "{}"):
        assert post(bad).headers["x-request-id"] not in ("", bad)


def test_metrics(server):
    """Catches: a name that vLLM's dashboards do not find, a count that misses requests or counts them twice."""

    def read() -> dict[str, float]:
        lines = requests.get(f"{server.url}/metrics", timeout=DEADLINE).text.splitlines()
        return {
            line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in lines
            if not line.startswith("#")
        }

    before = read()
    server.complete(prompt="0123456789" * 4, max_tokens=5, n=2)
    server.complete(prompt="0123456789" * 4, max_tokens=5)
    after = read()
    name = lambda n, labels="": f'vllm:{n}{{{labels}model_name="tiny"}}'
    grown = {n: after[n] - before.get(n, 0) for n in after}
    assert grown[name("generation_tokens_total")] == 15
    assert (
        grown[name("prefix_cache_queries_total")] == 80
        and grown[name("prefix_cache_hits_total")] == 32
    )
    assert grown[name("prompt_tokens_total")] == 80 - 32
    assert grown[name("request_success_total", 'finished_reason="length",')] == 3
    assert (
        grown[name("time_to_first_token_seconds_count")]
        == grown[name("e2e_request_latency_seconds_count")]
        == 3
    )
    assert grown[name("inter_token_latency_seconds_count")] == 12
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[name(gauge)] == 0
    assert name("num_preemptions_total") in after


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
def test_client_that_goes_away_frees_its_pages(server, when, stream):
    """Catches: generation that goes on for nobody, whatever the request was doing when its client left."""
    worker, engine = server.server.worker, server.server.worker.engine
    before, server.step_seconds = (
        worker.stats.generation_tokens,
        0.05,
    )  # whole, a request would take more than a second
    others = (
        [server.connection({"prompt": "x", "max_tokens": 120}) for _ in range(4)]
        if when == "queued"
        else []
    )
    with server.standing() if when == "prefill" else contextlib.nullcontext():
        client = server.connection({"prompt": "y" * 100, "max_tokens": 28, "stream": stream})
        server.until(lambda: len(worker.open) == len(others) + 1, "arrived")
        if when == "decode":
            server.until(lambda: worker.stats.generation_tokens > before, "decoding")
        client.close()
        for other in others:
            other.close()
        server.until(lambda: not worker.open, "noticed")
    server.step_seconds = 0.0
    server.until(lambda: not worker.inbox and not engine.busy and server.pages_held() == 0, "freed")
    assert worker.stats.generation_tokens - before < 28 * (len(others) + 1), (
        "it was generated to its end for nobody"
    )
    engine.blocks.check()
    assert not worker.jobs and worker.queued == 0


def test_pages_are_free_within_one_step(server):
    """Catches: a cancellation that waits for the end of the request, or for a second step."""
    worker = server.server.worker
    with server.standing():
        client = server.connection({"prompt": "y" * 100, "max_tokens": 28})
        server.until(lambda: worker.step_began is not None, "in a step")
        client.close()
        server.until(lambda: worker.inbox, "cancelled")
        steps = []
        worker.engine.step, step = (lambda: steps.append(1) or step()), worker.engine.step
    server.until(lambda: not worker.engine.busy and server.pages_held() == 0, "freed")
    worker.engine.step = step
    assert len(steps) <= 1


def test_reader_that_stops_reading(server):
    """Catches: a slow reader that stalls the engine or other clients, or whose outputs pile up."""
    slow = server.connection(
        {"prompt": "z", "max_tokens": 100, "n": 4, "logprobs": 20, "stream": True}
    )
    answer = server.complete(prompt="a", max_tokens=8)
    assert answer["usage"]["completion_tokens"] == 8
    server.until(lambda: server.server.worker.stats.running == 0, "the slow one's tokens generated")
    assert any(job.outputs for job in server.server.worker.open), (
        "it was not slow enough to keep the server waiting"
    )
    data = b""
    while b"[DONE]" not in data:
        piece = slow.recv(1 << 16)
        assert piece, "the stream broke off"
        data += piece
    slow.close()
    server.until(lambda: not server.server.worker.open, "ended")


def test_queue_limit(server):
    """Catches: a queue without end, a 5xx under load, places in the queue that are lost."""

    def one(i: int) -> int:
        response = server.post(prompt="abc", max_tokens=3)
        assert response.status_code != 429 or int(response.headers["Retry-After"]) > 0
        return response.status_code

    with ThreadPoolExecutor(100) as pool:
        with server.standing():
            codes = [pool.submit(one, i) for i in range(100)]
            server.until(lambda: sum(f.done() for f in codes) >= 100 - 16 - 4 - 16, "refused")
        codes = [f.result() for f in codes]
    assert set(codes) == {200, 429}
    assert [one(i) for i in range(5)] == [200] * 5
    assert server.server.worker.queued == 0 and server.pages_held() == 0


def test_queue_limit_counts_prompts(server):
    """Catches: a limit that is one off, a request of many prompts that counts as one, or that is admitted in part."""
    limit, worker = server.config.max_waiting, server.server.worker
    server.until(lambda: worker.queued == 0, "nothing queued")
    with server.standing():
        clients = [
            server.connection({"prompt": ["a"] * n, "max_tokens": 1})
            for n in (limit // 2, limit // 2 - 1)
        ]
        server.until(lambda: worker.queued == limit - 1, "one place left")
        assert server.post(prompt=["a", "a"], max_tokens=1).status_code == 429
        clients.append(server.connection({"prompt": "a", "max_tokens": 1}))
        server.until(lambda: worker.queued == limit, "full")
        assert server.post(prompt="a", max_tokens=1).status_code == 429
    for client in clients:
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        client.close()


def test_pool(server):
    """Catches: a page that is shown free while a request holds it, sharing that does not show."""
    prefix = "s" * 41  # 5 full pages
    with server.standing():
        clients = [server.connection({"prompt": prefix + c, "max_tokens": 60}) for c in "ab"]
        server.until(lambda: len(server.server.worker.open) == 2, "arrived")
    views = []

    def shared() -> bool:
        views.append(requests.get(f"{server.url}/pool", timeout=DEADLINE).json())
        return any(len(page["holders"]) == 2 for page in views[-1]["used"])

    server.until(shared, "two requests on one page")
    assert sum(len(page["holders"]) == 2 and page["cached"] for page in views[-1]["used"]) == 5
    assert views[-1]["pages"] == 65 and views[-1]["page_size"] == 8
    for client in clients:
        client.close()


def test_api_key(model):
    """Catches: a route left open, a comparison that a prefix or another scheme passes."""
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def status(path: str, authorization: str | None) -> int:
        headers = [] if authorization is None else [(b"authorization", authorization.encode())]
        return asgi(Gate(app, "secret-ключ", 1000), "GET", path, headers)[0]

    basic = lambda text: "Basic " + base64.b64encode(text.encode()).decode()
    good = ["Bearer secret-ключ", "bearer secret-ключ", basic("anyone:secret-ключ")]
    bad = [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer s",
        "Bearer secret",
        "Bearer secret-ключx",
        "Bearer xsecret-ключ",
        "secret-ключ",
        basic("secret-ключ"),
        basic("a:b"),
        basic("a:"),
        "Basic !",
    ]
    for path in (
        "/v1/completions",
        "/v1/models",
        "/metrics",
        "/pool",
        "/",
        "/openapi.json",
        "/health/",
        "//health",
        "/tokenize",
    ):
        assert [status(path, a) for a in good] == [200] * 3, path
        assert [status(path, a) for a in bad] == [401] * len(bad), path
    assert status("/health", None) == 200


def test_engine_that_dies(model):
    """Catches: clients left hanging, and a process that lives on without its engine or ends as if all were well."""
    running = Running(model).ready()
    with running.standing():
        clients = [
            running.connection({"prompt": "a", "max_tokens": 50, "stream": stream})
            for stream in (False, True)
        ]
        running.until(lambda: len(running.server.worker.open) == 2, "arrived")

        def die():
            raise MemoryError("no more pages")

        running.server.worker.engine.step = die
    answers = []
    for client in clients:
        response = http.client.HTTPResponse(client)
        response.begin()
        answers.append((response.status, response.read().decode()))
    for status, text in answers:
        assert status == 500 or (status == 200 and "[DONE]" not in text)
        assert '"server_error"' in text and "no more pages" not in text
    running.thread.join(DEADLINE)
    assert isinstance(running.error, RuntimeError) and isinstance(
        running.error.__cause__, MemoryError
    )


def test_health_when_a_step_hangs(model):
    """Catches: a load balancer that keeps sending requests to a server whose device hangs."""
    running = Running(model, step_timeout=0.1)
    health = lambda: requests.get(f"{running.url}/health", timeout=DEADLINE).status_code
    running.ready()
    with running.standing():
        client = running.connection({"prompt": "a"})
        running.until(lambda: health() == 503, "unhealthy")
    running.until(lambda: health() == 200, "healthy again")
    client.close()
    running.drain()
    running.thread.join(DEADLINE)
    assert running.error is None


@contextlib.contextmanager
def server_process(model_dir: Path, port: int):
    """(process, its URL, the lines of its log) of server.py, which was unhealthy until it was warm."""
    process = subprocess.Popen(
        [
            sys.executable,
            "server.py",
            f"--init_from={model_dir}",
            f"--port={port}",
            "--kv_blocks=65",
            "--page_size=8",
            "--prefill_tokens=32",
            "--max_num_seqs=2",
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NANOGPT_API_KEY": "hidden-key"},
    )
    lines = []
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    try:
        end = time.monotonic() + COMPILING
        while not (said := [line for line in lines if "serving" in line]):
            assert time.monotonic() < end and process.poll() is None, lines
            time.sleep(0.02)
        url = json.loads(said[0])["event"].rsplit(" ", 1)[1]
        codes = set()
        while 200 not in codes:
            assert time.monotonic() < end, codes
            codes.add(requests.get(f"{url}/health", timeout=DEADLINE).status_code)
            time.sleep(0.05)
        assert codes == {503, 200}, "it was healthy before it was warm"
        yield process, url, lines
    finally:
        process.kill()
        process.wait()


def test_sigkill_then_sigterm_under_load(model, tmp_path):
    """Catches: a port or a file that a killed server leaves in the way of the next; a request that was admitted and lost at the
    end, an end that waits for ever, an exit code other than 0."""
    model.save_pretrained(tmp_path / "tiny", TOKENIZER)
    headers, body = (
        {"Authorization": "Bearer hidden-key"},
        {"prompt": "a", "max_tokens": 100, "stream": True, "temperature": 0},
    )

    def ask(url: str, begun: threading.Event) -> tuple[int, bytes]:
        last = b""
        with requests.post(
            f"{url}/v1/completions", json=body, headers=headers, stream=True, timeout=DEADLINE
        ) as response:
            with contextlib.suppress(requests.RequestException):  # killed
                for line in response.iter_lines():
                    begun.set()
                    last = line or last
            return response.status_code, last

    def signalled(process: subprocess.Popen, url: str, number: int) -> list[tuple[int, bytes]]:
        """The answers to eight requests, during which the process gets a signal."""
        begun = threading.Event()
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(ask, url, begun) for _ in range(8)]
            assert begun.wait(DEADLINE)
            process.send_signal(number)
            return [f.result() for f in answers if number == signal.SIGTERM or not f.exception()]

    with server_process(tmp_path / "tiny", 0) as (process, url, _):
        signalled(process, url, signal.SIGKILL)
        assert process.wait(DEADLINE) == -signal.SIGKILL
    with server_process(tmp_path / "tiny", int(url.rsplit(":", 1)[1])) as (process, url, lines):
        assert requests.get(f"{url}/v1/models", timeout=DEADLINE).status_code == 401
        answers = signalled(process, url, signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
        assert (200, b"data: [DONE]") in answers
        assert all(last == b"data: [DONE]" for status, last in answers if status == 200), (
            "an admitted request was lost"
        )
        assert {status for status, _ in answers} <= {200, 503}
        assert not any("hidden-key" in line or "Traceback" in line for line in lines)


def test_systemd_unit():
    """Catches: a unit whose flags the server refuses, that kills before the drain is over or does not restart what was killed."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.read(ROOT / "deploy" / "jax-nanogpt-vllm.service")
    service = unit["Service"]
    _, program, *flags = shlex.split(service["ExecStart"])
    config = cli.parse(ServeConfig, argv=flags)
    assert (
        program == "server.py" and int(service["TimeoutStopSec"]) >= config.drain_timeout + 5 + 10
    )
    assert service["KillSignal"] == "SIGTERM" and service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2", "of a mistake in the flags, see cli.fail"


def test_drain_has_an_end(model):
    """Catches: an end that waits for ever for one request, a client that is not told why, a second signal that waits like the
    first, requests admitted after the first."""
    running = Running(model, drain_timeout=0.2).ready()
    with running.standing():
        client = running.connection({"prompt": "a", "max_tokens": 50, "stream": True})
        running.until(lambda: running.server.worker.open, "arrived")
        running.drain()
        running.until(
            lambda: requests.get(f"{running.url}/health", timeout=DEADLINE).status_code == 503,
            "draining",
        )
        answer = b""
        while piece := client.recv(1 << 16):
            answer += piece
    assert b"drain_timeout=0.2" in answer and b"[DONE]" not in answer
    running.thread.join(DEADLINE)
    assert not running.thread.is_alive() and running.error is None

    running = Running(model, drain_timeout=10 * DEADLINE).ready()
    with running.standing():
        client = running.connection({"prompt": "a", "max_tokens": 50})
        running.until(lambda: running.server.worker.open, "arrived")
        running.drain()
        running.until(lambda: running.server.worker.draining, "draining")
        assert running.post(prompt="a").status_code == 503 and not running.server.should_exit
        running.drain()
        running.until(lambda: running.server.should_exit, "not waiting")
        client.close()
    running.thread.join(DEADLINE)
    assert not running.thread.is_alive() and running.error is None


def test_mixed_load(server):
    """Catches: a 5xx, a stream that breaks off, pages that leak, when all kinds of clients come at once. soak.py takes longer."""
    report = soak.soak(server.url, 3, lambda: 0, clients=12, looks=1)
    assert not report["failed"] and report["answers"]["200"]
    assert report["answers"].keys() <= {"200", "400", "429", "leave", "stuck", "tokens"}
    server.until(lambda: not server.server.worker.open, "ended")
    server.server.worker.engine.blocks.check()
    assert not server.server.worker.jobs and server.server.worker.queued == 0


def test_bench_serve(server, tmp_path):
    """Catches: tokens that are not counted or counted twice, a report that is no JSON, arrivals that wait for answers."""
    config = BenchServeConfig(
        url=server.url,
        rates=(10.0, math.inf),
        requests=12,
        prompt_tokens=(4, 20),
        output_tokens=(3, 12),
        plot=tmp_path / "p.png",
    )
    tokens = sum(body["max_tokens"] for body in bench.serve_requests(config))
    report = json.loads(json.dumps(bench.bench_serve(config)))
    for rate in report["rates"]:
        assert rate["completed"] == 12 and rate["refused"] == 0
        assert rate["tokens_per_s"] / rate["requests_per_s"] == pytest.approx(tokens / 12, rel=0.05)
        assert 0 < rate["itl_ms"]["median"] <= rate["itl_ms"]["p99"] and rate["ttft_ms"]["mean"] > 0
    assert report["rates"][1]["requests_per_s"] > report["rates"][0]["requests_per_s"]
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_openai_client(server):
    """Catches: whatever the real client cannot read: whole and streamed answers, logprobs, n, errors."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE
    )
    assert [m.id for m in client.models.list()] == ["tiny"]
    whole = client.completions.create(
        model="tiny", prompt="abc", max_tokens=8, n=2, seed=1, logprobs=2
    )
    assert len(whole.choices) == 2 and whole.usage.completion_tokens == 16 and whole._request_id
    assert len(whole.choices[0].logprobs.token_logprobs) == 8
    stream = client.completions.create(
        model="tiny",
        prompt="abc",
        max_tokens=8,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 50},
    )
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens == 8
    assert len("".join(c.choices[0].text for c in chunks[:-1])) == 8
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt="abc", best_of=3)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="abc")


def test_openai_client_chats(server):
    """Catches: whatever the real client cannot read: whole and streamed chats, logprobs, errors."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE
    )
    same = dict(
        model="tiny", messages=CHAT, max_completion_tokens=8, seed=1, extra_body={"top_k": 50}
    )
    create = lambda **body: client.chat.completions.create(**same | body)
    whole = create(n=2, logprobs=True, top_logprobs=2)
    assert [c.message.role for c in whole.choices] == [
        "assistant"
    ] * 2 and whole.usage.completion_tokens == 16
    assert [len(entry.top_logprobs) for entry in whole.choices[0].logprobs.content] == [2] * 8
    chunks = list(create(stream=True, stream_options={"include_usage": True}))
    assert (
        chunks[-1].usage.completion_tokens == 8 and chunks[0].choices[0].delta.role == "assistant"
    )
    assert (
        "".join(c.choices[0].delta.content for c in chunks[:-1]) == whole.choices[0].message.content
    )
    for mistake in (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
    ):
        with pytest.raises(openai.BadRequestError, match=next(iter(mistake))):
            create(**mistake)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright: a browser drives the page"
    )
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium on the path")
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with (
        playwright.sync_playwright() as p,
        p.chromium.launch(executable_path=chromium, args=flags) as browser,
    ):
        yield browser


@pytest.mark.parametrize("scheme, width", [("light", 1200), ("dark", 390)])
def test_page_in_a_browser(server, tmp_path, browser, scheme, width):
    """Catches: a page that does not stream, cannot be stopped, shows no alternatives or no pages, or calls another host."""
    prompt = "def the_same_prefix_that_both_have(x): "
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    hosts, problems = set(), []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.on(
        "console",
        lambda message: message.type in ("error", "warning") and problems.append(message.text),
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    server.step_seconds = 0.03
    page.fill("#prompt", prompt)
    page.fill("[name=max_tokens]", "80")
    page.fill("[name=seed]", "1")
    page.press("#prompt", "Control+Enter")
    page.click("text=Generate")
    page.locator("#legend li >> nth=1").wait_for()  # two requests hold pages
    page.locator(".output >> nth=0 >> .token >> nth=5").wait_for()
    page.locator("#pool-text", has_text="4 of them shared").wait_for()
    page.screenshot(path=tmp_path / f"{scheme}_running.png", full_page=True)
    page.locator(".output >> nth=0").get_by_text("Stop").click()
    page.locator(".output >> nth=0", has_text="stopped").wait_for()
    server.until(lambda: len(server.server.worker.open) == 1, "one stopped, the other not")
    server.step_seconds = 0.0
    page.locator(".output >> nth=1", has_text="80 new").wait_for()
    [alone] = server.complete(prompt=prompt, max_tokens=80, seed=1, temperature=0.8)["choices"]
    assert (
        page.locator(".output >> nth=1 >> .text").inner_text().endswith(alone["text"].rstrip("\n"))
    )
    page.hover(".output >> nth=1 >> .token >> nth=3")
    assert page.locator("#tip").inner_text().count("%") >= 6
    page.keyboard.press("Escape")
    page.focus(".output >> nth=1 >> .text")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / f"{scheme}_done.png", full_page=True)
    page.fill("[name=max_tokens]", "500")
    page.click("text=Generate")
    page.locator(".output .error", has_text="context is 128").wait_for()
    with server.standing():
        full = [server.connection({"prompt": ["a"] * 8, "max_tokens": 1}) for _ in range(2)]
        server.until(lambda: len(server.server.worker.open) == 2, "the queue is full")
        page.fill("[name=max_tokens]", "8")
        page.click("text=Generate")
        page.locator(".output .error", has_text="limit is 16: try again").wait_for()
    page.screenshot(path=tmp_path / f"{scheme}_errors.png", full_page=True)
    for connection in full:
        connection.close()
    assert hosts == {f"127.0.0.1:{server.port}"}
    assert [p for p in problems if "400" not in p and "429" not in p] == []
    page.close()


def test_page_shows_how_the_server_is(model, tmp_path, browser):
    """Catches: a page that asks for no password where there is a key, or looks alive when a stream has broken off or the server is gone."""
    running = Running(model, api_key="secret", drain_timeout=0).ready()
    page = browser.new_page(http_credentials={"username": "anyone", "password": "secret"})
    page.goto(running.url)
    page.locator("#state", has_text="ready").wait_for()
    running.step_seconds = 0.1
    page.fill("[name=max_tokens]", "100")
    page.click("text=Generate")
    page.locator(".output .token >> nth=2").wait_for()
    running.drain()
    page.locator(".output .error", has_text="drain_timeout=0").wait_for()
    page.locator("#state.error", has_text="does not answer").wait_for()
    page.click("text=Generate")
    page.locator(".output .error", has_text="does not answer").wait_for()
    page.screenshot(path=tmp_path / "down.png", full_page=True)
    running.thread.join(DEADLINE)
    assert running.error is None
