"""GPT-2 in Flax NNX, defined once: training calls it without a cache, generation with one.

Shapes: B batch, T tokens, C n_embd, H heads, D head_dim = C / H, L layers, V padded vocabulary, S cache slots.
Names are GPT-2's own (wte, wpe, h, ln_1, attn.c_attn, ...). Precision, stated once: parameters, sums, softmax, LayerNorm and
loss are float32; the inputs of every matmul are rounded to config.dtype (see `einsum`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import pretrained
from config import GPTConfig
from errors import require
from generation import Sampling, decode, prefill, round_up, window_start
from ops import ACTIVATIONS, causal_attention, dropout, einsum, flash_attention, mean
from tokenizer import Tokenizer

Params = dict  # nested dict of arrays, keyed by the path of the module attribute: {"h": {"ln_1": {"scale": (L, C)}}}


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32; the bias is optional (Ba et al. 2016)."""

    def __init__(self, config: GPTConfig):
        self.epsilon = config.layer_norm_epsilon
        self.scale = nnx.Param(jnp.ones(config.n_embd))
        self.bias = nnx.Param(jnp.zeros(config.n_embd)) if config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> (..., C)"""
        x = x - mean(x)
        x = x * jax.lax.rsqrt(mean(x * x) + self.epsilon) * self.scale[...]
        return x if self.bias is None else x + self.bias[...]


class Linear(nnx.Module):
    """y = x @ kernel + bias; kernel (in, out) float32 as GPT-2's Conv1D has it. nnx.Linear cannot sum bfloat16 inputs in
    float32 both forward and backward."""

    def __init__(self, inputs: int, outputs: int, config: GPTConfig):
        self.dtype = config.dtype
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))  # GPT._init_weights fills it
        self.bias = nnx.Param(jnp.zeros(outputs)) if config.bias else None

    def __call__(self, x: jax.Array, parts: int = 1) -> jax.Array:
        """(B, T, in) -> (B, T, parts, out / parts) float32; without the axis of length 1 if there is one part. Parts as an
        axis, not cut from `out`, let each of them be sharded alike."""
        kernel = self.kernel[...]
        y = einsum("bti,ipo->btpo", x, kernel.reshape(len(kernel), parts, -1), self.dtype)
        y = y if self.bias is None else y + self.bias[...].reshape(parts, -1)
        return y.squeeze(2) if parts == 1 else y


class CausalSelfAttention(nnx.Module):
    def __init__(self, config: GPTConfig):
        self.config = config
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config)
        self.c_proj = Linear(config.n_embd, config.n_embd, config)

    def __call__(self, x: jax.Array, cache=None, layer=None, keys=(None, None)):
        """x (B, T, C) -> (B, T, C), cache. Without a cache: causal attention over x. With one (see KVCache): the T tokens
        extend what `layer` of the cache holds, any T >= 1. keys: (B,) each, for dropout of the probabilities and the output."""
        B, T, C = x.shape
        H, D = self.config.n_head, self.config.head_dim
        q, k, v = (a.reshape(B, T, H, D) for a in jnp.moveaxis(self.c_attn(x, parts=3), 2, 0))
        if cache is not None:
            y, cache = cache.attend(layer, q, k, v)
        elif self.config.training_attention == "cudnn":
            y = flash_attention(q, k, v, self.config.dtype)
        else:
            y = causal_attention(q, k, v, self.config.dtype, self.config.dropout, keys[0])
        return dropout(self.c_proj(y.reshape(B, T, C)), self.config.dropout, keys[1]), cache


class MLP(nnx.Module):
    def __init__(self, config: GPTConfig):
        self.activation, self.rate = ACTIVATIONS[config.activation], config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config)

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, C)"""
        return dropout(self.c_proj(self.activation(self.c_fc(x))), self.rate, keys)


