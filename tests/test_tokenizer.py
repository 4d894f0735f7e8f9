"""Text to ids and back: what every tokenizer promises, Hugging Face's directories, streams."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.hugging_face import save_json
from tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    HFTokenizer,
    StreamDecoder,
    Tokenizer,
    from_meta,
    read_tokenizer,
    write_tokenizer,
)

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
    """A directory as GPT-2 has it, but with 264 tokens: most characters of TEXT take several."""
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
    return HFTokenizer.from_directory(hf_dir)


@pytest.fixture(scope="module")
def char():
    return CharTokenizer("".join(sorted(set(TEXT))))


@pytest.fixture(scope="module", params=["char", "gpt2", "hf"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_decode_inverts_encode_and_meta_rebuilds(tokenizer):
    """Catches text that changes on the way (spaces, \\r\\n) and a meta() that JSON changes."""
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
    """Catches another encoding (cl100k...) or a wrong end of text. The ids are OpenAI's."""
    assert gpt2.vocab_size == 50257
    assert gpt2.eos_id == 50256
    assert gpt2.encode("Hello world") == [15496, 995]


@pytest.mark.parametrize("name", ["gpt2", "hf"])
def test_text_never_becomes_a_special_token(name, request):
    """Catches a data file or prompt that smuggles in the end-of-document token by spelling it."""
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.decode([tokenizer.eos_id]) == EOT
    assert tokenizer.eos_id not in tokenizer.encode("a" + EOT)


@pytest.mark.parametrize("text", [TEXT * 3, "", " " * 500, "the naive approach " * 40, "é" * 300])
def test_fewest_tokens(tokenizer, text):
    """Catches: a prompt that is refused as too long although it fits, or a bound that bounds
    nothing."""
    if tokenizer.name == "char":
        text = "".join(character for character in text if character in tokenizer.ids)
    tokens = len(tokenizer.encode(text))
    assert tokenizer.fewest_tokens(text) <= tokens
    assert tokenizer.fewest_tokens("\ud800" * 10_000) > 100
    assert tokenizer.fewest_tokens("a" * 10_000) * tokenizer.longest_token >= 10_000


def test_fewest_tokens_of_text_that_may_shrink(hf):
    """Catches: a text that is refused as too long, although normalising makes it short enough."""
    bpe = tokenizers.Tokenizer.from_str(hf.meta()["tokenizer_json"])
    bpe.normalizer = tokenizers.normalizers.Strip()
    shrinking = HFTokenizer(bpe.to_str(), eos_id=0)
    assert shrinking.encode(" " * 10_000) == []
    assert shrinking.fewest_tokens(" " * 10_000) == 0
    bpe.normalizer = None
    bpe.add_tokens([tokenizers.AddedToken("<gap>", lstrip=True)])
    assert HFTokenizer(bpe.to_str(), eos_id=0).fewest_tokens(" " * 10_000 + "<gap>") == 0


def test_ids_that_the_vocabulary_does_not_have(hf):
    """Catches: a server that dies of a token that its model may sample: models have rows to spare,
    and some vocabularies skip ids."""
    assert hf.token_bytes(hf.vocab_size + 7) == b""
    assert hf.decode([*hf.encode("the"), hf.vocab_size + 7]) == "the"


def test_unknown_characters_are_named():
    """Catches a KeyError, or unknown characters silently dropped."""
    with pytest.raises(ValueError, match="'\\$é'"):
        CharTokenizer("abc").encode("ab$cé$")


def test_unknown_tokenizer_is_named():
    """Catches a fallback to some default tokenizer when meta.json is from elsewhere."""
    with pytest.raises(ValueError, match="'cl100k'.*char, gpt2 and hf"):
        from_meta({"tokenizer": "cl100k"})


