"""Training over many devices and processes. What needs 8 devices is in on_eight_devices.py, run here with its own environment."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_on_eight_devices():
    """Runs on_eight_devices.py; its own report is shown if a test of it fails."""
    # XLA need not optimise programs that run five times; NPROC: see utils.use_cpu_cores.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "NPROC": "16", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/on_eight_devices.py"], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
