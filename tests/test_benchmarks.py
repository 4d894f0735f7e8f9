"""Benchmarks without their subjects: turns, jobs and figures, with numbers worked out by hand."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import evaluation, serving, speedrun, training
from benchmarks.checkpoints import BenchCheckpointConfig, bench_checkpoint, noise
from benchmarks.contender import (
    Contender,
    ContenderProcess,
    in_words,
    milliseconds,
    ratio,
    take_turns,
)
from benchmarks.generation import BenchGenerateConfig, generate_requests, stream_requests
from benchmarks.kernels import BenchKernelConfig, bench_kernel
from benchmarks.serving import BenchServeConfig, Chunk, Completion, serve_requests
from benchmarks.speedrun import (
    Point,
    copy_nanogpt,
    give_data,
    read_curve,
    seconds_to,
    speedrun_figures,
)
from benchmarks.workload import Request, dense_utilization, padded_batches
from config import GPTConfig, TrainConfig
from errors import UserError
from kernels import cpu_kernels
from tiny_training import VOCAB_SIZE, write_letters
from utils import TrainState

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


class Sleeper(Contender):
    """Sleeps so many seconds for each unit of work, and tells what it was asked for."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.runs: list[int] = []

    def run(self, n: int) -> None:
        self.runs.append(n)
        time.sleep(n * self.seconds)

    def report(self) -> dict:
        return {"runs": self.runs}


class FakeProcess:
    """Takes a process's place; writes down its turns in a book that all of them share."""

    def __init__(self, name: str, book: list):
        self.name = name
        self.book = book

    def wait_until_ready(self) -> None:
        self.book.append((self.name, "ready"))

    def measure(self, units: int) -> None:
        self.book.append((self.name, units))


def test_contenders_alternate():
    """Catches rounds of one contender in a row, which a machine that slows down is unfair to, and
    a turn that begins while another contender still warms up."""
    book = []
    take_turns({name: FakeProcess(name, book) for name in "ab"}, rounds=3, units=7)
    assert book[:2] == [("a", "ready"), ("b", "ready")]
    assert book[2:] == [("a", 7), ("b", 7)] * 3


def test_a_process_times_its_contender():
    """Catches a warm-up that counts, seconds that are not per unit of work, and a report that is
    lost."""
    process = ContenderProcess(Sleeper, 0.005)
    take_turns({"sleeper": process}, rounds=2, units=10)
    report = process.close()
    assert report["runs"] == [2, 10, 10]  # the first is the warm-up
    assert len(process.seconds) == 2
    assert all(0.005 <= seconds < 0.05 for seconds in process.seconds)
    assert report["peak_rss_mib"] > 1


class Failing(Contender):
    """Fails when it is made, in a turn, or in its report; or takes its process with it."""

    def __init__(self, where: str):
        self.where = where
        self.fail_at("init")

    def run(self, n: int) -> None:
        if n > 2:  # the warm-up has 2
            self.fail_at("run")

    def report(self) -> dict:
        self.fail_at("report")
        return {}

    def fail_at(self, where: str) -> None:
        """Fail if that is where it is to."""
        if self.where == where:
            raise RuntimeError("no such\nlibrary")
        if self.where == f"exit at {where}":
            os._exit(9)


@pytest.mark.parametrize("where", ["init", "run", "report", "exit at run"])
def test_a_contender_that_fails_is_named(where, capfd):
    """Catches a traceback of another process, and an EOFError in ours, in place of who failed and
    why."""
    process = ContenderProcess(Failing, where)
    with pytest.raises(UserError) as error:
        take_turns({"failing": process}, rounds=1, units=3)
        process.close()
    reason = "exit code 9" if where.startswith("exit") else "RuntimeError: no such library"
    assert str(error.value) == f"the contender Failing has failed: {reason}"
    process._process.join()
    assert "Traceback" not in capfd.readouterr().err


