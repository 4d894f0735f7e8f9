"""The tables of docs/distributed.md, on 8 simulated devices.

python tests/mesh_table.py [LAYOUT ...]    each layout against one device: five updates in float32 with none and all of
                                           EVERYTHING; the largest differences of loss and gradient norm (relative) and of the
                                           parameters (absolute), and what a device holds of parameters and optimizer state.
                                           on_eight_devices.py has a few of these
python tests/mesh_table.py axes            preset gpt2 with remat, 16 rows, on 4 devices along each axis: GB of state,
                                           of temporary memory and of the results of collectives on one of them"""

import collections
import dataclasses
import math
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ.update(JAX_NUM_CPU_DEVICES="8", NPROC="16", JAX_CPU_ENABLE_ASYNC_DISPATCH="0")
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from config import TRAIN_PRESETS, GPTConfig, TrainConfig
from dry_run import collective_ops, matmul_flops, shard_bytes
from mesh import Layout, batch_sharding, make_mesh, put_batch
from train import train_step
from utils import TrainState

BASE = TrainConfig(
    model=GPTConfig(block_size=32, vocab_size=250, n_layer=4, n_head=4, n_embd=32, bias=True),
    batch_size=16,
    warmup_iters=2,
    max_iters=100,
    learning_rate=3e-4,
)
PLAIN, EVERYTHING = {}, dict(dropout=0.1, remat=True, gradient_accumulation_steps=2, loss_chunks=4)
OPTIONS = [PLAIN, EVERYTHING]
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


class Result(NamedTuple):
    losses: np.ndarray  # (steps,)
    grad_norms: np.ndarray  # (steps,)
    params: dict
    state_bytes: int  # parameters and optimizer state on the device that holds most of them
    state: TrainState


class Difference(NamedTuple):
    loss: float
    grad_norm: float
    params: float


def configure(**options) -> TrainConfig:
    model = {name: options.pop(name) for name in list(options) if hasattr(BASE.model, name)}
    return dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, **model), **options)


def mesh_of(layout: str) -> jax.sharding.Mesh:
    """On the first of the devices, as many as it needs."""
    return make_mesh(
        layout, jax.devices()[: math.prod(int(part.split(":")[1]) for part in layout.split(","))]
    )


@lru_cache(maxsize=None)
def batches(config: TrainConfig, steps: int) -> list[np.ndarray]:
    """Random tokens (A, B, T+1)."""
    shape = (config.gradient_accumulation_steps, config.batch_size, config.model.block_size + 1)
    rng = np.random.default_rng(0)
    return [rng.integers(config.model.vocab_size, size=shape, dtype=np.int32) for _ in range(steps)]


@lru_cache(maxsize=None)
def compiled_step(layout: str, config: TrainConfig) -> jax.stages.Compiled:
    mesh = mesh_of(layout)
    (batch,) = batches(config, 1)
    batch = put_batch(mesh, batch.shape, lambda rows: batch[:, rows])
    return train_step.lower(TrainState.abstract(config, mesh), batch, config).compile()


def train_on(
    layout: str, config: TrainConfig, steps: int = 5, state: TrainState | None = None
) -> Result:
    """Updates up to `steps`, from `state` or the first one."""
    state, step, losses, grad_norms = (
        state or TrainState.create(config, mesh=mesh_of(layout)),
        compiled_step(layout, config),
        [],
        [],
    )
    for batch in batches(config, steps)[int(state.step) :]:
        state, metrics = step(
            state, put_batch(state.mesh, batch.shape, lambda rows: batch[:, rows])
        )
        losses.append(float(metrics["loss"]))
        grad_norms.append(float(metrics["grad_norm"]))
    held = dict.fromkeys(state.mesh.devices.flat, 0)
    for shard in (
        shard
        for array in jax.tree.leaves((state.params, state.opt_state))
        for shard in array.addressable_shards
    ):
        held[shard.device] += shard.data.nbytes
    return Result(
        np.array(losses),
        np.array(grad_norms),
        jax.device_get(state.params),
        max(held.values()),
        state,
    )


@lru_cache(maxsize=None)
def on_one_device(config: TrainConfig) -> Result:
    return train_on("data:1", config)


def difference(a: Result, b: Result) -> Difference:
    relative = lambda x, y: float(np.abs(x / y - 1).max())
    params = max(
        jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a.params, b.params))
    )
    return Difference(relative(a.losses, b.losses), relative(a.grad_norms, b.grad_norms), params)


def compare(layouts: list[str]) -> None:
    print(
        "| mesh | loss | gradient norm | parameters | state bytes, of one device's |\n|---|---|---|---|---|"
    )
    for layout in layouts:
        ones, results = zip(
            *(
                (on_one_device(config), train_on(layout, config))
                for config in (configure(**o) for o in OPTIONS)
            )
        )
        worst = np.max([difference(result, one) for result, one in zip(results, ones)], axis=0)
        share = ones[0].state_bytes / results[0].state_bytes
        print(
            f"| `{layout}` |",
            " | ".join(f"{d:.0e}" for d in worst),
            f"| 1 / {share:.2f} |",
            flush=True,
        )


def axes() -> None:
    """The last row is "layers" without pipeline(): the same scan as on the other axes, over a stack sharded along its layers."""
    gb = lambda n: f"{n / 1e9:.2f}"
    kinds = ["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"]
    print(
        "| mesh | state | temporary | FLOPs, of one device's |",
        " | ".join(kinds),
        "|\n" + "|---" * (4 + len(kinds)) + "|",
    )
    gpt2 = TRAIN_PRESETS["gpt2"]
    config = dataclasses.replace(
        gpt2,
        batch_size=16,
        gradient_accumulation_steps=1,
        model=dataclasses.replace(gpt2.model, remat=True),
    )
    pipelined, alone = Layout.stages, None
    for layout in (
        "data:1",
        "data:4",
        "fsdp:4",
        "tensor:4",
        "context:4",
        "layers:4",
        "layers:4 without pipeline",
    ):
        Layout.stages = pipelined if "without" not in layout else lambda self, rows: (1, 1)
        jax.clear_caches()
        mesh = mesh_of(layout.split()[0])
        state = TrainState.abstract(config, mesh)
        batch = jax.ShapeDtypeStruct(
            (1, config.batch_size, config.model.block_size + 1),
            np.int32,
            sharding=batch_sharding(mesh, 3),
        )
        compiled = train_step.lower(state, batch, config).compile()
        flops, sent = matmul_flops(compiled.as_text()), collections.Counter()
        alone = alone or flops
        for (kind, _, size), times in collective_ops(compiled.as_text()).items():
            sent[kind] += times * size
        print(
            f"| `{layout}` | {gb(shard_bytes((state.params, state.opt_state)))} | {gb(compiled.memory_analysis().temp_size_in_bytes)} |",
            f"1 / {alone / flops:.2f} |",
            " | ".join(gb(sent[kind]) if sent[kind] else "-" for kind in kinds),
            "|",
            flush=True,
        )


if __name__ == "__main__":
    axes() if sys.argv[1:] == ["axes"] else compare(sys.argv[1:] or LAYOUTS)
