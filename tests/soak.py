"""Mixed load on one server process for as long as you like: python tests/soak.py --minutes=30

Whole and streamed requests, mistakes, clients that leave early, readers that stop reading, and now
and then one of the heaviest requests there are, from 32 threads at once. At the end: no 5xx, all
pages free, memory flat, throughput steady. The last line is one JSON object, the exit code tells if
all held. tests/test_serving_load.py runs it for a few seconds in its own process. Start reading at
soak().
"""

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import requests

from heavy_requests import Heavy, Limits, large_completions, long_completions

ROOT = Path(__file__).parents[1]
TIMEOUT = 60  # seconds that one answer may take
PATIENCE = 300  # seconds that the answer to a heavy request may take
DRAINED_WITHIN = 30  # seconds after the load until all pages must be free
MAX_GROWTH_MIB = 32  # of the server's memory, after the first tenth of the time
MIN_THROUGHPUT_RATIO = 0.8  # second half over first half
CONTEXT = 128  # tokens
SMALL_ENGINE = ["--kv_blocks=129", "--page_size=8", "--prefill_tokens=64", "--max_num_seqs=8"]
KINDS = ["whole", "stream", "mistake", "leave"] * 4 + ["stuck"] * 2 + ["heavy"]
MISTAKES = [
    {"prompt": "a", "top_p": 2},
    {"prompt": "a", "x": 1},
    {"prompt": 1},
    {"prompt": "a", "max_tokens": 10**6},
    {"prompt": []},
]