def test_what_a_checkpoint_costs(tmp_path):
    """Catches a command that measures a state which compresses, or another size than a run's, and
    leaves gigabytes behind."""
    model = GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=64, bias=False)
    train = TrainConfig(model=model)
    config = BenchCheckpointConfig(train=train, directory=tmp_path, rounds=2)
    report = bench_checkpoint(config)
    padded = model.num_params() + (model.padded_vocab_size - model.vocab_size) * model.n_embd
    assert report["state_gb"] == round(3 * 4 * padded / 1e9, 3)  # parameters and two moments
    seconds = report["seconds"]
    assert 0 < seconds["checksums"] < seconds["save"]
    assert 0 < seconds["save_until_training_goes_on"] <= seconds["save"]
    assert report["checksums_of_restore"] == round(seconds["checksums"] / seconds["restore"], 3)
    state = noise(TrainState.create(train))
    assert all(np.std(a) > 0.5 for a in jax.tree.leaves((state.params, state.opt_state)) if a.ndim)
    assert not list(tmp_path.iterdir())


def test_the_median_counts():
    """Catches a mean, which one turn on a busy machine would spoil."""
    process = ContenderProcess.__new__(ContenderProcess)  # without a process
    process.seconds = [0.2, 9.0, 0.1]
    assert process.median == 0.2


def test_ratio():
    """Catches a ratio upside down, and one over the worst or the last peer."""
    assert ratio(2.0, [8.0, 3.0, 5.0]) == {"ratio": 1.5}
    assert ratio(2.0, [1.0]) == {"ratio": 0.5}
    assert ratio(2.0, []) == {}


def test_figures_in_words():
    """Catches another unit or another order in the printed lines."""
    assert milliseconds(0.0123456) == 12.35
    assert (
        in_words({"ms_per_step": 12.35, "attention": "xla"}) == "ms_per_step 12.35, attention xla"
    )


def test_padded_batches():
    """Catches requests out of order or left out, and a batch that ends before its longest."""
    requests = [Request([1], 4), Request([2, 2], 9), Request([3], 5)]
    assert padded_batches(requests, 2) == [([[1], [2, 2]], 9), ([[3]], 5)]
    assert padded_batches(requests, 8) == [([[1], [2, 2], [3]], 9)]


def test_dense_utilization():
    """Catches slots of finished rows, or those for the new token, counted as held."""
    # Rows of 3 + 2 slots. Step 0 holds 1 + 3 tokens; in step 1 the first row has ended: 3 + 1.
    requests = [Request([0], 1), Request([0, 0, 0], 2)]
    assert dense_utilization(requests, 2) == pytest.approx((4 / 10 + 4 / 10) / 2)
    # Alone, rows of 1 + 1 and 3 + 2 slots, one step and two.
    assert dense_utilization(requests, 1) == pytest.approx((1 / 2 + 3 / 5 + 4 / 5) / 3)


def test_the_ragged_job_is_a_function_of_the_seed():
    """Catches contenders that do different jobs, and lengths out of their range."""
    config = BenchGenerateConfig(requests=40, prompt_tokens=(2, 4), output_tokens=(5, 6))
    requests = generate_requests(config)
    assert requests == generate_requests(config)
    assert requests != generate_requests(dataclasses.replace(config, seed=2))
    assert {len(r.prompt) for r in requests} == {2, 3, 4}
    assert {r.output_tokens for r in requests} == {5, 6}
    assert max(max(r.prompt) for r in requests) < config.model.vocab_size


def test_equal_streams_are_equally_long():
    """Catches streams that share a prompt, which the prefix cache would compute once."""
    requests = stream_requests(BenchGenerateConfig(), 3)
    assert len({tuple(r.prompt) for r in requests}) == 3
    assert {(len(r.prompt), r.output_tokens) for r in requests} == {(16, 64)}


def test_requests_to_a_server_have_new_tokens():
    """Catches a second rate whose prompts are all in the server's prefix cache."""
    config = BenchServeConfig(requests=5, prompt_tokens=(8, 16), output_tokens=(2, 9))
    once, again = serve_requests(config), serve_requests(config)
    for one, other in zip(once, again, strict=True):
        assert one["prompt"] != other["prompt"] and len(one["prompt"]) == len(other["prompt"])
        assert one["max_tokens"] == other["max_tokens"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: BenchGenerateConfig(prompt_tokens=(5, 4)),
        lambda: BenchGenerateConfig(output_tokens=(0, 4)),
        lambda: BenchGenerateConfig(rounds=0),
        lambda: BenchGenerateConfig(model=GPTConfig(block_size=255)),
        lambda: BenchGenerateConfig(
            model=GPTConfig(block_size=79), prompt_tokens=(1, 2), output_tokens=(1, 2)
        ),
        lambda: BenchServeConfig(rates=()),
        lambda: BenchServeConfig(out_dir=Path("out"), init_from="gpt2"),
    ],
)
def test_jobs_that_cannot_be_done(make):
    """Catches a job that is found impossible only after minutes of compilation."""
    with pytest.raises(UserError):
        make()


