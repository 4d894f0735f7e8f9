"""Time of attention over pages in a decode step: start with bench_kernel.

Shapes: as in paged_attention.py; here B rows of one new token and `context` tokens in all.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np

from benchmarks.contender import in_words
from config import Dtype, GPTConfig
from errors import require, require_at_least
from flags import default_is

if TYPE_CHECKING:  # loads JAX, which --help does without
    import jax

    from kernels.pallas import TritonSizes

Pool = tuple["jax.Array", "jax.Array"]  # keys and values, see random_arguments

CALLS = 12  # of attention in one run, as many as GPT-2 has layers
RUNS = 10  # timed; their median counts


@dataclass(frozen=True)
class BenchKernelConfig:
    """Time of attention over pages in a decode step, one layer, for every size of the kernel."""

    attention: Annotated[str | None, default_is("by device")] = None
    """implementation; only triton has splits, tiles and warps"""
    rows: tuple[int, ...] = (1, 8, 64, 256)
    """sequences in the batch, separated by spaces"""
    context: int = 600
    """tokens of each"""
    n_head: int = 12
    """attention heads"""
    n_kv_head: Annotated[int | None, default_is("n_head")] = None
    """heads of keys and values, each read by n_head / n_kv_head heads of queries"""
    head_dim: int = 64
    """numbers in a head's query, key or value"""
    dtype: Dtype = "bfloat16"
    """of keys and values"""
    page_sizes: tuple[int, ...] = (16, 32, 64)
    """tokens per page"""
    splits: tuple[int, ...] = (128, 256, 512)
    """positions per program"""
    tiles: tuple[int, ...] = (32, 64, 128)
    """positions per step of a program"""
    warps: tuple[int, ...] = (2, 4, 8)
    """warps per program"""

    def __post_init__(self):
        require_at_least(self, 1, "context", "n_head", "head_dim")
        self.model()  # checks n_kv_head
        for name in ("rows", "page_sizes", "splits", "tiles", "warps"):
            values = getattr(self, name)
            are_positive = bool(values) and min(values) >= 1
            require(are_positive, f"{name}={values} must be one or more numbers above 0", name)

    def model(self) -> GPTConfig:
        """Return the shape of a model of one layer that attends so."""
        return GPTConfig(
            n_layer=1,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head,
            n_embd=self.n_head * self.head_dim,
        )


class Variant(NamedTuple):
    """What is timed by itself."""

    rows: int
    page_size: int
    sizes: "TritonSizes | None"  # None for an implementation that has no sizes to vary


def bench_kernel(config: BenchKernelConfig) -> dict:
    """Time every variant, print each, and return the fastest for each number of rows."""
    from paged_attention import choose_implementation

    name = choose_implementation(config.attention)
    results = []
    for variant in variants(config, name):
        results.append(measure(config, name, variant))
        print(in_words(results[-1]), flush=True)
    return {
        "bench": "kernel",
        "attention": name,
        "dtype": config.dtype,
        "context": config.context,
        "best": {rows: fastest(results, rows) for rows in config.rows},
    }


def variants(config: BenchKernelConfig, name: str) -> Iterator[Variant]:
    """Yield every combination of what the config lists."""
    choices = triton_sizes(config) if name == "triton" else [None]
    for rows in config.rows:
        for page_size in config.page_sizes:
            for sizes in choices:
                yield Variant(rows, page_size, sizes)


def triton_sizes(config: BenchKernelConfig) -> "list[TritonSizes]":
    """Return every combination of the sizes of the Triton kernel."""
    from kernels.pallas import TritonSizes

    return [
        TritonSizes(split, tile, warps)
        for split in config.splits
        for tile in config.tiles
        for warps in config.warps
    ]


def measure(config: BenchKernelConfig, name: str, variant: Variant) -> dict:
    """Return a variant's microseconds per call, and the GB/s at which it reads keys and values."""
    arguments = random_arguments(config, name, variant)
    seconds = seconds_per_call(name, variant.sizes, arguments)
    numbers_read = 2 * variant.rows * config.context * config.model().kv_heads * config.head_dim
    bytes_read = numbers_read * arguments[1].itemsize
    sizes = {}
    if variant.sizes is not None:
        sizes = {
            "split": variant.sizes.split,
            "tile": variant.sizes.tile,
            "warps": variant.sizes.warps,
        }
    return {
        "rows": variant.rows,
        "page_size": variant.page_size,
        **sizes,
        "us": round(seconds * 1e6, 1),
        "gb_per_s": round(bytes_read / seconds / 1e9, 1),
    }