class Block(nnx.Module):
    """One pre-LayerNorm transformer block (Radford et al. 2019)."""

    def __init__(self, config: GPTConfig):
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def __call__(self, x: jax.Array, cache=None, layer=None, dropout_keys: jax.Array | None = None):
        """x (B, T, C), cache -> x (B, T, C), cache; dropout_keys (B,)"""
        keys = (
            (None,) * 3
            if dropout_keys is None
            else jax.vmap(lambda key: jax.random.split(key, 3))(dropout_keys).T
        )
        y, cache = self.attn(self.ln_1(x), cache, layer, keys[:2])
        x = x + y
        return x + self.mlp(self.ln_2(x), keys[2]), cache


class OneDevice:
    """How a GPT is spread over devices: not at all. Another layout has the same attributes (mesh.Layout)."""

    batch_shards = 1, 1  # into how many parts the rows and the positions of a batch are cut
    scan = staticmethod(jax.lax.scan)  # iterates the blocks


class GPT(nnx.Module):
    """GPT-2 (Radford et al. 2019): token and position embeddings, L blocks, LayerNorm, a head tied to the token embedding.

    The blocks are one Block whose every parameter has a leading layer axis; the forward pass scans over it, so compile time does
    not depend on n_layer. `for_inference` unstacks them."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs, layout=OneDevice()):
        self.config = config
        self.layout = layout
        self.wte = nnx.Embed(config.padded_vocab_size, config.n_embd, rngs=rngs)
        self.wpe = nnx.Embed(config.block_size, config.n_embd, rngs=rngs)
        self.h = nnx.vmap(lambda _: Block(config), out_axes=0)(jnp.arange(config.n_layer))
        self.ln_f = LayerNorm(config)
        self._init_weights(rngs)

    def _init_weights(self, rngs: nnx.Rngs) -> None:
        """GPT-2's initialisation, by parameter path: normal(0.02) for embeddings and kernels, residual projections scaled
        by 1/sqrt(2 L); biases stay 0 and scales 1. Rows of the vocabulary padding are 0."""

        def init(path, param):
            name = ".".join(map(str, path))
            if name.endswith(("kernel", "embedding")):
                std = (
                    0.02 * (2 * self.config.n_layer) ** -0.5
                    if name.endswith("c_proj.kernel")
                    else 0.02
                )
                param = std * jax.random.normal(rngs.params(), param.shape)
                if name == "wte.embedding":
                    param = param.at[self.config.vocab_size :].set(0)
            return param

        state = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        flat = nnx.traversals.flatten_mapping(state)
        nnx.update(
            self,
            nnx.traversals.unflatten_mapping(
                {path: init(path, param) for path, param in flat.items()}
            ),
        )

    def __call__(self, tokens: jax.Array, cache=None, *, dropout_key: jax.Array | None = None):
        """tokens (B, T) int -> logits (B, T, V) float32, cache. Without a cache: plain causal attention, T <= block_size.

        Columns of the vocabulary padding are -inf. dropout_key: pass one to train with dropout."""
        x, cache = self.hidden(tokens, cache, dropout_key=dropout_key)
        return self.logits(x), cache

    def hidden(self, tokens: jax.Array, cache=None, *, dropout_key: jax.Array | None = None):
        """tokens (B, T) -> what the head reads: (B, T, C) float32, cache."""
        T = tokens.shape[1]
        require(
            T <= self.config.block_size,
            f"{T} tokens do not fit block_size={self.config.block_size}",
        )
        keys, block_key = None, None
        if dropout_key is not None:
            key, block_key = jax.random.split(dropout_key)
            keys = jax.random.split(key, len(tokens))
        positions = jnp.arange(T) if cache is None else cache.positions(T)
        x = self.wte(tokens).astype(jnp.float32) + self.wpe(positions).astype(jnp.float32)
        x, cache = self.blocks(dropout(x, self.config.dropout, keys), cache, block_key)
        return self.ln_f(x), None if cache is None else cache.advance(T)

    def blocks(self, x: jax.Array, cache=None, dropout_key: jax.Array | None = None):
        """x (B, T, C), cache -> x (B, T, C), cache through all layers."""
        L = self.config.n_layer
        if isinstance(self.h, nnx.List):  # unstacked by for_inference
            for i, block in enumerate(self.h):
                x, cache = block(x, cache, i)
            return x, cache
        keys = None if dropout_key is None else jax.random.split(dropout_key, len(x))
        block, weights = nnx.split(self.h)

        # One Block is traced, n_layer run. The cache rides in the carry so that its buffer is updated in place; the keys, so
        # that the carry is all that belongs to the rows.
        def layer(carry, weights_and_index):
            (x, cache, keys), (weights, i) = carry, weights_and_index
            layer_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            return (*nnx.merge(block, weights)(x, cache, i, layer_keys), keys), None

        if self.config.remat:
            layer = jax.checkpoint(
                layer, prevent_cse=False
            )  # a scan's body is not merged with its backward pass anyway
        xs = (weights, jnp.arange(L))
        (x, cache, _), _ = self.layout.scan(
            layer, (x, cache, keys), xs, unroll=min(L, self.config.scan_unroll)
        )
        return x, cache

    def logits(self, x: jax.Array, head: jax.Array | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, V) float32; the padding of the vocabulary is -inf, so it has no probability anywhere.
        head (V, C): instead of the token embedding."""
        logits = einsum(
            "btc,vc->btv", x, self.wte.embedding[...] if head is None else head, self.config.dtype
        )
        if self.config.padded_vocab_size == self.config.vocab_size:
            return logits
        return jnp.where(
            jnp.arange(self.config.padded_vocab_size) < self.config.vocab_size, logits, -jnp.inf
        )

    def loss(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        *,
        chunks: int = 1,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Mean cross-entropy in nats of targets given tokens, both (B, T); a target of -1 does not count.

        With chunks > 1 logits exist for T / chunks positions at a time, in the backward pass too, where they are computed again:
        (B, T, V) in float32 is never held."""
        x, _ = self.hidden(tokens, dropout_key=dropout_key)

        def chunk_loss(x, targets, head=None):
            losses = optax.softmax_cross_entropy_with_integer_labels(self.logits(x, head), targets)
            return jnp.where(targets >= 0, losses, 0).sum()

        count = jnp.maximum((targets >= 0).sum(), 1)
        if chunks == 1:
            return chunk_loss(x, targets) / count
        # One head per shard of the batch, each where its shard is: the chunks add up its gradient there, and what goes through
        # the network is the sum over chunks. Every chunks-th position makes a chunk, so that each has its part of every shard.
        (R, K), (B, T) = self.layout.batch_shards, tokens.shape
        heads = jnp.broadcast_to(self.wte.embedding[...], (R * K, *self.wte.embedding.shape))

        def split(a):  # (B, T, ...) -> (chunks, R K, B / R, T / K / chunks, ...)
            a = a.reshape(R, B // R, K, T // K // chunks, chunks, *a.shape[2:])
            return jnp.moveaxis(a, (4, 2), (0, 2)).reshape(
                chunks, R * K, B // R, T // K // chunks, *a.shape[5:]
            )

        @partial(jax.checkpoint, prevent_cse=False)
        def loss_of_chunk(x_targets):
            return jax.vmap(chunk_loss)(*x_targets, heads).sum()

        return jax.lax.map(loss_of_chunk, (split(x), split(targets))).sum() / count

    def for_inference(self, dtype: str | None = None) -> "GPT":
        """A copy to generate with: matmul weights rounded to dtype (default: config.dtype) once instead of at every step, and
        one Block per layer instead of a stack, whose slices a CPU copies at every step. Same logits up to the rounding of
        the embeddings."""
        dtype = dtype or self.config.dtype
        model = GPT.from_params(dataclasses.replace(self.config, dtype=dtype), self.params())
        round_ = lambda path, a: a.astype(dtype) if path[-1].key in ("kernel", "embedding") else a
        nnx.update(model, jax.tree_util.tree_map_with_path(round_, model.params()))
        block, weights = nnx.split(model.h)
        model.h = nnx.List(
            [
                nnx.merge(block, jax.tree.map(lambda a: a[i], weights))
                for i in range(self.config.n_layer)
            ]
        )
        return model

    def params(self) -> Params:
        """The parameters as a nested dict of arrays."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    @classmethod
    def from_params(cls, config: GPTConfig, params: Params) -> "GPT":
        """A model around existing (stacked) parameters; nothing is initialised or copied."""
        return nnx.merge(gpt_graphdef(config), params)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path, **overrides) -> "GPT":
        """gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a directory in Hugging Face's form. overrides: see pretrained.read."""
        return cls.from_params(*pretrained.read(name_or_dir, put=jax.device_put, **overrides))

    def save_pretrained(self, directory: str | Path, tokenizer: Tokenizer) -> None:
        """Write a directory that transformers.AutoModelForCausalLM loads: see pretrained.write."""
        pretrained.write(directory, self.config, self.params(), tokenizer)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop_token: int | None = None,
    ) -> list[list[int]]:
        """Continue prompts of any, also different, lengths: returns each prompt with up to max_new_tokens new tokens.

        temperature divides the logits, 0 takes the likeliest token; then only the top_k likeliest are kept, then the smallest
        set of at least probability top_p (Holtzman et al. 2020). The token at position n of row b is drawn with the key
        (seed + b, n): it does not depend on the other rows. A row ends with stop_token, the call when all have ended.
        Sliding window: when a row outgrows block_size, its oldest block_size/2 tokens are dropped and the rest is read again."""
        rows = [list(map(int, p)) for p in prompts]
        for burst in self.stream(
            rows,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_token=stop_token,
            burst=max_new_tokens,
        ):
            rows = [row + new for row, new in zip(rows, burst)]
        return rows

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop_token: int | None = None,
        burst: int = 16,
    ) -> Iterator[list[list[int]]]:
        """As `generate`, but yields the new tokens of each row as they come, up to `burst` at a time: one device call each."""
        require(
            len(prompts) > 0 and all(len(p) for p in prompts),
            "each prompt needs at least one token",
        )
        worst = max(max(p) for p in prompts), min(min(p) for p in prompts)
        require(
            worst[0] < self.config.vocab_size and worst[1] >= 0,
            f"prompt tokens must be in [0, {self.config.vocab_size}), got {worst[1]} to {worst[0]}",
        )
        graphdef, params = nnx.split(self)
        sampling = Sampling(float(temperature), top_k, float(top_p))
        size = self.config.block_size
        rows, made, done = [list(map(int, p)) for p in prompts], 0, np.zeros(len(prompts), bool)
        seeds = jnp.arange(len(rows), dtype=jnp.uint32) + jnp.uint32(seed)
        slots = min(size, round_up(max(map(len, rows)) + max_new_tokens, 64))
        starts = None
        while made < max_new_tokens and not done.all():
            if starts != (starts := [window_start(len(row), size) for row in rows]):
                context = [row[start:] for row, start in zip(rows, starts)]
                T = min(slots, round_up(max(map(len, context)), 64))
                tokens = np.zeros((len(rows), T), np.int32)
                for row, c in zip(tokens, context):
                    row[: len(c)] = c
                cache, token = prefill(
                    graphdef,
                    params,
                    tokens,
                    np.array(list(map(len, context))),
                    np.array(list(map(len, rows))),
                    seeds,
                    sampling,
                    slots,
                )
                new = np.asarray(token)[:, None]
            else:
                # A step reads the last token of each row and samples the next: a row has room while it is not past its window.
                room = min(start + size - len(row) for start, row in zip(starts, rows)) + 1
                steps = min(burst, max_new_tokens - made, room)
                positions = np.array(list(map(len, rows)))
                cache, token, new, steps = decode(
                    graphdef,
                    params,
                    cache,
                    token,
                    positions,
                    seeds,
                    done,
                    steps,
                    sampling,
                    stop_token,
                    burst,
                )
                new = np.asarray(new)[:, : int(steps)]
            fresh = []
            for b, row in enumerate(rows):
                taken = new[b].tolist()
                if stop_token in taken:
                    taken = taken[: taken.index(stop_token) + 1]
                fresh.append([] if done[b] else taken)
                row += new[b].tolist()
                done[b] |= stop_token in taken
            made += new.shape[1]
            yield fresh


def gpt_graphdef(config: GPTConfig, layout=OneDevice()) -> nnx.GraphDef:
    """The static half of a GPT: nnx.merge(gpt_graphdef(config), params) is the model. Allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), layout=layout)))[0]
