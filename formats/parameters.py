"""Which parameters a model has: their paths and shapes, how many numbers, and what cannot be.

Start with `parameter_shapes`, which says it once for loading, exporting and counting. model.py
makes the parameters; a test compares the two. No JAX in here.

A *path* is our dotted name of a parameter, the layers stacked: h.attn.c_attn.kernel. Shapes: C
n_embd, H heads, KV heads of keys and values, D width of a head.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errors import require, require_at_least

if TYPE_CHECKING:
    from config import GPTConfig

EMBEDDINGS = ("wte.embedding", "lm_head.embedding")
"""The parameters with a row for each token, which a model pads to whole multiples."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3 stretches rotary positions to contexts longer than those it was trained on."""

    factor: float
    """Slow rotations, whose wave is longer than the old context / low_freq_factor, take so many
    times as long."""
    low_freq_factor: float
    """See factor."""
    high_freq_factor: float
    """Rotations whose wave is shorter than the old context / high_freq_factor stay as they are; in
    between the two go over into each other."""
    original_max_position_embeddings: int
    """The old context in tokens."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "factor", "original_max_position_embeddings")
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor={self.low_freq_factor} must be above 0 and below "
            f"high_freq_factor={self.high_freq_factor}",
            param="rope_scaling",
        )


def parameter_shapes(config: "GPTConfig") -> Shapes:
    """Return the path of each parameter with its shape, of one layer under h.

    The padding of the vocabulary is left out."""
    C = config.n_embd
    shapes: Shapes = {"wte.embedding": (config.vocab_size, C)}
    if config.positions == "learned":
        shapes["wpe.embedding"] = (config.block_size, C)
    for norm in ("h.ln_1", "h.ln_2", "ln_f"):
        shapes[f"{norm}.scale"] = (C,)
        if config.norm == "layernorm" and config.bias:
            shapes[f"{norm}.bias"] = (C,)
    if config.qk_norm:
        shapes["h.attn.q_norm.scale"] = shapes["h.attn.k_norm.scale"] = (config.head_dim,)
    shapes |= linear_shapes(config)
    if not config.tied_head:
        shapes["lm_head.embedding"] = (config.vocab_size, C)
    return shapes


def linear_shapes(config: "GPTConfig") -> Shapes:
    """Return those of parameter_shapes that belong to the Linear layers of a block."""
    C, W = config.n_embd, config.mlp_dim
    heads = config.n_head * config.head_dim
    keys = config.kv_heads * config.head_dim
    kernels = {
        "h.attn.c_attn": (C, heads + 2 * keys),
        "h.attn.c_proj": (heads, C),
        "h.mlp.c_fc": (C, W),
        "h.mlp.c_proj": (W, C),
    }
    if config.mlp == "gated":
        kernels["h.mlp.c_gate"] = (C, W)
    shapes: Shapes = {}
    for linear, shape in kernels.items():
        shapes[f"{linear}.kernel"] = shape
        if config.has_qkv_bias if linear == "h.attn.c_attn" else config.bias:
            shapes[f"{linear}.bias"] = shape[1:]
    return shapes


def number_of_parameters(config: "GPTConfig", embeddings: bool = True) -> int:
    """Return what GPTConfig.num_params says."""
    shapes = parameter_shapes(config)
    if not embeddings:
        shapes.pop("wpe.embedding", None)
        if not config.tied_head:
            shapes.pop("wte.embedding")
    return sum(
        math.prod(shape) * (config.n_layer if path.startswith("h.") else 1)
        for path, shape in shapes.items()
    )


def require_possible_model(config: "GPTConfig") -> None:
    """Raise UserError where choices of a GPTConfig exclude each other."""
    require(
        config.head_size is not None or config.n_embd % config.n_head == 0,
        f"n_embd={config.n_embd} must be divisible by n_head={config.n_head}, or head_size given",
        param="n_embd",
    )
    require(
        config.n_head % config.kv_heads == 0,
        f"n_head={config.n_head} must be divisible by n_kv_head={config.kv_heads}",
        param="n_kv_head",
    )
    if config.positions == "rotary":
        require(
            config.head_dim % 2 == 0,
            f"positions=rotary turn pairs of numbers: a head of {config.head_dim} must be even",
            param="head_size",
        )
        require(
            config.rope_theta > 1,
            f"rope_theta={config.rope_theta} must be above 1",
            param="rope_theta",
        )
        return
    default = type(config).rope_theta
    for name, unused in (("rope_theta", default), ("rope_scaling", None)):
        value = getattr(config, name)
        require(
            value == unused,
            f"{name}={value} is for positions=rotary, not {config.positions}",
            param=name,
        )
