"""The heaviest requests a server allows, and who else notices them: python tests/heavy_load.py

16 clients send bodies of a megabyte, most of which are mistakes, and 8 ask for the largest answers
that are allowed, all from a process of their own. Meanwhile this process asks for /health, reads
streams, and looks at the server's memory. The last line is one JSON object with the worst of each;
the exit code tells if all stayed below the limits, see LIMITS. Start reading at heavy_load().
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

import soak
from heavy_requests import (
    NEW_TOKENS,
    Heavy,
    Limits,
    large_chats,
    large_completions,
    long_chats,
    long_completions,
)

BODY_CLIENTS = 16
ANSWER_CLIENTS = 8
STREAMS = 2
VOCABULARY = 300
PATIENCE = soak.PATIENCE
HEALTH_EVERY = 0.02  # seconds

LIMITS = {"worst_health_s": 0.5, "worst_stream_gap_s": 0.5, "memory_growth_mib": 600}
"""Of memory: 8 open answers of 50 MB, the requests, and what the allocator does not give back."""

CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
FLAGS = ["--max_waiting=512", "--max_num_seqs=16", "--kv_cache_memory=64MB"]


# Who sends it.


def run_heavy_clients(url: str, stop: Any, counts: Any) -> None:
    """Send all that is heavy until stop is set, from a process of its own.

    counts: a queue that gets the answers by status."""
    statuses: Counter = Counter()
    limits = Limits()
    long = [*long_completions(limits), *long_chats(limits)]
    large = [*large_completions(limits), *large_chats(limits)]

    def run_client(number: int, kind: str, heavy_requests: list[Heavy]) -> None:
        session = requests.Session()
        while not stop.is_set():
            path, body = heavy_requests[number % len(heavy_requests)]
            status = soak.send(session, url + path, body)
            statuses[f"{kind} {status}"] += 1
            number += 1

    threads = [
        threading.Thread(target=run_client, args=(number, kind, heavy_requests), daemon=True)
        for clients, kind, heavy_requests in (
            (BODY_CLIENTS, "long body", long),
            (ANSWER_CLIENTS, "large answer", large),
        )
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts.put(dict(statuses))


# Who notices.


class Worst:
    """The longest of the times that it is told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def note(self, seconds: float) -> None:
        """Keep the time if it is the longest."""
        self.seconds = max(self.seconds, seconds)


def watch_health(url: str, stop: threading.Event, worst: Worst) -> None:
    """Ask for /health again and again."""
    session = requests.Session()
    while not stop.wait(HEALTH_EVERY):
        begin = time.perf_counter()
        status = session.get(f"{url}/health", timeout=PATIENCE).status_code
        assert status == 200, status
        worst.note(time.perf_counter() - begin)


def watch_stream(url: str, stop: threading.Event, worst: Worst) -> None:
    """Read one stream after the other, and note the gaps between the pieces of each."""
    body = {
        "prompt": "the",
        "max_tokens": Limits().context - NEW_TOKENS,
        "stream": True,
        "ignore_eos": True,
    }
    while not stop.is_set():
        with requests.post(
            f"{url}/v1/completions", json=body, stream=True, timeout=PATIENCE
        ) as response:
            assert response.status_code == 200, response.text
            for gap in gaps_between(response.iter_content(None)):
                worst.note(gap)
                if stop.is_set():
                    break


def gaps_between(pieces: Iterator[bytes]) -> Iterator[float]:
    """Yield the seconds between the arrivals of pieces."""
    last = None
    for _ in pieces:
        now = time.perf_counter()
        if last is not None:
            yield now - last
        last = now


def watch_memory(memory: Callable[[], int], stop: threading.Event, peak: Worst) -> None:
    """Look at the server's memory, in bytes."""
    while not stop.wait(HEALTH_EVERY):
        peak.note(memory())


def heavy_load(url: str, seconds: float, memory: Callable[[], int]) -> dict:
    """Load a server, and return the worst that others saw meanwhile."""
    context = multiprocessing.get_context("spawn")
    stop_clients = context.Event()
    counts = context.Queue()
    clients = context.Process(target=run_heavy_clients, args=(url, stop_clients, counts))
    stop = threading.Event()
    health, gap, peak = Worst(), Worst(), Worst()
    watchers = [
        threading.Thread(target=watch_health, args=(url, stop, health)),
        threading.Thread(target=watch_memory, args=(memory, stop, peak)),
        *(threading.Thread(target=watch_stream, args=(url, stop, gap)) for _ in range(STREAMS)),
    ]
    memory_before = memory()
    for watcher in watchers:
        watcher.start()
    clients.start()
    time.sleep(seconds)
    stop_clients.set()
    statuses = counts.get(timeout=PATIENCE)
    clients.join()
    stop.set()
    for watcher in watchers:
        watcher.join(PATIENCE)
    soak.wait_until_empty(url)
    return {
        "answers": statuses,
        "worst_health_s": round(health.seconds, 3),
        "worst_stream_gap_s": round(gap.seconds, 3),
        "memory_before_mib": memory_before >> 20,
        "peak_memory_mib": int(peak.seconds) >> 20,
        "memory_growth_mib": (int(peak.seconds) - memory_before) >> 20,
    }


# The server.


def make_model(directory: Path) -> Path:
    """Write a small random model with a byte-level tokenizer and a chat template."""
    sys.path.insert(0, str(soak.ROOT))
    import tokenizers
    from flax import nnx

    from config import GPTConfig
    from model import GPT

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["the naive approach is the naive one"],
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    config = GPTConfig(
        block_size=Limits().context, vocab_size=bpe.get_vocab_size(), n_layer=2, n_head=2, n_embd=32
    )
    GPT(config, rngs=nnx.Rngs(0)).save_pretrained(directory)
    bpe.save_model(str(directory))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def main() -> None:
    """Start a server, load it, judge it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--init_from", help="model directory (default: a tiny random one)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = flags.init_from or make_model(Path(directory) / "tiny")
        with soak.server_process(model, FLAGS) as (process, url):
            report = heavy_load(url, flags.seconds, lambda: soak.memory_of(process.pid))
    print(json.dumps(report))
    sys.exit(any(report[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    main()
