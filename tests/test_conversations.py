"""Conversations to learn from: what is learned, and that nothing else is."""

import json

import numpy as np
import pytest

from errors import UserError
from tokenizer import CharTokenizer
from training.conversations import encode_conversation, read_conversations, split_conversations
from training.token_files import BEGINS, LEARNED, TokenFile, get_batch, windows_in_order

END = "$"
CHARS = CharTokenizer("abcdefghijklmnopqrstuvwxyz:;|" + END)
CHARS.eos_id = CHARS.ids[END]
CHATS = [
    [("user", "q"), ("assistant", "abc")],
    [("system", "s"), ("user", "qq"), ("assistant", "de"), ("user", "r"), ("assistant", "f")],
]


def messages_of(chat) -> list[dict[str, str]]:
    """A conversation as its file has it."""
    return [{"role": role, "content": content} for role, content in chat]


def render(messages, opens_turn) -> list[int]:
    """A template that writes role:content$; for each message."""
    text = "".join(f"{m['role']}:{m['content']}{END};" for m in messages)
    return CHARS.encode(text + ("assistant:" if opens_turn else ""))


def encoded(chat):
    """A conversation's tokens and marks."""
    return encode_conversation(messages_of(chat), render, CHARS, "file:1")


def test_only_the_assistants_turns_are_learned():
    """Catches: a question that is learned, an answer without the token that ends it, the
    template's words behind that."""
    for chat in CHATS:
        one = encoded(chat)
        learned = [i for i, mark in zip(one.ids, one.marks, strict=True) if mark & LEARNED]
        answers = "".join(content + END for role, content in chat if role == "assistant")
        assert CHARS.decode(learned) == answers
        assert list(np.flatnonzero(one.marks & BEGINS)) == [0]


def test_a_template_that_changes_the_past_is_refused():
    """Catches: marks that lie beside the answer, where a template leaves out what was said."""

    def forgetful(messages, opens_turn) -> list[int]:
        return render(messages[-1:] if len(messages) > 4 else messages, opens_turn)

    with pytest.raises(UserError, match="file:1.*message 3"):
        encode_conversation(messages_of(CHATS[1]), forgetful, CHARS, "file:1")


@pytest.fixture
def file(tmp_path) -> TokenFile:
    """Forty conversations and their marks."""
    parts = [encoded(CHATS[i % 2]) for i in range(40)]
    np.concatenate([np.array(part.ids, np.uint16) for part in parts]).tofile(tmp_path / "t.bin")
    np.concatenate([part.marks for part in parts]).tofile(tmp_path / "m.bin")
    return TokenFile(tmp_path / "t.bin", "uint16", CHARS.vocab_size, tmp_path / "m.bin")


def test_windows_learn_only_whole_beginnings(file):
    """Catches: a target of a question, a target whose conversation began before the window, an id
    that the sign has changed."""
    windows = get_batch(file, 0, (4, 50), seed=1).reshape(-1, 51)
    assert (windows >= 0).any(axis=1).all()
    for window in windows:
        text = CHARS.decode(np.where(window < 0, ~window, window))
        learned = CHARS.decode(window[window >= 0])
        assert set(learned) <= set("abcdef" + END)
        begins = [i for i in (text.find("user:q$"), text.find("system:s$")) if i >= 0]
        assert np.flatnonzero(window >= 0).min() > min(begins)
        assert text in CHARS.decode(file.read())


def test_evaluation_counts_what_is_learned(file):
    """Catches: a mean over targets that do not count, windows that leave out a conversation."""
    batches = list(windows_in_order(file, (3, 2000)))
    counted = sum(count for _, count in batches)
    assert counted == int((file.marks(slice(None)) & LEARNED > 0).sum())
    assert counted == sum(int((tokens[:, 1:] >= 0).sum()) for tokens, _ in batches)


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "3 is not JSON"),
        ("[]", "must be a conversation"),
        ('{"messages": []}', "must be a conversation"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role must be one of"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
    ],
)
def test_mistakes_are_named_by_their_line(tmp_path, line, says):
    """Catches: a traceback, or a mistake that cannot be found in a file of thousands of lines."""
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": messages_of(CHATS[0])})
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UserError, match=says) as error:
        list(read_conversations([path]))
    assert f"{path}:3" in str(error.value)


def test_every_tenth_validates():
    """Catches: a conversation that trains and validates, or does neither."""
    ones = [encoded(CHATS[0]) for _ in range(20)]
    parts = split_conversations(ones, [])
    assert [len(parts["train"]), len(parts["val"])] == [18, 2]
    assert split_conversations(ones, ones[:3]) == {"train": ones, "val": ones[:3]}
