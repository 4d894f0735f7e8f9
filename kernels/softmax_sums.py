"""What kernels of attention for any device share: the softmax over the positions seen so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The maximum of no scores. It is finite, since exp(-inf - -inf) would be NaN.
NO_SCORE = -1e30


class SoftmaxSums(NamedTuple):
    """A weighted mean over the positions seen so far, before its division.

    A weight is exp(score - maximum); see Milakov & Gimelshein 2018."""

    maximum: jax.Array  # (...) float32, the largest score
    denominator: jax.Array  # (...) float32, the sum of the weights
    values: jax.Array  # (..., D) float32, the weighted sum of the values

    @classmethod
    def empty(cls, shape: tuple[int, ...], D: int) -> "SoftmaxSums":
        """Return the sums over no position at all."""
        maximum = jnp.full(shape, NO_SCORE, jnp.float32)
        return cls(maximum, jnp.zeros(shape), jnp.zeros((*shape, D)))

    def merge(self, later: "SoftmaxSums") -> "SoftmaxSums":
        """Return the sums over these positions and over later ones."""
        maximum = jnp.maximum(self.maximum, later.maximum)
        rescale = jnp.exp(self.maximum - maximum)
        rescale_later = jnp.exp(later.maximum - maximum)
        return SoftmaxSums(
            maximum,
            self.denominator * rescale + later.denominator * rescale_later,
            self.values * rescale[..., None] + later.values * rescale_later[..., None],
        )

    def mean(self) -> jax.Array:
        """Return the weighted mean (..., D), zero where no position was seen."""
        denominator = jnp.where(self.denominator == 0, 1, self.denominator)
        return self.values / denominator[..., None]


def visible_positions(T: int, context_lens: jax.Array, new_lens: jax.Array) -> jax.Array:
    """Return (B, T) int32: how many positions, from 0 on, each new token sees; 0 for padding."""
    token = jnp.arange(T, dtype=jnp.int32)
    is_real = token < new_lens[:, None]
    return jnp.where(is_real, context_lens[:, None] + token + 1, 0)


def dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the einsum with float32 sums; no tensor core or MXU rounds inputs that are float32."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)
