"""What a training step takes, without taking it: python train.py PRESET --mesh=... --dry_run

The step is compiled for the mesh, for as many simulated CPU devices as it asks for if there are no
such devices, and the compiled program is read. Nothing of the model's size is allocated, and no
file is written. Start reading at `report`.

Shapes: A micro-batches of B rows of T tokens, C n_embd, H heads of D, KV of keys, L layers.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

import pretrained
from config import GPTConfig, TrainConfig
from mesh import batch_sharding, describe, planned_mesh
from ops import ACTIVATIONS, kept_dtype
from training.layout import Layout
from training.processes import use_cpu_cores
from training.token_files import read_meta
from utils import TrainState

TINY_SHAKESPEARE_VOCAB_SIZE = 65  # what a data set of characters is taken for, if it is not there
LARGEST_COLLECTIVES = 4  # of each kind, that are listed by themselves
LONGEST_TYPE = 80  # characters of a collective's type that are printed

# --- Reading a compiled program in XLA's text form -----------------------------------------------

# Bytes per element of the types that XLA names.
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

# The first line of a computation: "ENTRY %main.42 (x: f32[4]) -> f32[4] {".
COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
# A loop: "%w = (...) while(%t), condition=%c, body=%b, backend_config={...}".
LOOP = re.compile(r" while\(.* body=%?(?P<body>[\w.-]+)")
# How often it runs, in its backend_config, where XLA knows: "known_trip_count":{"n":"12"}.
TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(?P<n>\d+)"')
# An instruction that runs another computation once: "%f = f32[4] fusion(%x), calls=%g".
CALL = re.compile(r" (?:fusion|call|async-start)\(.* (?:calls|to_apply)=%?(?P<computation>[\w.-]+)")
# An array's type: "f32[4,64]", and "f32[]" for a scalar.
ARRAY_TYPE = re.compile(r"(?P<dtype>\w+)\[(?P<dims>[\d,]*)\]")
# "%ag = f32[4,64]{1,0} all-gather(". Asynchronous ones are counted where they are done: the type of
# the start names operands too.
COLLECTIVE = re.compile(
    r" = (?P<type>.*?) "
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-done)?\("
)
# An instruction whose result is one array: "  ROOT %a = f32[4,64]...".
RESULT = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\w+\[[\d,]*\])", re.MULTILINE)
# A product: "%d = f32[4,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, ...".
DOT = re.compile(
    r" = (?P<type>\S+) dot\(%?(?P<lhs>[\w.-]+),.* lhs_contracting_dims=\{(?P<contracted>[\d,]*)\}"
)


class Collective(NamedTuple):
    """A collective operation, without its place in the program."""

    kind: str  # "all-gather"
    types: str  # of the results on one device: "f32[4,64] f32[64]"
    size: int  # of the results on one device, in bytes


def instructions(hlo: str) -> Iterator[tuple[int, str]]:
    """Yield each instruction of a compiled program, and how often one execution runs it.

    The body of a loop runs as often as the loop does, or once where XLA does not know."""
    computations, entry = split_computations(hlo)

    def run(name: str, times: int) -> Iterator[tuple[int, str]]:
        for line in computations[name]:
            yield times, line
            loop = LOOP.search(line)
            call = CALL.search(line)
            if loop:
                trip_count = TRIP_COUNT.search(line)
                trips = int(trip_count["n"]) if trip_count else 1
                yield from run(loop["body"], times * trips)
            elif call:
                yield from run(call["computation"], times)

    yield from run(entry, 1)


def split_computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation of a program by its name, and the name of the first."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        header = COMPUTATION.match(line)
        if header:
            name = header["name"]
            computations[name] = []
            if header["entry"]:
                entry = name
        elif name and line.startswith("  "):
            computations[name].append(line)
    return computations, entry


def array_types(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the arrays that a type names: [("f32", (4, 64))] of "(f32[4,64]{1,0}, ...)"."""
    return [
        (found["dtype"], tuple(int(dim) for dim in found["dims"].split(",") if dim))
        for found in ARRAY_TYPE.finditer(text)
    ]


