"""What is sampled on the device: SamplingParams as arrays, and the token they lead to.

Shapes: `S` rows to sample, `V` padded vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What the device knows of the sequence in each slot. The last slot belongs to the padding rows of a call."""

    tokens: jax.Array  # (slots, block_size + 1) int32
    prompt_len: jax.Array  # (slots,) int32, like all that have no other shape
    min_len: jax.Array  # length up to which biases of -inf hold (min_tokens)
    seed: jax.Array  # (slots, 2) uint32
    index: jax.Array
    temperature: jax.Array  # float32, like the penalties
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    bias_ids: jax.Array  # (slots, MAX_BIASES) int32, filled up with V, which no column has
    biases: jax.Array  # (slots, MAX_BIASES) float32


class StepNeeds(NamedTuple):
    """Which parts of model_step some row of the call needs; the device skips the others."""

    adjust: bool
    keep: bool
    top: bool
    prompt: bool


def sample(logits, slots: Slots, slot, length, needs: StepNeeds):
    """logits (S, V) of the sequences in slot (S,) -> tokens (S,) int32 for their positions length (S,); see SamplingParams."""
    logits = jax.lax.cond(
        needs.adjust, lambda l: adjust(l, slots, slot, length), lambda l: l, logits
    )
    temperature = slots.temperature[slot][:, None]
    x = logits / jnp.where(temperature == 0, 1, temperature)
    x = jax.lax.cond(needs.keep, lambda x: keep(x, slots, slot), lambda x: x, x)

    # One hash of a counter-based generator (Salmon et al. 2011): key is the seed, counter (index of the sample, position).
    hash_ = lambda seed, *counter: threefry_2x32(
        (seed[0], seed[1]), jnp.stack(counter).astype(jnp.uint32)
    )
    bits = jax.vmap(hash_)(slots.seed[slot], slots.index[slot], length)  # (S, 2) uint32
    u = (bits >> 8).astype(jnp.float32) * 2**-24
    return jnp.where(temperature[:, 0] == 0, first_largest(logits), draw(x, u))


def first_largest(x):
    """x.argmax(-1), which XLA makes ten times slower on a CPU."""
    V = x.shape[-1]
    return jnp.where(x == x.max(-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1).min(-1)


def draw(x, u):
    """Inverts the cumulative distribution softmax(x) (S, V) at u (S, 2) in [0, 1): u[:, 0] picks a block of tokens, u[:, 1] a
    token of the block, so that 24 bits suffice for the rarest; Gumbel noise would cost 2 V logarithms and as many hashes."""
    p = jnp.exp(x - x.max(-1, keepdims=True))
    p = jnp.pad(p, ((0, 0), (0, -p.shape[1] % 64))).reshape(len(p), -1, 64)

    def pick(
        weights, u
    ):  # the first whose cumulative weight exceeds u * total: never one of weight 0
        total = jnp.cumsum(weights, -1)
        return (total <= u[:, None] * total[:, -1:]).sum(-1, dtype=jnp.int32)

    block = pick(p.sum(-1), u[:, 0])
    return 64 * block + pick(jnp.take_along_axis(p, block[:, None, None], 1)[:, 0], u[:, 1])


def adjust(logits, slots: Slots, slot, length):
    """logit_bias, min_tokens and the penalties, on logits (S, V); exact no-ops for rows that do not use them."""
    row = jnp.arange(len(slot))[:, None]
    biases = slots.biases[slot]
    biases = jnp.where((biases == -jnp.inf) & (length >= slots.min_len[slot])[:, None], 0, biases)
    logits = logits.at[row, slots.bias_ids[slot]].add(biases, mode="drop")
    tokens, at = slots.tokens[slot], jnp.arange(slots.tokens.shape[1])
    present = at < length[:, None]  # (S, block_size + 1)
    zeros = jnp.zeros(logits.shape, jnp.int32)
    seen = zeros.at[row, tokens].max(present.astype(jnp.int32))
    count = zeros.at[row, tokens].add(
        (present & (at >= slots.prompt_len[slot][:, None])).astype(jnp.int32)
    )
    penalty = slots.repetition_penalty[slot][:, None]
    logits = jnp.where(seen > 0, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits -= slots.frequency_penalty[slot][:, None] * count
    return jnp.where(count > 0, logits - slots.presence_penalty[slot][:, None], logits)


def keep(x, slots: Slots, slot):
    """-inf for the tokens that top_k, top_p and min_p leave out of x (S, V)."""
    ordered = jax.lax.bitcast_convert_type(x, jnp.uint32)
    ordered = jnp.where(
        ordered >> 31, ~ordered, ordered | np.uint32(1 << 31)
    )  # unsigned integers in the order of the floats

    def at_least(weights, target):
        """Where x >= the largest t with sum(weights[x >= t]) >= target: t by bisection, bit by bit, since sorting costs more."""

        def bit(i, t):
            trial = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
            enough = jnp.where(ordered >= trial[:, None], weights, 0).sum(-1) >= target
            return jnp.where(enough, trial, t)

        return ordered >= jax.lax.fori_loop(0, 32, bit, jnp.zeros(len(x), jnp.uint32))[:, None]

    top_k, top_p, min_p = slots.top_k[slot], slots.top_p[slot], slots.min_p[slot]
    x = jnp.where(at_least(jnp.ones((), jnp.int32), top_k), x, -jnp.inf)
    p = jnp.exp(x - x.max(-1, keepdims=True))
    x = jnp.where(at_least(p, top_p * p.sum(-1)) | (top_p == 1)[:, None], x, -jnp.inf)
    return jnp.where(p >= min_p[:, None], x, -jnp.inf)
