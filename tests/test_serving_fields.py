"""Tests of the fields of requests: those that ask for nothing, and what the others bring about."""

import re
from pathlib import Path

import pytest

from running_server import CONFIG, TOKENIZER, events
from sequence import Logprobs, Output
from serving import fields
from serving.answers import CompletionChoiceWriter
from serving.protocol import ChatRequest, CompletionRequest, Message, StreamOptions, TokenizeRequest
from tokenizer import CharTokenizer

pytest_plugins = ["server_fixtures"]

SAME = {"max_tokens": 4, "temperature": 0}
CHAT = [{"role": "user", "content": "abc"}]
# What the tables take for other fields, or only for some of their values.
EXAMPLES = {
    "best_of": [1, 1.0],
    "max_completion_tokens": [4],
    "user": ["someone"],
    "metadata": [{"a": {"b": [1, None]}}],
    "prompt_cache_key": ["x"],
    "prompt_cache_retention": ["24h"],
    "safety_identifier": ["x"],
}


def bodies_that_ask_for_nothing() -> list[dict]:
    """Return one for each value in the table of requests, one of null for each field there is, and
    for fields that there are not."""
    bodies = []
    for name, values in fields.GENERATION.items():
        bodies += [{name: value} for value in EXAMPLES.get(name, values)]
    names = {*fields.GENERATION, *CompletionRequest.model_fields, *ChatRequest.model_fields}
    names -= {"prompt", "messages", *SAME}
    bodies += [{name: None} for name in sorted({*names, "guided_json", "audio", "anything"})]
    return [*bodies, {"n": 1, "best_of": 1}, {"logit_bias": {}}, {"stop": []}]


def test_what_asks_for_nothing_changes_nothing(server):
    """Catches: a default that a client writes out, a null or a name that changes no token, answered
    400; and one that changes the answer."""
    expected = server.complete(prompt="abc", **SAME)["choices"]
    expected_chat = server.chat(messages=CHAT, **SAME)["choices"]
    for body in bodies_that_ask_for_nothing():
        assert server.complete(prompt="abc", **SAME, **body)["choices"] == expected, body
        assert server.chat(messages=CHAT, **SAME, **body)["choices"] == expected_chat, body


@pytest.mark.parametrize(
    "body",
    [
        {"prompt_cache_retention": "24h", "prompt_cache_key": "x", "safety_identifier": "y"},
        {"verbosity": "medium", "reasoning_effort": "none", "service_tier": "auto"},
        {"reasoning_effort": None, "chat_template_kwargs": {}, "service_tier": "default"},
        {"return_cached_tokens_details": False},
    ],
)
def test_what_clients_write_without_being_asked(server, body):
    """Catches: a client shut out for a field that changes no token, on either route."""
    assert server.post(prompt="abc", **SAME, **body).status_code == 200
    path = "/v1/chat/completions"
    assert server.post(path, messages=CHAT, **SAME, **body).status_code == 200


