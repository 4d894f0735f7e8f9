"""The devices, and how a model lies on them.

Start with AXES: the ways in which devices can share the work. `--mesh=data:2,fsdp:4` becomes a
jax.sharding.Mesh with all of these axes (make_mesh, training_mesh), most of them of size 1. SPECS
says where each parameter of a model in training lies on it. training/layout.py then runs the blocks
over it; cut_for_engine and attend_by_heads, below, spread an engine along the axis "tensor".

Mesh axes and PartitionSpecs are named in this file, and axes in training/layout.py, and nowhere
else. All axes are of type Auto: XLA derives the shardings of what is computed from those of its
inputs and from the hints given here.

Shapes: B batch, T tokens, C n_embd, H heads of D, KV heads of keys, W width of the MLP, L layers, V
padded vocabulary; N pages of P tokens.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    Sharding,
    SingleDeviceSharding,
)
from jax.sharding import PartitionSpec as P

from config import GPTConfig, TrainConfig
from errors import require

if TYPE_CHECKING:
    from model import GPT

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
    (see simulate_cpu_devices); where these are too few as well, on none at all. Raises UserError
    as training_mesh does."""
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
    require_equal_heads(model, mesh)
    require_divisible(mesh, "n_embd", model.n_embd, ("fsdp", "tensor"))
    require_divisible(mesh, "n_embd", model.n_embd, GATHERED)
    require_divisible(mesh, "block_size", model.block_size, ("context",))
    chunk = model.block_size // config.loss_chunks
    require_divisible(mesh, "block_size / loss_chunks", chunk, ("context",))


