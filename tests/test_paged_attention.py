"""Attention over pages against a float64 oracle, whatever the pages look like; the pool in place; the kernels lowered.

Every free page, the null page, every other layer and the tail of every last page hold NaN, so that nothing read from
there can go unseen. Each comparison is relative, per row, token and head. tests/mutants.py shows what this suite kills.
"""

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import paged_attention as pa
from config import GPTConfig

P, LAYER, FREE = 16, 1, 5  # tokens per page; the layer that is used; pages that belong to no row
DECODE = [
    1,
    2,
    15,
    16,
    17,
    49,
    64,
    65,
    128,
    129,
    256,
    257,
    330,
    0,
]  # tokens of a row, the new one counted; 0: padding
PREFILL = [
    (20, 20),
    (21, 5),
    (16, 16),
    (35, 20),
    (65, 1),
    (257, 17),
    (0, 0),
]  # tokens of a row, how many are new


def attention(name):
    """An implementation that runs here: other devices' kernels interpreted, on TPU with races looked for."""
    if name == pa.default_implementation():
        return pa.IMPLEMENTATIONS[name]
    if name == "triton":
        return partial(pa.triton, interpret=True)
    if name == "mosaic_tpu":
        return partial(pa.mosaic_tpu, interpret=pltpu.InterpretParams(detect_races=True))
    return pa.reference


def dense_oracle(q, k, v):
    """Float64 causal attention of the last T of S tokens: q (T, H, D), k and v (S, H, D)."""
    q, k, v = [np.asarray(x, np.float64) for x in (q, k, v)]
    T, S, D = len(q), len(k), q.shape[-1]
    s = np.einsum("thd,shd->hts", q, k) / D**0.5
    s[:, np.arange(S) > np.arange(S - T, S)[:, None]] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v)


