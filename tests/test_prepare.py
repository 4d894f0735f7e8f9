"""Data sets: their figures, texts that are cut anywhere, bad input, replacement, downloads."""

import hashlib
import http.server
import json
import os
import string
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from cli import parse, user_errors
from tokenizer import CharTokenizer, GPT2Tokenizer, from_meta
from training.prepare_config import PrepareConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpt2():
    try:
        return GPT2Tokenizer()
    except ValueError as e:
        pytest.skip(str(e))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(*argv: str) -> None:
    """Do what `python prepare.py ARGV` does."""
    with user_errors():
        prepare.main(parse(PrepareConfig, argv=list(argv)))


def fails(capsys, *argv: str) -> str:
    """Run the program, which must end in one sentence and code 2, and return the sentence."""
    with pytest.raises(SystemExit) as end:
        program(*argv)
    sentence = capsys.readouterr().err
    assert end.value.code == 2
    assert sentence.count("\n") == 1, sentence
    return sentence


def load(directory: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the meta.json of a data set, and the ids of its splits."""
    meta = json.loads((directory / "meta.json").read_text())
    files = {split: directory / f"{split}.bin" for split in ("train", "val")}
    return meta, {split: np.fromfile(file, meta["dtype"]) for split, file in files.items()}


def tree(directory: Path) -> dict[str, bytes]:
    """Return all files under directory, by path, with their contents."""
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


# The data sets


@pytest.mark.parametrize(
    "name, train, val, vocab_size",
    [("shakespeare_char", 1_003_854, 111_540, 65), ("shakespeare", 301_966, 36_059, 50257)],
)
def test_tiny_shakespeare_has_nanogpts_counts(name, train, val, vocab_size, gpt2, shared, here):
    """Catches another split, another tokenizer, and text changed on the way.

    The figures are those of nanoGPT's readmes."""
    file = shared / "tinyshakespeare" / "input.txt"
    program(name, "--input", str(file))
    meta, ids = load(here / "data" / name)
    assert len(ids["train"]) == train
    assert len(ids["val"]) == val
    assert meta["vocab_size"] == vocab_size
    tokenizer = from_meta(meta)
    assert tokenizer.decode(ids["train"]) + tokenizer.decode(ids["val"]) == file.read_text()


def test_pystdlib_is_python_and_always_the_same(here):
    """Catches an order that changes with the file system or the hash seed, and stray characters."""
    for directory, seed in (("a", "1"), ("b", "2")):
        command = [sys.executable, ROOT / "prepare.py", "pystdlib_char", f"--out_dir={directory}"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, timeout=120)
    meta, ids = load(here / "a")
    assert meta == load(here / "b")[0]
    assert 90 <= meta["vocab_size"] <= 100
    assert 3e6 < meta["train_tokens"] + meta["val_tokens"] < 8e6
    text = from_meta(meta).decode([*ids["train"], *ids["val"]])
    assert "\ndef dataclass(" in text


def test_pystdlib_validates_on_all_of_the_alphabet(tmp_path, monkeypatch):
    """Catches modules in alphabetical order, whose last tenth is all of tokenize to zipimport."""
    names = sorted(name for name in sys.stdlib_module_names if name[0] in string.ascii_lowercase)
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"{name}\n")
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda _: str(tmp_path))
    prepare.write_stdlib(tmp_path / "text")
    written = (tmp_path / "text").read_text().splitlines()
    assert sorted(written) == names
    validated = written[-len(names) // 10 :]
    assert min(validated) < "d" and max(validated) > "s"


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_largest_id_is_written(tmp_path, vocab_size, dtype):
    """Catches a vocabulary whose last token does not fit the file's type, or that wastes half."""
    ids = [vocab_size - 1, 0]
    splits = {"train": iter([ids]), "val": iter([ids])}
    assert prepare.write_splits(splits, tmp_path, vocab_size)["dtype"] == dtype
    assert np.fromfile(tmp_path / "val.bin", dtype).tolist() == ids


def test_meta_describes_the_files(here):
    """Catches counts, checksums, dtype or vocabulary in meta.json that the files do not have."""
    more_than_uint16 = range(0x10000, 0x10000 + 70_000)
    many = "".join(map(chr, more_than_uint16))
    for name, content, dtype in (
        ("few.txt", "abcdefghij" * 9, "uint16"),
        ("many.txt", many, "uint32"),
    ):
        Path(name).write_text(content, encoding="utf-8")
        program("text", "--input", name, "--tokenizer=char", "--out_dir=out")
        meta, ids = load(here / "out")
        assert meta["dtype"] == dtype
        assert meta["vocab_size"] == len(set(content))
        assert meta["source"] == name
        for split in ("train", "val"):
            assert meta[f"{split}_tokens"] == len(ids[split])
            content_of = Path("out", f"{split}.bin").read_bytes()
            assert meta[f"{split}_sha256"] == hashlib.sha256(content_of).hexdigest()
        assert from_meta(meta).decode([*ids["train"], *ids["val"]]) == content
        assert len(ids["train"]) == int(0.9 * len(content))


def test_openwebtext_is_split_shuffled_and_ended_as_nanogpts(here, gpt2, monkeypatch):
    """Catches pages lost, doubled or reordered, a missing end of text, another split or seed."""
    datasets = pytest.importorskip("datasets")
    texts = [f"page {i}\n" + "word " * (i % 5) for i in range(2500)]
    pages = datasets.Dataset.from_dict({"text": texts})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pages)
    program("openwebtext", "--num_proc=2")
    meta, ids = load(here / "data" / "openwebtext")
    assert meta["dtype"] == "uint16"
    expected = pages.train_test_split(test_size=0.0005, seed=2357, shuffle=True)  # nanoGPT's line
    for split, name in (("train", "train"), ("val", "test")):
        ended_pages = [text + "<|endoftext|>" for text in expected[name]["text"]]
        assert gpt2.decode(ids[split]) == "".join(ended_pages)


