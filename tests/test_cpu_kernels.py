"""The native CPU kernels: products and attention against float64 oracles, bits, builds.

All of it for each dialect of the source that this CPU can run: its own, and those that it has with
some of its instructions denied. tests/cpu_kernels_mutants.py shows what this suite kills,
tests/cpu_kernels_sanitized.py runs it under sanitizers.
"""

import dataclasses
import functools
import logging
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import paged_attention as pa
from config import GPTConfig
from errors import UserError
from kernels import cpu_kernels as ck

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

ROOT = Path(__file__).parents[1]
DIALECTS = {
    "native": (),
    "no_tiles": ("-mno-amx-bf16",),
    "no_bf16_vnni": ("-mno-amx-bf16", "-mno-avx512bf16", "-mno-avx512vnni"),
    "no_avx512": ("-mno-avx512f",),
    "plain": ("-march=x86-64",),
}
IS_X86 = os.uname().machine == "x86_64"
NAMES = list(DIALECTS) if IS_X86 else ["native"]
KINDS = list(ck.PACK)
MOST_ROWS = 130
RUNTIME_ERRORS = (ValueError, jax.errors.JaxRuntimeError)  # JAX raises now this, now that


@functools.cache
def dialects():
    """Return each dialect's Library: all are built at once, or come from the user's cache."""
    if ck.available() is not None:
        pytest.skip(f"no native code here: {ck.available()}")
    if "sanitize" in os.environ.get(ck.EXTRA_FLAGS, ""):
        return {"native": ck.library()}
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(ck.build_and_load, ck.SOURCE, *DIALECTS[name]) for name in NAMES[1:]]
        libraries = [ck.library(), *[other.result() for other in others]]
    return dict(zip(NAMES, libraries, strict=True))


@pytest.fixture(params=NAMES)
def dialect(request, monkeypatch):
    """Let cpu_kernels use one dialect's code."""
    library = dialects()[request.param]
    monkeypatch.setattr(ck, "library", lambda: library)


# --- Products ------------------------------------------------------------------------------------


def relative_error(y, expected):
    """Return the largest error of a row, relative to its length."""
    error = np.linalg.norm(np.asarray(y, np.float64) - expected, axis=-1)
    return (error / np.linalg.norm(expected, axis=-1)).max()


