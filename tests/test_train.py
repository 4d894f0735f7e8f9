"""Training on tiny models: the order of the data, the update, the optimizer, the losses.

test_train_runs.py has whole runs of train.py.
"""

import dataclasses
import importlib.util
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from errors import UserError
from mesh import path_name
from tiny_training import META, TINY, VOCAB_SIZE, assert_trees_close
from train import EVAL_SEED, TokenFile, estimate_loss, full_loss, get_batch, train_step
from training.checkpoints import Checkpoints
from training.presets import TRAIN_PRESETS
from training.run_start import write_description
from utils import TrainState, create_optimizer, learning_rate_schedule, load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(data_dir) -> TokenFile:
    """The training split."""
    return TokenFile(data_dir / "train.bin", "uint16")


def batch(shape: tuple[int, ...] = (1, 4, 17), seed: int = 0) -> np.ndarray:
    """Return random tokens, by default a batch (A, B, T+1) of TINY."""
    return np.random.default_rng(seed).integers(VOCAB_SIZE, size=shape, dtype=np.int32)


def test_what_is_only_read_is_read_and_not_learned():
    """Catches marks that hide a token from the model, and a question that counts in the loss."""
    state = TrainState.create(TINY)
    tokens = batch()[0]
    is_learned = np.random.default_rng(1).random(tokens.shape) < 0.4
    marked = np.where(is_learned, tokens, ~tokens)
    logits = state.model(tokens[:, :-1])[0]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    expected = float(losses[is_learned[:, 1:]].mean())
    assert abs(float(losses.mean()) - expected) > 1e-3
    assert abs(float(train.eval_step(state, marked, TINY)) - expected) < 1e-5
    trained = train.loss_and_grads(state, marked, jax.random.key(0), 0, TINY)[0]
    assert abs(float(trained) - expected) < 1e-5


def test_a_split_without_anything_to_learn_is_refused(tmp_path):
    """Catches a validation loss of 0, the best there is, where no token counts."""
    np.zeros(40, np.uint16).tofile(tmp_path / "val.bin")
    np.zeros(40, np.uint8).tofile(tmp_path / "val_marks.bin")
    file = TokenFile(tmp_path / "val.bin", "uint16", marks_path=tmp_path / "val_marks.bin")
    with pytest.raises(UserError, match=r"val\.bin has no token that is learned"):
        full_loss(TrainState.create(TINY), TINY, file)


