"""DOC"""

import itertools
import statistics
import time
from dataclasses import dataclass

import numpy as np

from config import Dtype, GPTConfig


@dataclass(frozen=True)
class BenchKernelConfig:
    """Time of attention over pages in a decode step, one layer, for every combination of the kernel's constants."""

    attention: str | None = None
    """implementation (default: by device); only triton has splits, tiles and warps"""
    rows: tuple[int, ...] = (1, 8, 64, 256)
    """sequences in the batch, separated by spaces"""
    context: int = 600
    """tokens of each"""
    n_head: int = 12
    head_dim: int = 64
    dtype: Dtype = "bfloat16"
    """of keys and values"""
    page_sizes: tuple[int, ...] = (16, 32, 64)
    splits: tuple[int, ...] = (128, 256, 512)
    """positions per program"""
    tiles: tuple[int, ...] = (32, 64, 128)
    """positions per step of a program"""
    warps: tuple[int, ...] = (2, 4, 8)
    """per program"""


def bench_kernel(config: BenchKernelConfig) -> dict:
    """Microseconds of each variant, median of ten runs of 12 calls that depend on each other, and the bytes per second at which
    it reads its keys and values."""
    import jax
    import jax.numpy as jnp

    import paged_attention as pa

    name, C = config.attention or pa.default_implementation(), config.n_head * config.head_dim
    constants = [(pa.SPLIT, pa.TILE, pa.WARPS)]
    if name == "triton":
        constants = itertools.product(config.splits, config.tiles, config.warps)
    results = []
    for rows, P, (pa.SPLIT, pa.TILE, pa.WARPS) in itertools.product(
        config.rows, config.page_sizes, constants
    ):
        pages = -(-config.context // P)
        rng = np.random.default_rng(0)
        tables = jnp.asarray(1 + rng.permutation(rows * pages).reshape(rows, pages), jnp.int32)
        shape = pa.pool_shape(
            GPTConfig(n_layer=1, n_head=config.n_head, n_embd=C), 1 + rows * pages, P, name
        )
        k, v = (jnp.asarray(rng.standard_normal(shape, np.float32), config.dtype) for _ in range(2))
        q = jnp.asarray(rng.standard_normal((rows, 1, config.n_head, config.head_dim)), jnp.float32)
        lengths, one = jnp.full(rows, config.context - 1, jnp.int32), jnp.ones(rows, jnp.int32)

        def calls(q, k, v):
            attend = lambda _, q: pa.paged_attention(
                q, k, v, tables, lengths, one, layer=0, scale=1.0, implementation=name
            )
            return jax.lax.fori_loop(0, 12, attend, q)

        run, seconds = jax.jit(calls), []
        run(q, k, v).block_until_ready()
        for _ in range(10):
            begin = time.perf_counter()
            run(q, k, v).block_until_ready()
            seconds.append((time.perf_counter() - begin) / 12)
        each = statistics.median(seconds)
        results.append(
            {
                "rows": rows,
                "page_size": P,
                "split": pa.SPLIT,
                "tile": pa.TILE,
                "warps": pa.WARPS,
                "us": round(each * 1e6, 1),
                "gb_per_s": round(2 * rows * config.context * C * k.itemsize / each / 1e9, 1),
            }
        )
        print(", ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    best = {
        rows: min((r for r in results if r["rows"] == rows), key=lambda r: r["us"])
        for rows in config.rows
    }
    return {
        "bench": "kernel",
        "attention": name,
        "dtype": config.dtype,
        "context": config.context,
        "best": best,
    }