def test_openwebtext_without_network(gpt2, here, monkeypatch, capsys):
    """Catches the traceback of the datasets library."""
    datasets = pytest.importorskip("datasets")

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert "--input FILE" in fails(capsys, "openwebtext")
    assert os.listdir("data") == []


def test_openwebtext_warns_once_of_an_unreachable_hub(gpt2, here):
    """Catches the two lines that the Hub's client writes for each of its retries."""
    pytest.importorskip("datasets")
    code = (
        "import sys, time\n"
        "time.sleep = lambda seconds: None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import cli, prepare\n"
        "with cli.user_errors(): prepare.main(prepare.PrepareConfig('openwebtext'))"
    )
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}  # nothing listens there
    env = os.environ | hub | {"HF_HOME": str(here / "cache")}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=120)
    *warnings, sentence = run.stderr.splitlines()
    assert len(warnings) <= 1, warnings
    assert "--input FILE" in sentence
    assert run.returncode == 2


# Streaming

TRICKY = st.text(st.sampled_from(" \n\t'sx1!é\u00a0\u3000世\x1c\u0085"), max_size=60)


@settings(max_examples=300, deadline=None)
@given(text=TRICKY, size=st.integers(1, 20))
def test_pieces_are_cut_where_gpt2s_pattern_breaks(text, size):
    """Catches a cut inside a word, in a run of white space, or between a space and its word."""
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    pieces = list(prepare.pieces(text[i : i + size] for i in range(0, len(text), size)))
    assert "".join(pieces) == text
    assert [word for piece in pieces for word, _ in split(piece)] == [
        word for word, _ in split(text)
    ]


@settings(max_examples=300, deadline=None)
@given(text=TRICKY, size=st.integers(1, 20))
def test_pieces_encode_to_what_the_whole_text_does(gpt2, text, size):
    """Catches the same faults with tiktoken, which spells the pattern in another way."""
    pieces = list(prepare.pieces(text[i : i + size] for i in range(0, len(text), size)))
    assert [token for piece in pieces for token in gpt2.encode(piece)] == gpt2.encode(text)


