"""The one program that runs the model in an engine, compiled for each shape of a call.

Read model_step, then advance. Shapes: see model.py and paged_attention.py; here `R` rows of a call
with `T` new tokens each, `S` rows to sample from, `M` pages of the longest sequence, `K`
alternatives reported per token, `N` steps of a call.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from config import GPTConfig
from kernels import cpu_kernels
from mesh import gathered
from model import GPT, Params
from paged_attention import PagedKVCache
from sampling import Slots, StepNeeds, sample_tokens
from sequence import MAX_LOGPROBS

Pool = tuple[jax.Array, jax.Array]  # keys and values, as PagedKVCache has them
HostOrDevice = jax.Array | np.ndarray

SLOT, CONTEXT_LEN, NEW_LEN, GUESS, PAGE_TABLE = range(5)
"""Columns of a packed row: slot, tokens in the pages, new tokens, a token that is guessed to be the
next in the slot, or NO_GUESS; the page table is the rest."""

NO_GUESS = -1


class Scores(NamedTuple):
    """Logprobs of tokens, and of the likeliest in their places; None if nobody asked for these."""

    logprob: HostOrDevice  # (...)
    rank: HostOrDevice | None  # (...) int32, 1 for the likeliest token
    top_logprobs: HostOrDevice | None  # (..., K) descending
    top_tokens: HostOrDevice | None  # (..., K) int32


class Sampled(NamedTuple):
    """What model_step returns of the tokens that it sampled, step by step."""

    token: HostOrDevice  # (N, S) int32
    scores: Scores  # (N, S, ...)
    prompt_scores: Scores | None  # (R, T, ...) of the token that follows each token of a prompt


@partial(
    jax.jit,
    static_argnames=("config", "packing", "attention", "mesh", "T", "max_steps", "speculates"),
    donate_argnames=("pool", "slots"),
)
def model_step(
    params: Params,
    pool: Pool,
    slots: Slots,
    rows: jax.Array,
    samples: jax.Array,
    needs: StepNeeds,
    *,
    config: GPTConfig,
    packing: str | None,
    attention: str,
    mesh: Mesh | None,
    T: int,
    max_steps: int = 1,
    speculates: bool = False,
) -> tuple[Pool, Slots, Sampled]:
    """Advance each row by up to T tokens and sample what follows. `pool` and `slots` are donated.

    rows (R, 4 + M) int32: slot, tokens in the pages, new tokens (0 for a padding row), guess, page
    table; the tokens are read from the slots. samples (S, 2) int32: row after whose last new token
    to sample, and slot that gets the sample as its next token. packing: that of for_inference.
    mesh: the devices that share params and pool, None for one.

    With max_steps N > 1, T is 1, and a row's new tokens are those of as many steps: each but the
    first is what the step before has sampled. The call takes as many steps as the row that has most
    of them, at most N; in the others' results for a row there is nothing of use.

    speculates: rows may have guesses, which go to their slots first. The rows of a sequence that
    guesses stand one position behind the other: each finds the keys, the values and the tokens of
    those before it."""
    if speculates:
        slots = write_guesses(slots, rows)
    model = nnx.merge(inference_graphdef(config, packing), params)
    one_step = partial(advance, model, needs, attention, mesh, packing is not None, T)
    if max_steps == 1:
        pool, slots, sampled = one_step(pool, slots, rows, samples)
        token, scores = jax.tree.map(lambda a: a[None], (sampled.token, sampled.scores))
        return pool, slots, Sampled(token, scores, sampled.prompt_scores)
    assert T == 1, f"several steps of {T} tokens each"
    return take_steps(one_step, pool, slots, rows, samples, max_steps)


def write_guesses(slots: Slots, rows: jax.Array) -> Slots:
    """Put the guesses of rows to where their tokens are read."""
    at = rows[:, SLOT], rows[:, CONTEXT_LEN]
    guess = rows[:, GUESS]
    token = jnp.where(guess == NO_GUESS, slots.tokens[at], guess)
    return dataclasses.replace(slots, tokens=slots.tokens.at[at].set(token))


def take_steps(
    one_step: Callable,
    pool: Pool,
    slots: Slots,
    rows: jax.Array,
    samples: jax.Array,
    max_steps: int,
) -> tuple[Pool, Slots, Sampled]:
    """Do what model_step says of more than one step; one_step is its only step otherwise.

    One program takes any number of steps: so a row gets the same bits whatever others need."""
    num_steps = rows[:, NEW_LEN]  # (R,)
    row = samples[:, 0]
    padding_slot = len(slots.tokens) - 1

    def step(i: jax.Array, carry: tuple[Pool, Slots, Sampled]) -> tuple[Pool, Slots, Sampled]:
        pool, slots, results = carry
        goes_on = i < num_steps
        columns = rows.at[:, SLOT].set(jnp.where(goes_on, rows[:, SLOT], padding_slot))
        columns = columns.at[:, CONTEXT_LEN].add(i)
        columns = columns.at[:, NEW_LEN].set(goes_on.astype(jnp.int32))
        slot = jnp.where(goes_on[row], samples[:, 1], padding_slot)
        pool, slots, sampled = one_step(pool, slots, columns, jnp.stack([row, slot], 1))
        results = jax.tree.map(lambda all_, one: all_.at[i].set(one), results, sampled)
        return pool, slots, results

    _, _, sampled = jax.eval_shape(one_step, pool, slots, rows, samples)
    empty = jax.tree.map(lambda a: jnp.zeros((max_steps, *a.shape), a.dtype), sampled)
    return jax.lax.fori_loop(0, num_steps.max(), step, (pool, slots, empty))


def advance(
    model: GPT,
    needs: StepNeeds,
    attention: str,
    mesh: Mesh | None,
    is_native: bool,
    T: int,
    pool: Pool,
    slots: Slots,
    rows: jax.Array,
    samples: jax.Array,
) -> tuple[Pool, Slots, Sampled]:
    """Do one step of model_step. Its Sampled has no axis of steps."""
    slot, context_len, new_len = rows[:, SLOT], rows[:, CONTEXT_LEN], rows[:, NEW_LEN]
    cache: Any = PagedKVCache(*pool, rows[:, PAGE_TABLE:], context_len, new_len, attention, mesh)
    position = context_len[:, None] + jnp.arange(T)  # (R, T)
    x, cache = model.hidden(slots.tokens[slot[:, None], position], cache)  # (R, T, C)

    row, sample_slot = samples[:, 0], samples[:, 1]
    last = x[row, jnp.maximum(new_len[row], 1) - 1]  # (S, C)
    sample_position = context_len[row] + new_len[row]  # (S,)
    logits = gathered(mesh, model.logits(last[:, None]))[:, 0]  # (S, V)
    token = sample_tokens(logits, slots, sample_slot, sample_position, needs, is_native)
    scores = score_samples(logits, token, needs, is_native)
    prompt_scores = None
    if T > 1:
        next_token = slots.tokens[rows[:, :1], position + 1]
        score = partial(score_prompts, model, mesh, is_native)
        prompt_scores = compute_if(needs.prompt_logprobs, score, x, next_token)
    tokens = slots.tokens.at[sample_slot, sample_position].set(token)
    slots = dataclasses.replace(slots, tokens=tokens)
    return (cache.k_pages, cache.v_pages), slots, Sampled(token, scores, prompt_scores)


def score_samples(logits: jax.Array, token: jax.Array, needs: StepNeeds, is_native: bool) -> Scores:
    """logits (S, V), token (S,) -> Scores, whose ranks and alternatives are 0 unless some row needs
    them. is_native: see log_normalizer."""
    normalizer = log_normalizer(logits, is_native)
    logprob = logprob_of(token, logits, normalizer)
    rank = compute_if(needs.ranks, rank_of, token, logits)
    return Scores(logprob, rank, *compute_if(needs.top_logprobs, likeliest, logits, normalizer))


def score_prompts(
    model: GPT, mesh: Mesh | None, is_native: bool, x: jax.Array, next_token: jax.Array
) -> Scores:
    """x (R, T, C), next_token (R, T) -> Scores (R, T, ...) of these tokens, and of the likeliest.

    Tile by tile, so that logits exist for one page of tokens at a time."""

    def score_tile(x_and_token: tuple[jax.Array, jax.Array]) -> Scores:
        x, token = x_and_token
        logits = gathered(mesh, model.logits(x[None]))[0]  # (T, V)
        normalizer = log_normalizer(logits, is_native)
        logprob = logprob_of(token, logits, normalizer)
        return Scores(logprob, rank_of(token, logits), *likeliest(logits, normalizer))

    return jax.lax.map(score_tile, (x, next_token))


def log_normalizer(logits: jax.Array, is_native: bool) -> jax.Array:
    """(N, V) -> (N, 1): what log softmax subtracts. is_native: computed by native CPU code."""
    if is_native:
        return cpu_kernels.log_sum_exp(logits)[:, None]
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def logprob_of(token: jax.Array, logits: jax.Array, normalizer: jax.Array) -> jax.Array:
    """token (...), logits (..., V), normalizer (..., 1) -> log softmax of the token (...)."""
    return (jnp.take_along_axis(logits, token[..., None], -1) - normalizer)[..., 0]


def rank_of(token: jax.Array, logits: jax.Array) -> jax.Array:
    """token (...), logits (..., V) -> 1 + how many tokens are likelier (...) int32."""
    larger = logits > jnp.take_along_axis(logits, token[..., None], -1)
    return 1 + larger.sum(-1, dtype=jnp.int32)


def likeliest(logits: jax.Array, normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits (N, V), normalizer (N, 1) -> logprobs and ids (N, K) of the likeliest tokens."""
    largest, ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return largest - normalizer, ids


def compute_if(needed: jax.Array | bool, function: Callable, *args: jax.Array) -> Any:
    """Return function(*args) if it is needed; else zeros of the same shapes, at no cost."""

    def zeros(*args: jax.Array) -> Any:
        result = jax.eval_shape(function, *args)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), result)

    return jax.lax.cond(needed, function, zeros, *args)


@lru_cache
def inference_graphdef(config: GPTConfig, packing: str | None) -> nnx.GraphDef:
    """Return the static half of GPT.for_inference, with this packing.

    It is looked up by config, whose hash costs less than that of the graph at each call."""

    def model() -> GPT:
        return GPT(config, rngs=nnx.Rngs(0)).for_inference(packing=packing)

    abstract = nnx.eval_shape(model)
    return nnx.split(abstract)[0]