def relative_error(y, expected):
    return (np.linalg.norm(y - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max()


class Rows:
    """Random sequences, laid out in pages picked at random. The second last's first page is also the fifth's."""

    def __init__(self, lengths, news, D, dtype, H=3):
        rng = np.random.default_rng(0)
        self.lengths, self.news, self.T = lengths, news, max(news)
        self.q, self.k, self.v = [
            [rng.standard_normal((n, H, D)).astype(np.float32) for n in ns]
            for ns in (news, lengths, lengths)
        ]
        self.k, self.v = [
            [np.array(jnp.asarray(x, dtype), np.float32) for x in xs] for xs in (self.k, self.v)
        ]
        for x in (self.k, self.v):
            x[4][:P] = x[-2][:P]
        self.H, self.D, self.dtype, self.rng = H, D, dtype, rng

    def call(self, name, rows=None, M=None, free=np.nan):
        """Arguments for implementation `name`: these rows in this order, M pages wide, `free` in every other slot."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        count = [-(-self.lengths[i] // P) for i in rows]
        M = M or max(count) + 2
        N = 1 + FREE + sum(count)
        page = iter(self.rng.permutation(np.arange(1, N)))
        pools = np.full(
            (2, 2, N, self.H, P, self.D), free, np.float32
        )  # keys and values, L, N, H, P, D
        tables = np.zeros((len(rows), M), np.int32)
        for r, i in enumerate(rows):
            tables[r, : count[r]] = [next(page) for _ in range(count[r])]
        if 4 in rows and (last := len(self.lengths) - 2) in rows:
            tables[rows.index(4), 0] = tables[rows.index(last), 0]
        for r, i in enumerate(rows):
            for pool, x in zip(pools, (self.k[i], self.v[i])):
                for pos in range(len(x)):
                    pool[LAYER, tables[r, pos // P], :, pos % P] = x[pos]
        config = GPTConfig(n_layer=2, n_head=self.H, n_embd=self.H * self.D)
        like = jnp.zeros(pa.pool_shape(config, N, P, name), self.dtype)
        pools = [pa.pack(jnp.asarray(pool).swapaxes(2, 3), like).swapaxes(2, 3) for pool in pools]
        q = np.zeros((len(rows), self.T, self.H, self.D), np.float32)
        for r, i in enumerate(rows):
            q[r, : self.news[i]] = self.q[i]
        context = [self.lengths[i] - self.news[i] for i in rows]
        ints = [jnp.asarray(x, jnp.int32) for x in (tables, context, [self.news[i] for i in rows])]
        return jnp.asarray(q), *pools, *ints, jnp.int32(LAYER)

    def run(self, name, **layout):
        return np.asarray(
            jax.jit(partial(attention(name), scale=self.D**-0.5))(*self.call(name, **layout))
        )

    def check(self, name, tolerance):
        y = self.run(name)
        for row, new in enumerate(self.news):
            assert (y[row, new:] == 0).all(), f"row {row}: a padding token attends to something"
            if new:
                error = relative_error(
                    y[row, :new], dense_oracle(self.q[row], self.k[row], self.v[row])
                )
                assert error < tolerance, (
                    f"row {row} of {self.lengths[row]} tokens: relative error {error:.1e}"
                )


@pytest.mark.parametrize(
    "name, D, dtype",
    [
        *[
            (name, D, dtype)
            for name in ("reference", "triton")
            for D in (32, 64, 80, 128)
            for dtype in ("float32", "bfloat16")
        ],
        ("mosaic_tpu", 64, "float32"),
        ("mosaic_tpu", 80, "bfloat16"),
    ],
)
def test_decode(name, D, dtype, capsys):
    """Catches: a token, page, tile or split lost or read twice, at the ends of each; K for V; a scale forgotten or
    applied twice; a wrong page, row or layer; a stale tail or free page read; a head size that is no power of two;
    partial sums rounded; on TPU a page copied late, over one still read, or read before it is there."""
    rows = Rows(DECODE, [min(1, n) for n in DECODE], D, dtype)
    rows.check(name, 1e-2 if (name, dtype) == ("mosaic_tpu", "bfloat16") else 1e-5)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, D, dtype",
    [
        ("reference", 64, "float32"),
        ("reference", 80, "bfloat16"),
        ("triton", 64, "float32"),
        ("triton", 80, "bfloat16"),
        ("mosaic_tpu", 32, "float32"),
        ("mosaic_tpu", 128, "bfloat16"),
    ],
)
def test_prefill(name, D, dtype):
    """Catches: the causal mask off by one within a chunk, a chunk that starts in the middle of a page, a chunk shorter
    than T, and a decode row beside it."""
    rows = Rows(*[list(x) for x in zip(*PREFILL)], D, dtype)
    rows.check(name, 1e-2 if name != "reference" and dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("name", ["reference", "triton", "mosaic_tpu"])
def test_long_chunk(name):
    """Catches: the second tile of queries taken for the first."""
    Rows([150, 30, 7, 1, 16, 149, 80], [140, 30, 7, 1, 16, 5, 80], 64, "bfloat16", H=2).check(
        name, 1e-2
    )


@pytest.mark.parametrize(
    "name, new",
    [("reference", 1), ("reference", 6), ("triton", 1), ("triton", 6), ("mosaic_tpu", 1)],
)
def test_same_bits(name, new):
    """A row's bits: alone, among others, elsewhere in the pool, with a wider table and other garbage in free pages.
    Catches: a reduction whose order follows the batch, its longest row or the table; anything read from a neighbour."""
    if name == "reference" != pa.default_implementation():
        pytest.skip("a device with a kernel of its own does not use the reference")
    others = [330, 6, 31, 200] * (
        1 if name == "mosaic_tpu" else 10
    )  # 41 rows: XLA on CPU splits over its threads
    rows = Rows(
        [150, *others], [new] * (1 + len(others)), 64, "float32", H=12 if name == "reference" else 3
    )
    alone = rows.run(name, rows=[0])[0]
    order = [*range(1, len(others) + 1), 0]
    assert relative_error(alone, dense_oracle(rows.q[0], rows.k[0], rows.v[0])) < 1e-5
    assert np.array_equal(rows.run(name, rows=order, M=40, free=1e30)[-1], alone)


def test_bits_do_depend_on_the_length():
    """A control: what test_same_bits compares does change with one token of 150."""
    rows = Rows([150, 149, 1, 1, 16, 16, 1], [1] * 7, 64, "float32")
    rows.q[1], rows.k[1], rows.v[1] = rows.q[0], rows.k[0][:149], rows.v[0][:149]
    y = rows.run("reference")
    assert not np.array_equal(y[0], y[1])


def tiny(H=2, D=16):
    return GPTConfig(n_layer=2, n_head=H, n_embd=H * D, vocab_size=61, block_size=64)


def with_batch(cache, tables, context, new):
    tables, context, new = [jnp.asarray(x, jnp.int32) for x in (tables, context, new)]
    return dataclasses.replace(cache, block_tables=tables, context_lens=context, new_lens=new)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_writes_then_attends(dtype):
    """Two sequences, in chunks and token by token, then a third in the pages of the first. Catches: a token written to
    the wrong slot, page or layer, padding written to a row's own page, lengths that advance by T, bfloat16 bits taken
    for integers, what an earlier owner left in a page."""
    config, rng, page = tiny(), np.random.default_rng(0), 4
    cache = pa.PagedKVCache.create(config, 12, page, dtype, "reference")
    dirty = pa.to_dtype(jnp.full(cache.k_pages.shape, jnp.nan), cache.k_pages.dtype)
    cache = dataclasses.replace(cache, k_pages=dirty, v_pages=dirty)
    attend = jax.jit(lambda cache, layer, q, k, v: cache.attend(layer, q, k, v))
    tokens = {
        s: rng.standard_normal((3, 2, 3 * page, 2, 16)).astype(np.float32) for s in "abc"
    }  # qkv, layer, time

    def feed(cache, names, chunks):
        for new in chunks:
            T, start = 6 if max(new) > 1 else 1, np.asarray(cache.context_lens)
            cache = dataclasses.replace(cache, new_lens=jnp.asarray(new, jnp.int32))
            assert np.array_equal(cache.positions(T), start[:, None] + np.arange(T))
            for layer in range(2):
                # padding tokens repeat the row's first ones: were they written or attended to, it would show
                q, k, v = [
                    np.stack(
                        [
                            np.resize(tokens[s][i, layer, a : a + n], (T, 2, 16))
                            if n
                            else np.ones((T, 2, 16))
                            for s, a, n in zip(names, start, new)
                        ]
                    )
                    for i in range(3)
                ]
                y, cache = attend(cache, layer, *[jnp.asarray(x, jnp.float32) for x in (q, k, v)])
                for row, (s, a, n) in enumerate(zip(names, start, new)):
                    if n:
                        _, k, v = np.asarray(
                            jnp.asarray(tokens[s][:, layer, : a + n], dtype), np.float32
                        )
                        expected = dense_oracle(tokens[s][0, layer, a : a + n], k, v)
                        assert relative_error(np.asarray(y[row, :n]), expected) < 1e-5, (
                            s,
                            layer,
                            a,
                            n,
                        )
            cache = cache.advance(T)
        return cache

    cache = feed(
        with_batch(cache, [[9, 2, 7], [4, 11, 0]], [0, 0], [0, 0]),
        "ab",
        [(6, 3), (3, 2), (2, 1), (1, 0)],
    )
    assert list(cache.context_lens) == [12, 6]
    feed(with_batch(cache, [[7, 9, 2], [4, 11, 0]], [0, 6], [0, 0]), "cb", [(3, 1), (6, 0), (1, 1)])


@pytest.mark.parametrize(
    "dtype, B", [("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)]
)
def test_pool_is_updated_in_place(dtype, B):
    """Catches: a step that copies the pool (XLA on CPU: for a single token), slices a layer out of it, or converts it to
    float32 (bfloat16 on CPU)."""
    cache = pa.PagedKVCache.create(tiny(), 3000, P, dtype, "reference")
    cache = with_batch(cache, np.zeros((B, 4)), [9] * B, [1] * B)

    def step(cache, x):
        def layer(carry, i):
            return carry[1].attend(i, *[carry[0]] * 3), None

        return jax.lax.scan(layer, (x, cache), jnp.arange(2))[0]

    compiled = jax.jit(step, donate_argnums=0).lower(cache, jnp.ones((B, 1, 2, 16))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.k_pages.nbytes / 20
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * cache.k_pages.nbytes


@contextlib.contextmanager
def pretend_gpu():
    """jax 0.11 lowers a Triton kernel only for a device it knows; 0.10 has no word for that."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        yield
        return
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
    )
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    ):
        yield


