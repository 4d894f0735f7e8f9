"""Training on tiny models: the order of the data, the update, the losses, and that no kill loses or changes a run.

KILLS=20 python -m pytest tests/test_train.py -k kill    runs the kill test with 20 kills instead of 3."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from checkpoints import Checkpoints
from config import GPTConfig, TrainConfig
from mesh import path_name
from tokenizer import CharTokenizer
from train import EVAL_SEED, TokenFile, estimate_loss, full_loss, get_batch, train_step
from utils import TrainState, create_optimizer, learning_rate_schedule, load_model

ROOT = Path(__file__).parents[1]
CHARS = "".join(map(chr, range(97, 97 + 23)))
TINY = TrainConfig(
    model=GPTConfig(block_size=16, vocab_size=23, n_layer=2, n_head=2, n_embd=32, bias=True),
    batch_size=4,
    max_iters=300,
    warmup_iters=2,
    eval_iters=3,
    learning_rate=1e-2,
    min_lr=1e-3,
    tensorboard=False,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """A data set as prepare.py writes it: 3,000 training tokens with structure, 501 for validation."""
    directory = tmp_path_factory.mktemp("data") / "letters"
    directory.mkdir()
    rng = np.random.default_rng(0)
    ids = np.cumsum(rng.integers(1, 4, size=3501)) % 23
    ids[:3000].astype(np.uint16).tofile(directory / "train.bin")
    ids[3000:].astype(np.uint16).tofile(directory / "val.bin")
    meta = {**CharTokenizer(CHARS).meta(), "vocab_size": 23, "dtype": "uint16"}
    (directory / "meta.json").write_text(json.dumps(meta))
    return directory


@pytest.fixture(scope="module")
def file(data_dir) -> TokenFile:
    return TokenFile(data_dir / "train.bin", "uint16")


def batch(shape=(1, 4, 17), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(23, size=shape, dtype=np.int32)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_every_window_is_seen_once_per_epoch(tmp_path):
    """Catches sampling with replacement, an epoch that repeats its order or its cuts, targets that are not the next tokens."""
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "x.bin")  # a token is its position
    file, T = TokenFile(tmp_path / "x.bin", "uint16"), 10
    windows = (1000 - T) // T
    rows = np.concatenate([get_batch(file, t, (3, T), seed=1) for t in range(2 * windows // 3)])
    assert rows.shape == (2 * windows, T + 1) and rows.dtype == np.int32
    assert (np.diff(rows, axis=1) == 1).all()
    first, second = rows[:windows, 0], rows[windows:, 0]
    for epoch in (first, second):
        assert len(set(epoch)) == windows and len(set(epoch % T)) == 1
    assert first[0] % T != second[0] % T and (first // T != second // T).any()
    assert (np.sort(first) != first).any()


def test_batch_t_is_a_pure_function(file):
    """Catches hidden state in the loader: any batch, at any time, in any order, however it is divided."""
    a = get_batch(file, 5, (2, 4, 16), seed=3)
    get_batch(file, 99, (2, 4, 16), seed=4)
    assert (get_batch(file, 5, (2, 4, 16), seed=3) == a).all()
    assert (get_batch(file, 5, (8, 16), seed=3).reshape(a.shape) == a).all()
    assert (get_batch(file, 5, (2, 4, 16), seed=4) != a).any() and (
        get_batch(file, 6, (2, 4, 16), seed=3) != a
    ).any()


def test_a_file_too_short_is_refused(file):
    with pytest.raises(ValueError, match="3000 tokens.*block_size=2000.*4000"):
        get_batch(file, 0, (1, 2000), 0)


def test_memory_stays_flat_over_many_batches(tmp_path):
    """Catches a mapping that is kept, whose touched pages all count as this process's memory (here up to 64 MiB)."""
    np.zeros(2**25, np.uint16).tofile(tmp_path / "x.bin")
    resident = lambda: (
        int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to measure resident memory")
    file = TokenFile(tmp_path / "x.bin", "uint16")
    get_batch(file, 0, (12, 64), 0)
    before = resident()
    for t in range(10_000):
        get_batch(file, t, (12, 64), 0)
    assert resident() - before < 16 * 2**20


def test_one_step_changes_every_parameter_and_counts():
    """Catches a parameter that the optimizer misses (a path rule that matches nothing) and a step that is not counted."""
    state = TrainState.create(TINY)
    before = jax.device_get(state.params)
    state, metrics = train_step(state, batch(), TINY)
    assert (
        int(state.step) == 1
        and abs(float(metrics["loss"]) - np.log(23)) < 0.05
        and metrics["grad_norm"] > 0
    )
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(before)[0], jax.tree.leaves(state.params)
    ):
        assert (np.asarray(b) != a).any(), path