class Client:
    """One client after another, of random kinds, with random requests."""

    def __init__(
        self,
        url: str,
        seed: int,
        stop: threading.Event,
        counts: Counter,
        heavy_requests: list[Heavy],
    ) -> None:
        """counts: answers by status (or kind, of those who read none), and tokens."""
        self.url = url
        self.random = random.Random(seed)
        self.stop = stop
        self.counts = counts
        self.heavy_requests = heavy_requests
        self.session = requests.Session()

    def run(self) -> None:
        """Go on until stop. Raises AssertionError for an answer that is nonsense."""
        while not self.stop.is_set():
            kind = self.random.choice(KINDS)
            if kind == "mistake":
                status = self.make_mistake()
            elif kind in ("leave", "stuck"):
                self.leave(longest_stay=0.05 if kind == "leave" else 1)
                status = kind
            elif kind == "stream":
                status = self.read_stream()
            elif kind == "heavy":
                path, body = self.random.choice(self.heavy_requests)
                status = send(self.session, self.url + path, body)
            else:
                status = self.read_whole()
            self.counts[status] += 1

    def body(self) -> dict:
        """Return a random request."""
        return {
            "prompt": "".join(self.random.choices("abcdef ", k=self.random.randint(1, 60))),
            "max_tokens": self.random.randint(1, 60),
            "n": self.random.choice([1, 1, 1, 3]),
            "temperature": self.random.choice([0, 1]),
            "logprobs": self.random.choice([None, 5]),
            "stop": self.random.choice([None, ["e", "ab"]]),
        }

    def post(self, body: dict) -> requests.Response:
        """Send a request and read its answer."""
        return self.session.post(f"{self.url}/v1/completions", json=body, timeout=TIMEOUT)

    def make_mistake(self) -> int:
        """Send one of MISTAKES."""
        status = self.post(self.random.choice(MISTAKES)).status_code
        assert status in (400, 429), status  # the second if the queue is full
        return status

    def leave(self, longest_stay: float) -> None:
        """Send a request, stay a random time without reading, and go."""
        data = json.dumps(self.body() | {"stream": self.random.choice([False, True])}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        address = urlsplit(self.url)
        with socket.create_connection((address.hostname, address.port), timeout=TIMEOUT) as client:
            client.sendall(head.encode() + data)
            self.stop.wait(self.random.random() * longest_stay)

    def read_stream(self) -> int:
        """Read a streamed answer, which must be whole."""
        response = self.post(self.body() | {"stream": True})
        if response.status_code == 200:
            assert response.text.endswith("data: [DONE]\n\n"), response.text[-200:]
        return response.status_code

    def read_whole(self) -> int:
        """Read a whole answer and count its tokens."""
        response = self.post(self.body())
        if response.status_code == 200:
            self.counts["tokens"] += response.json()["usage"]["completion_tokens"]
        return response.status_code


def send(session: requests.Session, url: str, body: str) -> int:
    """Send a body and read the answer, which must be whole, without keeping it."""
    headers = {"Content-Type": "application/json"}
    last = b""
    with session.post(url, data=body, headers=headers, stream=True, timeout=PATIENCE) as response:
        for piece in response.iter_content(1 << 16):
            last = piece
    assert last.rstrip().endswith((b"}", b"[DONE]")), last[-100:]
    return response.status_code


def soak(
    url: str,
    seconds: float,
    memory: Callable[[], int],
    limits: Limits,
    clients: int = 32,
    looks: int = 10,
) -> dict:
    """Load a server and return what was seen; afterwards all its pages must be free.

    memory() returns the bytes of the server's process. looks: how many times throughput and memory
    are looked at. `failed` holds what clients met that was nonsense."""
    heavy_requests = [*long_completions(limits), *large_completions(limits)]
    stop = threading.Event()
    counts: Counter = Counter()
    failed: list[str] = []

    def run_client(seed: int) -> None:
        try:
            Client(url, seed, stop, counts, heavy_requests).run()
        except Exception as error:
            failed.append(repr(error))

    threads = [threading.Thread(target=run_client, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    seen = [look(url, seconds / looks, stop, memory) for _ in range(looks)]
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT)
    wait_until_empty(url)
    answers = {str(status): count for status, count in counts.items()}
    return {"answers": answers, "failed": failed, "seen": seen}


def look(url: str, seconds: float, stop: threading.Event, memory: Callable[[], int]) -> dict:
    """Return the throughput of the coming seconds, and the memory after them."""
    before = metric(url, "generation_tokens_total")
    begin = time.monotonic()
    stop.wait(seconds)
    generated = metric(url, "generation_tokens_total") - before
    rate = generated / (time.monotonic() - begin)
    return {"tokens_per_s": round(rate), "memory_mib": memory() >> 20}


def metric(url: str, name: str) -> float:
    """Return one of the server's metrics."""
    lines = requests.get(f"{url}/metrics", timeout=TIMEOUT).text.splitlines()
    matching = [line for line in lines if line.startswith(f"vllm:{name}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in matching)


def wait_until_empty(url: str) -> None:
    """Wait until nothing runs, nothing waits, and no page is held."""
    end = time.monotonic() + DRAINED_WITHIN
    gauges = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
    while any(metric(url, gauge) for gauge in gauges):
        assert time.monotonic() < end, f"{DRAINED_WITHIN} s after the load, pages are held still"
        time.sleep(0.05)


def main() -> None:
    """Start a server, load it, judge it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--init_from", help="model directory (default: a tiny random one)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = flags.init_from or make_tiny_model(Path(directory) / "tiny")
        report = soak_process(model, flags.minutes * 60)
    holds = judge(report)
    print(json.dumps(report))
    sys.exit(not holds)


def soak_process(model: str | Path, seconds: float) -> dict:
    """Start a server.py with this model, load it, end it. Returns what was seen."""
    with server_process(model, ["--max_waiting=64", *SMALL_ENGINE]) as (process, url):
        limits = Limits(context=CONTEXT)
        report = soak(url, seconds, lambda: memory_of(process.pid), limits)
    return report | {"exit_code": process.returncode}


@contextlib.contextmanager
def server_process(model: str | Path, flags: list[str]) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start a server.py with this model, and wait until it is warm; end it afterwards."""
    command = [sys.executable, "server.py", f"--init_from={model}", "--port=0"]
    command += ["--log_format=json", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        url = next(json.loads(line)["url"] for line in process.stderr if '"serving' in line)
        threading.Thread(target=print_errors, args=(process.stderr,), daemon=True).start()
        while requests.get(f"{url}/health", timeout=TIMEOUT).status_code != 200:
            time.sleep(0.2)
        yield process, url
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def print_errors(log: IO[str]) -> None:
    """Print the errors in the server's log; the rest must be read, too, or the pipe is full."""
    for line in log:
        if '"ERROR"' in line:
            print(line, end="")


def memory_of(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    resident_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def judge(report: dict) -> bool:
    """Add the figures that count to the report, and return whether all held."""
    seen = report["seen"]
    half = len(seen) // 2
    first_half = sum(look["tokens_per_s"] for look in seen[:half]) / half
    second_half = sum(look["tokens_per_s"] for look in seen[half:]) / (len(seen) - half)
    report["memory_growth_mib"] = seen[-1]["memory_mib"] - seen[1]["memory_mib"]
    report["throughput_ratio"] = round(second_half / first_half, 3)
    server_errors = [status for status in report["answers"] if status.startswith("5")]
    return (
        not report["failed"]
        and not server_errors
        and report["exit_code"] == 0
        and report["memory_growth_mib"] < MAX_GROWTH_MIB
        and report["throughput_ratio"] > MIN_THROUGHPUT_RATIO
    )


def make_tiny_model(directory: Path) -> Path:
    """Write a tiny random model and its tokenizer."""
    sys.path.insert(0, str(ROOT))
    from flax import nnx

    from config import GPTConfig
    from model import GPT
    from tokenizer import CharTokenizer

    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz 0123456789")
    config = GPTConfig(
        block_size=CONTEXT, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32
    )
    GPT(config, rngs=nnx.Rngs(0)).save_pretrained(directory, tokenizer)
    return directory


if __name__ == "__main__":
    main()