def collective_ops(hlo: str) -> collections.Counter[Collective]:
    """Return how often one execution of a compiled program runs each collective."""
    counts: collections.Counter[Collective] = collections.Counter()
    for times, line in instructions(hlo):
        found = COLLECTIVE.search(line)
        if found:
            results = array_types(found["type"])
            types = " ".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in results)
            size = sum(ITEMSIZE[dtype] * math.prod(dims) for dtype, dims in results)
            counts[Collective(found["kind"], types, size)] += times
    return counts


def matmul_flops(hlo: str) -> int:
    """Return the FLOPs of one device in one execution: 2 for each multiply-add of every dot."""
    shapes = {found["name"]: only_shape(found["type"]) for found in RESULT.finditer(hlo)}
    flops = 0
    for times, line in instructions(hlo):
        dot = DOT.search(line)
        if dot:
            lhs = shapes[dot["lhs"]]
            summed = math.prod(lhs[int(axis)] for axis in dot["contracted"].split(","))
            flops += times * 2 * math.prod(only_shape(dot["type"])) * summed
    return flops


def only_shape(text: str) -> tuple[int, ...]:
    """Return the shape of an array's type: (4, 64) of "f32[4,64]{1,0}"."""
    _, shape = array_types(text)[0]
    return shape


# --- The plan ------------------------------------------------------------------------------------


def with_data(config: TrainConfig) -> TrainConfig:
    """Return config with the model that run_start.prepare_model makes.

    That is known as far as it can be without the data set and the weights."""
    return dataclasses.replace(config, model=_planned_model(config))


def _planned_model(config: TrainConfig) -> GPTConfig:
    """Return the model of stored weights, or one with the data set's vocabulary."""
    model = config.model
    meta = config.data_path / "meta.json"
    if config.init_from not in ("scratch", "resume"):
        directory = pretrained.fetch(config.init_from, "config.json")
        _, stored = pretrained.stored_model(directory)
        return pretrained.apply_overrides(stored, pretrained.changed(model))
    if meta.exists():
        return dataclasses.replace(model, vocab_size=read_meta(meta)["vocab_size"])
    if config.dataset.endswith("char"):
        return dataclasses.replace(model, vocab_size=TINY_SHAKESPEARE_VOCAB_SIZE)
    return model


def total_bytes(tree: Any) -> int:
    """Return the bytes of all arrays, or jax.ShapeDtypeStructs, of a tree."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def shard_bytes(tree: Any) -> int:
    """Return what one device holds of arrays, or of jax.ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


class Activations(NamedTuple):
    """What one device keeps of a micro-batch until the backward pass has used it, in bytes."""

    blocks: int
    blocks_with_remat: int
    rest: int
    logits: int
    """What exists of them, and of their gradient, while all else is kept."""


def activation_bytes(config: TrainConfig, mesh: Mesh | AbstractMesh) -> Activations:
    """Estimate what one device keeps of a micro-batch until the backward pass has used it.

    Blocks: block_bytes_per_token for each of the device's tokens. With remat it is their inputs,
    4 C, and all of one block at a time. Pipeline stages keep what they computed in idle ticks too.
    The rest: 12 C for the last LayerNorm and its input. Logits: a chunk's and their gradient."""
    model = config.model
    layout = Layout(mesh, model)
    row_shards, position_shards = layout.batch_shards
    stages, micro_batches = layout.stages(config.batch_size)
    tokens = config.batch_size // row_shards * model.block_size // position_shards
    block = tokens * block_bytes_per_token(model, layout.width_shards)
    layers_kept = model.n_layer * (micro_batches + stages - 1) / micro_batches
    inputs_kept = layers_kept * tokens * 4 * model.n_embd
    chunk_tokens = tokens // config.loss_chunks
    logits = 2 * 4 * chunk_tokens * model.padded_vocab_size // layout.width_shards
    return Activations(
        blocks=int(layers_kept * block),
        blocks_with_remat=int(inputs_kept + block * stages / micro_batches),
        rest=tokens * 12 * model.n_embd,
        logits=logits,
    )


