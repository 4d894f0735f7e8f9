"""The devices, and how a model in training lies on them. Mesh axes and PartitionSpecs are named here and nowhere else.

`--mesh` becomes a jax.sharding.Mesh (make_mesh, training_mesh), SPECS says where each parameter lies on it, and Layout runs the
blocks over it: by a scan in which XLA moves the weights, or as a pipeline along "layers"."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from config import TrainConfig
from errors import require

# Peak dense bfloat16 FLOP/s by jax.Device.device_kind, from the makers' data sheets; MFU is shown where the device is known.
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

HEARTBEAT_TIMEOUT = (
    60  # seconds after which a process that does not answer is given up, and all end
)
CPU_DEVICE_FLOPS = 500_000_000  # per micro-batch: below, a CPU device costs more time than it saves
MOST_CPU_DEVICES = 2048  # that XLA compiles for in one process

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
    "wte.embedding": P("tensor", GATHERED),  # (V, C)
    "wpe.embedding": P(None, GATHERED),  # (block_size, C)
    # One layer's; the stack has "layers" in front.
    "attn.c_attn.kernel": P(
        ("fsdp", "tensor"), None
    ),  # (C, 3C), q, k and v side by side: see `gather`
    "attn.c_proj.kernel": P("tensor", "fsdp"),  # (C, C)
    "mlp.c_fc.kernel": P("fsdp", "tensor"),  # (C, 4C)
    "mlp.c_fc.bias": P("tensor"),  # (4C,)
    "mlp.c_proj.kernel": P("tensor", "fsdp"),  # (4C, C)
}


def mesh_shape(sizes: str, devices: int) -> dict[str, int]:
    """{axis: size} of "data:2,fsdp:-1" over so many devices: axes of AXES and their sizes, -1 once for the rest. Raises ValueError."""
    shape = dict.fromkeys(AXES, 1)
    for part in sizes.split(","):
        name, _, size = part.partition(":")
        require(
            name in AXES and (size.isdecimal() and int(size) > 0 or size == "-1"),
            f"--mesh={sizes}: {part!r} is not AXIS:SIZE with an axis of {', '.join(AXES)} and a size of 1 or more, or -1",
        )
        shape[name] = int(size)
    rest = [name for name, size in shape.items() if size == -1]
    require(
        len(rest) <= 1,
        f"--mesh={sizes}: only one axis can have the rest (-1), not {' and '.join(rest)}",
    )
    for name in rest:
        shape[name] = max(1, devices // -math.prod(shape.values()))
    product = math.prod(shape.values())
    require(
        product == devices, f"--mesh={sizes} asks for {product} devices, but there are {devices}"
    )
    return shape


def make_mesh(sizes: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of mesh_shape, by default over all devices."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    return jax.make_mesh(
        tuple(shape.values()),
        tuple(shape),
        axis_types=(AxisType.Auto,) * len(shape),
        devices=devices,
    )


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
        state_bytes = (
            16 * config.model.num_params()
        )  # float32 parameters, gradients and two moments
        mesh = make_mesh("fsdp:-1" if state_bytes > memory / 4 else "data:-1", jax.devices()[:n])
    require_equal_pieces(config, mesh)
    return mesh


def planned_mesh(config: TrainConfig) -> Mesh | AbstractMesh:
    """The mesh of config.mesh for a run that is only planned: on the first of the devices there are, on simulated ones (see
    use_cpu_cores) where these are too few, on none at all where there are not as many of those either. Raises ValueError."""
    if config.mesh is None:
        return training_mesh(config)
    n = jax.device_count() if "-1" in config.mesh else devices_named(config.mesh)
    found = [devices for devices in (jax.devices(), jax.devices("cpu")) if len(devices) >= n]
    if found:
        mesh = make_mesh(config.mesh, found[0][:n])
    else:
        shape = mesh_shape(config.mesh, n)
        mesh = AbstractMesh(
            tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)
        )
    require_equal_pieces(config, mesh)
    return mesh


def require_equal_pieces(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError for what the mesh cannot cut into equal pieces."""

    def check(what: str, size: int, axes: str | tuple[str, ...]) -> None:
        over = {
            axis: mesh.shape[axis]
            for axis in ((axes,) if isinstance(axes, str) else axes)
            if mesh.shape[axis] > 1
        }
        require(
            size % math.prod(over.values()) == 0,
            f"{what}={size} must be divisible by {math.prod(over.values())}, the mesh's "
            + " x ".join(f"{axis}:{n}" for axis, n in over.items()),
        )

    model = config.model
    check("batch_size", config.batch_size, ROWS)
    check("n_layer", model.n_layer, "layers")
    check("n_head", model.n_head, "tensor")
    check("n_embd", model.n_embd, ("fsdp", "tensor"))
    check("n_embd", model.n_embd, GATHERED)
    check("the padded vocab_size", model.padded_vocab_size, "tensor")
    check("block_size", model.block_size, "context")
    check("block_size / loss_chunks", model.block_size // config.loss_chunks, "context")


def whole_sequences(mesh: Mesh) -> bool:
    """Whether a block sees whole sequences, and XLA places it: what a kernel of its own needs."""
    return mesh.shape["context"] == mesh.shape["layers"] == 1


def describe(mesh: Mesh | AbstractMesh) -> str:
    """data:2 x fsdp:4 on 8 of 16 x NVIDIA H100"""
    axes = " x ".join(f"{axis}:{n}" for axis, n in mesh.shape.items() if n > 1) or "no mesh"
    if isinstance(mesh, AbstractMesh):
        return f"{axes}, {mesh.size} devices that are not here"
    device = mesh.devices.flat[0]
    count = jax.device_count(device.platform)
    of = "" if mesh.size == count else f"{mesh.size} of "
    return f"{axes} on {of}{count} x {device.device_kind}"


def devices_named(sizes: str) -> int:
    """How many devices "data:2,fsdp:4,tensor:-1" names, without the rest."""
    return math.prod(int(size) for size in re.findall(r":(\d+)", sizes))


def largest_divisor(n: int, limit: int) -> int:
    """Of n, not above limit."""
    return max(d for d in range(1, max(1, limit) + 1) if n % d == 0)


def connect(config: TrainConfig) -> int:
    """Join the other processes of this run, if there are any, and return how many there are. Comes before any use of JAX.

    Who they are is said by config.coordinator_address and its kin, or found by jax.distributed where the environment says that
    there is more than one: in a SLURM step, under Open MPI, on a TPU pod."""
    if config.coordinator_address:
        processes = config.num_processes
        flags = dict(
            coordinator_address=config.coordinator_address,
            num_processes=processes,
            process_id=config.process_id,
            cluster_detection_method="deactivate",
        )
    else:
        processes = max(
            int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)),
            int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)),
            len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")),
        )
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
        n = min(devices_named(config.mesh) // processes, MOST_CPU_DEVICES)
    else:
        flops = config.model.flops_per_token * config.batch_size * config.model.block_size
        n = largest_divisor(
            config.batch_size // processes,
            min(len(os.sched_getaffinity(0)), flops // CPU_DEVICE_FLOPS),
        )
    jax.config.update("jax_num_cpu_devices", max(1, n))
    if n > 1:
        # Devices wait for each other in threads of XLA's pool: if all of them wait, or work of the next step is queued before the
        # work they wait for, they wait forever. NPROC is the size of the pool.
        os.environ.setdefault("NPROC", str(2 * n))
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def path_name(path: tuple) -> str:
    """The key path of a parameter as a dotted name: h.attn.c_attn.kernel."""
    return ".".join(str(p.key) for p in path if isinstance(p, jax.tree_util.DictKey))


def partition_spec(path: tuple) -> P:
    """How the parameter whose path ends like `path` lies on the mesh, and so its gradient and its moments in the optimizer."""
    name = "." + path_name(path)
    spec = next((spec for end, spec in SPECS.items() if name.endswith("." + end)), P())
    return P("layers", *spec) if ".h." in name else spec


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Of every array in a TrainState or in a part of one."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, partition_spec(path)), tree
    )


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Of a batch (..., B, T), whose rows are sharded."""
    return NamedSharding(mesh, P(*[None] * (ndim - 2), ROWS, None))


def put_batch(mesh: Mesh, shape: tuple[int, ...], read: Callable[[slice], np.ndarray]) -> jax.Array:
    """An array of `shape` (..., B, T) whose rows are sharded over the mesh. read(rows) gives (..., b, T) of a slice of the B rows;
    it is asked only for rows that belong on this process's devices."""
    return jax.make_array_from_callback(
        shape, batch_sharding(mesh, len(shape)), lambda index: read(index[-2])
    )


def constrain(mesh: Mesh, x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """x, which lies on the mesh as spec says from here on. In the pipeline that is the mesh without the axis taken by hand."""
    inner = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh if inner.empty else inner, P(*spec))
    )


