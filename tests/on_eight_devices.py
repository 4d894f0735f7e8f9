"""Sharded equals unsharded, on 8 simulated CPU devices.

tests/test_mesh.py runs this file in a process of its own. What a layout computes is compared with
one device over 5 updates in float32, parameters by 1e-5; tests/mesh_table.py has all layouts.

Shapes: A micro-batches, B rows, T tokens.
"""

import collections
import dataclasses
import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import utils
from mesh import make_mesh, partition_spec, put_batch, training_mesh
from mesh_table import (
    EVERYTHING,
    PLAIN,
    Result,
    batches,
    compiled_step,
    configure,
    difference,
    mesh_of,
    on_one_device,
    train_on,
)
from model import GPT
from ops import dropout
from train import eval_step, train_step
from training import dry_run
from training.checkpoints import Checkpoints
from training.dry_run import activation_bytes, collective_ops, matmul_flops, shard_bytes
from training.pipeline import pipeline
from training.skipped_updates import updates_made
from utils import TrainState

# What Llama and Qwen have and GPT-2 has not, with all that is cut over the mesh.
MODERN = {
    "norm": "rmsnorm",
    "positions": "rotary",
    "mlp": "gated",
    "mlp_width": 96,
    "activation": "silu",
    "n_kv_head": 2,
    "head_size": 12,
    "bias": False,
    "qkv_bias": True,
    "qk_norm": True,
    "tied_head": False,
}
CASES = {
    "data:8": EVERYTHING,
    "fsdp:8": PLAIN,
    "tensor:4": PLAIN,
    "layers:4": EVERYTHING,
    "context:4": EVERYTHING,
    "data:2,fsdp:2,tensor:2": PLAIN,
    "fsdp:2,layers:2,context:2": EVERYTHING,
}


@cache
def result(layout: str) -> Result:
    """Return what five updates leave on a layout of CASES."""
    return train_on(layout, configure(**CASES[layout]))


@pytest.mark.parametrize("layout", CASES)
def test_equals_one_device(layout):
    """Catches a sum that stays on its shard or is taken twice, a mean of means, rows or positions
    permuted, weights cut in one place and joined in another, micro-batches lost in the pipeline,
    dropout that depends on where a row is."""
    sharded = result(layout)
    assert sharded.losses[0] != sharded.losses[-1]
    assert np.isfinite(sharded.losses).all()
    apart = difference(sharded, on_one_device(configure(**CASES[layout])))
    assert apart.loss < 1e-5, apart
    assert apart.grad_norm < 1e-5, apart
    assert apart.params < 1e-5, apart


def test_other_choices_equal_one_device():
    """Catches heads of keys that meet other heads of queries, positions that count from each shard,
    a gate or a head of its own that is cut otherwise than what it meets."""
    config = configure(n_layer=2, loss_chunks=2, **MODERN)
    apart = difference(train_on("fsdp:2,context:2,tensor:2", config), on_one_device(config))
    assert apart.loss < 1e-5, apart
    assert apart.grad_norm < 1e-5, apart
    assert apart.params < 1e-5, apart


@pytest.mark.parametrize(
    "layout, n", [("fsdp:8", 8), ("tensor:4", 4), ("layers:4", 4), ("data:8", 1)]
)
def test_state_is_divided(layout, n):
    """Catches a weight or a moment that is whole on every device, after the updates too.

    LayerNorm and biases may be: 2 % of this tiny model, which leaves 1 / 6.7 of the state where
    there are 8 devices."""
    whole = on_one_device(configure(**CASES[layout])).state_bytes
    assert whole / result(layout).state_bytes > 0.8 * n
    for path, array in jax.tree_util.tree_flatten_with_path(result(layout).state)[0]:
        wanted = NamedSharding(array.sharding.mesh, partition_spec(path))
        assert array.sharding.is_equivalent_to(wanted, array.ndim), path


