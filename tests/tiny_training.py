"""What tests that train share: a tiny config, and a data set of letters as prepare.py writes it.

conftest.data_dir is the directory of that data set.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from config import GPTConfig, TrainConfig
from tokenizer import CharTokenizer

VOCAB_SIZE = 23
CHARS = "".join(chr(ord("a") + i) for i in range(VOCAB_SIZE))
META = {**CharTokenizer(CHARS).meta(), "vocab_size": VOCAB_SIZE, "dtype": "uint16"}
TRAIN_TOKENS = 3000
VAL_TOKENS = 501

TINY = TrainConfig(
    model=GPTConfig(
        block_size=16, vocab_size=VOCAB_SIZE, n_layer=2, n_head=2, n_embd=32, bias=True
    ),
    batch_size=4,
    max_iters=300,
    warmup_iters=2,
    eval_iters=3,
    learning_rate=1e-2,
    min_lr=1e-3,
    tensorboard=False,
)


def write_letters(directory: Path) -> None:
    """Write train.bin, val.bin and meta.json: tokens that go up by 1 to 3, modulo VOCAB_SIZE."""
    steps = np.random.default_rng(0).integers(1, 4, size=TRAIN_TOKENS + VAL_TOKENS)
    ids = (np.cumsum(steps) % VOCAB_SIZE).astype(np.uint16)
    ids[:TRAIN_TOKENS].tofile(directory / "train.bin")
    ids[TRAIN_TOKENS:].tofile(directory / "val.bin")
    (directory / "meta.json").write_text(json.dumps(META))


def assert_trees_close(a: Any, b: Any, **tolerance: float) -> None:
    """Compare every array of two trees by numpy's assert_allclose."""
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), a, b)