def test_load_figures():
    """Catches a first token that counts in TPOT, chunks taken for tokens, and a goodput that
    keeps only one of its two limits."""
    quick = Completion(0.0, [Chunk(0.5, 1), Chunk(0.9, 4)])  # TTFT 0.5 s, TPOT 0.1 s
    late = Completion(1.0, [Chunk(3.0, 1), Chunk(3.1, 1)])  # TTFT 2 s, TPOT 0.1 s
    slow = Completion(2.0, [Chunk(2.5, 1), Chunk(3.5, 1)])  # TTFT 0.5 s, TPOT 1 s
    config = BenchServeConfig(ttft_limit=1.0, tpot_limit=0.2)
    figures = serving.load_figures([quick, late, slow], 3.5, config)
    assert figures["tokens_per_s"] == round(9 / 3.5, 1)
    assert figures["requests_per_s"] == round(3 / 3.5, 2)
    assert figures["goodput_requests_per_s"] == round(1 / 3.5, 2)
    assert figures["ttft_ms"]["mean"] == 1000.0 and figures["ttft_ms"]["median"] == 500.0
    assert figures["tpot_ms"]["mean"] == 400.0
    assert figures["itl_ms"]["median"] == 400.0
    one_token = Completion(0.0, [Chunk(0.5, 1)])
    assert serving.load_figures([one_token], 1.0, config)["itl_ms"] is None


def test_chunks_of_a_stream():
    """Catches an event without tokens that counts as one, and a comment taken for an event."""
    event = b'data: {"choices": [{"token_ids": %s}]}\n'
    lines = [(1.0, b"HTTP/1.1 200 OK\r\n"), (2.0, event % b"[5, 6]"), (3.0, event % b"[]")]
    lines += [(4.0, b": ping\n"), (5.0, b"data: [DONE]\n")]
    assert serving.chunks_of(lines) == [Chunk(2.0, 2)]


def test_agreement():
    """Catches answers of one item compared with those of another, and a sign that hides a
    difference."""
    ours = [[(-1.0, True), (-2.0, False)], [(-3.0, False), (-4.0, False)]]
    theirs = [[(-1.25, True), (-2.0, False)], [(-3.5, False), (-3.25, True)]]
    assert evaluation.agreement(ours, theirs) == {"largest_difference": 0.75, "same_choice": 0.5}


def test_random_tokens(tmp_path):
    """Catches a token past the vocabulary, and a file too short for an update."""
    model = GPTConfig(vocab_size=65, block_size=8)
    config = TrainConfig(model=model, batch_size=3, gradient_accumulation_steps=2)
    training.write_random_tokens(tmp_path / "tokens.bin", config)
    tokens = np.fromfile(tmp_path / "tokens.bin", np.uint16)
    assert tokens.max() == 64 and len(tokens) > 2 * training.tokens_per_update(config)


def test_flops_utilization():
    """Catches a peak that stays in the report, or utilization of a device whose peak is not
    known."""
    model = GPTConfig()
    figures = {"ours": {"tokens_per_s": 1000, "peak_flops": 2000 * model.flops_per_token}}
    training.add_flops_utilization(figures, model)
    assert figures == {"ours": {"tokens_per_s": 1000, "mfu": 0.5}}
    figures = {"ours": {"tokens_per_s": 1000}}
    training.add_flops_utilization(figures, model)
    assert figures == {"ours": {"tokens_per_s": 1000}}


