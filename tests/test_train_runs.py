"""Whole runs of train.py on a tiny model: what they print and leave, finetuning, and runs killed.

KILLS=20 python -m pytest tests/test_train_runs.py -k kill    makes 20 kills instead of 3.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sample
from config import SampleConfig
from tiny_training import TINY, assert_trees_close
from training.checkpoints import Checkpoints
from utils import TrainState, load_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
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
    "--tensorboard=False",
]


def run(program: str, *argv: str) -> subprocess.CompletedProcess:
    """Run a program to its end."""
    return subprocess.run(
        [sys.executable, program, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def training(data_dir: Path, out_dir: Path, *argv: str) -> list[str]:
    """Return the arguments of train.py for a run on data_dir."""
    return ["shakespeare_char_cpu", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *FLAGS, *argv]


@pytest.fixture(scope="module")
def finished_run(data_dir, tmp_path_factory) -> tuple[Path, str]:
    """OUT_DIR of a run of 60 steps that nothing disturbed, and all that it printed."""
    out_dir = tmp_path_factory.mktemp("finished")
    done = run("train.py", *training(data_dir, out_dir, "--init_from=resume"))
    assert done.returncode == 0, done.stderr
    return out_dir, done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(finished_run) -> Path:
    """OUT_DIR of a run of 60 steps that nothing disturbed."""
    return finished_run[0]


def lines_so_far(out_dir: Path) -> list[str]:
    """Return the lines of metrics.jsonl, none if there is none yet."""
    path = out_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def rows(out_dir: Path) -> list[dict]:
    """Return metrics.jsonl without the clock."""
    parsed = [json.loads(line) for line in lines_so_far(out_dir)]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in parsed]


def test_a_run_learns_and_leaves_what_design_says(finished):
    """Catches a loop that logs but does not learn, and a file that is missing afterwards."""
    log = rows(finished)
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 61))
    val = [row["val_loss"] for row in log if "val_loss" in row]
    assert len(val) == 13
    assert abs(val[0] - np.log(23)) < 0.05
    assert val[-1] < 0.8 * val[0]
    names = {path.name for path in finished.iterdir()}
    assert names == {"checkpoints", "config.json", "meta.json", "metrics.jsonl", "loss.png"}
    assert (finished / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_run_prints(finished_run):
    """Catches a shortened warmup that nobody is told of, and a library's warnings among the lines
    of a run."""
    _, printed = finished_run
    assert (
        "warmup over 6 updates, a tenth of the run: it is too short for warmup_iters=100" in printed
    )
    assert "step 60: train loss" in printed
    assert "WARNING" not in printed


def test_killed_runs_end_in_the_same_bits(data_dir, finished, tmp_path):
    """Catches a checkpoint that is half-written, a state that is not saved (order of the data,
    dropout), a step done twice; and a library's warnings in what a stopped run prints.

    TERM at a random step, KILL while a checkpoint is being written and KILL at a random step, in
    turn; then the run is finished. Parameters and log must equal the undisturbed run's bit for
    bit."""
    kills = int(os.environ.get("KILLS", 3))
    rng = random.Random(0)
    out_dir = tmp_path / "out"
    for kill in range(kills):
        how = ("TERM", "SAVE", "KILL")[kill % 3]
        before = len(rows(out_dir))
        steps = rng.randint(3, max(4, (66 - before) // max(1, kills - kill)))
        code, printed = killed_run(data_dir, out_dir, how, before + steps)
        assert code in ((0, 143) if how == "TERM" else (0, -9)), printed
        assert "WARNING" not in printed
    done = run("train.py", *training(data_dir, out_dir, "--init_from=resume"))
    assert done.returncode == 0, done.stderr
    assert rows(out_dir) == rows(finished)
    assert_same_checkpoints(out_dir, finished)


def killed_run(data_dir: Path, out_dir: Path, how: str, target: int) -> tuple[int, str]:
    """Go on with a run until it is killed: when metrics.jsonl has `target` lines, or, how="SAVE",
    while it writes a checkpoint. Returns its exit code and all that it printed."""
    command = [sys.executable, "train.py", *training(data_dir, out_dir, "--init_from=resume")]
    log_path = out_dir.with_suffix(".log")
    with log_path.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    while process.poll() is None:
        if how == "SAVE":
            now = any(out_dir.glob("checkpoints/*tmp*"))
        else:
            now = len(lines_so_far(out_dir)) >= target
        if now:
            process.send_signal(signal.SIGTERM if how == "TERM" else signal.SIGKILL)
            break
        time.sleep(0.001)  # nothing to wait on: the files of another process are polled
    return process.wait(timeout=120), log_path.read_text()


def assert_same_checkpoints(a_dir: Path, b_dir: Path) -> None:
    """Compare the best checkpoints of two runs, and the latest, which are of step 60."""
    a, _, best_of_a = load_model(a_dir)
    b, _, best_of_b = load_model(b_dir)
    assert best_of_a == best_of_b
    assert_trees_close(a.params(), b.params(), rtol=0)
    state = TrainState.create(dataclasses.replace(TINY, model=a.config))
    latest_of_a = Checkpoints(a_dir).restore(state)
    latest_of_b = Checkpoints(b_dir).restore(state)
    assert int(latest_of_a.step) == 60
    assert_trees_close(latest_of_a.params, latest_of_b.params, rtol=0)
    assert_trees_close(latest_of_a.opt_state, latest_of_b.opt_state, rtol=0)


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
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert (finished / "metrics.jsonl").read_text() == before


def finetuning(data_dir: Path, weights: Path, out_dir: Path, *argv: str) -> list[str]:
    """Return the arguments of train.py that finetune a Hugging Face directory."""
    paths = [f"--data_dir={data_dir}", f"--init_from={weights}", f"--out_dir={out_dir}"]
    return ["finetune_shakespeare", *paths, *argv]


def test_finetuning_starts_from_the_given_weights(data_dir, finished, tmp_path):
    """Catches --init_from=DIR that trains from scratch, or takes the flags' shape for the
    checkpoint's."""
    model, tokenizer, _ = load_model(finished)
    model.save_pretrained(tmp_path / "hf", tokenizer)
    short = [
        "--max_iters=2",
        "--eval_iters=2",
        "--loss_chunks=1",
        "--tensorboard=False",
        "--gradient_accumulation_steps=2",
        "--block_size=8",
        "--learning_rate=1e-5",
    ]
    done = run("train.py", *finetuning(data_dir, tmp_path / "hf", tmp_path / "out", *short))
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["model"]
    assert (saved["n_embd"], saved["block_size"], saved["vocab_size"]) == (32, 8, 23)
    val_losses = [row["val_loss"] for row in rows(tmp_path / "out") if "val_loss" in row]
    assert val_losses[0] < np.log(23) - 0.3

    goes_on = finetuning(data_dir, "resume", tmp_path / "out", *short[1:], "--max_iters=4")
    done = run("train.py", *goes_on)  # which has no flag that describes the model
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "out")[-1]["step"] == 4
    contradicts = run("train.py", *goes_on, "--n_layer=5")
    assert contradicts.returncode == 2
    assert "n_layer=5" in contradicts.stderr

    other_shape = finetuning(data_dir, tmp_path / "hf", tmp_path / "other", "--n_layer=5")
    refused = run("train.py", *other_shape)
    assert refused.returncode == 2
    assert "n_layer=5" in refused.stderr
    assert "n_layer=2" in refused.stderr