def test_state_is_born_divided():
    """Catches an initialisation that makes all of the parameters on each device and then throws
    most of them away."""
    config = configure(n_embd=256, batch_size=8)
    mesh = mesh_of("fsdp:8")
    shapes = TrainState.abstract(config, mesh)
    whole = sum(math.prod(s.shape) * 4 for s in jax.tree.leaves(shapes))
    memory = utils.initial_state.lower(config, mesh, None).compile().memory_analysis()
    assert memory.output_size_in_bytes < whole / 7
    # Not even the parameters, a third of the state, are whole anywhere.
    assert memory.temp_size_in_bytes < whole / 3 / 2


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}])
def test_gathered_weights_are_not_saved(options):
    """Catches weights that stay gathered, or stay cast, from the forward to the backward pass: then
    each device holds those of all blocks at once. Here temporaries take 0.95 of the weights of the
    blocks, and 2.2 where the gathered weights are saved."""
    C, L = 128, 8
    config = configure(n_embd=C, n_layer=L, batch_size=8, **options)
    blocks = 4 * 12 * L * C * C  # bytes of the kernels
    memory = compiled_step("fsdp:8", config).memory_analysis()
    assert memory.temp_size_in_bytes < 1.3 * blocks


# Bytes that may go through the network in an update, by kind.
N = 4 * configure().model.num_params()  # the parameters, without the padding of the vocabulary
X = 4 * 16 * 32 * 32  # activations (B, T, C) of a micro-batch
L = 4  # layers
BUDGETS = {
    # The gradients of each of 2 micro-batches.
    "data:8": {"all-reduce": 2.4 * N},
    "fsdp:8": {"all-gather": 2 * N, "all-reduce": 1.2 * N, "all-to-all": 0},
    "tensor:4": {
        "all-reduce": (4 * L + 2.2) * X,
        "all-gather": 0.01 * N,
        "all-to-all": 0.2 * N,
        "collective-permute": 0,
    },
    # Rows go into the pipeline and back, forward and backward, for 2 micro-batches; 16 pieces go
    # through each stage in 19 ticks.
    "layers:4": {
        "all-gather": 4 * X + 0.5 * N,
        "reduce-scatter": X,
        "collective-permute": 4 * 19 / 16 * X,
        "all-reduce": 0.7 * N,
    },
    # k and v, also for remat.
    "context:4": {
        "all-gather": 2 * L * 4 * X,
        "all-reduce": 2 * L * 2 * X + 2.4 * N,
        "all-to-all": 0,
    },
}


@pytest.mark.parametrize("layout", BUDGETS)
def test_what_goes_through_the_network(layout):
    """Catches a layout that computes everything everywhere; activations sent instead of weights, or
    weights instead of activations; a gather of the whole stack of layers; the gradient of the head
    sent once a chunk."""
    hlo = compiled_step(layout, configure(**CASES[layout])).as_text()
    sent: collections.Counter = collections.Counter()
    for (kind, types, size), times in collective_ops(hlo).items():
        sent[kind] += times * size
        is_stack = kind == "all-gather" and f"[{L},32," in types
        assert not is_stack, f"the stack of a weight: {types}"
    for kind, budget in BUDGETS[layout].items():
        if budget == 0:
            assert sent[kind] == 0, kind
        else:
            assert budget / 3 < sent[kind] <= budget, (kind, sent[kind] / N, sent[kind] / X)
    others = sum(size for kind, size in sent.items() if kind not in BUDGETS[layout])
    assert others < 0.02 * N, sent


@pytest.mark.parametrize("layout", CASES)
def test_a_plan_has_the_bytes_of_the_state(layout):
    """Catches a plan that forgets the optimizer, divides what is replicated, or differs on devices
    that are not there."""
    mesh_here = mesh_of(layout)
    for mesh in (mesh_here, mesh_here.abstract_mesh):
        plan = TrainState.abstract(configure(**CASES[layout]), mesh)
        assert shard_bytes((plan.params, plan.opt_state)) == result(layout).state_bytes


def test_a_plan_counts_the_matmuls():
    """Catches loops counted once, a dot missed in a fusion, layouts that compute the same thing on
    every device, an activation that fsdp computes again because it has no name (ops.saveable). Of
    6 N + 12 L H D T 3 % are no matmuls here, but biases and LayerNorm."""
    config = configure()
    flops = {
        layout: matmul_flops(compiled_step(layout, config).as_text())
        for layout in ("data:1", "fsdp:8", "tensor:4")
    }
    tokens = config.batch_size * config.model.block_size
    assert flops["data:1"] == pytest.approx(tokens * config.model.flops_per_token, rel=0.05)
    assert 8 * flops["fsdp:8"] == flops["data:1"]
    assert 4 * flops["tensor:4"] == flops["data:1"]


