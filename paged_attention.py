"""Attention over a paged KV cache: the cache, and several implementations behind one signature.

Start reading at `reference`, which defines what all implementations compute, then at
PagedKVCache.attend, which writes new keys and values into the pool and calls one of them. Those for
a CPU are in kernels/xla_attention.py and, as native code, in kernels/cpu_kernels.cc; those for GPUs
and TPUs in kernels/pallas.py.

Shapes: `B T C H D V L` as in model.py; `KV` heads of keys and values, each read by a group of `G`
heads of queries, H = KV * G; `N` physical pages of `P` tokens each, `M` logical pages per row of
the block table. A pool is (L, N, KV, P, D): what a group needs of one page, a (P, D) matrix, is
contiguous, which is what every implementation multiplies by. Page 0 is the null page: it takes the
writes of padding tokens, the unused tail of a block table points at it, and nothing read there
reaches a result.

The same bits: what a row gets depends on its own query and its own tokens: not on its neighbours,
nor on where its pages lie, on the width M of the table, or on what free pages hold, NaN included.
`reference` promises this of the numbers, the other implementations of the bits too.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh

from config import GPTConfig
from errors import require
from kernels import cpu_kernels
from kernels.pallas import TPU_LANES, mosaic_tpu, triton
from kernels.softmax_sums import dot
from kernels.xla_attention import pool_dtype, to_dtype, to_float32, xla
from mesh import attend_by_heads, pool_sharding, shards_of_heads


@partial(
    jax.tree_util.register_dataclass,
    meta_fields=["attention", "mesh"],
    data_fields=["k_pages", "v_pages", "block_tables", "context_lens", "new_lens"],
)
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values in pages, with the dense KVCache's interface.

    The pool, k_pages and v_pages, outlives the batch, which is the next three fields. Donate the
    pool to the jitted step and it is updated in place."""

    k_pages: jax.Array
    """(L, N, KV, P, D) float32, bfloat16, or bfloat16's bits as uint16, see pool_dtype"""
    v_pages: jax.Array
    """(L, N, KV, P, D), like k_pages"""
    block_tables: jax.Array
    """(B, M) int32, physical page of each logical page; 0, the null page, where unused"""
    context_lens: jax.Array
    """(B,) int32, tokens in the pages before this call"""
    new_lens: jax.Array
    """(B,) int32, how many of this call's T tokens are real; 0 for a padding row"""
    attention: str
    """implementation: NATIVE or a key of IMPLEMENTATIONS"""
    mesh: Mesh | None = None
    """the devices that share the heads; None for one device"""

    @classmethod
    def create(
        cls,
        config: GPTConfig,
        num_pages: int,
        page_size: int,
        dtype: str = "float32",
        attention: str | None = None,
        mesh: Mesh | None = None,
    ) -> "PagedKVCache":
        """Return an empty pool for a GPT, with a batch of no rows, shared by the devices of a mesh.

        `attention` and `dtype` are as choose_implementation and pool_dtype say. Raises UserError
        for an unknown implementation or too few pages."""
        attention = choose_implementation(attention)
        require(
            num_pages >= 2,
            f"num_pages={num_pages}: page 0 is the null page, so at least 2 are needed",
            "kv_blocks",
        )
        stored = pool_dtype(dtype)
        shape = pool_shape(config, num_pages, page_size, attention, shards_of_heads(mesh))
        none = jnp.zeros(0, jnp.int32)
        placement = None if mesh is None else pool_sharding(mesh)
        return cls(
            k_pages=jnp.zeros(shape, stored, device=placement),
            v_pages=jnp.zeros(shape, stored, device=placement),
            block_tables=none[None],
            context_lens=none,
            new_lens=none,
            attention=attention,
            mesh=mesh,
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

        q (B, T, H, D); k, v (B, T, KV, D). Returns y (B, T, H, D) float32, zero for padding tokens,
        and the cache."""
        if self.mesh is not None:
            return attend_by_heads(self.mesh, self, layer, q, k, v)
        B, T, KV, D = k.shape
        if self.attention == NATIVE:
            return self._attend_natively(layer, q, k, v)
        slots = self._slots(layer, T)
        cache = dataclasses.replace(
            self, k_pages=write(self.k_pages, slots, k), v_pages=write(self.v_pages, slots, v)
        )
        y = paged_attention(
            q.reshape(B, T, KV, -1, D),
            cache.k_pages,
            cache.v_pages,
            self.block_tables,
            self.context_lens,
            self.new_lens,
            layer=layer,
            scale=D**-0.5,
            implementation=self.attention,
        )
        return y.reshape(q.shape), cache

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

        (B, T, KV) int32. One flat index per head: indices into some of the five axes make XLA copy
        the pool, on TPU to lay it out for them, on CPU when there is one token."""
        _, N, KV, P, _ = self.k_pages.shape
        position = self.positions(T)  # (B, T)
        page = jnp.take_along_axis(self.block_tables, position // P, axis=1, mode="clip")
        is_real = jnp.arange(T) < self.new_lens[:, None]
        page = jnp.where(is_real, page, 0)  # padding writes to the null page
        page_and_head = (layer * N + page[..., None]) * KV + jnp.arange(KV)  # (B, T, KV)
        return page_and_head * P + (position % P)[..., None]


def write(pages: jax.Array, slots: jax.Array, x: jax.Array) -> jax.Array:
    """Return the pool with x (B, T, KV, D) at `slots` (B, T, KV of the pool), see _slots."""
    rows = pages.reshape(-1, pages.shape[-1])
    return rows.at[slots].set(pack(x, pages)).reshape(pages.shape)


# --- The pool ------------------------------------------------------------------------------------


def pool_shape(
    config: GPTConfig, num_pages: int, page_size: int, attention: str, shards: int = 1
) -> tuple[int, ...]:
    """Return the shape (L, N, KV, P, D) of the keys' or the values' pool.

    Of a pool that so many devices share, equal parts of the axis KV are each as one of its own.

    A TPU lays the last axis out in lanes of 128, so there `128 // D` heads lie side by side in
    one: narrower rows would be stored padded, or the whole pool be copied at each call of the
    kernel."""
    KV = config.kv_heads // shards
    D = config.head_dim
    if attention == "mosaic_tpu":
        side_by_side = max(1, TPU_LANES // D)
        KV = pl.cdiv(KV, side_by_side)
        D = pl.cdiv(side_by_side * D, TPU_LANES) * TPU_LANES
    return config.n_layer, num_pages, shards * KV, page_size, D


def num_pages_for(
    config: GPTConfig,
    page_size: int,
    dtype: str,
    budget: int,
    attention: str | None = None,
    shards: int = 1,
) -> int:
    """Return how many pages of keys and values in every layer fit into `budget` bytes.

    The budget is that of each of `shards` devices, which share the heads of every page. The null
    page is counted. Raises UserError if the budget holds fewer than 2."""
    shape = pool_shape(config, 1, page_size, choose_implementation(attention), shards)
    page_bytes = 2 * math.prod(shape) * jnp.dtype(dtype).itemsize // shards  # keys and values
    num_pages = budget // page_bytes
    require(
        num_pages >= 2,
        f"a KV cache of {budget} bytes holds {num_pages} pages of {page_bytes} bytes, and at "
        "least 2 are needed (one is the null page): give it more memory or a smaller page",
        "kv_cache_memory",
    )
    return num_pages


def pack(x: jax.Array, pages: jax.Array) -> jax.Array:
    """Return x (..., KV, D) as tokens of the pool `pages`: (..., KV, D) of its shape and dtype."""
    *lead, KV, D = x.shape
    _, _, pool_KV, _, pool_D = pages.shape
    side_by_side = pl.cdiv(KV, pool_KV)
    unpadded = [(0, 0)] * len(lead)
    x = jnp.pad(x, [*unpadded, (0, pool_KV * side_by_side - KV), (0, 0)])
    x = x.reshape(*lead, pool_KV, side_by_side * D)
    x = jnp.pad(x, [*unpadded, (0, 0), (0, pool_D - side_by_side * D)])
    return to_dtype(x, pages.dtype)


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

    q (B, T, KV, G, D), any T: head k of the keys and values is read by its G heads of queries;
    k_pages, v_pages (L, N, KV, P, D), their heads arranged as pool_shape says; block_tables (B, M),
    context_lens and new_lens (B,) int32; layer an int or an int32 scalar. Token t < new_lens[b]
    sits at position context_lens[b] + t and sees every position up to its own. Returns
    (B, T, KV, G, D) float32, zero where t >= new_lens[b]."""
    attend = IMPLEMENTATIONS[implementation]
    layer = jnp.asarray(layer, jnp.int32)
    return attend(q, k_pages, v_pages, block_tables, context_lens, new_lens, layer, scale)


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
    k = _gather_rows(k_pages[layer], block_tables)  # (B, S, KV, D), S = M * P
    v = _gather_rows(v_pages[layer], block_tables)
    token = jnp.arange(q.shape[1])
    is_real = token < new_lens[:, None]  # (B, T)
    position = context_lens[:, None] + token  # (B, T)
    is_visible = jnp.arange(k.shape[1]) <= position[..., None]  # (B, T, S)
    scores = dot("btkgd,bskd->bkgts", q.astype(jnp.float32), k) * scale
    weights = jax.nn.softmax(jnp.where(is_visible[:, None, None], scores, -jnp.inf))
    is_written = jnp.arange(v.shape[1]) < (context_lens + new_lens)[:, None]  # (B, S)
    v = jnp.where(is_written[..., None, None], v, 0)  # 0 * NaN is NaN
    y = dot("bkgts,bskd->btkgd", weights, v)
    return jnp.where(is_real[..., None, None, None], y, 0)


def _gather_rows(pages: jax.Array, block_tables: jax.Array) -> jax.Array:
    """Return the tokens of each row in the order of positions, (B, M * P, KV, D) float32.

    pages (N, KV, P, D) are one layer's, block_tables (B, M)."""
    _, KV, _, D = pages.shape
    rows = to_float32(pages[block_tables]).swapaxes(2, 3)  # (B, M, P, KV, D)
    return rows.reshape(len(block_tables), -1, KV, D)


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


def default_implementation(cpu_kernels_switch: Literal["auto", "off"] = "auto") -> str:
    """Return the implementation for this process's devices."""
    is_native = cpu_kernels.unavailable_because(cpu_kernels_switch) is None
    on_cpu = NATIVE if is_native else "xla"
    return {"gpu": "triton", "tpu": "mosaic_tpu"}.get(jax.default_backend(), on_cpu)
