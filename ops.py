"""The arithmetic that the model is made of: products, means, dropout, attention; no parameters.

Shapes: B batch, T tokens, C n_embd, H heads, KV heads of keys and values, D head_dim.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from config import GPTConfig
from errors import require


def squared_relu(x: jax.Array) -> jax.Array:
    """Return max(x, 0) squared (So et al. 2021)."""
    return jnp.square(jax.nn.relu(x))


def activation(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Return function, computed in float32 and then rounded to its argument's dtype.

    It is checkpointed, so that training keeps the argument alone: 2 or 4 bytes a number, where the
    derivative of gelu_new would keep 20."""

    def in_float32(x: jax.Array) -> jax.Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    return jax.checkpoint(in_float32)


ACTIVATIONS = {
    "gelu_new": activation(partial(jax.nn.gelu, approximate=True)),  # GPT-2's, the tanh form
    "gelu": activation(partial(jax.nn.gelu, approximate=False)),  # exact, by erf
    "relu": activation(jax.nn.relu),
    "relu2": activation(squared_relu),
    "silu": activation(jax.nn.silu),
}

# XLA on CPU sums arrays with fewer numbers than this in another order than larger ones.
SAME_ORDER_SIZE = 4096


SAVEABLE = "saveable"  # the name that saveable() gives


def saveable(x: jax.Array) -> jax.Array:
    """Return x, named as an activation that may be saved for the backward pass.

    The name matters under the policy save_activations, and nowhere else."""
    return checkpoint_name(x, SAVEABLE)


def is_cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of jax.checkpoint: save what cuDNN's attention returns.

    Its gradient reads statistics of the softmax that never leave JAX, so nothing here can name
    them; without them the whole attention would be computed again."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


# A policy of jax.checkpoint for a layer whose weights are gathered from other devices: only what
# saveable() has named is saved for the backward pass, the rest is computed again. So gathered
# weights, their casts and their reshapes are never saved. An activation without a name costs time,
# not correctness: whatever it came from is computed again.
save_activations = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(SAVEABLE), is_cudnn_attention
)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def einsum(
    spec: str, a: jax.Array, b: jax.Array, dtype: str, result_dtype: str = "float32"
) -> jax.Array:
    """Return jnp.einsum(spec, a, b): inputs rounded to dtype, sums in float32, then result_dtype.

    The two products of the gradient round their inputs alike: the cotangent is rounded too, where
    plain JAX would multiply float32 by bfloat16. Each gradient has the dtype of its operand. Every
    index of an operand must occur in the other operand or in the output. The batch is called b: an
    operand without it is a weight."""
    return rounded_einsum(spec, a, b, dtype, result_dtype)


def rounded_einsum(
    spec: str, a: jax.Array, b: jax.Array, dtype: str, result_dtype: str
) -> jax.Array:
    """Return what einsum does, which adds the gradient to it."""
    # By default GPUs and TPUs round float32 inputs to the 10 or 7 bits of their matrix units.
    precision = "highest" if dtype == "float32" else None
    return jnp.einsum(
        spec,
        a.astype(dtype),
        b.astype(dtype),
        precision=precision,
        preferred_element_type=result_dtype,
    )


