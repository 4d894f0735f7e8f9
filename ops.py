"""The arithmetic that the model is made of: products, means, dropout and attention, without parameters.

Shapes: B batch, T tokens, C n_embd, H heads, D head_dim = C / H.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from config import GPTConfig
from errors import require

ACTIVATIONS = {
    "gelu_new": partial(jax.nn.gelu, approximate=True),  # GPT-2's, tanh form
    "gelu": partial(jax.nn.gelu, approximate=False),  # exact, by erf
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


# Training keeps the argument alone: 4 bytes a number, where the derivative of gelu_new would keep 20.
ACTIVATIONS = {name: jax.checkpoint(f) for name, f in ACTIVATIONS.items()}


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, a: jax.Array, b: jax.Array, dtype: str) -> jax.Array:
    """jnp.einsum(spec, a, b) with inputs rounded to dtype and summed in float32; returns float32.

    The gradient's two matmuls round their inputs alike: the cotangent is rounded too, where plain JAX would multiply float32 by
    bfloat16. Every index of an operand must occur in the other operand or in the output."""
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _einsum_fwd(spec, a, b, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    return einsum(spec, a, b, dtype), (a, b)


def _einsum_bwd(spec, dtype, inputs, g):
    a, b = inputs
    (a_spec, b_spec), out = spec.split("->")[0].split(","), spec.split("->")[1]
    return einsum(f"{out},{b_spec}->{a_spec}", g, b, dtype), einsum(
        f"{a_spec},{out}->{b_spec}", a, g, dtype
    )


einsum.defvjp(_einsum_fwd, _einsum_bwd)


def mean(x: jax.Array) -> jax.Array:
    """Mean over the last axis: (B, ..., C) -> (B, ..., 1). Few rows are padded, since XLA on CPU sums fewer than 4096 numbers in
    another order: so the bits of a row do not depend on how many there are."""
    B = len(x)
    more = max(0, -(-4096 * B // x.size) - B)
    return jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)).mean(-1, keepdims=True)[:B]


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zero each element of x (B, ...) with probability rate and scale the rest by 1 / (1 - rate); no keys, no dropout
    (Srivastava et al. 2014). Row b is drawn with keys[b]: how rows are spread over devices or pipeline stages changes nothing."""
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dtype: str,
    rate: float = 0.0,
    dropout_keys: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, each position over itself and those before it (Vaswani et al. 2017).

    q, k, v (B, T, H, D); returns (B, T, H, D) float32. Dropout at `rate` on the probabilities."""
    T, D = q.shape[1], q.shape[3]
    q, k, v = (x.swapaxes(1, 2) for x in (q * D**-0.5, k, v))  # (B, H, T, D)
    scores = einsum("bhtd,bhsd->bhts", q, k, dtype)
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
    probs = dropout(jax.nn.softmax(scores), rate, dropout_keys)
    return einsum("bhts,bhsd->bhtd", probs, v, dtype).swapaxes(1, 2)


def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, dtype: str, implementation: str = "cudnn"
) -> jax.Array:
    """causal_attention without its scores in memory (Dao et al. 2022), rounded to dtype: cuDNN's kernel on NVIDIA GPUs."""
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation=implementation
    ).astype(jnp.float32)


def choose_attention(config: GPTConfig, alone: bool = True) -> GPTConfig:
    """config with training_attention="auto" settled: cudnn where it runs, which is tried, forward and backward, else xla.

    alone=False: T is sharded, or the layers run in a pipeline, and cuDNN does not know how. Raises ValueError where cudnn is
    demanded in vain."""
    problem = (
        "it needs bfloat16 and no dropout"
        if config.dtype != "bfloat16" or config.dropout
        else "it needs whole sequences and no pipeline"
        if not alone
        else "it needs an NVIDIA GPU"
        if jax.default_backend() != "gpu"
        else None
    )
    if config.training_attention != "xla" and not problem:
        q = jnp.ones((1, config.block_size, config.n_head, config.head_dim), config.dtype)
        try:
            jax.block_until_ready(
                jax.jit(jax.grad(lambda q: flash_attention(q, q, q, config.dtype).sum()))(q)
            )
        except Exception as e:  # whatever cuDNN, its driver or its version have to say
            problem = repr(e)
    require(
        config.training_attention != "cudnn" or not problem,
        f"training_attention=cudnn does not work here: {problem}",
    )
    if config.training_attention != "auto":
        return config
    return dataclasses.replace(config, training_attention="xla" if problem else "cudnn")
