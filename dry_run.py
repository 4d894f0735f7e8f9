"""What a training step takes, without taking it: python train.py PRESET --mesh=... --dry_run

The step is compiled for the mesh, for as many simulated CPU devices as it asks for if there are no such devices, and the compiled
program is read. Nothing of the model's size is allocated, and no file is written.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

import pretrained
from config import TrainConfig, changed
from mesh import Layout, batch_sharding, describe, planned_mesh, use_cpu_cores
from ops import ACTIVATIONS
from utils import TrainState

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
ITEMSIZE = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
}


def instructions(hlo: str) -> Iterator[tuple[int, str]]:
    """Each instruction of a compiled program (XLA's text form), and how often one execution runs it: loops count."""
    computations, name, entry = {}, None, None
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif name and line.startswith("  "):
            computations[name].append(line)

    def run(name: str, times: int) -> Iterator[tuple[int, str]]:
        for line in computations[name]:
            yield times, line
            if body := re.search(r" while\(.* body=%?([\w.-]+)", line):
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                yield from run(body[1], times * int(trips[1]) if trips else times)
            elif called := re.search(
                r" (?:fusion|call|async-start)\(.* (?:calls|to_apply)=%?([\w.-]+)", line
            ):
                yield from run(called[1], times)

    yield from run(entry, 1)


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """[("f32", (4, 64))] of "(f32[4,64]{1,0}, ...)" """
    return [
        (dtype, tuple(map(int, dims.split(","))) if dims else ())
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text)
    ]


def collective_ops(hlo: str) -> collections.Counter:
    """{(kind, "f32[4,64] f32[64]", bytes of the result on one device): how often per execution}"""
    found = collections.Counter()
    for times, line in instructions(hlo):
        # Asynchronous ones are counted where they are done: the type of the start names operands too.
        if op := re.search(rf" = (.*?) ({COLLECTIVES})(?:-done)?\(", line):
            results = shapes(op[1])
            size = sum(ITEMSIZE[dtype] * math.prod(dims) for dtype, dims in results)
            found[
                op[2],
                " ".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in results),
                size,
            ] += times
    return found


def matmul_flops(hlo: str) -> int:
    """Of one device in one execution: 2 for each multiply-add of every dot."""
    dims = {
        m[1]: shapes(m[2])[0][1]
        for m in re.finditer(r"^\s+(?:ROOT )?%?([\w.-]+) = (\w+\[[\d,]*\])", hlo, re.MULTILINE)
    }
    total = 0
    for times, line in instructions(hlo):
        if dot := re.search(
            r" = (\S+) dot\(%?([\w.-]+),.* lhs_contracting_dims=\{([\d,]*)\}", line
        ):
            contracted = math.prod(dims[dot[2]][int(i)] for i in dot[3].split(","))
            total += times * 2 * math.prod(shapes(dot[1])[0][1]) * contracted
    return total


def with_data(config: TrainConfig) -> TrainConfig:
    """config with the model that train.start would make, as far as it can be known without data set and weights."""
    model, meta = config.model, config.data_path / "meta.json"
    if config.init_from not in ("scratch", "resume"):
        stored = pretrained.read_config(
            pretrained.fetch(config.init_from, "config.json") / "config.json"
        )
        model = pretrained.overridden(stored, changed(model))
    elif meta.exists():
        model = dataclasses.replace(model, vocab_size=json.loads(meta.read_text())["vocab_size"])
    elif config.dataset.endswith("char"):
        model = dataclasses.replace(model, vocab_size=65)  # Tiny Shakespeare's
    return dataclasses.replace(config, model=model)