def test_every_window_is_seen_once_per_epoch(tmp_path):
    """Catches sampling with replacement, an epoch that repeats its order or its cuts, targets that
    are not the next tokens."""
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "x.bin")  # a token is its position
    file = TokenFile(tmp_path / "x.bin", "uint16")
    T = 10
    windows = (1000 - T) // T
    rows = np.concatenate([get_batch(file, t, (3, T), seed=1) for t in range(2 * windows // 3)])
    assert rows.shape == (2 * windows, T + 1)
    assert rows.dtype == np.int32
    assert (np.diff(rows, axis=1) == 1).all()
    first = rows[:windows, 0]
    second = rows[windows:, 0]
    for epoch in (first, second):
        assert len(set(epoch)) == windows
        assert len(set(epoch % T)) == 1
    assert first[0] % T != second[0] % T
    assert (first // T != second // T).any()
    assert (np.sort(first) != first).any()


def test_batch_t_is_a_pure_function(file):
    """Catches hidden state in the loader: any batch, at any time, in any order, however it is
    divided."""
    a = get_batch(file, 5, (2, 4, 16), seed=3)
    get_batch(file, 99, (2, 4, 16), seed=4)
    assert (get_batch(file, 5, (2, 4, 16), seed=3) == a).all()
    assert (get_batch(file, 5, (8, 16), seed=3).reshape(a.shape) == a).all()
    assert (get_batch(file, 5, (2, 4, 16), seed=4) != a).any()
    assert (get_batch(file, 6, (2, 4, 16), seed=3) != a).any()


def test_a_file_too_short_is_refused(file):
    """Catches a traceback out of numpy, or a sentence without its numbers."""
    with pytest.raises(ValueError, match="3000 tokens.*block_size=2000.*4000"):
        get_batch(file, 0, (1, 2000), 0)


def test_memory_stays_flat_over_many_batches(tmp_path):
    """Catches a mapping that is kept, whose touched pages all count as this process's memory (here
    up to 64 MiB)."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to measure resident memory")

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    np.zeros(2**25, np.uint16).tofile(tmp_path / "x.bin")
    file = TokenFile(tmp_path / "x.bin", "uint16")
    get_batch(file, 0, (12, 64), 0)
    before = resident()
    for t in range(10_000):
        get_batch(file, t, (12, 64), 0)
    assert resident() - before < 16 * 2**20


def test_one_step_changes_every_parameter_and_counts():
    """Catches a parameter that the optimizer misses (a path rule that matches nothing) and a step
    that is not counted."""
    state = TrainState.create(TINY)
    before = jax.device_get(state.params)
    state, metrics = train_step(state, batch(), TINY)
    assert int(state.step) == 1
    assert abs(float(metrics["loss"]) - np.log(23)) < 0.05
    assert metrics["grad_norm"] > 0
    with_paths = jax.tree_util.tree_flatten_with_path(before)[0]
    for (path, a), b in zip(with_paths, jax.tree.leaves(state.params), strict=True):
        assert (np.asarray(b) != a).any(), path


def test_micro_batches_equal_one_batch():
    """Catches gradients summed instead of averaged, or a micro-batch used twice."""
    big = batch((1, 8, 17))
    one, metrics = train_step(TrainState.create(TINY), big, TINY)
    four, metrics4 = train_step(TrainState.create(TINY), big.reshape(4, 2, 17), TINY)
    assert_trees_close(metrics, metrics4, rtol=1e-5)
    assert_trees_close(one.params, four.params, atol=1e-5, rtol=0)


def test_micro_batches_have_dropout_of_their_own():
    """Catches one dropout key for all micro-batches: the same tokens twice would then give one
    micro-batch's gradient."""
    config = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, dropout=0.5))
    tokens = batch((1, 4, 17))

    def grad_norm(tokens: np.ndarray) -> float:
        _, metrics = train_step(TrainState.create(config), tokens, config)
        return float(metrics["grad_norm"])

    twice = np.concatenate([tokens, tokens])
    assert abs(grad_norm(twice) / grad_norm(tokens) - 1) > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_is_learned_by_heart(optimizer):
    """Catches anything that keeps the model from learning at all."""
    config = dataclasses.replace(TINY, optimizer=optimizer)
    state = TrainState.create(config)
    tokens = batch()
    for _ in range(150):
        state, metrics = train_step(state, tokens, config)
    assert metrics["loss"] < 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_and_muon_go_by_path(optimizer):
    """Catches the rank rule (a stacked bias is 2-D): with zero gradients only kernels and
    embeddings shrink."""
    config = dataclasses.replace(TINY, optimizer=optimizer, warmup_iters=0, weight_decay=0.5)
    params = jax.tree.map(jnp.ones_like, TrainState.create(config).params)
    tx = create_optimizer(config)

    @jax.jit
    def updates_without_gradients(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        return tx.update(zero, tx.init(params), params)[0]

    updates = updates_without_gradients(params)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        name = path_name(path)
        expected = -0.5 * 1e-2 if name.endswith(("kernel", "embedding")) else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=f"{optimizer} {name}")


def test_muon_orthogonalises_each_layer_by_itself():
    """Catches Muon that takes the stack (L, in, out) for one matrix: a layer's update must not feel
    another's gradient."""
    config = dataclasses.replace(
        TINY, optimizer="muon", warmup_iters=0, weight_decay=0.0, grad_clip=0.0
    )
    params = TrainState.create(config).params
    tx = create_optimizer(config)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), params)

    @jax.jit
    def update_of_c_fc(grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return updates["h"]["mlp"]["c_fc"]["kernel"]

    other = jax.tree.map(lambda a: a, grads)
    other["h"]["mlp"]["c_fc"]["kernel"] = grads["h"]["mlp"]["c_fc"]["kernel"].at[1].multiply(-3.0)
    a = update_of_c_fc(grads)
    b = update_of_c_fc(other)
    np.testing.assert_array_equal(a[0], b[0])
    assert (a[1] != b[1]).any()
    singular = np.linalg.svd(np.asarray(a[0]), compute_uv=False)
    # Newton-Schulz brings all singular values near one another.
    assert singular.max() / singular.min() < 2.5


def test_gradients_are_clipped_to_their_global_norm():
    """Catches clipping by leaf, or after the optimizer."""
    config = dataclasses.replace(TINY, grad_clip=1e-3)
    grads = jax.tree.map(jnp.ones_like, TrainState.create(config).params)
    clipped, _ = optax.clip_by_global_norm(config.grad_clip).update(grads, optax.EmptyState())
    assert abs(float(optax.tree.norm(clipped)) - 1e-3) < 1e-8
    tx = create_optimizer(config)
    _, opt_state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    moments = [
        x
        for path, x in jax.tree_util.tree_flatten_with_path(opt_state)[0]
        if ".mu" in jax.tree_util.keystr(path)
    ]
    # The moments see clipped gradients.
    norm = float(optax.tree.norm(moments)) / (1 - config.beta1)
    assert abs(norm - 1e-3) < 1e-6


SCHEDULED = dataclasses.replace(
    TINY, max_iters=1000, warmup_iters=100, learning_rate=1.0, min_lr=0.1
)


@pytest.mark.parametrize(
    "change, steps, rates",
    [
        ({}, [0, 100, 550, 1000, 2000], [1 / 101, 1, 0.55, 0.1, 0.1]),
        ({"lr_schedule": "wsd"}, [100, 500, 820, 910, 1000], [1, 1, 1, 0.55, 0.1]),
        ({"decay_lr": False}, [50, 100, 999], [51 / 101, 1, 1]),
    ],
)
def test_schedules(change, steps, rates):
    """Catches a warmup that starts at 0 or ends late, a decay that ends early, decay_lr=False that
    decays."""
    schedule = learning_rate_schedule(dataclasses.replace(SCHEDULED, **change))
    np.testing.assert_allclose([schedule(step) for step in steps], rates, rtol=1e-2)


@pytest.mark.parametrize(
    "change, warmup_steps",
    [
        ({}, 100),
        ({"max_iters": 999}, 99),
        ({"max_iters": 50}, 5),
        ({"max_iters": 5}, 0),
        ({"max_iters": 50, "lr_decay_iters": 1000}, 5),
        ({"max_iters": 1000, "lr_decay_iters": 100}, 10),
        ({"max_iters": 1000, "lr_decay_iters": 100, "decay_lr": False}, 100),
        ({"max_iters": 50, "lr_schedule": "wsd"}, 5),
    ],
)
def test_a_short_run_warms_up_for_a_tenth_of_itself(change, warmup_steps):
    """Catches a preset's warmup that is longer than the run, which was refused or would never end;
    and a rule that shortens the warmup of a run that is long enough."""
    config = dataclasses.replace(SCHEDULED, **change)
    schedule = learning_rate_schedule(config)
    assert config.warmup_steps == warmup_steps
    assert schedule(0) == pytest.approx(1 / (warmup_steps + 1))
    assert schedule(warmup_steps) == pytest.approx(1)
    if warmup_steps > 0:
        assert schedule(warmup_steps - 1) < 1


@pytest.mark.parametrize("name", TRAIN_PRESETS)
def test_presets_warm_up_as_they_say(name):
    """Catches a rule for short runs that changes the schedule of a preset."""
    config = TRAIN_PRESETS[name].config
    assert config.warmup_steps == config.warmup_iters


def test_estimate_loss_is_always_of_the_same_tokens(data_dir):
    """Catches evaluation batches that move with the step, a mean over the wrong thing, and a model
    that does not begin as a uniform guess."""
    state = TrainState.create(TINY)
    files, _ = train.load_data(data_dir)
    losses = estimate_loss(state, TINY, files)
    assert set(losses) == {"train", "val"}
    for x in losses.values():
        assert abs(x - np.log(23)) < 0.05
    later = dataclasses.replace(state, step=state.step + 7)
    assert estimate_loss(later, TINY, files) == losses

    loss = jax.jit(state.model.loss)
    each = []
    for t in range(TINY.eval_iters):
        tokens = get_batch(files["val"], t, (4, 16), EVAL_SEED)
        each.append(loss(tokens[:, :-1], tokens[:, 1:]))
    assert abs(losses["val"] - np.mean(each)) < 1e-6


def test_full_loss_counts_every_token_once(data_dir):
    """Catches a last window or batch that is dropped or counted as full (501 tokens are 31.25
    windows)."""
    file = TokenFile(data_dir / "val.bin", "uint16")
    params = jax.tree.map(lambda a: a * 3, TrainState.create(TINY).params)
    state = TrainState.create(TINY, params)
    data = file.read().astype(np.int32)

    @jax.jit
    def log_probabilities(tokens):
        return jax.nn.log_softmax(state.model(tokens)[0])

    total = 0.0
    for start in range(0, 500, 16):
        window = data[start : start + 17]
        n = len(window) - 1
        padded = np.pad(window[:-1], (0, 16 - n))
        logp = log_probabilities(padded[None])[0]
        total -= float(sum(logp[i, window[i + 1]] for i in range(n)))
    assert abs(full_loss(state, TINY, file) - total / 500) < 1e-5


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
    """Catches the worst kept for the best, everything kept, and a restore of other bits."""
    state = TrainState.create(TINY)
    checkpoints = Checkpoints(tmp_path, keep=1)
    params = {}
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, None)]:
        params[step] = jax.tree.map(partial(jnp.add, step), state.params)
        at_step = dataclasses.replace(state, step=jnp.int32(step), params=params[step])
        checkpoints.save(at_step, loss)
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]
    reopened = Checkpoints(tmp_path)
    restored = reopened.restore(state)
    reopened.close()
    assert int(restored.step) == 5
    assert_trees_close(restored.params, params[5], rtol=0)

    write_description(dataclasses.replace(TINY, out_dir=tmp_path), META)
    model, tokenizer, step = load_model(tmp_path)
    assert step == 2
    assert tokenizer.vocab_size == 23
    assert_trees_close(model.params(), params[2], rtol=0)


@pytest.mark.parametrize(
    "package, change",
    [
        ("matplotlib", {}),
        ("tensorboardX", {"tensorboard": True}),
        ("wandb", {"wandb_log": True}),
    ],
)
def test_a_missing_package_is_one_sentence(data_dir, tmp_path, monkeypatch, package, change):
    """Catches a traceback from the middle of a run's start, when it has written files already."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    out_dir = tmp_path / "out"
    config = dataclasses.replace(TINY, data_dir=data_dir, out_dir=out_dir, **change)
    with pytest.raises(UserError, match=f"{package}, which is not installed: pip install"):
        train.main(config)
    assert not out_dir.exists()
