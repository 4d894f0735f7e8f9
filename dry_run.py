"""What a training step takes, without taking it: python train.py PRESET --mesh=... --dry_run

The step is compiled for the mesh, for as many simulated CPU devices as it asks for if there are no such devices, and the compiled
program is read. Nothing of the model's size is allocated.
"""

import collections
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import train
from config import TrainConfig
from mesh import describe, training_mesh
from utils import TrainState

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}


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
            elif called := re.search(r" (?:fusion|call|async-start)\(.* (?:calls|to_apply)=%?([\w.-]+)", line):
                yield from run(called[1], times)

    yield from run(entry, 1)


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """[("f32", (4, 64))] of "(f32[4,64]{1,0}, ...)" """
    return [(dtype, tuple(map(int, dims.split(","))) if dims else ()) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text)]


def collective_ops(hlo: str) -> collections.Counter:
    """{(kind, "f32[4,64] f32[64]", bytes of the result on one device): how often per execution}"""
    found = collections.Counter()
    for times, line in instructions(hlo):
        # Asynchronous ones are counted where they are done: the type of the start names operands too.
        if op := re.search(rf" = (.*?) ({COLLECTIVES})(?:-done)?\(", line):
            results = shapes(op[1])
            size = sum(ITEMSIZE[dtype] * math.prod(dims) for dtype, dims in results)
            found[op[2], " ".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in results), size] += times
    return found


def matmul_flops(hlo: str) -> int:
    """Of one device in one execution: 2 for each multiply-add of every dot."""
    dims = {m[1]: shapes(m[2])[0][1] for m in re.finditer(r"^\s+(?:ROOT )?%?([\w.-]+) = (\w+\[[\d,]*\])", hlo, re.MULTILINE)}
    total = 0
    for times, line in instructions(hlo):
        if dot := re.search(r" = (\S+) dot\(%?([\w.-]+),.* lhs_contracting_dims=\{([\d,]*)\}", line):
            contracted = math.prod(dims[dot[2]][int(i)] for i in dot[3].split(","))
            total += times * 2 * math.prod(shapes(dot[1])[0][1]) * contracted
    return total
