"""Attention over pages as Pallas kernels: `triton` for GPUs, `mosaic_tpu` for TPUs.

Both have the signature of paged_attention.reference and compute what it defines. Start reading at
`triton`, which runs decode_kernel and merge_kernel for one new token per row and prefill_kernel
for more; then `mosaic_tpu`, which runs tpu_kernel for any number.

Shapes: B rows of T new tokens, KV heads of size D with G heads of queries each, L layers, N pages
of P tokens, M logical pages in each row of the block table. A program attends for the whole group
of a head, so that each page is read once for all of it. On TPU KV and D are the pool's: see
paged_attention.pool_shape.

The order of sums: a sum of floats depends on its order, and a row must get the same bits whatever
its neighbours are. So a sum over positions is cut at multiples of a fixed size, counted from
position 0, and its parts are merged from the first to the last. Neither the number of rows, nor
their lengths, nor the width of the block table moves a cut.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from kernels.softmax_sums import NO_SCORE, SoftmaxSums, dot, visible_positions

Ref = Any  # an array in the device's memory, as Pallas hands it to a kernel
Index = jax.Array | int  # a scalar, in Python where it is known


@dataclasses.dataclass(frozen=True)
class TritonSizes:
    """How the decode kernel cuts its work. A row's bits depend on split and tile."""

    split: int = 256
    """positions per program"""
    tile: int = 64
    """positions per step of a program"""
    warps: int = 4
    """per program, of the other two kernels too"""


DEFAULT_SIZES = TritonSizes()
DOT_QUERIES = 16  # fewest rows of a tensor core's product


# --- GPU: Pallas, Triton style -------------------------------------------------------------------
# Triton style rather than Mosaic GPU: JAX 0.11 deprecates it, but one source lowers on 0.10 and
# 0.11 and for every generation of GPU, ROCm too, where Mosaic GPU wants Hopper (Ampere since 0.11)
# and changed its call in between. A decode step is bound by reading pages, which needs nothing of
# what Mosaic GPU adds (pipelines of TMA and wgmma written by hand). A Mosaic GPU kernel, when it
# pays for its lines, is one more entry of IMPLEMENTATIONS.


def triton(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    new_lens: jax.Array,
    layer: jax.Array,
    scale: float,
    *,
    sizes: TritonSizes = DEFAULT_SIZES,
    interpret: bool = False,
) -> jax.Array:
    """Attention on a GPU: see paged_attention. interpret=True runs the kernels without one."""
    T = q.shape[1]
    layer = layer.reshape(1)
    lengths = visible_positions(T, context_lens, new_lens)  # (B, T)
    call = partial(
        pl.pallas_call,
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=2),
        interpret=interpret,
    )
    if T > 1:
        return _triton_prefill(call, layer, block_tables, lengths, q, k_pages, v_pages, scale)
    y = _triton_decode(
        call, layer, block_tables, lengths[:, 0], q[:, 0], k_pages, v_pages, scale, sizes
    )
    return y[:, None]  # (B, 1, KV, G, D)


def _triton_prefill(
    call: Callable,
    layer: jax.Array,
    block_tables: jax.Array,
    lengths: jax.Array,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    scale: float,
) -> jax.Array:
    """Return y (B, T, KV, G, D) of q, whose tokens see `lengths` (B, T) positions."""
    B, T, KV, G, _ = q.shape
    # Tensor cores multiply bfloat16. Float32 products are unrolled: ptxas takes 20 s over tiles
    # of 64.
    tile_size = 64 if k_pages.dtype == jnp.bfloat16 else 16
    prefill = call(
        partial(prefill_kernel, tile_size=tile_size, scale=scale),
        grid=(B, KV, pl.cdiv(T * G, tile_size)),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
    )
    return prefill(layer, block_tables, lengths, q, k_pages, v_pages)


def _triton_decode(
    call: Callable,
    layer: jax.Array,
    block_tables: jax.Array,
    lengths: jax.Array,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    scale: float,
    sizes: TritonSizes,
) -> jax.Array:
    """Return y (B, KV, G, D) of q, one token per row, which sees `lengths` (B,) positions."""
    B, KV, G, D = q.shape
    P = k_pages.shape[3]
    splits = pl.cdiv(block_tables.shape[1] * P, sizes.split)
    sums_of_splits = call(
        partial(decode_kernel, scale=scale, sizes=sizes),
        grid=(B, KV, splits),
        out_shape=[
            jax.ShapeDtypeStruct((B, KV, G, splits), jnp.float32),
            jax.ShapeDtypeStruct((B, KV, G, splits), jnp.float32),
            jax.ShapeDtypeStruct((B, KV, G, splits, D), jnp.float32),
        ],
    )(layer, block_tables, lengths, q, k_pages, v_pages)
    merge = call(
        partial(merge_kernel, sizes=sizes),
        grid=(B, KV, G),
        out_shape=jax.ShapeDtypeStruct((B, KV, G, D), jnp.float32),
    )
    return merge(lengths, *sums_of_splits)


