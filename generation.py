"""Generation from a dense KV cache: the rows of a batch grow together, in a few device calls.

Start with `Generation.advance`, which is behind GPT.stream and GPT.generate; `prefill` and `decode`
are what it runs on the device. The engine (engine.py) is the other way to generate: it serves many
requests that come and go. Both draw tokens with sampling.draw.

Shapes: B batch, T tokens, C n_embd, H heads, KV heads of keys and values, D head_dim, L layers, V
padded vocabulary, S cache slots.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from config import GPTConfig
from errors import require
from ops import einsum, fold_groups, unfold_groups
from sampling import draw, draw_settings, seed_words
from sequence import SamplingParams

# Prompt lengths and cache slots are rounded up to a multiple of this: few shapes, few compilations.
LENGTH_MULTIPLE = 64


class Cache(Protocol):
    """Keys and values of the tokens that each row has so far, for all layers.

    KVCache is dense, paged_attention.PagedKVCache is paged. The forward pass does not
    know which of them it holds."""

    def positions(self, T: int) -> jax.Array:
        """Return the positions (B, T) of the next T tokens of each row."""

    def attend(
        self, layer: int | jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, "Cache"]:
        """Store k, v (B, T, KV, D) of one layer, and attend q to all that it holds.

        Head h of q (B, T, H, D) reads head h // G of the keys. Returns (B, T, H, D)."""

    def advance(self, T: int) -> "Cache":
        """Count T more tokens, which every layer has stored."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Dense keys and values of B rows, S slots each. Rows may hold different numbers of tokens.

    Tokens that `attend` writes count once `advance` has been called, after the last layer."""

    k: jax.Array  # (L, B, KV, S, D) in the compute dtype; float32 on CPU
    v: jax.Array  # (L, B, KV, S, D), of the same dtype
    length: jax.Array  # (B,) int32 tokens held

    @classmethod
    def create(cls, config: GPTConfig, batch: int, slots: int) -> "KVCache":
        """Return an empty cache for `batch` rows of at most `slots` tokens.

        XLA on CPU converts a whole bfloat16 array to float32 and back to write into it, so there
        the cache is float32."""
        shape = (config.n_layer, batch, config.kv_heads, slots, config.head_dim)
        dtype = "float32" if jax.default_backend() == "cpu" else config.dtype
        return cls(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            length=jnp.zeros(batch, jnp.int32),
        )

    def positions(self, T: int) -> jax.Array:
        """Return the positions (B, T) of the next T tokens of each row."""
        return self.length[:, None] + jnp.arange(T)

    def attend(
        self, layer: int | jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, "KVCache"]:
        """Write k, v of T new tokens; then attend q over what each row holds, itself included.

        A query sees no later token. A token past slot S is not written. q (B, T, H, D), k and v
        (B, T, KV, D); returns (B, T, H, D) float32 and the extended cache."""
        B, T, H, D = q.shape
        KV = k.shape[2]
        at = self.positions(T)

        def write(slots: jax.Array, new: jax.Array) -> jax.Array:
            # A slice between advanced indices: the indexed shape is (B, T, KV, D), as new has it.
            where = slots.at[layer, jnp.arange(B)[:, None], :, at]
            return where.set(new.astype(slots.dtype), mode="drop")

        cache = dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v))
        dtype = str(self.k.dtype)
        q = fold_groups(q.astype(jnp.float32) * D**-0.5, KV)  # (B, T G, KV, D)
        scores = einsum("bthd,bhsd->bhts", q, cache.k[layer], dtype)
        last_seen = jnp.repeat(at, H // KV, axis=1)[:, None, :, None]  # (B, 1, T G, 1)
        visible = jnp.arange(self.k.shape[3]) <= last_seen
        probs = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        return unfold_groups(einsum("bhts,bhsd->bthd", probs, cache.v[layer], dtype), T), cache

    def advance(self, T: int) -> "KVCache":
        """Count the T tokens that every layer has written."""
        return dataclasses.replace(self, length=self.length + T)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the rows of a batch are sampled, as arguments of sampling.draw.

    All are arrays, so that no other temperature, top_k or top_p compiles anything again."""

    seed: jax.Array  # (B, 2) uint32
    settings: dict[str, jax.Array]  # of sampling.draw_settings, (B,) each
    draws: jax.Array  # () bool
    restricts: jax.Array  # () bool

    @classmethod
    def create(cls, params: SamplingParams, seed: int, rows: int, vocab_size: int) -> "Sampling":
        """Return what params say of the draw for each of `rows` rows.

        Row b has the seed `seed + b`: so it gives the tokens that an engine gives a request with
        that seed."""
        settings = draw_settings(params, vocab_size)
        return cls(
            seed=jnp.array([seed_words(seed + b) for b in range(rows)]),
            settings={name: jnp.full(rows, value) for name, value in settings.items()},
            draws=jnp.array(params.temperature > 0),
            restricts=jnp.array(params.restricts),
        )

    def draw(self, logits: jax.Array, position: jax.Array) -> jax.Array:
        """Draw the token that each row gets at position (B,), from logits (B, V): (B,) int32."""
        return draw(
            logits,
            self.seed,
            jnp.zeros_like(position),  # each row is the first sample of its seed
            position,
            draws=self.draws,
            restricts=self.restricts,
            is_native=False,
            **self.settings,
        )


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


def window_start(n: int, block_size: int) -> int:
    """Return where the context of a row of n tokens starts: at 0 while it fits, then in steps of
    half a block."""
    step = max(1, block_size // 2)
    return max(0, round_up(n - block_size, step))


def lengths_of(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return how many tokens each row has: (B,) int32."""
    return np.array([len(row) for row in rows], np.int32)


@partial(jax.jit, static_argnames=("graphdef", "slots"))
def prefill(
    graphdef: nnx.GraphDef,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    positions: jax.Array,
    sampling: Sampling,
    slots: int,
) -> tuple[KVCache, jax.Array]:
    """Read the rows' contexts and sample the token that follows each.

    tokens (B, T) int32, right-padded; lengths (B,), how many of them are the row's context;
    positions (B,), how many tokens the row has, those before its context included. Returns the
    cache, of `slots` slots, and the tokens (B,)."""
    model = nnx.merge(graphdef, params)
    x, cache = model.hidden(tokens, KVCache.create(model.config, len(tokens), slots))
    # What the padding wrote lies past each row's length: masked, and overwritten as the row grows.
    cache = dataclasses.replace(cache, length=lengths)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)  # (B, 1, C)
    return cache, sampling.draw(model.logits(last)[:, 0], positions)


