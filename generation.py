"""Generation from a dense KV cache: rows of a batch grow together.

Shapes: B batch, T tokens, C n_embd, H heads, D head_dim = C / H, L layers, V padded vocabulary, S cache slots.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from config import GPTConfig
from ops import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Dense keys and values of B rows, with room for S tokens each. Rows may hold different numbers of tokens."""

    k: jax.Array  # (L, B, H, S, D) in the compute dtype; float32 on CPU
    v: jax.Array  # (L, B, H, S, D)
    length: jax.Array  # (B,) int32 tokens held

    @classmethod
    def create(cls, config: GPTConfig, batch: int, slots: int) -> "KVCache":
        """Empty. XLA on CPU converts a whole bfloat16 array to float32 and back to write into it, so there it is float32."""
        shape = (config.n_layer, batch, config.n_head, slots, config.head_dim)
        dtype = "float32" if jax.default_backend() == "cpu" else config.dtype
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def positions(self, T: int) -> jax.Array:
        """(B, T) positions of the next T tokens of each row."""
        return self.length[:, None] + jnp.arange(T)

    def attend(
        self, layer, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, "KVCache"]:
        """Write k, v of T new tokens, then attend q over all that each row holds up to and including itself.

        q, k, v (B, T, H, D); returns (B, T, H, D) float32 and the extended cache. A token past slot S is not written."""
        B, T, H, D = q.shape
        at = self.positions(T)
        # Advanced indices with a slice between them: the indexed shape is (B, T, H, D), as k has it.
        write = lambda pages, new: pages.at[layer, jnp.arange(B)[:, None], :, at].set(
            new.astype(pages.dtype), mode="drop"
        )
        cache = dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))
        dtype = str(self.k.dtype)
        scores = einsum("bthd,bhsd->bhts", q * D**-0.5, cache.k[layer], dtype)
        visible = jnp.arange(self.k.shape[3]) <= at[:, None, :, None]  # (B, 1, T, S)
        probs = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        return einsum("bhts,bhsd->bthd", probs, cache.v[layer], dtype), cache

    def advance(self, T: int) -> "KVCache":
        return dataclasses.replace(self, length=self.length + T)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def window_start(n: int, block_size: int) -> int:
    """Where the context of a row of n tokens starts: at 0 while it fits, then in steps of half a block."""
    step = max(1, block_size // 2)
    return max(0, round_up(n - block_size, step))


class Sampling(NamedTuple):
    temperature: float
    top_k: int | None
    top_p: float


def sample(logits: jax.Array, seeds: jax.Array, positions: jax.Array, how: Sampling) -> jax.Array:
    """logits (B, V), seeds and positions (B,) -> tokens (B,) int32, each drawn with a key that is a function of its own
    (seed, position). Among equals at the edge of top_k or top_p all are kept."""
    if how.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / how.temperature
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, how.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if how.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered)
        kept = jnp.cumsum(probs, -1) - probs < how.top_p  # the token that crosses top_p is kept
        smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(seeds, positions)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 6, 7))
def prefill(graphdef, params, tokens, lengths, positions, seeds, sampling: Sampling, slots: int):
    """Read prompts tokens (B, T), right-padded, of `lengths` (B,), and sample the token that follows each: cache, token (B,)."""
    model = nnx.merge(graphdef, params)
    x, cache = model.hidden(tokens, KVCache.create(model.config, len(tokens), slots))
    # What the padding wrote lies past each row's length: masked, and overwritten as the row grows.
    cache = dataclasses.replace(cache, length=lengths.astype(jnp.int32))
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)  # (B, 1, C)
    return cache, sample(model.logits(last)[:, 0], seeds, positions, sampling)


@partial(jax.jit, static_argnums=(0, 8, 9, 10), donate_argnums=(2,))
def decode(
    graphdef,
    params,
    cache,
    token,
    positions,
    seeds,
    done,
    steps,
    sampling: Sampling,
    stop_token: int | None,
    burst: int,
):
    """Up to `steps` <= burst decoding steps in one device loop, fewer once every row is done. `cache` is donated.

    token, positions (B,): each row's last token and how many tokens it has. Returns cache, token, new tokens (B, burst), steps."""
    model = nnx.merge(graphdef, params)

    def go_on(state):
        i, _, _, _, done = state
        return (i < steps) & ~done.all()

    def step(state):
        i, cache, token, new, done = state
        logits, cache = model(token[:, None], cache)
        token = sample(logits[:, 0], seeds, positions + i, sampling)
        if stop_token is not None:
            done = done | (token == stop_token)
        return i + 1, cache, token, new.at[:, i].set(token), done

    new = jnp.zeros((len(token), burst), jnp.int32)
    steps, cache, token, new, _ = jax.lax.while_loop(go_on, step, (0, cache, token, new, done))
    return cache, token, new, steps
