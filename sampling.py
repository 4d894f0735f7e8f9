"""The sampler: from the logits of a row to its next token, on the device.

Start with `draw`. Every token of this project that is sampled comes from it: GPT.generate calls it
for the rows of a batch (see generation.py), the engine calls it through `sample_tokens` for the
sequences in its slots. So the same logits, seed, index, position and settings give the same token.
What the device knows of a request is a row of `Slots`, made of its SamplingParams by `slot_row`.

Shapes: S rows to sample, V padded vocabulary.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from config import GPTConfig
from errors import UserError
from kernels import cpu_kernels
from sequence import MAX_BAD_TOKENS, MAX_BIASES, SamplingParams, Sequence
from tokenizer import Tokenizer

WORD_BITS = 32
WORD = 0xFFFFFFFF  # the low 32 bits of a number, all of them set
SIGN_BIT = np.uint32(1 << 31)
TOKENS_PER_BLOCK = 64  # a draw finds a block of so many tokens first, then a token in it

# Limits of what float32 can compute with. Beyond them a value acts as its limit does. Biases and
# penalties make logits of at most 1e14, and 1e14 / 1e-20 is far from float32's largest, 3e38.
LEAST_TEMPERATURE = 1e-20  # smaller ones act as 0
LEAST_REPETITION_PENALTY = 1e-10  # smaller ones act as this
LEAST_TOP_P = float(
    np.finfo(np.float32).tiny
)  # smaller ones would be 0, of which no token is a part


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What the device knows of the sequence in each slot: its tokens, and its SamplingParams.

    The first axis of every field is the slot. The last belongs to the padding rows of a call."""

    tokens: jax.Array  # (slots, block_size + 1) int32
    prompt_len: jax.Array  # (slots,) int32, like all that have no other shape or dtype
    min_len: jax.Array  # length below which biases of -inf hold (min_tokens)
    seed: jax.Array  # (slots, 2) uint32, see seed_words
    index: jax.Array  # which of the samples of one prompt this is
    temperature: jax.Array  # (slots,) float32
    top_k: jax.Array
    top_p: jax.Array  # (slots,) float32
    min_p: jax.Array  # (slots,) float32
    repetition_penalty: jax.Array  # (slots,) float32
    frequency_penalty: jax.Array  # (slots,) float32
    presence_penalty: jax.Array  # (slots,) float32
    bias_ids: jax.Array  # (slots, MAX_BIASES) int32, filled up with V, which no column has
    biases: jax.Array  # (slots, MAX_BIASES) float32
    allowed: jax.Array  # (slots, V / 32) uint32, a bit for each token: see pack_allowed
    bad_tokens: jax.Array  # (slots, MAX_BAD_TOKENS) int32, word after word, filled up with V
    bad_distances: jax.Array  # (slots, MAX_BAD_TOKENS) int32, from each to the last of its word


class StepNeeds(NamedTuple):
    """Which parts of a step some row of the call needs; the device skips the others."""

    adjusts: bool  # biases or penalties: see SamplingParams.adjusts
    bans: bool  # bad_words: see SamplingParams.bans
    masks: bool  # allowed_token_ids or structured output: see SamplingParams.masks
    draws: bool  # a temperature above 0
    restricts: bool  # top_k, top_p or min_p: see SamplingParams.restricts
    ranks: bool  # the rank of the sampled token
    top_logprobs: bool  # the likeliest tokens beside the sampled one
    prompt_logprobs: bool  # logprobs of the prompt's tokens

    @classmethod
    def of(cls, sampled: Iterable[SamplingParams], prompt_logprobs: bool) -> "StepNeeds":
        """Return what a step needs that samples a token for each of these."""
        params = list(sampled)
        return cls(
            adjusts=any(p.adjusts for p in params),
            bans=any(p.bans for p in params),
            masks=any(p.masks for p in params),
            draws=any(p.temperature > 0 for p in params),
            restricts=any(p.restricts for p in params),
            ranks=any(p.logprobs is not None for p in params),
            top_logprobs=any(bool(p.logprobs) for p in params),
            prompt_logprobs=prompt_logprobs,
        )


