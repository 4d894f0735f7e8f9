"""An engine whose model is cut over 2 or 4 of 8 simulated CPU devices answers as on one.

tests/test_mesh.py runs this file in a process of its own. Logprobs are compared with one device's
by 1e-5 in float32, and by all bits between the ways of running the same requests on one mesh.
"""

import contextlib
import dataclasses
import os
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

import model_runner
import same_bits
from config import EngineConfig, GPTConfig
from engine import Engine
from errors import UserError
from mesh import engine_mesh, pool_sharding, replicated
from model import GPT
from paged_attention import PagedKVCache, pool_shape
from sequence import Output, SamplingParams
from tiny_engine import prompts_of
from training.dry_run import collective_ops

LAYERS, HEADS, WIDTH, VOCAB = 2, 4, 64, 128
GPT2 = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH}
MODERN = {
    **GPT2,
    "n_head": 8,
    "n_kv_head": 4,
    "head_size": 12,
    "norm": "rmsnorm",
    "positions": "rotary",
    "mlp": "gated",
    "mlp_width": 96,
    "activation": "silu",
    "bias": False,
    "qkv_bias": True,
    "qk_norm": True,
    "tied_head": False,
}
PROMPTS = int(os.environ.get("PROMPTS", "20"))

MODELS = {"gpt2": GPT2, "modern": MODERN}
MESHES = {"gpt2": "tensor:2", "modern": "tensor:4"}
"""The mesh that a model is tried on: each takes its time to compile for."""

LAYOUT = EngineConfig(
    page_size=4,
    kv_blocks=51,
    max_num_seqs=4,
    prefill_tokens=32,
    num_scheduler_steps=1,
    cpu_kernels="off",  # on one device too: its numbers are what the others' are compared with
)


@cache
def model_of(name: str) -> GPT:
    """Return a model of MODELS with random parameters, biases and scales among them."""
    model = GPT(GPTConfig(block_size=64, vocab_size=100, **MODELS[name]), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)

    def moved(w: jax.Array) -> jax.Array:
        return w + rng.normal(0, 0.05, w.shape).astype(np.float32)

    return GPT.from_params(model.config, jax.tree.map(moved, model.params()))


def engine_on(mesh: str | None, name: str, **changes) -> Engine:
    """Return an engine for a model of MODELS."""
    config = dataclasses.replace(LAYOUT, mesh=mesh, **changes)
    return Engine(model_of(name), None, config, progress=False)


@cache
def answers(mesh: str | None, name: str) -> list[Output]:
    """Return greedy answers to PROMPTS prompts of 1 to 39 tokens."""
    prompts = prompts_of(np.random.default_rng(0).integers(1, 40, size=PROMPTS))
    params = SamplingParams(max_tokens=16, temperature=0, logprobs=3, prompt_logprobs=1)
    engine = engine_on(mesh, name)
    outputs = engine.generate(prompts, params, progress=False)
    assert engine.programs() == engine.programs_at_start
    assert engine.stats().pages_held == 0
    return [output for [output] in outputs]


@pytest.mark.parametrize("name", MODELS)
def test_answers_as_one_device(name):
    """Catches parts of q, k and v that get other heads, a part of the MLP or of the vocabulary
    that is left out of a sum, a bias that each device adds, and tokens of one device's vocabulary
    only."""
    for output, expected in zip(answers(MESHES[name], name), answers(None, name), strict=True):
        assert output.token_ids == expected.token_ids
        for of_mesh, of_one in (
            (output.logprobs, expected.logprobs),
            (output.prompt_logprobs, expected.prompt_logprobs),
        ):
            np.testing.assert_allclose(
                [entry.logprob for entry in of_mesh if entry is not None],
                [entry.logprob for entry in of_one if entry is not None],
                rtol=0,
                atol=1e-5,
            )


@pytest.mark.parametrize("name", MODELS)
def test_each_device_has_its_part(name):
    """Catches a weight or a pool that is whole on every device, if only before the first step."""
    engine = engine_on(MESHES[name], name)
    devices = engine.runner.mesh.size
    heads = engine.model_config.kv_heads // devices
    empty = PagedKVCache.create(engine.model_config, 9, 4, attention="xla", mesh=engine.runner.mesh)
    for pages in (empty.k_pages, empty.v_pages, *engine.runner.pool):
        assert {shard.data.shape[2] for shard in pages.addressable_shards} == {heads}
    paths, _ = jax.tree_util.tree_flatten_with_path(engine.runner.params)
    whole = [
        jax.tree_util.keystr(path)
        for path, w in paths
        if w.addressable_shards[0].data.size == w.size
    ]
    matrices = [path for path in whole if "kernel" in path or "embedding" in path]
    assert matrices == (["['wpe']['embedding']"] if name == "gpt2" else [])
    parts = [w.addressable_shards[0].data.nbytes for _, w in paths]
    total = sum(w.nbytes for _, w in paths)
    assert sum(parts) < (1 / devices + 0.06) * total  # besides matrices there are norms


