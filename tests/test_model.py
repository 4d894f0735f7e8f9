"""Properties of the GPT that plausible bugs break, on tiny models in float32 unless it says otherwise."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import model as model_module
from config import GPTConfig
from generation import KVCache, Sampling, sample, window_start
from model import GPT, MLP, CausalSelfAttention, LayerNorm
from ops import (
    ACTIVATIONS,
    causal_attention,
    choose_attention,
    dropout,
    einsum,
    flash_attention,
)

TINY = GPTConfig(block_size=32, vocab_size=50, n_layer=3, n_head=2, n_embd=32)


def init(config: GPTConfig) -> dict:
    """Parameters as a fresh GPT has them; jitted, because one operation after the other compiles slowly."""
    return jax.jit(lambda: GPT(config, rngs=nnx.Rngs(0)).params())()


@pytest.fixture(scope="module")
def gpt() -> GPT:
    """A tiny GPT with parameters large enough that every part of it matters to the logits."""
    rng = np.random.default_rng(1)
    noisy = lambda a: a + 0.2 * rng.normal(size=a.shape).astype(np.float32)
    return GPT.from_params(TINY, jax.tree.map(noisy, init(TINY)))


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(2), (2, 32), 0, TINY.vocab_size)


def test_layer_norm_is_exact_and_stable():
    """Catches E[x^2] - E[x]^2 (catastrophic for a large mean), a missing epsilon, a scale or bias left out."""
    x = np.random.default_rng(0).normal(size=(4, 32)) + 1000.0
    norm = LayerNorm(dataclasses.replace(TINY, layer_norm_epsilon=0.1))
    norm.scale[...], norm.bias[...] = jnp.arange(32.0), jnp.ones(32)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * np.arange(
        32
    ) + 1
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), want, atol=5e-3)
    assert np.isfinite(norm(jnp.full((1, 32), 7.0))).all()
    assert LayerNorm(dataclasses.replace(TINY, bias=False)).bias is None


@pytest.mark.parametrize("n_embd", [64, 256, 768])
def test_the_bits_of_a_norm_do_not_depend_on_how_many_rows_there_are(n_embd):
    """Catches sums that XLA orders by the size of the array: then a request's numbers depend on who else is served."""
    norm = jax.jit(LayerNorm(dataclasses.replace(TINY, n_embd=n_embd)))
    x = jax.random.normal(jax.random.key(0), (128, 1, n_embd))
    together = np.asarray(norm(x))
    for rows in (1, 2, 8, 32):
        few = np.concatenate([norm(x[i : i + rows]) for i in range(0, 128, rows)])
        np.testing.assert_array_equal(few, together, err_msg=f"{rows} rows")


def test_mlp_and_attention_against_numpy():
    """Catches a transposed kernel, a wrong activation, heads split along the wrong axis, a wrong scale, a mask off by one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 32))
    mlp, attention = MLP(TINY), CausalSelfAttention(TINY)
    for linear in (mlp.c_fc, mlp.c_proj, attention.c_attn, attention.c_proj):
        linear.kernel[...] = jnp.asarray(rng.normal(size=linear.kernel.shape) * 0.3, jnp.float32)
        linear.bias[...] = jnp.asarray(rng.normal(size=linear.bias.shape), jnp.float32)
    w = lambda linear: (
        np.asarray(linear.kernel[...], np.float64),
        np.asarray(linear.bias[...], np.float64),
    )
    apply = lambda x, linear: x @ w(linear)[0] + w(linear)[1]
    hidden = apply(x, mlp.c_fc)
    gelu = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    np.testing.assert_allclose(
        mlp(jnp.asarray(x, jnp.float32)), apply(gelu, mlp.c_proj), rtol=1e-4, atol=1e-4
    )

    qkv = apply(x, attention.c_attn)
    out = np.zeros((2, 5, 32))
    for b in range(2):
        for h in range(2):
            q, k, v = (qkv[b, :, i * 32 + h * 16 : i * 32 + (h + 1) * 16] for i in range(3))
            for t in range(5):
                p = np.exp(q[t] @ k[: t + 1].T / math.sqrt(16))
                out[b, t, h * 16 : (h + 1) * 16] = p / p.sum() @ v[: t + 1]
    y, cache = attention(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, apply(out, attention.c_proj), rtol=1e-4, atol=1e-4)
    assert cache is None


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activation_keeps_one_array_for_its_derivative(name):
    """Catches: several arrays of 4 C for each token and layer, which are most of what training holds."""
    kept = jax.eval_shape(lambda x: jax.vjp(ACTIVATIONS[name], x)[1], jnp.zeros(1000))
    assert sum(a.size for a in jax.tree.leaves(kept) if a.shape) == 1000


def test_blocks_are_stacked_and_each_its_own():
    """Catches nnx.vmap without split keys: L identical layers."""
    kernel = init(TINY)["h"]["attn"]["c_attn"]["kernel"]
    assert kernel.shape == (3, 32, 96)
    assert not np.array_equal(kernel[0], kernel[1])


def test_initialisation_goes_by_path():
    """Catches a residual projection that is not scaled by 1/sqrt(2 L), a bias or scale hit by the rank rule "2-D is a
    matrix" (stacked biases are 2-D), and a vocabulary padding that is not zero."""
    config = dataclasses.replace(TINY, n_embd=256, n_layer=8)
    params = init(config)
    for path, a in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = ".".join(p.key for p in path)
        if name.endswith("bias"):
            assert not a.any(), name
        elif name.endswith("scale"):
            assert (a == 1).all(), name
        elif name == "wte.embedding":
            assert not a[50:].any()
            assert abs(a[:50].std() / 0.02 - 1) < 0.05
        else:
            want = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert abs(a.std() / want - 1) < 0.05 and abs(a.mean()) < want / 10, name


