"""Sharded equals unsharded, on 8 simulated CPU devices: tests/test_mesh.py runs this file in a process of its own.

What a layout computes is compared with one device over 5 updates in float32, parameters by 1e-5; tests/mesh_table.py has all layouts."""

import dataclasses
import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_table import (
    EVERYTHING,
    PLAIN,
    batches,
    compiled_step,
    configure,
    difference,
    mesh_of,
    on_one_device,
    train_on,
)

import utils
from checkpoints import Checkpoints
from dry_run import activation_bytes, collective_ops, matmul_flops, shard_bytes
from mesh import make_mesh, partition_spec, pipeline, put_batch, training_mesh
from model import GPT
from ops import dropout
from train import eval_step
from utils import TrainState

CASES = {
    "data:8": EVERYTHING,
    "fsdp:8": PLAIN,
    "tensor:4": PLAIN,
    "layers:4": EVERYTHING,
    "context:4": EVERYTHING,
    "data:2,fsdp:2,tensor:2": PLAIN,
    "fsdp:2,layers:2,context:2": EVERYTHING,
}


@lru_cache(maxsize=None)
def result(layout):
    return train_on(layout, configure(**CASES[layout]))


@pytest.mark.parametrize("layout", CASES)
def test_equals_one_device(layout):
    """Catches a sum that stays on its shard or is taken twice, a mean of means, rows or positions permuted, weights cut in one place
    and joined in another, micro-batches lost in the pipeline, dropout that depends on where a row is."""
    got, want = result(layout), on_one_device(configure(**CASES[layout]))
    assert got.losses[0] != got.losses[-1] and np.isfinite(got.losses).all()
    d = difference(got, want)
    assert d.loss < 1e-5 and d.grad_norm < 1e-5 and d.params < 1e-5, d


@pytest.mark.parametrize(
    "layout, n", [("fsdp:8", 8), ("tensor:4", 4), ("layers:4", 4), ("data:8", 1)]
)
def test_state_is_divided(layout, n):
    """Catches a weight or a moment that is whole on every device, after the updates too. LayerNorm and biases may be: 2 % of this
    tiny model, which leaves 1 / 6.7 of the state where there are 8 devices."""
    whole = on_one_device(configure(**CASES[layout])).state_bytes
    assert whole / result(layout).state_bytes > 0.8 * n
    for path, array in jax.tree_util.tree_flatten_with_path(result(layout).state)[0]:
        assert array.sharding.is_equivalent_to(
            NamedSharding(array.sharding.mesh, partition_spec(path)), array.ndim
        ), path


def test_state_is_born_divided():
    """Catches an initialisation that makes all of the parameters on each device and then throws most of them away."""
    config = dataclasses.replace(configure(n_embd=256), batch_size=8)
    shapes = TrainState.abstract(config, mesh_of("fsdp:8"))
    whole = sum(math.prod(s.shape) * 4 for s in jax.tree.leaves(shapes))
    memory = utils.initial_state.lower(config, mesh_of("fsdp:8"), None).compile().memory_analysis()
    assert memory.output_size_in_bytes < whole / 7
    assert memory.temp_size_in_bytes < whole / 3 / 2, (
        "not even the parameters (a third) are whole anywhere"
    )


# Bytes that may go through the network in an update, by kind. N: the parameters. X: activations (B, T, C) of a micro-batch.
N, X, L = 4 * configure().model.num_params(), 4 * 16 * 32 * 32, 4
BUDGETS = {
    "data:8": {
        "all-reduce": 2.4 * N
    },  # gradients of each of 2 micro-batches; N has no padding of the vocabulary
    "fsdp:8": {"all-gather": 2 * N, "all-reduce": 1.2 * N, "all-to-all": 0},
    "tensor:4": {
        "all-reduce": (4 * L + 2.2) * X,
        "all-gather": 0.01 * N,
        "all-to-all": 0.2 * N,
        "collective-permute": 0,
    },
    # Rows go into the pipeline and back, forward and backward, for 2 micro-batches; 16 pieces in 19 ticks through each stage.
    "layers:4": {
        "all-gather": 4 * X + 0.5 * N,
        "reduce-scatter": X,
        "collective-permute": 4 * 19 / 16 * X,
        "all-reduce": 0.7 * N,
    },
    "context:4": {
        "all-gather": 2 * L * 4 * X,
        "all-reduce": 2 * L * 2 * X + 2.4 * N,
        "all-to-all": 0,
    },  # k and v, also for remat
}