@pytest.mark.parametrize("name", MODELS)
def test_a_step_talks_no_more_than_it_must(name, monkeypatch):
    """Catches gathered weights, keys or values, and a sum that is made twice: two sums a layer of
    what the blocks add, one of the embeddings, and the logits once. What a step does only where
    the logprobs of a prompt were asked for is a branch, which is not counted."""
    programs = {}
    step = model_runner.model_step

    def compile_too(*args, **kwargs):
        shape = args[3].shape[0], kwargs["T"]
        if shape not in programs:
            programs[shape] = step.lower(*args, **kwargs).compile().as_text()
        return step(*args, **kwargs)

    compile_too._cache_size = step._cache_size
    monkeypatch.setattr(model_runner, "model_step", compile_too)
    engine_on(MESHES[name], name)
    assert len(programs) >= 4
    for (rows, tokens), hlo in programs.items():
        added = 4 * rows * tokens * WIDTH
        expected = {("all-reduce", added): 2 * LAYERS + 1, ("all-gather", 4 * rows * VOCAB): 1}
        found: dict = {}
        for collective, times in collective_ops(hlo).items():
            kind = collective.kind, collective.size
            found[kind] = found.get(kind, 0) + times
        assert found == expected, (rows, tokens)


def test_the_same_bits_on_a_mesh():
    """Catches sums whose order depends on which device is first, and pages of a preempted sequence
    that come back to the wrong heads. The long form: python tests/same_bits.py --mesh tensor:2"""
    ways = same_bits.compare(
        model_of("modern"),
        16,
        max_num_seqs=4,
        page_size=4,
        prefill_tokens=16,
        progress=False,
        mesh="tensor:2",
    )
    wrong = [way for way in ways if way.must_agree and way.different]
    assert wrong == []


@pytest.mark.parametrize(
    ("mesh", "both_numbers"),
    [
        ("tensor:3", "n_head=4 must be divisible by 3"),
        ("tensor:8", "n_head=4 must be divisible by 8"),
        ("tensor:16", "asks for 16 devices, but there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, both_numbers):
    """Catches an engine that is built, or a traceback of XLA's, where the mesh cannot be had."""
    with pytest.raises(UserError, match=both_numbers) as caught:
        engine_on(mesh, "gpt2")
    assert caught.value.param == "mesh"


def test_minus_one_takes_all_devices():
    """Catches -1 taken for one device."""
    config = dataclasses.replace(model_of("modern").config, n_kv_head=8)
    mesh = engine_mesh("tensor:-1", config)
    assert mesh is not None
    assert mesh.shape["tensor"] == mesh.size == 8


@pytest.mark.parametrize(
    ("attention", "platform", "call"),
    [("triton", "cuda", "triton"), ("mosaic_tpu", "tpu", "tpu_custom_call")],
)
def test_kernels_lower_for_each_device(attention, platform, call):
    """Catches a kernel that is given the whole pool, or that a compiler for such devices refuses
    inside of a mesh."""
    config = model_of("modern").config
    mesh = mesh_of(platform, config)
    pool = jax.ShapeDtypeStruct(
        pool_shape(config, 100, 16, attention, shards=4), "bfloat16", sharding=pool_sharding(mesh)
    )

    def attend(k_pages, v_pages, tables, lens, q, k, v):
        cache = PagedKVCache(k_pages, v_pages, tables, lens, lens, attention, mesh)
        return cache.attend(1, q, k, v)

    def array(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ints = [array(shape, "int32", replicated(mesh)) for shape in ((4, 64), (4,))]
    heads = [array((4, 1, n, 12), "float32", pool_sharding(mesh)) for n in (8, 4, 4)]
    with jax.sharding.use_abstract_mesh(mesh) if platform == "cuda" else contextlib.nullcontext():
        traced = jax.jit(attend).trace(pool, pool, *ints, *heads)
        assert call in traced.lower(lowering_platforms=(platform,)).as_text()


def mesh_of(platform: str, config: GPTConfig) -> Mesh | AbstractMesh:
    """Return a mesh of 4 devices; jax 0.11 lowers a Triton kernel only for devices it knows."""
    mesh = engine_mesh("tensor:4", config)
    assert mesh is not None
    if platform != "cuda" or not hasattr(jax.sharding, "AbstractDevice"):
        return mesh
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
    )
    return mesh.abstract_mesh.update(abstract_device=device)