@pytest.mark.parametrize("padding", [True, False])
def test_padding_of_streams_is_no_matter(server, padding):
    """Catches: a stream refused for the padding that it need not have."""
    options = {"include_obfuscation": padding}
    chunks = events(server.post(prompt="abc", stream=True, stream_options=options, **SAME))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize(
    "field, value",
    [
        ("reasoning_effort", "low"),
        ("verbosity", "high"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("return_cached_tokens_details", True),
    ],
)
def test_what_would_change_the_answer_is_refused(server, field, value):
    """Catches: a value that asks for something taken for one that asks for nothing."""
    response = server.post("/v1/chat/completions", messages=CHAT, **SAME, **{field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_best_of_n_asks_for_no_choice(server):
    """Catches: n samples of the n best refused, which LangChain asks for."""
    same = {"prompt": "abc", "seed": 1, "max_tokens": 4}
    assert (
        server.complete(n=3, best_of=3, **same)["choices"]
        == server.complete(n=3, **same)["choices"]
    )


def test_message_fields_that_ask_for_nothing(server):
    """Catches: a message refused for the fields in which it came from the server, or a name in
    it."""
    expected = server.chat(messages=CHAT, **SAME)["choices"]
    put_back = {"refusal": None, "annotations": [], "audio": None, "function_call": None}
    for extra in (put_back, {"tool_calls": None}, {"tool_calls": []}, {"name": "x"}):
        [message] = CHAT
        assert server.chat(messages=[message | extra], **SAME)["choices"] == expected, extra


def test_many_fields_that_ask_for_nothing_hide_no_mistake(server):
    """Catches: a mistake that is overlooked beside what is taken out, in any model."""
    neutral = {f"field{i}": None for i in range(100)}
    response = server.post(prompt="abc", **neutral, wrong=1)
    assert response.json()["error"]["param"] == "wrong"
    response = server.post(prompt="abc", stream=True, stream_options=neutral | {"wrong": 1})
    assert response.json()["error"]["param"] == "stream_options"


def test_docs_name_every_field():
    """Catches: a field that docs/serving.md does not tell of, or one there that is gone."""
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    section = text.partition("\n## Fields\n")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    documented = set(re.findall(r"`([a-z_]+)`", "\n".join(table))) - {"null"}
    models = (CompletionRequest, ChatRequest, StreamOptions, TokenizeRequest, Message)
    tables = (fields.GENERATION, fields.MESSAGE, fields.STREAM_OPTIONS, fields.TOKENIZE)
    known = {name for model in models for name in model.model_fields}
    neutral = {name for table in tables for name in table}
    assert documented == known | neutral, documented ^ (known | neutral)


def test_stop_reason_and_included_stop_strings(server):
    """Catches: a stop string that is not named, or in the text against the request's will."""
    q = TOKENIZER.ids["q"]
    same = {"prompt": "abc", "logit_bias": {q: 100.0}, "max_tokens": 6}

    def choice(**body) -> dict:
        return server.complete(**same, **body)["choices"][0]

    plain = choice()
    assert (plain["text"], plain["finish_reason"], plain["stop_reason"]) == (
        "q" * 6,
        "length",
        None,
    )
    stopped = choice(stop=["z", "qq"], min_tokens=3)
    assert (stopped["text"], stopped["stop_reason"]) == ("q", "qq")
    included = choice(stop=["z", "qq"], include_stop_str_in_output=True)
    assert (included["text"], included["stop_reason"]) == ("qq", "qq")
    assert choice(stop_token_ids=[q])["stop_reason"] == q
    chat = server.chat(messages=CHAT, logit_bias={q: 100.0}, stop="qq")["choices"][0]
    assert (chat["message"]["content"], chat["stop_reason"]) == ("", "qq")


class Ends(CharTokenizer):
    """Characters, of which the last stands for a special token."""

    def __init__(self) -> None:
        super().__init__("ab|")
        self.special_tokens = {"|": 2}


@pytest.mark.parametrize("skip, offsets", [(None, [0, 1, 1]), (False, [0, 1, 2])])
def test_special_tokens_take_no_room_in_the_text(skip, offsets):
    """Catches: offsets of logprobs that count a token which is not in the text."""
    body = CompletionRequest(prompt="a", logprobs=0, skip_special_tokens=skip)
    writer = CompletionChoiceWriter(body, Ends(), [0], 0)
    logprobs = [Logprobs(token, -1.0, 1, {}) for token in (0, 2, 1)]
    piece = writer.write(Output(0, 0, [0, 2, 1], "ab", logprobs))
    assert list(piece.choice.logprobs.text_offset) == offsets


def test_token_ids_of_prompt_and_answer_are_apart(server):
    """Catches: the prompt's tokens among the new ones when it is echoed, or another prompt's."""
    prompts = ["abc", "xy"]
    answer = server.complete(prompt=prompts, echo=True, return_token_ids=True, n=2, **SAME)
    for choice, prompt in zip(answer["choices"], ["abc", "abc", "xy", "xy"], strict=True):
        assert choice["prompt_token_ids"] == TOKENIZER.encode(prompt)
        assert len(choice["token_ids"]) == 4
        assert choice["text"] == prompt + TOKENIZER.decode(choice["token_ids"])
    chat = server.chat(messages=CHAT, return_token_ids=True, **SAME)
    assert chat["prompt_token_ids"] == TOKENIZER.encode("user: abc\nassistant:")
    assert len(chat["choices"][0]["token_ids"]) == 4
    assert "prompt_token_ids" not in chat["choices"][0]
    silent = server.complete(prompt="abc", echo=True, **SAME)["choices"][0]
    assert silent["token_ids"] is None and silent["prompt_token_ids"] is None


@pytest.mark.parametrize("n", [1, 2])
def test_prompt_logprobs_of_chats(server, n):
    """Catches: a chat whose prompt is not scored, scored as another, or told of in each chunk."""
    text = "user: abc\nassistant:"
    same = {"prompt_logprobs": 2, "return_token_ids": True, "n": n, **SAME}
    expected = server.complete(prompt=text, **same)["choices"][0]
    whole = server.chat(messages=CHAT, **same)
    for name in ("prompt_logprobs", "prompt_token_ids"):
        assert whole[name] == expected[name]
    assert len(whole["prompt_logprobs"]) == len(text)
    chunks = events(server.post("/v1/chat/completions", messages=CHAT, stream=True, **same))
    for name in ("prompt_logprobs", "prompt_token_ids"):
        told = [chunk[name] for chunk in chunks if chunk[name] is not None]
        assert told == [expected[name]]


def test_an_echoed_prompt_is_scored_for_both_who_ask(server):
    """Catches: prompt_logprobs that are cut to what logprobs asks of an echoed prompt, or the other
    way round."""
    for few, many in ((1, 4), (4, 1)):
        plain = server.complete(prompt="abc", prompt_logprobs=many, **SAME)["choices"][0]
        both = server.complete(prompt="abc", prompt_logprobs=many, logprobs=few, echo=True, **SAME)[
            "choices"
        ][0]
        assert both["prompt_logprobs"] == plain["prompt_logprobs"]
        echoed = server.complete(prompt="abc", logprobs=few, echo=True, **SAME)["choices"][0]
        assert both["logprobs"] == echoed["logprobs"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_continuous_usage(server, path):
    """Catches: chunks without the usage so far, or with another sample's; a last chunk that nobody
    asked for."""
    body = {"prompt": "abc"} if path == "/v1/completions" else {"messages": CHAT}
    body |= {"max_tokens": 6, "n": 2, "seed": 1, "stream": True, "return_token_ids": True}
    plain = events(server.post(path, **body))
    assert all(chunk["usage"] is None for chunk in plain)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(server.post(path, **body, stream_options=options))
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    prompt_tokens = last["usage"]["prompt_tokens"]
    for index in (0, 1):
        tokens = 0
        for chunk in chunks:
            [choice] = chunk["choices"]
            if choice["index"] == index:
                tokens += len(choice["token_ids"])
                usage = chunk["usage"]
                assert usage["completion_tokens"] == tokens
                assert usage["prompt_tokens"] == prompt_tokens
                assert usage["total_tokens"] == prompt_tokens + tokens
        assert tokens == 6
    alone = events(server.post(path, **body, stream_options={"continuous_usage_stats": True}))
    assert all(chunk["choices"] and chunk["usage"] for chunk in alone)


def test_truncated_prompts(server):
    """Catches: a prompt that loses its end, that is refused although it was to be cut, or that is
    cut more than needed."""
    long = "".join(chr(97 + i % 26) for i in range(300))
    same = {"max_tokens": 8, "temperature": 0, "return_token_ids": True}

    def tokens_of(**body) -> list[int]:
        return server.complete(**same, **body)["choices"][0]["prompt_token_ids"]

    ids = TOKENIZER.encode(long)
    assert tokens_of(prompt=long, truncate_prompt_tokens=10) == ids[-10:]
    assert tokens_of(prompt=ids, truncate_prompt_tokens=-1) == ids[-(CONFIG.block_size - 8) :]
    assert tokens_of(prompt="abc", truncate_prompt_tokens=10) == TOKENIZER.encode("abc")
    chat = server.chat(
        messages=[{"role": "user", "content": long}], truncate_prompt_tokens=-1, **same
    )
    assert chat["usage"] == {"prompt_tokens": 120, "completion_tokens": 8, "total_tokens": 128}
    assert chat["prompt_token_ids"] == TOKENIZER.encode(f"user: {long}\nassistant:")[-120:]


def test_a_chat_that_goes_on_with_its_last_message(server):
    """Catches: a last message that is closed, or followed by another turn."""
    messages = [*CHAT, {"role": "assistant", "content": "so "}]
    chat = server.chat(messages=messages, continue_final_message=True, **SAME)
    text = server.complete(prompt="user: abc\nassistant: so ", **SAME)
    assert chat["choices"][0]["message"]["content"] == text["choices"][0]["text"]
    assert chat["usage"] == text["usage"]


def test_tokens_of_a_chat(server):
    """Catches: /tokenize that counts other tokens than the chat has, or takes neither or both."""
    chat = {"messages": CHAT}
    counted = server.post("/tokenize", **chat).json()
    answer = server.chat(return_token_ids=True, **chat, **SAME)
    assert counted["tokens"] == answer["prompt_token_ids"]
    assert counted["count"] == answer["usage"]["prompt_tokens"]
    bare = server.post("/tokenize", add_generation_prompt=False, **chat).json()
    assert bare["tokens"] == TOKENIZER.encode("user: abc\n")
    neutral = {"add_special_tokens": False, "return_token_strs": False}
    assert server.post("/tokenize", prompt="abc", **neutral).json()["count"] == 3
    for body in ({}, {"prompt": "a", **chat}):
        response = server.post("/tokenize", **body)
        assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"


def test_allowed_tokens_and_bad_words_arrive(server):
    """Catches: lists of tokens that reach the engine in another order or not at all."""
    allowed = TOKENIZER.encode("xyz")
    same = {"prompt": "abc", "max_tokens": 30, "seed": 2, "allowed_token_ids": allowed}
    text = server.complete(**same)["choices"][0]["text"]
    assert set(text) == set("xyz")
    text = server.complete(**same, bad_words=["z", "xy"])["choices"][0]["text"]
    assert set(text) <= set("xy") and "xy" not in text
