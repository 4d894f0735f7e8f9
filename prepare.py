"""Text to token files: python prepare.py NAME [--input FILE ...]

Start with `main`. The sections follow the text: where it comes from, how it becomes tokens, how
they get onto the disk. Text is read, encoded and written piece by piece, so memory stays small
however long the text is. data/README.md explains the names and the files.
"""

import cli
from training.prepare_config import PrepareConfig

if __name__ == "__main__":
    cli.run("prepare", PrepareConfig)

import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

import pretrained
from config import SampleConfig
from errors import UserError, require
from formats.hub import one_hub_warning
from serving.chat import NO_CHAT_TEMPLATE, load_template
from tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer
from training import token_files
from training.conversations import encode_conversation, read_conversations, split_conversations

if TYPE_CHECKING:
    import datasets
    import requests

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
OPENWEBTEXT = "Skylion007/openwebtext"  # on the Hugging Face Hub
OUTPUTS = {"train.bin", "val.bin", "train_marks.bin", "val_marks.bin", "meta.json"}
CHUNK = 1 << 20  # characters that are read at a time
UINT16_IDS = 1 << 16  # as many ids as uint16 can tell apart


class TokenizedText(NamedTuple):
    """A text on its way to the disk."""

    source: str
    """Where the text comes from, as meta.json says it."""
    tokenizer: Tokenizer
    splits: dict[str, Iterator[Any]]
    """train and val: their ids in pieces, each an array or a list."""
    marks: dict[str, Iterator[Any]] | None = None
    """Of conversations, for each split what is to be learned: see training/conversations.py."""
    chat: dict[str, str] | None = None
    """Of conversations, the chat template and the names it uses, as tokenizer_config.json."""


def main(config: PrepareConfig) -> None:
    """Write a data set to config.data_path: all of it, in place of an earlier one, or nothing.

    With config.verify the one that is there is read and nothing is written. Raises UserError if the
    text cannot be had or will not do, or if the files are damaged."""
    if config.verify:
        require(
            not config.input,
            "verify reads the files that are there: leave out --input",
            param="input",
        )
        meta = token_files.verify(config.data_path)
        print(f"{config.data_path}: verified, {summary(meta)}")
        return
    out = config.data_path.resolve()  # a link to a directory stays a link
    require_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch_name:
        scratch = Path(scratch_name)
        new = scratch / "new"
        new.mkdir()
        if config.name == "openwebtext":
            text = openwebtext(config.num_proc)
        elif config.name == "chat":
            text = encode_chats(config)
        else:
            source, files = text_files(config, scratch)
            text = encode_files(source, files, config.tokenizer_name)
        meta = text.tokenizer.meta()
        meta |= write_splits(text.splits, new, text.tokenizer.vocab_size)
        meta |= write_marks(text.marks or {}, new)
        if text.chat is not None:
            meta["chat"] = text.chat
        meta["source"] = text.source
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        replace(out, new, scratch / "old")
    print(f"{config.data_path}: {summary(meta)}")


def summary(meta: dict[str, Any]) -> str:
    """Return the figures of a meta.json in words."""
    return (
        f"vocabulary of {meta['vocab_size']:,} ({meta['tokenizer']}), "
        f"{meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate"
    )


# Where text comes from


def text_files(config: PrepareConfig, scratch: Path) -> tuple[str, list[Path]]:
    """Return a line for meta.json and the UTF-8 files that a data set is made of.

    The files are the user's own or lie in scratch."""
    if config.input:
        for file in config.input:
            require(file.exists(), f"there is no file {file}", param="input")
            require(file.is_file(), f"{file} is not a regular file", param="input")
        return ", ".join(map(str, config.input)), list(config.input)
    file = scratch / "input.txt"
    if config.name == "pystdlib_char":
        source = write_stdlib(file)
    else:
        source = SHAKESPEARE_URL
        download(source, file, SHAKESPEARE_SHA256)
    return source, [file]


def write_stdlib(file: Path) -> str:
    """Write the standard library's top-level modules end to end; return a line for meta.json.

    They are about 4.5 MB. The few characters beyond ASCII are escaped, so that the vocabulary is
    the printable ones and the newline."""
    library = Path(sysconfig.get_path("stdlib"))
    names = [name for name in sys.stdlib_module_names if (library / f"{name}.py").is_file()]
    require(
        bool(names), f"{library} has no source of the standard library: use text --input FILE ..."
    )
    # In the order of their hashes: it is the same everywhere, and the last tenth, which validates,
    # is no stretch of the alphabet.
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    with open(file, "wb") as f:
        for name in names:
            source = (library / f"{name}.py").read_text(encoding="utf-8")
            f.write(source.encode("ascii", "backslashreplace"))
    return (
        f"the {len(names)} top-level modules in the standard library of "
        f"Python {platform.python_version()}"
    )


