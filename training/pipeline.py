"""The blocks as a pipeline of stages, each on devices of its own (GPipe, Huang et al. 2019).

Start with `pipeline`; `Stage.run` is what one stage does.

Shapes: B rows of a batch, L layers, S stages, M micro-batches.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P


def run_layers(f: Callable, x: jax.Array, rows: Any, layers: Any, unroll: int) -> jax.Array:
    """Return x after x = f(x, rows, layer) for each layer of the stack: a scan."""

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return f(x, rows, layer), None

    x, _ = jax.lax.scan(step, x, layers, unroll=unroll)
    return x


def pipeline(
    f: Callable,
    x: jax.Array,
    rows: Any,
    layers: Any,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str,
    micro_batches: int,
    unroll: int = 1,
) -> jax.Array:
    """Return what run_layers does, where each stage along the mesh's `axis` holds some layers.

    Stage s of the S holds and runs layers s L/S to (s+1) L/S - 1. x (B, ...) and the leaves of
    rows, (B, ...) too, are sharded over `axis` before any other along B; the leaves of layers
    (L, ...) along L.

    f must treat rows independently: they go through the stages as M micro-batches, of which stage s
    works on number t - s at tick t. That makes M + S - 1 ticks, in S - 1 of which a stage has
    nothing to do (and computes what nobody reads). Needs M divisible by S, B by M. The other axes
    of the mesh are left to XLA; the gradient is this program transposed."""
    stages = mesh.shape[axis]
    assert micro_batches % stages == 0 and len(x) % micro_batches == 0, (
        f"{len(x)} rows, {micro_batches} micro-batches, {stages} stages"
    )
    stage = Stage(f, axis, stages, micro_batches, unroll)
    run = jax.shard_map(
        stage.run, mesh=mesh, in_specs=P(axis), out_specs=P(axis), axis_names={axis}
    )
    return run(x, rows, layers, jnp.arange(stages))


@dataclasses.dataclass(frozen=True)
class Stage:
    """What each of the `stages` S of a pipeline does with the `micro_batches` M; inside shard_map.

    The other fields are pipeline's arguments."""

    f: Callable
    axis: str
    stages: int
    micro_batches: int
    unroll: int

    def run(self, x: jax.Array, rows: Any, layers: Any, index: jax.Array) -> jax.Array:
        """Take this stage's shards of pipeline's arguments, return its shard of the result.

        index (1,) is the number of this stage."""
        stage = index[0]
        x, rows = jax.tree.map(self.all_micro_batches, (x, rows))

        def tick(received: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            m = jnp.clip(t - stage, 0, self.micro_batches - 1)
            rows_of_m = jax.tree.map(lambda a: a[m], rows)
            y = jnp.where(stage == 0, x[m], received)
            y = run_layers(self.f, y, rows_of_m, layers, self.unroll)
            return self.send_on(y), y

        ticks = self.micro_batches + self.stages - 1
        _, y = jax.lax.scan(tick, x[0], jnp.arange(ticks))
        # Micro-batch m leaves the last stage at tick m + S - 1.
        finished = jnp.where(stage == self.stages - 1, y[self.stages - 1 :], 0)  # (M, B/M, ...)
        return self.own_rows(finished)

    def all_micro_batches(self, a: jax.Array) -> jax.Array:
        """Return all micro-batches (M, B/M, ...), given this stage's rows (B/S, ...).

        Every M/S-th row makes a micro-batch, so that each has its part of every shard of B."""
        a = a.reshape(-1, self.micro_batches // self.stages, *a.shape[1:])
        own = jnp.moveaxis(a, 1, 0)  # (M/S, B/M, ...)
        return jax.lax.all_gather(own, self.axis, tiled=True)

    def own_rows(self, finished: jax.Array) -> jax.Array:
        """Return this stage's rows (B/S, ...) of the micro-batches.

        `finished` (M, B/M, ...) holds them on the last stage, and 0 on the others."""
        own = jax.lax.psum_scatter(finished, self.axis, tiled=True)  # (M/S, B/M, ...)
        return jnp.moveaxis(own, 0, 1).reshape(-1, *own.shape[2:])

    def send_on(self, y: jax.Array) -> jax.Array:
        """Send y to the next stage, and return what the one before has sent."""
        next_stages = [(s, s + 1) for s in range(self.stages - 1)]
        return jax.lax.ppermute(y, self.axis, next_stages)