@partial(jax.jit, static_argnames=("graphdef", "stop_tokens", "burst"), donate_argnames=("cache",))
def decode(
    graphdef: nnx.GraphDef,
    params: Any,
    cache: KVCache,
    token: jax.Array,
    positions: jax.Array,
    sampling: Sampling,
    done: jax.Array,
    steps: int | jax.Array,
    stop_tokens: tuple[int, ...],
    burst: int,
) -> tuple[KVCache, jax.Array, jax.Array, jax.Array]:
    """Run up to `steps` <= burst decoding steps in one device loop, fewer once every row is done.

    token (B,) is each row's last token, positions (B,) how many tokens it has, done (B,) bool.
    `cache` is donated. Returns cache, last token (B,), new tokens (B, burst), steps run."""
    model = nnx.merge(graphdef, params)

    def unfinished(state: tuple) -> jax.Array:
        i, _, _, _, done = state
        return (i < steps) & ~done.all()

    def step(state: tuple) -> tuple:
        i, cache, token, new, done = state
        logits, cache = model(token[:, None], cache)
        token = sampling.draw(logits[:, 0], positions + i)
        for stop_token in stop_tokens:
            done = done | (token == stop_token)
        return i + 1, cache, token, new.at[:, i].set(token), done

    new = jnp.zeros((len(token), burst), jnp.int32)
    start = (jnp.int32(0), cache, token, new, done)
    steps_run, cache, token, new, _ = jax.lax.while_loop(unfinished, step, start)
    return cache, token, new, steps_run