def slot_row(seq: Sequence, config: GPTConfig) -> Slots:
    """Return what the device needs to know of seq: a row of Slots.

    In NumPy arrays, which travel with the program that takes them."""
    params = seq.params
    tokens = np.zeros(config.block_size + 1, np.int32)
    tokens[: len(seq.tokens)] = seq.tokens
    bias_ids, biases = bias_columns(seq, config)
    bad_tokens, bad_distances = bad_word_columns(seq.bad_words, config)
    assert params.seed is not None, f"{seq.key} has no seed: Engine.add draws one"
    fields: dict[str, Any] = {
        "tokens": tokens,
        "prompt_len": np.int32(seq.prompt_len),
        "min_len": np.int32(seq.prompt_len + params.min_tokens),
        "seed": seed_words(params.seed),
        "index": np.int32(seq.key.sample),
        **draw_settings(params, config.vocab_size),
        "repetition_penalty": np.float32(max(params.repetition_penalty, LEAST_REPETITION_PENALTY)),
        "frequency_penalty": np.float32(params.frequency_penalty),
        "presence_penalty": np.float32(params.presence_penalty),
        "bias_ids": bias_ids,
        "biases": biases,
        "allowed": pack_allowed(params.allowed_token_ids, config),
        "bad_tokens": bad_tokens,
        "bad_distances": bad_distances,
    }
    return Slots(**fields)


def draw_settings(params: SamplingParams, vocab_size: int) -> dict[str, np.number]:
    """Return the arguments of draw that a request sets, by name, as the device can hold them."""
    temperature = params.temperature if params.temperature >= LEAST_TEMPERATURE else 0
    return {
        "temperature": np.float32(temperature),
        "top_k": np.int32(min(params.top_k or vocab_size, vocab_size)),
        "top_p": np.float32(max(params.top_p, LEAST_TOP_P)),
        "min_p": np.float32(params.min_p),
    }


