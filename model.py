"""GPTs in Flax NNX, defined once: training calls them without a cache, generation with one.

Start with `GPT.__call__`, then `Block`, then `CausalSelfAttention`; ops.py holds the arithmetic.
There is one Block: what GPT-2, Llama and Qwen do differently are choices of GPTConfig. Names are
GPT-2's own (wte, wpe, h, ln_1, attn.c_attn, ...). Precision, stated once: parameters, sums,
softmax, norms, rotations, logits, loss and what blocks add to are float32; the inputs of every
matmul are rounded to config.dtype (see ops.einsum), and not on a CPU the results of Linear too.

Shapes: B batch, T tokens, C n_embd, H heads, KV heads of keys and values, G = H / KV, D head_dim, L
layers, V padded vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import checkpoints
import pretrained
from config import Dtype, GPTConfig
from errors import require
from formats.parameters import EMBEDDINGS
from generation import Cache, Generation, Sampling, check_prompts, tuple_of
from kernels.packed_linear import PackedLinear, unstack
from ops import (
    ACTIVATIONS,
    causal_attention,
    dropout,
    einsum,
    flash_attention,
    head_logits,
    kept_dtype,
    mean,
    rotate,
    saveable,
    split_keys,
)
from sequence import SamplingParams
from tokenizer import Tokenizer
from training.loss import mean_loss

# Nested by the path of the module attribute: {"h": {"ln_1": {"scale": (L, C), ...}, ...}, ...}
Params = dict[str, Any]


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias over the last axis, in float32.

    The bias is optional. Ba et al. 2016."""

    def __init__(self, config: GPTConfig):
        self.epsilon = config.layer_norm_epsilon
        self.scale = nnx.Param(jnp.ones(config.n_embd))
        self.bias = nnx.Param(jnp.zeros(config.n_embd)) if config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> (..., C)"""
        x = saveable(x - mean(x))
        x = x * jax.lax.rsqrt(mean(x * x) + self.epsilon) * self.scale[...]
        return x if self.bias is None else x + self.bias[...]


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean of squares + epsilon) * scale over the last axis, in float32.

    Zhang & Sennrich 2019."""

    def __init__(self, config: GPTConfig, width: int | None = None):
        """width: of the last axis, n_embd by default."""
        self.epsilon = config.layer_norm_epsilon
        self.scale = nnx.Param(jnp.ones(config.n_embd if width is None else width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, ..., width) -> (B, ..., width)"""
        x = saveable(x.astype(jnp.float32))
        return x * jax.lax.rsqrt(mean(x * x) + self.epsilon) * self.scale[...]


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class Linear(nnx.Module):
    """y = x @ kernel + bias, with the kernel (in, out) in float32, as GPT-2's Conv1D has it.

    Sums are float32; y and the gradient of x are rounded, see kept_dtype. Not nnx.Linear, which
    cannot sum bfloat16 inputs in float32 both forward and backward."""

    def __init__(self, inputs: int, outputs: int, config: GPTConfig, bias: bool | None = None):
        """bias: whether there is one, by default as config says."""
        has_bias = config.bias if bias is None else bias
        self.dtype = config.dtype
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))  # GPT._init_weights fills it
        self.bias = nnx.Param(jnp.zeros(outputs)) if has_bias else None

    def __call__(self, x: jax.Array, parts: int = 1) -> jax.Array:
        """(B, T, in) -> (B, T, parts, out / parts); (B, T, out) if there is one part.

        Parts that are an axis, rather than cut from `out`, can each be sharded alike."""
        kept = kept_dtype(self.dtype)
        kernel = self.kernel[...]
        kernel = kernel.reshape(len(kernel), parts, -1)
        y = einsum("bti,ipo->btpo", x.astype(kept), kernel, self.dtype, kept)
        if self.bias is not None:
            y = (y + self.bias[...].reshape(parts, -1)).astype(kept)
        return y.squeeze(2) if parts == 1 else y


class CausalSelfAttention(nnx.Module):
    """Multi-head attention of each position to itself and those before it (Vaswani et al. 2017).

    c_attn makes G + 2 parts, each KV D wide: part g < G has query g of every group of heads, which
    is head h = kv G + g; then come k and v. So a mesh cuts all parts alike, by heads of keys. With
    as many heads of keys as of queries these are q, k and v, side by side as GPT-2 has them."""

    def __init__(self, config: GPTConfig):
        self.config = config
        width = config.qkv_parts * config.kv_heads * config.head_dim
        self.c_attn = Linear(config.n_embd, width, config, bias=config.has_qkv_bias)
        self.c_proj = Linear(config.n_head * config.head_dim, config.n_embd, config)
        self.q_norm = RMSNorm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(config, config.head_dim) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        cache: Cache | None = None,
        layer: int | jax.Array = 0,
        probs_keys: jax.Array | None = None,
        output_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """x (B, T, C) -> (B, T, C), cache.

        Without a cache: causal attention over x. With one: the T tokens extend what `layer` of the
        cache holds, any T >= 1. The keys (B,) are for dropout, of the probabilities and of the
        output."""
        B, T, _ = x.shape
        q, k, v = self.query_key_value(x, jnp.arange(T) if cache is None else cache.positions(T))
        if cache is not None:
            y, cache = cache.attend(layer, q, k, v)
        elif self.config.training_attention == "cudnn":
            y = flash_attention(q, k, v, self.config.dtype)
        else:
            y = causal_attention(q, k, v, self.config.dtype, self.config.dropout, probs_keys)
        y = self.c_proj(y.reshape(B, T, -1))
        return dropout(y, self.config.dropout, output_keys), cache

    def query_key_value(
        self, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x (B, T, C) -> q (B, T, H, D), k (B, T, KV, D), v (B, T, KV, D), normed and rotated.

        positions (T,) or (B, T)."""
        config = self.config
        B, T, _ = x.shape
        G, D = config.qkv_parts - 2, config.head_dim
        parts = jnp.moveaxis(self.c_attn(x, parts=G + 2), 2, 0)  # (G + 2, B, T, KV D)
        *q_parts, k, v = (part.reshape(B, T, -1, D) for part in parts)
        q = q_parts[0] if G == 1 else jnp.stack(q_parts, 3).reshape(B, T, config.n_head, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.positions == "rotary":
            q, k = rotate(q, positions, config), rotate(k, positions, config)
        return q, k, v


class MLP(nnx.Module):
    """Two products with an activation between them; gated by a third (Shazeer 2020).

    The gate is a matrix of its own, not half of c_fc: so each is cut over a mesh by columns, and is
    one matrix to Muon."""

    def __init__(self, config: GPTConfig):
        self.config = config
        self.activation = ACTIVATIONS[config.activation]
        self.c_fc = Linear(config.n_embd, config.mlp_dim, config)
        self.c_proj = Linear(config.mlp_dim, config.n_embd, config)
        is_gated = config.mlp == "gated"
        self.c_gate = Linear(config.n_embd, config.mlp_dim, config) if is_gated else None

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, C); keys (B,) for dropout."""
        hidden = saveable(self.c_fc(x))
        if self.c_gate is not None:
            hidden = self.activation(saveable(self.c_gate(x))) * hidden
        else:
            hidden = self.activation(hidden)
        return dropout(self.c_proj(hidden), self.config.dropout, keys)


class Block(nnx.Module):
    """One transformer block, which norms what its two layers read (Radford et al. 2019)."""

    def __init__(self, config: GPTConfig):
        norm = NORMS[config.norm]
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: jax.Array,
        cache: Cache | None = None,
        layer: int | jax.Array = 0,
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """x (B, T, C), cache -> x (B, T, C), cache; dropout_keys (B,)."""
        probs_keys, attn_keys, mlp_keys = split_keys(dropout_keys, 3)
        y, cache = self.attn(self.ln_1(x), cache, layer, probs_keys, attn_keys)
        x = x + y
        return x + self.mlp(self.ln_2(x), mlp_keys), cache


class OneDevice:
    """How a GPT is spread over devices: not at all. training/layout.py has the other layout."""

    batch_shards = (1, 1)  # into how many parts the rows and the positions of a batch are cut
    scan = staticmethod(jax.lax.scan)  # iterates over the blocks


ONE_DEVICE = OneDevice()


class GPT(nnx.Module):
    """Embeddings of tokens and, as config says, positions; L blocks, a norm, a head.

    The head's matrix is the token embedding, unless config says otherwise. The blocks are one Block
    whose every parameter has a leading layer axis; the forward pass scans over it, so compile time
    does not depend on n_layer. `for_inference` unstacks them."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs, layout: Any = ONE_DEVICE):
        self.config = config
        self.layout = layout
        self.wte = nnx.Embed(config.padded_vocab_size, config.n_embd, rngs=rngs)
        is_learned = config.positions == "learned"
        self.wpe = nnx.Embed(config.block_size, config.n_embd, rngs=rngs) if is_learned else None
        make_stack = nnx.vmap(lambda _: Block(config), out_axes=0)
        self.h: Any = make_stack(jnp.arange(config.n_layer))  # for_inference: nnx.List of Blocks
        self.ln_f = NORMS[config.norm](config)
        V = config.padded_vocab_size
        self.lm_head = None if config.tied_head else nnx.Embed(V, config.n_embd, rngs=rngs)
        self.head: PackedLinear | None = None  # for_inference may pack the head's matrix
        self._init_weights(rngs)

    def _init_weights(self, rngs: nnx.Rngs) -> None:
        """Initialise as GPT-2 does; by path, because stacked parameters have one more axis.

        Embeddings and kernels are normal(0.02), and residual projections 1 / sqrt(2 L) of that.
        Biases stay 0 and scales 1. Rows of the vocabulary padding are 0."""
        flat = nnx.traversals.flatten_mapping(self.params())
        for path, param in flat.items():
            name = ".".join(path)
            if not name.endswith(("kernel", "embedding")):
                continue
            std = 0.02
            if name.endswith("c_proj.kernel"):
                std = std * (2 * self.config.n_layer) ** -0.5
            param = std * jax.random.normal(rngs.params(), param.shape)
            if name in EMBEDDINGS:
                param = param.at[self.config.vocab_size :].set(0)
            flat[path] = param
        nnx.update(self, nnx.traversals.unflatten_mapping(flat))

    def __call__(
        self,
        tokens: jax.Array,
        cache: Cache | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """tokens (B, T) int -> logits (B, T, V) float32, cache.

        Without a cache: plain causal attention, T <= block_size. Columns of the vocabulary padding
        are -inf. dropout_key: pass one to train with dropout."""
        x, cache = self.hidden(tokens, cache, dropout_key=dropout_key)
        return self.logits(x), cache

    def hidden(
        self,
        tokens: jax.Array,
        cache: Cache | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """tokens (B, T) -> what the head reads, (B, T, C) float32, and the cache."""
        B, T = tokens.shape
        size = self.config.block_size
        require(T <= size, f"{T} tokens do not fit block_size={size}")
        embedding_keys, blocks_key = None, None
        if dropout_key is not None:
            key, blocks_key = jax.random.split(dropout_key)
            embedding_keys = jax.random.split(key, B)
        positions = jnp.arange(T) if cache is None else cache.positions(T)
        x = self.wte(tokens).astype(jnp.float32)
        if self.wpe is not None:
            x = x + self.wpe(positions).astype(jnp.float32)
        x = dropout(x, self.config.dropout, embedding_keys)
        x, cache = self.blocks(x, cache, blocks_key)
        return self.ln_f(x), None if cache is None else cache.advance(T)

    def blocks(
        self, x: jax.Array, cache: Cache | None = None, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """x (B, T, C), cache -> x (B, T, C), cache through all layers."""
        if isinstance(self.h, nnx.List):  # unstacked by for_inference
            assert dropout_key is None, "a model for inference has no dropout"
            for i, block in enumerate(self.h):
                x, cache = block(x, cache, i)
            return x, cache
        row_keys = None if dropout_key is None else jax.random.split(dropout_key, len(x))
        return self._scan_blocks(x, cache, row_keys)

    def _scan_blocks(
        self, x: jax.Array, cache: Cache | None, row_keys: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        """Run the stack of blocks: one Block is traced, n_layer run. row_keys (B,) for dropout.

        The cache rides in the carry so that its buffer is updated in place; the keys ride there so
        that the carry is all that belongs to the rows."""
        graphdef, weights = nnx.split(self.h)

        def layer(carry: tuple, weights_and_index: tuple) -> tuple[tuple, None]:
            x, cache, row_keys = carry
            layer_weights, i = weights_and_index
            layer_keys = None
            if row_keys is not None:
                layer_keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, i)
            block = nnx.merge(graphdef, layer_weights)
            x, cache = block(x, cache, i, layer_keys)
            return (x, cache, row_keys), None

        if self.config.remat:
            # The body of a scan is not merged with its backward pass anyway.
            layer = jax.checkpoint(layer, prevent_cse=False)
        L = self.config.n_layer
        (x, cache, _), _ = self.layout.scan(
            layer,
            (x, cache, row_keys),
            (weights, jnp.arange(L)),
            unroll=min(L, self.config.scan_unroll),
        )
        return x, cache

    @property
    def head_matrix(self) -> jax.Array:
        """What the last hidden state is multiplied by: (V, C)."""
        return (self.wte if self.lm_head is None else self.lm_head).embedding[...]

    def logits(self, x: jax.Array) -> jax.Array:
        """(B, T, C) -> (B, T, V) float32, -inf for the padding of the vocabulary."""
        if self.head is not None:
            return self.head(x)
        return head_logits(x, self.head_matrix, self.config)

    def loss(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        *,
        chunks: int = 1,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the mean cross-entropy in nats of targets given tokens, both (B, T).

        A target below 0 does not count. Logits exist for T / chunks positions at a time: with
        chunks > 1 (B, T, V) in float32 is never held."""
        x, _ = self.hidden(tokens, dropout_key=dropout_key)
        return mean_loss(self, x, targets, chunks)

    def for_inference(self, dtype: Dtype | None = None, *, packing: str | None = None) -> "GPT":
        """Return a copy to generate with: the same logits up to the rounding of the weights.

        Weights of matmuls are rounded to dtype (default: config.dtype) once instead of at every
        step, or, for a CPU, packed for its native kernels: packing is what choose_packing of
        kernels/cpu_kernels.py returned. There is one Block per layer instead of a stack, whose
        slices a CPU copies at every step."""
        config = dataclasses.replace(self.config, dtype=dtype or self.config.dtype)
        return unstack(GPT.from_params(config, self.params()), packing)

    def params(self) -> Params:
        """Return the parameters as a nested dict of arrays."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    @classmethod
    def from_params(cls, config: GPTConfig, params: Params) -> "GPT":
        """Return a model around existing (stacked) parameters; nothing is initialised or copied."""
        return nnx.merge(gpt_graphdef(config), params)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, **overrides: Any) -> "GPT":
        """Load a model by name, from a Hugging Face directory, a GGUF file, or a run of train.py.

        Names: gpt2, gpt2-medium, gpt2-large, gpt2-xl. Of an out_dir the best checkpoint is taken.
        overrides: fields of GPTConfig, see pretrained.read; dtype alone for an out_dir. Raises
        UserError."""
        if name_or_dir not in pretrained.HUB and (Path(name_or_dir) / "checkpoints").is_dir():
            for field, value in overrides.items():
                require(
                    field == "dtype",
                    f"{field}={value} cannot be chosen: {name_or_dir} is an out_dir of train.py, "
                    "which leaves only dtype to choose",
                    param=field,
                )
            config, params, _, _ = checkpoints.read_run(Path(name_or_dir), **overrides)
        else:
            config, params = pretrained.read(name_or_dir, put=jax.device_put, **overrides)
        return cls.from_params(config, params)

    def save_pretrained(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write a directory that transformers.AutoModelForCausalLM loads: see pretrained.write.

        Without a tokenizer no tokenizer files are written."""
        pretrained.write(directory, self.config, self.params(), tokenizer)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_token: int | tuple[int, ...] | None = None,
    ) -> list[list[int]]:
        """Continue prompts of any, also different, lengths; return each with its new tokens.

        A row gets up to max_new_tokens and ends with a stop_token. temperature, top_k, top_p and
        min_p mean what they mean in SamplingParams. The token at position n of row b is a function
        of (seed + b, n) and its distribution: it does not depend on the other rows, and is the one
        that Engine draws for a request with that seed. When a row outgrows block_size, its oldest
        block_size / 2 tokens are dropped and the rest is read again."""
        rows = [list(map(int, prompt)) for prompt in prompts]
        for burst in self.stream(
            rows,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop_token=stop_token,
            burst=max_new_tokens,
        ):
            for row, new in zip(rows, burst, strict=True):
                row += new
        return rows

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_token: int | tuple[int, ...] | None = None,
        burst: int = 16,
    ) -> Iterator[list[list[int]]]:
        """Yield the new tokens of each row as they come, up to `burst` at a time.

        Each burst is one device call. The other arguments are those of `generate`."""
        check_prompts(prompts, self.config.vocab_size)
        settings = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        graphdef, params = nnx.split(self)
        generation = Generation(
            graphdef,
            params,
            self.config,
            prompts,
            Sampling.create(settings, seed, len(prompts), self.config.vocab_size),
            max_new_tokens=max_new_tokens,
            stop_tokens=tuple_of(stop_token),
            burst=burst,
        )
        return generation.bursts()


def gpt_graphdef(config: GPTConfig, layout: Any = ONE_DEVICE) -> nnx.GraphDef:
    """Return the static half of a GPT: nnx.merge(gpt_graphdef(config), params) is the model.

    Allocates nothing."""

    def fresh_model() -> GPT:
        return GPT(config, rngs=nnx.Rngs(0), layout=layout)

    graphdef, _ = nnx.split(nnx.eval_shape(fresh_model))
    return graphdef