@pytest.mark.parametrize("vocab_size", [65, 5000])
def test_untrained_loss_is_that_of_a_uniform_guess(vocab_size):
    """Catches a wrong initialisation, targets not shifted, probability on the vocabulary's padding."""
    config = dataclasses.replace(TINY, vocab_size=vocab_size)
    tokens = np.random.default_rng(0).integers(vocab_size, size=(16, 33))
    loss = jax.jit(GPT.from_params(config, init(config)).loss)(tokens[:, :-1], tokens[:, 1:])
    assert abs(float(loss) - math.log(vocab_size)) < 0.05


def test_a_logit_does_not_feel_later_tokens(gpt, tokens):
    """Causality as a gradient property: catches a mask off by one, or absent, or applied after softmax."""
    embeddings = gpt.wte(tokens[:1])

    def logit_sum(embeddings, t):
        x, _ = gpt.blocks(embeddings + gpt.wpe(jnp.arange(32)))
        return gpt.logits(gpt.ln_f(x))[0, t, :50].sum()

    gradient = jax.jit(jax.grad(logit_sum))
    for t in (0, 5, 30):
        size = jnp.abs(gradient(embeddings, t)[0]).sum(-1)
        assert (size[t + 1 :] == 0).all() and (size[: t + 1] > 0).all()


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 17])
def test_cached_equals_full(gpt, tokens, chunk, unstacked):
    """Catches a cache slot off by one, a layer that writes another's slots, wrong positions, a mask blind to the chunk; and,
    unstacked, layers in another order."""
    full, none = gpt(tokens)
    assert none is None and full.shape == (2, 32, 64)
    step = jax.jit(lambda tokens, cache: (gpt.for_inference() if unstacked else gpt)(tokens, cache))
    cache, parts = KVCache.create(TINY, 2, 32), []
    for i in range(0, 32, chunk):
        logits, cache = step(tokens[:, i : i + chunk], cache)
        parts.append(logits)
    cached = jnp.concatenate(parts, axis=1)
    assert np.abs(cached - full)[..., :50].max() < 1e-4
    assert (cached.argmax(-1) == full.argmax(-1)).all()
    assert (cache.length == 32).all()


def test_rows_of_a_cache_are_independent(gpt, tokens):
    """Catches one length for all rows: two rows that hold 5 and 11 tokens continue as each does alone."""
    full, _ = gpt(tokens)
    cache = KVCache.create(TINY, 2, 32)
    _, cache = gpt(tokens[:, :11], cache)
    cache = dataclasses.replace(cache, length=jnp.array([5, 11]))  # row 0 forgets 6 tokens
    logits, _ = gpt(jnp.stack([tokens[0, 5:9], tokens[1, 11:15]]), cache)
    np.testing.assert_allclose(
        logits[..., :50], jnp.stack([full[0, 5:9], full[1, 11:15]])[..., :50], atol=1e-4
    )


