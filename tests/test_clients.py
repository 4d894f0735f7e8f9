"""Conformance: the openai SDK, and the bodies that other clients send, against a server.

What a client of OpenAI's API relies on: that it can read every answer, can put a message back into
the next request, and recognises a mistake by its class and code.
"""

from typing import Literal

import pydantic
import pytest

from running_server import CONFIG, TOKENIZER, events

pytestmark = pytest.mark.slow

openai = pytest.importorskip("openai")

pytest_plugins = ["server_fixtures"]

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
]


@pytest.fixture
def client(server):
    """Return the real client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_completions(client):
    """Catches: whatever the real client cannot read: whole and streamed answers, logprobs, n."""
    create = client.completions.create
    same = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "seed": 1}
    whole = create(**same, n=2, logprobs=2)
    assert len(whole.choices) == 2
    assert whole.usage.completion_tokens == 16
    assert whole._request_id
    assert len(whole.choices[0].logprobs.token_logprobs) == 8
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(create(**same, **options, extra_body={"top_k": 50}))
    assert chunks[-1].usage.completion_tokens == 8
    assert len("".join(c.choices[0].text for c in chunks[:-1])) == 8


def test_chats(client):
    """Catches: whatever the real client cannot read: whole and streamed chats, logprobs."""
    create = client.chat.completions.create
    same = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 8, "seed": 1}
    same["extra_body"] = {"top_k": 50}
    whole = create(**same, n=2, logprobs=True, top_logprobs=2)
    assert [c.message.role for c in whole.choices] == ["assistant"] * 2
    assert whole.usage.completion_tokens == 16
    assert [len(entry.top_logprobs) for entry in whole.choices[0].logprobs.content] == [2] * 8
    chunks = list(create(**same, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 8
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content for c in chunks[:-1])
    assert text == whole.choices[0].message.content


@pytest.mark.parametrize("exclude_none", [False, True])
def test_a_message_is_put_back(client, exclude_none):
    """Catches: a conversation that ends with its second turn, because the answer is refused when it
    comes back with all the fields that the client has for it."""
    create = client.chat.completions.create
    same = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    message = create(messages=CHAT, **same).choices[0].message
    follow_up = {"role": "user", "content": "c"}
    expected = create(
        messages=[*CHAT, {"role": "assistant", "content": message.content}, follow_up], **same
    )
    for put_back in (message, message.model_dump(exclude_none=exclude_none)):
        answer = create(messages=[*CHAT, put_back, follow_up], **same)
        assert answer.choices[0].message == expected.choices[0].message


def test_continuous_usage(client):
    """Catches: chunks whose usage the client cannot read."""
    chunks = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    usages = [chunk.usage for chunk in chunks]
    tokens = [usage.completion_tokens for usage in usages]
    assert tokens == sorted(tokens) and tokens[-1] == 6
    assert {usage.prompt_tokens for usage in usages} == {usages[-1].prompt_tokens}


def test_the_streaming_helper(client):
    """Catches: a stream from which the SDK's own helper cannot put the answer together."""
    only_q = {"logit_bias": {str(TOKENIZER.ids["q"]): 100}, "stop": "qqqq"}
    extra_body = {"include_stop_str_in_output": True}
    same = {"model": "tiny", "messages": CHAT, "logprobs": True, "extra_body": extra_body, **only_q}
    with client.chat.completions.stream(**same) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "qqqq"
    assert final.choices[0].finish_reason == "stop"
    assert len(final.choices[0].logprobs.content) == 4


def test_models(client):
    """Catches: a model that is listed and not found, or found by another name."""
    assert [m.id for m in client.models.list()] == ["tiny"]
    card = client.models.retrieve("tiny")
    assert (card.id, card.max_model_len) == ("tiny", CONFIG.block_size)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="abc")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_prompt_that_is_too_long(client, kind):
    """Catches: an error by which a client does not see that a shorter prompt would do."""
    with pytest.raises(openai.BadRequestError) as caught:
        if kind == "chat":
            content = "a" * 500
            messages = [{"role": "user", "content": content}]
            client.chat.completions.create(model="tiny", messages=messages)
        else:
            client.completions.create(model="tiny", prompt="a" * 500)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == ("messages" if kind == "chat" else "prompt")
    assert "maximum context length" in caught.value.message


def test_parse(client):
    """Catches: an answer that the client cannot make a model of; a schema that is not followed."""

    class Colour(pydantic.BaseModel):
        """What is asked for."""

        name: Literal["red", "green"]
        parts: int = pydantic.Field(ge=0, le=255)

    answer = client.chat.completions.parse(
        model="tiny", messages=CHAT, max_tokens=80, seed=1, response_format=Colour
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Colour)


def test_structured_outputs(client):
    """Catches: a form that is taken and not followed, on either route, whole and streamed; one
    that cannot be compiled and is no 400 about its field."""
    same = {"model": "tiny", "prompt": "abc", "max_tokens": 20}
    form = {"choice": ["yes", "no"]}
    create = client.completions.create
    answer = create(**same, n=4, extra_body={"structured_outputs": form})
    assert {choice.text for choice in answer.choices} <= set(form["choice"])
    form = {"regex": "[ab]{3}"}
    chunks = list(create(**same, stream=True, extra_body={"structured_outputs": form}))
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert len(text) == 3 and set(text) <= set("ab")
    with pytest.raises(openai.BadRequestError, match="backreferences") as caught:
        create(**same, extra_body={"structured_outputs": {"regex": r"(a)\1"}})
    assert caught.value.param == "structured_outputs"
    with pytest.raises(openai.BadRequestError, match="not") as caught:
        create(
            **same,
            extra_body={
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}
            },
        )
    assert caught.value.param == "response_format"


def test_what_the_server_lacks_is_refused(client):
    """Catches: tools that are no functions, formats or a choice of the best that are asked for and
    left out."""
    create = client.chat.completions.create
    same = {"model": "tiny", "messages": CHAT, "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="tools"):
        create(**same, tools=[{"type": "custom", "custom": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="response_format"):
        create(**same, response_format={"type": "json_schema"})
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="tiny", prompt="abc", best_of=3)


# What these programs send, as their sources have it, without what they leave to their users.
BODIES = {
    "guidellm, completions": (
        "/v1/completions",
        {
            "prompt": "abc",
            "model": "tiny",
            "max_tokens": 4,
            "max_completion_tokens": 4,
            "stop": None,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "guidellm, chats": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}],
            "model": "tiny",
            "max_tokens": 4,
            "max_completion_tokens": 4,
            "stop": None,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "sglang.bench_serving": (
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": "abc",
            "temperature": 0.0,
            "best_of": 1,
            "max_tokens": 4,
            "stream": True,
            "ignore_eos": True,
        },
    ),
    "vllm bench serve": (
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": "abc",
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": 4,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "LangChain, completions": (
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": ["abc"],
            "temperature": 0.7,
            "top_p": 1,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "n": 2,
            "best_of": 2,
            "seed": None,
            "logprobs": None,
            "max_tokens": 4,
        },
    ),
    "lm-evaluation-harness": (
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": [[1, 2, 3]],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    ),
}


@pytest.mark.parametrize("path, body", BODIES.values(), ids=BODIES)
def test_bodies_of_other_clients(server, path, body):
    """Catches: a default that a real program writes out, and that shuts it out."""
    response = server.post(path, **body)
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert events(response)[0]["choices"]
