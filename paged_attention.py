"""Attention over a paged KV cache: the cache, a jnp reference and Pallas kernels behind one signature.

Shapes: `B T C H D V L` as in model.py, and for pages `N` physical pages of `P` tokens each, `M` logical pages
per row of the block table. A pool is (L, N, H, P, D): what one head needs of one page, a (P, D) matrix, is
contiguous, which is what every implementation multiplies by. Page 0 is the null page: it takes the writes of
padding tokens, the unused tail of a block table points at it, and nothing read there reaches a result.

The same bits: what a row gets depends on its own query and its own tokens: not on its neighbours, nor on where
its pages lie, on the width M of the table, or on what free pages hold, NaN included.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu


@partial(
    jax.tree_util.register_dataclass,
    meta_fields=["attention"],
    data_fields=["k_pages", "v_pages", "block_tables", "context_lens", "new_lens"],
)
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values in pages, with the dense KVCache's interface. The pool outlives the batch, which is the
    next three fields; donate the pool to the jitted step and it is updated in place."""

    k_pages: (
        jax.Array
    )  # (L, N, H, P, D) float32, bfloat16, or bfloat16's bits as uint16 (see create)
    v_pages: jax.Array  # (L, N, H, P, D)
    block_tables: (
        jax.Array
    )  # (B, M) int32, physical page of each logical page; 0, the null page, where unused
    context_lens: jax.Array  # (B,) int32, tokens in the pages before this call
    new_lens: (
        jax.Array
    )  # (B,) int32, how many of this call's T tokens are real; 0 for a padding row
    attention: str  # implementation, a key of IMPLEMENTATIONS

    @classmethod
    def create(
        cls, config, num_pages: int, page_size: int, dtype="float32", attention: str | None = None
    ):
        """An empty pool for a GPTConfig, with a batch of no rows. attention=None: default_implementation().

        On CPU a bfloat16 pool is kept as uint16: XLA there (jax 0.10) converts the whole array to float32 and
        back to gather from it or scatter into it."""
        attention = attention or default_implementation()
        if attention not in IMPLEMENTATIONS:
            raise ValueError(f"attention={attention}: there are {', '.join(IMPLEMENTATIONS)}")
        if num_pages < 2:
            raise ValueError(
                f"num_pages={num_pages}: page 0 is the null page, so at least 2 are needed"
            )
        if jnp.dtype(dtype) == jnp.bfloat16 and jax.default_backend() == "cpu":
            dtype = jnp.uint16
        none = jnp.zeros(0, jnp.int32)
        shape = pool_shape(config, num_pages, page_size, attention)
        return cls(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), none[None], none, none, attention
        )

    def positions(self, T: int) -> jax.Array:
        """(B, T) int32 absolute positions of the next T tokens; those of padding tokens mean nothing."""
        return self.context_lens[:, None] + jnp.arange(T, dtype=jnp.int32)

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[3]

    def attend(self, layer, q, k, v):
        """Writes k, v (B, T, H, D) of the new tokens into `layer`, then attends causally over each row's pages.
        Returns y (B, T, H, D) float32, zero for padding tokens, and the cache."""
        B, T, H, D = q.shape
        L, N, pool_H, P, pool_D = self.k_pages.shape
        pos = self.positions(T)  # (B, T)
        page = jnp.take_along_axis(self.block_tables, pos // P, axis=1, mode="clip")
        page = jnp.where(
            jnp.arange(T) < self.new_lens[:, None], page, 0
        )  # padding writes to the null page
        # One flat row per head: indices into some of the five axes make XLA copy the pool, on TPU to lay it out for
        # them, on CPU when there is one token.
        at = ((layer * N + page[..., None]) * pool_H + jnp.arange(pool_H)) * P + (pos % P)[
            ..., None
        ]  # (B, T, H)
        k_pages, v_pages = [
            pages.reshape(-1, pool_D).at[at].set(pack(x, pages)).reshape(pages.shape)
            for pages, x in ((self.k_pages, k), (self.v_pages, v))
        ]
        y = paged_attention(
            q,
            k_pages,
            v_pages,
            self.block_tables,
            self.context_lens,
            self.new_lens,
            layer=layer,
            scale=D**-0.5,
            implementation=self.attention,
        )
        return y, dataclasses.replace(self, k_pages=k_pages, v_pages=v_pages)

    def advance(self, T: int):
        """After the last layer: each row holds its new_lens (at most T) tokens more."""
        return dataclasses.replace(
            self, context_lens=self.context_lens + jnp.minimum(self.new_lens, T)
        )


def pool_shape(config, num_pages: int, page_size: int, attention: str) -> tuple[int, ...]:
    """(L, N, H, P, D). A TPU lays the last axis out in lanes of 128, so there `128 // D` heads lie side by side
    in one: narrower rows would be stored padded, or the whole pool be copied at each call of the kernel."""
    H, D = config.n_head, config.n_embd // config.n_head
    if attention == "mosaic_tpu":
        side_by_side = max(1, 128 // D)
        H, D = pl.cdiv(H, side_by_side), pl.cdiv(side_by_side * D, 128) * 128
    return config.n_layer, num_pages, H, page_size, D


def pack(x, pages):
    """x (..., H, D) as tokens of the pool `pages`: (..., H, D) of its shape and dtype."""
    *lead, H, D = x.shape
    _, _, pool_H, _, pool_D = pages.shape
    g = pl.cdiv(H, pool_H)  # heads side by side
    whole = [(0, 0)] * len(lead)
    x = jnp.pad(x, [*whole, (0, pool_H * g - H), (0, 0)]).reshape(*lead, pool_H, g * D)
    return to_dtype(jnp.pad(x, [*whole, (0, 0), (0, pool_D - g * D)]), pages.dtype)


def to_dtype(x, dtype):
    """x in a pool's dtype; uint16 holds the bits of a bfloat16."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(dtype)


def to_float32(x):
    """The numbers in a part of a pool."""
    return (jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x).astype(
        jnp.float32
    )


def num_pages_for(config, page_size: int, dtype, budget: int, attention: str | None = None) -> int:
    """How many pages (the null page counted) of keys and values in every layer fit into `budget` bytes."""
    shape = pool_shape(config, 1, page_size, attention or default_implementation())
    page = 2 * math.prod(shape) * jnp.dtype(dtype).itemsize
    if budget < 2 * page:
        raise ValueError(
            f"a KV cache of {budget} bytes holds {budget // page} pages of {page} bytes, and at least "
            "2 are needed (one is the null page): give it more memory or a smaller page"
        )
    return budget // page


def paged_attention(
    q,
    k_pages,
    v_pages,
    block_tables,
    context_lens,
    new_lens,
    *,
    layer,
    scale: float,
    implementation: str,
) -> jax.Array:
    """Causal attention of each row's new tokens over its own pages, which hold them already.

    q (B, T, H, D), any T; k_pages, v_pages (L, N, H, P, D), the heads arranged as pool_shape says; block_tables
    (B, M), context_lens and new_lens (B,) int32; layer an int or an int32 scalar. Token t < new_lens[b] sits at
    position context_lens[b] + t and sees every position up to its own. Returns (B, T, H, D) float32, zero where
    t >= new_lens[b].
    """
    return IMPLEMENTATIONS[implementation](
        q,
        k_pages,
        v_pages,
        block_tables,
        context_lens,
        new_lens,
        jnp.asarray(layer, jnp.int32),
        scale,
    )


def dot(subscripts, a, b):
    """einsum with float32 sums, of float32 inputs that no tensor core or MXU rounds."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def visible(T, context_lens, new_lens):
    """(B, T) int32: how many positions, from 0 on, each new token sees; 0 for padding tokens."""
    t = jnp.arange(T, dtype=jnp.int32)
    return jnp.where(t < new_lens[:, None], context_lens[:, None] + t + 1, 0)


def reference(q, k_pages, v_pages, block_tables, context_lens, new_lens, layer, scale):
    """FlashAttention's sum (Dao et al. 2022) over 32 positions of two rows at a time, longest rows first: each 32 positions
    are a loop over those rows that reach them. XLA on CPU orders the sum of a reduction by the size of the batch: the only
    ones here, within a dot, are over D or over these positions; weights are added one by one, last."""
    B, T, H, D = q.shape
    L, N, H, P, D = k_pages.shape
    G = max(1, 32 // P)  # pages at a time; 48 positions and 16 took longer on a CPU
    R = 2 - B % 2  # rows at a time; 1 took longer for rows of equal length, more for others
    k_pages, v_pages = [
        pages.reshape(L * N * H, P * D) for pages in (k_pages, v_pages)
    ]  # not a slice of a layer
    length = visible(T, context_lens, new_lens)  # (B, T)
    order = jnp.argsort(length.max(1), descending=True)
    tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % G)))[order] + layer * N
    q = q[order].astype(jnp.float32).swapaxes(1, 2) * scale  # (B, H, T, D)
    length = length[order, None, :, None]  # (B, 1, T, 1)
    longest = length.max((1, 2, 3))  # (B,) descending
    position = jnp.arange(G * P)

    def step(i, j, state):
        rows = partial(jax.lax.dynamic_slice_in_dim, start_index=j * R, slice_size=R)
        pages = jax.lax.dynamic_slice_in_dim(rows(tables), i * G, G, axis=1)
        at = pages[:, None] * H + jnp.arange(H)[:, None]  # (R, H, G)
        k, v = [
            to_float32(pool.at[at].get(mode="promise_in_bounds")).reshape(R, H, G * P, D)
            for pool in (k_pages, v_pages)
        ]
        seen = i * G * P + position < rows(length)  # (R, 1, T, G P)
        v = jnp.where(seen.any(2)[..., None], v, 0)  # 0 * NaN is NaN
        s = jnp.where(seen, dot("bhtd,bhpd->bhtp", rows(q), k), -jnp.inf)
        m, l, y = map(rows, state)
        m_new = jnp.maximum(m, s.max(-1, keepdims=True))
        a, p = jnp.exp(m - m_new), jnp.exp(s - m_new)
        new = m_new, l * a + p, y * a + dot("bhtp,bhpd->bhtd", p, v)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, part, j * R, axis=0)
            for old, part in zip(state, new)
        )

    def reach(i, state):
        return jax.lax.fori_loop(
            0, pl.cdiv((longest > i * G * P).sum(), R), partial(step, i), state
        )

    start = (
        jnp.full((B, H, T, 1), -1e30),
        jnp.zeros((B, H, T, G * P)),
        jnp.zeros((B, H, T, D)),
    )  # m, l, y
    _, l, y = jax.lax.fori_loop(0, pl.cdiv(longest[0], G * P), reach, start)
    l = sum(l[..., p] for p in range(G * P))
    y = y / jnp.where(l == 0, 1, l)[..., None]
    return y[jnp.argsort(order)].swapaxes(1, 2)  # (B, T, H, D)