def test_gpt2_without_network_says_what_to_do(tmp_path):
    """Catches a traceback. A process of its own, because tiktoken remembers its encodings."""
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
    """Catches a byte-to-character table that is wrong somewhere.

    All tokens, and a text, are compared with tiktoken's."""
    for prefix, name in (("6c7e", "vocab.json"), ("6d1c", "merges.txt")):
        shutil.copy(next((shared / "tiktoken_cache").glob(prefix + "*")), tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    hf = HFTokenizer.from_directory(tmp_path)
    assert (hf.vocab_size, hf.eos_id) == (gpt2.vocab_size, gpt2.eos_id)
    assert [hf.token_bytes(i) for i in range(50257)] == [gpt2.token_bytes(i) for i in range(50257)]
    text = TEXT + (shared / "tinyshakespeare" / "input.txt").read_text()[:20_000] + "\ud800"
    assert hf.encode(text) == gpt2.encode(text)


def test_hf_outlives_its_directory(hf_dir, tmp_path):
    """Catches a meta() that stores a path: a checkpoint may move to another machine."""
    copy = shutil.copytree(hf_dir, tmp_path / "copy")
    tokenizer = HFTokenizer.from_directory(copy)
    shutil.rmtree(copy)
    again = from_meta(json.loads(json.dumps(tokenizer.meta())))
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.eos_id == tokenizer.eos_id == 0


def test_hf_neither_truncates_nor_pads_nor_frames(hf, tmp_path):
    """Catches a tokenizer.json whose truncation, padding or template changes the ids."""
    bpe = tokenizers.Tokenizer.from_str(hf.meta()["tokenizer_json"])
    bpe.enable_truncation(4)
    bpe.enable_padding(length=8)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        f"{EOT} $A", special_tokens=[(EOT, 0)]
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    framed = HFTokenizer.from_directory(tmp_path)
    assert framed.encode("the") == hf.encode("the")
    assert framed.encode(TEXT) == hf.encode(TEXT)


def test_what_stands_before_a_prompt_and_what_ends_an_answer(hf, tmp_path):
    """Catches a model that was trained with a beginning and does not get it, and a turn that does
    not end at one of several ends; in a checkpoint finetuned from the directory too."""
    assert (hf.prompt_prefix, hf.stop_ids) == ((), {0})
    bpe = tokenizers.Tokenizer.from_str(hf.meta()["tokenizer_json"])
    bpe.add_special_tokens(["<begin>", "<turn>"])
    begin, turn = bpe.token_to_id("<begin>"), bpe.token_to_id("<turn>")
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        f"<begin> $A {EOT}", special_tokens=[("<begin>", begin), (EOT, 0)]
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    described = {"bos_token": "<begin>", "eos_token": EOT}
    described["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 5}')
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [0, turn]}))
    framed = HFTokenizer.from_directory(tmp_path)
    for tokenizer in (framed, from_meta(json.loads(json.dumps(framed.meta())))):
        assert tokenizer.encode_prompt("the") == [begin, *hf.encode("the")]
        assert (tokenizer.bos_id, tokenizer.eos_id) == (begin, 0)
        assert tokenizer.stop_ids == {0, turn}
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", framed, 8)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.encode("the") == [*framed.encode_prompt("the"), 0]
    assert exported.bos_token_id == begin
    generation.unlink()
    assert HFTokenizer.from_directory(tmp_path).stop_ids == {0, 5}
    generation.write_text('{"eos_token_id": [7000]}')
    with pytest.raises(ValueError, match=r"eos_token_id=\[7000\].*0 to"):
        HFTokenizer.from_directory(tmp_path)


def test_hf_directory_without_a_tokenizer(tmp_path):
    """Catches the empty tokenizer that transformers makes from a config.json alone."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="tokenizer.json"):
        HFTokenizer.from_directory(tmp_path)


def test_hf_tokenizer_of_another_kind(tmp_path):
    """Catches garbled text from a tokenizer whose tokens are not byte-level (here WordPiece)."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    )
    words.decoder = tokenizers.decoders.WordPiece()
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="byte-level"):
        HFTokenizer.from_directory(tmp_path)


