"""The devices, and how a model in training lies on them.

Start with AXES: the ways in which devices can share the work. `--mesh=data:2,fsdp:4` becomes a
jax.sharding.Mesh with all of these axes (make_mesh, training_mesh), most of them of size 1. SPECS
says where each parameter lies on it. Layout then runs the blocks over it: as a scan in which XLA
moves the weights, or, along the axis "layers", as a pipeline (see training/pipeline.py).

Mesh axes and PartitionSpecs are named in this file and nowhere else. All axes are of type Auto: XLA
derives the shardings of what is computed from those of its inputs and from the hints given here.

Shapes: B batch, T tokens, C n_embd, H heads of D, W width of the MLP, L layers, V padded
vocabulary.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from config import GPTConfig, TrainConfig
from errors import require
from ops import save_activations
from training.pipeline import pipeline, run_layers

# Peak dense bfloat16 FLOP/s by jax.Device.device_kind, from the makers' data sheets. MFU is shown
# where the device is known.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}

# Seconds after which a process that does not answer is given up, and all processes end.
HEARTBEAT_TIMEOUT = 60
# FLOPs of a micro-batch below which one more CPU device costs more time than it saves.
CPU_DEVICE_FLOPS = 500_000_000
# Simulated CPU devices that XLA compiles for in one process.
MOST_CPU_DEVICES = 2048
# Of training, per parameter: itself, its gradient and AdamW's two moments, in float32.
STATE_BYTES_PER_PARAM = 16
# Part of a device's memory that the state may take before it is sharded by default.
REPLICA_SHARE = 1 / 4
# Micro-batches per stage of the pipeline: with 4, stages idle for less than a fifth of the time.
MICRO_BATCHES_PER_STAGE = 4

# From the axis that talks least to the one that talks most, whose devices are neighbours.
AXES = {
    "data": "shards rows of the batch; the model is replicated",
    "layers": "shards the stack of blocks, which becomes a pipeline",
    "fsdp": (
        "shards rows, and every weight, which is gathered just before use (ZeRO-3, Rajbhandari et "
        "al. 2020)"
    ),
    "context": "shards positions T; keys and values are gathered",
    "tensor": "shards heads, MLP width and vocabulary (Shoeybi et al. 2019)",
}
# The axes that shard the rows of a batch. "layers" is among them because outside of the blocks it
# is used like "fsdp". It is the major one because the pipeline splits the rows over it by hand and
# leaves the other axes to XLA.
ROWS = ("layers", "data", "fsdp")
# The axes over which the weights outside of the blocks are cut, to be gathered before use.
GATHERED = ("fsdp", "layers")
# The end of a parameter's path -> how it lies on the mesh. What is not here is replicated.
SPECS = {
    "wte.embedding": P("tensor", GATHERED),  # (V, C)
    "lm_head.embedding": P("tensor", GATHERED),  # (V, C)
    "wpe.embedding": P(None, GATHERED),  # (block_size, C)
    # These are of one layer. The stack of all layers has "layers" in front.
    # c_attn is (C, 3C), with q, k and v side by side, or more parts of q where heads share keys. It
    # is cut by rows: see `gather`.
    "attn.c_attn.kernel": P(("fsdp", "tensor"), None),
    "attn.c_proj.kernel": P("tensor", "fsdp"),  # (C, C), in general (H D, C)
    "mlp.c_fc.kernel": P("fsdp", "tensor"),  # (C, W), W = 4C in a GPT-2
    "mlp.c_fc.bias": P("tensor"),  # (W,)
    "mlp.c_gate.kernel": P("fsdp", "tensor"),  # (C, W)
    "mlp.c_gate.bias": P("tensor"),  # (W,)
    "mlp.c_proj.kernel": P("tensor", "fsdp"),  # (W, C)
}

# --- From --mesh to a Mesh.


def mesh_shape(sizes: str, devices: int) -> dict[str, int]:
    """Return {axis: size} of "data:2,fsdp:-1" over so many devices; an axis not named has size 1.

    One axis may have the size -1: the devices that the others leave. Raises UserError for anything
    but axes of AXES with sizes whose product is `devices`."""
    shape = dict.fromkeys(AXES, 1)
    for part in sizes.split(","):
        name, _, size = part.partition(":")
        is_size = size == "-1" or (size.isdecimal() and int(size) > 0)
        require(
            name in AXES and is_size,
            f"--mesh={sizes}: {part!r} is not AXIS:SIZE with an axis of {', '.join(AXES)} and a "
            "size of 1 or more, or -1",
            param="mesh",
        )
        shape[name] = int(size)
    rest = [name for name, size in shape.items() if size == -1]
    require(
        len(rest) <= 1,
        f"--mesh={sizes}: only one axis can have the rest (-1), not {' and '.join(rest)}",
        param="mesh",
    )
    if rest:
        others = math.prod(size for size in shape.values() if size != -1)
        shape[rest[0]] = max(1, devices // others)
    product = math.prod(shape.values())
    require(
        product == devices,
        f"--mesh={sizes} asks for {product} devices, but there are {devices}",
        param="mesh",
    )
    return shape


def make_mesh(sizes: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of mesh_shape, over all devices if none are given."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    return jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
        devices=devices,
    )


def make_abstract_mesh(sizes: str, devices: int) -> AbstractMesh:
    """Return the mesh of mesh_shape over devices that are not here: shapes, but nothing runs."""
    shape = mesh_shape(sizes, devices)
    return AbstractMesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)
    )


def training_mesh(config: TrainConfig) -> Mesh:
    """Return the mesh of config.mesh, or default_mesh.

    Raises UserError for what it cannot cut into equal pieces, before anything is allocated."""
    mesh = default_mesh(config) if config.mesh is None else make_mesh(config.mesh)
    require_equal_pieces(config, mesh)
    return mesh


def default_mesh(config: TrainConfig) -> Mesh:
    """Let all devices share the batch, as many as divide it, and the weights too if they are large.

    Large means that the training state would take more than REPLICA_SHARE of a device."""
    devices = jax.device_count()
    if jax.process_count() == 1:
        devices = largest_divisor(config.batch_size, devices)
    memory_stats = jax.local_devices()[0].memory_stats() or {}
    memory = memory_stats.get("bytes_limit", math.inf)
    state_bytes = STATE_BYTES_PER_PARAM * config.model.num_params()
    sizes = "fsdp:-1" if state_bytes > REPLICA_SHARE * memory else "data:-1"
    return make_mesh(sizes, jax.devices()[:devices])


def planned_mesh(config: TrainConfig) -> Mesh | AbstractMesh:
    """Return the mesh of config.mesh for a run that is only planned.

    It lies on the first of the devices there are; where they are too few, on simulated CPU devices
    (see use_cpu_cores); where these are too few as well, on none at all. Raises UserError as
    training_mesh does."""
    if config.mesh is None:
        return training_mesh(config)
    wanted = jax.device_count() if "-1" in config.mesh else devices_named(config.mesh)
    mesh: Mesh | AbstractMesh
    if jax.device_count() >= wanted:
        mesh = make_mesh(config.mesh, jax.devices()[:wanted])
    elif jax.device_count("cpu") >= wanted:
        mesh = make_mesh(config.mesh, jax.devices("cpu")[:wanted])
    else:
        mesh = make_abstract_mesh(config.mesh, wanted)
    require_equal_pieces(config, mesh)
    return mesh


def require_equal_pieces(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise UserError for what the mesh cannot cut into equal pieces."""
    model = config.model
    require_divisible(mesh, "batch_size", config.batch_size, ROWS)
    require_divisible(mesh, "n_layer", model.n_layer, ("layers",))
    require_divisible(mesh, "n_head", model.n_head, ("tensor",))
    require_divisible(mesh, "n_kv_head", model.kv_heads, ("tensor",))
    require_divisible(mesh, "mlp_width", model.mlp_dim, ("tensor",))
    require_divisible(mesh, "n_embd", model.n_embd, ("fsdp", "tensor"))
    require_divisible(mesh, "n_embd", model.n_embd, GATHERED)
    require_divisible(mesh, "the padded vocab_size", model.padded_vocab_size, ("tensor",))
    require_divisible(mesh, "block_size", model.block_size, ("context",))
    chunk = model.block_size // config.loss_chunks
    require_divisible(mesh, "block_size / loss_chunks", chunk, ("context",))