class Generation:
    """Rows of tokens that grow together, and the cache that holds the context of each.

    The context is a sliding window: when a row outgrows block_size, the oldest block_size / 2
    tokens are dropped and the rest is read again."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        config: GPTConfig,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_tokens: tuple[int, ...],
        burst: int,
    ):
        """Begin with `prompts`; graphdef and params are the two halves of a GPT of `config`.

        stop_tokens: each ends a row. burst: new tokens per device call, at most. Nothing runs
        before `advance`."""
        self.graphdef = graphdef
        self.params = params
        self.block_size = config.block_size
        self.sampling = sampling
        self.stop_tokens = stop_tokens
        self.burst = burst
        self.rows = [list(map(int, prompt)) for prompt in prompts]  # grow past a stop token too
        self.done = np.zeros(len(self.rows), bool)  # rows that have had their stop token
        self.remaining = max_new_tokens  # that a row which is not done still gets
        most = int(lengths_of(self.rows).max()) + max_new_tokens
        self.slots = min(self.block_size, round_up(most, LENGTH_MULTIPLE))
        self.window_starts: list[int] = []  # of the contexts in the cache; none before the first
        self.cache: KVCache | None = None
        self.last_token: jax.Array | None = None  # (B,) of each row, not yet in the cache

    def bursts(self) -> Iterator[list[list[int]]]:
        """Yield each row's new tokens as they come, until all rows are done."""
        while self.remaining > 0 and not self.done.all():
            yield self.advance()

    def advance(self) -> list[list[int]]:
        """Make one device call; return the new tokens of each row, none for one that is done."""
        starts = [window_start(len(row), self.block_size) for row in self.rows]
        if starts == self.window_starts:
            new = self._decode()
        else:
            self.window_starts = starts
            new = self._read_contexts()
        self.remaining -= new.shape[1]
        return self._append(new.tolist())

    def _read_contexts(self) -> np.ndarray:
        """Fill the cache anew with each row's context; return the tokens that follow (B, 1)."""
        contexts = [row[start:] for row, start in zip(self.rows, self.window_starts, strict=True)]
        lengths = lengths_of(contexts)
        T = min(self.slots, round_up(int(lengths.max()), LENGTH_MULTIPLE))
        tokens = np.zeros((len(contexts), T), np.int32)
        for padded, context in zip(tokens, contexts, strict=True):
            padded[: len(context)] = context
        self.cache, self.last_token = prefill(
            self.graphdef,
            self.params,
            tokens,
            lengths,
            lengths_of(self.rows),
            self.sampling,
            self.slots,
        )
        return np.asarray(self.last_token)[:, None]

    def _decode(self) -> np.ndarray:
        """Decode until a window must slide or the burst ends; return new tokens (B, steps)."""
        lengths = lengths_of(self.rows)
        # A step reads the last token of each row and samples the next one, which need not fit.
        room = np.array(self.window_starts) + self.block_size - lengths + 1
        steps = min(self.burst, self.remaining, int(room.min()))
        self.cache, self.last_token, new, steps_run = decode(
            self.graphdef,
            self.params,
            self.cache,
            self.last_token,
            lengths,
            self.sampling,
            self.done,
            steps,
            self.stop_tokens,
            self.burst,
        )
        return np.asarray(new)[:, : int(steps_run)]

    def _append(self, new: list[list[int]]) -> list[list[int]]:
        """Append new tokens to the rows; return those up to a stop token of rows not yet done."""
        fresh = []
        for b, tokens in enumerate(new):
            self.rows[b] += tokens
            taken = tokens
            ends = [i for i, token in enumerate(tokens) if token in self.stop_tokens]
            if ends:
                taken = tokens[: ends[0] + 1]
            fresh.append([] if self.done[b] else taken)
            self.done[b] |= bool(ends)
        return fresh


def tuple_of(stop_token: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the tokens that end a row: one, several or none."""
    if stop_token is None:
        return ()
    return (stop_token,) if isinstance(stop_token, int) else stop_token


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise UserError for an empty prompt, no prompts, or a token outside the vocabulary."""
    require(
        len(prompts) > 0 and all(len(prompt) > 0 for prompt in prompts),
        "each prompt needs at least one token",
        param="prompts",
    )
    smallest = min(min(prompt) for prompt in prompts)
    largest = max(max(prompt) for prompt in prompts)
    require(
        smallest >= 0 and largest < vocab_size,
        f"prompt tokens must be in [0, {vocab_size}), got {smallest} to {largest}",
        param="prompts",
    )
