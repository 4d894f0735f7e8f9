"""What training stands on: TrainState and the optimizer; and how programs open a trained model.

Start with `TrainState`, then `create_optimizer`. `open_model` is what sample.py, server.py and
eval_harness.py call.
"""

import dataclasses
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

import pretrained
import tokenizer
from checkpoints import read_run
from config import Dtype, ModelConfig, TrainConfig
from errors import about_file, require
from mesh import (
    divide_layers,
    gather,
    in_host_memory,
    make_mesh,
    path_name,
    prepare_devices,
    shardings,
)
from model import GPT, Params, gpt_graphdef
from training.layout import Layout

# Root mean square that Muon's updates are scaled to: about that of AdamW's (Liu et al. 2025).
MUON_RMS = 0.2


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state"],
    meta_fields=["graphdef", "tx", "mesh"],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes, as one pytree.

    It goes into train_step and comes out of it, donated. The first three fields are arrays, which
    lie on `mesh` as mesh.SPECS says; the others are static to jit."""

    step: jax.Array
    """() int32: updates done."""
    params: Params
    """The parameters, float32."""
    opt_state: Any
    """The state of tx, float32."""
    graphdef: Any = dataclasses.field(repr=False)
    """The static half of the model (nnx.GraphDef)."""
    tx: optax.GradientTransformation = dataclasses.field(repr=False)
    """What makes an update of gradients: see create_optimizer."""
    mesh: Mesh
    """The devices."""

    @property
    def model(self) -> GPT:
        """The model to train with, inside jit.

        The weights outside of the blocks are gathered here, those of a block in Layout."""
        outer = {name: p for name, p in self.params.items() if name != "h"}
        return nnx.merge(self.graphdef, {**self.params, **gather(self.mesh, outer)})

    def lay_out(self, tree: Any) -> Any:
        """Return `tree`, which lies on the mesh as a TrainState does from here on. Inside jit.

        `tree` is a TrainState, or a part of one, or gradients."""
        return jax.lax.with_sharding_constraint(tree, shardings(self.mesh, tree))

    @classmethod
    def create(
        cls, config: TrainConfig, params: Params | None = None, mesh: Mesh | None = None
    ) -> "TrainState":
        """Return the state at step 0, on `mesh` or on one device.

        It has `params`, which are on the host, or parameters initialised from config.seed. It is
        born sharded: no device ever holds more than its shards."""
        mesh = mesh or make_mesh("data:1", jax.devices()[:1])
        if params:
            params = jax.tree.map(put_shards, params, shardings(mesh, params))
        return initial_state(config, mesh, params)

    @classmethod
    def abstract(cls, config: TrainConfig, mesh: Mesh | AbstractMesh) -> "TrainState":
        """Return what create makes as jax.ShapeDtypeStructs with shardings.

        That is what Checkpoints.restore wants, and all that a plan needs."""

        def with_sharding(
            array: jax.ShapeDtypeStruct, sharding: NamedSharding
        ) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

        state = jax.eval_shape(partial(initial_state, config, mesh, None))
        return jax.tree.map(with_sharding, state, shardings(mesh, state))


def put_shards(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Put an array of the host on devices: each process reads and moves what its devices hold."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@partial(jax.jit, static_argnames=("config", "mesh"))
def initial_state(config: TrainConfig, mesh: Mesh, params: Params | None) -> TrainState:
    """Make the state at step 0 where it will lie; without params they are initialised."""
    tx = create_optimizer(config, mesh)
    params = params or GPT(config.model, rngs=nnx.Rngs(config.seed)).params()
    graphdef = gpt_graphdef(config.model, Layout(mesh, config.model))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        graphdef=graphdef,
        tx=tx,
        mesh=mesh,
    )
    return state.lay_out(state)


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Return a function from the updates done to the learning rate of the next one.

    It rises linearly for config.warmup_steps. Then it falls from learning_rate to min_lr as
    config.lr_schedule says, until config.decay_steps: in half a cosine, or, in wsd (warmup, stable,
    decay; Hu et al. 2024), in a line over the last fifth."""
    peak = config.learning_rate
    warmup = config.warmup_steps
    end = config.decay_steps
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    flat = optax.constant_schedule(peak)
    if not config.decay_lr:
        return optax.join_schedules([rise, flat], [warmup])
    if config.lr_schedule == "cosine":
        cosine = optax.cosine_decay_schedule(peak, end - warmup, alpha=config.min_lr / peak)
        return optax.join_schedules([rise, cosine], [warmup])
    last_fifth = warmup + (end - warmup) * 4 // 5
    fall = optax.linear_schedule(peak, config.min_lr, end - last_fifth)
    return optax.join_schedules([rise, flat, fall], [warmup, last_fifth])


