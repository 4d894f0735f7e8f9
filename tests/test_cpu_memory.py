"""How a process holds its memory: kernels/cpu_memory.py."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import cpu_memory


class FakeArray:
    """What spans reads of an array."""

    def __init__(self, start: int, nbytes: int):
        self.start = start
        self.nbytes = nbytes

    def unsafe_buffer_pointer(self) -> int:
        return self.start


def test_neighbours_are_one_span():
    """Catches: a span that ends with an array inside of it, neighbours kept apart, and memory
    between far ones that is nobody's."""
    near = cpu_memory.NEIGHBOURS
    arrays = [FakeArray(1000 + near, 10), FakeArray(0, 1000), FakeArray(1011 + 2 * near, 5)]
    assert cpu_memory.spans(arrays) == [(0, 1010 + near), (1011 + 2 * near, 1016 + 2 * near)]


def test_numbers_stay_where_and_what_they_are():
    """Catches a call that moves or clears what it should only hold otherwise."""
    x = jnp.arange(3 * 2**20, dtype=jnp.float32)  # 12 MiB
    place = x.unsafe_buffer_pointer()
    assert 0 <= cpu_memory.use_huge_pages([x]) <= 6
    assert x.unsafe_buffer_pointer() == place
    assert (np.asarray(x) == np.arange(3 * 2**20)).all()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such setting")
def test_freed_memory_is_kept():
    """Catches settings that do not reach malloc: a large array's memory is given back at once."""
    program = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from kernels import cpu_memory
import numpy as np
cpu_memory.keep_freed_memory()
def faults_of_an_array():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)  # 128 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults_of_an_array()
print(first, max(faults_of_an_array() for _ in range(3)))
"""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", program, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, later = map(int, done.stdout.split())
    assert later < first / 10
