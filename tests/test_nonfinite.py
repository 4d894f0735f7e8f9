"""Updates whose loss or gradients are not finite: skipped, counted, logged, and in the end refused.

An exploding batch is one that begins with the token BAD, by `explode`.
"""

import dataclasses
import json
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from config import TrainConfig
from errors import UserError
from tiny_training import TINY, VOCAB_SIZE, assert_trees_close
from train import train_step
from training import run_start
from training.checkpoints import Checkpoints
from training.skipped_updates import SkippedUpdates, updates_made
from utils import TrainState

pytestmark = pytest.mark.slow

SMALL = dataclasses.replace(
    TINY,
    model=dataclasses.replace(TINY.model, n_layer=1, n_embd=16, bias=False),
    max_iters=12,
    decay_lr=False,
    warmup_iters=0,
    eval_interval=6,
    eval_iters=1,
    log_interval=1,
    skip_nonfinite=2,
    init_from="resume",
)
BAD = -5
"""First token of a batch that explodes."""


def batch(seed: int, bad: bool = False) -> np.ndarray:
    """Return random tokens (A=1, B, T+1) for SMALL; bad: they explode."""
    tokens = np.random.default_rng(seed).integers(VOCAB_SIZE, size=(1, 4, 17), dtype=np.int32)
    if bad:
        tokens[0, 0, 0] = BAD
    return tokens


@pytest.fixture
def exploding(monkeypatch):
    """Make loss or gradients of batches that begin with BAD not finite: see `explode`.

    What jit remembers of it is remembered under SMALL's fields, which no healthy test has."""
    monkeypatch.setattr(train, "mean_loss_and_grads", explode)
    # It must come before JAX's first use of a device, which here is long past.
    monkeypatch.setattr(run_start, "use_cpu_cores", lambda config, processes: None)


real_mean_loss_and_grads = train.mean_loss_and_grads


def explode(state: TrainState, tokens: jax.Array, config: TrainConfig) -> tuple:
    """Return what train.mean_loss_and_grads does, with a gradient of inf for a batch with BAD."""
    is_bad = tokens[0, 0, 0] == BAD
    loss, grads = real_mean_loss_and_grads(state, jnp.maximum(tokens, 0), config)
    factor = jnp.where(is_bad, jnp.inf, 1.0)
    return loss, jax.tree.map(partial(jnp.multiply, factor), grads)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def step_without_check(state: TrainState, tokens: jax.Array, config: TrainConfig) -> tuple:
    """Make an update as train_step did before it skipped any."""
    loss, grads = train.mean_loss_and_grads(state, tokens, config)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    new_state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return state.lay_out(new_state), metrics


def test_a_healthy_run_has_the_same_bits():
    """Catches a check that changes what a healthy update computes."""
    healthy = dataclasses.replace(SMALL, skip_nonfinite=3)
    a = TrainState.create(healthy)
    b = TrainState.create(healthy)
    for t in range(4):
        a, metrics_a = train_step(a, batch(t), healthy)
        b, metrics_b = step_without_check(b, batch(t), healthy)
        assert_trees_close(metrics_a, metrics_b, rtol=0)
    assert_trees_close(a.params, b.params, rtol=0)
    assert_trees_close(a.opt_state, b.opt_state, rtol=0)


def test_the_limit_changes_no_bit():
    """Catches a limit that becomes part of the program: with Muon another program, such as one
    without the check, differs in the last bit, because XLA fuses its sums otherwise."""
    muon = dataclasses.replace(SMALL, optimizer="muon")
    state = jax.eval_shape(partial(TrainState.create, muon))
    programs = {
        train_step.lower(state, batch(0), dataclasses.replace(muon, skip_nonfinite=limit)).as_text()
        for limit in (0, 10)
    }
    assert len(programs) == 1


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_skipped_update_leaves_all_but_the_step(optimizer, exploding):
    """Catches a moment or a count that takes part of the bad batch, weight decay without an update,
    a step that is repeated, and an update after it that is not the one it would have been."""
    config = dataclasses.replace(SMALL, optimizer=optimizer)
    state, _ = train_step(TrainState.create(config), batch(0), config)
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = train_step(state, batch(1, bad=True), config)
    assert not np.isfinite(metrics["grad_norm"])
    assert np.isfinite(metrics["loss"])
    assert int(state.step) == 2
    assert updates_made(state) == 1
    assert_trees_close((state.params, state.opt_state), before, rtol=0)
    state, metrics = train_step(state, batch(2), config)
    assert np.isfinite(metrics["grad_norm"])
    assert updates_made(state) == 2
    assert (np.asarray(state.params["wpe"]["embedding"]) != before[0]["wpe"]["embedding"]).any()


# Whole runs.


@pytest.fixture
def explode_at(exploding, monkeypatch):
    """Return a list of t, to be filled: the training batches that explode."""
    bad: list[int] = []

    def get_batch(file, t, shape, seed, rows=slice(None)):
        tokens = train_get_batch(file, t, shape, seed, rows)
        if seed == SMALL.seed and t in bad:
            tokens[..., 0] = BAD
        return tokens

    train_get_batch = train.get_batch
    monkeypatch.setattr(train, "get_batch", get_batch)
    return bad


