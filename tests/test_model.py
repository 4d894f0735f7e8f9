"""Properties of the GPT that plausible bugs break, on tiny models, in float32 unless it says so."""

import dataclasses
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import generation
from config import GPTConfig, TrainConfig
from errors import UserError
from formats.checksums import seal
from generation import KVCache, window_start
from model import GPT, MLP, Block, CausalSelfAttention, LayerNorm
from ops import (
    ACTIVATIONS,
    causal_attention,
    choose_attention,
    dropout,
    einsum,
    flash_attention,
)
from tokenizer import CharTokenizer
from training.checkpoints import Checkpoints
from utils import TrainState

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

TINY = GPTConfig(block_size=32, vocab_size=50, n_layer=3, n_head=2, n_embd=32)


def init(config: GPTConfig) -> dict:
    """Return a fresh GPT's parameters; jitted, because one operation after the other is slow."""
    return jax.jit(lambda: GPT(config, rngs=nnx.Rngs(0)).params())()


@pytest.fixture(scope="module")
def gpt() -> GPT:
    """Return a tiny GPT with parameters so large that every part of it matters to the logits."""
    rng = np.random.default_rng(1)

    def noisy(a):
        return a + 0.2 * rng.normal(size=a.shape).astype(np.float32)

    return GPT.from_params(TINY, jax.tree.map(noisy, init(TINY)))


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(2), (2, 32), 0, TINY.vocab_size)


def test_layer_norm_is_exact_and_stable():
    """Catches E[x^2] - E[x]^2 (catastrophic for a large mean), a missing epsilon, scale or bias."""
    x = np.random.default_rng(0).normal(size=(4, 32)) + 1000.0
    norm = LayerNorm(dataclasses.replace(TINY, layer_norm_epsilon=0.1))
    norm.scale[...] = jnp.arange(32.0)
    norm.bias[...] = jnp.ones(32)
    normalised = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    expected = normalised * np.arange(32) + 1
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=5e-3)
    assert np.isfinite(norm(jnp.full((1, 32), 7.0))).all()
    assert LayerNorm(dataclasses.replace(TINY, bias=False)).bias is None


@pytest.mark.parametrize("n_embd", [64, 256, 768])
def test_the_bits_of_a_norm_do_not_depend_on_how_many_rows_there_are(n_embd):
    """Catches sums that XLA orders by the size of the array, so that a request's numbers depend on
    who else is served."""
    if jax.default_backend() != "cpu":
        pytest.skip("elsewhere they may: an engine finds out which numbers of rows are alike")
    norm = jax.jit(LayerNorm(dataclasses.replace(TINY, n_embd=n_embd)))
    x = jax.random.normal(jax.random.key(0), (128, 1, n_embd))
    together = np.asarray(norm(x))
    for rows in (1, 2, 8, 32):
        few = np.concatenate([norm(x[i : i + rows]) for i in range(0, 128, rows)])
        np.testing.assert_array_equal(few, together, err_msg=f"{rows} rows")


def fill_with_noise(linear, rng):
    linear.kernel[...] = jnp.asarray(rng.normal(size=linear.kernel.shape) * 0.3, jnp.float32)
    linear.bias[...] = jnp.asarray(rng.normal(size=linear.bias.shape), jnp.float32)


def apply_in_float64(linear, x):
    kernel = np.asarray(linear.kernel[...], np.float64)
    bias = np.asarray(linear.bias[...], np.float64)
    return x @ kernel + bias