def decode_kernel(
    layer_ref: Ref,  # (1,) int32, the layer to read; like all others it stays in global memory
    tables_ref: Ref,  # (B, M) int32, physical page of each logical page
    lengths_ref: Ref,  # (B,) int32, positions that the row's token sees; 0 for padding
    q_ref: Ref,  # (B, KV, G, D)
    k_ref: Ref,  # (L, N, KV, P, D)
    v_ref: Ref,  # (L, N, KV, P, D)
    maximum_ref: Ref,  # (B, KV, G, splits) float32 out, largest score of the split
    denominator_ref: Ref,  # (B, KV, G, splits) float32 out, sum of its weights
    values_ref: Ref,  # (B, KV, G, splits, D) float32 out, weighted sum of its values
    *,
    scale: float,
    sizes: TritonSizes,
) -> None:
    """Flash-decoding (Dao et al. 2023): one program sums one row, head and split of positions.

    A head with one query is a case of its own, without an axis of queries: its products are sums
    over a tile, because a tensor-core dot would pad the query to DOT_QUERIES rows. A group of
    queries is such a dot. The order of sums is fixed: split i covers the positions from
    i * sizes.split on, and its tiles are merged in order."""
    row = pl.program_id(0)
    head = pl.program_id(1)
    split = pl.program_id(2)
    start = split * sizes.split
    length = lengths_ref[row]
    G, D = q_ref.shape[2:]
    d = jnp.arange(pl.next_power_of_2(D))  # Triton knows no other size
    g = jnp.arange(max(DOT_QUERIES, pl.next_power_of_2(G))) if G > 1 else jnp.int32(0)
    attend = attend_to_tile if G > 1 else attend_to_tile_with_one_query
    inside = (g < G)[..., None] & (d < D)  # (g, d), or (d,) for one query
    at_g, at_d = g[..., None], d.reshape(*[1] * g.ndim, -1)  # indices in the shape of `inside`
    q = plgpu.load(q_ref.at[row, head, at_g, at_d], mask=inside, other=0)

    def add_tile(i: jax.Array, sums: SoftmaxSums) -> SoftmaxSums:
        position = start + i * sizes.tile + jnp.arange(sizes.tile)
        seen = position < length
        layer = layer_ref[0]
        k = load_head(k_ref, tables_ref, layer, row, head, position, seen, d)  # (tile, d)
        v = load_head(v_ref, tables_ref, layer, row, head, position, seen, d)  # (tile, d)
        return sums.merge(attend(q, k, v, seen if G == 1 else seen[None], scale))

    @pl.when(start < length)  # what other splits leave unwritten, merge_kernel does not read
    def _() -> None:
        tiles = pl.cdiv(jnp.minimum(length - start, sizes.split), sizes.tile)
        sums = jax.lax.fori_loop(0, tiles, add_tile, SoftmaxSums.empty(g.shape, len(d)))
        plgpu.store(maximum_ref.at[row, head, g, split], sums.maximum, mask=g < G)
        plgpu.store(denominator_ref.at[row, head, g, split], sums.denominator, mask=g < G)
        plgpu.store(values_ref.at[row, head, at_g, split, at_d], sums.values, mask=inside)


def attend_to_tile_with_one_query(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float
) -> SoftmaxSums:
    """Return the sums of q (d,) over a tile of k and v (tile, d), some of it `seen` (tile,)."""
    q = q.astype(jnp.float32) * scale
    scores = jnp.sum(q[None] * k.astype(jnp.float32), axis=1)
    scores = jnp.where(seen, scores, -jnp.inf)
    maximum = jnp.max(scores)  # finite: a tile that is read has a position that is seen
    weights = jnp.exp(scores - maximum)
    values = jnp.sum(weights[:, None] * v.astype(jnp.float32), axis=0)
    return SoftmaxSums(maximum, jnp.sum(weights), values)