def bias_columns(seq: Sequence, config: GPTConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens with a bias and their biases, (MAX_BIASES,) int32 and float32.

    A bias of -inf bans a token until min_tokens are generated. Unused columns name a token behind
    the last of the padded vocabulary, which no column of the logits has."""
    ids = np.full(MAX_BIASES, config.padded_vocab_size, np.int32)
    biases = np.zeros(MAX_BIASES, np.float32)
    entries = list(seq.params.logit_bias.items())
    if seq.params.min_tokens:
        entries += [(token, -np.inf) for token in seq.stop_ids]
    for i, (token, bias) in enumerate(entries):
        ids[i] = token
        biases[i] = bias
    return ids, biases


@lru_cache(maxsize=8)  # the samples of a request have one set, which may be the whole vocabulary
def pack_allowed(allowed: tuple[int, ...] | None, config: GPTConfig) -> np.ndarray:
    """Return a bit for each token, 1 if it is allowed, lowest of a word first: (V / 32,) uint32.

    None allows all. Whatever is allowed of it, a vocabulary of 50,000 takes 6 KiB."""
    words = -(-config.padded_vocab_size // WORD_BITS)
    bits = np.full(words * WORD_BITS, allowed is None)
    bits[list(allowed or ())] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


@lru_cache(maxsize=8)  # the prompts of a request have the same bad words
def spell(words: tuple[str, ...], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the tokens that spell each of the words, at the beginning of a text and inside it.

    Many vocabularies have a word with a space before it as another token: both are returned, as
    vLLM does. Raises UserError if the vocabulary cannot spell a word."""
    spellings = []
    for word in words:
        bare = word.lstrip(" ") or word
        try:
            at_beginning = tokenizer.encode(bare)
        except UserError as error:
            raise UserError(str(error), param="bad_words") from error
        spellings.append(at_beginning)
        inside: list[int] = []
        with contextlib.suppress(UserError):  # a vocabulary of characters may have no space
            inside = tokenizer.encode(" " + bare)
        if len(inside) == len(at_beginning) and inside[0] != at_beginning[0]:
            spellings.append(inside)
    return spellings


def most_banned(always: set[int], bad_words: list[list[int]], allowed: set[int] | None) -> int:
    """Return how many of the allowed tokens, at most, may be ruled out at once.

    always: tokens that are ruled out in any case. Two words can do so at once only if the tokens
    before their last ones are the same."""
    last_tokens: dict[int | None, set[int]] = {None: set(always)}
    for word in bad_words:
        previous = word[-2] if len(word) > 1 else None
        last_tokens.setdefault(previous, set()).add(word[-1])
    in_any_case = last_tokens[None]
    at_once = [in_any_case | tokens for tokens in last_tokens.values()]
    if allowed is not None:
        at_once = [tokens & allowed for tokens in at_once]
    return max(map(len, at_once))


def bad_word_columns(
    bad_words: list[list[int]], config: GPTConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of the words, one word after the other, and how many tokens of its word
    follow each: (MAX_BAD_TOKENS,) int32 both. Unused columns name a token that no logits have."""
    tokens = np.full(MAX_BAD_TOKENS, config.padded_vocab_size, np.int32)
    distances = np.zeros(MAX_BAD_TOKENS, np.int32)
    start = 0
    for word in bad_words:
        end = start + len(word)
        tokens[start:end] = word
        distances[start:end] = np.arange(len(word))[::-1]
        start = end
    return tokens, distances


def seed_words(seed: int) -> np.ndarray:
    """Return the high and the low 32 bits of a seed: (2,) uint32.

    A seed outside of 64 bits, or a negative one, is taken modulo 2**64."""
    return np.array([seed >> 32 & WORD, seed & WORD], np.uint32)


def sample_tokens(
    logits: jax.Array,
    slots: Slots,
    slot: jax.Array,
    length: jax.Array,
    needs: StepNeeds,
    is_native: bool = False,
) -> jax.Array:
    """Sample the next token of the sequences in slot (S,), whose lengths are length (S,).

    logits (S, V) float32 as the model gives them; see SamplingParams for what is done to them, and
    in which order. The token takes position `length`. Returns tokens (S,) int32."""

    def adjusted(logits: jax.Array) -> jax.Array:
        return adjust_logits(logits, slots, slot, length)

    def masked(logits: jax.Array) -> jax.Array:
        return mask_tokens(logits, slots, slot)

    def with_bans(logits: jax.Array) -> jax.Array:
        return ban_tokens(logits, slots, slot, length)

    logits = jax.lax.cond(needs.adjusts, adjusted, unchanged, logits)
    logits = jax.lax.cond(needs.masks, masked, unchanged, logits)
    logits = jax.lax.cond(needs.bans, with_bans, unchanged, logits)
    return draw(
        logits,
        slots.seed[slot],
        slots.index[slot],
        length,
        temperature=slots.temperature[slot],
        top_k=slots.top_k[slot],
        top_p=slots.top_p[slot],
        min_p=slots.min_p[slot],
        draws=needs.draws,
        restricts=needs.restricts,
        is_native=is_native,
    )


def draw(
    logits: jax.Array,
    seed: jax.Array,
    index: jax.Array,
    position: jax.Array,
    *,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    draws: jax.Array | bool,
    restricts: jax.Array | bool,
    is_native: bool = False,
) -> jax.Array:
    """Draw one token a row from softmax(logits / temperature) after top_k, top_p and min_p.

    A pure function of the row's own arguments: neither other rows nor earlier draws reach a token.
    Temperature 0 takes the likeliest token instead, the first of equals.

    logits (S, V) float32; seed (S, 2) uint32, see seed_words; index (S,), which of the samples of
    one prompt this is; position (S,), how many tokens the row has; temperature, top_p and min_p
    (S,) float32; top_k (S,) int32, V to keep all. draws: whether any row has a temperature above 0;
    restricts: whether any uses top_k, top_p or min_p: both are skipped otherwise. is_native: see
    sample_tokens. Returns (S,) int32."""
    find_largest = cpu_kernels.first_largest if is_native else first_largest
    likeliest = find_largest(logits)
    greedy = temperature == 0

    def restricted(scaled: jax.Array) -> jax.Array:
        return restrict_logits(scaled, top_k, top_p, min_p)

    def drawn(logits: jax.Array) -> jax.Array:
        scaled = logits / jnp.where(greedy, 1, temperature)[:, None]
        scaled = jax.lax.cond(restricts, restricted, unchanged, scaled)
        return invert_cumulative(scaled, uniform_pair(seed, index, position))

    def undrawn(logits: jax.Array) -> jax.Array:
        return likeliest

    return jnp.where(greedy, likeliest, jax.lax.cond(draws, drawn, undrawn, logits))


def unchanged(logits: jax.Array) -> jax.Array:
    """Return the logits as they are: the branch of jax.lax.cond where there is nothing to do."""
    return logits


def first_largest(x: jax.Array) -> jax.Array:
    """Return x.argmax(-1) of x (S, V): argmax itself becomes ten times slower with XLA on a CPU."""
    V = x.shape[-1]
    largest = x == x.max(-1, keepdims=True)
    return jnp.where(largest, jnp.arange(V, dtype=jnp.int32), V - 1).min(-1)


def uniform_pair(seed: jax.Array, index: jax.Array, position: jax.Array) -> jax.Array:
    """Return two uniform numbers in [0, 1) a row: (S, 2) float32, multiples of 2**-24.

    They are one hash of a counter-based generator (Salmon et al. 2011), whose key is the seed and
    whose counter is (index, position)."""

    def hash_row(seed: jax.Array, index: jax.Array, position: jax.Array) -> jax.Array:
        counter = jnp.stack([index, position]).astype(jnp.uint32)
        return threefry_2x32((seed[0], seed[1]), counter)

    bits = jax.vmap(hash_row)(seed, index, position)  # (S, 2) uint32
    return (bits >> 8).astype(jnp.float32) * 2**-24  # float32 has 24 bits for them


def invert_cumulative(x: jax.Array, u: jax.Array) -> jax.Array:
    """Return the tokens at which the cumulative distribution of softmax(x) (S, V) passes u (S, 2).

    u[:, 0] picks a block of tokens, u[:, 1] a token of the block, so that 24 bits suffice for the
    rarest token. Gumbel noise would cost 2 V logarithms and as many hashes a row."""
    p = jnp.exp(x - x.max(-1, keepdims=True))
    missing = -p.shape[1] % TOKENS_PER_BLOCK
    p = jnp.pad(p, ((0, 0), (0, missing))).reshape(len(p), -1, TOKENS_PER_BLOCK)
    block = pick(p.sum(-1), u[:, 0])
    in_block = jnp.take_along_axis(p, block[:, None, None], 1)[:, 0]
    return TOKENS_PER_BLOCK * block + pick(in_block, u[:, 1])


def pick(weights: jax.Array, u: jax.Array) -> jax.Array:
    """Return the first column of weights (S, n) whose cumulative weight exceeds u (S,) * total.

    It is never one of weight 0, since u is below 1. Returns (S,) int32."""
    cumulative = jnp.cumsum(weights, -1)
    threshold = u[:, None] * cumulative[:, -1:]
    return (cumulative <= threshold).sum(-1, dtype=jnp.int32)


def adjust_logits(logits: jax.Array, slots: Slots, slot: jax.Array, length: jax.Array) -> jax.Array:
    """Apply logit_bias, min_tokens and the penalties to logits (S, V).

    Rows that do not use one of them keep their bits."""
    row = jnp.arange(len(slot))[:, None]
    biases = slots.biases[slot]
    min_tokens_reached = (length >= slots.min_len[slot])[:, None]
    biases = jnp.where((biases == -jnp.inf) & min_tokens_reached, 0, biases)
    logits = logits.at[row, slots.bias_ids[slot]].add(biases, mode="drop")

    tokens = slots.tokens[slot]  # (S, block_size + 1)
    at = jnp.arange(slots.tokens.shape[1])
    present = at < length[:, None]
    generated = present & (at >= slots.prompt_len[slot][:, None])
    zeros = jnp.zeros(logits.shape, jnp.int32)
    seen = zeros.at[row, tokens].max(present.astype(jnp.int32))
    count = zeros.at[row, tokens].add(generated.astype(jnp.int32))

    penalty = slots.repetition_penalty[slot][:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen > 0, penalised, logits)
    logits -= slots.frequency_penalty[slot][:, None] * count
    return jnp.where(count > 0, logits - slots.presence_penalty[slot][:, None], logits)


def mask_tokens(logits: jax.Array, slots: Slots, slot: jax.Array) -> jax.Array:
    """Return logits (S, V) with -inf for what allowed_token_ids and structured output rule out."""
    allowed = unpack_bits(slots.allowed[slot])[:, : logits.shape[1]]
    return jnp.where(allowed, logits, -jnp.inf)


def ban_tokens(logits: jax.Array, slots: Slots, slot: jax.Array, length: jax.Array) -> jax.Array:
    """Return logits (S, V) with -inf for what bad_words rule out.

    A bad word rules out its last token where all others of it were generated just before. Rows
    without bad words keep their bits."""
    row = jnp.arange(len(slot))[:, None]
    word_token = slots.bad_tokens[slot]  # (S, MAX_BAD_TOKENS)
    distance = slots.bad_distances[slot]
    position = length[:, None] - distance  # where the token would have to be
    is_last = distance == 0
    is_generated = position >= slots.prompt_len[slot][:, None]
    is_there = is_generated & (slots.tokens[slot[:, None], position] == word_token)
    column_of_last = jnp.arange(MAX_BAD_TOKENS) + distance
    ones = jnp.ones(word_token.shape, jnp.int32)
    complete = ones.at[row, column_of_last].min((is_last | is_there).astype(jnp.int32))
    bans = jnp.where(is_last & (complete > 0), -jnp.inf, 0)
    return logits.at[row, word_token].add(bans, mode="drop")


def unpack_bits(words: jax.Array) -> jax.Array:
    """Return the bits of words (S, n) uint32, the lowest of each first: (S, 32 n) bool."""
    shifted = words[:, :, None] >> jnp.arange(WORD_BITS, dtype=jnp.uint32)
    return (shifted & 1).reshape(len(words), -1) > 0


def restrict_logits(
    x: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """Return x (S, V) with -inf for the tokens that top_k, top_p and min_p (S,) leave out.

    Each looks at what the one before it has left. Equals of the smallest token kept are kept."""
    order = ordered_integers(x)
    x = jnp.where(top_set(order, jnp.ones((), jnp.int32), top_k), x, -jnp.inf)
    p = jnp.exp(x - x.max(-1, keepdims=True))
    # Without top_p all is kept: rounding could make the sum of all fall short of the sum of all.
    nucleus = top_set(order, p, top_p * p.sum(-1)) | (top_p == 1)[:, None]
    x = jnp.where(nucleus, x, -jnp.inf)
    return jnp.where(p >= min_p[:, None], x, -jnp.inf)


def ordered_integers(x: jax.Array) -> jax.Array:
    """Return uint32 that compare as the float32 in x do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31
    return jnp.where(negative, ~bits, bits | SIGN_BIT)


def top_set(order: jax.Array, weights: jax.Array, least: jax.Array) -> jax.Array:
    """Return where order (S, V) uint32 is at least t: bool (S, V).

    t is the largest threshold of the row for which those columns together weigh at least `least`
    (S,), found by bisection, bit by bit, since sorting costs more. weights: () or (S, V)."""

    def decide_bit(i: jax.Array, t: jax.Array) -> jax.Array:
        trial = t | (jnp.uint32(SIGN_BIT) >> i.astype(jnp.uint32))
        enough = jnp.where(order >= trial[:, None], weights, 0).sum(-1) >= least
        return jnp.where(enough, trial, t)

    t = jax.lax.fori_loop(0, 32, decide_bit, jnp.zeros(len(order), jnp.uint32))
    return order >= t[:, None]