# --- GPU: Pallas, Triton style ---------------------------------------------------------------------------------
# Triton style rather than Mosaic GPU: JAX 0.11 deprecates it, but one source lowers on 0.10 and 0.11 and for every
# generation of GPU, ROCm too, where Mosaic GPU wants Hopper (Ampere since 0.11) and changed its call in between. A
# decode step is bound by reading pages, which needs nothing of what Mosaic GPU adds (pipelines of TMA and wgmma
# written by hand). A Mosaic GPU kernel, when it pays for its lines, is one more entry of IMPLEMENTATIONS.
SPLIT = 256  # positions per program of the decode kernel
TILE = 64  # positions per step of a program
WARPS = 4  # per program


def load_head(pages_ref, tables_ref, layer, b, h, pos, keep, d):
    """One head of the positions `pos` of row b, (positions, d); zero, and no memory touched, unless `keep`."""
    P, D = pages_ref.shape[3:]
    page = plgpu.load(tables_ref.at[b, pos // P], mask=keep, other=0)
    at = layer, page[:, None], h, (pos % P)[:, None], d[None]
    return plgpu.load(pages_ref.at[at], mask=keep[:, None] & (d < D)[None], other=0)


def merge(state, m, l, acc):
    """Two softmax sums (maximum, sum of weights, sum of weighted values) of disjoint positions as one."""
    m_new = jnp.maximum(state[0], m)
    a, b = jnp.exp(state[0] - m_new), jnp.exp(m - m_new)
    return m_new, state[1] * a + l * b, state[2] * a[..., None] + acc * b[..., None]


def decode_kernel(
    layer_ref,  # (1,) int32
    tables_ref,  # (B, M) int32
    lengths_ref,  # (B,) int32, positions to attend to
    q_ref,  # (B, H, D)
    k_ref,  # (L, N, H, P, D) this and all others stay in global memory
    v_ref,  # (L, N, H, P, D)
    m_ref,  # (B, H, splits) float32 out: maximum score of the split
    l_ref,  # (B, H, splits) float32 out: sum of weights
    acc_ref,  # (B, H, splits, D) float32 out: sum of weighted values
    *,
    scale: float,
):
    """Flash-decoding (Dao et al. 2023): one program for one row, head and split of SPLIT positions. There is one
    query per head, so the products are sums over a tile: a tensor-core dot would pad the query to 16 rows."""
    b, h, split = [pl.program_id(i) for i in range(3)]
    start, length, D = split * SPLIT, lengths_ref[b], q_ref.shape[2]
    d = jnp.arange(pl.next_power_of_2(D))
    q = plgpu.load(q_ref.at[b, h, d], mask=d < D, other=0).astype(jnp.float32) * scale

    def tile(i, state):
        pos = start + i * TILE + jnp.arange(TILE)
        seen = pos < length
        k, v = [
            load_head(ref, tables_ref, layer_ref[0], b, h, pos, seen, d).astype(jnp.float32)
            for ref in (k_ref, v_ref)
        ]  # (TILE, d)
        s = jnp.where(seen, jnp.sum(q[None] * k, axis=1), -jnp.inf)
        p = jnp.exp(s - jnp.max(s))
        return merge(state, jnp.max(s), jnp.sum(p), jnp.sum(p[:, None] * v, axis=0))

    @pl.when(start < length)  # what other splits leave unwritten, merge_kernel does not read
    def _():
        tiles = pl.cdiv(jnp.minimum(length - start, SPLIT), TILE)
        empty = jnp.float32(-1e30), jnp.float32(0), jnp.zeros(d.shape)
        m, l, acc = jax.lax.fori_loop(0, tiles, tile, empty)
        m_ref[b, h, split], l_ref[b, h, split] = m, l
        plgpu.store(acc_ref.at[b, h, split, d], acc, mask=d < D)


def merge_kernel(lengths_ref, m_ref, l_ref, acc_ref, y_ref):
    """Merges a row's splits in order, as many as it has. y_ref (B, H, D) float32; the others: decode_kernel."""
    b, h = pl.program_id(0), pl.program_id(1)
    D = y_ref.shape[2]
    d = jnp.arange(pl.next_power_of_2(D))

    def split(i, state):
        acc = plgpu.load(acc_ref.at[b, h, i, d], mask=d < D, other=0)
        return merge(state, m_ref[b, h, i], l_ref[b, h, i], acc)

    empty = jnp.float32(-1e30), jnp.float32(0), jnp.zeros(d.shape)
    _, l, acc = jax.lax.fori_loop(0, pl.cdiv(lengths_ref[b], SPLIT), split, empty)
    plgpu.store(y_ref.at[b, h, d], acc / jnp.where(l == 0, 1, l), mask=d < D)


def prefill_kernel(
    layer_ref, tables_ref, lengths_ref, q_ref, k_ref, v_ref, y_ref, *, tile_size, scale
):
    """FlashAttention-2 (Dao 2023): one program for one row, head and `tile_size` query tokens, over all their
    positions. Products are of the pool's dtype. lengths_ref (B, T) int32: positions each token attends to; q_ref,
    y_ref (B, T, H, D); the others: decode_kernel."""
    b, h = pl.program_id(0), pl.program_id(1)
    T, D = q_ref.shape[1], q_ref.shape[3]
    t, d = pl.program_id(2) * tile_size + jnp.arange(tile_size), jnp.arange(pl.next_power_of_2(D))
    inside = (t < T)[:, None] & (d < D)[None]
    length = plgpu.load(lengths_ref.at[b, t], mask=t < T, other=0)  # (tokens,)
    stop = jnp.max(length)
    q = plgpu.load(q_ref.at[b, t[:, None], h, d[None]], mask=inside, other=0).astype(k_ref.dtype)

    def tile(i, state):
        pos = i * tile_size + jnp.arange(tile_size)
        k, v = [
            load_head(ref, tables_ref, layer_ref[0], b, h, pos, pos < stop, d)
            for ref in (k_ref, v_ref)
        ]
        s = dot("td,pd->tp", q, k) * scale
        s = jnp.where(pos[None] < length[:, None], s, -jnp.inf)  # (tokens, positions)
        m = jnp.maximum(jnp.max(s, axis=1), -1e30)
        p = jnp.exp(s - m[:, None])
        return merge(state, m, jnp.sum(p, axis=1), dot("tp,pd->td", p.astype(v.dtype), v))

    empty = jnp.full(t.shape, -1e30), jnp.zeros(t.shape), jnp.zeros(inside.shape)
    _, l, acc = jax.lax.fori_loop(0, pl.cdiv(stop, tile_size), tile, empty)
    plgpu.store(
        y_ref.at[b, t[:, None], h, d[None]], acc / jnp.where(l == 0, 1, l)[:, None], mask=inside
    )


def triton(
    q, k_pages, v_pages, block_tables, context_lens, new_lens, layer, scale, interpret=False
):
    """The sums of a decode step break at multiples of SPLIT and TILE and merge in order."""
    B, T, H, D = q.shape
    layer, lengths = layer.reshape(1), visible(T, context_lens, new_lens)
    params = plgpu.CompilerParams(num_warps=WARPS, num_stages=2)
    call = partial(pl.pallas_call, compiler_params=params, interpret=interpret)
    f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if T > 1:
        # Tensor cores multiply bfloat16. Float32 products are unrolled: ptxas takes 20 s over tiles of 64.
        size = 64 if k_pages.dtype == jnp.bfloat16 else 16
        return call(
            partial(prefill_kernel, tile_size=size, scale=scale),
            grid=(B, H, pl.cdiv(T, size)),
            out_shape=f32(q.shape),
        )(layer, block_tables, lengths, q, k_pages, v_pages)
    splits = pl.cdiv(block_tables.shape[1] * k_pages.shape[3], SPLIT)
    partials = call(
        partial(decode_kernel, scale=scale),
        grid=(B, H, splits),
        out_shape=[f32((B, H, splits)), f32((B, H, splits)), f32((B, H, splits, D))],
    )(layer, block_tables, lengths[:, 0], q[:, 0], k_pages, v_pages)
    return call(merge_kernel, grid=(B, H), out_shape=f32((B, H, D)))(lengths[:, 0], *partials)[
        :, None
    ]


# --- TPU: Pallas, Mosaic ---------------------------------------------------------------------------------------
def tpu_kernel(
    layer_ref,  # (1,) int32; this and the next three are prefetched into SMEM
    tables_ref,  # (B, M) int32
    context_ref,  # (B,) int32
    new_ref,  # (B,) int32
    q_ref,  # (1, H, R, D) R queries of one row of the batch, in VMEM; query r is token r // g
    k_hbm,  # (L, N, H, P, D) left in HBM
    v_hbm,  # (L, N, H, P, D) left in HBM
    y_ref,  # (1, H, R, D) float32 out
    k_buf,  # (2, H, S, D) VMEM: one half is filled while the other is read
    v_buf,  # (2, H, S, D) VMEM
    sems,  # (2, 2) DMA semaphores: keys or values, half
    *,
    g: int,
    scale: float,
):
    """One program for one row and R queries, all heads. Pages are copied S positions ahead of their use."""
    b = pl.program_id(0)
    _, H, R, D = q_ref.shape
    S, P = k_buf.shape[2], k_hbm.shape[3]
    first, context, new = pl.program_id(1) * R, context_ref[b], new_ref[b]
    token = partial(
        jax.lax.div, y=jnp.int32(g)
    )  # of a query; `//` would not lower without the device
    stop = jnp.where(token(first) < new, context + jnp.minimum(token(first + R - 1) + 1, new), 0)
    steps = pl.cdiv(stop, S)

    def copies(step, do):
        """Applies `do` to the copy of each page of this step that holds a position to attend to."""
        half = step % 2
        for j in range(S // P):
            page = step * (S // P) + j

            @pl.when(page * P < stop)
            def _():
                at = layer_ref[0], tables_ref[b, page]
                for i, (hbm, buf) in enumerate([(k_hbm, k_buf), (v_hbm, v_buf)]):
                    do(
                        pltpu.make_async_copy(
                            hbm.at[at], buf.at[half, :, pl.ds(j * P, P)], sems.at[i, half]
                        )
                    )

    def step(i, state):
        pl.when(i + 1 < steps)(lambda: copies(i + 1, lambda copy: copy.start()))
        copies(i, lambda copy: copy.wait())
        t = token(first + jax.lax.broadcasted_iota(jnp.int32, (1, R, 1), 1))
        pos = i * S + jax.lax.broadcasted_iota(jnp.int32, (1, 1, S), 2)
        seen = (pos <= context + t) & (t < new)  # (1, R, S)
        written = i * S + jax.lax.broadcasted_iota(jnp.int32, (1, S, 1), 1) < stop
        v = jnp.where(written, v_buf[i % 2], 0)  # 0 * NaN is NaN
        s = dot("hrd,hsd->hrs", q_ref[0].astype(k_buf.dtype), k_buf[i % 2]) * scale
        s = jnp.where(seen, s, -jnp.inf)
        m = jnp.maximum(jnp.max(s, axis=2), -1e30)
        p = jnp.exp(s - m[..., None])
        return merge(state, m, jnp.sum(p, axis=2), dot("hrs,hsd->hrd", p.astype(v.dtype), v))

    pl.when(steps > 0)(lambda: copies(0, lambda copy: copy.start()))
    empty = jnp.full((H, R), -1e30), jnp.zeros((H, R)), jnp.zeros((H, R, D))
    _, l, acc = jax.lax.fori_loop(0, steps, step, empty)
    y_ref[0] = acc / jnp.where(l == 0, 1, l)[..., None]


def mosaic_tpu(
    q, k_pages, v_pages, block_tables, context_lens, new_lens, layer, scale, interpret=False
):
    """One kernel for any T. Where g heads lie side by side in the pool, each has its own query with zeros beside
    it: the MXU, 128 deep, multiplies by the zeros in the time it would have idled."""
    B, T, H, D = q.shape
    _, _, pool_H, P, pool_D = k_pages.shape
    g = pl.cdiv(H, pool_H)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pool_H * g - H), (0, 0))).reshape(B, T, pool_H, g, 1, D)
    q = q * jnp.eye(g, dtype=q.dtype)[..., None]  # (B, T, H / g, g, g, D)
    q = q.reshape(B, T, pool_H, g, g * D).swapaxes(1, 2).reshape(B, pool_H, T * g, g * D)
    R = min(128, pl.cdiv(T * g, 16) * 16)  # queries per program; a bfloat16 register has 16 rows
    S = max(1, 128 // P) * P  # positions per step
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -T * g % R), (0, pool_D - g * D)))
    queries = pl.BlockSpec((1, pool_H, R, pool_D), lambda b, i, *_: (b, 0, i, 0))
    pool = pl.BlockSpec(memory_space=pl.ANY)
    buffer = pltpu.VMEM((2, pool_H, S, pool_D), k_pages.dtype)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(B, q.shape[2] // R),
        in_specs=[queries, pool, pool],
        out_specs=queries,
        scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2, 2))],
    )
    y = pl.pallas_call(
        partial(tpu_kernel, g=g, scale=scale),
        grid_spec=grid,
        interpret=interpret,
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
    )(layer.reshape(1), block_tables, context_lens, new_lens, q, k_pages, v_pages)
    y = y[:, :, : T * g, : g * D].reshape(B, pool_H, T, g, g, D)
    return jnp.einsum("bhtggd->bthgd", y).reshape(B, T, pool_H * g, D)[:, :, :H]


IMPLEMENTATIONS = {"reference": reference, "triton": triton, "mosaic_tpu": mosaic_tpu}


def default_implementation() -> str:
    """The implementation for this process's devices."""
    return {"gpu": "triton", "tpu": "mosaic_tpu"}.get(jax.default_backend(), "reference")