def test_padded_vocabulary_has_no_probability(gpt, tokens):
    """Catches padding columns that take part in softmax, sampling or argmax."""
    logits, _ = gpt(tokens)
    assert (logits[..., 50:] == -jnp.inf).all() and jnp.isfinite(logits[..., :50]).all()
    assert max(max(row) for row in gpt.generate([[1]] * 64, 30, temperature=100.0)) < 50


def test_dropout_comes_from_the_key():
    """Catches a key that is not used, dropout without a key, and a missing 1/(1-p)."""
    config = dataclasses.replace(TINY, dropout=0.5, n_layer=2)
    model, tokens = GPT.from_params(config, init(config)), jnp.zeros((1, 8), jnp.int32)
    out = jax.jit(lambda key: model(tokens, dropout_key=key)[0][..., :50])
    a, b = jax.random.key(1), jax.random.key(2)
    assert (out(a) == out(a)).all() and (out(a) != out(b)).any() and (out(a) != out(None)).any()

    ones = jnp.ones((200, 200))
    dropped = dropout(ones, 0.25, jax.random.split(a, 200))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)} and abs(dropped.mean() - 1) < 0.02
    assert (dropout(ones, 0.25, None) == 1).all()


def test_layers_of_a_scan_drop_differently():
    """Catches dropout under scan that repeats one mask in every layer: blocks that add nothing but dropout(1) must disagree."""
    config = dataclasses.replace(TINY, dropout=0.5, n_layer=2)
    params = jax.tree.map(jnp.zeros_like, init(config))
    params["h"]["mlp"]["c_proj"]["bias"] += 1.0  # each block adds dropout(1): 0 or 2
    x, _ = GPT.from_params(config, params).blocks(
        jnp.zeros((4, 32, 32)), dropout_key=jax.random.key(0)
    )
    counts = {value: float((x == value).mean()) for value in (0.0, 2.0, 4.0)}
    assert abs(counts[2.0] - 0.5) < 0.05, f"equal masks would give 0 or 4 only: {counts}"


def test_chunked_loss_equals_plain(gpt, tokens):
    """Catches a chunk weighted wrongly, positions permuted by the split, a gradient lost in the checkpointed map; and that
    targets of -1 do not count."""
    targets = jnp.roll(tokens, 1, axis=1).at[0, :7].set(-1)
    graphdef, params = nnx.split(gpt)
    loss = lambda params, chunks: nnx.merge(graphdef, params).loss(tokens, targets, chunks=chunks)
    loss_and_grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (plain, grads), (chunked, chunked_grads) = loss_and_grads(params, 1), loss_and_grads(params, 8)
    assert abs(plain - chunked) < 1e-6 * abs(plain)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(chunked_grads)):
        assert np.abs(a - b).max() <= 1e-6 * max(1, np.abs(a).max())
    logits = np.asarray(gpt(tokens)[0], np.float64)[..., :50]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(logp, np.maximum(targets, 0)[..., None], -1)[..., 0][
        np.asarray(targets) >= 0
    ].mean()
    assert abs(plain - want) < 1e-5