# Exported to Hugging Face's form

TRICKY = "Hello, world!  It's 12345 o'clock\n\n\tdéjà vu 世界 🙂 \u0000 don't\r\n   "


def export(tokenizer: Tokenizer, directory: Path) -> transformers.PreTrainedTokenizerBase:
    """Write the tokenizer into directory and return it as transformers loads it from there."""
    directory.mkdir(exist_ok=True)
    write_tokenizer(directory, tokenizer, 1024)
    save_json(directory / "config.json", {"model_type": "gpt2"})
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_exported_char_tokenizer(tmp_path):
    """Catches tokens joined by spaces, lost whitespace, and ids in another order."""
    tokenizer = CharTokenizer("".join(sorted(set(TRICKY))))
    exported = export(tokenizer, tmp_path)
    ids = tokenizer.encode(TRICKY)
    assert exported(TRICKY).input_ids == ids
    assert exported.decode(ids) == TRICKY
    assert read_tokenizer(tmp_path).meta() == tokenizer.meta()


def test_exported_gpt2_tokenizer(gpt2, tmp_path):
    """Catches an id that moved, and an export that cannot be exported again."""
    exported = export(gpt2, tmp_path / "once")
    ids = gpt2.encode(TRICKY)
    assert exported(TRICKY).input_ids == ids
    assert exported.decode(ids) == TRICKY
    assert exported.eos_token_id == gpt2.eos_id
    export(read_tokenizer(tmp_path / "once"), tmp_path / "twice")
    for directory in ("once", "twice"):
        again = read_tokenizer(tmp_path / directory)
        assert again.encode(TRICKY) == ids
        assert again.eos_id == gpt2.eos_id


def test_exported_gpt2_files_are_as_published(gpt2, shared, tmp_path):
    """Catches merges that were not recovered as OpenAI published them."""
    export(gpt2, tmp_path)
    published_vocab = next((shared / "tiktoken_cache").glob("6c7e*"))
    published_merges = next((shared / "tiktoken_cache").glob("6d1c*"))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert vocab == json.loads(published_vocab.read_text())
    assert merges_in(tmp_path / "merges.txt") == merges_in(published_merges)


def merges_in(file: Path) -> list[str]:
    """Return the lines of a merges.txt below the first, which names its version."""
    return file.read_text(encoding="utf-8").splitlines()[1:]


# Streams


@settings(max_examples=300, deadline=None)
@given(pushes=st.lists(st.lists(st.integers(0, 263), max_size=3), max_size=20))
def test_stream_adds_up_to_decode(hf, pushes):
    """Catches bytes lost, doubled or replaced at the seams, for any tokens.

    Most tokens are single bytes, so that most streams are not UTF-8."""
    stream = StreamDecoder(hf)
    text = "".join(stream.push(ids) for ids in pushes) + stream.finish()
    assert text == hf.decode([i for ids in pushes for i in ids])


def test_stream_holds_back_half_characters_only(tokenizer):
    """Catches U+FFFD shown for an unfinished character, and complete text held back."""
    stream = StreamDecoder(tokenizer)
    shown = ""
    seen = b""
    for token in tokenizer.encode(TEXT):
        shown += stream.push([token])
        seen += tokenizer.token_bytes(token)
        # Only an unfinished end is ignored: TEXT has no other error.
        assert shown == seen.decode("utf-8", errors="ignore")
    assert shown == TEXT
    assert stream.finish() == ""


def test_stream_flushes_an_unfinished_character(hf):
    """Catches a finish() that drops the bytes of a generation cut in the middle of a character."""
    ids = hf.encode("ok 👩")[:-1]
    stream = StreamDecoder(hf)
    assert hf.decode(ids) == "ok \ufffd"
    assert stream.push(ids) == "ok "
    assert stream.finish() == "\ufffd"
