"""Training over many devices and processes. What needs 8 devices is in on_eight_devices.py, run here with its own environment."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# XLA need not optimise programs that run a few times.
FAST = {
    **os.environ,
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
FLAGS = [
    "--block_size=16",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--batch_size=8",
    "--max_iters=60",
    "--dropout=0.2",
    "--dtype=float32",
    "--eval_interval=20",
    "--eval_iters=2",
    "--log_interval=1",
    "--warmup_iters=5",
    "--tensorboard=False",
    "--init_from=resume",
]


def test_on_eight_devices():
    """Runs on_eight_devices.py; its own report is shown if a test of it fails."""
    environment = {
        **FAST,
        "JAX_NUM_CPU_DEVICES": "8",
        "NPROC": "16",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
    }  # see mesh.use_cpu_cores
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/on_eight_devices.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """3,000 training tokens and 501 for validation, of 23 letters."""
    directory = tmp_path_factory.mktemp("data")
    ids = np.cumsum(np.random.default_rng(0).integers(1, 4, size=3501)) % 23
    ids[:3000].astype(np.uint16).tofile(directory / "train.bin")
    ids[3000:].astype(np.uint16).tofile(directory / "val.bin")
    meta = {
        "tokenizer": "char",
        "chars": "".join(map(chr, range(97, 97 + 23))),
        "vocab_size": 23,
        "dtype": "uint16",
    }
    (directory / "meta.json").write_text(json.dumps(meta))
    return directory


def start(
    data_dir: Path, out_dir: Path, processes: int, slurm: bool = False
) -> list[subprocess.Popen]:
    """A run on a mesh of 4 CPU devices in one or more processes, which end at step 60 and know of each other by flags or as in a
    SLURM step."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        "train.py",
        "shakespeare_char_cpu",
        f"--data_dir={data_dir}",
        f"--out_dir={out_dir}",
        *FLAGS,
        "--mesh=data:2,fsdp:2",
    ]
    flags = lambda i: [
        f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={processes}",
        f"--process_id={i}",
    ]
    step = lambda i: {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
        "SLURM_STEP_NUM_TASKS": str(processes),
        "JAX_COORDINATOR_PORT": str(port),
    }
    return [
        subprocess.Popen(
            command + (flags(i) if processes > 1 and not slurm else []),
            cwd=ROOT,
            stderr=subprocess.STDOUT,
            env={**FAST, **(step(i) if slurm else {})},
            stdout=open(f"{out_dir}.{i}.log", "w"),
        )
        for i in range(processes)
    ]


def log(out_dir: Path) -> dict[int, float]:
    """Step -> loss."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def at_step(out_dir: Path, step: int) -> None:
    while not (out_dir / "metrics.jsonl").exists() or step not in log(out_dir):
        time.sleep(0.05)  # nothing to wait on: the file of another process is polled


def wait(processes: list[subprocess.Popen]) -> list[int]:
    return [process.wait(timeout=300) for process in processes]


def test_two_processes_killed_stopped_and_moved_to_one(data_dir, tmp_path):
    """Catches processes that read the same rows, that write each other's log or config, that do not stop together, that wait
    forever for a dead one, checkpoints that hold one process's shards only or that only two processes can read."""
    alone, out_dir = tmp_path / "alone", tmp_path / "together"
    undisturbed = start(data_dir, alone, 1)

    pair = start(data_dir, out_dir, 2)
    at_step(out_dir, 23)
    pair[0].kill()
    assert wait(pair)[1] != 0
    assert "another task died" in Path(f"{out_dir}.1.log").read_text()

    pair = start(data_dir, out_dir, 2, slurm=True)
    at_step(out_dir, 42)
    pair[1].send_signal(signal.SIGTERM)  # the other one does not hear it
    assert wait(pair) == [143, 143]
    stopped = max(log(out_dir))
    assert 42 <= stopped < 60 and f"saved at step {stopped}" in Path(f"{out_dir}.0.log").read_text()

    assert wait(start(data_dir, out_dir, 1)) == wait(undisturbed) == [0]
    moved, whole = log(out_dir), log(alone)
    assert list(moved) == list(whole) == list(range(1, 61))
    np.testing.assert_allclose(list(moved.values()), list(whole.values()), rtol=1e-5)


def test_a_dry_run_leaves_nothing_behind(tmp_path):
    """Catches a dry run that trains, needs data, or makes files; and a mesh larger than what can be simulated."""
    command = [
        sys.executable,
        ROOT / "train.py",
        "shakespeare_char_cpu",
        *FLAGS[:4],
        "--batch_size=4096",
        "--dry_run",
    ]
    small, large = (
        subprocess.run(
            [*command, f"--mesh={mesh}"],
            cwd=tmp_path,
            env=FAST,
            capture_output=True,
            text=True,
            timeout=120,
        )
        for mesh in ("data:2,fsdp:4", "data:128,fsdp:32")
    )
    assert small.returncode == large.returncode == 0, small.stderr + large.stderr
    assert (
        "1 / 3." in small.stdout and "all-gather" in small.stdout and "4096 devices" in large.stdout
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--mesh=data:2,tensor:4"], ["n_head=2", "4"]),
        (["--process_id=1"], ["coordinator_address", "num_processes"]),
        (["--mesh=data:3", "--dry_run"], ["batch_size=8", "3"]),
    ],
)
def test_mistakes_are_one_sentence(data_dir, tmp_path, flags, words):
    """Catches a traceback, or an output directory, where the mesh does not fit."""
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            "shakespeare_char_cpu",
            f"--data_dir={data_dir}",
            f"--out_dir={tmp_path / 'out'}",
            *FLAGS,
            *flags,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words) and not (tmp_path / "out").exists()