def to_bfloat16(x):
    """Return x as bfloat16 rounds it, in float64."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).astype(np.float64)


def to_int8(weights):
    """Return weights (K, N) as symmetric int8 per column and 64 of K rounds them, in float64."""
    rounded = np.empty(weights.shape)
    for start in range(0, len(weights), 64):
        group = weights[start : start + 64].astype(np.float64)
        scale = np.abs(group).max(axis=0) / 127
        scale[scale == 0] = 1
        rounded[start : start + 64] = np.rint(group / scale) * scale
    return rounded


def oracle(kind, x, weights):
    """Return the float64 product of x (M, K) and weights (K, N), rounded as `kind` asks.

    int8 rounds x too, to a 32767th of its largest: see TOLERANCE."""
    if kind == "bfloat16":
        return to_bfloat16(x) @ to_bfloat16(weights)
    if kind == "int8":
        return x.astype(np.float64) @ to_int8(weights)
    return x.astype(np.float64) @ weights.astype(np.float64)


TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-6, "int8": 2e-4}


def random_product(rng, M, K, N):
    """Return x (M, K), weights (K, N), bias (N,); rows and columns differ in size by far."""
    x = rng.standard_normal((M, K)) * 10.0 ** rng.integers(-3, 4, (M, 1))
    weights = rng.standard_normal((K, N)) * 10.0 ** rng.integers(-1, 2, (1, N))
    return [a.astype(np.float32) for a in (x, weights, rng.standard_normal(N))]


SHAPES = [
    (1, 1, 1),
    (1, 768, 33),
    (2, 63, 31),
    (5, 64, 32),
    (7, 65, 64),
    (12, 127, 95),
    (13, 33, 50),
    (25, 129, 257),
    (MOST_ROWS, 191, 65),
]


@pytest.mark.parametrize("kind", KINDS)
def test_product(dialect, kind):
    """Catches: a word, slab, panel or block lost or read twice where M, K or N do not fill it; the
    pair of a word swapped; a scale of another column, slab or row; sums rounded to bfloat16."""
    rng = np.random.default_rng(0)
    for M, K, N in SHAPES:
        x, weights, bias = random_product(rng, M, K, N)
        packed = ck.PACK[kind](weights)
        expected = oracle(kind, x, weights)
        error = relative_error(ck.product(jnp.asarray(x), packed), expected)
        assert error < TOLERANCE[kind], f"M={M} K={K} N={N}: relative error {error:.1e}"
        size = np.abs(expected).max(axis=1, keepdims=True)  # the bias is as large as the product
        biased = np.asarray(ck.product(jnp.asarray(x / size), packed, jnp.asarray(bias)))
        error = relative_error(biased, oracle(kind, x / size, weights) + bias)
        assert error < TOLERANCE[kind], f"M={M} K={K} N={N}, bias: relative error {error:.1e}"


def test_int8_is_close_to_float32(dialect):
    """Catches: int8 weights that are worse than rounding must be: groups that share a scale with
    another column, inputs rounded to fewer bits. Uniform rounding errs by 0.6 % of such weights."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 768)).astype(np.float32)
    weights = rng.standard_normal((768, 100)).astype(np.float32)
    error = relative_error(ck.product(jnp.asarray(x), ck.pack_int8(weights)), x @ weights)
    assert 0.003 < error < 0.008


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_inputs(dialect, kind):
    """Catches: bfloat16 inputs taken for float32, for integers, or rounded twice."""
    rng = np.random.default_rng(2)
    x, weights, _ = random_product(rng, 9, 77, 40)
    rounded = jnp.asarray(x, jnp.bfloat16)
    packed = ck.PACK[kind](weights)
    assert np.array_equal(
        ck.product(rounded, packed), ck.product(rounded.astype(jnp.float32), packed)
    )