def test_mlp_against_numpy():
    """Catches a transposed kernel and a wrong activation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 32))
    mlp = MLP(TINY)
    fill_with_noise(mlp.c_fc, rng)
    fill_with_noise(mlp.c_proj, rng)
    hidden = apply_in_float64(mlp.c_fc, x)
    gelu = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    expected = apply_in_float64(mlp.c_proj, gelu)
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-4)


def test_attention_against_numpy():
    """Catches heads split along the wrong axis, a wrong scale, a mask off by one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 32))
    attention = CausalSelfAttention(TINY)
    fill_with_noise(attention.c_attn, rng)
    fill_with_noise(attention.c_proj, rng)
    qkv = apply_in_float64(attention.c_attn, x)
    out = np.zeros((2, 5, 32))
    for b in range(2):
        for h in range(2):
            head = slice(h * 16, (h + 1) * 16)
            q, k, v = (qkv[b, :, i * 32 : (i + 1) * 32][:, head] for i in range(3))
            for t in range(5):
                weights = np.exp(q[t] @ k[: t + 1].T / math.sqrt(16))
                out[b, t, head] = weights / weights.sum() @ v[: t + 1]
    y, cache = attention(jnp.asarray(x, jnp.float32))
    expected = apply_in_float64(attention.c_proj, out)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert cache is None


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_keeps_one_array_for_its_derivative(name):
    """Catches several arrays of 4 C for each token and layer: most of what training holds."""
    residuals = jax.eval_shape(lambda x: jax.vjp(ACTIVATIONS[name], x)[1], jnp.zeros(1000))
    assert sum(a.size for a in jax.tree.leaves(residuals) if a.shape) == 1000


def test_blocks_are_stacked_and_each_its_own():
    """Catches nnx.vmap without split keys: L identical layers."""
    kernel = init(TINY)["h"]["attn"]["c_attn"]["kernel"]
    assert kernel.shape == (3, 32, 96)
    assert not np.array_equal(kernel[0], kernel[1])


def test_initialisation_goes_by_path():
    """Catches a residual projection that is not scaled by 1 / sqrt(2 L), a bias or scale hit by the
    rank rule "2-D is a matrix" (stacked biases are 2-D), a vocabulary padding that is not zero."""
    config = dataclasses.replace(TINY, n_embd=256, n_layer=8)
    for path, a in jax.tree_util.tree_flatten_with_path(init(config))[0]:
        name = ".".join(p.key for p in path)
        if name.endswith("bias"):
            assert not a.any(), name
        elif name.endswith("scale"):
            assert (a == 1).all(), name
        elif name == "wte.embedding":
            assert not a[50:].any()
            assert abs(a[:50].std() / 0.02 - 1) < 0.05
        else:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert abs(a.std() / std - 1) < 0.05, name
            assert abs(a.mean()) < std / 10, name


@pytest.mark.parametrize("vocab_size", [65, 5000])
def test_untrained_loss_is_that_of_a_uniform_guess(vocab_size):
    """Catches a wrong initialisation, targets not shifted, probability on the padding."""
    config = dataclasses.replace(TINY, vocab_size=vocab_size)
    tokens = np.random.default_rng(0).integers(vocab_size, size=(16, 33))
    loss = jax.jit(GPT.from_params(config, init(config)).loss)(tokens[:, :-1], tokens[:, 1:])
    assert abs(float(loss) - math.log(vocab_size)) < 0.05


def test_a_logit_does_not_feel_later_tokens(gpt, tokens):
    """Catches a causal mask that is off by one, absent, or applied after softmax: its gradient."""
    embeddings = gpt.wte(tokens[:1])

    def logit_sum(embeddings, t):
        x, _ = gpt.blocks(embeddings + gpt.wpe(jnp.arange(32)))
        return gpt.logits(gpt.ln_f(x))[0, t, :50].sum()

    gradient = jax.jit(jax.grad(logit_sum))
    for t in (0, 5, 30):
        size = jnp.abs(gradient(embeddings, t)[0]).sum(-1)
        assert (size[t + 1 :] == 0).all()
        assert (size[: t + 1] > 0).all()


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 17])
def test_cached_equals_full(gpt, tokens, chunk, unstacked):
    """Catches a cache slot off by one, a layer that writes another's slots, wrong positions, a mask
    blind to the chunk; and, unstacked, layers in another order."""
    full, no_cache = gpt(tokens)
    assert no_cache is None
    assert full.shape == (2, 32, 64)
    model = gpt.for_inference() if unstacked else gpt
    step = jax.jit(lambda tokens, cache: model(tokens, cache))
    cache = KVCache.create(TINY, 2, 32)
    parts = []
    for i in range(0, 32, chunk):
        logits, cache = step(tokens[:, i : i + chunk], cache)
        parts.append(logits)
    cached = jnp.concatenate(parts, axis=1)
    assert np.abs(cached - full)[..., :50].max() < 1e-4
    assert (cached.argmax(-1) == full.argmax(-1)).all()
    assert (cache.length == 32).all()


