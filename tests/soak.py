"""Mixed load on one server process for as long as you like: python tests/soak.py --minutes=30

Whole and streamed requests, mistakes, clients that leave early and readers that stop reading, from 32 threads at once. At the
end: no 5xx, all pages free, memory flat, throughput steady. The last line is one JSON object, the exit code tells if all held.
tests/test_server.py runs it for a few seconds in its own process.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import requests

ROOT = Path(__file__).parents[1]
MISTAKES = [
    {"prompt": "a", "top_p": 2},
    {"prompt": "a", "x": 1},
    {"prompt": 1},
    {"prompt": "a", "max_tokens": 10**6},
    {"prompt": []},
]


def client(url: str, seed: int, stop: threading.Event, counts: Counter) -> None:
    """One client after another, of random kinds, until stop. Counts answers by status, and tokens."""
    draw, session = random.Random(seed), requests.Session()
    host, port = url.removeprefix("http://").split(":")
    while not stop.is_set():
        body = {
            "prompt": "".join(draw.choices("abcdef ", k=draw.randint(1, 60))),
            "max_tokens": draw.randint(1, 60),
            "n": draw.choice([1, 1, 1, 3]),
            "temperature": draw.choice([0, 1]),
            "logprobs": draw.choice([None, 5]),
            "stop": draw.choice([None, ["e", "ab"]]),
        }
        kind = draw.choice(
            ["whole", "whole", "stream", "stream", "mistake", "leave", "leave", "stuck"]
        )
        if kind == "mistake":
            status = session.post(
                f"{url}/v1/completions", json=draw.choice(MISTAKES), timeout=60
            ).status_code
            assert status == 400, status
        elif kind in ("leave", "stuck"):
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                data = json.dumps(body | {"stream": draw.choice([False, True])}).encode()
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
                )
                stop.wait(draw.random() * (0.05 if kind == "leave" else 1))
            status = kind
        else:
            with session.post(
                f"{url}/v1/completions", json=body | {"stream": kind == "stream"}, timeout=60
            ) as response:
                status = response.status_code
                if status == 200 and kind == "stream":
                    assert response.text.endswith("data: [DONE]\n\n"), response.text[-200:]
                elif status == 200:
                    counts["tokens"] += response.json()["usage"]["completion_tokens"]
        counts[status] += 1


def metric(url: str, name: str) -> float:
    lines = requests.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{"))


def soak(url: str, seconds: float, memory, clients: int = 32, looks: int = 10) -> dict:
    """memory() -> bytes of the server's process. Returns what was seen; a client that meets nonsense raises."""
    stop, counts, failed, seen = threading.Event(), Counter(), [], []

    def run(seed: int) -> None:
        try:
            client(url, seed, stop, counts)
        except Exception as e:
            failed.append(repr(e))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for _ in range(looks):
        generated, begin = metric(url, "generation_tokens_total"), time.monotonic()
        stop.wait(seconds / looks)
        rate = (metric(url, "generation_tokens_total") - generated) / (time.monotonic() - begin)
        seen.append({"tokens_per_s": round(rate), "memory_mib": memory() >> 20})
    stop.set()
    for thread in threads:
        thread.join(60)
    end = time.monotonic() + 30
    while (
        metric(url, "kv_cache_usage_perc")
        + metric(url, "num_requests_running")
        + metric(url, "num_requests_waiting")
    ):
        assert time.monotonic() < end, "30 s after the load, pages are held still"
        time.sleep(0.05)
    return {"answers": {str(k): n for k, n in counts.items()}, "failed": failed, "seen": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--init_from", help="model directory (default: a tiny random one)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = flags.init_from or tiny(Path(directory) / "tiny")
        small = [
            "--port=0",
            "--kv_blocks=129",
            "--page_size=8",
            "--prefill_tokens=64",
            "--max_num_seqs=8",
            "--max_waiting=64",
        ]
        command = [sys.executable, "server.py", f"--init_from={model}", *small]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            url = next(
                json.loads(line)["event"].rsplit(" ", 1)[1]
                for line in process.stderr
                if '"serving' in line
            )
            errors = (line for line in process.stderr if '"ERROR"' in line)
            threading.Thread(
                target=lambda: [print(line, end="") for line in errors], daemon=True
            ).start()
            while requests.get(f"{url}/health", timeout=60).status_code != 200:
                time.sleep(0.2)
            report = soak(
                url,
                flags.minutes * 60,
                lambda: int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096,
            )
        finally:
            process.terminate()
            report_code = process.wait(60)
    seen = report["seen"]
    half = len(seen) // 2
    mean = lambda key, part: sum(s[key] for s in part) / len(part)
    report["memory_growth_mib"] = (
        seen[-1]["memory_mib"] - seen[1]["memory_mib"]
    )  # after the first tenth
    report["throughput_ratio"] = round(
        mean("tokens_per_s", seen[half:]) / mean("tokens_per_s", seen[:half]), 3
    )
    report["exit_code"] = report_code
    good = (
        not report["failed"]
        and report_code == 0
        and not any(code.startswith("5") for code in report["answers"])
    )
    print(json.dumps(report))
    sys.exit(not (good and report["memory_growth_mib"] < 32 and report["throughput_ratio"] > 0.8))


def tiny(directory: Path) -> Path:
    sys.path.insert(0, str(ROOT))
    from flax import nnx

    from config import GPTConfig
    from model import GPT
    from tokenizer import CharTokenizer

    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz 0123456789")
    config = GPTConfig(
        block_size=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32
    )
    GPT(config, rngs=nnx.Rngs(0)).save_pretrained(directory, tokenizer)
    return directory


if __name__ == "__main__":
    main()