def test_a_run_is_opened_by_a_relative_path(finished, monkeypatch):
    """Catches a path that TensorStore takes for a host: all other tests have absolute ones."""
    monkeypatch.chdir(finished.parent)
    _, _, step = load_model(Path(finished.name))
    assert step > 0


def test_sample_writes_what_generate_does(finished):
    """Catches a streamed sample that loses or repeats characters at the seams of its bursts."""
    flags = ["--start=abc", "--num_samples=2", "--max_new_tokens=70", "--seed=5"]
    done = run("sample.py", f"--out_dir={finished}", *flags)
    assert done.returncode == 0, done.stderr
    model, tokenizer, step = load_model(finished)
    samples = model.for_inference().generate(
        [tokenizer.encode("abc")] * 2, 70, temperature=0.8, top_k=200, seed=5
    )
    expected = ("\n" + "-" * 15 + "\n").join(map(tokenizer.decode, samples))
    title, printed = done.stdout.split("\n\n", 1)
    assert f"step {step}" in title
    assert printed == expected + "\n"


def test_sample_stops_at_the_end_of_text(finished, monkeypatch, capsys):
    """Catches samples that go on, after a document's end, with another document."""
    model, tokenizer, _ = load_model(finished)
    prompt = tokenizer.encode("abc")
    [tokens] = model.for_inference().generate([prompt], 30, temperature=0)
    new = tokens[len(prompt) :]
    tokenizer.eos_id = new[9]
    monkeypatch.setattr(sample, "open_model", lambda config: (model, tokenizer, "a model"))
    sample.main(
        SampleConfig(
            out_dir=finished, start="abc", num_samples=1, max_new_tokens=30, temperature=0.0
        )
    )
    _, printed = capsys.readouterr().out.split("\n\n", 1)
    expected = new[: new.index(tokenizer.eos_id) + 1]
    assert printed == "abc" + tokenizer.decode(expected) + "\n"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--start=abcXYZ"], ["XYZ"]),
        (["--start="], ["empty"]),
        (["--start=FILE:/no/such/file"], ["/no/such/file"]),
        (["--start=FILE:docs/loss.png"], ["docs/loss.png is not UTF-8"]),
        (["--out_dir=/no/such/dir"], ["/no/such/dir", "config.json"]),
        (["--temperature=-1"], ["temperature=-1"]),
        (["--init_from=gpt2"], ["--out_dir", "--init_from"]),
    ],
)
def test_sample_refuses_in_a_sentence(finished, argv, words):
    """Catches a mistake that ends in a traceback, or that is not named."""
    done = run("sample.py", f"--out_dir={finished}", *argv)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
