"""A stack of layers spread over devices in stages, each running its own: GPipe (Huang et al. 2019)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P


def pipeline(f: Callable, x: jax.Array, rows: Any, layers: Any, *, mesh: Mesh, axis: str, micro_batches: int,
             unroll: int = 1) -> jax.Array:
    """for each layer: x = f(x, rows, layer); stage s of the S along the mesh's `axis` holds and runs layers s L/S to (s+1) L/S - 1.

    x (B, ...) and the leaves of rows, (B, ...) too, are sharded over `axis` before any other along B; the leaves of layers (L, ...)
    along L. f must treat rows independently: they go through the stages as M micro-batches, of which stage s works on number t - s
    at tick t. That makes M + S - 1 ticks, in S - 1 of which a stage has nothing to do (and computes what nobody reads). Needs M
    divisible by S, B by M. The other axes of the mesh are left to XLA; the gradient is this program transposed."""
    S, M = mesh.shape[axis], micro_batches
    assert M % S == 0 == len(x) % M, f"{len(x)} rows, {M} micro-batches, {S} stages"

    def run(x, rows, layers, stage):
        stage = stage[0]
        # Every M/S-th row makes a micro-batch, so that each has its part of every shard of B: (B/S, ...) -> (M/S, B/M, ...)
        split = lambda a: jnp.moveaxis(a.reshape(-1, M // S, *a.shape[1:]), 1, 0)
        x, rows = jax.tree.map(lambda a: jax.lax.all_gather(split(a), axis, tiled=True), (x, rows))  # (M, B/M, ...)

        def tick(received, t):
            m = jnp.clip(t - stage, 0, M - 1)
            mine = jax.tree.map(lambda a: a[m], rows)
            y, _ = jax.lax.scan(lambda y, layer: (f(y, mine, layer), None), jnp.where(stage == 0, x[m], received), layers,
                                unroll=unroll)
            return jax.lax.ppermute(y, axis, [(s, s + 1) for s in range(S - 1)]), y

        _, y = jax.lax.scan(tick, x[0], jnp.arange(M + S - 1))
        # Micro-batch m leaves the last stage at tick m + S - 1. Every stage gets its own rows back.
        y = jax.lax.psum_scatter(jnp.where(stage == S - 1, y[S - 1:], 0), axis, tiled=True)  # (M/S, B/M, ...)
        return jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:])

    return jax.shard_map(run, mesh=mesh, in_specs=P(axis), out_specs=P(axis), axis_names={axis})(x, rows, layers, jnp.arange(S))