def test_micro_batches_equal_one_batch():
    """Catches gradients summed instead of averaged, or a micro-batch used twice."""
    big = batch((1, 8, 17))
    one, metrics = train_step(TrainState.create(TINY), big, TINY)
    four, metrics4 = train_step(TrainState.create(TINY), big.reshape(4, 2, 17), TINY)
    assert_trees_close(metrics, metrics4, rtol=1e-5)
    assert_trees_close(one.params, four.params, atol=1e-5, rtol=0)


def test_micro_batches_have_dropout_of_their_own():
    """Catches one dropout key for all micro-batches: the same tokens twice would then give one micro-batch's gradient."""
    config = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, dropout=0.5))
    tokens = batch((1, 4, 17))
    norm = lambda b: float(train_step(TrainState.create(config), b, config)[1]["grad_norm"])
    assert abs(norm(np.concatenate([tokens, tokens])) / norm(tokens) - 1) > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_is_learned_by_heart(optimizer):
    """Catches anything that keeps the model from learning at all."""
    config = dataclasses.replace(TINY, optimizer=optimizer)
    state, tokens = TrainState.create(config), batch()
    for _ in range(150):
        state, metrics = train_step(state, tokens, config)
    assert metrics["loss"] < 0.05


def test_decay_and_muon_go_by_path():
    """Catches the rank rule (a stacked bias is 2-D): with zero gradients only kernels and embeddings shrink."""
    for optimizer in ("adamw", "muon"):
        config = dataclasses.replace(TINY, optimizer=optimizer, warmup_iters=0, weight_decay=0.5)
        params = jax.tree.map(jnp.ones_like, TrainState.create(config).params)
        tx = create_optimizer(config)
        update = jax.jit(
            lambda params: tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[
                0
            ]
        )
        for path, u in jax.tree_util.tree_flatten_with_path(update(params))[0]:
            name = path_name(path)
            want = -0.5 * 1e-2 if name.endswith(("kernel", "embedding")) else 0.0
            np.testing.assert_allclose(u, want, rtol=1e-5, err_msg=f"{optimizer} {name}")


def test_muon_orthogonalises_each_layer_by_itself():
    """Catches Muon that takes the stack (L, in, out) for one matrix: a layer's update must not feel another's gradient."""
    config = dataclasses.replace(
        TINY, optimizer="muon", warmup_iters=0, weight_decay=0.0, grad_clip=0.0
    )
    params = TrainState.create(config).params
    tx = create_optimizer(config)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), params)
    update = jax.jit(
        lambda g: tx.update(g, tx.init(params), params)[0]["h"]["mlp"]["c_fc"]["kernel"]
    )
    other = jax.tree.map(lambda a: a, grads)
    other["h"]["mlp"]["c_fc"]["kernel"] = grads["h"]["mlp"]["c_fc"]["kernel"].at[1].multiply(-3.0)
    a, b = update(grads), update(other)
    np.testing.assert_array_equal(a[0], b[0])
    assert (a[1] != b[1]).any()
    singular = np.linalg.svd(np.asarray(a[0]), compute_uv=False)
    assert singular.max() / singular.min() < 2.5, (
        "Newton-Schulz brings all singular values near one another"
    )