@pytest.mark.slow
def test_bench_generate():
    """Catches a bench whose last line is no JSON object, or lacks what the tables are made of."""
    model = "--n_layer=1 --n_embd=32 --n_head=2 --block_size=64".split()
    engine = "--max_num_seqs=2 --prefill_tokens=16 --kv_blocks=16".split()
    job = "--requests=3 --prompt_tokens 2 5 --output_tokens 2 5 --rounds=1".split()
    run = subprocess.run(
        [sys.executable, "bench.py", "generate", *model, *engine, *job]
        + ["--streams", "--peers", "products"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["bench"] == "generate" and report["ours"]["tokens_per_s"] > 0
    assert 0 < report["kv_utilization"] <= 1
    assert "ratio" not in report  # products is a limit, no peer
    assert sum(report["products"]["calls"].values()) > 0


@pytest.mark.parametrize("attention", ["cpu", "xla"])
def test_time_of_attention(attention, capsys):
    """Catches an implementation that cannot be timed, and the slowest called the best."""
    if attention == "cpu" and cpu_kernels.unavailable_because() is not None:
        pytest.skip(f"no native code: {cpu_kernels.unavailable_because()}")
    config = BenchKernelConfig(
        attention=attention,
        rows=(2,),
        context=20,
        n_head=4,
        n_kv_head=2,
        head_dim=16,
        page_sizes=(4, 8),
    )
    best = bench_kernel(config)["best"][2]
    printed = capsys.readouterr().out
    assert printed.count("page_size") == 2
    assert in_words(best) in printed


# The race to a loss.

LOG = """step 0: train loss 4.2000, val loss 4.3000
iter 0: loss 4.2, time 9000.00ms, mfu -100.00%
iter 1: loss 4.1, time 10.00ms, mfu -100.00%
iter 2: loss 4.0, time 30.00ms, mfu -100.00%
iter 3: loss 3.9, time 20.00ms, mfu -100.00%
step 4: train loss 3.1000, val loss 3.2000
iter 4: loss 3.0, time 8000.00ms, mfu 1.00%
"""


def test_nanogpts_evaluations_are_no_stepping(monkeypatch):
    """Catches the seconds of an evaluation counted as those of the update that comes after it, and
    the loss of the training split."""
    monkeypatch.setattr(speedrun, "NANOGPT_EVALS", 4)
    monkeypatch.setattr(speedrun, "NANOGPT_UPDATES", 4)
    assert read_curve(LOG) == [Point(0.0, 4.3), Point(pytest.approx(0.08), 3.2)]


def test_seconds_to_a_loss():
    """Catches the last point, or the one before the goal, and a run that never gets there."""
    curve = [Point(0.0, 4.0), Point(1.0, 2.1), Point(2.0, 1.9), Point(3.0, 1.95), Point(4.0, 1.8)]
    assert seconds_to(1.9, curve) == 2.0
    assert seconds_to(1.7, curve) == float("inf")


def test_a_goal_that_is_not_reached_is_no_number():
    """Catches Infinity in the report, which is no JSON, and a ratio to it."""
    slow = [Point(0.0, 4.0), Point(9.0, 2.0)]
    fast = [Point(0.0, 4.0), Point(3.0, 1.9)]
    reached = speedrun_figures([slow] * 3, [fast] * 3)
    assert reached["seconds"] == 3.0 and reached["ratio"] == 3.0
    missed = speedrun_figures([fast] * 3, [slow] * 3)
    assert missed["seconds"] is None and missed["ratio"] is None


def test_nanogpt_runs_as_it_is_but_for_its_seed(tmp_path):
    """Catches runs that all have one seed, and nanoGPT's model with GPT-2's vocabulary, which it
    takes where it finds no meta.pkl."""
    checkout = tmp_path / "nanoGPT"
    (checkout / "config").mkdir(parents=True)
    (checkout / "model.py").write_text("model")
    (checkout / "train.py").write_text("torch.manual_seed(1337 + seed_offset)")
    here = tmp_path / "here"
    here.mkdir()
    copy_nanogpt(checkout, here, seed=2)
    assert (here / "train.py").read_text() == "torch.manual_seed(1339 + seed_offset)"
    assert (here / "model.py").read_text() == "model"
    (checkout / "train.py").write_text("seedless")
    with pytest.raises(UserError, match="has no"):
        copy_nanogpt(checkout, tmp_path / "there", seed=2)
    data = tmp_path / "data"
    data.mkdir()
    write_letters(data)
    give_data(data, here / "data")
    meta = pickle.loads((here / "data" / "meta.pkl").read_bytes())
    assert meta == {"vocab_size": VOCAB_SIZE}
    assert (here / "data" / "val.bin").read_bytes() == (data / "val.bin").read_bytes()