def attend_to_tile(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float
) -> SoftmaxSums:
    """Return the sums of q (queries, d) over a tile of k and v (tile, d).

    seen (queries, tile), or (1, tile) if all see the same. Products are of the pool's dtype."""
    scores = dot("qd,pd->qp", q.astype(k.dtype), k) * scale
    scores = jnp.where(seen, scores, -jnp.inf)
    maximum = jnp.maximum(jnp.max(scores, axis=1), NO_SCORE)  # a query may see none of these
    weights = jnp.exp(scores - maximum[:, None])
    values = dot("qp,pd->qd", weights.astype(v.dtype), v)
    return SoftmaxSums(maximum, jnp.sum(weights, axis=1), values)


def merge_kernel(
    lengths_ref: Ref,  # (B,) int32, positions that the row's token sees
    maximum_ref: Ref,  # (B, KV, G, splits) float32, what decode_kernel wrote, as are the next two
    denominator_ref: Ref,  # (B, KV, G, splits) float32
    values_ref: Ref,  # (B, KV, G, splits, D) float32
    y_ref: Ref,  # (B, KV, G, D) float32 out
    *,
    sizes: TritonSizes,
) -> None:
    """Merge the splits of one row and head of queries: those that it has, first to last.

    The table's width, which decides how many splits there is room for, has no part in it."""
    row = pl.program_id(0)
    head = pl.program_id(1), pl.program_id(2)
    D = y_ref.shape[3]
    d = jnp.arange(pl.next_power_of_2(D))

    def add_split(i: jax.Array, sums: SoftmaxSums) -> SoftmaxSums:
        values = plgpu.load(values_ref.at[row, *head, i, d], mask=d < D, other=0)
        split = SoftmaxSums(maximum_ref[row, *head, i], denominator_ref[row, *head, i], values)
        return sums.merge(split)

    splits = pl.cdiv(lengths_ref[row], sizes.split)
    sums = jax.lax.fori_loop(0, splits, add_split, SoftmaxSums.empty((), len(d)))
    plgpu.store(y_ref.at[row, *head, d], sums.mean(), mask=d < D)


def prefill_kernel(
    layer_ref: Ref,  # (1,) int32, the layer to read; like all others it stays in global memory
    tables_ref: Ref,  # (B, M) int32, physical page of each logical page
    lengths_ref: Ref,  # (B, T) int32, positions that each token sees; 0 for padding
    q_ref: Ref,  # (B, T, KV, G, D)
    k_ref: Ref,  # (L, N, KV, P, D)
    v_ref: Ref,  # (L, N, KV, P, D)
    y_ref: Ref,  # (B, T, KV, G, D) float32 out
    *,
    tile_size: int,
    scale: float,
) -> None:
    """FlashAttention-2 (Dao 2023): one program attends for `tile_size` queries of one row and head.

    Query i is of token i // G. The program walks over all positions that any of its tokens sees,
    `tile_size` at a time and in order. Positions that a token does not see add exact zeros, so its
    bits do not depend on the others."""
    row = pl.program_id(0)
    head = pl.program_id(1)
    _, T, _, G, D = q_ref.shape
    query = pl.program_id(2) * tile_size + jnp.arange(tile_size)
    token = query // G
    d = jnp.arange(pl.next_power_of_2(D))
    inside = (token < T)[:, None] & (d < D)[None]
    length = plgpu.load(lengths_ref.at[row, token], mask=token < T, other=0)  # (queries,)
    stop = jnp.max(length)
    query_at = row, token[:, None], head, (query % G)[:, None], d[None]
    q = plgpu.load(q_ref.at[query_at], mask=inside, other=0)

    def add_tile(i: jax.Array, sums: SoftmaxSums) -> SoftmaxSums:
        position = i * tile_size + jnp.arange(tile_size)
        layer = layer_ref[0]
        needed = position < stop
        k = load_head(k_ref, tables_ref, layer, row, head, position, needed, d)  # (positions, d)
        v = load_head(v_ref, tables_ref, layer, row, head, position, needed, d)  # (positions, d)
        seen = position[None] < length[:, None]  # (queries, positions)
        return sums.merge(attend_to_tile(q, k, v, seen, scale))

    empty = SoftmaxSums.empty(query.shape, len(d))
    sums = jax.lax.fori_loop(0, pl.cdiv(stop, tile_size), add_tile, empty)
    plgpu.store(y_ref.at[query_at], sums.mean(), mask=inside)


