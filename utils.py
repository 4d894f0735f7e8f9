"""What training stands on: TrainState, the optimizer, and checkpoints."""

import dataclasses
import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

import pretrained
import tokenizer
from config import GPTConfig, ModelConfig, TrainConfig
from errors import require
from mesh import Layout, gather, make_mesh, path_name, shardings
from model import GPT, Params, gpt_graphdef


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state"],
    meta_fields=["graphdef", "tx", "mesh"],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes, as one pytree that goes into train_step and comes out of it, donated."""

    step: jax.Array  # () int32, updates done
    params: Params  # float32
    opt_state: Any  # of tx, float32
    graphdef: Any = dataclasses.field(repr=False)  # the static half of the model
    tx: optax.GradientTransformation = dataclasses.field(repr=False)
    mesh: Mesh

    @property
    def model(self) -> GPT:
        """The model to train with, inside jit."""
        outer = gather(self.mesh, {name: p for name, p in self.params.items() if name != "h"})
        return nnx.merge(self.graphdef, {**self.params, **outer})

    def lay_out(self, tree: Any) -> Any:
        """Inside jit: a TrainState, or a part of one, or gradients, which lies on the mesh as a TrainState does from here on."""
        return jax.lax.with_sharding_constraint(tree, shardings(self.mesh, tree))

    @classmethod
    def create(
        cls, config: TrainConfig, params: Params | None = None, mesh: Mesh | None = None
    ) -> "TrainState":
        """Step 0: `params` (on the host) or, without them, parameters initialised from config.seed. On `mesh`, by default one
        device; born sharded: no device ever holds more than its shards."""
        mesh = mesh or make_mesh("data:1", jax.devices()[:1])
        if params:  # each process reads and moves what its devices hold
            put = lambda a, sharding: jax.make_array_from_callback(
                a.shape, sharding, lambda index: a[index]
            )
            params = jax.tree.map(put, params, shardings(mesh, params))
        return initial_state(config, mesh, params)

    @classmethod
    def abstract(cls, config: TrainConfig, mesh: Mesh) -> "TrainState":
        """What create makes, as jax.ShapeDtypeStructs with shardings: what Checkpoints.restore wants."""
        state = jax.eval_shape(partial(initial_state, config, mesh, None))
        shape = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)
        return jax.tree.map(shape, state, shardings(mesh, state))


@partial(jax.jit, static_argnames=("config", "mesh"))
def initial_state(config: TrainConfig, mesh: Mesh, params: Params | None) -> TrainState:
    tx = create_optimizer(config)
    params = params or GPT(config.model, rngs=nnx.Rngs(config.seed)).params()
    graphdef = gpt_graphdef(config.model, Layout(mesh, config.model.remat))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), graphdef, tx, mesh)
    return state.lay_out(state)


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Update number -> learning rate: linear warmup, then as config.lr_schedule says.

    wsd is warmup-stable-decay (Hu et al. 2024): flat until the last fifth, then linear to min_lr."""
    peak, warmup, end = config.learning_rate, config.warmup_iters, config.decay_steps
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    if not config.decay_lr:
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
    if config.lr_schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, end - warmup, alpha=config.min_lr / peak)
        return optax.join_schedules([rise, fall], [warmup])
    flat = warmup + (end - warmup) * 4 // 5
    return optax.join_schedules(
        [
            rise,
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, config.min_lr, end - flat),
        ],
        [warmup, flat],
    )


def optimizer_group(config: TrainConfig, path: tuple) -> str:
    """Which of create_optimizer's groups a parameter belongs to. By path: the blocks are stacked, so a bias is 2-D."""
    name = path_name(path)
    if config.optimizer == "muon" and name.startswith("h.") and name.endswith("kernel"):
        return "muon"
    return "decay" if name.endswith(("kernel", "embedding")) else "no_decay"


