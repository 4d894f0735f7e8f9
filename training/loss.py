"""The loss of a GPT: mean cross-entropy, in one piece or in chunks of the sequence.

Shapes: B batch, T tokens, C n_embd, V padded vocabulary.
"""

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from ops import split_into_chunks

if TYPE_CHECKING:
    from model import GPT


def mean_loss(model: "GPT", x: jax.Array, targets: jax.Array, chunks: int) -> jax.Array:
    """Return the mean loss in nats of targets (B, T) given x (B, T, C): see GPT.loss."""
    count = jnp.maximum((targets >= 0).sum(), 1)
    if chunks == 1:
        return loss_sum(model, x, targets) / count
    return chunked_loss_sum(model, x, targets, chunks) / count


def loss_sum(
    model: "GPT", x: jax.Array, targets: jax.Array, head: jax.Array | None = None
) -> jax.Array:
    """Return the sum of the losses of targets (B, T) given x (B, T, C); see GPT.logits for head."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(x, head), targets)
    return jnp.where(targets >= 0, losses, 0).sum()


def chunked_loss_sum(model: "GPT", x: jax.Array, targets: jax.Array, chunks: int) -> jax.Array:
    """Return loss_sum, computed for T / chunks positions at a time.

    Each shard of the batch has a head of its own, where it is: the chunks add up the head's
    gradient there, and what goes through the network is the sum over chunks."""
    R, K = model.layout.batch_shards
    matrix = model.head_matrix
    heads = jnp.broadcast_to(matrix, (R * K, *matrix.shape))

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk_loss(x_and_targets: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, targets = x_and_targets  # (R K, B / R, T / K / chunks, ...)
        return jax.vmap(partial(loss_sum, model))(x, targets, heads).sum()

    split = partial(split_into_chunks, chunks=chunks, row_shards=R, position_shards=K)
    return jax.lax.map(chunk_loss, (split(x), split(targets))).sum()