def load_head(
    pages_ref: Ref,  # (L, N, KV, P, D)
    tables_ref: Ref,  # (B, M) int32
    layer: jax.Array,
    row: jax.Array,
    head: jax.Array,
    position: jax.Array,
    mask: jax.Array,
    d: jax.Array,
) -> jax.Array:
    """Return one head's keys or values at `position` (n,) of a row, as (n, d).

    Where mask (n,) is False they are zero, and no memory is touched."""
    P, D = pages_ref.shape[3:]
    page = plgpu.load(tables_ref.at[row, position // P], mask=mask, other=0)
    at = layer, page[:, None], head, (position % P)[:, None], d[None]
    return plgpu.load(pages_ref.at[at], mask=mask[:, None] & (d < D)[None], other=0)


# --- TPU: Pallas, Mosaic -------------------------------------------------------------------------
TPU_LANES = 128  # width of a register, and of the last axis of whatever lies in memory
TPU_QUERIES = 128  # most queries per program
TPU_POSITIONS = 128  # positions per step of a program, where a page is not longer
TPU_SUBLANES = 16  # rows of a bfloat16 register


def mosaic_tpu(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    new_lens: jax.Array,
    layer: jax.Array,
    scale: float,
    *,
    interpret: Any = False,
) -> jax.Array:
    """Attention on a TPU: see paged_attention. One kernel for any T.

    interpret: False, or pltpu.InterpretParams, with which the kernel runs without a TPU."""
    pool_heads, _, pool_D = k_pages.shape[2:]
    side_by_side = pl.cdiv(q.shape[2], pool_heads)
    queries = spread_over_lanes(q, pool_heads)  # (B, pool_heads, T * n * G, n * D)
    _, _, count, width = queries.shape
    per_program = min(TPU_QUERIES, pl.cdiv(count, TPU_SUBLANES) * TPU_SUBLANES)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, -count % per_program), (0, pool_D - width)))
    y = pl.pallas_call(
        partial(tpu_kernel, queries_per_token=side_by_side * q.shape[3], scale=scale),
        grid_spec=_tpu_grid(queries, k_pages, per_program),
        interpret=interpret,
        out_shape=jax.ShapeDtypeStruct(queries.shape, jnp.float32),
    )(layer.reshape(1), block_tables, context_lens, new_lens, queries, k_pages, v_pages)
    return gather_from_lanes(y[:, :, :count, :width], q.shape)


def _tpu_grid(
    queries: jax.Array, k_pages: jax.Array, per_program: int
) -> pltpu.PrefetchScalarGridSpec:
    """Return tpu_kernel's programs and what each is given: `per_program` queries of a row."""
    B, pool_heads, count, pool_D = queries.shape
    P = k_pages.shape[3]
    positions_per_step = max(1, TPU_POSITIONS // P) * P
    block_shape = 1, pool_heads, per_program, pool_D
    block = pl.BlockSpec(block_shape, lambda row, i, *_: (row, 0, i, 0))
    pool = pl.BlockSpec(memory_space=pl.ANY)
    buffer = pltpu.VMEM((2, pool_heads, positions_per_step, pool_D), k_pages.dtype)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(B, count // per_program),
        in_specs=[block, pool, pool],
        out_specs=block,
        scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2, 2))],
    )


def spread_over_lanes(q: jax.Array, pool_heads: int) -> jax.Array:
    """Return q (B, T, KV, G, D) as queries (B, pool_heads, T * n * G, n * D), n heads side by side.

    Each query has zeros beside the lanes of its own head of keys: the MXU, 128 deep, multiplies by
    the zeros in the time it would have idled. The queries of a token are those of the first of the
    n heads, then of the next."""
    B, T, KV, G, D = q.shape
    n = pl.cdiv(KV, pool_heads)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pool_heads * n - KV), (0, 0), (0, 0)))
    q = q.reshape(B, T, pool_heads, n, G, 1, D)
    q = q * jnp.eye(n, dtype=q.dtype)[:, None, :, None]  # (B, T, pool_heads, n, G, n, D)
    return q.swapaxes(1, 2).reshape(B, pool_heads, T * n * G, n * D)


