"""Every implementation of attention over pages against a float64 oracle, whatever the pages hold.

Then the same bits, the pool updated in place, and the kernels lowered for devices not at hand.

Every free page, the null page, every other layer and the tail of every last page hold NaN, so that
nothing read from there can go unseen. Each comparison is relative, per row, token and head.
tests/mutants.py shows what this suite kills.
"""

import contextlib
import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import paged_attention as pa
from config import GPTConfig

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

P = 16  # tokens per page
LAYER = 1  # the layer that is used
FREE = 5  # pages that belong to no row
# Tokens of each row of a decode step, the new one counted; 0: a padding row.
DECODE = [1, 2, 15, 16, 17, 49, 64, 65, 128, 129, 256, 257, 330, 0]
# Tokens of each row of a prefill step, the new ones counted, and how many are new.
PREFILL = [(20, 20), (21, 5), (16, 16), (35, 20), (65, 1), (257, 17), (0, 0)]
IN_JNP = ("reference", "xla")  # implementations that run on every device
NAMES = (*IN_JNP, "triton", "mosaic_tpu")


def attention(name):
    """Return an implementation that runs here: the kernels of other devices interpreted.

    The TPU's interpreter looks for races."""
    implementation = pa.IMPLEMENTATIONS[name]
    if name == pa.default_implementation() or name in IN_JNP:
        return implementation
    if name == "mosaic_tpu":
        return partial(implementation, interpret=pltpu.InterpretParams(detect_races=True))
    return partial(implementation, interpret=True)


