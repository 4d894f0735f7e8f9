"""Attention over a paged KV cache: the cache, and several implementations behind one signature.

Start reading at `reference`, which defines what all implementations compute, then at
PagedKVCache.attend, which writes new keys and values into the pool and calls one of them. `xla` is
tuned for a CPU; the native code for one is in kernels/cpu_kernels.cc, and what is for GPUs and TPUs
in kernels/pallas.py.

Shapes: `B T C H D V L` as in model.py, and for pages `N` physical pages of `P` tokens each, `M`
logical pages per row of the block table. A pool is (L, N, H, P, D): what one head needs of one
page, a (P, D) matrix, is contiguous, which is what every implementation multiplies by. Page 0 is
the null page: it takes the writes of padding tokens, the unused tail of a block table points at
it, and nothing read there reaches a result.

The same bits: what a row gets depends on its own query and its own tokens: not on its neighbours,
nor on where its pages lie, on the width M of the table, or on what free pages hold, NaN included.
`reference` promises this of the numbers, the other implementations of the bits too.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from config import GPTConfig
from errors import require
from kernels import cpu_kernels
from kernels.pallas import NO_SCORE, TPU_LANES, mosaic_tpu, triton, visible_positions


@partial(
    jax.tree_util.register_dataclass,
    meta_fields=["attention"],
    data_fields=["k_pages", "v_pages", "block_tables", "context_lens", "new_lens"],
)
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values in pages, with the dense KVCache's interface.

    The pool, k_pages and v_pages, outlives the batch, which is the next three fields. Donate the
    pool to the jitted step and it is updated in place."""

    k_pages: jax.Array
    """(L, N, H, P, D) float32, bfloat16, or bfloat16's bits as uint16, see pool_dtype"""
    v_pages: jax.Array
    """(L, N, H, P, D), like k_pages"""
    block_tables: jax.Array
    """(B, M) int32, physical page of each logical page; 0, the null page, where unused"""
    context_lens: jax.Array
    """(B,) int32, tokens in the pages before this call"""
    new_lens: jax.Array
    """(B,) int32, how many of this call's T tokens are real; 0 for a padding row"""
    attention: str
    """implementation: NATIVE or a key of IMPLEMENTATIONS"""

    @classmethod
    def create(
        cls,
        config: GPTConfig,
        num_pages: int,
        page_size: int,
        dtype: str = "float32",
        attention: str | None = None,
    ) -> "PagedKVCache":
        """Return an empty pool for a GPT, with a batch of no rows.

        `attention` and `dtype` are as choose_implementation and pool_dtype say. Raises UserError
        for an unknown implementation or too few pages."""
        attention = choose_implementation(attention)
        require(
            num_pages >= 2,
            f"num_pages={num_pages}: page 0 is the null page, so at least 2 are needed",
            "kv_blocks",
        )
        stored = pool_dtype(dtype)
        shape = pool_shape(config, num_pages, page_size, attention)
        none = jnp.zeros(0, jnp.int32)
        return cls(
            k_pages=jnp.zeros(shape, stored),
            v_pages=jnp.zeros(shape, stored),
            block_tables=none[None],
            context_lens=none,
            new_lens=none,
            attention=attention,
        )

    @property
    def page_size(self) -> int:
        """P, tokens per page."""
        return self.k_pages.shape[3]

    def positions(self, T: int) -> jax.Array:
        """Return the absolute positions (B, T) int32 of the next T tokens.

        Those of padding tokens mean nothing."""
        return self.context_lens[:, None] + jnp.arange(T, dtype=jnp.int32)

    def attend(
        self, layer: int | jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, "PagedKVCache"]:
        """Write k, v of the new tokens into `layer`, then attend causally over each row's pages.

        q, k, v (B, T, H, D). Returns y (B, T, H, D) float32, zero for padding tokens, and the
        cache."""
        T, _, D = q.shape[1:]
        if self.attention == NATIVE:
            return self._attend_natively(layer, q, k, v)
        slots = self._slots(layer, T)
        cache = dataclasses.replace(
            self, k_pages=write(self.k_pages, slots, k), v_pages=write(self.v_pages, slots, v)
        )
        y = paged_attention(
            q,
            cache.k_pages,
            cache.v_pages,
            self.block_tables,
            self.context_lens,
            self.new_lens,
            layer=layer,
            scale=D**-0.5,
            implementation=self.attention,
        )
        return y, cache

    def _attend_natively(
        self, layer: int | jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, "PagedKVCache"]:
        """Do what attend does, in one call of native code. Padding tokens are written nowhere."""
        y, k_pages, v_pages = cpu_kernels.paged_attention(
            q,
            k,
            v,
            self.k_pages,
            self.v_pages,
            self.block_tables,
            self.context_lens,
            self.new_lens,
            layer=layer,
        )
        return y, dataclasses.replace(self, k_pages=k_pages, v_pages=v_pages)

    def advance(self, T: int) -> "PagedKVCache":
        """Return the cache after the last layer: each row holds its new_lens, at most T, more."""
        context_lens = self.context_lens + jnp.minimum(self.new_lens, T)
        return dataclasses.replace(self, context_lens=context_lens)

    def _slots(self, layer: int | jax.Array, T: int) -> jax.Array:
        """Return where each head of the next T tokens lies in the pool as a list of (D,) rows.

        (B, T, H) int32. One flat index per head: indices into some of the five axes make XLA copy
        the pool, on TPU to lay it out for them, on CPU when there is one token."""
        _, N, H, P, _ = self.k_pages.shape
        position = self.positions(T)  # (B, T)
        page = jnp.take_along_axis(self.block_tables, position // P, axis=1, mode="clip")
        is_real = jnp.arange(T) < self.new_lens[:, None]
        page = jnp.where(is_real, page, 0)  # padding writes to the null page
        page_and_head = (layer * N + page[..., None]) * H + jnp.arange(H)  # (B, T, H)
        return page_and_head * P + (position % P)[..., None]


def write(pages: jax.Array, slots: jax.Array, x: jax.Array) -> jax.Array:
    """Return the pool with x (B, T, H, D) at `slots` (B, T, H of the pool), see _slots."""
    rows = pages.reshape(-1, pages.shape[-1])
    return rows.at[slots].set(pack(x, pages)).reshape(pages.shape)


# --- The pool ------------------------------------------------------------------------------------


def pool_shape(
    config: GPTConfig, num_pages: int, page_size: int, attention: str
) -> tuple[int, ...]:
    """Return the shape (L, N, H, P, D) of the keys' or the values' pool.

    A TPU lays the last axis out in lanes of 128, so there `128 // D` heads lie side by side in
    one: narrower rows would be stored padded, or the whole pool be copied at each call of the
    kernel."""
    H = config.kv_heads
    D = config.head_dim
    if attention == "mosaic_tpu":
        side_by_side = max(1, TPU_LANES // D)
        H = pl.cdiv(H, side_by_side)
        D = pl.cdiv(side_by_side * D, TPU_LANES) * TPU_LANES
    return config.n_layer, num_pages, H, page_size, D


def pool_dtype(dtype: str) -> jnp.dtype:
    """Return the dtype in which a pool holds keys and values of `dtype`.

    On CPU bfloat16 is kept as uint16: XLA there (jax 0.10) converts the whole array to float32 and
    back to gather from it or scatter into it."""
    if jnp.dtype(dtype) == jnp.bfloat16 and jax.default_backend() == "cpu":
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(dtype)


def num_pages_for(
    config: GPTConfig, page_size: int, dtype: str, budget: int, attention: str | None = None
) -> int:
    """Return how many pages of keys and values in every layer fit into `budget` bytes.

    The null page is counted. Raises UserError if the budget holds fewer than 2."""
    shape = pool_shape(config, 1, page_size, choose_implementation(attention))
    page_bytes = 2 * math.prod(shape) * jnp.dtype(dtype).itemsize  # keys and values
    num_pages = budget // page_bytes
    require(
        num_pages >= 2,
        f"a KV cache of {budget} bytes holds {num_pages} pages of {page_bytes} bytes, and at "
        "least 2 are needed (one is the null page): give it more memory or a smaller page",
        "kv_cache_memory",
    )
    return num_pages


def pack(x: jax.Array, pages: jax.Array) -> jax.Array:
    """Return x (..., H, D) as tokens of the pool `pages`: (..., H, D) of its shape and dtype."""
    *lead, H, D = x.shape
    _, _, pool_H, _, pool_D = pages.shape
    side_by_side = pl.cdiv(H, pool_H)
    unpadded = [(0, 0)] * len(lead)
    x = jnp.pad(x, [*unpadded, (0, pool_H * side_by_side - H), (0, 0)])
    x = x.reshape(*lead, pool_H, side_by_side * D)
    x = jnp.pad(x, [*unpadded, (0, 0), (0, pool_D - side_by_side * D)])
    return to_dtype(x, pages.dtype)


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


# --- Attention -----------------------------------------------------------------------------------


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    new_lens: jax.Array,
    *,
    layer: int | jax.Array,
    scale: float,
    implementation: str,
) -> jax.Array:
    """Causal attention of each row's new tokens over its own pages, which hold them already.

    q (B, T, H, D), any T; k_pages, v_pages (L, N, H, P, D), the heads arranged as pool_shape says;
    block_tables (B, M), context_lens and new_lens (B,) int32; layer an int or an int32 scalar.
    Token t < new_lens[b] sits at position context_lens[b] + t and sees every position up to its
    own. Returns (B, T, H, D) float32, zero where t >= new_lens[b]."""
    attend = IMPLEMENTATIONS[implementation]
    layer = jnp.asarray(layer, jnp.int32)
    return attend(q, k_pages, v_pages, block_tables, context_lens, new_lens, layer, scale)


# With float32 sums, of float32 inputs that no tensor core or MXU rounds.
einsum = partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def reference(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    new_lens: jax.Array,
    layer: jax.Array,
    scale: float,
) -> jax.Array:
    """What every implementation computes, as plainly as it can be said: see paged_attention.

    It copies all M pages of every row, and writes out all of the scores."""
    k = _gather_rows(k_pages[layer], block_tables)  # (B, S, H, D), S = M * P
    v = _gather_rows(v_pages[layer], block_tables)
    token = jnp.arange(q.shape[1])
    is_real = token < new_lens[:, None]  # (B, T)
    position = context_lens[:, None] + token  # (B, T)
    is_visible = jnp.arange(k.shape[1]) <= position[..., None]  # (B, T, S)
    scores = einsum("bthd,bshd->bhts", q.astype(jnp.float32), k) * scale
    weights = jax.nn.softmax(jnp.where(is_visible[:, None], scores, -jnp.inf))
    is_written = jnp.arange(v.shape[1]) < (context_lens + new_lens)[:, None]  # (B, S)
    v = jnp.where(is_written[..., None, None], v, 0)  # 0 * NaN is NaN
    y = einsum("bhts,bshd->bthd", weights, v)
    return jnp.where(is_real[..., None, None], y, 0)


def _gather_rows(pages: jax.Array, block_tables: jax.Array) -> jax.Array:
    """Return the tokens of each row in the order of positions, (B, M * P, H, D) float32.

    pages (N, H, P, D) are one layer's, block_tables (B, M)."""
    _, H, _, D = pages.shape
    rows = to_float32(pages[block_tables]).swapaxes(2, 3)  # (B, M, P, H, D)
    return rows.reshape(len(block_tables), -1, H, D)


# --- CPU: tuned for XLA --------------------------------------------------------------------------
XLA_CHUNK = 32  # positions per step, where a page is not longer; 48 and 16 took longer on a CPU


class _SortedBatch(NamedTuple):
    """What all steps of `xla` read. Its rows are sorted, longest first."""

    k_pages: jax.Array  # (L * N * H, P * D); not a slice of a layer, which would be a copy
    v_pages: jax.Array  # (L * N * H, P * D)
    tables: jax.Array  # (B, M) int32 pages, counted over all layers; M fills whole chunks
    q: jax.Array  # (B, H, T, D) float32, scaled
    length: jax.Array  # (B, 1, T, 1) int32, positions that a token sees
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

    maximum: jax.Array  # (B, H, T, 1) float32, the largest score
    weights: jax.Array  # (B, H, T, S) float32, sums of the weights of every S-th position
    values: jax.Array  # (B, H, T, D) float32, the weighted sum of the values


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
    length = visible_positions(q.shape[1], context_lens, new_lens)  # (B, T)
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
    y = sums.values / denominator[..., None]  # (B, H, T, D)
    return y[jnp.argsort(order)].swapaxes(1, 2)  # (B, T, H, D)


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
    L, N, H, P, D = k_pages.shape
    pages_per_chunk = max(1, XLA_CHUNK // P)
    missing_pages = -block_tables.shape[1] % pages_per_chunk
    tables = jnp.pad(block_tables, ((0, 0), (0, missing_pages)))[order]
    length = length[order, None, :, None]
    return _SortedBatch(
        k_pages=k_pages.reshape(L * N * H, P * D),
        v_pages=v_pages.reshape(L * N * H, P * D),
        tables=tables + layer * N,
        q=q[order].astype(jnp.float32).swapaxes(1, 2) * scale,
        length=length,
        longest=length.max((1, 2, 3)),
        chunk_positions=jnp.arange(pages_per_chunk * P),
    )


def _no_sums(batch: _SortedBatch) -> _RunningSums:
    """Return the sums over no chunk at all."""
    B, H, T, D = batch.q.shape
    S = len(batch.chunk_positions)
    return _RunningSums(
        maximum=jnp.full((B, H, T, 1), NO_SCORE),
        weights=jnp.zeros((B, H, T, S)),
        values=jnp.zeros((B, H, T, D)),
    )


def _add_chunk_of_rows(
    batch: _SortedBatch, chunk: jax.Array, step: jax.Array, sums: _RunningSums
) -> _RunningSums:
    """Return the sums with one chunk of positions added to those of the step's rows."""
    first_row = step * batch.rows_per_step
    rows_of = partial(
        jax.lax.dynamic_slice_in_dim, start_index=first_row, slice_size=batch.rows_per_step
    )
    k, v = _read_chunk(batch, chunk, rows_of(batch.tables))  # (rows, H, S, D)
    position = chunk * len(batch.chunk_positions) + batch.chunk_positions
    seen = position < rows_of(batch.length)  # (rows, 1, T, S)
    v = jnp.where(seen.any(2)[..., None], v, 0)  # 0 * NaN is NaN
    scores = jnp.where(seen, einsum("bhtd,bhpd->bhtp", rows_of(batch.q), k), -jnp.inf)
    before = _RunningSums(*map(rows_of, sums))
    maximum = jnp.maximum(before.maximum, scores.max(-1, keepdims=True))
    rescale = jnp.exp(before.maximum - maximum)
    weights = jnp.exp(scores - maximum)
    after = _RunningSums(
        maximum=maximum,
        weights=before.weights * rescale + weights,
        values=before.values * rescale + einsum("bhtp,bhpd->bhtd", weights, v),
    )
    replace_rows = partial(jax.lax.dynamic_update_slice_in_dim, start_index=first_row, axis=0)
    return _RunningSums(*map(replace_rows, sums, after))


def _read_chunk(
    batch: _SortedBatch, chunk: jax.Array, tables: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the keys and the values (rows, H, S, D) float32 of one chunk of some rows' tables."""
    rows = len(tables)
    H, D = batch.q.shape[1], batch.q.shape[3]
    count = batch.pages_per_chunk
    pages = jax.lax.dynamic_slice_in_dim(tables, chunk * count, count, axis=1)
    at = pages[:, None] * H + jnp.arange(H)[:, None]  # (rows, H, pages)
    k = to_float32(batch.k_pages.at[at].get(mode="promise_in_bounds"))
    v = to_float32(batch.v_pages.at[at].get(mode="promise_in_bounds"))
    return k.reshape(rows, H, -1, D), v.reshape(rows, H, -1, D)


# --- The choice ----------------------------------------------------------------------------------

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference,
    "xla": xla,
    "triton": triton,
    "mosaic_tpu": mosaic_tpu,
}

NATIVE = "cpu"
"""Name of the native CPU kernel, cpu_kernels.paged_attention. It writes to the pool as well, so it
is no entry of IMPLEMENTATIONS: see PagedKVCache.attend."""


def same_bits_in_any_shape(implementation: str) -> bool:
    """Return whether a token gets the same bits in calls of any number of rows and new tokens.

    Of the others a token's bits are promised only among calls of one shape."""
    return implementation == NATIVE


def choose_implementation(
    name: str | None, cpu_kernels_switch: Literal["auto", "off"] = "auto"
) -> str:
    """Return name, or the default for None. Raises UserError if it cannot be had here.

    cpu_kernels_switch: off for a user who wants no native code."""
    name = name or default_implementation(cpu_kernels_switch)
    known = [*IMPLEMENTATIONS, NATIVE]
    require(name in known, f"attention={name}: there are {', '.join(known)}", "attention")
    if name == NATIVE:
        reason = cpu_kernels.unavailable_because(cpu_kernels_switch)
        require(reason is None, f"attention={name} cannot be had here: {reason}", "attention")
    return name


def default_implementation(cpu_kernels_switch: Literal["auto", "off"]) -> str:
    """Return the implementation for this process's devices."""
    is_native = cpu_kernels.unavailable_because(cpu_kernels_switch) is None
    on_cpu = NATIVE if is_native else "xla"
    return {"gpu": "triton", "tpu": "mosaic_tpu"}.get(jax.default_backend(), on_cpu)
