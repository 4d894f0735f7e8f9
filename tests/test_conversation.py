"""Tests of serving/conversation.py and of sample.py --chat=True: a tiny random model that talks."""

import io
import os
import signal

import pytest
import tokenizers

import sample
from config import SampleConfig
from errors import UserError
from gguf_files import CHATML, SPECIAL, make_hf, write_gguf
from sequence import SamplingParams
from serving.chat import ChatTemplate
from serving.conversation import Conversation, interrupts_noted, talk
from tiny_engine import CONFIG, make_engine, make_model
from tokenizer import HFTokenizer

pytestmark = pytest.mark.slow

END = 2  # <|im_end|>
PARAMS = SamplingParams(max_tokens=6, temperature=0.8, seed=1, ignore_eos=True)
CONTEXT = CONFIG.block_size
TEMPLATE = (  # short, as the context is
    "{% for m in messages %}<|im_start|>{{ m['role'][0] }}{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)


@pytest.fixture(scope="module")
def engine():
    """The tiny engine of other tests, with the characters of ASCII and the special tokens of chats
    as tokens."""
    alphabet = [*SPECIAL, *map(chr, range(33, 127)), "Ġ", "Ċ"]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    return make_engine(make_model(), HFTokenizer(bpe.to_str(), END))


def converse(engine, params=PARAMS, system=None) -> Conversation:
    """Return a conversation in which nothing has been said."""
    return Conversation(engine, ChatTemplate(TEMPLATE, engine.tokenizer, {}), params, system)


def never() -> bool:
    """Do not stop an answer."""
    return False


def ask(conversation: Conversation, said: str) -> str:
    """Ask, and return the whole answer."""
    conversation.ask(said)
    return "".join(conversation.answer(never))


def test_each_answer_follows_all_that_was_said(engine):
    """Catches a turn that is lost, told in another's name, or computed again from the start."""
    conversation = converse(engine, system="the user said")
    said = [{"role": "system", "content": "the user said"}]
    for question in ("the user", "said 12"):
        said.append({"role": "user", "content": question})
        prompt = conversation.template.encode(said, True)
        [[alone]] = engine.generate([prompt], PARAMS, progress=False)
        hits = engine.stats().hit_tokens
        assert ask(conversation, question) == alone.text
        assert conversation.finish_reason == "length"
        said.append({"role": "assistant", "content": alone.text})
    assert conversation.messages == said[1:]
    assert engine.stats().hit_tokens - hits >= len(prompt) - 8
    conversation.clear()
    assert ask(conversation, "the user") == said[2]["content"]


def test_the_oldest_turns_make_room(engine):
    """Catches: a prompt that the engine refuses, a system prompt that goes first, more turns lost
    than must be, a question that empties the conversation and is not even answered."""
    conversation = converse(engine, system="the user")

    def size(messages) -> int:
        """Return the tokens of a prompt and its answer."""
        return len(conversation.template.encode([*conversation.opening, *messages], True)) + 6

    forgotten = asked = 0
    while forgotten == 0:
        before = list(conversation.messages)
        forgotten = conversation.ask(f"said {asked}")
        list(conversation.answer(never))
        asked += 1
    question = {"role": "user", "content": f"said {asked - 1}"}
    assert conversation.messages[:-1] == [*before[2 * forgotten :], question]
    assert size(conversation.messages[:-1]) <= CONTEXT
    assert size([*before[2 * forgotten - 2 :], question]) > CONTEXT
    assert forgotten < asked - 1
    before = list(conversation.messages)
    with pytest.raises(UserError, match=f"prompt of .* max_new_tokens=6 .* context of {CONTEXT}"):
        conversation.ask("x" * CONTEXT)
    assert conversation.messages == before
    assert not engine.busy


def test_a_stopped_answer_is_part_of_the_conversation(engine):
    """Catches: an engine that goes on with what nobody reads, a turn without an answer, the next
    answer with what is left of the one before."""
    conversation = converse(engine)
    whole = ask(conversation, "the")
    conversation.clear()
    pieces: list[str] = []
    conversation.ask("the")
    for text in conversation.answer(lambda: len(pieces) == 3):
        pieces.append(text)
    stopped = "".join(pieces)
    assert len(pieces) == 3
    assert whole.startswith(stopped)
    assert conversation.finish_reason is None
    assert not engine.busy
    assert conversation.messages[-1] == {"role": "assistant", "content": stopped}
    prompt = conversation.template.encode(
        [*conversation.messages, {"role": "user", "content": "end"}], True
    )
    [[alone]] = engine.generate([prompt], PARAMS, progress=False)
    assert ask(conversation, "end") == alone.text


def test_the_end_of_a_turn_ends_the_answer(engine, monkeypatch):
    """Catches: an answer that goes on in the user's name, the special token in its text."""
    conversation = converse(engine)
    conversation.ask("the")
    prompt = conversation.template.encode([{"role": "user", "content": "the"}], True)
    list(conversation.answer(never))
    [[whole]] = engine.generate([prompt], PARAMS, progress=False)
    ids = whole.token_ids
    at = next(i for i in range(1, 6) if ids[i] not in ids[:i])
    monkeypatch.setattr(engine.tokenizer, "more_stop_ids", frozenset([ids[at]]))
    conversation = converse(engine, SamplingParams(max_tokens=6, temperature=0.8, seed=1))
    text = ask(conversation, "the")
    assert conversation.finish_reason == "stop"
    assert text == engine.tokenizer.decode(token for token in ids[:at] if token > END)


def test_ctrl_c_stops_the_answer_alone():
    """Catches: a Ctrl+C that ends the program, or tears the engine's step apart; one that is
    caught for ever after."""
    before = signal.getsignal(signal.SIGINT)
    with interrupts_noted() as noted:
        assert not noted()
        os.kill(os.getpid(), signal.SIGINT)
        assert noted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_questions_from_a_pipe(engine, monkeypatch, capsys):
    """Catches: something else than answers in stdout, a question that is asked in another
    conversation, a /quit that is put to the model."""
    lines = f"the user\n\n/clear\nthe user\n{'x' * CONTEXT}\nsaid\n/quit\nnot asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    conversation = converse(engine)
    talk(conversation)
    printed = capsys.readouterr()
    fresh = converse(engine)
    first, second = ask(fresh, "the user"), ask(fresh, "said")
    assert printed.out == f"{first}\n\n{first}\n\n{second}\n\n"
    assert conversation.messages == fresh.messages
    assert printed.err.count("(cut off after max_new_tokens=6)") == 3
    assert f"context of {CONTEXT} tokens" in printed.err


def test_sample_talks_with_a_file(tmp_path, monkeypatch):
    """Catches flags that do not reach the conversation, a template that is not found."""
    path = tmp_path / "model.gguf"
    write_gguf(path, make_hf("llama", hidden_size=32, intermediate_size=32, head_dim=8))
    begun: list[Conversation] = []
    monkeypatch.setattr("serving.conversation.talk", begun.append)
    monkeypatch.setattr("serving.conversation.Engine", lambda *parts, **progress: parts)
    flags = {"max_new_tokens": 5, "temperature": 0.5, "top_k": 9, "top_p": 0.7, "seed": 3}
    sample.main(SampleConfig(init_from=str(path), chat=True, system="said", **flags))
    [conversation] = begun
    _, tokenizer, layout = conversation.engine
    del flags["max_new_tokens"]
    assert conversation.params == SamplingParams(max_tokens=5, **flags)
    assert conversation.opening == [{"role": "system", "content": "said"}]
    assert conversation.template.source == CHATML
    assert tokenizer.stop_ids == {0, END}
    assert (layout.max_num_seqs, layout.kv_blocks) == (1, 128 // layout.page_size + 1)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"chat": True, "start": "x"}, "--start has no effect in --chat=True"),
        ({"chat": True, "num_samples": 2}, "--num_samples has no effect in"),
        ({"system": "x"}, "--system has no effect without --chat=True"),
    ],
)
def test_flags_without_effect_are_refused(flags, words):
    """Catches a flag that is silently ignored."""
    with pytest.raises(UserError, match=words):
        sample.main(SampleConfig(init_from="nowhere", **flags))


def test_no_template_is_a_sentence(tmp_path):
    """Catches a base model that is talked to in a form that it never saw."""
    path = tmp_path / "model.gguf"
    hf = make_hf("llama", hidden_size=32, intermediate_size=32, head_dim=8)
    write_gguf(path, hf, keys={"tokenizer.chat_template": None})
    with pytest.raises(UserError, match="no chat template: start with --chat_template=FILE"):
        sample.main(SampleConfig(init_from=str(path), chat=True))
