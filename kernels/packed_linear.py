"""What GPT.for_inference does to weights: rounds them, or packs them for the native CPU kernels."""

import operator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from config import Dtype
from kernels.cpu_kernels import ACTIVATIONS, PACK, Packed, product

if TYPE_CHECKING:
    from model import GPT, Block


class PackedLinear(nnx.Module):
    """y = activation(x @ kernel + bias), for inference alone: it has no gradient.

    A row's bits depend on nothing but the row, see cpu_kernels.product."""

    def __init__(
        self,
        kernel: jax.Array,
        bias: jax.Array | None,
        packing: str,
        activation: str = "none",
    ):
        """kernel (in, out) and bias (out,) float32; packing is a key of cpu_kernels.PACK."""
        packed = PACK[packing](kernel)
        self.inputs = packed.K
        self.outputs = packed.N
        self.activation = activation
        self.weights = nnx.Param(packed.weights)
        self.scales = nnx.Param(packed.scales)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: jax.Array, parts: int = 1) -> jax.Array:
        """(..., in) -> (..., parts, out / parts) float32; (..., out) if there is one part."""
        packed = Packed(self.weights[...], self.scales[...], self.inputs, self.outputs)
        bias = None if self.bias is None else self.bias[...]
        y = product(x, packed, bias, self.activation)
        return y if parts == 1 else y.reshape(*x.shape[:-1], parts, -1)


def round_weights(module: nnx.Module, dtype: Dtype) -> None:
    """Round what enters a matmul, kernels and embeddings, to dtype, in place."""

    def rounded(path: tuple, param: jax.Array) -> jax.Array:
        return param.astype(dtype) if path[-1].key in ("kernel", "embedding") else param

    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    nnx.update(module, jax.tree_util.tree_map_with_path(rounded, params))


def unstack(model: "GPT", packing: str | None) -> "GPT":
    """Make a model into the one that GPT.for_inference returns, in place, and return it."""
    dtype = model.config.dtype
    graphdef, weights = nnx.split(model.h)
    layers = []
    for i in range(model.config.n_layer):
        block = nnx.merge(graphdef, jax.tree.map(operator.itemgetter(i), weights))
        if packing is None:
            round_weights(block, dtype)
        else:
            pack_weights(block, packing)
        layers.append(block)
    model.h = nnx.List(layers)
    if packing is not None:
        model.head = nnx.data(packed_head(model, packing))
        model.lm_head = None  # a head of its own is read no more
    round_weights(model, dtype)  # the embeddings: all others are
    return model


def pack_weights(block: "Block", packing: str) -> None:
    """Put a PackedLinear in the place of each Linear of a block.

    The one before the activation applies it too, where the native kernels know it."""
    activation = block.mlp.config.activation
    fuses = activation in ACTIVATIONS
    if fuses:
        block.mlp.activation = as_it_is
    activated = "c_fc" if block.mlp.c_gate is None else "c_gate"
    for module, name in (
        (block.attn, "c_attn"),
        (block.attn, "c_proj"),
        (block.mlp, "c_fc"),
        (block.mlp, "c_gate"),
        (block.mlp, "c_proj"),
    ):
        linear = getattr(module, name)
        if linear is None:  # an MLP without a gate
            continue
        bias = None if linear.bias is None else linear.bias[...]
        fused = activation if fuses and name == activated else "none"
        setattr(module, name, PackedLinear(linear.kernel[...], bias, packing, fused))


def packed_head(model: "GPT", packing: str) -> PackedLinear:
    """Return the head of a model, whose bias of -inf masks the padding of the vocabulary."""
    is_padding = jnp.arange(model.config.padded_vocab_size) >= model.config.vocab_size
    bias = jnp.where(is_padding, -jnp.inf, 0.0)
    return PackedLinear(model.head_matrix.T, bias, packing)


def as_it_is(x: jax.Array) -> jax.Array:
    """Return x: the activation of an MLP whose first product applies its activation."""
    return x
