"""What training stands on: the mesh, TrainState, the optimizer, and checkpoints. Mesh axes are named here and nowhere else."""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from orbax.checkpoint import checkpoint_managers

import pretrained
import tokenizer
from config import GPTConfig, ModelConfig, TrainConfig, require
from model import GPT, Params, gpt_graphdef
from pipeline import pipeline

# Peak dense bfloat16 FLOP/s by jax.Device.device_kind, from the makers' data sheets; MFU is shown where the device is known.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12, "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
}

HEARTBEAT_TIMEOUT = 60  # seconds after which a process that does not answer is given up, and all end
CPU_DEVICE_FLOPS = 500_000_000  # per micro-batch: below, a CPU device costs more time than it saves


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token, 6 N + 12 L H D T (Chowdhery et al. 2022, appendix B); recomputation does not count."""
    return 6 * config.num_params(embeddings=False) + 12 * config.n_layer * config.n_embd * config.block_size


# From the axis that talks least to the one that talks most, whose devices are neighbours.
AXES = {
    "data": "shards rows of the batch; the model is replicated",
    "layers": "shards the stack of blocks, which becomes a pipeline",
    "fsdp": "shards rows, and every weight, which is gathered just before use (ZeRO-3, Rajbhandari et al. 2020)",
    "context": "shards positions T; keys and values are gathered",
    "tensor": "shards heads, MLP width and vocabulary (Shoeybi et al. 2019)",
}
# Outside of the stack "layers" is used like "fsdp". It is the major axis of the rows because the pipeline splits them over it by
# hand and leaves the other axes to XLA.
ROWS, GATHERED = ("layers", "data", "fsdp"), ("fsdp", "layers")
SPECS = {  # end of a parameter's path -> how it lies on the mesh; what is not here is replicated
    "wte.embedding": P("tensor", GATHERED),              # (V, C)
    "wpe.embedding": P(None, GATHERED),                  # (block_size, C)
    # One layer's; the stack has "layers" in front.
    "attn.c_attn.kernel": P(("fsdp", "tensor"), None),   # (C, 3C), q, k and v side by side: see `gather`
    "attn.c_proj.kernel": P("tensor", "fsdp"),           # (C, C)
    "mlp.c_fc.kernel": P("fsdp", "tensor"),              # (C, 4C)
    "mlp.c_fc.bias": P("tensor"),                        # (4C,)
    "mlp.c_proj.kernel": P("tensor", "fsdp"),            # (4C, C)
}


def make_mesh(sizes: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of "data:2,fsdp:-1" over all devices: axes of AXES and their sizes, -1 once for the rest. Raises ValueError."""
    devices = jax.devices() if devices is None else devices
    shape = dict.fromkeys(AXES, 1)
    for part in sizes.split(","):
        name, _, size = part.partition(":")
        require(name in AXES and (size.isdecimal() and int(size) > 0 or size == "-1"),
                f"--mesh={sizes}: {part!r} is not AXIS:SIZE with an axis of {', '.join(AXES)} and a size of 1 or more, or -1")
        shape[name] = int(size)
    rest = [name for name, size in shape.items() if size == -1]
    require(len(rest) <= 1, f"--mesh={sizes}: only one axis can have the rest (-1), not {' and '.join(rest)}")
    for name in rest:
        shape[name] = max(1, len(devices) // -math.prod(shape.values()))
    product = math.prod(shape.values())
    require(product == len(devices), f"--mesh={sizes} asks for {product} devices, but there are {len(devices)}")
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def training_mesh(config: TrainConfig) -> Mesh:
    """The mesh of config.mesh. By default all devices share the batch, as many as divide it, and the weights too where a
    replica of the state would take more than a quarter of a device. Raises ValueError for what cannot be cut into equal pieces,
    before anything is allocated."""
    if config.mesh is not None:
        mesh = make_mesh(config.mesh)
    else:
        n = jax.device_count()
        if jax.process_count() == 1:
            n = largest_divisor(config.batch_size, n)
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
        state_bytes = 16 * config.model.num_params()  # float32 parameters, gradients and two moments
        mesh = make_mesh("fsdp:-1" if state_bytes > memory / 4 else "data:-1", jax.devices()[:n])

    def check(what: str, size: int, axes: str | tuple[str, ...]) -> None:
        over = {axis: mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes) if mesh.shape[axis] > 1}
        require(size % math.prod(over.values()) == 0, f"{what}={size} must be divisible by {math.prod(over.values())}, the mesh's "
                + " x ".join(f"{axis}:{n}" for axis, n in over.items()))

    model = config.model
    check("batch_size", config.batch_size, ROWS)
    check("n_layer", model.n_layer, "layers")
    check("n_head", model.n_head, "tensor")
    check("n_embd", model.n_embd, ("fsdp", "tensor"))
    check("n_embd", model.n_embd, GATHERED)
    check("the padded vocab_size", model.padded_vocab_size, "tensor")
    check("block_size", model.block_size, "context")
    check("block_size / loss_chunks", model.block_size // config.loss_chunks, "context")
    return mesh


def describe(mesh: Mesh) -> str:
    """data:2 x fsdp:4 on 8 of 16 x NVIDIA H100"""
    axes = " x ".join(f"{axis}:{n}" for axis, n in mesh.shape.items() if n > 1) or "no mesh"
    of = "" if mesh.size == jax.device_count() else f"{mesh.size} of "
    return f"{axes} on {of}{jax.device_count()} x {jax.devices()[0].device_kind}"


def largest_divisor(n: int, limit: int) -> int:
    """Of n, not above limit."""
    return max(d for d in range(1, max(1, limit) + 1) if n % d == 0)


def partition_spec(path: tuple) -> P:
    """How the parameter whose path ends like `path` lies on the mesh, and so its gradient and its moments in the optimizer."""
    name = "." + path_name(path)
    spec = next((spec for end, spec in SPECS.items() if name.endswith("." + end)), P())
    return P("layers", *spec) if ".h." in name else spec


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Of every array in a TrainState or in a part of one."""
    return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, partition_spec(path)), tree)


def put_batch(mesh: Mesh, shape: tuple[int, ...], read: Callable[[slice], np.ndarray]) -> jax.Array:
    """An array of `shape` (..., B, T) whose rows are sharded over the mesh. read(rows) gives (..., b, T) of a slice of the B rows;
    it is asked only for rows that belong on this process's devices."""
    sharding = NamedSharding(mesh, P(*[None] * (len(shape) - 2), ROWS, None))
    return jax.make_array_from_callback(shape, sharding, lambda index: read(index[-2]))


def constrain(mesh: Mesh, x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """x, which lies on the mesh as spec says from here on. In the pipeline that is the mesh without the axis taken by hand."""
    inner = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh if inner.empty else inner, P(*spec)))


