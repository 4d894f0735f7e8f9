"""Peers with interpreters of their own: vLLM and llama.cpp as contenders of bench.py generate.

Neither fits into this project's environment. Each runs a worker, vllm_worker.py or
llama_cpp_worker.py, under the interpreter that the user names, on the same random weights.
A unit of work is the whole job.
"""

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contender import Contender
from benchmarks.workload import Request
from config import GPTConfig

WORKERS = Path(__file__).parent


class WorkerProcess(Contender):
    """A script under another interpreter that does a job whenever it is asked to.

    It reads one line of JSON, {"model": directory, "requests": [[prompt, output tokens], ...]} and
    more, answers READY, and then DONE for each line that it is sent."""

    def __init__(self, python: Path, script: str, model: GPTConfig, requests: list[Request], **job):
        """Start the script on a model of random weights, which it reads as transformers writes it.

        job: what else the script is to know."""
        self.script = script
        self.directory = tempfile.TemporaryDirectory()  # deleted when this process ends
        job |= {
            "model": str(save_random_model(model, Path(self.directory.name))),
            "requests": requests,
        }
        self.process = subprocess.Popen(
            [python, "-P", WORKERS / script],  # -P: what lies beside it is no module of the peer
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._send(json.dumps(job))

    def warm_up(self) -> None:
        """Wait until the model is loaded, and do the job once."""
        self._expect("READY")
        self.run(1)

    def run(self, n: int) -> None:
        """Do the job n times."""
        for _ in range(n):
            self._send("run")
            self._expect("DONE")

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _expect says why
            print(line, file=self.process.stdin, flush=True)

    def _expect(self, answer: str) -> None:
        """Wait for an answer. Raises RuntimeError with the worker's last words if it has ended."""
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline().strip()
        if line != answer:
            words = self.process.stderr.read()[-2000:]
            raise RuntimeError(f"{self.script} did not say {answer}, but {line!r}: {words}")


def save_random_model(config: GPTConfig, directory: Path) -> Path:
    """Write a GPT with the random weights that the engine's contender has; return where."""
    from flax import nnx

    from model import GPT

    path = directory / "model"
    GPT(config, rngs=nnx.Rngs(0)).save_pretrained(path)
    return path


def vllm(
    python: Path, model: GPTConfig, requests: list[Request], max_num_seqs: int
) -> WorkerProcess:
    """Return vLLM, in the model's dtype, with at most so many sequences at once."""
    return WorkerProcess(
        python,
        "vllm_worker.py",
        model,
        requests,
        dtype=model.dtype,
        max_model_len=model.block_size,
        max_num_seqs=max_num_seqs,
    )


def llama_cpp(
    python: Path, model: GPTConfig, requests: list[Request], max_num_seqs: int, weights: str
) -> WorkerProcess:
    """Return llama.cpp with these weights, a name that gguf knows, such as float32 or q8_0."""
    settings: dict[str, Any] = {"weights": weights, "max_num_seqs": max_num_seqs}
    return WorkerProcess(python, "llama_cpp_worker.py", model, requests, **settings)