def rows(out_dir: Path) -> list[dict]:
    """Return metrics.jsonl, which must be JSON in the strict sense, without the clock."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in parsed]


def latest(out_dir: Path) -> TrainState:
    """Return the latest checkpoint of a run of SMALL."""
    checkpoints = Checkpoints(out_dir)
    state = checkpoints.restore(TrainState.abstract(SMALL, TrainState.create(SMALL).mesh))
    checkpoints.close()
    return state


def test_exploding_batches_do_not_cost_the_run(data_dir, tmp_path, explode_at, monkeypatch, capsys):
    """Catches a run that one bad batch ends or spoils, skipped updates that are not told or
    counted, a count that a resume forgets, a learning rate that is logged but not used, and a
    resumed run that ends elsewhere."""
    explode_at += [3, 4, 8]
    config = dataclasses.replace(SMALL, data_dir=data_dir, out_dir=tmp_path / "out", decay_lr=True)
    assert train.main(config) == 0
    printed = capsys.readouterr().out
    whole = rows(config.out_dir)
    whole_state = latest(config.out_dir)
    updates = [row for row in whole if "loss" in row]
    assert [row["skipped"] for row in updates] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert [row["step"] for row in updates if row["grad_norm"] is None] == [4, 5, 9]
    rates = [row["lr"] for row in updates]
    assert rates[2] == rates[3] == rates[4] > rates[5]  # of the last update that was made
    notes = {row["step"]: row["note"] for row in whole if "note" in row}
    assert list(notes) == [4, 5, 9]
    assert notes[9].startswith("step 9: skipped, loss ")
    assert notes[9].endswith("; 3 skipped in all")
    assert all(note in printed for note in notes.values())
    assert int(whole_state.step) == 12
    assert updates_made(whole_state) == 9
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(whole_state.params))

    config.out_dir.rename(tmp_path / "whole")  # the same config: nothing is compiled again
    stop_at(8, monkeypatch)
    assert train.main(config) == 128 + signal.SIGTERM
    assert int(latest(config.out_dir).step) == 8
    stop_at(None, monkeypatch)
    assert train.main(config) == 0
    assert rows(config.out_dir) == whole
    state = latest(config.out_dir)
    assert_trees_close(state.params, whole_state.params, rtol=0)
    assert_trees_close(state.opt_state, whole_state.opt_state, rtol=0)


def stop_at(step: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM to the runs that follow after this update; None: send none."""

    def signal_received(run: train.Run, stop_signals: train.StopSignals) -> int | None:
        return signal.SIGTERM if run.step == step else None

    monkeypatch.setattr(train.Run, "signal_received", signal_received)


def test_a_run_that_explodes_for_good_ends(data_dir, tmp_path, explode_at):
    """Catches a run that skips for ever, a limit that is off by one or counts those before a good
    update, a last line that is not logged, and a sentence without what is known."""
    explode_at += [0, 2, 3, 4, 5]
    config = dataclasses.replace(SMALL, data_dir=data_dir, out_dir=tmp_path / "out")
    with pytest.raises(UserError) as error:
        train.main(config)
    log = [row for row in rows(config.out_dir) if "loss" in row]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]
    assert [row["skipped"] for row in log] == [1, 1, 2, 3, 4]
    last_finite = f"step 2: loss {log[1]['loss']:.4f}, gradient norm {log[1]['grad_norm']:.4g}"
    for words in ("at step 5 (loss ", "3 updates in a row", "skip_nonfinite=2", last_finite):
        assert words in str(error.value)
    for words in ("--init_from=resume", "learning_rate (now 0.01)", "grad_clip (now 1.0)"):
        assert words in str(error.value)
    assert error.value.param == "skip_nonfinite"


def test_a_resume_counts_the_skipped_before_it(data_dir, tmp_path, explode_at, monkeypatch):
    """Catches a run that is stopped and resumed for ever while all of its updates are skipped: the
    limit is on those in a row, wherever the run was stopped between them."""
    explode_at += [2, 3, 4, 5]
    config = dataclasses.replace(SMALL, data_dir=data_dir, out_dir=tmp_path / "out")
    stop_at(4, monkeypatch)
    assert train.main(config) == 128 + signal.SIGTERM
    stop_at(None, monkeypatch)
    with pytest.raises(UserError, match="at step 5 .*3 updates in a row"):
        train.main(config)


# The count alone.


def skipped_updates(limit: int) -> SkippedUpdates:
    """Return those of a run that begins at step 0."""
    config = dataclasses.replace(TINY, skip_nonfinite=limit)
    opt_state = optax.adam(1.0).init({"w": jnp.zeros(1)})
    return SkippedUpdates(config, SimpleNamespace(step=0, opt_state=opt_state))


NAN = float("nan")
INF = float("inf")


def add_all(skipped: SkippedUpdates, losses: list[float]) -> None:
    """Add updates with these losses."""
    for step, loss in enumerate(losses, start=1):
        skipped.add(step, {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1.0)})


@pytest.mark.parametrize(
    "limit, losses, ends_at",
    [
        (2, [1, NAN, NAN, 1, NAN, INF], None),
        (2, [1, NAN, NAN, INF, 1, 1], 4),
        (1, [NAN, 1, NAN, NAN, NAN, NAN, 1], 4),
        (0, [1, 1, -INF], 3),
        (0, [1, 1, 1], None),
    ],
)
def test_too_many_in_a_row(limit, losses, ends_at):
    """Catches a limit that is off by one, a limit on the total, an end that a good update forgives,
    because the metrics are read many at a time, and another step than the one too many."""
    skipped = skipped_updates(limit)
    add_all(skipped, losses)
    notes = skipped.read()
    bad = [step for step, loss in enumerate(losses, start=1) if not np.isfinite(loss)]
    assert list(notes) == bad
    assert all(note.startswith(f"step {step}: skipped, loss ") for step, note in notes.items())
    assert skipped.total == len(bad)
    assert skipped.read() == {}
    if ends_at is None:
        skipped.require_few()
    else:
        with pytest.raises(
            UserError, match=f"not finite at step {ends_at} .*skip_nonfinite={limit}"
        ):
            skipped.require_few()
