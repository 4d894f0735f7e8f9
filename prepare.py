"""Text to token files: python prepare.py NAME [--input FILE ...]. data/README.md explains names and files.

Text is read, encoded and written piece by piece, so memory stays small however long the text is.
"""

import hashlib
import json
import math
import os
import platform
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
from config import PrepareConfig
from errors import require
from tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
OUTPUTS = {"train.bin", "val.bin", "meta.json"}
CHUNK = 1 << 20  # characters


def main(config: PrepareConfig) -> None:
    """Write a data set to config.data_path: all of it, in place of an earlier one, or nothing.

    Raises ValueError where the text cannot be had or will not do."""
    out = config.data_path.resolve()  # where out_dir is a link, it stays one
    require_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        scratch = Path(scratch)
        new = scratch / "new"
        new.mkdir()
        if config.name == "openwebtext":
            source, tokenizer = "Skylion007/openwebtext on the Hugging Face Hub", GPT2Tokenizer()
            splits = openwebtext(tokenizer, config.num_proc or max(1, os.cpu_count() // 2))
        else:
            source, files = text_files(config, scratch)
            tokenizer, splits = encode_files(files, config.tokenizer_name)
        meta = (
            tokenizer.meta() | write_splits(splits, new, tokenizer.vocab_size) | {"source": source}
        )
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        replace(out, new, scratch / "old")
    print(
        f"{config.data_path}: vocabulary of {tokenizer.vocab_size:,} ({tokenizer.name}), "
        f"{meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate"
    )


# Where text comes from


def text_files(config: PrepareConfig, scratch: Path) -> tuple[str, list[Path]]:
    """What a data set is made of: a line for meta.json, and UTF-8 files, the user's own or in scratch."""
    if config.input:
        for file in config.input:
            require(file.exists(), f"there is no file {file}")
            require(file.is_file(), f"{file} is not a regular file")
        return ", ".join(map(str, config.input)), list(config.input)
    file = scratch / "input.txt"
    if config.name == "pystdlib_char":
        return write_stdlib(file), [file]
    download(SHAKESPEARE_URL, file, SHAKESPEARE_SHA256)
    return SHAKESPEARE_URL, [file]


def write_stdlib(file: Path) -> str:
    """Write the standard library's top-level modules, about 4.5 MB, end to end; return a line for meta.json.

    The few characters beyond ASCII are escaped, so the vocabulary is the printable ones and the newline."""
    library = Path(sysconfig.get_path("stdlib"))
    names = [name for name in sys.stdlib_module_names if (library / f"{name}.py").is_file()]
    require(names, f"{library} has no source of the standard library: use text --input FILE ...")
    # In the order of their hashes: the same everywhere, and the last tenth is no stretch of the alphabet.
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    with open(file, "wb") as f:
        for name in names:
            f.write(
                (library / f"{name}.py")
                .read_text(encoding="utf-8")
                .encode("ascii", "backslashreplace")
            )
    return f"the {len(names)} top-level modules in the standard library of Python {platform.python_version()}"


def download(url: str, file: Path, sha256: str) -> None:
    """Fetch url into file. Raises ValueError if that fails or brings anything else, such as half of it."""
    import requests  # here, because only the names that download need it

    try:
        with (
            requests.get(url, stream=True, timeout=30) as response,
            open(file, "wb") as f,
        ):  # s, of silence
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(
                desc="download", total=size, unit="B", unit_scale=True, disable=None
            ) as progress:
                for data in response.iter_content(1 << 16):
                    f.write(data)
                    progress.update(len(data))
    except requests.RequestException as e:
        reason = type(e).__name__ if e.response is None else f"HTTP status {e.response.status_code}"
        raise ValueError(
            f"cannot download {url} ({reason}): pass your own copy with --input FILE"
        ) from e
    require(
        hashlib.sha256(file.read_bytes()).hexdigest() == sha256,
        f"{url} sent something other than Tiny Shakespeare: pass your own copy with --input FILE",
    )


def openwebtext(tokenizer: Tokenizer, num_proc: int) -> dict[str, Iterator[np.ndarray]]:
    """The ids of OpenWebText's splits, which are nanoGPT's; the end-of-text token ends each page.

    The Hugging Face cache takes tens of GB (HF_HOME says where)."""
    import datasets  # here, because its import takes seconds

    try:
        pages = datasets.load_dataset("Skylion007/openwebtext", split="train", num_proc=num_proc)
    except OSError as e:  # no network included
        raise ValueError(
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
    return {"train": shards(splits["train"]), "val": shards(splits["test"])}


def encode_page(page: dict[str, str], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    return {"ids": np.array([*tokenizer.encode(page["text"]), tokenizer.eos_id], np.uint16)}


def shards(pages: "datasets.Dataset") -> Iterator[np.ndarray]:
    """The ids of all pages in order, some thousand pages at a time."""
    n = min(1024, len(pages))
    for i in tqdm(range(n), desc="write", disable=None):
        yield np.concatenate(pages.shard(n, i, contiguous=True).with_format("numpy")[:]["ids"])


# From text to tokens


def encode_files(files: list[Path], tokenizer_name: str) -> tuple[Tokenizer, dict[str, Iterator]]:
    """The tokenizer for files, and the ids of their splits: the first 90% of the characters, and the rest.

    Files are laid end to end, with the end-of-text token, where the tokenizer has one, between them."""
    lengths, chars = [], set()
    for file in files:
        lengths.append(0)
        try:
            for text in characters(file):
                lengths[-1] += len(text)
                chars.update(text)
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{file} is not UTF-8 (byte 0x{e.object[e.start]:02x}: {e.reason}): "
                "convert it first, with iconv for instance"
            ) from e
        require(lengths[-1] > 0, f"{file} is empty")
    tokenizer = (
        CharTokenizer("".join(sorted(chars))) if tokenizer_name == "char" else GPT2Tokenizer()
    )
    total = sum(lengths)
    cut = int(0.9 * total)  # as nanoGPT has it
    return tokenizer, {
        split: encode(tokenizer, list(zip(files, lengths)), first, last)
        for split, first, last in (("train", 0, cut), ("val", cut, total))
    }


def encode(
    tokenizer: Tokenizer, files: list[tuple[Path, int]], first: int, last: int
) -> Iterator[list[int]]:
    """The ids of characters first ... last - 1 of files (path, length), which are laid end to end."""
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


def characters(file: Path, first: int = 0, last: float = math.inf) -> Iterator[str]:
    """Characters first ... last - 1 of a UTF-8 file, in chunks. Line ends become \\n, a BOM is dropped."""
    position = 0
    with open(file, encoding="utf-8-sig") as f:
        while position < last and (text := f.read(min(CHUNK, last - position))):
            if position + len(text) > first:
                yield text[max(0, first - position) :]
            position += len(text)


LAST_WORD = re.compile(r"(?s:.*)(?=[ \n]\S)")


def pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The same text cut where GPT-2's BPE never joins, so that the pieces encode to what the whole would.

    BPE works within the matches of a pattern (openai/gpt-2, encoder.py) that breaks any text before the last
    whitespace character in front of a word. Text without such a place is one piece, however long."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        if match := LAST_WORD.match(rest):
            yield match[0]
            rest = rest[match.end() :]
    if rest:
        yield rest


# Onto the disk


def write_splits(splits: dict[str, Iterator], directory: Path, vocab_size: int) -> dict:
    """Write each split's ids to directory/SPLIT.bin. Returns what meta.json says about these files."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    meta = {"vocab_size": vocab_size, "dtype": dtype.name}
    for split, arrays in splits.items():
        tokens, digest = 0, hashlib.sha256()
        with open(directory / f"{split}.bin", "wb") as f:
            for ids in arrays:
                data = np.asarray(ids, dtype).tobytes()
                f.write(data)
                digest.update(data)
                tokens += len(ids)
        require(
            tokens >= 2,
            f"the text is too short: the {split} split gets {tokens} of its tokens, "
            "and needs 2, to predict one from the other; use more text",
        )
        meta |= {f"{split}_tokens": tokens, f"{split}_sha256": digest.hexdigest()}
    return meta


def require_replaceable(out: Path) -> None:
    """Raise ValueError if out has anything in it that replacing a data set would lose."""
    require(out.is_dir() or not out.exists(), f"{out} is a file: choose another --out_dir")
    others = {path.name for path in out.iterdir()} - OUTPUTS if out.exists() else ()
    require(
        not others,
        f"{out} holds {', '.join(sorted(others)[:3])}, which a new data set would replace: "
        "choose another --out_dir",
    )


def replace(out: Path, new: Path, old: Path) -> None:
    """Put the directory new in out's place, and what was there in old's.

    POSIX cannot swap directories in one step: killed in between, out is missing and its content is in old."""
    try:
        if out.exists():
            out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


if __name__ == "__main__":
    cli.run("prepare", PrepareConfig)