def require_equal_heads(model: GPTConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise UserError for what the axis "tensor" cannot cut into equal pieces."""
    require_divisible(mesh, "n_head", model.n_head, ("tensor",))
    require_divisible(mesh, "n_kv_head", model.kv_heads, ("tensor",))
    require_divisible(mesh, "mlp_width", model.mlp_dim, ("tensor",))
    require_divisible(mesh, "the padded vocab_size", model.padded_vocab_size, ("tensor",))


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


def simulate_cpu_devices(devices: int) -> None:
    """Where JAX runs on a CPU, have it show so many devices, at least one.

    Must come before JAX's first use of a device. Does nothing to other platforms."""
    jax.config.update("jax_num_cpu_devices", devices)
    if devices > 1:
        # Devices wait for each other in threads of XLA's pool: if all of them wait, or work of the
        # next step is queued before the work they wait for, they wait forever. NPROC is the size of
        # the pool.
        os.environ.setdefault("NPROC", str(2 * devices))
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest divisor of n that is at most limit, at least 1."""
    return max(d for d in range(1, max(1, limit) + 1) if n % d == 0)


# --- Where arrays lie.


def path_name(path: tuple) -> str:
    """Return the key path of a parameter as a dotted name: h.attn.c_attn.kernel."""
    return ".".join(str(p.key) for p in path if isinstance(p, jax.tree_util.DictKey))


def partition_spec(path: tuple) -> P:
    """Return how the parameter whose path ends like `path` lies on the mesh.

    Its gradient and its moments in the optimizer, whose paths end alike, lie as it does."""
    spec = spec_of(path)
    return P("layers", *spec) if ".h." in "." + path_name(path) else spec


def spec_of(path: tuple) -> P:
    """Return the entry of SPECS for a parameter whose path ends like `path`."""
    name = "." + path_name(path)
    return next((spec for end, spec in SPECS.items() if name.endswith("." + end)), P())


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


def divide_layers(mesh: Mesh | AbstractMesh, stacks: Any) -> Any:
    """Return stacks (L, ...) of what belongs to layers, each layer on one device. Inside jit.

    That is for work on whole layers which all devices would do alike: where the axis "data" alone
    has more than one device, and L is a multiple of them. Elsewhere stacks stay as they are."""
    devices = mesh.shape["data"]
    if devices == 1 or mesh.size != devices:
        return stacks

    def divide(stack: jax.Array) -> jax.Array:
        return stack if len(stack) % devices else constrain(mesh, stack, "data")

    return jax.tree.map(divide, stacks)


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


# --- An engine on several devices, each of which has a part of the heads, of the MLP and of the
# vocabulary. A step sums over the devices after attention and after the MLP of each layer and once
# for the embeddings, and gathers the logits, in which the sampler looks for the largest.

HEADS = P(None, None, "tensor")
"""How heads lie on the mesh: of queries, (B, T, H, D), and of a pool, (L, N, KV, P, D)."""


def prepare_devices(sizes: str | None) -> None:
    """Make sure that there are as many devices as EngineConfig.mesh names.

    Where JAX runs on a CPU they are simulated, unless JAX_NUM_CPU_DEVICES is set. Must come before
    JAX's first use of a device. Raises UserError if there are fewer."""
    if sizes is None:
        return
    wanted = devices_named(sizes)
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        simulate_cpu_devices(wanted)
    there_are = jax.device_count()
    require(
        wanted <= there_are,
        f"--mesh={sizes} asks for {wanted} devices, but there are {there_are}",
        param="mesh",
    )


def engine_mesh(sizes: str | None, model: GPTConfig) -> Mesh | None:
    """Return the mesh of EngineConfig.mesh over the first devices; None for one device.

    Raises UserError, before anything is allocated, for more devices than there are, and for a model
    that cannot be cut into equal parts."""
    if sizes is None:
        return None
    takes_all = "-1" in sizes
    mesh = make_mesh(sizes, None if takes_all else jax.devices()[: devices_named(sizes)])
    require_equal_heads(model, mesh)
    return mesh


def shards_of_heads(mesh: Mesh | None) -> int:
    """Return into how many parts a mesh cuts the heads of keys, and so the pool."""
    return 1 if mesh is None else mesh.shape["tensor"]


def replicated(mesh: Mesh | None) -> Sharding:
    """Return how what is not cut lies: whole on each device of the mesh, or on the first device."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, P())


def pool_sharding(mesh: Mesh | None) -> Sharding:
    """Return how a pool lies: each device has all pages of its own heads."""
    return replicated(None) if mesh is None else NamedSharding(mesh, HEADS)


def gathered(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Return x, which is whole on every device from here on. Inside jit."""
    return x if mesh is None else constrain(mesh, x)


def in_host_memory(is_cut: bool) -> contextlib.AbstractContextManager:
    """Return a context in which new arrays lie in the host's memory, if a mesh is to cut them.

    A model that is cut need not fit on its first device."""
    if not is_cut:
        return contextlib.nullcontext()
    return jax.default_device(jax.devices("cpu")[0])


def cut_for_engine(mesh: Mesh, model: "GPT") -> Any:
    """Return the parameters of GPT.for_inference, each device's part on that device.

    An equal cut of 3C columns would hold a q here and a v there, so c_attn gets an axis of parts,
    (C, parts, KV D), and its last axis is cut: Linear takes it as it is."""
    parts = model.config.qkv_parts

    def place(path: tuple, w: jax.Array) -> jax.Array:
        name = path_name(path)
        if name.endswith("attn.c_attn.kernel"):
            return put(w.reshape(len(w), parts, -1), None, None, "tensor")
        if name.endswith("attn.c_attn.bias"):
            return put(w.reshape(parts, -1), None, "tensor")
        return put(w, *("tensor" if axes == "tensor" else None for axes in spec_of(path)))

    def put(w: jax.Array, *spec: str | None) -> jax.Array:
        return jax.device_put(w, NamedSharding(mesh, P(*spec)))

    return jax.tree_util.tree_map_with_path(place, model.params())


def attend_by_heads(
    mesh: Mesh, cache: Any, layer: int | jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple:
    """Do what cache.attend(layer, q, k, v) does, each device for its own heads. Inside jit.

    cache: a PagedKVCache, whose pool lies as pool_sharding says. No number goes from one device to
    another."""
    whole = P()
    specs = dataclasses.replace(
        cache,
        k_pages=HEADS,
        v_pages=HEADS,
        block_tables=whole,
        context_lens=whole,
        new_lens=whole,
    )

    def attend_here(cache: Any, layer: jax.Array, *q_k_v: jax.Array) -> tuple:
        y, after = dataclasses.replace(cache, mesh=None).attend(layer, *q_k_v)
        return y, dataclasses.replace(after, mesh=mesh)

    attend = jax.shard_map(
        attend_here,
        mesh=mesh,
        in_specs=(specs, whole, HEADS, HEADS, HEADS),
        out_specs=(HEADS, specs),
        check_vma=False,  # Pallas kernels do not say along which axes their results vary
    )
    return attend(cache, jnp.asarray(layer, jnp.int32), q, k, v)