def test_gradients_are_clipped_to_their_global_norm():
    """Catches clipping by leaf, or after the optimizer."""
    config = dataclasses.replace(TINY, grad_clip=1e-3)
    grads = jax.tree.map(jnp.ones_like, TrainState.create(config).params)
    clipped, _ = optax.clip_by_global_norm(config.grad_clip).update(grads, optax.EmptyState())
    assert abs(float(optax.tree.norm(clipped)) - 1e-3) < 1e-8
    tx = create_optimizer(config)
    _, a = jax.jit(tx.update)(grads, tx.init(grads), grads)
    moments = [
        x
        for path, x in jax.tree_util.tree_flatten_with_path(a)[0]
        if ".mu" in jax.tree_util.keystr(path)
    ]
    norm = float(optax.tree.norm(moments)) / (1 - config.beta1)
    assert abs(norm - 1e-3) < 1e-6, "the moments see clipped gradients"


def test_schedules():
    """Catches a warmup that starts at 0 or ends late, a decay that ends early, decay_lr=False that decays."""
    base = dataclasses.replace(
        TINY, max_iters=1000, warmup_iters=100, learning_rate=1.0, min_lr=0.1
    )
    cosine = learning_rate_schedule(base)
    np.testing.assert_allclose(
        [cosine(s) for s in (0, 100, 550, 1000, 2000)], [1 / 101, 1, 0.55, 0.1, 0.1], rtol=1e-4
    )
    wsd = learning_rate_schedule(dataclasses.replace(base, lr_schedule="wsd"))
    np.testing.assert_allclose(
        [wsd(s) for s in (100, 500, 820, 910, 1000)], [1, 1, 1, 0.55, 0.1], rtol=1e-4
    )
    flat = learning_rate_schedule(dataclasses.replace(base, decay_lr=False))
    np.testing.assert_allclose([flat(s) for s in (50, 100, 999)], [51 / 101, 1, 1], rtol=1e-2)


def test_estimate_loss_is_a_uniform_guess_at_first_and_always_the_same_tokens(data_dir):
    """Catches evaluation batches that move with the step, and a mean over the wrong thing."""
    state = TrainState.create(TINY)
    files, _ = train.load_data(data_dir)
    losses = estimate_loss(state, TINY, files)
    assert set(losses) == {"train", "val"} and all(
        abs(x - np.log(23)) < 0.05 for x in losses.values()
    )
    later = dataclasses.replace(state, step=state.step + 7)
    assert estimate_loss(later, TINY, files) == losses
    loss = jax.jit(state.model.loss)
    each = [
        loss(b[:, :-1], b[:, 1:])
        for t in range(3)
        for b in [get_batch(files["val"], t, (4, 16), EVAL_SEED)]
    ]
    assert abs(losses["val"] - np.mean(each)) < 1e-6


def test_full_loss_counts_every_token_once(data_dir):
    """Catches a last window or batch that is dropped or counted as full (501 tokens are 31.25 windows)."""
    file = TokenFile(data_dir / "val.bin", "uint16")
    params = jax.tree.map(lambda a: a * 3, TrainState.create(TINY).params)
    state = TrainState.create(TINY, params)
    data = file.read().astype(np.int32)
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(state.model(tokens)[0]))
    total = 0.0
    for start in range(0, 500, 16):
        window = data[start : start + 17]
        n = len(window) - 1
        logp = forward(np.pad(window[:-1], (0, 16 - n))[None])[0]
        total -= float(sum(logp[i, window[i + 1]] for i in range(n)))
    assert abs(full_loss(state, TINY, file) - total / 500) < 1e-5


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
    """Catches the worst kept for the best, everything kept, and a restore of other bits."""
    state = TrainState.create(TINY)
    checkpoints, params = Checkpoints(tmp_path), {}
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, None)]:
        params[step] = jax.tree.map(lambda a: a + step, state.params)
        checkpoints.save(
            dataclasses.replace(state, step=jnp.int32(step), params=params[step]), loss
        )
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]
    reopened = Checkpoints(tmp_path)
    restored = reopened.restore(state)
    reopened.close()
    assert int(restored.step) == 5
    assert_trees_close(restored.params, params[5], rtol=0)

    (tmp_path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(TINY.model)}))
    (tmp_path / "meta.json").write_text(json.dumps(CharTokenizer(CHARS).meta()))
    model, tokenizer, step = load_model(tmp_path)
    assert step == 2 and tokenizer.vocab_size == 23
    assert_trees_close(model.params(), params[2], rtol=0)


