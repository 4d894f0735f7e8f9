"""Attention over a paged KV cache: the cache, a jnp reference and Pallas kernels behind one signature.

Shapes: `B T C H D V L` as in model.py (C = H * D), and for pages `N` physical pages of `P` tokens each, `M` logical
pages per row of the block table. A pool is (L, N, P, C): one token is one contiguous row, so a write is one row and
no axis that hardware pads (8, 16 or 128 wide) is ever H or D. Page 0 is the null page: it takes the writes of padding
tokens, the unused tail of a block table points at it, and it is never read as data.

The same bits: what a row gets depends on its own query, its own tokens and nothing else: not on its neighbours,
on where its pages lie, on the width M of the table, or on what free pages hold, NaN included.
"""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

SPLIT = 32     # tokens per step of the reference: its sums break at these absolute positions


@partial(jax.tree_util.register_dataclass, meta_fields=["attention"],
         data_fields=["k_pages", "v_pages", "block_tables", "context_lens", "new_lens"])
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values in pages, with the dense KVCache's interface. The engine keeps one pool alive and, each step,
    `dataclasses.replace`s the three per-batch fields; donate it to the jitted step and the pool is updated in place."""
    k_pages: jax.Array       # (L, N, P, C) bfloat16 or float32
    v_pages: jax.Array       # (L, N, P, C)
    block_tables: jax.Array  # (B, M) int32, physical page of each logical page; unused entries are 0, the null page
    context_lens: jax.Array  # (B,) int32, tokens in the pages before this call
    new_lens: jax.Array      # (B,) int32, how many of this call's T tokens are real; 0 for a padding row
    attention: str           # implementation, a key of IMPLEMENTATIONS

    @classmethod
    def create(cls, config, num_pages: int, page_size: int, dtype="float32", attention: str | None = None):
        """An empty pool for a GPTConfig, with a batch of no rows. `attention=None` takes default_implementation()."""
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}: page 0 is the null page, so at least 2 are needed")
        shape = (config.n_layer, num_pages, page_size, config.n_embd)  # (L, N, P, C)
        none = jnp.zeros((0,), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((0, 0), jnp.int32), none, none,
                   attention or default_implementation())

    def positions(self, T: int) -> jax.Array:
        """(B, T) int32 absolute positions of the next T tokens; those of padding tokens run on and mean nothing."""
        return self.context_lens[:, None] + jnp.arange(T, dtype=jnp.int32)

    def attend(self, layer, q, k, v):
        """Writes k, v (B, T, H, D) of the new tokens into `layer`, then attends causally over each row's own pages.
        Returns y (B, T, H, D) float32, zero for padding tokens, and the cache."""
        B, T, H, D = q.shape
        P = self.k_pages.shape[2]
        pos = self.positions(T)  # (B, T)
        page = jnp.take_along_axis(self.block_tables, pos // P, axis=1, mode="clip")
        page = jnp.where(jnp.arange(T) < self.new_lens[:, None], page, 0)  # padding writes to the null page
        at = layer, page, pos % P
        k_pages = self.k_pages.at[at].set(k.reshape(B, T, H * D).astype(self.k_pages.dtype))
        v_pages = self.v_pages.at[at].set(v.reshape(B, T, H * D).astype(self.v_pages.dtype))
        y = paged_attention(q, k_pages, v_pages, self.block_tables, self.context_lens, self.new_lens,
                            layer=layer, scale=D**-0.5, implementation=self.attention)
        return y, dataclasses.replace(self, k_pages=k_pages, v_pages=v_pages)

    def advance(self, T: int):
        """After the last layer: each row holds its new_lens (at most T) tokens more."""
        return dataclasses.replace(self, context_lens=self.context_lens + jnp.minimum(self.new_lens, T))


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

    q (B, T, H, D), any T; k_pages, v_pages (L, N, P, C); block_tables (B, M), context_lens and new_lens (B,) int32;
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
    """Online softmax (Milakov & Gimelshein 2018) over SPLIT positions at a time, as many as the longest row needs.
    A split that lies beyond a row adds exact zeros to it, so a longer neighbour does not change its bits."""
    B, T, H, D = q.shape
    L, N, P, C = k_pages.shape
    M = block_tables.shape[1]
    G = max(1, SPLIT // P)  # pages per split
    S = G * P
    block_tables = jnp.pad(block_tables, ((0, 0), (0, -M % G)))
    pools = [pages.reshape(L * N, P, C) for pages in (k_pages, v_pages)]  # so that no layer is sliced out
    length = visible(T, context_lens, new_lens)  # (B, T)
    q = (q.astype(jnp.float32) * scale)

    def split(i, state):
        m, l, acc = state
        pages = layer * N + jax.lax.dynamic_slice(block_tables, (0, i * G), (B, G))
        k, v = [pool.at[pages].get(mode="promise_in_bounds").reshape(B, S, H, D).astype(jnp.float32) for pool in pools]
        seen = i * S + jnp.arange(S) < length[..., None]  # (B, T, S)
        v = jnp.where(seen.any(1)[..., None, None], v, 0)  # 0 * NaN is NaN
        if T == 1:  # a product and a sum: XLA's batched dot is slower here
            s = (q * k).sum(-1)[:, None]  # (B, 1, S, H)
        else:
            s = jnp.einsum("bthd,bshd->btsh", q, k, precision="highest")
        s = jnp.where(seen[..., None], s, -jnp.inf)
        m_new = jnp.maximum(m, s.max(2))  # (B, T, H)
        p, alpha = jnp.exp(s - m_new[:, :, None]), jnp.exp(m - m_new)
        if T == 1:
            pv = (p[:, 0, :, :, None] * v).sum(1)[:, None]
        else:
            pv = jnp.einsum("btsh,bshd->bthd", p, v, precision="highest")
        return m_new, l * alpha + p.sum(2), acc * alpha[..., None] + pv

    start = jnp.full((B, T, H), -1e30), jnp.zeros((B, T, H)), jnp.zeros((B, T, H, D))
    m, l, acc = jax.lax.fori_loop(0, (length.max() + S - 1) // S, split, start)
    return acc / jnp.where(l == 0, 1, l)[..., None]


IMPLEMENTATIONS = {"reference": reference}


def default_implementation() -> str:
    """The implementation for this process's devices."""
    return "reference"
