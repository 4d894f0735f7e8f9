import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer import CharTokenizer, GPT2Tokenizer, HFTokenizer, StreamDecoder, from_meta

ROOT = Path(__file__).parent.parent
EOT = "<|endoftext|>"
TEXT = "Grüße, 世界! 👩‍🚀 It's naïve\n\n\n  x = [1,\t2]\r\n <|endoftext|> e\u0301"


@pytest.fixture(scope="module")
def gpt2():
    try:
        return GPT2Tokenizer()
    except ValueError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    """A directory as GPT-2 has it, with a BPE of 264 tokens: most characters of TEXT take several."""
    path = tmp_path_factory.mktemp("hf")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["the naive approach is the naive one"], vocab_size=264, special_tokens=[EOT]
    )
    bpe.save_model(str(path))
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    return path


@pytest.fixture(scope="module")
def hf(hf_dir):
    return HFTokenizer(hf_dir)


@pytest.fixture(scope="module")
def char():
    return CharTokenizer("".join(sorted(set(TEXT))))


@pytest.fixture(scope="module", params=["char", "gpt2", "hf"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_decode_inverts_encode_and_meta_rebuilds(tokenizer):
    """Catches text that changes on the way (spaces, \\r\\n) and a meta() that does not survive JSON."""
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    again = from_meta(
        json.loads(json.dumps(tokenizer.meta() | {"vocab_size": 1, "dtype": "uint16"}))
    )
    for attribute in ("name", "vocab_size", "eos_id"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute)
    assert again.encode(TEXT) == ids
    assert again.decode(range(again.vocab_size)) == tokenizer.decode(range(tokenizer.vocab_size))


def test_gpt2_is_gpt2(gpt2):
    """Catches another encoding (cl100k...) or a wrong end of text: ids from OpenAI's own encoder."""
    assert gpt2.vocab_size == 50257 and gpt2.eos_id == 50256
    assert gpt2.encode("Hello world") == [15496, 995]


@pytest.mark.parametrize("name", ["gpt2", "hf"])
def test_text_never_becomes_a_special_token(name, request):
    """Catches a data file or prompt that smuggles in the end-of-document token by spelling it."""
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.decode([tokenizer.eos_id]) == EOT
    assert tokenizer.eos_id not in tokenizer.encode("a" + EOT)


def test_unknown_characters_are_named():
    """Catches a KeyError, or unknown characters silently dropped."""
    with pytest.raises(ValueError, match="'\\$é'"):
        CharTokenizer("abc").encode("ab$cé$")


def test_unknown_tokenizer_is_named():
    """Catches a fallback to some default tokenizer when meta.json is from elsewhere."""
    with pytest.raises(ValueError, match="'cl100k'.*char, gpt2 and hf"):
        from_meta({"tokenizer": "cl100k"})


def test_gpt2_without_network_says_what_to_do(tmp_path):
    """Catches a traceback. In its own process, because tiktoken remembers an encoding it has loaded."""
    code = "import tokenizer\ntry: tokenizer.GPT2Tokenizer()\nexcept ValueError as e: print(e)"
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        timeout=60,
        text=True,
        stdout=subprocess.PIPE,
    )
    assert "TIKTOKEN_CACHE_DIR" in run.stdout and run.stdout.count("\n") == 1, run


# Hugging Face directories


def test_hf_directory_with_gpt2s_files_is_gpt2(gpt2, shared, tmp_path):
    """Catches a byte-to-character table that is wrong somewhere: all tokens, and a text, against tiktoken."""
    for prefix, name in (("6c7e", "vocab.json"), ("6d1c", "merges.txt")):
        shutil.copy(next((shared / "tiktoken_cache").glob(prefix + "*")), tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    hf = HFTokenizer(tmp_path)
    assert (hf.vocab_size, hf.eos_id) == (gpt2.vocab_size, gpt2.eos_id)
    assert [hf.token_bytes(i) for i in range(50257)] == [gpt2.token_bytes(i) for i in range(50257)]
    text = TEXT + (shared / "tinyshakespeare" / "input.txt").read_text()[:20_000] + "\ud800"
    assert hf.encode(text) == gpt2.encode(text)


def test_hf_outlives_its_directory(hf_dir, tmp_path):
    """Catches a meta() that stores a path: a checkpoint may move to a machine without that directory."""
    copy = shutil.copytree(hf_dir, tmp_path / "copy")
    tokenizer = HFTokenizer(copy)
    shutil.rmtree(copy)
    again = from_meta(json.loads(json.dumps(tokenizer.meta())))
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.eos_id == tokenizer.eos_id == 0


def test_hf_neither_truncates_nor_pads_nor_frames(hf, tmp_path):
    """Catches a tokenizer.json whose truncation, padding or template would silently change the ids."""
    bpe = tokenizers.Tokenizer.from_str(hf.meta()["tokenizer_json"])
    bpe.enable_truncation(4)
    bpe.enable_padding(length=8)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        f"{EOT} $A", special_tokens=[(EOT, 0)]
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    framed = HFTokenizer(tmp_path)
    assert framed.encode("the") == hf.encode("the") and framed.encode(TEXT) == hf.encode(TEXT)


def test_hf_directory_without_a_tokenizer(tmp_path):
    """Catches the empty tokenizer that transformers makes from a config.json alone."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="tokenizer.json"):
        HFTokenizer(tmp_path)


def test_hf_tokenizer_of_another_kind(tmp_path):
    """Catches garbled text from a tokenizer whose tokens are not byte-level (here WordPiece)."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    )
    words.decoder = tokenizers.decoders.WordPiece()
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="byte-level"):
        HFTokenizer(tmp_path)


# Streams


@settings(max_examples=300, deadline=None)
@given(pushes=st.lists(st.lists(st.integers(0, 263), max_size=3), max_size=20))
def test_stream_adds_up_to_decode(hf, pushes):
    """Catches bytes lost, doubled or replaced at the seams, for any tokens (most are bytes, so no UTF-8)."""
    stream = StreamDecoder(hf)
    text = "".join(stream.push(ids) for ids in pushes) + stream.finish()
    assert text == hf.decode([i for ids in pushes for i in ids])


def test_stream_holds_back_half_characters_only(tokenizer):
    """Catches U+FFFD shown for a character that is merely unfinished, and complete text held back."""
    stream, shown, seen = StreamDecoder(tokenizer), "", b""
    for token in tokenizer.encode(TEXT):
        shown += stream.push([token])
        seen += tokenizer.token_bytes(token)
        assert shown == seen.decode(
            "utf-8", errors="ignore"
        )  # the unfinished end: TEXT has no other error
    assert shown == TEXT and stream.finish() == ""


def test_stream_flushes_an_unfinished_character(hf):
    """Catches a finish() that drops the bytes of a generation cut in the middle of a character."""
    ids = hf.encode("ok 👩")[:-1]
    stream = StreamDecoder(hf)
    assert stream.push(ids) == "ok " and "ok " + stream.finish() == hf.decode(ids) == "ok \ufffd"
