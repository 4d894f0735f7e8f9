"""Native code for a CPU: products of rows with packed weights, and attention over pages.

XLA's products on a CPU are far from the speed of memory where there are few rows, and the order of
their sums changes with the number of rows. cpu_kernels.cc has neither fault. Start reading at
`available`, which builds it when first asked, then at `product` and `paged_attention`.

The same bits: a row of `product` and a token of `paged_attention` have the same bits at any number
of rows, among any neighbours, and in whatever chunks a prompt comes.

Shapes: `M` rows, `K` inputs and `N` outputs of a product; those of paged_attention.py, and `KV`
heads of keys and values, each read by H / KV heads of queries.
"""

import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from errors import require

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cc")
HEADERS = ("cpu_attention.h", "cpu_products.h", "cpu_rows.h", "cpu_threads.h", "cpu_vectors.h")
HANDLERS = ("product", "paged_attention", "first_largest", "log_sum_exp")  # of the source
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread")
COMPILERS = ("c++", "g++", "clang++")  # tried in this order, after $CXX
CACHE_FOLDER = "jax-nanogpt-vllm"
LONGEST_BUILD = 300  # seconds; it takes about 5
COST = "XLA computes in its place, with about half the tokens/s where there are few rows"

SWITCH = "NANOGPT_CPU_KERNELS"
"""Environment variable: off leaves everything to XLA, as the flag cpu_kernels=off does."""
EXTRA_FLAGS = "NANOGPT_CPU_KERNELS_FLAGS"
"""Environment variable: more flags for the compiler, to test other CPUs' code and with sanitizers.
"""

SLAB = 32
"""Words along K that weights are padded to a multiple of. cpu_kernels.cc has the same."""
GROUP = 2 * SLAB
"""Inputs along K that share a scale of int8 weights."""
ACTIVATIONS = ("none", "gelu_new")


class Unavailable(Exception):
    """Says in a few words why there is no native code here."""


# --- Building ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Library:
    """What a build of cpu_kernels.cc offers, after it is loaded and registered with XLA."""

    product: str
    """name of the XLA target"""
    paged_attention: str
    """name of the XLA target"""
    first_largest: str
    """name of the XLA target"""
    log_sum_exp: str
    """name of the XLA target"""
    panel: int
    """columns of weights that lie together"""


@functools.cache
def available() -> str | None:
    """Return None if the native code can be used, otherwise why not.

    The first call builds it, in some 5 s, unless the user's cache has it. Where it cannot be had,
    one line of the log says why and what that costs."""
    if os.environ.get(SWITCH, "auto") == "off":
        return f"{SWITCH}=off"
    try:
        library()
    except Unavailable as reason:
        log.warning("cpu_kernels: %s. %s.", reason, COST)
        return str(reason)
    return None


def unavailable_because(switch: Literal["auto", "off"] = "auto") -> str | None:
    """Return why the native code cannot compute for this process's devices, None if it can.

    switch: off for a user who does not want it."""
    if jax.default_backend() != "cpu":
        return f"it is for a CPU, and the device is a {jax.default_backend()}"
    if switch == "off":
        return "cpu_kernels=off"
    return available()


@functools.cache
def library() -> Library:
    """Return the native code of this process. Raises Unavailable."""
    extra_flags = shlex.split(os.environ.get(EXTRA_FLAGS, ""))
    return build_and_load(SOURCE, *extra_flags)


def build_and_load(source: Path, *extra_flags: str) -> Library:
    """Return the native code from a source file, compiled with more flags. Raises Unavailable.

    It comes from the user's cache, or goes there. If the cache cannot be written, it is built into
    a temporary directory, which is gone once it is loaded; the log says so."""
    command = compile_command(*extra_flags)
    digest = digest_of(source, command)
    cache = cache_directory()
    try:
        return load(build_in(cache, source, command, digest), digest)
    except OSError as error:
        log.warning("cpu_kernels: %s: the build is not kept, each start takes 5 s more", error)
    with tempfile.TemporaryDirectory() as directory:
        return load(build_in(Path(directory), source, command, digest), digest)


def cache_directory() -> Path:
    """Return where builds are kept, in the user's cache directory. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / CACHE_FOLDER


def compile_command(*extra_flags: str) -> list[str]:
    """Return the compiler and its flags, all but the names of files. Raises Unavailable."""
    candidates = [shlex.split(os.environ.get("CXX", "")), *([name] for name in COMPILERS)]
    for compiler in candidates:
        if compiler and shutil.which(compiler[0]):
            return [*compiler, *FLAGS, *extra_flags, "-isystem", jax.ffi.include_dir()]
    raise Unavailable(f"there is no C++ compiler on PATH: no $CXX, {', no '.join(COMPILERS)}")


def digest_of(source: Path, command: list[str]) -> str:
    """Return a name for what a build depends on: the same name, the same machine code."""
    compiler = command[: command.index(FLAGS[0])]
    version = run([*compiler, "--version"])
    jaxlib = importlib.metadata.version("jaxlib")
    headers = [source.with_name(name).read_text() for name in HEADERS]
    parts = [source.read_text(), *headers, *command, version, jaxlib, cpu_model()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def cpu_model() -> str:
    """Return what tells this CPU from others: its name, and the instructions it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    # x86 says "model name" and "flags", ARM "CPU part" and "Features".
    named = [line for line in lines if line.startswith(("model name", "flags", "CPU", "Features"))]
    return "\n".join([platform.machine(), *sorted(set(named))])


