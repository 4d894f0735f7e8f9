"""The token files that prepare.py wrote: what proves them whole, and a batch out of one.

`load_data` opens a data set and `get_batch` cuts batch t out of a file. Every token that training
sees goes through `TokenFile.tokens`, which finds ids that the vocabulary does not have. No JAX in
here: prepare.py uses this file too.

Shapes: B rows of a batch, T block_size.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from errors import UserError, require

SPLITS = ("train", "val")
DTYPES = ("uint16", "uint32")
META_TYPES = {
    "vocab_size": int,
    "dtype": str,
    **{f"{split}_tokens": int for split in SPLITS},
    **{f"{split}_sha256": str for split in SPLITS},
    **{f"{split}_marks_sha256": str for split in SPLITS},
}
"""What meta.json says about the files, by type. Other programs' may lack all but the first two."""
BEGINS = 1
"""The mark of a token that begins a conversation, in a file of marks: a byte for each token."""
LEARNED = 2
"""The mark of a token that is learned: as a target it counts in the loss, others do not."""
MARKS = BEGINS | LEARNED
TOKENS_AT_ONCE = 1 << 22
"""Tokens that `verify` reads at a time."""


class TokenFile(NamedTuple):
    """A file of token ids."""

    path: Path
    dtype: str
    """uint16 or uint32."""
    vocab_size: int | None = None
    """Ids are below this; None: they are not checked."""
    marks_path: Path | None = None
    """A file of marks, a byte for each token; without one every token is learned."""

    def read(self) -> np.memmap:
        """Return all tokens, mapped anew and not checked.

        A mapping that lives on keeps every page it has touched in this process's memory."""
        return np.memmap(self.path, self.dtype, mode="r")

    def tokens(self, positions: np.ndarray | slice) -> np.ndarray:
        """Return the tokens at these positions of the file, int32.

        Raises UserError if one of them is no id of the vocabulary: a device would not say so, but
        compute a loss of nan."""
        ids = self.read()[positions]
        if self.vocab_size is not None and ids.size and ids.max() >= self.vocab_size:
            place = np.unravel_index(ids.argmax(), ids.shape)
            if isinstance(positions, slice):
                position = (positions.start or 0) + int(place[0])
            else:
                position = int(positions[place])
            raise UserError(
                f"{self.path} has token {ids.max()} at position {position}, but the vocabulary of "
                f"meta.json only {self.vocab_size} tokens: prepare the data again, python "
                "prepare.py ... --verify says what is damaged",
                param="data_dir",
            )
        return ids.astype(np.int32)

    def marks(self, positions: np.ndarray | slice) -> np.ndarray:
        """Return the marks at these positions, uint8. Raises UserError if a byte is none."""
        assert self.marks_path is not None, "only a file of conversations has marks"
        marks = np.memmap(self.marks_path, np.uint8, mode="r")[positions]
        require(
            marks.size == 0 or int(marks.max()) <= MARKS,
            f"{self.marks_path} has a byte {marks.max(initial=0)}, and marks are at most {MARKS}: "
            "prepare the data again",
            param="data_dir",
        )
        return marks

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """Return the tokens at positions (..., T+1), as int32, to train on.

        A token that is only read, and is no target, is ~id: below 0, as targets that do not count
        are. So are all in front of a window's first conversation, whose own beginning it lacks."""
        ids = self.tokens(positions)
        if self.marks_path is None:
            return ids
        marks = self.marks(positions)
        is_whole = np.logical_or.accumulate(marks & BEGINS, axis=-1).astype(bool)
        return np.where(is_whole & (marks & LEARNED).astype(bool), ids, ~ids)


# --- Opening a data set.


def load_data(data_dir: Path) -> tuple[dict[str, TokenFile], dict[str, Any]]:
    """Return the splits {"train", "val"} and the meta.json of a directory that prepare.py wrote.

    Raises UserError if one of the three files is absent or damaged, as far as their sizes tell."""
    require(
        (data_dir / "meta.json").exists(),
        f"there is no data in {data_dir}; write it with: python prepare.py {data_dir.name}, "
        "or give --data_dir",
        param="data_dir",
    )
    meta = read_meta(data_dir / "meta.json")
    files = {split: open_split(data_dir, split, meta) for split in SPLITS}
    return files, meta


def open_split(data_dir: Path, split: str, meta: dict[str, Any]) -> TokenFile:
    """Return a split whose files have the sizes that meta tells. Raises UserError."""
    path = data_dir / f"{split}.bin"
    tokens = meta.get(f"{split}_tokens")
    if not meta.get(f"{split}_marks_sha256"):
        file = TokenFile(path, meta["dtype"], meta["vocab_size"])
        require_size(file, tokens)
        return file
    marks_path = data_dir / f"{split}_marks.bin"
    file = TokenFile(path, meta["dtype"], meta["vocab_size"], marks_path)
    require_size(file, tokens)
    require_size(TokenFile(marks_path, "uint8"), len(file.read()))
    return file


