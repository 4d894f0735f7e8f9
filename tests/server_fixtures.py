"""Fixtures of the tests of serving: one tiny model, and one server that they share.

A pytest plugin, named in `pytest_plugins`, so that several test files have the same server: it
compiles for a while."""

from collections.abc import Iterator

import pytest
from flax import nnx

from engine import Engine
from model import GPT
from running_server import CONFIG, ENGINE, TOKENIZER, Running

TEMPLATE = """{% for t in tools or [] %}{{ t.function.name }} {% endfor %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{% if m.role == "system" and not loop.first %}{{ raise_exception("system comes first") }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="session")
def tiny_model() -> GPT:
    """A model with random parameters."""
    return GPT(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def server(tiny_model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with small limits and a chat template."""
    template = tmp_path_factory.mktemp("chat") / "template.jinja"
    template.write_text(TEMPLATE)
    running = Running(
        tiny_model,
        max_waiting=16,
        max_prompts=8,
        max_body_bytes=100_000,
        max_total_logprobs=20_000,
        chat_template=template,
    )
    yield running.ready()
    running.drain()
    assert running.ended() is None


@pytest.fixture(scope="session")
def offline(tiny_model: GPT) -> Engine:
    """The same model without HTTP."""
    return Engine(tiny_model, TOKENIZER, ENGINE, progress=False)