def test_chunked_loss_never_holds_all_logits():
    """Catches a chunked loss whose backward pass stores every chunk's logits after all."""
    config = dataclasses.replace(TINY, vocab_size=8192, block_size=256, n_layer=1)
    shapes = jax.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)).params())
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)

    def temporary_bytes(chunks):
        loss = lambda params, tokens: GPT.from_params(config, params).loss(
            tokens, tokens, chunks=chunks
        )
        return (
            jax.jit(jax.grad(loss))
            .lower(shapes, tokens)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    all_logits = 4 * 256 * 8192 * 4
    assert temporary_bytes(16) < all_logits / 2 < all_logits < temporary_bytes(1)


@pytest.mark.parametrize("change", [{"remat": True}, {"scan_unroll": 3}])
def test_how_it_computes_does_not_change_what(gpt, tokens, change):
    """Catches remat or unrolling that drops a layer or its dropout key."""

    def gradient(config):
        loss = lambda params: GPT.from_params(config, params).loss(
            tokens, tokens, dropout_key=jax.random.key(3)
        )
        return jax.jit(jax.grad(loss))(gpt.params())

    config = dataclasses.replace(TINY, dropout=0.3)
    for a, b in zip(
        jax.tree.leaves(gradient(config)),
        jax.tree.leaves(gradient(dataclasses.replace(config, **change))),
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_bfloat16_matmuls_have_bfloat16_inputs_both_ways():
    """Catches a backward pass that multiplies float32 cotangents (slow, and not what is stated) or sums in bfloat16."""
    x, w = jnp.ones((2, 3, 64)), jnp.full((64, 5), 1 / 3)
    loss = lambda x, w: (einsum("bti,io->bto", x, w, "bfloat16") ** 2).sum()
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 3 and all(
        re.search(r": \(tensor<\S+xbf16>, tensor<\S+xbf16>\) -> tensor<\S+xf32>", d) for d in dots
    ), dots
    gx, gw = jax.grad(loss, (0, 1))(x, w)
    assert gx.dtype == gw.dtype == jnp.float32
    np.testing.assert_allclose(gw, jax.grad(lambda w: ((x @ w) ** 2).sum())(w), rtol=1e-2)


def naive_generate(gpt, rows, n):
    """Greedy, without a cache: what generate must equal, its sliding window included."""
    forward = jax.jit(lambda tokens: gpt(tokens)[0].argmax(-1))
    for _ in range(n):
        contexts = [row[window_start(len(row), TINY.block_size) :] for row in rows]
        likeliest = forward(np.array([c + [0] * (32 - len(c)) for c in contexts]))
        rows = [
            row + [int(likeliest[b, len(c) - 1])] for b, (row, c) in enumerate(zip(rows, contexts))
        ]
    return rows


def test_the_window_slides_by_half_a_block():
    """Catches a window that slides at the wrong length, by another step, or past what the model can read."""
    assert [window_start(n, 32) for n in (1, 32, 33, 48, 49, 64, 65)] == [0, 0, 16, 16, 32, 32, 48]
    assert [window_start(n, 1) for n in (1, 2, 9)] == [0, 1, 8]


def test_greedy_generation_equals_a_loop_without_cache(gpt):
    """Catches a prompt of another length that leaks into its neighbour, a window that slides at the wrong token, positions
    that do not restart with it. 40 tokens pass block_size = 32."""
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], list(range(40))]
    want = naive_generate(gpt, prompts, 40)
    assert gpt.generate(prompts, 40, temperature=0) == want
    assert gpt.for_inference().generate(prompts[1:2], 40, temperature=0) == want[1:2]


def test_sampling_is_a_function_of_seed_and_position(gpt):
    """Catches keys that depend on the batch or on how many tokens one device call makes."""
    prompts = [[1, 2, 3], [4, 5], [1, 2, 3]]
    together = gpt.generate(prompts, 20, seed=7)
    assert together[1] == gpt.generate([[4, 5]], 20, seed=8)[0]
    assert together[0] != together[2], "rows of one call have seeds of their own"
    rows = [list(p) for p in prompts]
    for burst in gpt.stream(prompts, 20, seed=7, burst=3):
        assert all(len(new) <= 3 for new in burst)
        rows = [row + new for row, new in zip(rows, burst)]
    assert rows == together


def test_stop_token_ends_a_row_and_then_the_call(gpt, monkeypatch):
    """Catches a row that goes on after its stop token, and a loop that does not end early, on the device or around it."""
    prompts = [[1, 2, 3], [4, 5]]
    free = gpt.generate(prompts, 30, temperature=0)
    stop = free[0][8]
    rows = gpt.generate(prompts, 30, temperature=0, stop_token=stop)
    for row, want, prompt in zip(rows, free, prompts):
        new = want[len(prompt) :]
        end = new.index(stop) + 1 if stop in new else 30
        assert row == want[: len(prompt) + end]
    steps, decode = [], model_module.decode
    monkeypatch.setattr(
        model_module, "decode", lambda *a: (out := decode(*a), steps.append(int(out[3])))[0]
    )
    assert (
        len(gpt.generate([[1, 2, 3]], 28, temperature=0, stop_token=stop)[0]) <= 3 + 9
        and sum(steps) <= 8
    )
    bursts = list(gpt.stream([[1, 2, 3]], 1000, temperature=0, stop_token=stop, burst=4))
    assert sum(len(b[0]) for b in bursts) <= 9


