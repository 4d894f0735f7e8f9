"""Attention over a paged KV cache: the cache, a jnp reference and Pallas kernels behind one signature.

Shapes: `B T C H D V L` as in model.py, and for pages `N` physical pages of `P` tokens each, `M` logical pages per row
of the block table. A pool is (L, N, H, P, D): what one head needs of one page, a (P, D) matrix, is contiguous, which is
what every implementation multiplies by. Page 0 is the null page: it takes the writes of padding tokens, the unused
tail of a block table points at it, and nothing that is read there reaches a result.

The same bits: what a row gets depends on its own query, its own tokens and nothing else: not on its neighbours,
on where its pages lie, on the width M of the table, or on what free pages hold, NaN included.
"""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, meta_fields=["attention"],
         data_fields=["k_pages", "v_pages", "block_tables", "context_lens", "new_lens"])
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values in pages, with the dense KVCache's interface. The engine keeps one pool alive and, each step,
    `dataclasses.replace`s the three per-batch fields; donate it to the jitted step and the pool is updated in place."""
    k_pages: jax.Array       # (L, N, H, P, D) float32, bfloat16, or bfloat16's bits as uint16 (see create)
    v_pages: jax.Array       # (L, N, H, P, D)
    block_tables: jax.Array  # (B, M) int32, physical page of each logical page; unused entries are 0, the null page
    context_lens: jax.Array  # (B,) int32, tokens in the pages before this call
    new_lens: jax.Array      # (B,) int32, how many of this call's T tokens are real; 0 for a padding row
    attention: str           # implementation, a key of IMPLEMENTATIONS

    @classmethod
    def create(cls, config, num_pages: int, page_size: int, dtype="float32", attention: str | None = None):
        """An empty pool for a GPTConfig, with a batch of no rows. `attention=None` takes default_implementation().

        On CPU a bfloat16 pool is kept as uint16: XLA there (jax 0.10) converts a whole bfloat16 array to float32 and
        back to gather from it or scatter into it, which at 1 GiB costs more than the model."""
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}: page 0 is the null page, so at least 2 are needed")
        shape = config.n_layer, num_pages, config.n_head, page_size, config.n_embd // config.n_head
        if jnp.dtype(dtype) == jnp.bfloat16 and jax.default_backend() == "cpu":
            dtype = jnp.uint16
        none = jnp.zeros((0,), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((0, 0), jnp.int32), none, none,
                   attention or default_implementation())

    def positions(self, T: int) -> jax.Array:
        """(B, T) int32 absolute positions of the next T tokens; those of padding tokens run on and mean nothing."""
        return self.context_lens[:, None] + jnp.arange(T, dtype=jnp.int32)

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[3]

    def attend(self, layer, q, k, v):
        """Writes k, v (B, T, H, D) of the new tokens into `layer`, then attends causally over each row's own pages.
        Returns y (B, T, H, D) float32, zero for padding tokens, and the cache."""
        B, T, H, D = q.shape
        pos = self.positions(T)  # (B, T)
        page = jnp.take_along_axis(self.block_tables, pos // self.page_size, axis=1, mode="clip")
        page = jnp.where(jnp.arange(T) < self.new_lens[:, None], page, 0)  # padding writes to the null page
        at = layer, page, slice(None), pos % self.page_size
        k_pages, v_pages = [pages.at[at].set(to_dtype(x, pages.dtype))
                            for pages, x in ((self.k_pages, k), (self.v_pages, v))]
        y = paged_attention(q, k_pages, v_pages, self.block_tables, self.context_lens, self.new_lens,
                            layer=layer, scale=D**-0.5, implementation=self.attention)
        return y, dataclasses.replace(self, k_pages=k_pages, v_pages=v_pages)

    def advance(self, T: int):
        """After the last layer: each row holds its new_lens (at most T) tokens more."""
        return dataclasses.replace(self, context_lens=self.context_lens + jnp.minimum(self.new_lens, T))


def to_dtype(x, dtype):
    """x in a pool's dtype; uint16 holds the bits of a bfloat16."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) if dtype == jnp.uint16 else x.astype(dtype)


def to_float32(x):
    """The numbers in a part of a pool."""
    return (jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x).astype(jnp.float32)