def gather(mesh: Mesh, weights: Any) -> Any:
    """Weights of one layer, or those outside of the layers, as matmuls want them: sharded over "tensor" only."""
    def one(path, w):
        if path_name(path).endswith("attn.c_attn.kernel"):
            # An equal cut of 3C would hold a q here and a v there: what is stored cut by rows is used cut by heads.
            w = constrain(mesh, w, "tensor", None).reshape(len(w), 3, -1)
            return constrain(mesh, w, None, None, "tensor").reshape(len(w), -1)
        return constrain(mesh, w, *["tensor" if axes == "tensor" else None for axes in partition_spec(path)])

    return jax.tree_util.tree_map_with_path(one, weights)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a GPT in training is spread over `mesh`: what model.OneDevice is for one device."""

    mesh: Mesh
    remat: bool  # of the blocks, as GPTConfig has it

    @property
    def shards(self) -> tuple[int, int]:
        return math.prod(self.mesh.shape[axis] for axis in ROWS), self.mesh.shape["context"]

    def scan(self, f: Callable, carry: tuple, layers: tuple, *, unroll: int = 1) -> tuple[tuple, None]:
        """jax.lax.scan over the blocks; tells XLA how rows and weights lie on the mesh, and is a pipeline along "layers".

        Without these hints XLA lets the activations follow the weights and sends those through the network instead."""
        (x, cache, keys), mesh = carry, self.mesh
        assert cache is None, "there is no cache in training"
        sizes = {w[0].size for w in jax.tree.leaves(layers[0])}

        def not_gathered(primitive, *inputs, **_):  # of what the backward pass needs: may it be kept?
            return primitive.name not in ("sharding_constraint", "reshape", "convert_element_type") or inputs[0].size not in sizes

        def layer(x, keys, weights_and_index):
            weights, i = weights_and_index
            (x, _, _), _ = f((x, None, keys), (gather(mesh, weights), i))
            return constrain(mesh, x, ("data", "fsdp"), "context", None)  # (B, T, C)

        if mesh.shape["fsdp"] > 1:  # weights are gathered again for the backward pass: kept, they would be whole everywhere
            layer = jax.checkpoint(layer, prevent_cse=False, policy=None if self.remat else not_gathered)
        S = mesh.shape["layers"]
        if S == 1:
            x, _ = jax.lax.scan(lambda x, weights_and_index: (layer(x, keys, weights_and_index), None), x, layers, unroll=unroll)
        else:
            # Up to four micro-batches a stage: then stages idle for less than a fifth of the time.
            micro_batches = S * largest_divisor(len(x) // self.shards[0], 4)
            x = pipeline(layer, x, keys, layers, mesh=mesh, axis="layers", micro_batches=micro_batches, unroll=unroll)
        return (x, cache, keys), None


def connect(config: TrainConfig) -> int:
    """Join the other processes of this run, if there are any, and return how many there are. Comes before any use of JAX.

    Who they are is said by config.coordinator_address and its kin, or found by jax.distributed where the environment says that
    there is more than one: in a SLURM step, under Open MPI, on a TPU pod."""
    if config.coordinator_address:
        processes = config.num_processes
        flags = dict(coordinator_address=config.coordinator_address, num_processes=processes, process_id=config.process_id,
                     cluster_detection_method="deactivate")
    else:
        processes = max(int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)), int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)),
                        len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")))
        flags = {}
    if processes > 1:
        jax.distributed.initialize(**flags, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
    return processes


def use_cpu_cores(config: TrainConfig, processes: int = 1) -> None:
    """Where JAX runs on CPU, have it show as many devices as config.mesh asks for; by default one per core, as long as they
    divide the batch and each has enough to do: XLA on CPU uses a second core badly on small operations. The environment's
    JAX_NUM_CPU_DEVICES wins. Must come before JAX's first use of a device; does nothing to other platforms."""
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        n = jax.config.jax_num_cpu_devices
    elif config.mesh is not None:
        n = math.prod(int(size) for size in re.findall(r":(\d+)", config.mesh)) // processes
    else:
        flops = flops_per_token(config.model) * config.batch_size * config.model.block_size
        n = largest_divisor(config.batch_size // processes, min(len(os.sched_getaffinity(0)), flops // CPU_DEVICE_FLOPS))
    jax.config.update("jax_num_cpu_devices", max(1, n))
    if n > 1:
        # Devices wait for each other in threads of XLA's pool: if all of them wait, or work of the next step is queued before the
        # work they wait for, they wait forever. NPROC is the size of the pool.
        os.environ.setdefault("NPROC", str(2 * n))
        jax.config.update("jax_cpu_enable_async_dispatch", False)


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=["graphdef", "tx", "mesh"])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes, as one pytree that goes into train_step and comes out of it, donated."""

    step: jax.Array   # () int32, updates done
    params: Params    # float32
    opt_state: Any    # of tx, float32
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
    def create(cls, config: TrainConfig, params: Params | None = None, mesh: Mesh | None = None) -> "TrainState":
        """Step 0: `params` (on the host) or, without them, parameters initialised from config.seed. On `mesh`, by default one
        device; born sharded: no device ever holds more than its shards."""
        mesh = mesh or make_mesh("data:1", jax.devices()[:1])
        if params:  # each process reads and moves what its devices hold
            put = lambda a, sharding: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])
            params = jax.tree.map(put, params, shardings(mesh, params))
        return initial_state(config, mesh, params)

    @classmethod
    def shapes(cls, config: TrainConfig, mesh: Mesh) -> "TrainState":
        """What create makes, as jax.ShapeDtypeStructs with shardings: what Checkpoints.restore wants."""
        state = jax.eval_shape(partial(initial_state, config, mesh, None))
        return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), state, shardings(mesh, state))


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
        [rise, optax.constant_schedule(peak), optax.linear_schedule(peak, config.min_lr, end - flat)], [warmup, flat])


def path_name(path: tuple) -> str:
    """The key path of a parameter as a dotted name: h.attn.c_attn.kernel."""
    return ".".join(str(p.key) for p in path if isinstance(p, jax.tree_util.DictKey))


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
    matrices = lambda params: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), params)
    groups = {
        "decay": adamw(weight_decay=config.weight_decay),
        "no_decay": adamw(weight_decay=0.0),
        "muon": optax.contrib.muon(rate, weight_decay=config.weight_decay, muon_weight_dimension_numbers=matrices,
                                   consistent_rms=0.2),
    }
    labels = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: optimizer_group(config, path), params)
    clip = [optax.clip_by_global_norm(config.grad_clip)] if config.grad_clip else []
    return optax.chain(*clip, optax.multi_transform(groups, labels))


class Checkpoints:
    """The checkpoints of one run: OUT_DIR/checkpoints/STEP, of which the latest and the best are kept.

    A checkpoint is complete or invisible: Orbax writes it beside its place, asynchronously, and renames it; one that is no longer
    wanted is renamed away before it is deleted. So a kill at any moment leaves the last complete one."""

    def __init__(self, out_dir: Path):
        self.directory = Path(out_dir).absolute() / "checkpoints"
        keep = checkpoint_managers.AnyPreservationPolicy([
            checkpoint_managers.LatestN(1),
            checkpoint_managers.BestN(get_metric_fn=lambda m: m["val_loss"], reverse=True, n=1,
                                      keep_checkpoints_without_metrics=False),
        ])
        self.trash = self.directory / "deleted"
        self.empty_trash()
        self.manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
            preservation_policy=keep, todelete_subdir=self.trash.name, cleanup_tmp_directories=True,
            best_fn=lambda m: m["val_loss"], best_mode="min"))

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self.manager.latest_step()

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Begin to save in the background. The arrays are copied before this returns, so `state` may be donated."""
        step = int(state.step)
        if step == self.latest():
            return
        self.manager.save(step, metrics=None if val_loss is None else {"val_loss": float(val_loss)}, args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params), opt_state=ocp.args.StandardSave(state.opt_state)))
        self.empty_trash()

    def empty_trash(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.trash, ignore_errors=True)

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint, in the shapes, dtypes and shardings of `state` (see TrainState.shapes): the mesh need not be the
        one that saved it."""
        step = self.latest()
        abstract = lambda tree: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
        got = self.manager.restore(step, args=ocp.args.Composite(
            params=abstract(state.params), opt_state=abstract(state.opt_state)))
        return dataclasses.replace(state, step=jax.device_put(np.int32(step), state.step.sharding), params=got.params, opt_state=got.opt_state)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.close()
        self.empty_trash()


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
    model, tok = GPT.from_pretrained(config.init_from, **dtype), pretrained.load_tokenizer(config.init_from)
    require(tok.vocab_size <= model.config.vocab_size, f"the tokenizer of {config.init_from} has {tok.vocab_size} tokens, the "
            f"model only {model.config.vocab_size}")
    return model, tok, config.init_from


def load_model(out_dir: Path, dtype: str | None = None):
    """The best checkpoint of a run (the latest, if none was evaluated) as (GPT, tokenizer, step)."""
    out_dir = Path(out_dir)
    for name in ("config.json", "meta.json", "checkpoints"):
        require((out_dir / name).exists(), f"out_dir={out_dir} holds no trained model: there is no {out_dir / name}")
    config = GPTConfig(**json.loads((out_dir / "config.json").read_text())["model"])
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    with ocp.CheckpointManager((out_dir / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(
            create=False, best_fn=lambda m: m["val_loss"], best_mode="min")) as manager:
        step = manager.best_step() if manager.best_step() is not None else manager.latest_step()
        require(step is not None, f"out_dir={out_dir} holds no complete checkpoint yet")
        shapes = jax.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)).params())
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
        params = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(shapes))).params
    return GPT.from_params(config, params), tokenizer.from_meta(json.loads((out_dir / "meta.json").read_text())), step


def require_same_model(out_dir: Path, config: GPTConfig, meta: dict) -> None:
    """Raise ValueError if the run in out_dir has another model shape or another tokenizer than config and meta say."""
    saved = json.loads((out_dir / "config.json").read_text())["model"]
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "activation", "layer_norm_epsilon",
                 "vocab_multiple"):
        require(saved[name] == getattr(config, name),
                f"{name}={getattr(config, name)}, but the run in out_dir={out_dir} has {name}={saved[name]}")
    saved = json.loads((out_dir / "meta.json").read_text())
    require(tokenizer.from_meta(saved).meta() == tokenizer.from_meta(meta).meta(),
            f"the data has another tokenizer than the run in out_dir={out_dir}")