def _einsum_fwd(
    spec: str, a: jax.Array, b: jax.Array, dtype: str, result_dtype: str
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    a_spec, b_spec = spec.split("->")[0].split(",")
    of_gradients = jnp.zeros(0, a.dtype), jnp.zeros(0, b.dtype)  # their dtypes, no numbers
    a = round_operand(a, a_spec, dtype)
    b = round_operand(b, b_spec, dtype)
    return rounded_einsum(spec, a, b, dtype, result_dtype), (a, b, *of_gradients)


def round_operand(x: jax.Array, spec: str, dtype: str) -> jax.Array:
    """Return an operand of einsum rounded to dtype, saveable if it is no weight."""
    x = x.astype(dtype)
    return saveable(x) if "b" in spec else x


def _einsum_bwd(
    spec: str,
    dtype: str,
    result_dtype: str,
    residuals: tuple[jax.Array, ...],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    a, b, like_a, like_b = residuals
    operands, out = spec.split("->")
    a_spec, b_spec = operands.split(",")
    grad_a = rounded_einsum(f"{out},{b_spec}->{a_spec}", cotangent, b, dtype, like_a.dtype.name)
    grad_b = rounded_einsum(f"{a_spec},{out}->{b_spec}", a, cotangent, dtype, like_b.dtype.name)
    return grad_a, grad_b


einsum.defvjp(_einsum_fwd, _einsum_bwd)


def kept_dtype(dtype: str) -> str:
    """Return what activations are stored in between products that round them to dtype.

    That is dtype, but on a CPU float32: XLA there computes bfloat16 in float32, and a step of
    training takes a third longer if every result is rounded and widened again."""
    return "float32" if jax.default_backend() == "cpu" else dtype


def head_logits(x: jax.Array, head: jax.Array, config: GPTConfig) -> jax.Array:
    """Return the logits (B, T, V) float32 of x (B, T, C), given the head's matrix (V, C).

    The padding of the vocabulary is -inf, so it has no probability anywhere. It is made so by a
    sum: matrix products of GPUs add a row to their result at no cost."""
    logits = einsum("btc,vc->btv", x.astype(kept_dtype(config.dtype)), head, config.dtype)
    V = config.padded_vocab_size
    if V == config.vocab_size:
        return logits
    return logits + jnp.where(jnp.arange(V) < config.vocab_size, 0.0, -jnp.inf)


def mean(x: jax.Array) -> jax.Array:
    """Return the mean over the last axis: (B, ..., C) -> (B, ..., 1).

    On a CPU few rows are padded to SAME_ORDER_SIZE numbers, so that the order of a row's sum, and
    with it its bits, does not depend on how many rows there are."""
    if jax.default_backend() != "cpu":
        return x.mean(-1, keepdims=True)
    B = len(x)
    rows_for_same_order = -(-SAME_ORDER_SIZE * B // x.size)
    missing = max(0, rows_for_same_order - B)
    padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return padded.mean(-1, keepdims=True)[:B]


def split_into_chunks(
    a: jax.Array, *, chunks: int, row_shards: int, position_shards: int
) -> jax.Array:
    """(B, T, ...) -> (chunks, R K, B / R, T / K / chunks, ...) for R row and K position shards.

    Every chunks-th position makes a chunk, so that each chunk has its part of every shard."""
    R, K = row_shards, position_shards
    B, T, *rest = a.shape
    a = a.reshape(R, B // R, K, T // K // chunks, chunks, *rest)
    a = jnp.moveaxis(a, (4, 2), (0, 2))  # (chunks, R, K, B / R, T / K / chunks, ...)
    return a.reshape(chunks, R * K, B // R, T // K // chunks, *rest)


def split_keys(keys: jax.Array | None, n: int) -> tuple[jax.Array | None, ...]:
    """Split each row's key (B,) into n: n arrays of keys (B,), or n times None without keys."""
    if keys is None:
        return (None,) * n
    return tuple(jax.vmap(partial(jax.random.split, num=n))(keys).T)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zero each element of x (B, ...) with probability rate and scale the rest by 1 / (1 - rate).

    Without keys there is no dropout (Srivastava et al. 2014). Row b is drawn with keys[b]: how rows
    are spread over devices or pipeline stages changes nothing."""
    if keys is None or rate == 0:
        return x

    def draw_row(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 1 - rate, x.shape[1:])

    mask = saveable(jax.vmap(draw_row)(keys))
    return jnp.where(mask, x / (1 - rate), 0)


def rotary_frequencies(config: GPTConfig) -> np.ndarray:
    """Return the angle, in radians, by which each pair of a head turns from a position to the next.

    (D / 2,) float32. rope_scaling slows the slow ones down, see RopeScaling."""
    D = config.head_dim
    frequencies = config.rope_theta ** (-np.arange(0, D, 2) / D)  # float64
    scaling = config.rope_scaling
    if scaling is not None:
        waves = frequencies * scaling.original_max_position_embeddings / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((waves - low) / (high - low), 0, 1)  # 1 where waves are short
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, config: GPTConfig) -> jax.Array:
    """Turn queries or keys x (B, T, H, D) by their positions (B, T) or (T,), in float32.

    Number i of a head makes a pair with number i + D / 2, as Hugging Face has it, not with its
    neighbour. Su et al. 2021."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config)
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]  # (..., T, 1, D / 2)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def fold_groups(q: jax.Array, kv_heads: int) -> jax.Array:
    """(B, T, H, D) -> (B, T G, KV, D): the G = H / KV heads that read one head of keys, in turn.

    Head h reads the keys of head h // G. So attention has as many heads of queries as of keys, and
    G queries at each position; with G = 1 nothing changes."""
    B, T, H, D = q.shape
    by_group = q.reshape(B, T, kv_heads, H // kv_heads, D).swapaxes(2, 3)
    return by_group.reshape(B, -1, kv_heads, D)


def unfold_groups(y: jax.Array, T: int) -> jax.Array:
    """(B, T G, KV, D) -> (B, T, H, D): undo fold_groups."""
    B, rows, kv_heads, D = y.shape
    by_group = y.reshape(B, T, rows // T, kv_heads, D).swapaxes(2, 3)
    return by_group.reshape(B, T, -1, D)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dtype: str,
    rate: float = 0.0,
    dropout_keys: jax.Array | None = None,
) -> jax.Array:
    """Return softmax(q k^T / sqrt(D)) v, each position over itself and those before it.

    q (B, T, H, D), k and v (B, T, KV, D); returns (B, T, H, D) float32. Dropout at `rate` on the
    probabilities, with keys (B,). Vaswani et al. 2017; fewer heads of keys: Ainslie et al. 2023."""
    T, D = q.shape[1], q.shape[3]
    q = fold_groups(q.astype(jnp.float32) * D**-0.5, k.shape[2])  # (B, T G, KV, D)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (B, KV, T, D), of q T G
    scores = einsum("bhtd,bhsd->bhts", q, k, dtype)
    visible = jnp.repeat(jnp.tril(jnp.ones((T, T), bool)), q.shape[2] // T, axis=0)  # (T G, T)
    scores = jnp.where(visible, scores, -jnp.inf)
    probs = dropout(jax.nn.softmax(saveable(scores)), rate, dropout_keys)
    return unfold_groups(einsum("bhts,bhsd->bhtd", probs, v, dtype).swapaxes(1, 2), T)


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dtype: str,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Return causal_attention in dtype, without its scores in memory (Dao et al. 2022).

    q (B, T, H, D), k and v (B, T, KV, D); returns (B, T, H, D). cuDNN's kernel runs on NVIDIA GPUs
    only."""
    q, k, v = (saveable(x.astype(dtype)) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def choose_attention(config: GPTConfig, alone: bool = True) -> GPTConfig:
    """Return config with training_attention="auto" settled: cudnn where it runs, else xla.

    alone=False says that T is sharded, or that the layers run in a pipeline; cuDNN knows neither.
    Raises UserError where cudnn is demanded in vain."""
    if config.training_attention == "xla":
        return config
    problem = problem_with_cudnn(config, alone)
    require(
        config.training_attention != "cudnn" or problem is None,
        f"training_attention=cudnn does not work here: {problem}",
        param="training_attention",
    )
    return dataclasses.replace(config, training_attention="cudnn" if problem is None else "xla")


def problem_with_cudnn(config: GPTConfig, alone: bool) -> str | None:
    """Say why flash_attention cannot train this model here; None if it can, which is tried."""
    if config.dtype != "bfloat16" or config.dropout > 0:
        return "it needs bfloat16 and no dropout"
    if not alone:
        return "it needs whole sequences and no pipeline"
    if jax.default_backend() != "gpu":
        return "it needs an NVIDIA GPU"

    def attention_sum(q: jax.Array, k: jax.Array) -> jax.Array:
        return flash_attention(q, k, k, config.dtype).sum()

    T, D = config.block_size, config.head_dim
    q = jnp.ones((1, T, config.n_head, D), config.dtype)
    k = jnp.ones((1, T, config.kv_heads, D), config.dtype)
    try:
        jax.block_until_ready(jax.jit(jax.grad(attention_sum, (0, 1)))(q, k))
    except Exception as error:  # whatever cuDNN, its driver or its version have to say
        return repr(error)
    return None