def page_bytes(config, page_size: int, dtype) -> int:
    """Bytes of one page: keys and values of `page_size` tokens in every layer."""
    return 2 * config.n_layer * page_size * config.n_embd * jnp.dtype(dtype).itemsize


def num_pages_for(config, page_size: int, dtype, budget: int) -> int:
    """How many pages (the null page counted) a pool of `budget` bytes holds."""
    each = page_bytes(config, page_size, dtype)
    if budget < 2 * each:
        raise ValueError(f"a KV cache of {budget} bytes holds {budget // each} pages of {each} bytes, and at least 2 are "
                         "needed (one is the null page): give it more memory or a smaller page")
    return budget // each


def paged_attention(q, k_pages, v_pages, block_tables, context_lens, new_lens, *, layer, scale, implementation):
    """Causal attention of each row's new tokens over its own pages, which hold them already.

    q (B, T, H, D), any T; k_pages, v_pages (L, N, H, P, D); block_tables (B, M), context_lens and new_lens (B,) int32;
    layer an int or an int32 scalar. Token t < new_lens[b] sits at position context_lens[b] + t and sees every position
    up to its own. Returns (B, T, H, D) float32, zero where t >= new_lens[b].
    """
    return IMPLEMENTATIONS[implementation](q, k_pages, v_pages, block_tables, context_lens, new_lens,
                                           jnp.asarray(layer, jnp.int32), scale)


def visible(T, context_lens, new_lens):
    """(B, T) int32: how many positions, from 0 on, each new token sees; 0 for padding tokens."""
    t = jnp.arange(T, dtype=jnp.int32)
    return jnp.where(t < new_lens[:, None], context_lens[:, None] + t + 1, 0)


def reference(q, k_pages, v_pages, block_tables, context_lens, new_lens, layer, scale):
    """Softmax in two passes over one logical page at a time, as many as the longest row needs: the scores and their
    maximum, then the weighted values. Every operation has a fixed shape per row and page, and a page beyond a row's
    end adds exact zeros to it."""
    B, T, H, D = q.shape
    L, N, H, P, D = k_pages.shape
    M = block_tables.shape[1]
    k_pages, v_pages = [pages.reshape(L * N, H, P, D) for pages in (k_pages, v_pages)]  # so no layer is sliced out
    q = q.astype(jnp.float32).swapaxes(1, 2) * scale  # (B, H, T, D)
    length = visible(T, context_lens, new_lens)  # (B, T)
    pages = (length.max() + P - 1) // P

    def page(pool, i):
        """Page i of each row (B, H, P, D) float32, and which of its positions each token sees (B, 1, T, P)."""
        x = to_float32(pool.at[layer * N + block_tables[:, i]].get(mode="promise_in_bounds"))
        return x, (i * P + jnp.arange(P) < length[:, :, None])[:, None]

    def scores(i, state):
        all_s, m = state  # (M, B, H, T, P), (B, H, T, 1)
        k, seen = page(k_pages, i)
        s = jnp.where(seen, jnp.einsum("bhtd,bhpd->bhtp", q, k, precision="highest"), -jnp.inf)
        return all_s.at[i].set(s), jnp.maximum(m, s.max(-1, keepdims=True))

    def values(i, state):
        l, y = state  # (B, H, T, P), (B, H, T, D)
        v, seen = page(v_pages, i)
        v = jnp.where(seen.any(2)[..., None], v, 0)  # 0 * NaN is NaN
        p = jnp.exp(all_s[i] - m)
        return l + p, y + jnp.einsum("bhtp,bhpd->bhtd", p, v, precision="highest")

    start = jnp.zeros((M, B, H, T, P)), jnp.full((B, H, T, 1), -1e30)
    all_s, m = jax.lax.fori_loop(0, pages, scores, start)
    l, y = jax.lax.fori_loop(0, pages, values, (jnp.zeros((B, H, T, P)), jnp.zeros((B, H, T, D))))
    l = sum(l[..., p] for p in range(P))  # in this order: XLA on CPU orders a reduction by the size of the batch
    return (y / jnp.where(l == 0, 1, l)[..., None]).swapaxes(1, 2)  # (B, T, H, D)


IMPLEMENTATIONS = {"reference": reference}


def default_implementation() -> str:
    """The implementation for this process's devices."""
    return "reference"