def require_divisible(
    mesh: Mesh | AbstractMesh, what: str, size: int, axes: tuple[str, ...]
) -> None:
    """Raise UserError unless the mesh cuts `size` into equal pieces along these axes together."""
    cut = {axis: mesh.shape[axis] for axis in axes if mesh.shape[axis] > 1}
    pieces = math.prod(cut.values())
    axes_of_mesh = " x ".join(f"{axis}:{n}" for axis, n in cut.items())
    require(
        size % pieces == 0,
        f"{what}={size} must be divisible by {pieces}, the mesh's {axes_of_mesh}",
        param="mesh",
    )


def whole_sequences(mesh: Mesh) -> bool:
    """Say whether a block sees whole sequences and XLA places it, as a kernel of its own needs."""
    return mesh.shape["context"] == 1 and mesh.shape["layers"] == 1


def describe(mesh: Mesh | AbstractMesh) -> str:
    """Return "data:2 x fsdp:4 on 8 of 16 x NVIDIA H100"."""
    axes = " x ".join(f"{axis}:{n}" for axis, n in mesh.shape.items() if n > 1) or "no mesh"
    if isinstance(mesh, AbstractMesh):
        return f"{axes}, {mesh.size} devices that are not here"
    device = mesh.devices.flat[0]
    there_are = jax.device_count(device.platform)
    part = "" if mesh.size == there_are else f"{mesh.size} of "
    return f"{axes} on {part}{there_are} x {device.device_kind}"


