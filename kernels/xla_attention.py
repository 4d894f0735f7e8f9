"""Attention over pages on a CPU, tuned for XLA: `xla`, and the dtype that XLA wants of a pool.

It has the signature of paged_attention.reference and computes what it defines. Start reading at
`xla`, then at _add_chunk_of_rows.

Shapes: as in paged_attention.py. A head of keys has `Q` = T * G queries: those of its G heads of
queries, which lie side by side, for each of T tokens. So a chunk of keys is read once for them all.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.softmax_sums import NO_SCORE, dot, visible_positions

XLA_CHUNK = 32
"""positions per step, where a page is not longer; 48 and 16 took longer on a CPU"""


class _SortedBatch(NamedTuple):
    """What all steps of `xla` read. Its rows are sorted, longest first."""

    k_pages: jax.Array  # (L * N * KV, P * D); not a slice of a layer, which would be a copy
    v_pages: jax.Array  # (L * N * KV, P * D)
    tables: jax.Array  # (B, M) int32 pages, counted over all layers; M fills whole chunks
    q: jax.Array  # (B, KV, Q, D) float32, scaled
    length: jax.Array  # (B, 1, Q, 1) int32, positions that a query sees
    longest: jax.Array  # (B,) int32, the most that a token of a row sees; descending
    chunk_positions: jax.Array  # (S,) int32, 0 to S - 1

    @property
    def pages_per_chunk(self) -> int:
        return len(self.chunk_positions) * self.q.shape[3] // self.k_pages.shape[1]

    @property
    def rows_per_step(self) -> int:
        """1 took longer for rows of equal length, more than 2 for others."""
        return 2 - len(self.q) % 2


class _RunningSums(NamedTuple):
    """The softmax over the chunks seen so far. A weight is exp(score - maximum)."""

    maximum: jax.Array  # (B, KV, Q, 1) float32, the largest score
    weights: jax.Array  # (B, KV, Q, S) float32, sums of the weights of every S-th position
    values: jax.Array  # (B, KV, Q, D) float32, the weighted sum of the values


def xla(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    new_lens: jax.Array,
    layer: jax.Array,
    scale: float,
) -> jax.Array:
    """Attention on a CPU, see paged_attention: FlashAttention's sum (Dao et al. 2022).

    It goes over chunks of S = XLA_CHUNK positions, and in each over two rows at a time, longest
    rows first, so that a chunk costs only those rows that reach it.

    XLA on CPU orders the sum of a reduction by the size of the batch. So the only reductions here
    are those within a product, over D or over a chunk's positions; the S sums of weights are added
    one by one, last."""
    B, T, KV, G, D = q.shape
    length = visible_positions(T, context_lens, new_lens)  # (B, T)
    order = jnp.argsort(length.max(1), descending=True)
    batch = _sort_batch(q, k_pages, v_pages, block_tables, length, order, layer, scale)
    S = len(batch.chunk_positions)

    def add_chunk(chunk: jax.Array, sums: _RunningSums) -> _RunningSums:
        rows = (batch.longest > chunk * S).sum()
        steps = pl.cdiv(rows, batch.rows_per_step)
        return jax.lax.fori_loop(0, steps, partial(_add_chunk_of_rows, batch, chunk), sums)

    chunks = pl.cdiv(batch.longest[0], S)
    sums = jax.lax.fori_loop(0, chunks, add_chunk, _no_sums(batch))
    denominator = sum(sums.weights[..., i] for i in range(S))
    denominator = jnp.where(denominator == 0, 1, denominator)  # a padding token has no weights
    y = sums.values / denominator[..., None]  # (B, KV, Q, D)
    y = y[jnp.argsort(order)].reshape(B, KV, T, G, D)
    return y.swapaxes(1, 2)  # (B, T, KV, G, D)


def _sort_batch(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    length: jax.Array,
    order: jax.Array,
    layer: jax.Array,
    scale: float,
) -> _SortedBatch:
    """Return xla's arguments as its steps read them, the rows in `order`."""
    L, N, KV, P, D = k_pages.shape
    B, T, _, G, _ = q.shape
    pages_per_chunk = max(1, XLA_CHUNK // P)
    missing_pages = -block_tables.shape[1] % pages_per_chunk
    tables = jnp.pad(block_tables, ((0, 0), (0, missing_pages)))[order]
    length = jnp.repeat(length[order], G, axis=1)[:, None, :, None]
    q = q[order].astype(jnp.float32).swapaxes(1, 2) * scale  # (B, KV, T, G, D)
    return _SortedBatch(
        k_pages=k_pages.reshape(L * N * KV, P * D),
        v_pages=v_pages.reshape(L * N * KV, P * D),
        tables=tables + layer * N,
        q=q.reshape(B, KV, T * G, D),
        length=length,
        longest=length.max((1, 2, 3)),
        chunk_positions=jnp.arange(pages_per_chunk * P),
    )


def _no_sums(batch: _SortedBatch) -> _RunningSums:
    """Return the sums over no chunk at all."""
    *queries, D = batch.q.shape
    S = len(batch.chunk_positions)
    return _RunningSums(
        maximum=jnp.full((*queries, 1), NO_SCORE),
        weights=jnp.zeros((*queries, S)),
        values=jnp.zeros((*queries, D)),
    )


def _add_chunk_of_rows(
    batch: _SortedBatch, chunk: jax.Array, step: jax.Array, sums: _RunningSums
) -> _RunningSums:
    """Return the sums with one chunk of positions added to those of the step's rows."""
    first_row = step * batch.rows_per_step
    rows_of = partial(
        jax.lax.dynamic_slice_in_dim, start_index=first_row, slice_size=batch.rows_per_step
    )
    k, v = _read_chunk(batch, chunk, rows_of(batch.tables))  # (rows, KV, S, D)
    position = chunk * len(batch.chunk_positions) + batch.chunk_positions
    seen = position < rows_of(batch.length)  # (rows, 1, Q, S)
    v = jnp.where(seen.any(2)[..., None], v, 0)  # 0 * NaN is NaN
    scores = jnp.where(seen, dot("bkqd,bkpd->bkqp", rows_of(batch.q), k), -jnp.inf)
    before = _RunningSums(*map(rows_of, sums))
    maximum = jnp.maximum(before.maximum, scores.max(-1, keepdims=True))
    rescale = jnp.exp(before.maximum - maximum)
    weights = jnp.exp(scores - maximum)
    after = _RunningSums(
        maximum=maximum,
        weights=before.weights * rescale + weights,
        values=before.values * rescale + dot("bkqp,bkpd->bkqd", weights, v),
    )
    replace_rows = partial(jax.lax.dynamic_update_slice_in_dim, start_index=first_row, axis=0)
    return _RunningSums(*map(replace_rows, sums, after))


def _read_chunk(
    batch: _SortedBatch, chunk: jax.Array, tables: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the keys and the values (rows, KV, S, D) float32 of one chunk of some rows' tables."""
    rows = len(tables)
    KV, D = batch.q.shape[1], batch.q.shape[3]
    count = batch.pages_per_chunk
    pages = jax.lax.dynamic_slice_in_dim(tables, chunk * count, count, axis=1)
    at = pages[:, None] * KV + jnp.arange(KV)[:, None]  # (rows, KV, pages)
    k = to_float32(batch.k_pages.at[at].get(mode="promise_in_bounds"))
    v = to_float32(batch.v_pages.at[at].get(mode="promise_in_bounds"))
    return k.reshape(rows, KV, -1, D), v.reshape(rows, KV, -1, D)


# --- The pool's dtype ----------------------------------------------------------------------------


def pool_dtype(dtype: str) -> jnp.dtype:
    """Return the dtype in which a pool holds keys and values of `dtype`.

    On CPU bfloat16 is kept as uint16: XLA there (jax 0.10) converts the whole array to float32 and
    back to gather from it or scatter into it."""
    if jnp.dtype(dtype) == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(dtype)


def to_dtype(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return x in a pool's dtype; uint16 holds the bits of a bfloat16."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def to_float32(x: jax.Array) -> jax.Array:
    """Return the numbers in a part of a pool."""
    if x.dtype == jnp.uint16:
        x = jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    return x.astype(jnp.float32)
