"""Tests of what the server answers: completions and chats, whole and streamed."""

import string
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from running_server import CONFIG, TOKENIZER, asgi, events
from sequence import SamplingParams
from serving.config import ServeConfig
from serving.routes import create_app
from serving.served_model import ServedModel

pytest_plugins = ["server_fixtures"]

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
]


def test_prompt_forms(server):
    """Catches: a list of numbers taken for several prompts, choices in order of arrival, a usage
    that counts the echo."""
    same = {"max_tokens": 4, "temperature": 0}
    texts = [server.complete(prompt=p, **same)["choices"][0]["text"] for p in ("abc", "xyz")]
    ids = [TOKENIZER.encode(p) for p in ("abc", "xyz")]
    assert server.complete(prompt=ids[0], **same)["choices"][0]["text"] == texts[0]
    expected = ["abc" + texts[0]] * 2 + ["xyz" + texts[1]] * 2
    for prompt in (["abc", "xyz"], ids):
        answer = server.complete(prompt=prompt, n=2, echo=True, **same)
        assert [c["text"] for c in answer["choices"]] == expected
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 16, "total_tokens": 22}


EVERY_PARAMETER = {
    "max_tokens": 24,
    "min_tokens": 20,
    "temperature": 1.5,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.3,
    "logit_bias": {5: 2.0, 7: -100.0},
    "allowed_token_ids": tuple(range(80)),
    "bad_words": ("t", "ab"),
    "seed": 123,
    "stop": ("e",),
    "stop_token_ids": (9,),
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "ignore_eos": True,
    "n": 2,
    "logprobs": 3,
    "prompt_logprobs": 2,
    "echo": True,
}


def test_every_sampling_parameter_arrives(server, offline):
    """Catches: a parameter that is accepted and ignored, or arrives under another name."""
    # test_clients.py asks for structured output, which bad_words and others do not go with.
    assert EVERY_PARAMETER.keys() | {"structured"} == SamplingParams.__dataclass_fields__.keys()
    body = EVERY_PARAMETER | {"return_token_ids": True}
    # echo together with logprobs reports the prompt's logprobs with as many alternatives.
    params = SamplingParams(**EVERY_PARAMETER | {"prompt_logprobs": 3})
    [expected] = offline.generate([TOKENIZER.encode("The ")], params, progress=False)
    answer = server.complete(prompt="The ", **body)
    for choice, out in zip(answer["choices"], expected, strict=True):
        check_choice(choice, out)
    # Each one alone makes a difference, or is refused alone, or is neutral here.
    for name in EVERY_PARAMETER:
        assert server.post(prompt="The ", **{name: body[name]}).status_code in (200, 400)


def check_choice(choice, out):
    """A choice with echo says what the engine says offline; the prompt has 4 tokens."""
    assert choice["token_ids"] == out.token_ids
    assert choice["prompt_token_ids"] == TOKENIZER.encode("The ")
    assert choice["text"] == out.text
    assert choice["finish_reason"] == out.finish_reason
    assert choice["stop_reason"] == out.stop_reason
    new = [p.logprob for p in out.logprobs]
    prompt = [p.logprob for p in out.prompt_logprobs[1:]]
    lists = choice["logprobs"]
    assert lists["token_logprobs"][0] is None
    assert lists["token_logprobs"][1:4] == pytest.approx(prompt)
    assert lists["token_logprobs"][4:] == pytest.approx(new)
    assert all(3 <= len(top) <= 4 for top in lists["top_logprobs"][1:])
    for entry, top in zip(out.prompt_logprobs[1:], choice["prompt_logprobs"][1:], strict=True):
        assert 2 <= len(top) <= 3
        assert top[str(entry.token)]["rank"] == entry.rank
        assert {1, 2} <= {other["rank"] for other in top.values()}


def test_prompt_logprobs_without_alternatives(server):
    """Catches an alternative beside the prompt's own token where none was asked for."""
    choice = server.complete(prompt="a€b", max_tokens=1, prompt_logprobs=0)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    tokens = [list(entry) for entry in choice["prompt_logprobs"][1:]]
    assert tokens == [[str(token)] for token in TOKENIZER.encode("a€b")[1:]]


def test_logprob_lists(server):
    """Catches: offsets that count bytes, and tokens without a text of their own."""
    choice = server.complete(prompt="a€b", max_tokens=2, echo=True, logprobs=0)["choices"][0]
    lists = choice["logprobs"]
    assert "".join(lists["tokens"]) == choice["text"]
    assert lists["text_offset"] == [0, 1, 2, 3, 4]
    columns = (lists["tokens"], lists["token_logprobs"], lists["top_logprobs"])
    for token, logprob, top in list(zip(*columns, strict=True))[1:]:
        assert top == {token: logprob}