def test_rows_of_a_cache_are_independent(gpt, tokens):
    """Catches one length for all rows: rows of 5 and 11 tokens go on as each does alone."""
    full, _ = gpt(tokens)
    cache = KVCache.create(TINY, 2, 32)
    _, cache = gpt(tokens[:, :11], cache)
    cache = dataclasses.replace(cache, length=jnp.array([5, 11]))  # row 0 forgets 6 tokens
    logits, _ = gpt(jnp.stack([tokens[0, 5:9], tokens[1, 11:15]]), cache)
    expected = jnp.stack([full[0, 5:9], full[1, 11:15]])
    np.testing.assert_allclose(logits[..., :50], expected[..., :50], atol=1e-4)


def test_padded_vocabulary_has_no_probability(gpt, tokens):
    """Catches padding columns that take part in softmax, sampling or argmax."""
    logits, _ = gpt(tokens)
    assert (logits[..., 50:] == -jnp.inf).all()
    assert jnp.isfinite(logits[..., :50]).all()
    assert max(max(row) for row in gpt.generate([[1]] * 64, 30, temperature=100.0)) < 50


def test_dropout_comes_from_the_key():
    """Catches a key that is not used, and dropout without a key."""
    config = dataclasses.replace(TINY, dropout=0.5, n_layer=2)
    model = GPT.from_params(config, init(config))
    tokens = jnp.zeros((1, 8), jnp.int32)
    logits = jax.jit(lambda key: model(tokens, dropout_key=key)[0][..., :50])
    a, b = jax.random.key(1), jax.random.key(2)
    assert (logits(a) == logits(a)).all()
    assert (logits(a) != logits(b)).any()
    assert (logits(a) != logits(None)).any()


def test_dropout_scales_what_it_leaves():
    """Catches a missing 1 / (1 - rate), and dropout without a key."""
    ones = jnp.ones((200, 200))
    dropped = dropout(ones, 0.25, jax.random.split(jax.random.key(1), 200))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs(dropped.mean() - 1) < 0.02
    assert (dropout(ones, 0.25, None) == 1).all()


def test_layers_of_a_scan_drop_differently():
    """Catches dropout under scan that repeats one mask in every layer: blocks that add nothing but
    dropout(1) must disagree."""
    config = dataclasses.replace(TINY, dropout=0.5, n_layer=2)
    params = jax.tree.map(jnp.zeros_like, init(config))
    params["h"]["mlp"]["c_proj"]["bias"] += 1.0  # each block adds dropout(1): 0 or 2
    model = GPT.from_params(config, params)
    x, _ = model.blocks(jnp.zeros((4, 32, 32)), dropout_key=jax.random.key(0))
    counts = {value: float((x == value).mean()) for value in (0.0, 2.0, 4.0)}
    assert abs(counts[2.0] - 0.5) < 0.05, f"equal masks would give 0 or 4 only: {counts}"