@pytest.mark.parametrize("layout", BUDGETS)
def test_what_goes_through_the_network(layout):
    """Catches a layout that computes everything everywhere; activations sent instead of weights, or weights instead of activations;
    a gather of the whole stack of layers; the gradient of the head sent once a chunk."""
    sent = dict.fromkeys(BUDGETS[layout], 0)
    for (kind, shapes, size), times in collective_ops(
        compiled_step(layout, configure(**CASES[layout])).as_text()
    ).items():
        sent[kind] = sent.get(kind, 0) + times * size
        assert not (kind == "all-gather" and f"[{L},32," in shapes), (
            f"the stack of a weight: {shapes}"
        )
    for kind, budget in BUDGETS[layout].items():
        assert budget / 3 < sent[kind] <= budget or budget == sent[kind] == 0, (
            kind,
            sent[kind] / N,
            sent[kind] / X,
        )
    assert sum(sent[kind] for kind in sent if kind not in BUDGETS[layout]) < 0.02 * N, sent


@pytest.mark.parametrize("layout", CASES)
def test_a_plan_has_the_bytes_of_the_state(layout):
    """Catches a plan that forgets the optimizer, divides what is replicated, or differs on devices that are not there."""
    there = mesh_of(layout)
    for mesh in (there, there.abstract_mesh):
        plan = TrainState.abstract(configure(**CASES[layout]), mesh)
        assert shard_bytes((plan.params, plan.opt_state)) == result(layout).state_bytes


def test_a_plan_counts_the_matmuls():
    """Catches loops counted once, a dot missed in a fusion, layouts that compute the same thing on every device. Of 6 N + 12 L C T
    3 % are no matmuls here, but biases and LayerNorm."""
    config = configure()
    flops = {
        layout: matmul_flops(compiled_step(layout, config).as_text())
        for layout in ("data:1", "fsdp:8", "tensor:4")
    }
    tokens = config.batch_size * config.model.block_size
    assert flops["data:1"] == pytest.approx(tokens * config.model.flops_per_token, rel=0.05)
    assert 8 * flops["fsdp:8"] == 4 * flops["tensor:4"] == flops["data:1"]


@pytest.mark.parametrize(
    "options",
    [dict(dropout=0.1), dict(dtype="bfloat16"), dict(activation="gelu"), dict(remat=True)],
)
def test_a_plan_has_the_activations(options):
    """Catches an activation that model.py keeps and the estimate does not know, or the other way round: for one device, against
    what jax.vjp keeps, without the parameters."""
    config = configure(n_embd=64, n_layer=16, **options)
    B, T = config.batch_size, config.model.block_size
    graphdef, params = nnx.split(nnx.eval_shape(lambda: GPT(config.model, rngs=nnx.Rngs(0))))
    tokens, key = jnp.zeros((B, T), int), jax.random.key(0)
    loss = lambda params: nnx.merge(graphdef, params).loss(tokens, tokens, dropout_key=key)
    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params))
    sizes = {a.size for a in jax.tree.leaves(params)}
    held = sum(a.size * a.dtype.itemsize for a in kept if a.size not in sizes)
    blocks, with_remat, rest = activation_bytes(config, mesh_of("data:1"))
    computed_again = blocks / config.model.n_layer  # with remat, one block at a time
    assert held == pytest.approx(
        (with_remat - computed_again if config.model.remat else blocks) + rest, rel=0.05
    )


@pytest.mark.parametrize("stages, micro_batches", [(2, 2), (4, 8)])
def test_pipeline_is_a_scan(stages, micro_batches):
    """Catches a micro-batch that is lost, repeated or out of order, a layer that is skipped, a gradient that misses a stage."""
    mesh = make_mesh(f"layers:{stages},data:{8 // stages}")
    x, keys = jnp.linspace(-1, 1, 64).reshape(16, 4), jnp.arange(16.0)
    layers = jnp.linspace(0.5, 1.5, 8)
    f = lambda x, key, w: jnp.sin(w * x) + key[:, None]
    plain = lambda x, layers: jax.lax.scan(lambda x, w: (f(x, keys, w), None), x, layers)[0]
    piped = lambda x, layers: pipeline(
        f, x, keys, layers, mesh=mesh, axis="layers", micro_batches=micro_batches
    )
    loss = lambda run: jax.jit(
        jax.value_and_grad(lambda x, layers: (run(x, layers) ** 2).sum(), (0, 1))
    )
    (a, da), (b, db) = loss(plain)(x, layers), loss(piped)(x, layers)
    np.testing.assert_allclose(b, a, rtol=1e-6)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5), db, da)


