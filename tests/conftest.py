"""What all tests share: data sets, and that no test reaches for a network."""

import gc
import os
import sys
from pathlib import Path

import pytest

from tiny_training import write_letters

SHARED = Path(__file__).parents[2] / "shared" / "data"
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of Tiny Shakespeare, GPT-2's BPE and HellaSwag items."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """The directory of a tiny data set of letters: 3,000 training tokens, 501 for validation."""
    directory = tmp_path_factory.mktemp("data") / "letters"
    directory.mkdir()
    write_letters(directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Give back what JAX compiled for a file's tests once they are done.

    Each program takes some of the memory maps that a process may have, 65,530 on Linux: a run of
    all tests came to the end of them, and died in the compiler."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