@pytest.mark.parametrize(
    "name, platform", [("triton", "cuda"), ("triton", "rocm"), ("mosaic_tpu", "tpu")]
)
@pytest.mark.parametrize("T, D, dtype", [(1, 64, "bfloat16"), (33, 80, "float32")])
def test_lowers_without_the_device(name, platform, T, D, dtype):
    """Catches: an operation that the interpreter knows and the compiler does not."""
    shape = jax.ShapeDtypeStruct
    config = GPTConfig(n_layer=2, n_head=12, n_embd=12 * D)
    pool = shape(pa.pool_shape(config, 100, P, name), dtype)
    ints = [shape(s, jnp.int32) for s in ((4, 64), (4,), (4,))]
    f = partial(pa.paged_attention, layer=1, scale=D**-0.5, implementation=name)
    with pretend_gpu() if name == "triton" else contextlib.nullcontext():
        text = (
            jax.jit(f)
            .trace(shape((4, T, 12, D), "float32"), pool, pool, *ints)
            .lower(lowering_platforms=(platform,))
            .as_text()
        )
    assert "triton" in text if name == "triton" else "tpu_custom_call" in text


@pytest.mark.parametrize("name", ["reference", "triton", "mosaic_tpu"])
def test_pool_fits_the_memory_it_is_given(name):
    """Catches: one of K and V, or the layers, forgotten, or a TPU's lanes, and a pool too small to hold a token."""
    config, budget = tiny(H=3, D=40), 10**6
    pages = pa.num_pages_for(config, P, "float32", budget, name)
    cache = pa.PagedKVCache.create(config, pages, P, "float32", name)
    used = cache.k_pages.nbytes + cache.v_pages.nbytes
    assert used <= budget < used * (pages + 1) / pages
    assert cache.page_size == P
    with pytest.raises(ValueError, match=r"10000 bytes holds 0 pages of \d+ bytes"):
        pa.num_pages_for(config, P, "float32", 10_000, name)
    with pytest.raises(ValueError, match="null page"):
        pa.PagedKVCache.create(config, 1, P, "float32", name)


def test_unknown_implementation():
    with pytest.raises(
        ValueError, match="attention=flash: there are reference, triton, mosaic_tpu"
    ):
        pa.PagedKVCache.create(tiny(), 4, P, attention="flash")