def gather_from_lanes(y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return what y (B, pool_heads, T * n * G, n * D), like spread_over_lanes', holds of shape.

    shape is (B, T, KV, G, D). A query's result for the heads beside its own is dropped."""
    B, T, KV, G, D = shape
    pool_heads = y.shape[1]
    n = pl.cdiv(KV, pool_heads)
    y = y.reshape(B, pool_heads, T, n, G, n, D)
    y = jnp.einsum("bhtngnd->bthngd", y)  # the diagonal, no sum
    return y.reshape(B, T, pool_heads * n, G, D)[:, :, :KV]


def tpu_kernel(
    layer_ref: Ref,  # (1,) int32; this and the next three are prefetched into SMEM
    tables_ref: Ref,  # (B, M) int32, physical page of each logical page
    context_ref: Ref,  # (B,) int32, tokens in a row's pages before this call
    new_ref: Ref,  # (B,) int32, new tokens of the row; 0 for padding
    q_ref: Ref,  # (1, KV, R, D) in VMEM: R queries of one row of the batch
    k_hbm: Ref,  # (L, N, KV, P, D) left in HBM
    v_hbm: Ref,  # (L, N, KV, P, D) left in HBM
    y_ref: Ref,  # (1, KV, R, D) float32 out
    k_buffer: Ref,  # (2, KV, S, D) VMEM: one half is filled while the other is read
    v_buffer: Ref,  # (2, KV, S, D) VMEM
    semaphores: Ref,  # (2, 2) of the copies: keys or values, half of the buffer
    *,
    queries_per_token: int,
    scale: float,
) -> None:
    """One program attends for one row and R queries of each head. Query r is of token
    r // queries_per_token.

    It walks over the positions that its last query sees, S at a time and in order, and copies
    pages one step ahead of their use. Cuts are at multiples of S, and positions that a query does
    not see add exact zeros, so its bits depend on nothing else."""
    row = pl.program_id(0)
    _, KV, R, D = q_ref.shape
    S = k_buffer.shape[2]
    P = k_hbm.shape[3]
    pages_per_step = S // P
    first_query = pl.program_id(1) * R
    context = context_ref[row]
    new = new_ref[row]
    # Of a query. `//` would not lower without the device.
    token_of = partial(jax.lax.div, y=jnp.int32(queries_per_token))
    tokens_stop = jnp.minimum(token_of(first_query + R - 1) + 1, new)
    stop = jnp.where(token_of(first_query) < new, context + tokens_stop, 0)
    steps = pl.cdiv(stop, S)

    def half_of(step: Index) -> Index:
        return step % 2

    def copy_page(page: Index, half: Index, slot: int, act: Callable) -> None:
        at = layer_ref[0], tables_ref[row, page]
        for i, (hbm, buffer) in enumerate([(k_hbm, k_buffer), (v_hbm, v_buffer)]):
            place = buffer.at[half, :, pl.ds(slot * P, P)]
            act(pltpu.make_async_copy(hbm.at[at], place, semaphores.at[i, half]))

    def for_each_copy(step: Index, act: Callable) -> None:
        """Call act(copy) for each page of the step that holds a position to attend to."""
        half = half_of(step)
        for slot in range(pages_per_step):
            page = step * pages_per_step + slot
            pl.when(page * P < stop)(partial(copy_page, page, half, slot, act))

    def add_step(i: jax.Array, sums: SoftmaxSums) -> SoftmaxSums:
        pl.when(i + 1 < steps)(partial(for_each_copy, i + 1, _start))
        for_each_copy(i, _wait)
        token = token_of(first_query + jax.lax.broadcasted_iota(jnp.int32, (1, R, 1), 1))
        position = i * S + jax.lax.broadcasted_iota(jnp.int32, (1, 1, S), 2)
        seen = (position <= context + token) & (token < new)  # (1, R, S)
        written = i * S + jax.lax.broadcasted_iota(jnp.int32, (1, S, 1), 1) < stop
        k = k_buffer[half_of(i)]
        v = jnp.where(written, v_buffer[half_of(i)], 0)  # 0 * NaN is NaN
        scores = dot("hrd,hsd->hrs", q_ref[0].astype(k.dtype), k) * scale
        scores = jnp.where(seen, scores, -jnp.inf)
        maximum = jnp.maximum(jnp.max(scores, axis=2), NO_SCORE)  # a query may see none of these
        weights = jnp.exp(scores - maximum[..., None])
        values = dot("hrs,hsd->hrd", weights.astype(v.dtype), v)
        return sums.merge(SoftmaxSums(maximum, jnp.sum(weights, axis=2), values))

    pl.when(steps > 0)(partial(for_each_copy, 0, _start))
    sums = jax.lax.fori_loop(0, steps, add_step, SoftmaxSums.empty((KV, R), D))
    y_ref[0] = sums.mean()


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()