@pytest.mark.parametrize("chunks", [1, 8])
def test_loss_in_chunks_equals_plain(gpt, tokens, chunks):
    """Catches a chunk weighted wrongly, positions permuted by the split, a gradient lost, scaled
    twice or not at all; and targets of -1 that count."""
    targets = jnp.roll(tokens, 1, axis=1).at[0, :7].set(-1)
    graphdef, params = nnx.split(gpt)

    def plain_loss(params):
        logits, _ = nnx.merge(graphdef, params)(tokens)
        logprobs = jax.nn.log_softmax(logits)
        of_targets = jnp.take_along_axis(logprobs, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        counts = targets >= 0
        return -3 * jnp.where(counts, of_targets, 0).sum() / counts.sum()

    def loss_in_chunks(params):
        return 3 * nnx.merge(graphdef, params).loss(tokens, targets, chunks=chunks)

    plain, plain_gradient = jax.jit(jax.value_and_grad(plain_loss))(params)
    chunked, chunked_gradient = jax.jit(jax.value_and_grad(loss_in_chunks))(params)
    assert abs(plain - chunked) < 1e-6 * abs(plain)
    assert abs(plain - jax.jit(loss_in_chunks)(params)) < 1e-6 * abs(plain)
    leaves = jax.tree.leaves(plain_gradient), jax.tree.leaves(chunked_gradient)
    for a, b in zip(*leaves, strict=True):
        assert np.abs(a - b).max() <= 2e-6 * max(1, np.abs(a).max())

    logits = np.asarray(gpt(tokens)[0], np.float64)[..., :50]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    columns = np.maximum(targets, 0)[..., None]
    of_targets = np.take_along_axis(logprobs, columns, -1)[..., 0]
    assert abs(plain + 3 * of_targets[np.asarray(targets) >= 0].mean()) < 3e-5


def test_chunked_loss_never_holds_all_logits():
    """Catches a chunked loss whose backward pass stores every chunk's logits after all."""
    config = dataclasses.replace(TINY, vocab_size=8192, block_size=256, n_layer=1)
    shapes = jax.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)).params())
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def loss(params, tokens, chunks):
        return GPT.from_params(config, params).loss(tokens, tokens, chunks=chunks)

    def temporary_bytes(chunks):
        gradient = jax.jit(jax.grad(partial(loss, chunks=chunks)))
        return gradient.lower(shapes, tokens).compile().memory_analysis().temp_size_in_bytes

    all_logits = 4 * 256 * 8192 * 4
    assert temporary_bytes(16) < all_logits / 2 < all_logits < temporary_bytes(1)