def devices_named(sizes: str) -> int:
    """Return how many devices "data:2,fsdp:4,tensor:-1" names, here 8: -1 does not count."""
    return math.prod(int(size) for size in re.findall(r":(\d+)", sizes))


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest divisor of n that is at most limit, at least 1."""
    return max(d for d in range(1, max(1, limit) + 1) if n % d == 0)


# --- Processes and simulated devices: both must be settled before JAX looks for devices.


def connect(config: TrainConfig) -> int:
    """Join the other processes of this run, if any, and return how many there are in all.

    config.coordinator_address and its kin say who they are. Without them jax.distributed finds out,
    where the environment says that there is more than one: in a SLURM step, under Open MPI, on a
    TPU pod. Must come before any use of JAX."""
    if config.num_processes is None:
        processes = processes_in_environment()
        if processes > 1:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
        return processes
    if config.num_processes > 1:
        jax.distributed.initialize(
            coordinator_address=config.coordinator_address,
            num_processes=config.num_processes,
            process_id=config.process_id,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    return config.num_processes


def processes_in_environment() -> int:
    """Return how many processes SLURM, Open MPI or a TPU pod has started together with this one."""
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    open_mpi = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1))
    tpu_pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    return max(slurm, open_mpi, tpu_pod)


def use_cpu_cores(config: TrainConfig, processes: int = 1) -> None:
    """Where JAX runs on CPU, have it show as many devices as cpu_device_count says.

    Must come before JAX's first use of a device. Does nothing to other platforms."""
    devices = max(1, cpu_device_count(config, processes))
    jax.config.update("jax_num_cpu_devices", devices)
    if devices > 1:
        # Devices wait for each other in threads of XLA's pool: if all of them wait, or work of the
        # next step is queued before the work they wait for, they wait forever. NPROC is the size of
        # the pool.
        os.environ.setdefault("NPROC", str(2 * devices))
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def cpu_device_count(config: TrainConfig, processes: int) -> int:
    """Return how many CPU devices this process should have: as many as config.mesh asks for.

    Without a mesh it is one per core, as long as they divide the batch and each has enough to do:
    XLA on CPU uses a second core badly on small operations. JAX_NUM_CPU_DEVICES in the environment
    wins over both."""
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return int(os.environ["JAX_NUM_CPU_DEVICES"])
    if config.mesh is not None:
        return min(devices_named(config.mesh) // processes, MOST_CPU_DEVICES)
    flops = config.model.flops_per_token * config.batch_size * config.model.block_size
    cores = len(os.sched_getaffinity(0))
    return largest_divisor(config.batch_size // processes, min(cores, flops // CPU_DEVICE_FLOPS))


# --- Where arrays lie.


def path_name(path: tuple) -> str:
    """Return the key path of a parameter as a dotted name: h.attn.c_attn.kernel."""
    return ".".join(str(p.key) for p in path if isinstance(p, jax.tree_util.DictKey))


def partition_spec(path: tuple) -> P:
    """Return how the parameter whose path ends like `path` lies on the mesh.

    Its gradient and its moments in the optimizer, whose paths end alike, lie as it does."""
    name = "." + path_name(path)
    spec = P()
    for end, spec_of_end in SPECS.items():
        if name.endswith("." + end):
            spec = spec_of_end
    return P("layers", *spec) if ".h." in name else spec


def shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Return the NamedSharding of every array in a TrainState or in a part of one."""

    def sharding(path: tuple, _: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(path))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh | AbstractMesh, ndim: int) -> NamedSharding:
    """Return the sharding of a batch (..., B, T) of so many dimensions: its rows are sharded."""
    return NamedSharding(mesh, P(*[None] * (ndim - 2), ROWS, None))


def put_batch(mesh: Mesh, shape: tuple[int, ...], read: Callable[[slice], np.ndarray]) -> jax.Array:
    """Return an array of `shape` (..., B, T) whose rows are sharded over the mesh.

    read(rows) returns (..., b, T), a slice of the B rows; it is asked only for rows that belong on
    this process's devices."""

    def read_shard(index: Any) -> np.ndarray:  # one slice a dimension
        return read(index[-2])

    return jax.make_array_from_callback(shape, batch_sharding(mesh, len(shape)), read_shard)


def constrain(
    mesh: Mesh | AbstractMesh, x: jax.Array, *spec: str | tuple[str, ...] | None
) -> jax.Array:
    """Return x, which lies on the mesh as PartitionSpec(*spec) says from here on. Inside jit.

    In the pipeline, inside shard_map, that is the mesh without the axis that is taken by hand."""
    inner = jax.sharding.get_abstract_mesh()
    sharding = NamedSharding(mesh if inner.empty else inner, P(*spec))
    return jax.lax.with_sharding_constraint(x, sharding)


def gather(mesh: Mesh | AbstractMesh, weights: Any, qkv_parts: int | None = None) -> Any:
    """Return weights as matmuls want them: gathered, and sharded over "tensor" only. Inside jit.

    They are the weights of one layer of a model that has so many qkv_parts, or, without, those
    outside of the layers."""

    def gather_one(path: tuple, w: jax.Array) -> jax.Array:
        if path_name(path).endswith("attn.c_attn.kernel"):
            # An equal cut of 3C would hold a q here and a v there: what is stored cut by rows is
            # used cut by heads of keys, each with the queries that read it.
            assert qkv_parts is not None, "c_attn is a weight of a layer"
            w = constrain(mesh, w, "tensor", None).reshape(len(w), qkv_parts, -1)
            return constrain(mesh, w, None, None, "tensor").reshape(len(w), -1)
        spec = ["tensor" if axes == "tensor" else None for axes in partition_spec(path)]
        return constrain(mesh, w, *spec)

    return jax.tree_util.tree_map_with_path(gather_one, weights)


# --- How the blocks run on the mesh.


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a GPT in training, of config `model`, is spread over `mesh`.

    It is what model.OneDevice is for one device."""

    mesh: Mesh | AbstractMesh
    model: GPTConfig

    @property
    def batch_shards(self) -> tuple[int, int]:
        """Into how many parts the rows and the positions of a batch are cut."""
        rows = math.prod(self.mesh.shape[axis] for axis in ROWS)
        return rows, self.mesh.shape["context"]

    @property
    def width_shards(self) -> int:
        """Into how many parts heads, the MLP and the vocabulary are cut."""
        return self.mesh.shape["tensor"]

    def stages(self, rows: int) -> tuple[int, int]:
        """Return the pipeline's stages, and the micro-batches that `rows` rows go through it in.

        (1, 1) means that there is no pipeline."""
        stages = self.mesh.shape["layers"]
        if stages == 1:
            return 1, 1
        rows_per_shard = rows // self.batch_shards[0]
        return stages, stages * largest_divisor(rows_per_shard, MICRO_BATCHES_PER_STAGE)

    def scan(
        self, f: Callable, carry: tuple, layers: tuple, *, unroll: int = 1
    ) -> tuple[tuple, None]:
        """Run the blocks as jax.lax.scan(f, carry, layers) does; along "layers" as a pipeline.

        carry is (x, None, keys) as GPT.blocks makes it, layers its stacked (weights, index)."""
        x, cache, keys = carry
        assert cache is None, "there is no cache in training"
        layer = self.layer_on_mesh(f)
        stages, micro_batches = self.stages(len(x))
        if stages == 1:
            x = run_layers(layer, x, keys, layers, unroll)
        else:
            x = pipeline(
                layer,
                x,
                keys,
                layers,
                mesh=self.mesh,
                axis="layers",
                micro_batches=micro_batches,
                unroll=unroll,
            )
        return (x, cache, keys), None

    def layer_on_mesh(self, f: Callable) -> Callable:
        """Return layer(x, keys, (weights, index)) -> x, which runs f where the mesh wants it.

        It tells XLA to gather the weights and to leave the rows where they are: without these hints
        XLA lets the activations follow the weights and sends those through the network instead."""

        qkv_parts = self.model.qkv_parts

        def layer(x: jax.Array, keys: jax.Array | None, weights_and_index: tuple) -> jax.Array:
            weights, index = weights_and_index
            (x, _, _), _ = f((x, None, keys), (gather(self.mesh, weights, qkv_parts), index))
            return constrain(self.mesh, x, ("data", "fsdp"), "context", None)  # (B, T, C)

        if self.mesh.shape["fsdp"] == 1:
            return layer
        # The backward pass gathers the weights again: saved, all layers' would be whole everywhere.
        policy = None if self.model.remat else save_activations
        return jax.checkpoint(layer, prevent_cse=False, policy=policy)