@lru_cache  # the same object for the same config: it is a static part of TrainState, and a new one would compile train_step again
def create_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024), after clipping to a global norm.

    Weight decay is for what multiplies activations, kernels and embeddings, as in GPT-2 and nanoGPT; biases and LayerNorm
    scales have no redundant magnitude to shrink. Muon takes the kernels of the blocks, each layer's matrix by itself, with updates
    scaled to AdamW's size (Liu et al. 2025), so that one learning rate serves both; embeddings and vectors stay with AdamW."""
    rate = learning_rate_schedule(config)
    adamw = partial(optax.adamw, rate, b1=config.beta1, b2=config.beta2)
    # A stacked kernel is (L, in, out): axis 0 is a batch of matrices.
    matrices = lambda params: jax.tree.map(
        lambda _: optax.contrib.MuonDimensionNumbers(1, 2), params
    )
    groups = {
        "decay": adamw(weight_decay=config.weight_decay),
        "no_decay": adamw(weight_decay=0.0),
        "muon": optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        ),
    }
    labels = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: optimizer_group(config, path), params
    )
    clip = [optax.clip_by_global_norm(config.grad_clip)] if config.grad_clip else []
    return optax.chain(*clip, optax.multi_transform(groups, labels))


def write_atomically(path: Path, text: str) -> None:
    """Replace path by text, or leave it as it was."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def open_model(config: ModelConfig) -> tuple[GPT, tokenizer.Tokenizer, str]:
    """The model that config.out_dir or config.init_from names, in config.dtype if that is given: (GPT, tokenizer, its name)."""
    if config.out_dir is not None:
        model, tok, step = load_model(config.out_dir, config.dtype)
        return model, tok, f"step {step} of {config.out_dir}"
    dtype = {"dtype": config.dtype} if config.dtype else {}
    model, tok = (
        GPT.from_pretrained(config.init_from, **dtype),
        pretrained.load_tokenizer(config.init_from),
    )
    require(
        tok.vocab_size <= model.config.vocab_size,
        f"the tokenizer of {config.init_from} has {tok.vocab_size} tokens, the "
        f"model only {model.config.vocab_size}",
    )
    return model, tok, config.init_from


def load_model(out_dir: Path, dtype: str | None = None):
    """The best checkpoint of a run (the latest, if none was evaluated) as (GPT, tokenizer, step)."""
    out_dir = Path(out_dir)
    for name in ("config.json", "meta.json", "checkpoints"):
        require(
            (out_dir / name).exists(),
            f"out_dir={out_dir} holds no trained model: there is no {out_dir / name}",
        )
    config = GPTConfig(**json.loads((out_dir / "config.json").read_text())["model"])
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    with ocp.CheckpointManager(
        (out_dir / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(
            create=False, best_fn=lambda m: m["val_loss"], best_mode="min"
        ),
    ) as manager:
        step = manager.best_step() if manager.best_step() is not None else manager.latest_step()
        require(step is not None, f"out_dir={out_dir} holds no complete checkpoint yet")
        shapes = jax.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)).params())
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes
        )
        params = manager.restore(
            step, args=ocp.args.Composite(params=ocp.args.StandardRestore(shapes))
        ).params
    return (
        GPT.from_params(config, params),
        tokenizer.from_meta(json.loads((out_dir / "meta.json").read_text())),
        step,
    )


def require_same_model(out_dir: Path, config: GPTConfig, meta: dict) -> None:
    """Raise ValueError if the run in out_dir has another model shape or another tokenizer than config and meta say."""
    saved = json.loads((out_dir / "config.json").read_text())["model"]
    for name in (
        "block_size",
        "vocab_size",
        "n_layer",
        "n_head",
        "n_embd",
        "bias",
        "activation",
        "layer_norm_epsilon",
        "vocab_multiple",
    ):
        require(
            saved[name] == getattr(config, name),
            f"{name}={getattr(config, name)}, but the run in out_dir={out_dir} has {name}={saved[name]}",
        )
    saved = json.loads((out_dir / "meta.json").read_text())
    require(
        tokenizer.from_meta(saved).meta() == tokenizer.from_meta(meta).meta(),
        f"the data has another tokenizer than the run in out_dir={out_dir}",
    )