@pytest.mark.parametrize("change", [{"remat": True}, {"scan_unroll": 3}])
def test_how_it_computes_does_not_change_what(gpt, tokens, change):
    """Catches remat or unrolling that drops a layer or its dropout key."""

    def gradient_leaves(config):
        def loss(params):
            model = GPT.from_params(config, params)
            return model.loss(tokens, tokens, dropout_key=jax.random.key(3))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(gpt.params()))

    config = dataclasses.replace(TINY, dropout=0.3)
    changed = dataclasses.replace(config, **change)
    for a, b in zip(gradient_leaves(config), gradient_leaves(changed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_results_in_bfloat16_are_sums_in_float32_rounded_once():
    """Catches a product that sums in bfloat16, where 256 + 1 is 256, a gradient in another dtype
    than its operand's, and products that write twice the bytes that are read."""
    x = jnp.ones((1, 1, 8192), jnp.bfloat16)
    w = jnp.ones((8192, 2))

    def product_sum(x, w):
        return einsum("bti,io->bto", x, w, "bfloat16", "bfloat16").sum()

    y = einsum("bti,io->bto", x, w, "bfloat16", "bfloat16")
    assert y.dtype == jnp.bfloat16
    assert y.tolist() == [[[8192, 8192]]]
    gradient_x, gradient_w = jax.grad(product_sum, (0, 1))(x, w)
    assert (gradient_x.dtype, gradient_w.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("device, dtype", [("cpu", "float32"), ("gpu", "bfloat16")])
def test_what_products_write(monkeypatch, device, dtype):
    """Catches float32 where an accelerator would read half the bytes, and bfloat16 on a CPU, where
    it costs a third of the speed of training."""
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    config = dataclasses.replace(TINY, dtype="bfloat16")
    x = jnp.ones((2, 4, TINY.n_embd))
    qkv = jax.eval_shape(lambda: Block(config).attn.query_key_value(x, jnp.arange(4)))
    hidden = jax.eval_shape(lambda: Block(config).mlp.c_fc(x))
    assert [a.dtype for a in (*qkv, hidden)] == [dtype] * 4


def test_bfloat16_matmuls_have_bfloat16_inputs_both_ways():
    """Catches a backward pass that multiplies float32 cotangents, which is slow and not what is
    stated, or that sums in bfloat16."""
    x = jnp.ones((2, 3, 64))
    w = jnp.full((64, 5), 1 / 3)

    def loss(x, w):
        return (einsum("bti,io->bto", x, w, "bfloat16") ** 2).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    as_stated = r": \(tensor<\S+xbf16>, tensor<\S+xbf16>\) -> tensor<\S+xf32>"
    assert len(dots) == 3
    assert all(re.search(as_stated, dot) for dot in dots), dots
    gradient_x, gradient_w = jax.grad(loss, (0, 1))(x, w)
    assert gradient_x.dtype == gradient_w.dtype == jnp.float32
    expected = jax.grad(lambda w: ((x @ w) ** 2).sum())(w)
    np.testing.assert_allclose(gradient_w, expected, rtol=1e-2)


def greedy_without_cache(gpt, rows, n):
    """Return rows with n more tokens each: what generate must equal, sliding window included."""
    likeliest_next = jax.jit(lambda tokens: gpt(tokens)[0].argmax(-1))
    for _ in range(n):
        contexts = [row[window_start(len(row), TINY.block_size) :] for row in rows]
        padded = np.array([context + [0] * (32 - len(context)) for context in contexts])
        likeliest = likeliest_next(padded)
        new = [int(likeliest[b, len(context) - 1]) for b, context in enumerate(contexts)]
        rows = [row + [token] for row, token in zip(rows, new, strict=True)]
    return rows


def test_the_window_slides_by_half_a_block():
    """Catches a window that slides at a wrong length, by another step, or too far to be read."""
    assert [window_start(n, 32) for n in (1, 32, 33, 48, 49, 64, 65)] == [0, 0, 16, 16, 32, 32, 48]
    assert [window_start(n, 1) for n in (1, 2, 9)] == [0, 1, 8]


def test_greedy_generation_equals_a_loop_without_cache(gpt):
    """Catches a prompt of another length that leaks into its neighbour, a window that slides at the
    wrong token, positions that do not restart with it. 40 tokens pass block_size = 32."""
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], list(range(40))]
    expected = greedy_without_cache(gpt, prompts, 40)
    assert gpt.generate(prompts, 40, temperature=0) == expected
    assert gpt.for_inference().generate(prompts[1:2], 40, temperature=0) == expected[1:2]


def test_sampling_is_a_function_of_seed_and_position(gpt):
    """Catches keys that depend on the batch or on how many tokens one device call makes."""
    prompts = [[1, 2, 3], [4, 5], [1, 2, 3]]
    together = gpt.generate(prompts, 20, seed=7)
    assert together[1] == gpt.generate([[4, 5]], 20, seed=8)[0]
    assert together[0] != together[2], "rows of one call have seeds of their own"
    rows = [list(prompt) for prompt in prompts]
    for burst in gpt.stream(prompts, 20, seed=7, burst=3):
        assert all(len(new) <= 3 for new in burst)
        rows = [row + new for row, new in zip(rows, burst, strict=True)]
    assert rows == together


def test_stop_token_ends_a_row_and_then_the_call(gpt, monkeypatch):
    """Catches a row that goes on after its stop token, and a loop that does not end early, on the
    device or around it."""
    prompts = [[1, 2, 3], [4, 5]]
    endless = gpt.generate(prompts, 30, temperature=0)
    stop = endless[0][8]
    stopped = gpt.generate(prompts, 30, temperature=0, stop_token=stop)
    for prompt, row, endless_row in zip(prompts, stopped, endless, strict=True):
        new = endless_row[len(prompt) :]
        count = new.index(stop) + 1 if stop in new else 30
        assert row == endless_row[: len(prompt) + count]

    steps = []
    decode = generation.decode

    def counting_decode(*args):
        out = decode(*args)
        steps.append(int(out[3]))
        return out

    monkeypatch.setattr(generation, "decode", counting_decode)
    [row] = gpt.generate([[1, 2, 3]], 28, temperature=0, stop_token=stop)
    assert len(row) <= 3 + 9
    assert sum(steps) <= 8
    bursts = list(gpt.stream([[1, 2, 3]], 1000, temperature=0, stop_token=stop, burst=4))
    assert sum(len(new) for [new] in bursts) <= 9


def test_generation_is_one_dispatch_not_one_per_token(gpt, monkeypatch):
    """Catches a Python loop over tokens: 30 tokens take one prefill and one decode call."""
    calls = []

    def recorded(name, function):
        def call(*args):
            calls.append(name)
            return function(*args)

        return call

    for name in ("prefill", "decode"):
        monkeypatch.setattr(generation, name, recorded(name, getattr(generation, name)))
    gpt.generate([[1]], 30)
    assert calls == ["prefill", "decode"]


def test_bad_input_is_a_sentence(gpt):
    """Catches silent garbage: an empty prompt, a token outside the vocabulary, a context longer
    than block_size, a sampling setting without meaning."""
    with pytest.raises(UserError, match="at least one token"):
        gpt.generate([[1], []], 3)
    with pytest.raises(UserError, match="50.*got 0 to 50"):
        gpt.generate([[0, 50]], 3)
    with pytest.raises(UserError, match="top_k=0"):
        gpt.generate([[0]], 3, top_k=0)
    with pytest.raises(UserError, match="temperature=-1"):
        gpt.stream([[0]], 3, temperature=-1)  # at once, not when the first token is asked for
    with pytest.raises(UserError, match="33 tokens.*block_size=32"):
        gpt(jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(UserError, match="n_embd=30.*n_head=4"):
        GPTConfig(n_embd=30, n_head=4)


def test_from_pretrained_loads_an_out_dir(tmp_path):
    """Catches an out_dir of train.py that is taken for a Hugging Face directory, another checkpoint
    than the best, a dtype that is dropped, and other overrides that are."""
    config = TrainConfig(model=TINY, max_iters=10, warmup_iters=1)
    state = TrainState.create(config)
    checkpoints = Checkpoints(tmp_path)
    for step, loss in ((1, 2.0), (2, 3.0)):
        params = jax.tree.map(lambda a, step=step: a + step, state.params)
        checkpoints.save(dataclasses.replace(state, step=state.step + step, params=params), loss)
    checkpoints.close()
    (tmp_path / "config.json").write_text(json.dumps(seal({"model": dataclasses.asdict(TINY)})))
    (tmp_path / "meta.json").write_text(json.dumps(seal(CharTokenizer("ab").meta())))

    model = GPT.from_pretrained(tmp_path, dtype="bfloat16")
    assert model.config == dataclasses.replace(TINY, dtype="bfloat16")
    best = jax.tree.map(lambda a: np.asarray(a + 1), state.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, best, model.params()))
    assert GPT.from_pretrained(str(tmp_path)).config == TINY
    with pytest.raises(UserError, match=r"block_size=9 .*out_dir.*only dtype") as error:
        GPT.from_pretrained(tmp_path, block_size=9)
    assert error.value.param == "block_size"


def test_causal_attention_in_bfloat16_stays_close():
    """Catches scores or softmax in bfloat16: errors would be ten times larger."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 16, 2, 16)) * 3
    exact = causal_attention(q, k, v, "float32")
    rounded = causal_attention(q, k, v, "bfloat16")
    assert 0 < jnp.abs(exact - rounded).max() < 0.1 * jnp.abs(exact).max()


def test_flash_attention_is_causal_attention():
    """Catches another order of axes, another scale or no mask in what cuDNN is asked for, which XLA
    does here."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 9, 4, 8)).astype(np.float32)
    plain = causal_attention(q, k, v, "bfloat16")

    def relative_error(y):
        return float(jnp.linalg.norm(plain - y) / jnp.linalg.norm(plain))

    flash = partial(flash_attention, dtype="bfloat16", implementation="xla")
    assert relative_error(flash(q, k, v)) < 1e-2
    assert relative_error(flash(q, k[:, ::-1], v)) > 0.1


def test_attention_is_chosen_by_what_runs(monkeypatch):
    """Catches a choice that fails, or is not made, where cuDNN does not run, and a demand for it
    that is dropped silently."""
    config = dataclasses.replace(TINY, dtype="bfloat16", dropout=0.0)
    demanded = dataclasses.replace(config, training_attention="cudnn")
    declined = dataclasses.replace(config, training_attention="xla")
    assert choose_attention(config).training_attention == "xla"
    with pytest.raises(UserError, match="cudnn does not work here: it needs an NVIDIA GPU"):
        choose_attention(demanded)
    with pytest.raises(UserError, match="float32 with dropout=0.5"):
        dataclasses.replace(demanded, dtype="float32", dropout=0.5)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_attention(config).training_attention == "xla", "cuDNN was tried in vain"
    monkeypatch.setattr("ops.flash_attention", lambda q, k, v, dtype: q)
    assert choose_attention(config).training_attention == "cudnn"
    assert choose_attention(config, alone=False).training_attention == "xla"
    assert choose_attention(declined).training_attention == "xla"