def test_muon_is_divided_among_devices():
    """Catches Muon's products of whole matrices made alike by every device, and updates that are
    another's layers'."""
    config = configure(n_layer=2, optimizer="muon")
    alone, divided = (
        matmul_flops(compiled_step(layout, config).as_text()) for layout in ("data:1", "data:2")
    )
    assert 2 * divided == alone
    apart = difference(train_on("data:2", config), on_one_device(config))
    assert apart.loss < 1e-5, apart
    assert apart.params < 1e-5, apart


def test_heads_that_share_keys_are_divided():
    """Catches a c_attn that every device along "tensor" computes whole, or a formula for the FLOPs
    that knows GPT-2's shape only."""
    config = configure(n_layer=2, **MODERN)
    alone, divided = (
        matmul_flops(compiled_step(layout, config).as_text()) for layout in ("data:1", "tensor:2")
    )
    tokens = config.batch_size * config.model.block_size
    assert alone == pytest.approx(tokens * config.model.flops_per_token, rel=0.05)
    assert 2 * divided == alone


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.1}, {"dtype": "bfloat16"}, {"activation": "gelu"}, {"remat": True}, MODERN],
)
def test_a_plan_has_the_activations(options):
    """Catches an activation that model.py keeps and the estimate does not know, or the other way
    round: for one device, against what jax.vjp keeps, without the parameters."""
    config = configure(n_embd=64, n_layer=16, **options)
    blocks, with_remat, rest, _ = activation_bytes(config, mesh_of("data:1"))
    if config.model.remat:
        computed_again = blocks / config.model.n_layer  # of one block at a time
        estimate = with_remat - computed_again + rest
    else:
        estimate = blocks + rest
    assert bytes_kept_by_vjp(config) == pytest.approx(estimate, rel=0.05)


def bytes_kept_by_vjp(config: Any) -> int:
    """Return the bytes of the activations that the forward pass leaves for the backward pass."""
    B, T = config.batch_size, config.model.block_size
    graphdef, params = nnx.split(nnx.eval_shape(lambda: GPT(config.model, rngs=nnx.Rngs(0))))
    tokens = jnp.zeros((B, T), int)

    def loss(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model.loss(tokens, tokens, dropout_key=jax.random.key(0))

    def backward(params: Any) -> Any:
        return jax.vjp(loss, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params))
    parameter_sizes = {a.size for a in jax.tree.leaves(params)}
    return sum(a.size * a.dtype.itemsize for a in kept if a.size not in parameter_sizes)