def test_pieces_of_running_text_are_short():
    """Catches a rule so careful that it never cuts, and so holds the whole text."""
    chunks = ["To be, or not to be,\nthat is the question: "] * 100
    assert max(map(len, prepare.pieces(chunks))) < 2 * len(chunks[0])


CHARACTERS = st.characters(exclude_characters="\r\ufeff", exclude_categories=["Cs"])


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(CHARACTERS, max_size=50),
    first=st.integers(0, 50),
    last=st.integers(0, 60),
    chunk=st.integers(1, 9),
)
def test_characters_are_counted_as_characters(tmp_path_factory, text, first, last, chunk):
    """Catches offsets in bytes, characters lost between chunks, and a BOM that becomes a token."""
    file = tmp_path_factory.getbasetemp() / "characters.txt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CHUNK", chunk)
        assert "".join(prepare.characters(file, first, last)) == text[first:last]
        assert "".join(prepare.characters(file)) == text


def test_files_are_joined_by_the_end_of_text(tmp_path):
    """Catches an end of text between train and val, or missing elsewhere, and files reordered."""
    tokenizer = CharTokenizer("|" + "abcdefghijkl")
    tokenizer.eos_id = 0
    files = [(tmp_path / text, len(text)) for text in ("abc", "d", "efghijkl")]
    for file, _ in files:
        file.write_text(file.name)

    def text_of(first: int, last: int) -> str:
        pieces = prepare.encode(tokenizer, files, first, last)
        return "".join(tokenizer.decode(ids) for ids in pieces)

    for cut in range(13):
        train = text_of(0, cut)
        val = text_of(cut, 12)
        assert train.replace("|", "") + val.replace("|", "") == "abcdefghijkl"
        between_splits = "|" if cut in (3, 4) else ""  # where a file ends, no token is needed
        assert train + between_splits + val == "abc|d|efghijkl"


def test_memory_does_not_grow_with_the_text(here, monkeypatch):
    """Catches a whole file read or encoded at once."""
    Path("in.txt").write_text("Some words, and a line.\n" * 200_000)  # 4.8 MB
    monkeypatch.setattr(prepare, "CHUNK", 1 << 14)
    tracemalloc.start()
    program("text", "--input=in.txt", "--tokenizer=char")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6, f"{peak:,} bytes"


# Bad input