def numbers_of_rows(request):
    """Return 1 to 130; for dialects of other CPUs those that make each size of block."""
    if "native" in request.node.name:
        return [*range(1, MOST_ROWS + 1)]
    return [*range(1, 27), 64, 127, MOST_ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_same_bits(dialect, kind, request):
    """A row's bits for every number of rows from 1 to 130, below and above the work for which
    threads start. Catches: an order of the sum that depends on the rows of a block, and anything
    read from a neighbour."""
    rng = np.random.default_rng(3)
    x, weights, bias = random_product(rng, MOST_ROWS, 193, 70)
    packed = ck.PACK[kind](weights)

    @jax.jit
    def multiply_all(parts, bias):
        return [ck.product(part, packed, bias, "gelu_new") for part in parts]

    parts = [jnp.asarray(x[:M]) for M in numbers_of_rows(request)]
    *shorter, longest = map(np.asarray, multiply_all(parts, jnp.asarray(bias)))
    for y in shorter:
        assert np.array_equal(y, longest[: len(y)]), f"{len(y)} rows differ"
    backwards = ck.product(jnp.asarray(x[::-1]), packed, jnp.asarray(bias), "gelu_new")
    assert np.array_equal(backwards[::-1], longest)


def test_bits_do_depend_on_the_order():
    """A control: what test_rows_have_the_same_bits compares changes if K is summed backwards."""
    dialects()
    rng = np.random.default_rng(4)
    x, weights, _ = random_product(rng, 1, 193, 70)
    backwards = ck.product(jnp.asarray(x[:, ::-1]), ck.pack_float32(weights[::-1]))
    assert not np.array_equal(backwards, ck.product(jnp.asarray(x), ck.pack_float32(weights)))


def test_gelu_new(dialect):
    """Catches: a coefficient mistyped, an overflow for large |x|, a NaN that is swallowed."""
    x = np.concatenate([np.linspace(-12, 12, 2001), [-1e4, -100, 100, 1e4]]).astype(np.float32)
    one = ck.pack_float32(np.ones((1, 1)))
    y = np.asarray(ck.product(jnp.asarray(x)[:, None], one, activation="gelu_new"))[:, 0]
    wide = x.astype(np.float64)
    expected = wide / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    assert np.abs(y - expected).max() < 1e-6 * 1e4
    near = np.abs(x) < 6
    assert np.abs(y - expected)[near].max() < 1e-6
    nan = ck.product(jnp.full((1, 1), jnp.nan), one, activation="gelu_new")
    assert np.isnan(nan).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_is_seen_and_stays_alone(dialect, kind, bad):
    """Catches: NaN or infinity rounded to a number, and one that reaches another row."""
    rng = np.random.default_rng(5)
    x, weights, _ = random_product(rng, 14, 130, 40)
    packed = ck.PACK[kind](weights)
    clean = np.asarray(ck.product(jnp.asarray(x), packed))
    x[3, 5] = bad  # among the first columns: what row 2 reads if it reads too far
    y = np.asarray(ck.product(jnp.asarray(x), packed))
    assert not np.isfinite(y[3]).any()
    assert np.array_equal(np.delete(y, 3, axis=0), np.delete(clean, 3, axis=0))


def test_zeros(dialect):
    """Catches a scale of zero that is divided by."""
    weights = np.ones((70, 3), np.float32)
    weights[:, 1] = 0
    x = np.ones((3, 70), np.float32)
    x[1] = 0
    x[2] = 1e-36
    y = np.asarray(ck.product(jnp.asarray(x), ck.pack_int8(weights)))
    assert np.allclose(y, x @ weights, rtol=1e-3, atol=1e-30)


def test_product_of_batches_and_mistakes():
    """Catches: leading axes lost, shapes that do not fit read out of bounds."""
    dialects()
    packed = ck.pack_float32(np.eye(6, 4))
    x = jnp.arange(60.0).reshape(2, 5, 6)
    assert np.array_equal(ck.product(x, packed), x[..., :4])
    assert ck.product(x[:, :0], packed).shape == (2, 0, 4)
    with pytest.raises(UserError, match="x has 5 columns, and the packed weights 6 rows"):
        ck.product(x[..., :5], packed)
    with pytest.raises(UserError, match=r"bias \(5,\) must be \(4,\)"):
        ck.product(x, packed, jnp.zeros(5))
    with pytest.raises(UserError, match="activation=relu: there are none, gelu_new"):
        ck.product(x, packed, activation="relu")
    short = dataclasses.replace(packed, weights=packed.weights[:, :, :1])
    with pytest.raises(RUNTIME_ERRORS, match="packed weights are not those"):
        jax.block_until_ready(ck.product(x, short))


# --- Rows of logits ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 64, 65, 1000, 50304])
def test_rows_of_logits(dialect, n):
    """Catches: columns left out or read past the end where rows do not fill registers; the last of
    equals; exponents that overflow; padding of -inf that counts."""
    rng = np.random.default_rng(n)
    x = (rng.standard_normal((9, n)) * 10.0 ** rng.integers(-2, 3, (9, 1))).astype(np.float32)
    x[1] += 3e4
    x[2, n // 2 :] = x[2].max() + 1  # equals
    x[3, n // 2 + 1 :] = -np.inf
    largest = np.asarray(ck.first_largest(jnp.asarray(x)))
    assert largest.tolist() == x.argmax(1).tolist()
    shifted = x.astype(np.float64) - x.max(1, keepdims=True)
    expected = x.max(1) + np.log(np.exp(shifted).sum(1))
    np.testing.assert_allclose(ck.log_sum_exp(jnp.asarray(x)), expected, rtol=1e-6, atol=1e-6)


def test_a_row_of_logits_has_the_same_bits_in_any_company(dialect):
    """Catches a sum whose order follows the number of rows."""
    x = np.random.default_rng(0).standard_normal((33, 1003)).astype(np.float32)
    together = np.asarray(ck.log_sum_exp(jnp.asarray(x)))
    alone = [np.asarray(ck.log_sum_exp(jnp.asarray(row[None])))[0] for row in x]
    assert together.tolist() == alone


def test_bad_rows_of_logits(dialect):
    """Catches: NaN that a sum does not show, a place outside of the row, and -inf minus -inf."""
    x = np.zeros((3, 40), np.float32)
    x[0] = np.nan
    x[1, 5] = np.nan
    x[2] = -np.inf
    sums = np.asarray(ck.log_sum_exp(jnp.asarray(x)))
    assert np.isnan(sums[:2]).all() and sums[2] == -np.inf
    assert np.asarray(ck.first_largest(jnp.asarray(x))).tolist() == [39, 0, 0]


# --- Attention over pages ------------------------------------------------------------------------

LAYER = 1  # of 2, the one that is used
NUM_PAGES = 300
FREE = 3  # of them, pages that belong to no row
WIDTH = 47  # of block tables


def dense_oracle(q, k, v):
    """Return float64 causal attention of the last T of S tokens: q (T, H, D), k, v (S, KV, D)."""
    q, k, v = [np.asarray(x, np.float64) for x in (q, k, v)]
    T, H, D = q.shape
    S, KV, _ = k.shape
    k, v = [np.repeat(x, H // KV, axis=1) for x in (k, v)]
    scores = np.einsum("thd,shd->hts", q, k) / D**0.5
    scores[:, np.arange(S) > np.arange(S - T, S)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)


class Batch:
    """Rows of `lengths` tokens, the last `news` of them new, in pages picked at random.

    Every slot of the pool that holds no earlier token of theirs holds NaN."""

    def __init__(self, lengths, news, H=4, KV=2, D=16, P=4, dtype="float32", seed=0):
        self.lengths = lengths
        self.news = news
        self.P = P
        self.is_bfloat16 = dtype == "bfloat16"
        self.rng = np.random.default_rng(seed)
        self.q = [self.rng.standard_normal((n, H, D)).astype(np.float32) for n in news]
        self.k = [self.rng.standard_normal((n, KV, D)).astype(np.float32) for n in lengths]
        self.v = [self.rng.standard_normal((n, KV, D)).astype(np.float32) for n in lengths]
        self.sizes = (H, KV, D)

    def tables(self):
        """Return block tables (B, WIDTH): the pages of a row, then the null page."""
        counts = [-(-n // self.P) for n in self.lengths]
        assert sum(counts) + FREE < NUM_PAGES
        pages = iter(self.rng.permutation(np.arange(1, NUM_PAGES)))
        tables = np.zeros((len(counts), WIDTH), np.int32)
        for row, count in enumerate(counts):
            tables[row, :count] = [next(pages) for _ in range(count)]
        return tables

    def pool(self, sequences, tables, *, after):
        """Return a pool before or after the new tokens are written, in its own dtype."""
        _, KV, D = self.sizes
        pool = np.full((2, NUM_PAGES, KV, self.P, D), np.nan, np.float32)
        for row, tokens in enumerate(sequences):
            count = self.lengths[row] - (0 if after else self.news[row])
            for position, x in enumerate(tokens[:count]):
                pool[LAYER, tables[row, position // self.P], :, position % self.P] = x
        return pool.astype(ml_dtypes.bfloat16).view(np.uint16) if self.is_bfloat16 else pool

    def run(self, T=None):
        """Return y (B, T, H, D), and check what is in the pool afterwards, bit for bit."""
        T = T or max(self.news)
        tables = self.tables()
        pools = [self.pool(x, tables, after=False) for x in (self.k, self.v)]
        rows = [self.new_tokens(x, T) for x in (self.q, self.k, self.v)]
        context = np.subtract(self.lengths, self.news)
        y, *written = ck.paged_attention(
            *rows, *map(jnp.asarray, pools), tables, context, np.asarray(self.news), layer=LAYER
        )
        for pool, tokens in zip(written, (self.k, self.v), strict=True):
            expected = self.pool(tokens, tables, after=True)
            assert np.array_equal(pool, expected, equal_nan=not self.is_bfloat16)
        return np.asarray(y)

    def new_tokens(self, arrays, T):
        """Return the new tokens of q, k or v as (B, T, heads, D), padded with large numbers."""
        padded = np.full((len(arrays), T, *arrays[0].shape[1:]), 1e30, np.float32)
        for row, n in enumerate(self.news):
            padded[row, :n] = arrays[row][len(arrays[row]) - n :]
        return jnp.asarray(padded)

    def check(self, tolerance=2e-6):
        """Compare every row with the oracle."""
        y = self.run()
        for row, new in enumerate(self.news):
            assert (y[row, new:] == 0).all(), f"row {row}: a padding token attends to something"
            if new:
                k, v = [to_bfloat16(x) if self.is_bfloat16 else x for x in self.keys_values(row)]
                error = relative_error(y[row, :new], dense_oracle(self.q[row], k, v))
                assert error < tolerance, f"row {row}, {self.lengths[row]} tokens: {error:.1e}"

    def keys_values(self, row):
        return self.k[row], self.v[row]


@pytest.mark.parametrize(
    "sizes",
    [
        {"H": 3, "KV": 3, "D": 64, "P": 16},
        {"H": 9, "KV": 3, "D": 64, "P": 16, "dtype": "bfloat16"},
        {"H": 4, "KV": 2, "D": 80, "P": 5},
        {"H": 2, "KV": 1, "D": 33, "P": 3, "dtype": "bfloat16"},
        {"H": 34, "KV": 2, "D": 8, "P": 32},
    ],
)
def test_attention(dialect, sizes):
    """A decode step, a prefill step, and both in one. Catches: a token lost, read twice or written
    to the wrong place; K for V; padding written or attended to; a scale forgotten; a wrong page,
    row, layer or head; a mask off by one; NaN from a free page, a tail or a padding token."""
    decode = [1, 2, 15, 16, 17, 49, 64, 65, 130, 0]
    Batch(decode, [min(1, n) for n in decode], **sizes).check()
    Batch([20, 21, 16, 35, 65, 70, 0], [20, 5, 16, 20, 1, 17, 0], **sizes).check()


def in_chunks(whole, chunks):
    """Return y (S, H, D) of a sequence that comes in chunks of so many tokens, among neighbours."""
    start, parts = 0, []
    for i, size in enumerate(chunks):
        batch = Batch([7, start + size, 50], [1, size, 5], 4, 2, 40, P=[4, 16, 7][i % 3], seed=i)
        batch.q[1] = whole.q[0][start : start + size]
        batch.k[1], batch.v[1] = (x[0][: start + size] for x in (whole.k, whole.v))
        parts.append(batch.run(T=max(size, 5) + i % 2)[1, :size])
        start += size
    return np.concatenate(parts)


CHUNKINGS = [(1,) * 60, (7,) * 8 + (4,), (16, 16, 16, 12), (33, 1, 1, 25), (1, 59)]


def test_tokens_have_the_same_bits(dialect):
    """A prompt's tokens in one chunk, in others, and as if generated one by one, among neighbours
    and in other pages. Catches: a sum over positions whose order depends on the chunk, on the
    longest row or on the page; a maximum over positions that a token does not see."""
    whole = Batch([60], [60], 4, 2, 40)
    y = whole.run()[0]
    assert relative_error(y, dense_oracle(whole.q[0], whole.k[0], whole.v[0])) < 2e-6
    for chunks in CHUNKINGS:
        assert np.array_equal(in_chunks(whole, chunks), y), f"chunks of {chunks} differ"


def test_a_later_token_changes_nothing(dialect):
    """Catches: NaN or large numbers of a later token of the same chunk reaching an earlier one."""
    batch = Batch([40], [40])
    before = batch.run()[0]
    for x in (batch.k, batch.v):
        x[0][30] = np.nan
    after = batch.run()[0]
    assert np.array_equal(after[:30], before[:30])
    assert np.isnan(after[30:]).all()


def test_large_scores(dialect):
    """Catches: weights of scores that overflow, or that are far below the largest."""
    batch = Batch([50, 3], [50, 1])
    batch.q = [x * 100 for x in batch.q]
    batch.check(tolerance=1e-4)  # a score of 300 is rounded by 3e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_as_the_cache(dialect, dtype):
    """Catches: a meaning other than PagedKVCache's, and a pool that is rounded otherwise."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=61, block_size=64)
    cache = pa.PagedKVCache.create(config, 9, 4, dtype, "reference")
    cache = dataclasses.replace(
        cache,
        block_tables=jnp.asarray([[3, 5, 8], [7, 0, 0], [0, 0, 0]]),
        context_lens=jnp.asarray([5, 0, 0]),
        new_lens=jnp.asarray([2, 3, 0]),
    )
    q, k, v = jnp.asarray(np.random.default_rng(6).standard_normal((3, 3, 3, 2, 16)), jnp.float32)
    batch = (cache.block_tables, cache.context_lens, cache.new_lens)
    y, *pools = ck.paged_attention(q, k, v, cache.k_pages, cache.v_pages, *batch, layer=1)
    expected, cache = cache.attend(1, q, k, v)
    assert np.allclose(y, expected, atol=1e-6)
    for pool, other in zip(pools, (cache.k_pages, cache.v_pages), strict=True):
        assert np.array_equal(pool[:, 1:], other[:, 1:])  # all but the null page


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("B, T", [(1, 1), (3, 5)])
def test_pool_is_updated_in_place(dtype, B, T):
    """Catches: a step that copies a donated pool, in a loop over layers too; one not donated that
    is written to."""
    dialects()
    pool = jnp.zeros((2, 500, 2, 16, 16), dtype)
    x = jnp.ones((B, T, 2, 16))
    batch = [jnp.asarray(a, jnp.int32) for a in (np.ones((B, 2)), np.full(B, 3), np.full(B, T))]

    def layer(pools, i):
        y, *pools = ck.paged_attention(x, x, x, *pools, *batch, layer=i)
        return tuple(pools), y

    def step(k_pages, v_pages):
        return jax.lax.scan(layer, (k_pages, v_pages), jnp.arange(2))

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(pool, pool).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < pool.nbytes / 20
    assert memory.alias_size_in_bytes >= 2 * pool.nbytes
    pools = (pool + 1, pool + 2)
    addresses = [x.unsafe_buffer_pointer() for x in pools]
    written, _ = compiled(*pools)
    assert [x.unsafe_buffer_pointer() for x in written] == addresses
    (y, k_pages, _) = ck.paged_attention(x, x, x, pool, pool, *batch, layer=0)
    assert not pool.any()
    assert k_pages.any()


def test_mistakes_in_attention():
    """Catches: a table, length or layer that reads or writes memory outside of the pool."""
    dialects()
    x = jnp.ones((1, 2, 2, 16))
    pool = jnp.zeros((2, 3, 2, 4, 16))
    attend = partial(ck.paged_attention, x, x, x, pool, pool)
    good = (np.asarray([[2, 1]]), np.asarray([6]), np.asarray([2]))
    jax.block_until_ready(attend(*good, layer=1))
    for tables, context, new, layer in [
        ([[2, 3]], [6], [2], 1),
        ([[2, -1]], [6], [2], 1),
        ([[2, 1]], [7], [2], 1),
        ([[2, 1]], [-1], [2], 1),
        ([[2, 1]], [6], [2], 2),
        ([[2, 1]], [6], [2], -1),
    ]:
        with pytest.raises(RUNTIME_ERRORS, match="a layer, length or page lies outside"):
            batch = [np.asarray(a) for a in (tables, context, new)]
            jax.block_until_ready(attend(*batch, layer=layer))
    with pytest.raises(UserError, match="do not fit a pool"):
        ck.paged_attention(x, x[..., :8], x, pool, pool, *good, layer=1)
    with pytest.raises(UserError, match="3 heads of queries cannot share 2 heads of keys evenly"):
        ck.paged_attention(jnp.ones((1, 2, 3, 16)), x, x, pool, pool, *good, layer=1)


# --- Building ------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Let `available` be asked for the first time, with an empty cache and a quick compiler."""
    dialects()
    for function in (ck.available, ck.library):
        cached = functools.cache(function.__wrapped__)
        monkeypatch.setattr(ck, function.__name__, cached)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(ck.EXTRA_FLAGS, "-O0")


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records]


def test_no_compiler(fresh, monkeypatch, caplog, tmp_path):
    """Catches: a machine without a compiler that crashes, is silent, or complains at each call."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in ck.available()
    assert "no C++ compiler" in ck.available()
    (line,) = lines_of(caplog)
    assert "no C++ compiler" in line and "half the tokens/s" in line


def test_compiler_fails(fresh, monkeypatch, caplog, tmp_path):
    """Catches: a failed build that raises, that leaves a file, or whose reason is not told."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] || { echo 'x.cc: error: no' >&2; exit 1; }\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert ck.available() == f"{compiler} fails: x.cc: error: no"
    (line,) = lines_of(caplog)
    assert "x.cc: error: no" in line and "half the tokens/s" in line
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_switched_off(fresh, monkeypatch, caplog):
    """Catches: a switch that is ignored, or a warning about what the user asked for."""
    monkeypatch.setenv(ck.SWITCH, "off")
    assert ck.available() == "NANOGPT_CPU_KERNELS=off"
    assert not caplog.records


def test_unwritable_cache(fresh, monkeypatch, caplog, tmp_path):
    """Catches: a cache directory that cannot be made, taken for a machine without a compiler."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    caplog.set_level(logging.WARNING)
    assert ck.available() is None
    (line,) = lines_of(caplog)
    assert "the build is not kept" in line
    assert np.array_equal(ck.product(jnp.ones((1, 2)), ck.pack_float32(np.eye(2))), [[1, 1]])


def test_two_processes_build_once(fresh, monkeypatch, tmp_path):
    """Catches: a build that another process finds half written, one for each process, one that is
    not found again."""
    log = tmp_path / "log"
    compiler = tmp_path / "slow"
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {log}\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    program = "import sys; from kernels import cpu_kernels; sys.exit(cpu_kernels.available())"
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert ck.available() is None
    builds = [line for line in log.read_text().splitlines() if "--version" not in line]
    assert len(builds) == 1
    suffixes = sorted(path.suffix for path in ck.cache_directory().iterdir())
    assert suffixes == [".lock", ".so"]


def test_what_a_build_depends_on(monkeypatch, tmp_path):
    """Catches: a build that is taken for that of another source, header, compiler, flag or CPU."""
    dialects()
    files = [tmp_path / name for name in (ck.SOURCE.name, *ck.HEADERS)]
    for file in files:
        file.write_text("one")
    command = ck.compile_command()
    digests = [ck.digest_of(files[0], command), ck.digest_of(files[0], ck.compile_command("-g"))]
    for file in files:
        file.write_text("two")
        digests.append(ck.digest_of(files[0], command))
    monkeypatch.setattr(ck, "cpu_model", lambda: "another")
    digests.append(ck.digest_of(files[0], command))
    assert len(set(digests)) == len(digests)
