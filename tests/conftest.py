"""What all tests share: data sets, and that no test reaches for a network."""

import gc
import os
import sys
from pathlib import Path

import pytest

COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"
"""What JAX has compiled, for the tests, the processes they start, and the next run: of a test's
time most is the compiler's. JAX's version and flags are part of a program's name there, and
`pytest --cache-clear` forgets them all."""

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from tiny_training import write_letters  # noqa: E402  # it imports JAX, which reads these once

SHARED = Path(__file__).parents[2] / "shared" / "data"
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


LONGEST_FILES = ("test_mesh.py", "test_train_runs.py", "test_native_engine.py")
"""They come first, so that at the end no worker waits for another that has just begun one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of LONGEST_FILES in front of the others."""
    items.sort(key=is_not_of_a_long_file)


def is_not_of_a_long_file(item: pytest.Item) -> bool:
    """Return False for tests of LONGEST_FILES."""
    return item.path.name not in LONGEST_FILES


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


@pytest.fixture(scope="module", autouse=True)
def quick_compiler(request):
    """Let XLA leave out its optimisations, which take longer than a test's programs run.

    Files marked `optimised`, whose subject is what users' programs compute, have them."""
    if request.node.get_closest_marker("optimised"):
        yield
        return
    import jax

    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of processes that tests start
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