def read_meta(path: Path) -> dict[str, Any]:
    """Return the content of a meta.json. Raises UserError if that cannot be one."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged, it is not JSON ({error}): prepare the data again",
            param="data_dir",
        ) from error
    require(
        isinstance(meta, dict) and {"vocab_size", "dtype"} <= meta.keys(),
        f"{path} does not say the vocab_size and dtype of token files: prepare the data again",
        param="data_dir",
    )
    for name, kind in META_TYPES.items():
        value = meta.get(name, kind())
        require(
            type(value) is kind,
            f"{path} has {name}={value!r}, which is no {kind.__name__}: prepare the data again",
            param="data_dir",
        )
    require(
        meta["dtype"] in DTYPES,
        f"{path} has dtype={meta['dtype']!r}, which must be {' or '.join(DTYPES)}: prepare the "
        "data again",
        param="data_dir",
    )
    require(
        meta["vocab_size"] >= 1,
        f"{path} has vocab_size={meta['vocab_size']}, which must be at least 1: prepare the data "
        "again",
        param="data_dir",
    )
    return meta


def require_size(file: TokenFile, tokens: int | None) -> None:
    """Raise UserError unless the file is there and holds so many tokens; None: any number."""
    require(
        file.path.is_file(),
        f"there is no file {file.path}, which meta.json describes: prepare the data again",
        param="data_dir",
    )
    size = file.path.stat().st_size
    itemsize = np.dtype(file.dtype).itemsize
    require(size > 0, f"{file.path} is empty: prepare the data again", param="data_dir")
    if tokens is None:
        require(
            size % itemsize == 0,
            f"{file.path} has {size} bytes, which are no whole number of {file.dtype} tokens of "
            f"{itemsize} bytes: it was cut short, prepare the data again",
            param="data_dir",
        )
        return
    require(
        size == tokens * itemsize,
        f"{file.path} has {size} bytes, but the {tokens} tokens that meta.json counts take "
        f"{tokens * itemsize}: it is of another data set or was cut short, prepare the data again",
        param="data_dir",
    )


def verify(data_dir: Path) -> dict[str, Any]:
    """Read all of a data set and return its meta.json, which is proved to describe the files.

    Raises UserError if a file has another size or SHA-256, or a token that is not in the
    vocabulary."""
    files, meta = load_data(data_dir)
    for split, file in files.items():
        digest = hashlib.sha256()
        marks_digest = hashlib.sha256()
        for start in range(0, len(file.read()), TOKENS_AT_ONCE):
            piece = slice(start, start + TOKENS_AT_ONCE)
            file.tokens(piece)
            digest.update(file.read()[piece].tobytes())
            if file.marks_path is not None:
                marks_digest.update(file.marks(piece).tobytes())
        require_digest(file.path, digest.hexdigest(), f"{split}_sha256", meta)
        if file.marks_path is not None:
            name = f"{split}_marks_sha256"
            require_digest(file.marks_path, marks_digest.hexdigest(), name, meta)
    return meta


def require_digest(path: Path, digest: str, name: str, meta: dict[str, Any]) -> None:
    """Raise UserError unless meta has this SHA-256 of a file, by the name."""
    expected = meta.get(name)
    require(
        expected is not None,
        f"{path.parent / 'meta.json'} has no {name} to compare with: prepare the data again",
        param="verify",
    )
    require(
        digest == expected,
        f"{path} is damaged: its SHA-256 is {digest}, but meta.json has {expected}; prepare the "
        "data again",
        param="verify",
    )


# --- Cutting batches.


@lru_cache(maxsize=4)  # a batch may straddle two epochs, of two files
def epoch_order(seed: int, epoch: int, windows: int, block_size: int) -> tuple[int, np.ndarray]:
    """Return where an epoch's first window starts, and the order in which its windows are seen.

    The start is in [0, block_size)."""
    rng = np.random.default_rng((seed, epoch))
    offset = int(rng.integers(block_size))
    return offset, rng.permutation(windows)


def get_batch(
    file: TokenFile, t: int, shape: tuple[int, ...], seed: int, rows: slice = slice(None)
) -> np.ndarray:
    """Return batch t of `shape` (..., B, T), or only `rows` of the B.

    It is tokens (..., B, T+1) int32, whose first T are the input and whose last T are the targets:
    the same tokens however they are divided. Of conversations, a token that is no target is ~id:
    see TokenFile.windows. A pure function of its arguments.

    In every epoch the file is cut into windows of T at another offset, and each window is seen
    once, in shuffled order; the order of an epoch is the only thing kept in memory (8 bytes a
    window). Raises UserError if the file is too short, or has a token outside the vocabulary."""
    length = len(file.read())
    T = shape[-1]
    rows_per_batch = math.prod(shape[:-1])
    windows = (length - T) // T
    require(
        windows >= 1,
        f"{file.path} has {length} tokens, too few for block_size={T}: it needs at least {2 * T}",
        param="block_size",
    )
    numbers = np.arange(t * rows_per_batch, (t + 1) * rows_per_batch)
    numbers = numbers.reshape(shape[:-1])[..., rows]  # which windows these rows are, from step 0
    starts = []
    for number in numbers.flat:
        offset, order = epoch_order(seed, number // windows, windows, T)
        starts.append(offset + T * order[number % windows])
    positions = np.array(starts).reshape(*numbers.shape, 1) + np.arange(T + 1)
    return file.windows(positions)


def windows_in_order(file: TokenFile, shape: tuple[int, int]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield batches (B, T+1) int32 of shape (B, T) with every token of the file, and their targets.

    The windows of T follow one another. What does not fill the last window or the last batch is
    padded with targets of -1, which do not count."""
    B, T = shape
    last = len(file.read()) - 1
    for start in range(0, last, B * T):
        firsts = np.arange(start, min(start + B * T, last), T)
        positions = np.minimum(firsts[:, None] + np.arange(T + 1), last)
        tokens = file.windows(positions)
        tokens[firsts[:, None] + np.arange(T + 1) > last] = -1
        rows = np.pad(tokens, ((0, B - len(tokens)), (0, 0)), constant_values=-1)
        yield rows, int((rows[:, 1:] >= 0).sum())