def gather(mesh: Mesh, weights: Any) -> Any:
    """Weights of one layer, or those outside of the layers, as matmuls want them: sharded over "tensor" only."""

    def one(path, w):
        if path_name(path).endswith("attn.c_attn.kernel"):
            # An equal cut of 3C would hold a q here and a v there: what is stored cut by rows is used cut by heads.
            w = constrain(mesh, w, "tensor", None).reshape(len(w), 3, -1)
            return constrain(mesh, w, None, None, "tensor").reshape(len(w), -1)
        return constrain(
            mesh, w, *["tensor" if axes == "tensor" else None for axes in partition_spec(path)]
        )

    return jax.tree_util.tree_map_with_path(one, weights)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a GPT in training is spread over `mesh`: what model.OneDevice is for one device."""

    mesh: Mesh | AbstractMesh
    remat: bool  # of the blocks, as GPTConfig has it

    @property
    def batch_shards(self) -> tuple[int, int]:
        return math.prod(self.mesh.shape[axis] for axis in ROWS), self.mesh.shape["context"]

    @property
    def width_shards(self) -> int:
        """Into how many parts heads, the MLP and the vocabulary are cut."""
        return self.mesh.shape["tensor"]

    def stages(self, rows: int) -> tuple[int, int]:
        """Stages of the pipeline, and micro-batches that `rows` rows go through it in: (1, 1) if there is no pipeline."""
        S = self.mesh.shape["layers"]
        # Up to four micro-batches a stage: then stages idle for less than a fifth of the time.
        return S, S * largest_divisor(rows // self.batch_shards[0], 4) if S > 1 else 1

    def scan(
        self, f: Callable, carry: tuple, layers: tuple, *, unroll: int = 1
    ) -> tuple[tuple, None]:
        """jax.lax.scan over the blocks; tells XLA how rows and weights lie on the mesh, and is a pipeline along "layers".

        Without these hints XLA lets the activations follow the weights and sends those through the network instead."""
        (x, cache, keys), mesh = carry, self.mesh
        assert cache is None, "there is no cache in training"
        sizes = {w[0].size for w in jax.tree.leaves(layers[0])}

        def not_gathered(
            primitive, *inputs, **_
        ):  # of what the backward pass needs: may it be kept?
            return (
                primitive.name not in ("sharding_constraint", "reshape", "convert_element_type")
                or inputs[0].size not in sizes
            )

        def layer(x, keys, weights_and_index):
            weights, i = weights_and_index
            (x, _, _), _ = f((x, None, keys), (gather(mesh, weights), i))
            return constrain(mesh, x, ("data", "fsdp"), "context", None)  # (B, T, C)

        if (
            mesh.shape["fsdp"] > 1
        ):  # weights are gathered again for the backward pass: kept, they would be whole everywhere
            layer = jax.checkpoint(
                layer, prevent_cse=False, policy=None if self.remat else not_gathered
            )
        S, M = self.stages(len(x))
        if S == 1:
            x, _ = jax.lax.scan(
                lambda x, weights_and_index: (layer(x, keys, weights_and_index), None),
                x,
                layers,
                unroll=unroll,
            )
        else:
            x = pipeline(
                layer, x, keys, layers, mesh=mesh, axis="layers", micro_batches=M, unroll=unroll
            )
        return (x, cache, keys), None


def pipeline(
    f: Callable,
    x: jax.Array,
    rows: Any,
    layers: Any,
    *,
    mesh: Mesh,
    axis: str,
    micro_batches: int,
    unroll: int = 1,
) -> jax.Array:
    """for each layer: x = f(x, rows, layer); stage s of the S along the mesh's `axis` holds and runs layers s L/S to (s+1) L/S - 1.

    x (B, ...) and the leaves of rows, (B, ...) too, are sharded over `axis` before any other along B; the leaves of layers (L, ...)
    along L. f must treat rows independently: they go through the stages as M micro-batches, of which stage s works on number t - s
    at tick t. That makes M + S - 1 ticks, in S - 1 of which a stage has nothing to do (and computes what nobody reads). Needs M
    divisible by S, B by M. The other axes of the mesh are left to XLA; the gradient is this program transposed."""
    S, M = mesh.shape[axis], micro_batches
    assert M % S == 0 == len(x) % M, f"{len(x)} rows, {M} micro-batches, {S} stages"

    def run(x, rows, layers, stage):
        stage = stage[0]
        # Every M/S-th row makes a micro-batch, so that each has its part of every shard of B: (B/S, ...) -> (M/S, B/M, ...)
        split = lambda a: jnp.moveaxis(a.reshape(-1, M // S, *a.shape[1:]), 1, 0)
        x, rows = jax.tree.map(
            lambda a: jax.lax.all_gather(split(a), axis, tiled=True), (x, rows)
        )  # (M, B/M, ...)

        def tick(received, t):
            m = jnp.clip(t - stage, 0, M - 1)
            mine = jax.tree.map(lambda a: a[m], rows)
            y, _ = jax.lax.scan(
                lambda y, layer: (f(y, mine, layer), None),
                jnp.where(stage == 0, x[m], received),
                layers,
                unroll=unroll,
            )
            return jax.lax.ppermute(y, axis, [(s, s + 1) for s in range(S - 1)]), y

        _, y = jax.lax.scan(tick, x[0], jnp.arange(M + S - 1))
        # Micro-batch m leaves the last stage at tick m + S - 1. Every stage gets its own rows back.
        y = jax.lax.psum_scatter(
            jnp.where(stage == S - 1, y[S - 1 :], 0), axis, tiled=True
        )  # (M/S, B/M, ...)
        return jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:])

    return jax.shard_map(run, mesh=mesh, in_specs=P(axis), out_specs=P(axis), axis_names={axis})(
        x, rows, layers, jnp.arange(S)
    )