def test_top_k_and_top_p_keep_the_right_tokens():
    """Catches top_p that drops the token that crosses p, or keeps one too many; top_k off by one; temperature after top_p."""
    probs = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625 - 1e-4, 1e-4])
    logits = jnp.tile(jnp.log(jnp.asarray(probs, jnp.float32)), (4000, 1))
    n = jnp.arange(4000)
    draw = lambda t, k, p: np.asarray(
        sample(logits, jnp.zeros(4000, jnp.uint32), n, Sampling(t, k, p))
    )
    assert set(draw(1.0, 2, 1.0)) == {0, 1}
    assert set(draw(1.0, None, 0.6)) == {0, 1} and set(draw(1.0, None, 0.49)) == {0}
    assert set(draw(1.0, None, 0.76)) == {0, 1, 2}
    assert set(draw(0.5, None, 0.72)) == {0}, "at temperature 0.5 the first token has 0.75"
    assert (draw(0, None, 1.0) == 0).all()
    counts = np.bincount(draw(1.0, None, 1.0), minlength=6) / 4000
    assert np.abs(counts - probs).max() < 0.03


def test_bad_input_is_a_sentence(gpt):
    """Catches silent garbage: an empty prompt, a token outside the vocabulary, a context longer than block_size."""
    with pytest.raises(ValueError, match="at least one token"):
        gpt.generate([[1], []], 3)
    with pytest.raises(ValueError, match="50.*got 0 to 50"):
        gpt.generate([[0, 50]], 3)
    with pytest.raises(ValueError, match="33 tokens.*block_size=32"):
        gpt(jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(ValueError, match="n_embd=30.*n_head=4"):
        GPTConfig(n_embd=30, n_head=4)


def test_generation_is_one_dispatch_not_one_per_token(gpt, monkeypatch):
    """Catches a Python loop over tokens: 30 tokens take one prefill and one decode call."""
    calls = []
    for name in ("prefill", "decode"):
        inner = getattr(model_module, name)
        monkeypatch.setattr(
            model_module, name, lambda *a, inner=inner, name=name: calls.append(name) or inner(*a)
        )
    gpt.generate([[1]], 30)
    assert calls == ["prefill", "decode"]


def test_causal_attention_in_bfloat16_stays_close():
    """Catches scores or softmax in bfloat16: errors would be ten times larger."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 16, 2, 16)) * 3
    a, b = causal_attention(q, k, v, "float32"), causal_attention(q, k, v, "bfloat16")
    assert 0 < jnp.abs(a - b).max() < 0.1 * jnp.abs(a).max()


def test_flash_attention_is_causal_attention():
    """Catches another order of axes, another scale or no mask in what cuDNN is asked for (XLA does it here)."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 9, 4, 8)).astype(np.float32)
    a, b = (
        causal_attention(q, k, v, "bfloat16"),
        flash_attention(q, k, v, "bfloat16", implementation="xla"),
    )
    assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) < 1e-2
    c = flash_attention(q, k[:, ::-1], v, "bfloat16", implementation="xla")
    assert float(jnp.linalg.norm(a - c) / jnp.linalg.norm(a)) > 0.1


def test_attention_is_chosen_by_what_runs(monkeypatch):
    """Catches a choice that fails, or is not made, where cuDNN does not run, and a demand for it that is dropped silently."""
    config = dataclasses.replace(TINY, dtype="bfloat16", dropout=0.0)
    assert choose_attention(config).training_attention == "xla"
    with pytest.raises(
        ValueError, match="training_attention=cudnn does not work here: it needs an NVIDIA GPU"
    ):
        choose_attention(dataclasses.replace(config, training_attention="cudnn"))
    with pytest.raises(ValueError, match="float32 with dropout=0.5"):
        dataclasses.replace(config, training_attention="cudnn", dtype="float32", dropout=0.5)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_attention(config).training_attention == "xla", "cuDNN was tried in vain"
    monkeypatch.setattr("model.flash_attention", lambda q, k, v, dtype: q)
    assert choose_attention(config).training_attention == "cudnn"
    assert choose_attention(config, alone=False).training_attention == "xla"
    assert (
        choose_attention(dataclasses.replace(config, training_attention="xla")).training_attention
        == "xla"
    )