# From here on, whole programs.

FLAGS = [
    "--block_size=16",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--batch_size=4",
    "--max_iters=60",
    "--dropout=0.2",
    "--eval_interval=5",
    "--eval_iters=2",
    "--log_interval=1",
    "--warmup_iters=5",
    "--tensorboard=False",
]


def run(program: str, *argv) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, program, *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def training(data_dir, out_dir, *argv) -> list[str]:
    return ["shakespeare_char_cpu", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *FLAGS, *argv]


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory) -> Path:
    """OUT_DIR of a run of 60 steps that nothing disturbed."""
    out_dir = tmp_path_factory.mktemp("finished")
    done = run("train.py", *training(data_dir, out_dir, "--init_from=resume"))
    assert done.returncode == 0, done.stderr
    return out_dir


def rows(out_dir: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]


def test_a_run_learns_and_leaves_what_design_says(finished):
    """Catches a loop that logs but does not learn, and a file that is missing afterwards."""
    log = rows(finished)
    val = [row["val_loss"] for row in log if "val_loss" in row]
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 61)) and len(val) == 13
    assert abs(val[0] - np.log(23)) < 0.05 and val[-1] < 0.8 * val[0]
    assert {p.name for p in finished.iterdir()} == {
        "checkpoints",
        "config.json",
        "meta.json",
        "metrics.jsonl",
        "loss.png",
    }
    assert (finished / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_killed_runs_end_in_the_same_bits(data_dir, finished, tmp_path):
    """Catches a checkpoint that is half-written, a state that is not saved (order of the data, dropout), a step done twice.

    TERM at a random step, KILL at a random step and KILL while a checkpoint is being written, in turn; then the run is
    finished. Parameters and log must equal the undisturbed run's bit for bit."""
    kills, rng = int(os.environ.get("KILLS", 3)), random.Random(0)
    command = [sys.executable, "train.py", *training(data_dir, tmp_path, "--init_from=resume")]
    for kill in range(kills):
        how = ("TERM", "SAVE", "KILL")[kill % 3]
        before = len(rows(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
        target = before + rng.randint(3, max(4, (66 - before) // max(1, kills - kill)))
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            if how == "SAVE":
                now = any(tmp_path.glob("checkpoints/*tmp*"))
            else:
                now = (tmp_path / "metrics.jsonl").exists() and len(rows_so_far(tmp_path)) >= target
            if now:
                process.send_signal(signal.SIGTERM if how == "TERM" else signal.SIGKILL)
                break
            time.sleep(0.001)  # nothing to wait on: the files of another process are polled
        code = process.wait(timeout=120)
        assert code in ((0, 143) if how == "TERM" else (0, -9)), code
    done = run("train.py", *training(data_dir, tmp_path, "--init_from=resume"))
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path) == rows(finished)
    a, b = load_model(tmp_path), load_model(finished)
    assert a[2] == b[2]
    assert_trees_close(a[0].params(), b[0].params(), rtol=0)
    state = TrainState.create(dataclasses.replace(TINY, model=a[0].config))
    last = [Checkpoints(out).restore(state) for out in (tmp_path, finished)]
    assert int(last[0].step) == 60
    assert_trees_close(last[0].params, last[1].params, rtol=0)
    assert_trees_close(last[0].opt_state, last[1].opt_state, rtol=0)


def rows_so_far(out_dir: Path) -> list[str]:
    return (out_dir / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--init_from=scratch"], ["step 60", "--init_from=resume"]),
        (["--init_from=resume", "--n_layer=3"], ["n_layer=3", "n_layer=2"]),
        (["--init_from=resume", "--data_dir=/nowhere/at_all"], ["/nowhere/at_all", "prepare.py"]),
    ],
)
def test_what_cannot_be_trained_is_refused(data_dir, finished, argv, words):
    """Catches a run that is overwritten, and a resume that silently trains another model."""
    before = (finished / "metrics.jsonl").read_text()
    done = run("train.py", *training(data_dir, finished, *argv))
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and all(w in done.stderr for w in words)
    ), done.stderr
    assert (finished / "metrics.jsonl").read_text() == before


def test_finetuning_starts_from_the_given_weights(data_dir, finished, tmp_path):
    """Catches --init_from=DIR that trains from scratch, or takes the flags' shape for the checkpoint's."""
    model, tokenizer, _ = load_model(finished)
    model.save_pretrained(tmp_path / "hf", tokenizer)
    done = run(
        "train.py",
        "finetune_shakespeare",
        f"--data_dir={data_dir}",
        f"--init_from={tmp_path / 'hf'}",
        f"--out_dir={tmp_path / 'out'}",
        "--max_iters=2",
        "--eval_iters=2",
        "--loss_chunks=1",
        "--tensorboard=False",
        "--gradient_accumulation_steps=2",
        "--block_size=8",
        "--learning_rate=1e-5",
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["model"]
    assert (saved["n_embd"], saved["block_size"], saved["vocab_size"]) == (32, 8, 23)
    assert [row["val_loss"] for row in rows(tmp_path / "out") if "val_loss" in row][0] < np.log(
        23
    ) - 0.3
    refused = run(
        "train.py",
        "finetune_shakespeare",
        f"--data_dir={data_dir}",
        f"--init_from={tmp_path / 'hf'}",
        f"--out_dir={tmp_path / 'other'}",
        "--n_layer=5",
    )
    assert (
        refused.returncode == 2 and "n_layer=5" in refused.stderr and "n_layer=2" in refused.stderr
    ), refused.stderr


def test_sample_writes_what_generate_does(finished):
    """Catches a streamed sample that loses or repeats characters at the seams of its bursts."""
    done = run(
        "sample.py",
        f"--out_dir={finished}",
        "--start=abc",
        "--num_samples=2",
        "--max_new_tokens=70",
        "--seed=5",
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer, step = load_model(finished)
    samples = model.for_inference().generate(
        [tokenizer.encode("abc")] * 2, 70, temperature=0.8, top_k=200, seed=5
    )
    want = ("\n" + "-" * 15 + "\n").join(map(tokenizer.decode, samples))
    assert done.stdout.split("\n\n", 1)[1] == want + "\n" and f"step {step}" in done.stdout


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--start=abcXYZ"], ["XYZ"]),
        (["--start="], ["empty"]),
        (["--start=FILE:/no/such/file"], ["/no/such/file"]),
        (["--out_dir=/no/such/dir"], ["/no/such/dir", "config.json"]),
        (["--temperature=-1"], ["temperature=-1"]),
        (["--init_from=gpt2"], ["--out_dir", "--init_from"]),
    ],
)
def test_sample_refuses_in_a_sentence(finished, argv, words):
    done = run("sample.py", f"--out_dir={finished}", *argv)
    assert (
        done.returncode == 2
        and all(w in done.stderr for w in words)
        and "Traceback" not in done.stderr
    ), done.stderr