@pytest.mark.parametrize("extra", [{}, {"logprobs": 1, "echo": True}, {"stop": ["q", "zz"]}])
def test_stream_is_the_whole_in_pieces(server, extra):
    """Catches: text lost or doubled between chunks, offsets that start anew in each, a last chunk
    without its reason."""
    body = {"prompt": ["abc", "de"], "max_tokens": 24, "seed": 3, "n": 2, "return_token_ids": True}
    body |= extra
    whole = server.complete(**body)
    chunks = events(server.post(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"] == []
    for index, expected in enumerate(whole["choices"]):
        pieces = pieces_of(chunks, index)
        assert joined(p["text"] for p in pieces) == expected["text"]
        check_pieces(pieces, expected)
        if "logprobs" in extra:
            for name, values in expected["logprobs"].items():
                assert concatenated(p["logprobs"][name] for p in pieces) == values


def pieces_of(chunks, index):
    """The pieces of one choice; the last chunk has none, but the usage."""
    return [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]


def check_pieces(pieces, expected):
    """The pieces bring all tokens, those of the prompt once, at the beginning, and the reason of
    the end once, at the end."""
    assert len(pieces) > 1
    for name in ("prompt_token_ids", "prompt_logprobs"):
        told = [piece.get(name) for piece in pieces]
        assert told == [expected.get(name)] + [None] * (len(pieces) - 1)
    assert concatenated(p["token_ids"] for p in pieces) == expected["token_ids"]
    for name in ("finish_reason", "stop_reason"):
        reasons = [p[name] for p in pieces]
        assert reasons == [None] * (len(pieces) - 1) + [expected[name]]


def joined(texts):
    """The texts as one."""
    return "".join(texts)


def concatenated(lists):
    """The lists as one."""
    return [item for one in lists for item in one]


def test_streamed_prompt_logprobs_do_not_wait_for_text(server):
    """Catches: prompt logprobs that are lost because the first token's text is withheld: it could
    begin a stop string."""
    body = {
        "prompt": "abc",
        "max_tokens": 3,
        "prompt_logprobs": 1,
        "logit_bias": {TOKENIZER.ids["q"]: 100.0},
        "stop": ["qz"],
    }
    [whole] = server.complete(**body)["choices"]
    pieces = [chunk["choices"][0] for chunk in events(server.post(**body, stream=True))]
    assert whole["text"] == "qqq" == joined(p["text"] for p in pieces)
    assert pieces[0]["prompt_logprobs"] == whole["prompt_logprobs"]
    assert len(whole["prompt_logprobs"]) == 3


SHARED_PARAMETERS = {
    "temperature": 0.9,
    "top_k": 30,
    "top_p": 0.9,
    "min_p": 0.01,
    "seed": 5,
    "n": 2,
    "stop": ["q"],
    "frequency_penalty": 0.5,
    "presence_penalty": 0.2,
    "repetition_penalty": 1.1,
    "logit_bias": {5: 2.0},
    "min_tokens": 3,
    "stop_token_ids": [9],
    "ignore_eos": True,
    "return_token_ids": True,
}


def test_chat_is_the_completion_of_its_template(server):
    """Catches: a chat that is rendered or sampled otherwise than its text would be, parameters of
    it that do not arrive."""
    prompt = "system: be brief\nuser: a\nb\nassistant:"
    text = server.complete(prompt=prompt, max_tokens=20, logprobs=3, **SHARED_PARAMETERS)
    chat = server.chat(
        messages=CHAT, max_completion_tokens=20, logprobs=True, top_logprobs=3, **SHARED_PARAMETERS
    )
    assert chat["usage"] == text["usage"]
    assert chat["object"] == "chat.completion"
    for ours, theirs in zip(chat["choices"], text["choices"], strict=True):
        said = {"role": "assistant", "content": theirs["text"], "tool_calls": None}
        assert ours["message"] == said
        for name in ("index", "finish_reason", "token_ids"):
            assert ours[name] == theirs[name]
        scored = ours["logprobs"]["content"]
        assert [s["logprob"] for s in scored] == theirs["logprobs"]["token_logprobs"]
        assert [s["token"] for s in scored] == theirs["logprobs"]["tokens"]
        for entry, top in zip(scored, theirs["logprobs"]["top_logprobs"], strict=True):
            assert bytes(entry["bytes"]).decode() == entry["token"]
            assert len(entry["top_logprobs"]) == 3
            assert top.items() >= {t["token"]: t["logprob"] for t in entry["top_logprobs"]}.items()


def test_length_of_a_chat(server):
    """Catches: a chat that ends after 16 tokens although nobody asked for that, a name of the limit
    that does nothing, a generation prompt that cannot be left out."""
    same = {"messages": CHAT[:1], "temperature": 0}
    assert server.chat(**same)["usage"]["total_tokens"] == CONFIG.block_size
    one_name = server.chat(max_tokens=3, **same)
    other_name = server.chat(max_completion_tokens=3, **same)
    assert one_name["choices"] == other_name["choices"]
    bare = server.chat(max_tokens=3, add_generation_prompt=False, **same)
    longer = one_name["usage"]["prompt_tokens"] - bare["usage"]["prompt_tokens"]
    assert longer == len("assistant:")


@pytest.mark.parametrize(
    "extra", [{}, {"logprobs": True, "top_logprobs": 1}, {"stop": ["q", "zz"]}]
)
def test_streamed_chat_is_the_whole_in_pieces(server, extra):
    """Catches: text or logprobs lost between chunks, a role that is not said first or said
    twice."""
    body = {
        "path": "/v1/chat/completions",
        "messages": CHAT,
        "max_tokens": 24,
        "seed": 3,
        "n": 2,
        "return_token_ids": True,
        **extra,
    }
    whole = server.complete(**body)
    chunks = events(server.post(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["choices"] == []
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({(c["id"], c["created"]) for c in chunks}) == 1
    for index, expected in enumerate(whole["choices"]):
        pieces = pieces_of(chunks, index)
        check_pieces(pieces, expected)
        assert joined(p["delta"]["content"] for p in pieces) == expected["message"]["content"]
        roles = [p["delta"]["role"] for p in pieces]
        assert roles == ["assistant"] + [None] * (len(pieces) - 1)
        if "logprobs" in extra:
            scored = concatenated(p["logprobs"]["content"] for p in pieces)
            assert scored == expected["logprobs"]["content"]


def test_no_chat_without_a_template():
    """Catches: a chat route that guesses a template, or a page that promises it."""
    app = create_app(ServedModel(ServeConfig(out_dir=Path("out")), None, TOKENIZER, 128))
    assert "/v1/chat/completions" not in app.openapi()["paths"]
    status, body = asgi(app, "POST", "/v1/chat/completions")
    assert status == 404
    assert b"--chat_template=FILE" in body


def test_concurrent_answers_equal_answers_alone(server, offline):
    """Catches: outputs that go to another's request, and a result that depends on the company it is
    computed in."""
    prompts = [(string.ascii_letters * 2)[i : i + 1 + 5 * i % 37] for i in range(64)]

    def parameters(i: int) -> dict:
        return {
            "max_tokens": 4 + i % 13,
            "seed": i,
            "temperature": i % 3 / 2,
            "logprobs": 1,
            "n": 1 + i % 2,
        }

    def ask(i: int) -> list[dict]:
        while True:
            response = server.post(prompt=prompts[i], return_token_ids=True, **parameters(i))
            if response.status_code != 429:
                return response.json()["choices"]
            time.sleep(float(response.headers["Retry-After"]) / 20)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    for i, choices in enumerate(answers):
        params = SamplingParams(**parameters(i))
        [alone] = offline.generate([TOKENIZER.encode(prompts[i])], params, progress=False)
        for choice, out in zip(choices, alone, strict=True):
            assert choice["token_ids"] == out.token_ids
            assert choice["text"] == out.text
            assert choice["logprobs"]["token_logprobs"] == [p.logprob for p in out.logprobs]
    assert server.pages_held() == 0


def test_other_routes(server):
    """Catches: routes that the page, lm-eval or a load balancer calls, gone or changed."""
    tokens = server.post("/tokenize", prompt="a€b").json()
    assert tokens == {"tokens": TOKENIZER.encode("a€b"), "count": 3, "max_model_len": 128}
    assert server.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": "a€b"}
    assert server.post("/detokenize", tokens=[10**6]).status_code == 400
    [card] = server.get("/v1/models").json()["data"]
    assert card["id"] == "tiny"
    assert server.get("/v1/models/tiny").json() == card
    assert server.get("/v1/models/other/name").json()["error"]["code"] == "model_not_found"
    assert server.get("/version").json().keys() == {"version", "jax"}
    page = server.get("/")
    assert "<title>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    paths = server.get("/openapi.json").json()["paths"]
    assert paths.keys() >= {"/v1/completions", "/health", "/metrics", "/tokenize"}
    chat = "/v1/chat/completions"
    for path, status in (("/nowhere", 404), ("/v1/completions", 405), (chat, 405)):
        response = server.get(path)
        assert response.status_code == status
        assert "error" in response.json()
