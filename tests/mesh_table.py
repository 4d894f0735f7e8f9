"""The table of docs/distributed.md: each layout of 8 simulated devices against one device. python tests/mesh_table.py

Five updates in float32; the largest differences of loss and gradient norm (relative) and of the parameters (absolute), and what a
device holds of parameters and optimizer state. tests/on_eight_devices.py has a few of these cases."""

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

from config import GPTConfig, TrainConfig
from mesh import make_mesh, put_batch
from train import train_step
from utils import TrainState

BASE = TrainConfig(model=GPTConfig(block_size=32, vocab_size=250, n_layer=4, n_head=4, n_embd=32, bias=True), batch_size=16,
                   warmup_iters=2, max_iters=100, learning_rate=3e-4)
PLAIN, EVERYTHING = {}, dict(dropout=0.1, remat=True, gradient_accumulation_steps=2, loss_chunks=4)
OPTIONS = [PLAIN, dict(dropout=0.1), dict(gradient_accumulation_steps=2), dict(remat=True), dict(loss_chunks=4), EVERYTHING]
LAYOUTS = ["data:8", "fsdp:8", "tensor:4", "layers:4", "context:4", "context:8", "data:2,fsdp:4", "data:2,tensor:4", "data:2,layers:4",
           "data:2,context:4", "fsdp:2,tensor:4", "fsdp:2,layers:4", "fsdp:4,context:2", "layers:2,tensor:4", "layers:4,context:2",
           "tensor:2,context:4", "data:2,fsdp:2,tensor:2", "data:2,fsdp:2,layers:2", "data:2,layers:2,context:2",
           "fsdp:2,layers:2,tensor:2", "fsdp:2,context:2,tensor:2", "layers:2,context:2,tensor:2"]


class Result(NamedTuple):
    losses: np.ndarray      # (steps,)
    grad_norms: np.ndarray  # (steps,)
    params: dict
    state_bytes: int        # parameters and optimizer state on the device that holds most of them
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
    return make_mesh(layout, jax.devices()[:math.prod(int(part.split(":")[1]) for part in layout.split(","))])


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
    return train_step.lower(TrainState.shapes(config, mesh), batch, config).compile()


def train_on(layout: str, config: TrainConfig, steps: int = 5, state: TrainState | None = None) -> Result:
    """Updates up to `steps`, from `state` or the first one."""
    state, step, losses, grad_norms = state or TrainState.create(config, mesh=mesh_of(layout)), compiled_step(layout, config), [], []
    for batch in batches(config, steps)[int(state.step):]:
        state, metrics = step(state, put_batch(state.mesh, batch.shape, lambda rows: batch[:, rows]))
        losses.append(float(metrics["loss"]))
        grad_norms.append(float(metrics["grad_norm"]))
    held = dict.fromkeys(state.mesh.devices.flat, 0)
    for shard in (shard for array in jax.tree.leaves((state.params, state.opt_state)) for shard in array.addressable_shards):
        held[shard.device] += shard.data.nbytes
    return Result(np.array(losses), np.array(grad_norms), jax.device_get(state.params), max(held.values()), state)


@lru_cache(maxsize=None)
def on_one_device(config: TrainConfig) -> Result:
    return train_on("data:1", config)


def difference(a: Result, b: Result) -> Difference:
    relative = lambda x, y: float(np.abs(x / y - 1).max())
    params = max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a.params, b.params)))
    return Difference(relative(a.losses, b.losses), relative(a.grad_norms, b.grad_norms), params)


def main() -> None:
    print("| mesh | options | loss | gradient norm | parameters | state bytes, of one device's |\n|---|---|---|---|---|---|")
    for options in OPTIONS:
        config = configure(**options)
        one, names = on_one_device(config), ", ".join(f"{k}={v}" for k, v in options.items()) or "-"
        for layout in LAYOUTS:
            result = train_on(layout, config)
            d = difference(result, one)
            print(f"| {layout} | {names} | {d.loss:.0e} | {d.grad_norm:.0e} | {d.params:.0e} | 1 / {one.state_bytes / result.state_bytes:.2f} |",
                  flush=True)


if __name__ == "__main__":
    main()