def random_arguments(config: BenchKernelConfig, name: str, variant: Variant) -> "list[jax.Array]":
    """Return q, k_pages, v_pages, block_tables, context_lens and new_lens of one decode step.

    The pages of a row lie anywhere in the pool, which has the layout of implementation `name`."""
    import jax.numpy as jnp

    from kernels.xla_attention import pool_dtype, to_dtype
    from paged_attention import pool_shape

    rng = np.random.default_rng(0)
    B = variant.rows
    pages_per_row = -(-config.context // variant.page_size)
    pages = 1 + B * pages_per_row  # page 0 is the null page
    model = config.model()
    shape = pool_shape(model, pages, variant.page_size, name)
    block_tables = 1 + rng.permutation(pages - 1).reshape(B, pages_per_row)
    pools = [
        to_dtype(jnp.asarray(rng.standard_normal(shape, np.float32)), pool_dtype(config.dtype))
        for _ in ("keys", "values")
    ]
    groups = (B, 1, model.kv_heads, model.n_head // model.kv_heads, model.head_dim)
    q = rng.standard_normal(groups, np.float32)
    return [
        jnp.asarray(q),
        *pools,
        jnp.asarray(block_tables, jnp.int32),
        jnp.full(B, config.context - 1, jnp.int32),
        jnp.ones(B, jnp.int32),
    ]


def seconds_per_call(name: str, sizes: "TritonSizes | None", arguments: "list[jax.Array]") -> float:
    """Return the median over RUNS of the seconds of one call of attention.

    A run is CALLS calls; each takes the result of the one before as its queries, so that none can
    be left out or run beside another."""
    import jax

    attend = one_call(name, sizes)

    @partial(jax.jit, donate_argnums=1)
    def run(q: jax.Array, pool: Pool, *batch: jax.Array) -> tuple[jax.Array, Pool]:
        def next_call(_: int, q_and_pool: tuple[jax.Array, Pool]) -> tuple[jax.Array, Pool]:
            return attend(*q_and_pool, *batch)

        return jax.lax.fori_loop(0, CALLS, next_call, (q, pool))

    q, *pages, block_tables, context_lens, new_lens = arguments
    pool = tuple(pages)
    seconds = []
    for _ in range(1 + RUNS):
        begin = time.perf_counter()
        y, pool = run(q, pool, block_tables, context_lens, new_lens)
        y.block_until_ready()
        seconds.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(seconds[1:])  # the first one compiles


def one_call(name: str, sizes: "TritonSizes | None") -> Callable:
    """Return a function of q, the pool and the batch that returns y and the pool.

    Native code writes the new tokens to the pool too: the first query of each group, as their keys
    and their values."""
    import jax.numpy as jnp

    from kernels import cpu_kernels
    from paged_attention import IMPLEMENTATIONS, NATIVE

    layer = jnp.int32(0)
    options = {} if sizes is None else {"sizes": sizes}

    def attend(q: "jax.Array", pool: Pool, *batch: "jax.Array") -> "tuple[jax.Array, Pool]":
        return IMPLEMENTATIONS[name](q, *pool, *batch, layer=layer, scale=1.0, **options), pool

    def write_and_attend(q: "jax.Array", pool: Pool, *batch: "jax.Array"):
        heads = q.reshape(len(q), 1, -1, q.shape[-1])  # (B, 1, H, D)
        first = q[:, :, :, 0]  # (B, 1, KV, D)
        y, *pages = cpu_kernels.paged_attention(
            heads, first, first, *pool, *batch, layer=layer, scale=1.0
        )
        return y.reshape(q.shape), tuple(pages)

    return write_and_attend if name == NATIVE else attend


def fastest(results: list[dict], rows: int) -> dict:
    """Return the result with the fewest microseconds of those for `rows` rows."""
    return min(
        (result for result in results if result["rows"] == rows), key=lambda result: result["us"]
    )