@pytest.mark.parametrize(
    "argv, says",
    [
        ("text --input missing.txt", "there is no file missing.txt"),
        ("text --input good.txt missing.txt", "there is no file missing.txt"),
        ("text --input folder", "folder is not a regular file"),
        ("text --input empty.txt", "empty.txt is empty"),
        ("text --input good.txt empty.txt", "empty.txt is empty"),
        ("text --input latin1.txt", "latin1.txt is not UTF-8 (byte 0xe9"),
        ("text --input short.txt --tokenizer=char", "too short"),
        ("shakespeare_char --input short.txt", "too short"),
        ("text", "--input FILE"),
        ("shakspere", "pystdlib_char"),
        ("", "pystdlib_char"),
        ("text --input good.txt --tokenizer=gpt3", "gpt3"),
        ("text --inptu good.txt", "--inptu"),
        ("pystdlib_char --input good.txt", "use text"),
        ("shakespeare_char --tokenizer=gpt2", "use text"),
        ("text --input good.txt --num_proc=2", "num_proc"),
        ("openwebtext --num_proc=0", "num_proc=0"),
        ("text --input good.txt --tokenizer=char --out_dir=folder", "folder holds precious.txt"),
        ("text --input good.txt --tokenizer=char --out_dir=good.txt", "good.txt is a file"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(argv, says, here, capsys):
    """Catches tracebacks, files half-written, and a directory of the user's own replaced."""
    Path("folder").mkdir()
    files = {
        "good.txt": b"some text " * 9,
        "latin1.txt": b"some text \xe9",
        "short.txt": b"0123456789",
        "empty.txt": b"",
        "folder/precious.txt": b"mine",
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    before = tree(here)
    assert says in fails(capsys, *argv.split())
    assert tree(here) == before
    assert not any(path.name.startswith(".") for path in here.rglob("*"))


def test_the_program_itself_exits_with_2(here):
    """Catches a __main__ that does not turn errors into the exit code."""
    command = [sys.executable, ROOT / "prepare.py", "text", "--input=no"]
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr == "prepare.py: there is no file no\n"


# Replacing a data set


def test_an_earlier_data_set_is_replaced_or_survives_whole(here, capsys):
    """Catches an old data set lost, or mixed with a new one that fails after its train.bin."""
    Path("one.txt").write_text("first " * 20)
    Path("two.txt").write_text("second " * 30)
    Path("short.txt").write_text("0123456789")
    make = ("text", "--tokenizer=char", "--out_dir=link", "--input")
    Path("elsewhere").mkdir()
    Path("link").symlink_to("elsewhere")
    program(*make, "one.txt")
    first = tree(here / "elsewhere")
    fails(capsys, *make, "short.txt")
    assert tree(here / "elsewhere") == first
    program(*make, "two.txt")
    assert load(here / "elsewhere")[0]["source"] == "two.txt"
    assert Path("link").is_symlink()
    assert sorted(os.listdir()) == ["elsewhere", "link", "one.txt", "short.txt", "two.txt"]
    readable_as_any_directory = 0o777 & ~umask()
    assert os.stat("elsewhere").st_mode & 0o777 == readable_as_any_directory


def umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_swap_puts_the_old_data_set_back(error, tmp_path, monkeypatch):
    """Catches a data set that is gone if the second of the two renames fails or is interrupted."""
    out, new = tmp_path / "out", tmp_path / "new"
    for path in (out, new):
        path.mkdir()
        (path / "meta.json").write_text(path.name)
    rename = Path.rename

    def fail_for_new(path, target):
        if path == new:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(error):
        prepare.replace(out, new, tmp_path / "old")
    assert (out / "meta.json").read_text() == "out"


def test_a_first_data_set_that_cannot_be_moved_says_why(tmp_path):
    """Catches the failure hidden by another one, in putting back what was never there."""
    with pytest.raises(FileNotFoundError) as caught:
        prepare.replace(tmp_path / "out", tmp_path / "new", tmp_path / "old")
    assert caught.value.filename == str(tmp_path / "new")


# Downloads

BODY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 2000


@pytest.fixture(scope="module")
def server():
    """http://127.0.0.1:PORT/KIND answers in as many ways as a download can go wrong."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path[1:]
            self.send_response(404 if kind == "missing" else 200)
            if kind != "half_without_length":
                self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            bodies = {"good": BODY, "missing": BODY, "login_page": b"<" * len(BODY)}
            self.wfile.write(bodies.get(kind, BODY[:-999]))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def known_body(monkeypatch):
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(BODY).hexdigest())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_download(server, known_body, here, monkeypatch):
    """Catches a body written in part or twice, and the download left lying in data/."""
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", server + "good")
    program("shakespeare_char")
    meta, ids = load(here / "data" / "shakespeare_char")
    assert from_meta(meta).decode([*ids["train"], *ids["val"]]).encode() == BODY
    assert meta["source"] == server + "good"
    assert os.listdir("data") == ["shakespeare_char"]
    assert len(os.listdir("data/shakespeare_char")) == 3


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", "404"),
        ("half", "cannot download"),
        ("half_without_length", "other than"),
        ("login_page", "other than"),
        ("refused", "ConnectionError"),
    ],
)
def test_failed_download(kind, says, server, known_body, here, monkeypatch, capsys):
    """Catches a data set made of an error page or half a file, and an error without a way out."""
    url = "http://127.0.0.1:9/" if kind == "refused" else server + kind  # nothing listens on port 9
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", url)
    sentence = fails(capsys, "shakespeare_char")
    for words in (says, url, "--input FILE"):
        assert words in sentence
    assert os.listdir("data") == []
