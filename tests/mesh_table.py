"""The tables of docs/distributed.md, on 8 simulated devices.

python tests/mesh_table.py [LAYOUT ...]    compares each layout with one device: five updates in
                                           float32 with none and all of EVERYTHING. Printed are the
                                           largest differences of loss and gradient norm (relative)
                                           and of the parameters (absolute), and what a device holds
                                           of parameters and optimizer state. on_eight_devices.py
                                           has a few of these.
python tests/mesh_table.py axes            compiles preset gpt2 with remat, 16 rows, for 4 devices
                                           along each axis: GB of state, of temporary memory and of
                                           the results of collectives on one of them.
"""

import collections
import dataclasses
import math
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.update(JAX_NUM_CPU_DEVICES="8", NPROC="16", JAX_CPU_ENABLE_ASYNC_DISPATCH="0")
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from config import GPTConfig, TrainConfig
from mesh import batch_sharding, make_mesh, put_batch
from train import train_step
from training.dry_run import collective_ops, matmul_flops, shard_bytes
from training.layout import Layout
from training.presets import TRAIN_PRESETS
from utils import TrainState

BASE = TrainConfig(
    model=GPTConfig(block_size=32, vocab_size=250, n_layer=4, n_head=4, n_embd=32, bias=True),
    batch_size=16,
    warmup_iters=2,
    max_iters=100,
    learning_rate=3e-4,
)
# Options for configure().
PLAIN: dict[str, Any] = {}
EVERYTHING = {"dropout": 0.1, "remat": True, "gradient_accumulation_steps": 2, "loss_chunks": 4}
LAYOUTS = [
    "data:8",
    "fsdp:8",
    "tensor:4",
    "layers:4",
    "context:4",
    "context:8",
    "data:2,fsdp:4",
    "data:2,tensor:4",
    "data:2,layers:4",
    "data:2,context:4",
    "fsdp:2,tensor:4",
    "fsdp:2,layers:4",
    "fsdp:4,context:2",
    "layers:2,tensor:4",
    "layers:4,context:2",
    "tensor:2,context:4",
    "data:2,fsdp:2,tensor:2",
    "data:2,fsdp:2,layers:2",
    "data:2,layers:2,context:2",
    "fsdp:2,layers:2,tensor:2",
    "fsdp:2,context:2,tensor:2",
    "layers:2,context:2,tensor:2",
]
AXES_LAYOUTS = ["data:1", "data:4", "fsdp:4", "tensor:4", "context:4", "layers:4"]
COLLECTIVES = ["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"]


class Result(NamedTuple):
    """What some updates have left."""

    losses: np.ndarray  # (steps,)
    grad_norms: np.ndarray  # (steps,)
    params: dict[str, Any]  # on the host
    state_bytes: int  # parameters and optimizer state on the device that holds most of them
    state: TrainState


class Difference(NamedTuple):
    """The largest differences of two results."""

    loss: float  # relative
    grad_norm: float  # relative
    params: float  # absolute


def configure(**options: Any) -> TrainConfig:
    """Return BASE with these fields of it or of its model."""
    model_options = {name: options.pop(name) for name in list(options) if hasattr(BASE.model, name)}
    model = dataclasses.replace(BASE.model, **model_options)
    return dataclasses.replace(BASE, model=model, **options)


def mesh_of(layout: str) -> jax.sharding.Mesh:
    """Return the mesh of a layout on the first of the devices, as many as it needs."""
    devices = math.prod(int(part.split(":")[1]) for part in layout.split(","))
    return make_mesh(layout, jax.devices()[:devices])


@cache
def batches(config: TrainConfig, steps: int) -> list[np.ndarray]:
    """Return so many batches of random tokens (A, B, T+1)."""
    shape = (config.gradient_accumulation_steps, config.batch_size, config.model.block_size + 1)
    rng = np.random.default_rng(0)
    return [rng.integers(config.model.vocab_size, size=shape, dtype=np.int32) for _ in range(steps)]


def put(batch: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """Put a batch (A, B, T+1) on the mesh."""
    return put_batch(mesh, batch.shape, lambda rows: batch[:, rows])


@cache
def compiled_step(layout: str, config: TrainConfig) -> jax.stages.Compiled:
    """Compile train_step for a layout."""
    mesh = mesh_of(layout)
    (batch,) = batches(config, 1)
    state = TrainState.abstract(config, mesh)
    return train_step.lower(state, put(batch, mesh), config).compile()


def train_on(
    layout: str, config: TrainConfig, steps: int = 5, state: TrainState | None = None
) -> Result:
    """Make the updates up to number `steps`, from `state` on or from the first one."""
    state = state or TrainState.create(config, mesh=mesh_of(layout))
    step = compiled_step(layout, config)
    losses = []
    grad_norms = []
    for batch in batches(config, steps)[int(state.step) :]:
        state, metrics = step(state, put(batch, state.mesh))
        losses.append(float(metrics["loss"]))
        grad_norms.append(float(metrics["grad_norm"]))
    return Result(
        np.array(losses),
        np.array(grad_norms),
        jax.device_get(state.params),
        largest_state_bytes(state),
        state,
    )


def largest_state_bytes(state: TrainState) -> int:
    """Return what the device that holds most of it holds of parameters and optimizer state."""
    held: collections.Counter = collections.Counter()
    for array in jax.tree.leaves((state.params, state.opt_state)):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())