def number_of_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_in(directory: Path, source: Path, command: list[str], digest: str) -> Path:
    """Return the shared object in a directory; build it if there is none.

    Processes that build at once wait for the first of them. A file is renamed into its place, so
    that one which is there is complete. Raises Unavailable if the compiler fails, OSError if the
    directory cannot be written."""
    built = directory / f"cpu_kernels-{digest}.so"
    if built.exists():
        return built
    directory.mkdir(parents=True, exist_ok=True)
    with open(built.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not built.exists():
            unfinished = built.with_suffix(f".{os.getpid()}")
            run([*command, str(source), "-o", str(unfinished)])
            unfinished.rename(built)
    return built


def run(command: list[str]) -> str:
    """Return what a command prints. Raises Unavailable if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_BUILD)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        first = (errors or done.stderr.splitlines() or [f"exit status {done.returncode}"])[0]
        raise Unavailable(f"{command[0]} fails: {first}")
    return done.stdout


def load(path: Path, digest: str) -> Library:
    """Load a build and register its handlers, whose names hold the digest. Raises Unavailable."""
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the build cannot be loaded: {error}") from error
    functions.start(number_of_cores() - 1)
    targets = {name: f"nanogpt_{name}_{digest}" for name in HANDLERS}
    for name, target in targets.items():
        handler = jax.ffi.pycapsule(getattr(functions, f"{name}_handler"))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return Library(**targets, panel=functions.panel_columns())


# --- Products ------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "scales"],
    meta_fields=["K", "N"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix (K, N) of weights, laid out for `product`.

    It is read in order, panel by panel: a panel is `Library.panel` columns, as many rows as K
    padded to whole slabs, in words of one number or of two neighbours along K."""

    weights: jax.Array
    """(panels, slabs, SLAB, panel, numbers a word) float32, bfloat16's bits as uint16, or int8"""
    scales: jax.Array
    """(panels, slabs, panel) float32, what a slab's int8 weights are multiplied by; else (0,)"""
    K: int
    """inputs"""
    N: int
    """outputs"""


def pack_float32(weights: ArrayLike) -> Packed:
    """Return weights (K, N) packed as float32."""
    return _pack(jnp.asarray(weights, jnp.float32), numbers_a_word=1)


def pack_bfloat16(weights: ArrayLike) -> Packed:
    """Return weights (K, N) rounded to bfloat16 and packed; `product` rounds its inputs too."""
    rounded = jnp.asarray(weights).astype(jnp.bfloat16)
    return _pack(jax.lax.bitcast_convert_type(rounded, jnp.uint16), numbers_a_word=2)


def pack_int8(weights: ArrayLike) -> Packed:
    """Return weights (K, N) packed as int8 in [-127, 127], with a scale per column and GROUP of K.

    `product` makes its inputs int16, with a scale per row and GROUP: that error is smaller than
    bfloat16's."""
    weights = jnp.asarray(weights, jnp.float32)
    K, N = weights.shape
    groups = -(-K // GROUP)
    grouped = jnp.pad(weights, ((0, groups * GROUP - K), (0, 0))).reshape(groups, GROUP, N)
    scales = jnp.abs(grouped).max(axis=1) / 127  # (groups, N)
    divisors = jnp.where(scales == 0, 1, scales)
    integers = jnp.rint(grouped / divisors[:, None]).astype(jnp.int8).reshape(-1, N)[:K]
    panel = library().panel
    panels = -(-N // panel)
    scales = jnp.pad(scales, ((0, 0), (0, panels * panel - N)))
    scales = scales.reshape(groups, panels, panel).swapaxes(0, 1)
    return dataclasses.replace(_pack(integers, numbers_a_word=2), scales=scales)


def _pack(numbers: jax.Array, numbers_a_word: int) -> Packed:
    """Return numbers (K, N), of the dtype to be stored, in panels."""
    K, N = numbers.shape
    panel = library().panel
    panels = -(-N // panel)
    depth = SLAB * numbers_a_word
    slabs = -(-K // depth)
    padded = jnp.pad(numbers, ((0, slabs * depth - K), (0, panels * panel - N)))
    cut = padded.reshape(slabs, SLAB, numbers_a_word, panels, panel)
    weights = cut.transpose(3, 0, 1, 4, 2)  # (panels, slabs, SLAB, panel, numbers a word)
    return Packed(weights, jnp.zeros(0), K, N)


PACK: dict[str, Callable[[ArrayLike], Packed]] = {
    "float32": pack_float32,
    "bfloat16": pack_bfloat16,
    "int8": pack_int8,
}
"""How weights can be stored, by name."""


def choose_packing(
    dtype: str, weights: Literal["int8"] | None = None, switch: Literal["auto", "off"] = "auto"
) -> str | None:
    """Return how a model that computes in dtype is to be packed, a key of PACK; None for XLA.

    weights: what the user wants them stored in, by default dtype. switch: off for XLA. Raises
    UserError if the user wants what only the native code has, and it cannot be had."""
    reason = unavailable_because(switch)
    require(
        weights is None or reason is None,
        f"weights={weights} needs the native CPU code: {reason}",
        param="weights",
    )
    return None if reason else weights or dtype


def product(
    x: jax.Array, packed: Packed, bias: jax.Array | None = None, activation: str = "none"
) -> jax.Array:
    """Return activation(x @ weights + bias), float32 (..., N). It has no gradient.

    x (..., K) float32 or bfloat16 is rounded as the packed weights ask; sums are float32. bias (N,)
    float32; activation is one of ACTIVATIONS. A row's bits depend on nothing but the row. Raises
    UserError for an unknown activation or shapes that do not fit."""
    *lead, K = x.shape
    require(
        activation in ACTIVATIONS,
        f"activation={activation}: there are {', '.join(ACTIVATIONS)}",
    )
    require(K == packed.K, f"x has {K} columns, and the packed weights {packed.K} rows")
    require(
        bias is None or bias.shape == (packed.N,),
        f"bias {None if bias is None else bias.shape} must be ({packed.N},)",
    )
    if x.dtype != jnp.bfloat16:
        x = x.astype(jnp.float32)
    bias = jnp.zeros(0) if bias is None else bias.astype(jnp.float32)
    rows = x.reshape(math.prod(lead), K)
    result = jax.ShapeDtypeStruct((len(rows), packed.N), jnp.float32)
    multiply = jax.ffi.ffi_call(library().product, result)
    gelu_new = activation == "gelu_new"
    y = multiply(rows, packed.weights, packed.scales, bias, gelu_new=gelu_new)
    return y.reshape(*lead, packed.N)


# --- Attention over pages ------------------------------------------------------------------------


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    new_lens: jax.Array,
    *,
    layer: int | jax.Array,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write k, v of each row's new tokens into `layer` of the pool, then attend causally.

    q (B, T, H, D), k and v (B, T, KV, D), any T; k_pages and v_pages (L, N, KV, P, D) float32,
    bfloat16, or bfloat16's bits as uint16; block_tables (B, M), context_lens and new_lens (B,)
    int32; layer an int or an int32 scalar; scale is D ** -0.5 by default. Query head h reads key
    head h // (H / KV). Token t < new_lens[b] sits at position context_lens[b] + t and sees every
    position up to its own. Padding tokens are written nowhere.

    Returns y (B, T, H, D) float32, zero where t >= new_lens[b], and the pool's two arrays, which
    are updated in place if they are donated, and otherwise copied. A token's bits depend on
    nothing but its query and the keys and values up to its position. Raises UserError for shapes
    that do not fit; a table or length outside of the pool fails at run time."""
    B, T, H, D = q.shape
    _, _, KV, _, pool_D = k_pages.shape
    require(H % KV == 0, f"{H} heads of queries cannot share {KV} heads of keys evenly")
    require(
        k.shape == v.shape == (B, T, KV, D) and pool_D == D and v_pages.shape == k_pages.shape,
        f"q {q.shape}, k {k.shape}, v {v.shape} do not fit a pool of {k_pages.shape}",
    )
    pool = jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype)
    result = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    attend = jax.ffi.ffi_call(
        library().paged_attention, (result, pool, pool), input_output_aliases={3: 1, 4: 2}
    )
    new_tokens = [x.astype(jnp.float32) for x in (q, k, v)]
    integers = [jnp.asarray(x, jnp.int32) for x in (block_tables, context_lens, new_lens, layer)]
    scale = D**-0.5 if scale is None else scale
    y, k_pages, v_pages = attend(*new_tokens, k_pages, v_pages, *integers, scale=np.float32(scale))
    return y, k_pages, v_pages


# --- Rows of logits ------------------------------------------------------------------------------


def first_largest(x: jax.Array) -> jax.Array:
    """Return where the first of the largest numbers of each row of x (M, n) float32 is: (M,) int32.

    A row of nothing but NaN has its last place."""
    return jax.ffi.ffi_call(library().first_largest, jax.ShapeDtypeStruct(x.shape[:1], jnp.int32))(
        x
    )


def log_sum_exp(x: jax.Array) -> jax.Array:
    """Return log(sum(exp(x))) of each row of x (M, n) float32: (M,) float32.

    A row's bits depend on nothing but the row."""
    return jax.ffi.ffi_call(library().log_sum_exp, jax.ShapeDtypeStruct(x.shape[:1], jnp.float32))(
        x
    )