def dense_oracle(q, k, v):
    """Return float64 causal attention of the last T of S tokens: q (T, H, D), k, v (S, KV, D)."""
    q, k, v = [np.asarray(x, np.float64) for x in (q, k, v)]
    T, H, D = q.shape
    S, KV, _ = k.shape
    k, v = [np.repeat(x, H // KV, axis=1) for x in (k, v)]
    scores = np.einsum("thd,shd->hts", q, k) / D**0.5
    position = np.arange(S - T, S)
    scores[:, np.arange(S) > position[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)


def relative_error(y, expected):
    """Return the largest error of a token and head, relative to its length."""
    error = np.linalg.norm(y - expected, axis=-1)
    return (error / np.linalg.norm(expected, axis=-1)).max()


def random_arrays(rng, counts, H, D):
    """Return an array (n, H, D) for each n of counts."""
    return [rng.standard_normal((n, H, D)).astype(np.float32) for n in counts]


class Rows:
    """Random sequences, laid out in pages picked at random, with KV, or H, heads of keys.

    The first page of the second last is the first page of the fifth, too."""

    def __init__(self, lengths, news, D, dtype, H=3, KV=None):
        self.lengths = lengths
        self.news = news
        self.T = max(news)
        self.H = H
        self.KV = KV or H
        self.D = D
        self.dtype = dtype
        self.rng = np.random.default_rng(0)
        self.q = random_arrays(self.rng, news, H, D)
        self.k = self._stored(random_arrays(self.rng, lengths, self.KV, D))
        self.v = self._stored(random_arrays(self.rng, lengths, self.KV, D))

    def _stored(self, arrays):
        """Return the arrays as the pool's dtype holds them, the shared page in both rows."""
        arrays = [np.array(jnp.asarray(x, self.dtype), np.float32) for x in arrays]
        arrays[4][:P] = arrays[-2][:P]
        return arrays

    def call(self, name, rows=None, M=None, free=np.nan):
        """Return arguments for implementation `name`: these rows in this order, in tables M wide.

        `free` is in every slot that holds no token of theirs."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        tables, N = self._tables(rows, M)
        k_pages = self._pool(name, self.k, rows, tables, N, free)
        v_pages = self._pool(name, self.v, rows, tables, N, free)
        q = np.zeros((len(rows), self.T, self.H, self.D), np.float32)
        for row, i in enumerate(rows):
            q[row, : self.news[i]] = self.q[i]
        new = [self.news[i] for i in rows]
        context = [self.lengths[i] - self.news[i] for i in rows]
        ints = [jnp.asarray(x, jnp.int32) for x in (tables, context, new)]
        q = q.reshape(len(rows), self.T, self.KV, -1, self.D)
        return jnp.asarray(q), k_pages, v_pages, *ints, jnp.int32(LAYER)

    def _tables(self, rows, M):
        """Return block tables (rows, M), M=None for two pages to spare, and the pool's size N."""
        counts = [-(-self.lengths[i] // P) for i in rows]
        M = M or max(counts) + 2
        N = 1 + FREE + sum(counts)
        free_pages = iter(self.rng.permutation(np.arange(1, N)))
        tables = np.zeros((len(rows), M), np.int32)
        for row, count in enumerate(counts):
            tables[row, :count] = [next(free_pages) for _ in range(count)]
        second_last = len(self.lengths) - 2
        if 4 in rows and second_last in rows:
            tables[rows.index(4), 0] = tables[rows.index(second_last), 0]
        return tables, N

    def _pool(self, name, sequences, rows, tables, N, free):
        """Return the keys' or values' pool of N pages, arranged for implementation `name`."""
        pool = np.full((2, N, self.KV, P, self.D), free, np.float32)
        for row, i in enumerate(rows):
            for position, x in enumerate(sequences[i]):
                pool[LAYER, tables[row, position // P], :, position % P] = x
        config = tiny(self.H, self.D, self.KV)
        empty = jnp.zeros(pa.pool_shape(config, N, P, name), self.dtype)
        return pa.pack(jnp.asarray(pool).swapaxes(2, 3), empty).swapaxes(2, 3)

    def run(self, name, **layout):
        """Return y (rows, T, H, D) of all rows, laid out as in `call`."""
        attend = jax.jit(partial(attention(name), scale=self.D**-0.5))
        y = np.asarray(attend(*self.call(name, **layout)))
        return y.reshape(len(y), self.T, self.H, self.D)

    def check(self, name, tolerance):
        """Compare every row with the oracle."""
        y = self.run(name)
        for row, new in enumerate(self.news):
            assert (y[row, new:] == 0).all(), f"row {row}: a padding token attends to something"
            if new:
                expected = dense_oracle(self.q[row], self.k[row], self.v[row])
                error = relative_error(y[row, :new], expected)
                assert error < tolerance, (
                    f"row {row} of {self.lengths[row]} tokens: relative error {error:.1e}"
                )


@pytest.mark.parametrize(
    "name, D, dtype",
    [
        *[
            (name, D, dtype)
            for name in (*IN_JNP, "triton")
            for D in (32, 64, 80, 128)
            for dtype in ("float32", "bfloat16")
        ],
        ("mosaic_tpu", 64, "float32"),
        ("mosaic_tpu", 80, "bfloat16"),
    ],
)
def test_decode(name, D, dtype, capsys):
    """Catches: a token, page, tile or split lost or read twice, at the ends of each; K for V; a
    scale forgotten or applied twice; a wrong page, row or layer; a stale tail or free page read; a
    head size that is no power of two; partial sums rounded; on TPU a page copied late, over one
    still read, or read before it is there."""
    rows = Rows(DECODE, [min(1, n) for n in DECODE], D, dtype)
    rows.check(name, 1e-2 if (name, dtype) == ("mosaic_tpu", "bfloat16") else 1e-5)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, D, dtype",
    [
        ("reference", 64, "float32"),
        ("reference", 80, "bfloat16"),
        ("xla", 64, "float32"),
        ("xla", 80, "bfloat16"),
        ("triton", 64, "float32"),
        ("triton", 80, "bfloat16"),
        ("mosaic_tpu", 32, "float32"),
        ("mosaic_tpu", 128, "bfloat16"),
    ],
)
def test_prefill(name, D, dtype):
    """Catches: the causal mask off by one within a chunk, a chunk that starts in the middle of a
    page, a chunk shorter than T, and a decode row beside it."""
    lengths, news = zip(*PREFILL, strict=True)
    multiplies_bfloat16 = name not in IN_JNP and dtype == "bfloat16"
    Rows(lengths, news, D, dtype).check(name, 1e-2 if multiplies_bfloat16 else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_long_chunk(name):
    """Catches: the second tile of queries taken for the first."""
    lengths = [150, 30, 7, 1, 16, 149, 80]
    news = [140, 30, 7, 1, 16, 5, 80]
    Rows(lengths, news, 64, "bfloat16", H=2).check(name, 1e-2)


# Tokens of each row of a step with groups, and how many are new when more than one may be.
GROUPED = [1, 17, 257, 40, 33, 64, 35, 0]
GROUPED_NEW = [1, 17, 6, 40, 1, 20, 18, 0]


@pytest.mark.parametrize(
    "name, H, KV, D, dtype, is_decode",
    [
        ("reference", 9, 3, 64, "float32", False),
        ("xla", 9, 3, 64, "float32", True),
        ("xla", 8, 1, 80, "bfloat16", False),
        ("triton", 9, 3, 64, "float32", True),
        ("triton", 8, 1, 80, "bfloat16", True),
        ("triton", 9, 3, 48, "float32", False),
        ("mosaic_tpu", 9, 3, 64, "float32", True),
        ("mosaic_tpu", 8, 1, 80, "bfloat16", True),
        ("mosaic_tpu", 6, 2, 48, "float32", False),
    ],
)
def test_groups(name, H, KV, D, dtype, is_decode, capsys):
    """Several heads of queries to one of keys. Catches: a query that reads another group's head;
    queries of a group exchanged, or masked as another token's; a head that a TPU's lanes have no
    room for beside the others; a tile that holds more queries than there are."""
    news = [min(1, n) for n in GROUPED] if is_decode else GROUPED_NEW
    multiplies_bfloat16 = name not in IN_JNP and dtype == "bfloat16"
    Rows(GROUPED, news, D, dtype, H, KV).check(name, 1e-2 if multiplies_bfloat16 else 1e-5)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, new, G",
    [
        ("xla", 1, 1),
        ("xla", 1, 3),
        ("xla", 6, 3),
        ("triton", 1, 1),
        ("triton", 1, 3),
        ("triton", 6, 3),
        ("mosaic_tpu", 1, 3),
    ],
)
def test_same_bits(name, new, G):
    """A row's bits: alone; then among others, elsewhere in the pool, with a wider table and with
    other garbage in free pages. Catches: a reduction whose order follows the batch, its longest row
    or the table; anything read from a neighbour."""
    if name == "xla" and jax.default_backend() != "cpu":
        pytest.skip("where a device has a kernel of its own, xla does not run the engine")
    is_interpreted = name not in (*IN_JNP, pa.default_implementation())
    repeats = 1 if is_interpreted else 10  # 41 rows: XLA on CPU splits over its threads
    others = [330, 6, 31, 200] * repeats
    lengths = [150, *others]
    H = 12 if name == "xla" else 3
    rows = Rows(lengths, [new] * len(lengths), 64, "float32", H, H // G)
    alone = rows.run(name, rows=[0])[0]
    assert relative_error(alone, dense_oracle(rows.q[0], rows.k[0], rows.v[0])) < 1e-5
    last = [*range(1, len(lengths)), 0]
    assert np.array_equal(rows.run(name, rows=last, M=40, free=1e30)[-1], alone)


def test_bits_do_depend_on_the_length():
    """A control: what test_same_bits compares does change with one token of 150."""
    rows = Rows([150, 149, 1, 1, 16, 16, 1], [1] * 7, 64, "float32")
    rows.q[1] = rows.q[0]
    rows.k[1] = rows.k[0][:149]
    rows.v[1] = rows.v[0][:149]
    y = rows.run("xla")
    assert not np.array_equal(y[0], y[1])


def tiny(H=2, D=16, KV=None):
    """Return a GPT's config of two layers, with KV heads of keys, or H."""
    return GPTConfig(n_layer=2, n_head=H, n_kv_head=KV, n_embd=H * D, vocab_size=61, block_size=64)


def with_batch(cache, tables, context, new):
    """Return the cache with these rows."""
    return dataclasses.replace(
        cache,
        block_tables=jnp.asarray(tables, jnp.int32),
        context_lens=jnp.asarray(context, jnp.int32),
        new_lens=jnp.asarray(new, jnp.int32),
    )


class Conversations:
    """Three sequences, fed into a PagedKVCache in chunks; what they attend to is checked."""

    PAGE = 4
    H, KV, D = 4, 2, 16

    def __init__(self, dtype):
        rng = np.random.default_rng(0)
        shape = (2, 3 * self.PAGE, self.H + 2 * self.KV, self.D)  # layer; position; q, k and v
        self.tokens = {name: rng.standard_normal(shape).astype(np.float32) for name in "abc"}
        self.dtype = dtype
        self.attend = jax.jit(lambda cache, layer, q, k, v: cache.attend(layer, q, k, v))

    def feed(self, cache, names, chunks):
        """Return the cache after `chunks`, each the number of new tokens of every sequence."""
        for new in chunks:
            T = 6 if max(new) > 1 else 1
            cache = dataclasses.replace(cache, new_lens=jnp.asarray(new, jnp.int32))
            start = np.asarray(cache.context_lens)
            assert np.array_equal(cache.positions(T), start[:, None] + np.arange(T))
            for layer in range(2):
                chunk = [self.chunk(*row, layer, T) for row in zip(names, start, new, strict=True)]
                y, cache = self.attend(cache, layer, *self.split(jnp.asarray(chunk)))
                for row, (name, first, n) in enumerate(zip(names, start, new, strict=True)):
                    self.check(np.asarray(y[row, :n]), name, layer, first, n)
            cache = cache.advance(T)
        return cache

    def chunk(self, name, first, n, layer, T):
        """Return q, k and v (T, H + 2 * KV, D) of n tokens, then padding.

        Padding repeats the first tokens: were it written or attended to, it would show."""
        if n == 0:
            return np.ones((T, self.H + 2 * self.KV, self.D), np.float32)
        return self.tokens[name][layer, first + np.arange(T) % n]

    def split(self, x):
        """Return q (..., H, D), k and v (..., KV, D) of x (..., H + 2 * KV, D)."""
        return np.split(x, [self.H, self.H + self.KV], axis=-2)

    def check(self, y, name, layer, first, n):
        """Compare y (n, H, D) of the tokens from position `first` on with the oracle."""
        if n == 0:
            return
        q, k, v = self.split(self.tokens[name][layer, : first + n])
        k, v = [np.asarray(jnp.asarray(x, self.dtype), np.float32) for x in (k, v)]
        assert relative_error(y, dense_oracle(q[first:], k, v)) < 1e-5, (name, layer, first, n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", IN_JNP)
def test_cache_writes_then_attends(name, dtype):
    """Two sequences, in chunks and token by token, then a third in the pages of the first. Catches:
    a token written to the wrong slot, page or layer, padding written to a row's own page, lengths
    that advance by T, bfloat16 bits taken for integers, what an earlier owner left in a page."""
    conversations = Conversations(dtype)
    config = tiny(conversations.H, conversations.D, conversations.KV)
    cache = pa.PagedKVCache.create(config, 12, conversations.PAGE, dtype, name)
    dirty = pa.to_dtype(jnp.full(cache.k_pages.shape, jnp.nan), cache.k_pages.dtype)
    cache = dataclasses.replace(cache, k_pages=dirty, v_pages=dirty)
    cache = with_batch(cache, [[9, 2, 7], [4, 11, 0]], [0, 0], [0, 0])
    cache = conversations.feed(cache, "ab", [(6, 3), (3, 2), (2, 1), (1, 0)])
    assert list(cache.context_lens) == [12, 6]
    cache = with_batch(cache, [[7, 9, 2], [4, 11, 0]], [0, 6], [0, 0])
    conversations.feed(cache, "cb", [(3, 1), (6, 0), (1, 1)])


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pool_is_updated_in_place(dtype, B):
    """Catches a step that copies the pool (XLA on CPU: for a single token), slices a layer out of
    it, or converts it to float32 (bfloat16 on CPU)."""
    cache = pa.PagedKVCache.create(tiny(), 3000, P, dtype, "xla")
    cache = with_batch(cache, np.zeros((B, 4)), [9] * B, [1] * B)

    def attend(x_and_cache, layer):
        x, cache = x_and_cache
        return cache.attend(layer, x, x, x), None

    def step(cache, x):
        return jax.lax.scan(attend, (x, cache), jnp.arange(2))[0]

    compiled = jax.jit(step, donate_argnums=0).lower(cache, jnp.ones((B, 1, 2, 16))).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < cache.k_pages.nbytes / 20
    assert memory.alias_size_in_bytes >= 2 * cache.k_pages.nbytes


def pretend_gpu():
    """Return a context: jax 0.11 lowers a Triton kernel only for a device it knows.

    0.10 has no word for that."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    "name, platform", [("triton", "cuda"), ("triton", "rocm"), ("mosaic_tpu", "tpu")]
)
@pytest.mark.parametrize(
    "T, KV, G, D, dtype",
    [
        (1, 12, 1, 64, "bfloat16"),
        (33, 12, 1, 80, "float32"),
        (1, 3, 3, 64, "bfloat16"),
        (33, 3, 3, 64, "bfloat16"),
        (1, 2, 3, 48, "float32"),
        (33, 1, 8, 80, "float32"),
    ],
)
def test_lowers_without_the_device(name, platform, T, KV, G, D, dtype):
    """Catches: an operation that the interpreter knows and the compiler does not."""
    array = jax.ShapeDtypeStruct
    q = array((4, T, KV, G, D), "float32")
    pool = array(pa.pool_shape(tiny(KV * G, D, KV), 100, P, name), dtype)
    ints = [array(shape, jnp.int32) for shape in ((4, 64), (4,), (4,))]
    attend = partial(pa.paged_attention, layer=1, scale=D**-0.5, implementation=name)
    with pretend_gpu() if name == "triton" else contextlib.nullcontext():
        traced = jax.jit(attend).trace(q, pool, pool, *ints)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("triton" if name == "triton" else "tpu_custom_call") in text


@pytest.mark.parametrize("name", NAMES)
def test_pool_fits_the_memory_it_is_given(name):
    """Catches: one of K and V, or the layers, forgotten, or a TPU's lanes, a pool too small to hold
    a token, and one that has room for heads of queries."""
    config, budget = tiny(H=3, D=40), 10**6
    pages = pa.num_pages_for(config, P, "float32", budget, name)
    cache = pa.PagedKVCache.create(config, pages, P, "float32", name)
    used = cache.k_pages.nbytes + cache.v_pages.nbytes
    assert used <= budget < used * (pages + 1) / pages
    assert cache.page_size == P
    shared = [pa.pool_shape(tiny(8, 64, KV), pages, P, name) for KV in (2, 8)]
    assert 4 * math.prod(shared[0]) == math.prod(shared[1])
    with pytest.raises(ValueError, match=r"10000 bytes holds 0 pages of \d+ bytes"):
        pa.num_pages_for(config, P, "float32", 10_000, name)
    with pytest.raises(ValueError, match="null page"):
        pa.PagedKVCache.create(config, 1, P, "float32", name)


def test_unknown_implementation():
    """Catches a misspelt name that is silently replaced by the default."""
    names = "reference, xla, triton, mosaic_tpu"
    with pytest.raises(ValueError, match=f"attention=flash: there are {names}"):
        pa.PagedKVCache.create(tiny(), 4, P, attention="flash")


def test_default_implementation(monkeypatch):
    """Catches the reference, which copies every row, or another device's kernel as the default."""
    for device, name in {"cpu": "xla", "gpu": "triton", "tpu": "mosaic_tpu"}.items():
        monkeypatch.setattr(jax, "default_backend", lambda device=device: device)
        assert pa.default_implementation("off") == name