# The same config gives the same object: it is a static part of TrainState, and a new one would
# compile train_step again.
@lru_cache
def create_optimizer(
    config: TrainConfig, mesh: Mesh | AbstractMesh | None = None
) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024) as config says.

    Before it gradients are clipped to a global norm. Weight decay is for what multiplies
    activations, kernels and embeddings, as in GPT-2 and nanoGPT; biases and LayerNorm scales have
    no redundant magnitude to shrink. Muon takes the kernels of the blocks, each layer's matrix by
    itself, with updates scaled to AdamW's size (Liu et al. 2025), so that one learning rate serves
    both; embeddings and vectors stay with AdamW. Devices of the mesh that hold the same weights
    share Muon's work, see divide_layers."""
    rate = learning_rate_schedule(config)
    adamw = partial(optax.adamw, rate, b1=config.beta1, b2=config.beta2)
    muon = optax.contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=stacked_matrices,
        consistent_rms=MUON_RMS,
    )
    transformations = {
        "decay": adamw(weight_decay=config.weight_decay),
        "no_decay": adamw(weight_decay=0.0),
        "muon": muon if mesh is None else with_divided_layers(muon, mesh),
    }
    by_group = optax.multi_transform(transformations, partial(optimizer_groups, config))
    if config.grad_clip == 0:
        return optax.chain(by_group)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), by_group)


def with_divided_layers(
    tx: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> optax.GradientTransformation:
    """Return tx, whose work on a stack of layers the devices of the mesh divide among them."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new_state = tx.update(divide_layers(mesh, grads), state, params)
        return divide_layers(mesh, updates), new_state

    return optax.GradientTransformation(tx.init, update)


def optimizer_groups(config: TrainConfig, params: Params) -> Any:
    """Return, in place of each parameter, the name of its group in create_optimizer."""

    def group(path: tuple, _: Any) -> str:
        return optimizer_group(config, path)

    return jax.tree_util.tree_map_with_path(group, params)


def optimizer_group(config: TrainConfig, path: tuple) -> str:
    """Return the group of a parameter in create_optimizer.

    It goes by path, not by rank: the blocks are stacked, so a bias is 2-D."""
    name = path_name(path)
    if config.optimizer == "muon" and name.startswith("h.") and name.endswith("kernel"):
        return "muon"
    return "decay" if name.endswith(("kernel", "embedding")) else "no_decay"


def stacked_matrices(params: Params) -> Any:
    """Tell Muon what is a matrix: a stacked kernel is (L, in, out), a batch of matrices."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda _: matrix, params)


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by text, or leave it as it was."""
    temporary = path.with_name(path.name + ".tmp")
    with about_file(temporary):
        temporary.write_text(text)
    temporary.replace(path)


def open_model(
    config: ModelConfig, mesh: str | None = None
) -> tuple[GPT, tokenizer.Tokenizer, str]:
    """Return the model that config.out_dir or config.init_from names, its tokenizer and its name.

    The model computes in config.dtype, if that is given. mesh: EngineConfig.mesh of the engine that
    will run it; such a model stays in the host's memory until it is cut. Raises UserError."""
    prepare_devices(mesh)
    with in_host_memory(mesh is not None):
        return read_model(config)


def read_model(config: ModelConfig) -> tuple[GPT, tokenizer.Tokenizer, str]:
    """Do what open_model says, where JAX puts new arrays by default."""
    if config.out_dir is not None:
        model, text_tokenizer, step = load_model(config.out_dir, config.dtype)
        return model, text_tokenizer, f"step {step} of {config.out_dir}"
    assert config.init_from is not None, "ModelConfig sees to it"
    overrides = {} if config.dtype is None else {"dtype": config.dtype}
    model = GPT.from_pretrained(config.init_from, **overrides)
    text_tokenizer = pretrained.load_tokenizer(config.init_from)
    require(
        text_tokenizer.vocab_size <= model.config.vocab_size,
        f"the tokenizer of {config.init_from} has {text_tokenizer.vocab_size} tokens, the model "
        f"only {model.config.vocab_size}",
        param="init_from",
    )
    return model, text_tokenizer, config.init_from


def load_model(out_dir: Path, dtype: Dtype | None = None) -> tuple[GPT, tokenizer.Tokenizer, int]:
    """Return the model, the tokenizer and the step of a run of train.py: see read_run."""
    config, params, meta, step = read_run(out_dir, dtype)
    return GPT.from_params(config, params), tokenizer.from_meta(meta, out_dir / "meta.json"), step