def block_bytes_per_token(model: GPTConfig, width_shards: int) -> int:
    """Return what one block keeps of one token for the backward pass, on one device.

    Korthikanti et al. 2022, section 4, with the numbers that model.py keeps, where an input of a
    matmul has e bytes, what a Linear writes k (see kept_dtype) and any other number 4: 2 x 8 C for
    the norms, 2 e C for what c_attn and c_fc read; and, since tensor parallelism cuts heads and the
    MLP, of width M, in W: e (2 H + 2 KV) D for q, k, v and what the attention's c_proj reads,
    (e + f) M for what the MLP's reads and the f of the activation itself (k for gelu_new), 2 k M
    for both sides of a gate, which reads e C once more, 8 (H + KV) D for norms of q and k, and
    (4 + e) T H for the softmax, all of it / W. Dropout adds 1 for each number it may drop."""
    C, M = model.n_embd, model.mlp_dim
    queries, keys = model.n_head * model.head_dim, model.kv_heads * model.head_dim
    e = jnp.dtype(model.dtype).itemsize
    f = activation_function_bytes(model)
    dropped = int(model.dropout > 0)
    readers = 3 if model.mlp == "gated" else 2  # c_attn, c_fc and c_gate
    whole = 16 * C + (readers * e + 2 * dropped) * C
    softmax = (4 + e + dropped) * model.block_size * model.n_head
    k = jnp.dtype(kept_dtype(model.dtype)).itemsize
    gate = 2 * k * M if model.mlp == "gated" else 0
    norms = 8 * (queries + keys) if model.qk_norm else 0
    cut = 2 * e * (queries + keys) + M * (e + f) + gate + norms + softmax
    return whole + cut // width_shards


def activation_function_bytes(model: GPTConfig) -> int:
    """Return what the backward pass of a model's activation function keeps of one number."""

    def backward(x: jax.Array) -> Callable:
        return jax.vjp(ACTIVATIONS[model.activation], x)[1]

    kept = jax.eval_shape(backward, jnp.zeros(1, kept_dtype(model.dtype)))
    return sum(a.dtype.itemsize for a in jax.tree.leaves(kept) if a.shape)  # constants have none


# --- The report ----------------------------------------------------------------------------------


class _CompiledStep(NamedTuple):
    """What XLA says of a compiled step."""

    platform: str
    hlo: str  # the program as text
    memory: Any  # of one device: an object of sizes in bytes
    flops: float  # of one device, where the body of a loop counts once


def report(config: TrainConfig, train_step: jax.stages.Wrapped) -> Iterator[str]:
    """Yield lines that say what train_step takes on config.mesh.

    Raises UserError if the mesh does not fit."""
    config = with_data(config)
    use_cpu_cores(config)
    mesh = planned_mesh(config)
    state = TrainState.abstract(config, mesh)
    yield from _size_lines(config, mesh)
    yield from _state_lines(config, mesh, state)
    if isinstance(mesh, AbstractMesh):
        formula = _formula_flops(config, mesh)
        yield f"FLOPs        6 N + 12 L H D T: {formula:.3e} a step on one device"
        yield (
            f"Nothing was compiled: that takes {mesh.size} devices, if only simulated ones. "
            "On a mesh with a part of data and that part of batch_size each device does the same."
        )
        return
    compiled = _compile(config, mesh, state, train_step)
    yield _memory_line(compiled)
    yield from _flops_lines(config, mesh, compiled)
    yield from _collective_lines(compiled)


def _size_lines(config: TrainConfig, mesh: Mesh | AbstractMesh) -> Iterator[str]:
    """Yield the mesh, the tokens of a step and the parameters."""
    model = config.model
    A = config.gradient_accumulation_steps
    B = config.batch_size
    T = model.block_size
    parameters = f"{model.num_params() / 1e6:,.1f}M parameters, {model.dtype}"
    yield f"mesh         {describe(mesh)}"
    yield f"step         {A} x {B} x {T} = {A * B * T:,} tokens; {parameters}"


def _state_lines(
    config: TrainConfig, mesh: Mesh | AbstractMesh, state: TrainState
) -> Iterator[str]:
    """Yield what the state and the activations take on one device."""
    activations = activation_bytes(config, mesh)
    with_remat = f"{gb(activations.blocks_with_remat)} with remat"
    without = f"{gb(activations.blocks)} without"
    blocks = f"{with_remat} ({without})" if config.model.remat else f"{without} ({with_remat})"
    yield "Bytes on one device"
    yield f"parameters   {_share(state.params)}; their gradients as much again"
    yield f"optimizer    {_share(state.opt_state)}"
    rest = gb(activations.rest + activations.logits)
    yield f"activations  estimate: blocks {blocks}, the rest {rest}"