def test_loss_is_the_mean_over_all_targets():
    """Catches a mean of each shard's mean: here one shard has all of its targets, the others few."""
    config, mesh = configure(), mesh_of("data:8")
    (tokens,) = batches(config, 1)[0]
    tokens = np.where(np.arange(16)[:, None] * 3 < np.arange(33), -1, tokens)
    tokens[:, 0] = 1
    one, eight = (
        float(
            eval_step(
                TrainState.create(config, mesh=m),
                put_batch(m, tokens.shape, lambda rows: tokens[rows]),
                config,
            )
        )
        for m in (mesh_of("data:1"), mesh)
    )
    assert abs(one - eight) < 1e-6 * one


def test_shards_drop_differently():
    """Catches masks that are drawn per shard from one key."""
    mesh = mesh_of("data:8")
    keys = jax.device_put(jax.random.split(jax.random.key(0), 8), NamedSharding(mesh, P("data")))
    rows = np.asarray(jax.jit(lambda keys: dropout(jnp.ones((8, 64)), 0.5, keys))(keys))
    assert len({row.tobytes() for row in rows}) == 8


@pytest.mark.parametrize(
    "before, after",
    [
        ("fsdp:8", "data:2,fsdp:2,tensor:2"),
        ("fsdp:8", "data:1"),
        ("data:2,fsdp:2,tensor:2", "fsdp:8"),
    ],
)
def test_a_run_moves_to_another_mesh(before, after, tmp_path):
    """Catches a restore that needs the mesh that saved, or that cuts otherwise than the new mesh wants."""
    config = configure()
    checkpoints = Checkpoints(tmp_path)
    moved = train_on(before, config, steps=3)
    checkpoints.save(moved.state)
    checkpoints.close()
    again = Checkpoints(tmp_path)
    for layout, rtol in ((before, 0), (after, 1e-5)):
        restored = again.restore(TrainState.abstract(config, mesh_of(layout)))
        np.testing.assert_allclose(
            train_on(layout, config, state=restored).losses, result_of(before).losses[3:], rtol=rtol
        )
    again.close()


def result_of(layout):
    return result(layout) if layout in CASES else on_one_device(configure())


@pytest.mark.parametrize(
    "mesh, change, words",
    [
        ("data:3", {}, ["3 devices", "8"]),
        ("data:2,fsdp:-1,tensor:-1", {}, ["fsdp", "tensor"]),
        ("rows:8", {}, ["rows:8", "data"]),
        ("data:8", {"batch_size": 12}, ["batch_size=12", "8"]),
        ("data:2,tensor:4", {"n_head": 6, "n_embd": 48}, ["n_head=6", "4"]),
        ("data:2,layers:4", {"n_layer": 6}, ["n_layer=6", "4"]),
        ("context:8", {"block_size": 36}, ["block_size=36", "8"]),
        ("tensor:8", {"vocab_multiple": 1, "n_head": 8}, ["vocab_size=250", "8"]),
        ("fsdp:8", {"n_embd": 36}, ["n_embd=36", "8"]),
        ("data:4,context:2", {"loss_chunks": 32}, ["loss_chunks", "2"]),
    ],
)
def test_impossible_meshes_are_refused(mesh, change, words):
    """Catches a mesh that fails only when arrays are made, deep in XLA; both numbers are in the sentence."""
    with pytest.raises(ValueError) as error:
        training_mesh(configure(mesh=mesh, **change))
    assert all(word in str(error.value) for word in words), error.value


def test_the_rest_and_the_default():
    """Catches -1 that ignores the other axes, and a default that leaves devices idle or cannot divide the batch."""
    assert dict(make_mesh("tensor:2,fsdp:-1").shape) == {
        "data": 1,
        "layers": 1,
        "fsdp": 4,
        "context": 1,
        "tensor": 2,
    }
    assert training_mesh(configure()).shape["data"] == 8
    assert training_mesh(configure(batch_size=12)).shape["data"] == 6
