"""The loss of a GPT: mean cross-entropy, computed chunk by chunk of the sequence.

Shapes: B batch, T tokens, C n_embd, V padded vocabulary; S shards of a batch, see Layout.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from config import GPTConfig
from ops import head_logits, split_into_chunks

if TYPE_CHECKING:
    from model import GPT


def mean_loss(model: "GPT", x: jax.Array, targets: jax.Array, chunks: int) -> jax.Array:
    """Return the mean loss in nats of targets (B, T) given x (B, T, C): see GPT.loss.

    Each shard of the batch has a head of its own, where it is: the chunks add up the head's
    gradient there, and what goes through the network is the sum over chunks."""
    count = jnp.maximum((targets >= 0).sum(), 1)
    R, K = model.layout.batch_shards
    matrix = model.head_matrix
    heads = jnp.broadcast_to(matrix, (R * K, *matrix.shape))
    split = partial(split_into_chunks, chunks=chunks, row_shards=R, position_shards=K)
    return chunked_loss_sum(model.config, split(x), heads, split(targets)) / count


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_loss_sum(
    config: GPTConfig, x: jax.Array, heads: jax.Array, targets: jax.Array
) -> jax.Array:
    """Return the sum of the losses of targets given x, each chunk by itself.

    x (chunks, S, B / S, T / chunks, C), heads (S, V, C), targets like x without C; see
    split_into_chunks. A target below 0 has no loss. Where a gradient is asked for, each chunk's is
    computed together with its loss: logits exist for one chunk at a time, and once."""

    def loss_of_chunk(x_and_targets: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, targets = x_and_targets
        return cross_entropy(logits_of_shards(config, x, heads), targets).losses.sum()

    return jax.lax.map(loss_of_chunk, (x, targets)).sum()


def _chunked_loss_sum_fwd(
    config: GPTConfig, x: jax.Array, heads: jax.Array, targets: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def add_chunk(
        sums: tuple[jax.Array, jax.Array], x_and_targets: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        loss_sum, heads_gradient = sums
        x, targets = x_and_targets
        logits, pull_back = jax.vjp(partial(logits_of_shards, config), x, heads)
        losses, logits_gradient = cross_entropy(logits, targets)
        x_gradient, of_heads = pull_back(logits_gradient)
        return (loss_sum + losses.sum(), heads_gradient + of_heads), x_gradient

    nothing = jnp.zeros(()), jnp.zeros_like(heads)
    (loss_sum, heads_gradient), x_gradient = jax.lax.scan(add_chunk, nothing, (x, targets))
    return loss_sum, (x_gradient, heads_gradient)


def _chunked_loss_sum_bwd(
    config: GPTConfig, gradients: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_gradient, heads_gradient = gradients
    return cotangent * x_gradient, cotangent * heads_gradient, None


chunked_loss_sum.defvjp(_chunked_loss_sum_fwd, _chunked_loss_sum_bwd)


def logits_of_shards(config: GPTConfig, x: jax.Array, heads: jax.Array) -> jax.Array:
    """x (S, B, T, C), heads (S, V, C) -> logits (S, B, T, V), each shard with its own head."""
    return jax.vmap(partial(head_logits, config=config))(x, heads)


class CrossEntropy(NamedTuple):
    """The loss of each target, and its derivative by the logits."""

    losses: jax.Array  # (...) float32 nats, 0 for a target below 0
    gradient: jax.Array  # (..., V) float32


def cross_entropy(logits: jax.Array, targets: jax.Array) -> CrossEntropy:
    """Return -log softmax(logits)[target] and its derivative, softmax(logits) - one_hot(target).

    logits (..., V), targets (...). A comparison finds the target's logit, since what a gather adds
    to a gradient is a scatter, which XLA does not fuse with the rest."""
    counts = targets >= 0
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.where(is_target, logits, 0).sum(-1)
    gradient = jnp.exp(logits - normalizer[..., None]) - is_target
    return CrossEntropy(
        losses=jnp.where(counts, normalizer - of_target, 0),
        gradient=jnp.where(counts[..., None], gradient, 0),
    )