def shard_bytes(tree: Any) -> int:
    """What one device holds of arrays, or of jax.ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def activation_bytes(config: TrainConfig, mesh: Mesh | AbstractMesh) -> tuple[int, int, int]:
    """What one device keeps of a micro-batch until the backward pass has used it: blocks, blocks with remat, the rest.

    Korthikanti et al. 2022, section 4, with the numbers that model.py keeps. For each of a device's tokens and each block, where
    an input of a matmul has e bytes and any other number 4, and tensor parallelism cuts heads and the MLP in W: 2 x 8 C for the
    LayerNorms, 2 e C for what c_attn and c_fc read, (4 e C + 4 C (e + f)) / W for q, k, v, what both c_proj read and the f of the
    activation itself (4 for gelu_new), (4 + e) T H / W for the softmax; dropout adds 1 for each number it may drop. With remat it
    is 4 C, and all of it for one block at a time. Pipeline stages keep what they computed in idle ticks too. The rest: 12 C for
    the last LayerNorm and its input, the logits of a chunk and their gradient."""
    model, layout = config.model, Layout(mesh, config.model.remat)
    (R, K), W, (S, M) = layout.batch_shards, layout.width_shards, layout.stages(config.batch_size)
    T, C, H = model.block_size, model.n_embd, model.n_head
    e, dropped = jnp.dtype(model.dtype).itemsize, int(model.dropout > 0)
    kept = jax.eval_shape(lambda x: jax.vjp(ACTIVATIONS[model.activation], x)[1], jnp.zeros(1))
    f = sum(a.dtype.itemsize for a in jax.tree.leaves(kept) if a.shape)  # constants have none
    tokens = config.batch_size // R * T // K
    block = tokens * (
        16 * C
        + 2 * (e + dropped) * C
        + (4 * e * C + 4 * C * (e + f) + (4 + e + dropped) * T * H) // W
    )
    L = model.n_layer * (M + S - 1) / M
    rest = tokens * 12 * C + 2 * 4 * (tokens // config.loss_chunks) * model.padded_vocab_size // W
    return int(L * block), int(L * tokens * 4 * C + block * S / M), rest


def report(config: TrainConfig, train_step: Callable) -> Iterator[str]:
    """Lines that say what train_step takes on config.mesh. Raises ValueError if the mesh does not fit."""
    config = with_data(config)
    use_cpu_cores(config)
    mesh = planned_mesh(config)
    model, A, B, T = (
        config.model,
        config.gradient_accumulation_steps,
        config.batch_size,
        config.model.block_size,
    )
    state = TrainState.abstract(config, mesh)
    blocks, with_remat, rest = activation_bytes(config, mesh)
    whole = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    share = lambda tree: (
        f"{gb(shard_bytes(tree))} of {gb(whole(tree))}, 1 / {whole(tree) / shard_bytes(tree):.2f}"
    )
    device_tokens = A * B * T / mesh.size
    formula = device_tokens * model.flops_per_token
    yield f"mesh         {describe(mesh)}"
    yield f"step         {A} x {B} x {T} = {A * B * T:,} tokens; {model.num_params() / 1e6:,.1f}M parameters, {model.dtype}"
    yield "Bytes on one device"
    yield f"parameters   {share(state.params)}; their gradients as much again"
    yield f"optimizer    {share(state.opt_state)}"
    here, other = (f"{gb(with_remat)} with remat", f"{gb(blocks)} without")[
        :: 1 if model.remat else -1
    ]
    yield f"activations  estimate: blocks {here} ({other}), the rest {gb(rest)}"
    if isinstance(mesh, AbstractMesh):
        yield f"FLOPs        6 N + 12 L C T: {formula:.3e} a step on one device"
        yield (
            f"Nothing was compiled: that takes {mesh.size} devices, if only simulated ones. On a mesh with a part of data and "
            "that part of batch_size each device does the same."
        )
        return
    batch = jax.ShapeDtypeStruct((A, B, T + 1), jnp.int32, sharding=batch_sharding(mesh, 3))
    compiled = train_step.lower(state, batch, config).compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    platform = mesh.devices.flat[0].platform
    yield (
        f"compiled     {gb(memory.argument_size_in_bytes + memory.temp_size_in_bytes)} for {platform}: arguments "
        f"{gb(memory.argument_size_in_bytes)}, of which {gb(memory.alias_size_in_bytes)} are updated in place, outputs "
        f"{gb(memory.output_size_in_bytes)}, temporary {gb(memory.temp_size_in_bytes)}"
    )
    yield "FLOPs of a step on one device"
    yield f"formula      {formula:.3e}, 6 N + 12 L C T for each of {device_tokens:,.0f} tokens"
    if platform == "cpu":  # elsewhere a matmul may be a call of a library
        flops = matmul_flops(hlo)
        yield f"compiled     {flops:.3e} in matmuls, {flops / formula:.2f} of the formula"
    yield f"XLA          {compiled.cost_analysis()['flops']:.3e} by cost_analysis, which counts the body of a loop once"
    ops = collective_ops(hlo)
    kinds = collections.Counter()
    for (kind, _, size), times in ops.items():
        kinds[kind] += times * size
    yield f"Collectives of a step, bytes of results on one device: {gb(kinds.total())}"
    for kind, total in kinds.most_common():
        yield f"{kind:19} {gb(total):>10}"
        largest = sorted(
            (
                (times * size, times, shapes)
                for (k, shapes, size), times in ops.items()
                if k == kind
            ),
            reverse=True,
        )
        for size, times, shapes in largest[:4]:
            yield f"    {gb(size):>10} = {times:4} x {shapes if len(shapes) < 80 else shapes[:80] + '...'}"


def gb(n: float) -> str:
    return f"{n / 1e9:.3f} GB"
