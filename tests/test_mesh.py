"""Training over many devices and processes.

What needs 8 devices is in on_eight_devices.py, which is run here with an environment of its own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import flash_attention, save_activations
from training.processes import processes_in_environment

pytestmark = pytest.mark.slow

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
    # What Llama has and GPT-2 has not.
    "--norm=rmsnorm",
    "--positions=rotary",
    "--mlp=gated",
    "--activation=silu",
    "--n_kv_head=1",
    "--tied_head=False",
]


@pytest.mark.parametrize("file", ["on_eight_devices.py", "engine_on_eight_devices.py"])
def test_on_eight_devices(file):
    """Runs the file; its own report is shown if a test of it fails."""
    environment = {  # see mesh.simulate_cpu_devices
        **FAST,
        "JAX_NUM_CPU_DEVICES": "8",
        "NPROC": "16",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/{file}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_cudnn_attention_is_not_computed_again(monkeypatch):
    """Catches a policy that does not know the primitive of cuDNN's attention: under fsdp the
    backward pass would run the whole attention a second time. Nothing is run here, only traced."""
    cudnn = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{cudnn}.check_cudnn_version", lambda: 91100)
    qkv = jnp.ones((2, 64, 3, 64))

    def attention_sum(x):
        return flash_attention(x, x, x, "bfloat16").sum()

    def gradient_with(policy) -> str:
        return str(jax.make_jaxpr(jax.grad(jax.checkpoint(attention_sum, policy=policy)))(qkv))

    forward = "= dot_product_attention_fwd_wrapper["
    assert gradient_with(save_activations).count(forward) == 1
    nothing_saved = gradient_with(jax.checkpoint_policies.nothing_saveable)
    assert nothing_saved.count(forward) == 2


def training(data_dir: Path, out_dir: Path, *flags: str) -> list[str]:
    """Return the command that trains on data_dir."""
    paths = [f"--data_dir={data_dir}", f"--out_dir={out_dir}"]
    return [sys.executable, "train.py", "shakespeare_char_cpu", *paths, *FLAGS, *flags]


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def coordinator_flags(port: int, processes: int, index: int) -> list[str]:
    """Return the flags that tell a process of the others."""
    return [
        f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={processes}",
        f"--process_id={index}",
    ]


def slurm_environment(port: int, processes: int, index: int) -> dict[str, str]:
    """Return what a SLURM step tells a process of the others."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_STEP_NUM_TASKS": str(processes),
        "JAX_COORDINATOR_PORT": str(port),
    }


@pytest.mark.parametrize(
    "environment, processes",
    [
        ({}, 1),
        ({"SLURM_STEP_NUM_TASKS": "16"}, 16),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1,host-2,host-3"}, 4),
    ],
)
def test_processes_in_the_environment(environment, processes, monkeypatch):
    """Catches a cluster whose processes would each train a run of its own."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes_in_environment() == processes


def start(
    data_dir: Path, out_dir: Path, processes: int, slurm: bool = False
) -> list[subprocess.Popen]:
    """Start a run on a mesh of 4 CPU devices in one or more processes, which ends at step 60.

    Processes know of each other by flags, or as in a SLURM step. Process i prints to a file,
    log_of(out_dir, i)."""
    port = free_port()
    command = training(data_dir, out_dir, "--mesh=data:2,fsdp:2")
    started = []
    for i in range(processes):
        flags = coordinator_flags(port, processes, i) if processes > 1 and not slurm else []
        environment = slurm_environment(port, processes, i) if slurm else {}
        with log_of(out_dir, i).open("w") as log:
            process = subprocess.Popen(
                [*command, *flags],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**FAST, **environment},
            )
        started.append(process)
    return started


def log_of(out_dir: Path, process: int) -> Path:
    """Return the file that a process of start() prints to."""
    return Path(f"{out_dir}.{process}.log")


def losses(out_dir: Path) -> dict[int, float]:
    """Return what metrics.jsonl has: step -> loss."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def wait_for_step(out_dir: Path, step: int, processes: list[subprocess.Popen]) -> None:
    """Return when the run of these processes has logged this step."""
    while not (out_dir / "metrics.jsonl").exists() or step not in losses(out_dir):
        for i, process in enumerate(processes):
            assert process.poll() is None, log_of(out_dir, i).read_text()
        time.sleep(0.05)  # nothing to wait on: the file of another process is polled


def exit_codes(processes: list[subprocess.Popen]) -> list[int]:
    """Wait for processes to end, and return their exit codes."""
    return [process.wait(timeout=300) for process in processes]


def test_two_processes_killed_stopped_and_moved_to_one(data_dir, tmp_path):
    """Catches processes that read the same rows, that write each other's log or config, that do not
    stop together, that wait forever for a dead one, checkpoints that hold one process's shards only
    or that only two processes can read, and a library's warnings among what a run prints."""
    alone = tmp_path / "alone"
    together = tmp_path / "together"
    undisturbed = start(data_dir, alone, 1)

    pair = start(data_dir, together, 2)
    wait_for_step(together, 23, pair)
    pair[0].kill()
    assert exit_codes(pair)[1] != 0
    assert "another task died" in log_of(together, 1).read_text()

    pair = start(data_dir, together, 2, slurm=True)
    wait_for_step(together, 42, pair)
    pair[1].send_signal(signal.SIGTERM)  # the other one does not hear it
    assert exit_codes(pair) == [143, 143]
    stopped = max(losses(together))
    printed = log_of(together, 0).read_text()
    assert 42 <= stopped < 60
    assert f"saved at step {stopped}" in printed
    assert "WARNING" not in printed

    assert exit_codes(start(data_dir, together, 1)) == [0]
    assert exit_codes(undisturbed) == [0]
    moved = losses(together)
    whole = losses(alone)
    assert list(moved) == list(whole) == list(range(1, 61))
    np.testing.assert_allclose(list(moved.values()), list(whole.values()), rtol=1e-5)
    assert "WARNING" not in log_of(alone, 0).read_text()


def test_a_dry_run_leaves_nothing_behind(tmp_path):
    """Catches a dry run that trains, needs data, or makes files; and a mesh larger than what can be
    simulated."""
    model = FLAGS[:4]

    def dry_run(mesh: str) -> subprocess.CompletedProcess:
        flags = [*model, "--batch_size=4096", "--dry_run", f"--mesh={mesh}"]
        return subprocess.run(
            [sys.executable, ROOT / "train.py", "shakespeare_char_cpu", *flags],
            cwd=tmp_path,
            env=FAST,
            capture_output=True,
            text=True,
            timeout=120,
        )

    small = dry_run("data:2,fsdp:4")
    large = dry_run("data:128,fsdp:32")
    assert small.returncode == large.returncode == 0, small.stderr + large.stderr
    assert "1 / 3." in small.stdout
    assert "all-gather" in small.stdout
    assert "4096 devices" in large.stdout
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
        training(data_dir, tmp_path / "out", *flags),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "out").exists()