def download(url: str, file: Path, sha256: str) -> None:
    """Fetch url into file.

    Raises UserError if that fails or brings anything else, such as half of it."""
    import requests  # here, because only the names that download need it

    seconds_of_silence = 30
    try:
        with requests.get(url, stream=True, timeout=seconds_of_silence) as response:
            response.raise_for_status()
            save_body(response, file)
    except requests.RequestException as e:
        reason = type(e).__name__
        if e.response is not None:
            reason = f"HTTP status {e.response.status_code}"
        raise UserError(
            f"cannot download {url} ({reason}): pass your own copy with --input FILE"
        ) from e
    require(
        hashlib.sha256(file.read_bytes()).hexdigest() == sha256,
        f"{url} sent something other than Tiny Shakespeare: pass your own copy with --input FILE",
    )


def save_body(response: "requests.Response", file: Path) -> None:
    """Write the body of a response to file, with a progress bar."""
    size = int(response.headers.get("Content-Length", 0)) or None
    progress = tqdm(desc="download", total=size, unit="B", unit_scale=True, disable=None)
    with progress, open(file, "wb") as f:
        for data in response.iter_content(1 << 16):  # bytes at a time
            f.write(data)
            progress.update(len(data))


def openwebtext(num_proc: int | None) -> TokenizedText:
    """Return OpenWebText in GPT-2's tokens, with nanoGPT's splits; <|endoftext|> ends each page.

    The Hugging Face cache takes tens of GB (HF_HOME says where). num_proc is the number of
    processes, by default half the cores. Raises UserError if the pages cannot be had."""
    import datasets  # here, because its import takes seconds

    tokenizer = GPT2Tokenizer()
    if num_proc is None:
        num_proc = max(1, (os.cpu_count() or 1) // 2)
    try:
        with one_hub_warning():
            pages = datasets.load_dataset(OPENWEBTEXT, split="train", num_proc=num_proc)
    except OSError as e:  # no network included
        raise UserError(
            f"cannot load OpenWebText ({e}): pass your own copy with "
            "text --input FILE ... --out_dir=data/openwebtext"
        ) from e
    splits = pages.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    splits = splits.map(
        encode_page,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=["text"],
        num_proc=num_proc,
        desc="encode",
    )
    source = f"{OPENWEBTEXT} on the Hugging Face Hub"
    ids = {"train": ids_of_pages(splits["train"]), "val": ids_of_pages(splits["test"])}
    return TokenizedText(source, tokenizer, ids)


def encode_page(page: dict[str, str], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Return the ids of one page of OpenWebText, the end of text included."""
    ids = [*tokenizer.encode(page["text"]), tokenizer.eos_id]
    return {"ids": np.array(ids, np.uint16)}


def ids_of_pages(pages: "datasets.Dataset") -> Iterator[np.ndarray]:
    """Yield the ids of all pages in order, some thousand pages at a time."""
    parts = min(1024, len(pages))
    for i in tqdm(range(parts), desc="write", disable=None):
        part = pages.shard(parts, i, contiguous=True).with_format("numpy")
        yield np.concatenate(part[:]["ids"])


# From text to tokens


def encode_files(source: str, files: list[Path], tokenizer_name: str) -> TokenizedText:
    """Return the text of files in tokens: the first 90% of the characters train, as in nanoGPT.

    Files are laid end to end, with the end-of-text token between them if the tokenizer has one."""
    lengths, vocabulary = scan(files)
    tokenizer: Tokenizer
    if tokenizer_name == "char":
        tokenizer = CharTokenizer("".join(sorted(vocabulary)))
    else:
        tokenizer = GPT2Tokenizer()
    total = sum(lengths)
    cut = int(0.9 * total)
    files_and_lengths = list(zip(files, lengths, strict=True))
    splits = {
        "train": encode(tokenizer, files_and_lengths, 0, cut),
        "val": encode(tokenizer, files_and_lengths, cut, total),
    }
    return TokenizedText(source, tokenizer, splits)


def encode_chats(config: PrepareConfig) -> TokenizedText:
    """Return conversations in the tokens and the chat template of the model config.init_from.

    Raises UserError if the model has no template, or a line is no conversation."""
    model = SampleConfig(init_from=config.init_from)
    tokenizer = pretrained.load_tokenizer(str(config.init_from))
    template = load_template(model, tokenizer)
    require(template is not None, f"{config.init_from}: {NO_CHAT_TEMPLATE}", param="init_from")
    assert template is not None, "that is required above"
    for file in (*config.input, *config.val_input):
        require(file.is_file(), f"there is no file {file}", param="input")
    conversations, held_out = (
        [
            encode_conversation(messages, template.encode, tokenizer, place)
            for place, messages in read_conversations(files)
        ]
        for files in (config.input, config.val_input)
    )
    parts = split_conversations(conversations, held_out)
    return TokenizedText(
        ", ".join(map(str, (*config.input, *config.val_input))),
        tokenizer,
        {name: (one.ids for one in part) for name, part in parts.items()},
        {name: (one.marks for one in part) for name, part in parts.items()},
        {"chat_template": template.source, **template.special_names},
    )


def scan(files: list[Path]) -> tuple[list[int], set[str]]:
    """Return the length of each file in characters, and all characters that occur in them.

    Raises UserError if a file is empty or not UTF-8."""
    lengths = []
    vocabulary: set[str] = set()
    for file in files:
        length = 0
        try:
            for text in characters(file):
                length += len(text)
                vocabulary.update(text)
        except UnicodeDecodeError as e:
            raise UserError(
                f"{file} is not UTF-8 (byte 0x{e.object[e.start]:02x}: {e.reason}): "
                "convert it first, with iconv for instance"
            ) from e
        require(length > 0, f"{file} is empty")
        lengths.append(length)
    return lengths, vocabulary


def encode(
    tokenizer: Tokenizer, files: list[tuple[Path, int]], first: int, last: int
) -> Iterator[list[int]]:
    """Yield the ids of characters first ... last - 1 of files, which are laid end to end.

    files holds each file with its length in characters."""
    start = 0  # of the file, among all characters
    with tqdm(
        desc="encode", total=last - first, unit="char", unit_scale=True, disable=None
    ) as progress:
        for file, length in files:
            if first < start < last and tokenizer.eos_id is not None:
                yield [tokenizer.eos_id]
            for piece in pieces(characters(file, first - start, last - start)):
                yield tokenizer.encode(piece)
                progress.update(len(piece))
            start += length


def characters(file: Path, first: int = 0, last: int = sys.maxsize) -> Iterator[str]:
    """Yield characters first ... last - 1 of a UTF-8 file, in chunks.

    Line ends become \\n, a byte-order mark is dropped."""
    position = 0  # of the next character to be read
    with open(file, encoding="utf-8-sig") as f:
        while position < last:
            text = f.read(min(CHUNK, last - position))
            if not text:
                return
            if position + len(text) > first:
                yield text[max(0, first - position) :]
            position += len(text)


UP_TO_LAST_WORD = re.compile(r"(?s:.*)(?=[ \n]\S)")


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the same text cut where GPT-2's BPE never joins.

    The pieces encode to what the whole text would. BPE works within the matches of a pattern
    (openai/gpt-2, encoder.py) that breaks any text before the last whitespace character in front of
    a word. Text without such a place is one piece, however long."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        match = UP_TO_LAST_WORD.match(rest)
        if match:
            yield match[0]
            rest = rest[match.end() :]
    if rest:
        yield rest


# Onto the disk


def write_splits(
    splits: dict[str, Iterator[Any]], directory: Path, vocab_size: int
) -> dict[str, Any]:
    """Write each split's ids to directory/SPLIT.bin; return what meta.json says about the files.

    Raises UserError if a split is too short to train or to validate on."""
    dtype = np.dtype(np.uint16 if vocab_size <= UINT16_IDS else np.uint32)
    meta: dict[str, Any] = {"vocab_size": vocab_size, "dtype": dtype.name}
    for split, arrays in splits.items():
        tokens, sha256 = write_ids(arrays, directory / f"{split}.bin", dtype)
        require(
            tokens >= 2,
            f"the text is too short: the {split} split gets {tokens} of its tokens, "
            "and needs 2, to predict one from the other; use more text",
        )
        meta[f"{split}_tokens"] = tokens
        meta[f"{split}_sha256"] = sha256
    return meta


def write_marks(marks: dict[str, Iterator[Any]], directory: Path) -> dict[str, Any]:
    """Write each split's marks to directory/SPLIT_marks.bin; return what meta.json says of them."""
    meta = {}
    for split, arrays in marks.items():
        _, meta[f"{split}_marks_sha256"] = write_ids(
            arrays, directory / f"{split}_marks.bin", np.dtype(np.uint8)
        )
    return meta


def write_ids(arrays: Iterator[Any], file: Path, dtype: np.dtype) -> tuple[int, str]:
    """Write ids one after the other; return how many there were, and the file's SHA-256."""
    tokens = 0
    digest = hashlib.sha256()
    with open(file, "wb") as f:
        for ids in arrays:
            data = np.asarray(ids, dtype).tobytes()
            f.write(data)
            digest.update(data)
            tokens += len(ids)
    return tokens, digest.hexdigest()


def require_replaceable(out: Path) -> None:
    """Raise UserError if out holds anything that replacing a data set would lose."""
    require(
        out.is_dir() or not out.exists(),
        f"{out} is a file: choose another --out_dir",
        param="out_dir",
    )
    if not out.exists():
        return
    others = {path.name for path in out.iterdir()} - OUTPUTS
    require(
        not others,
        f"{out} holds {', '.join(sorted(others)[:3])}, which a new data set would replace: "
        "choose another --out_dir",
        param="out_dir",
    )


def replace(out: Path, new: Path, old: Path) -> None:
    """Put the directory new in out's place, and what was there in old's.

    POSIX cannot swap directories in one step: if the process is killed in between, out is missing
    and its content is in old."""
    try:
        if out.exists():
            out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