def _share(tree: Any) -> str:
    """Return one device's part of a tree of arrays in words."""
    whole = total_bytes(tree)
    shard = shard_bytes(tree)
    return f"{gb(shard)} of {gb(whole)}, 1 / {whole / shard:.2f}"


def _device_tokens(config: TrainConfig, mesh: Mesh | AbstractMesh) -> float:
    """Return the tokens of a step on one device."""
    rows = config.gradient_accumulation_steps * config.batch_size
    return rows * config.model.block_size / mesh.size


def _formula_flops(config: TrainConfig, mesh: Mesh | AbstractMesh) -> float:
    """Return the FLOPs of a step on one device by the formula 6 N + 12 L H D T for a token."""
    return _device_tokens(config, mesh) * config.model.flops_per_token


def _compile(
    config: TrainConfig, mesh: Mesh, state: TrainState, train_step: jax.stages.Wrapped
) -> _CompiledStep:
    """Return what XLA says of train_step, compiled for the mesh."""
    shape = config.gradient_accumulation_steps, config.batch_size, config.model.block_size + 1
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, len(shape)))
    compiled = train_step.lower(state, batch, config).compile()
    platform = mesh.devices.flat[0].platform
    hlo = compiled.as_text()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis()
    assert hlo and memory and cost, f"XLA for {platform} does not say what a program takes"
    return _CompiledStep(platform, hlo, memory, cost["flops"])


def _memory_line(compiled: _CompiledStep) -> str:
    """Return what the compiled step takes of one device's memory."""
    memory = compiled.memory
    arguments = memory.argument_size_in_bytes
    temporary = memory.temp_size_in_bytes
    return (
        f"compiled     {gb(arguments + temporary)} for {compiled.platform}: "
        f"arguments {gb(arguments)}, "
        f"of which {gb(memory.alias_size_in_bytes)} are updated in place, "
        f"outputs {gb(memory.output_size_in_bytes)}, temporary {gb(temporary)}"
    )


def _flops_lines(config: TrainConfig, mesh: Mesh, compiled: _CompiledStep) -> Iterator[str]:
    """Yield the FLOPs of a step by the formula, in the compiled matmuls and by XLA's own count."""
    tokens = _device_tokens(config, mesh)
    formula = _formula_flops(config, mesh)
    yield "FLOPs of a step on one device"
    yield f"formula      {formula:.3e}, 6 N + 12 L H D T for each of {tokens:,.0f} tokens"
    if compiled.platform == "cpu":  # elsewhere a matmul may be a call of a library
        matmuls = matmul_flops(compiled.hlo)
        yield f"compiled     {matmuls:.3e} in matmuls, {matmuls / formula:.2f} of the formula"
    by_xla = f"{compiled.flops:.3e} by cost_analysis"
    yield f"XLA          {by_xla}, which counts the body of a loop once"


def _collective_lines(compiled: _CompiledStep) -> Iterator[str]:
    """Yield what goes through the network, by kind, and the largest of each kind."""
    counts = collective_ops(compiled.hlo)
    kinds: collections.Counter[str] = collections.Counter()
    for collective, times in counts.items():
        kinds[collective.kind] += times * collective.size
    yield f"Collectives of a step, bytes of results on one device: {gb(kinds.total())}"
    for kind, size in kinds.most_common():
        yield f"{kind:19} {gb(size):>10}"
        yield from _largest_lines({c: times for c, times in counts.items() if c.kind == kind})


def _largest_lines(counts: dict[Collective, int]) -> Iterator[str]:
    """Yield those collectives that move the most bytes."""
    totals = [
        (times * collective.size, times, collective.types) for collective, times in counts.items()
    ]
    for size, times, types in sorted(totals, reverse=True)[:LARGEST_COLLECTIVES]:
        if len(types) >= LONGEST_TYPE:
            types = types[:LONGEST_TYPE] + "..."
        yield f"    {gb(size):>10} = {times:4} x {types}"


def gb(n: float) -> str:
    """Return n bytes in words."""
    return f"{n / 1e9:.3f} GB"