@pytest.mark.parametrize("stages, micro_batches", [(2, 2), (4, 8)])
def test_pipeline_is_a_scan(stages, micro_batches):
    """Catches a micro-batch that is lost, repeated or out of order, a layer that is skipped, a
    gradient that misses a stage."""
    mesh = make_mesh(f"layers:{stages},data:{8 // stages}")
    x = jnp.linspace(-1, 1, 64).reshape(16, 4)
    keys = jnp.arange(16.0)
    layers = jnp.linspace(0.5, 1.5, 8)

    def f(x, key, w):
        return jnp.sin(w * x) + key[:, None]

    def plain(x, layers):
        return jax.lax.scan(lambda x, w: (f(x, keys, w), None), x, layers)[0]

    def piped(x, layers):
        return pipeline(f, x, keys, layers, mesh=mesh, axis="layers", micro_batches=micro_batches)

    def loss_and_grads(run):
        def loss(x, layers):
            return (run(x, layers) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, layers)

    loss, grads = loss_and_grads(plain)
    piped_loss, piped_grads = loss_and_grads(piped)
    np.testing.assert_allclose(piped_loss, loss, rtol=1e-6)
    for a, b in zip(piped_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_over_all_targets():
    """Catches a mean of each shard's mean: here one shard has all of its targets, others few."""
    config = configure()
    (tokens,) = batches(config, 1)[0]
    tokens = np.where(np.arange(16)[:, None] * 3 < np.arange(33), -1, tokens)
    tokens[:, 0] = 1

    def loss_on(layout: str) -> float:
        mesh = mesh_of(layout)
        state = TrainState.create(config, mesh=mesh)
        batch = put_batch(mesh, tokens.shape, lambda rows: tokens[rows])
        return float(eval_step(state, batch, config))

    assert loss_on("data:8") == pytest.approx(loss_on("data:1"), rel=1e-6)


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
    """Catches a restore that needs the mesh that saved, or that cuts otherwise than the new mesh
    wants."""
    config = configure()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(train_on(before, config, steps=3).state)
    checkpoints.close()
    undisturbed = train_on(before, config).losses[3:]
    reopened = Checkpoints(tmp_path)
    for layout, rtol in ((before, 0), (after, 1e-5)):
        restored = reopened.restore(TrainState.abstract(config, mesh_of(layout)))
        went_on = train_on(layout, config, state=restored)
        np.testing.assert_allclose(went_on.losses, undisturbed, rtol=rtol)
    reopened.close()


@pytest.mark.parametrize(
    "mesh, change, words",
    [
        ("data:3", {}, ["3 devices", "8"]),
        ("data:2,fsdp:-1,tensor:-1", {}, ["fsdp", "tensor"]),
        ("rows:8", {}, ["rows:8", "data"]),
        ("data:8", {"batch_size": 12}, ["batch_size=12", "8"]),
        ("data:2,tensor:4", {"n_head": 6, "n_embd": 48}, ["n_head=6", "4"]),
        ("data:2,tensor:4", {"n_kv_head": 2}, ["n_kv_head=2", "4"]),
        ("data:2,tensor:4", {"mlp_width": 90}, ["mlp_width=90", "4"]),
        ("data:2,layers:4", {"n_layer": 6}, ["n_layer=6", "4"]),
        ("context:8", {"block_size": 36}, ["block_size=36", "8"]),
        ("tensor:8", {"vocab_multiple": 1, "n_head": 8}, ["vocab_size=250", "8"]),
        ("fsdp:8", {"n_embd": 36}, ["n_embd=36", "8"]),
        ("data:4,context:2", {"loss_chunks": 32}, ["loss_chunks", "2"]),
    ],
)
def test_impossible_meshes_are_refused(mesh, change, words):
    """Catches a mesh that fails only when arrays are made, deep in XLA; both numbers are in the
    sentence."""
    with pytest.raises(ValueError) as error:
        training_mesh(configure(mesh=mesh, **change))
    for word in words:
        assert word in str(error.value), error.value


def test_the_rest_and_the_default():
    """Catches -1 that ignores the other axes, and a default that leaves devices idle or cannot
    divide the batch."""
    shape = make_mesh("tensor:2,fsdp:-1").shape
    assert dict(shape) == {"data": 1, "layers": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert training_mesh(configure()).shape["data"] == 8
    assert training_mesh(configure(batch_size=12)).shape["data"] == 6


def test_all_devices_skip_an_update():
    """Catches a skip that each device decides for itself, of its own gradients alone: here the
    parameters that are not finite lie on one device."""
    config = configure(**CASES["fsdp:8"])
    state = TrainState.create(config, mesh=mesh_of("fsdp:8"))
    embedding = state.params["wpe"]["embedding"].at[0, 0].set(jnp.inf)
    poisoned = dataclasses.replace(state, params={**state.params, "wpe": {"embedding": embedding}})
    before = jax.device_get(poisoned.params)
    after = train_on("fsdp:8", config, steps=1, state=poisoned.lay_out(poisoned)).state
    assert int(after.step) == 1
    assert updates_made(after) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.params), before)


@pytest.mark.parametrize("spare, axis", [(1.01, "data"), (0.99, "fsdp")])
def test_the_default_divides_a_large_state(monkeypatch, spare, axis):
    """Catches a default that replicates a state for which there is no memory, or divides a small
    one: at 16 bytes a parameter it may take a quarter of a device."""
    config = configure()
    memory = spare * 4 * 16 * config.model.num_params()
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": memory})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    shape = training_mesh(config).shape
    assert shape[axis] == math.prod(shape.values()) == 8


def test_a_dry_run_counts_micro_batches_and_tensor_shards(monkeypatch):
    """Catches a plan of one micro-batch for many, and of a device that computes what its neighbours
    along "tensor" do."""
    monkeypatch.setattr(dry_run, "use_cpu_cores", lambda config: None)  # there are 8 already
    config = configure(mesh="data:2,tensor:4", gradient_accumulation_steps=3)
    report = list(dry_run.report(config, train_step))
    (step,) = [line for line in report if line.startswith("step ")]
    assert "3 x 16 x 32 = 1,536 tokens" in step
    vocab_size = dry_run.with_data(config).model.vocab_size
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    of_a_device = 3 * 16 * 32 * model.flops_per_token / 8
    (formula,) = [line for line in report if line.startswith("formula")]
    assert f"{of_a_device:.3e}" in formula
    (matmuls,) = [line for line in report if "in matmuls" in line]
    share = float(matmuls.split(", ")[1].split()[0])
    assert 0.85 < share < 1.05, matmuls