@cache
def on_one_device(config: TrainConfig) -> Result:
    """Return what all layouts are compared with."""
    return train_on("data:1", config)


def difference(a: Result, b: Result) -> Difference:
    """Return the largest differences of a from b."""
    apart = jax.tree.map(largest_difference, a.params, b.params)
    return Difference(
        loss=largest_difference(a.losses / b.losses, 1.0),
        grad_norm=largest_difference(a.grad_norms / b.grad_norms, 1.0),
        params=max(jax.tree.leaves(apart)),
    )


def largest_difference(x: np.ndarray, y: np.ndarray | float) -> float:
    """Return the largest absolute difference of two arrays."""
    return float(np.abs(x - y).max())


def compare(layouts: list[str]) -> None:
    """Print the table of layouts against one device."""
    print("| mesh | loss | gradient norm | parameters | state bytes, of one device's |")
    print("|---|---|---|---|---|")
    for layout in layouts:
        differences = []
        for options in (PLAIN, EVERYTHING):
            config = configure(**options)
            differences.append(difference(train_on(layout, config), on_one_device(config)))
        worst = " | ".join(f"{d:.0e}" for d in np.max(differences, axis=0))
        plain = configure(**PLAIN)
        share = on_one_device(plain).state_bytes / train_on(layout, plain).state_bytes
        print(f"| `{layout}` | {worst} | 1 / {share:.2f} |", flush=True)


def compare_axes() -> None:
    """Print the table of axes.

    Its last row is "layers" without the pipeline: the same scan as on the other axes, over a stack
    that is sharded along its layers."""
    columns = ["mesh", "state", "temporary", "FLOPs, of one device's", *COLLECTIVES]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    gpt2 = TRAIN_PRESETS["gpt2"].config
    model = dataclasses.replace(gpt2.model, remat=True)
    config = dataclasses.replace(gpt2, batch_size=16, gradient_accumulation_steps=1, model=model)
    alone = matmul_flops(compiled_for_shapes("data:1", config).as_text())
    for layout in AXES_LAYOUTS:
        print_axis(layout, layout, config, alone)
    Layout.stages = one_stage
    jax.clear_caches()
    print_axis("layers:4 without pipeline", "layers:4", config, alone)


def one_stage(layout: Layout, rows: int) -> tuple[int, int]:
    """Stand in for Layout.stages where there shall be no pipeline."""
    return 1, 1


def compiled_for_shapes(layout: str, config: TrainConfig) -> jax.stages.Compiled:
    """Compile train_step for a layout, without arrays: for models that are too large for them."""
    mesh = mesh_of(layout)
    batch = jax.ShapeDtypeStruct(
        (1, config.batch_size, config.model.block_size + 1),
        np.int32,
        sharding=batch_sharding(mesh, 3),
    )
    return train_step.lower(TrainState.abstract(config, mesh), batch, config).compile()


def print_axis(name: str, layout: str, config: TrainConfig, alone: int) -> None:
    """Print the row of a layout; `alone` is the FLOPs of a step on one device."""
    compiled = compiled_for_shapes(layout, config)
    state = TrainState.abstract(config, mesh_of(layout))
    sent: collections.Counter = collections.Counter()
    for (kind, _, size), times in collective_ops(compiled.as_text()).items():
        sent[kind] += times * size
    columns = [
        f"`{name}`",
        gigabytes(shard_bytes((state.params, state.opt_state))),
        gigabytes(compiled.memory_analysis().temp_size_in_bytes),
        f"1 / {alone / matmul_flops(compiled.as_text()):.2f}",
        *(gigabytes(sent[kind]) if sent[kind] else "-" for kind in COLLECTIVES),
    ]
    print(f"| {' | '.join(columns)} |", flush=True)


def gigabytes(n: int) -> str:
    """Return a number of bytes in GB, as the table has it."""
    return f"{n / 1e9:.2f}"


if __name__ == "__main__":
    if sys.argv[1:] == ["axes"]:
        compare_axes()
    else:
        compare(sys.argv[1:] or LAYOUTS)
