"""DOC"""

import asyncio
import dataclasses
import json
import math
import os
import statistics
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.contender import Contender, require_ranges
from config import EngineConfig, ModelConfig
from errors import require


@dataclass(frozen=True)
class BenchServeConfig:
    """Latency and throughput of a running server under open-loop load, and what HTTP costs over the engine alone."""

    url: str = "http://127.0.0.1:8000"
    """of the server; its API key, if it has one, is read from NANOGPT_API_KEY"""
    rates: tuple[float, ...] = (1, 2, 4, 8)
    """requests per second, separated by spaces; they arrive as a Poisson process, whatever the server does; inf: all at once"""
    requests: int = 64
    """requests at each rate; prompts and outputs have random lengths"""
    prompt_tokens: tuple[int, int] = (16, 128)
    """fewest and most tokens of a prompt"""
    output_tokens: tuple[int, int] = (16, 128)
    """fewest and most tokens of an output"""
    ttft_limit: float = 1.0
    """seconds to the first token, and"""
    tpot_limit: float = 0.1
    """seconds per token after it, that a good request takes at most; goodput counts those"""
    seed: int = 1337
    """of the lengths, the tokens and the arrivals"""
    plot: Path = Path("serve.png")
    """latency against load is drawn here"""
    out_dir: Path | None = None
    """the model that the server serves, or"""
    init_from: str | None = None
    """its name or directory: to run the same requests, all at once, on an engine without HTTP, in turns with the server"""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = EngineConfig()
    rounds: int = 3
    """turns of server and engine; medians count"""

    def __post_init__(self):
        require(self.rates and min(self.rates) > 0, "rates must be positive")
        require(
            self.out_dir is None or self.init_from is None,
            "name the server's model by out_dir or by init_from, not both",
        )
        require(
            self.requests >= 1 and self.rounds >= 1,
            f"requests={self.requests} and rounds={self.rounds} must be at least 1",
        )
        require_ranges(self, "prompt_tokens", "output_tokens")


def serve_requests(config: BenchServeConfig) -> list[dict]:
    """The bodies of the requests. Their lengths go by the seed, their tokens are new each time: no prefix is in the cache."""
    lengths, tokens = np.random.default_rng(config.seed), np.random.default_rng()
    draw = lambda low_high: int(lengths.integers(*low_high, endpoint=True))
    return [
        {
            "prompt": tokens.integers(
                50, size=draw(config.prompt_tokens)
            ).tolist(),  # every vocabulary has 50 tokens
            "max_tokens": draw(config.output_tokens),
            "ignore_eos": True,
            "seed": i,
        }
        for i in range(config.requests)
    ]


async def stream(url: urllib.parse.SplitResult, body: dict) -> list[tuple[float, int]]:
    """When tokens of a streamed completion arrived (time.perf_counter()), and how many; empty if the queue was full.

    Plain sockets: a client library would take CPU time from a server on the same machine."""
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=2**20)
    data = json.dumps(body | {"stream": True, "return_token_ids": True}).encode()
    key = os.environ.get("NANOGPT_API_KEY", "")
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    lines = [(time.perf_counter(), line) async for line in reader]
    writer.close()
    status, whole = int(lines[0][1].split()[1]), [line for _, line in lines]
    require(
        status == 429 or (status == 200 and b"data: [DONE]\n" in whole),
        f"{url.geturl()} answered {whole[-1].decode()}",
    )
    events = [(at, json.loads(line[6:])) for at, line in lines if line.startswith(b"data: {")]
    return [
        (at, len(event["choices"][0]["token_ids"]))
        for at, event in events
        if event["choices"][0]["token_ids"]
    ]


async def load(config: BenchServeConfig, rate: float) -> dict:
    """The figures of one rate. A request's time begins when it was to arrive, so a client that lags does not hide latency."""
    bodies, url = serve_requests(config), urllib.parse.urlsplit(config.url)
    gaps = np.random.default_rng(config.seed).exponential(1 / rate, len(bodies))
    arrivals = time.perf_counter() + 0.1 + np.cumsum(gaps)

    async def one(arrival: float, body: dict) -> list[tuple[float, int]]:
        await asyncio.sleep(arrival - time.perf_counter())
        return await stream(url, body)

    streams = await asyncio.gather(*map(one, arrivals, bodies))
    done = [(arrival, s) for arrival, s in zip(arrivals, streams) if s]
    require(bool(done), "the server's queue is full: every request was answered 429")
    tokens = sum(n for _, s in done for _, n in s)
    ttft = np.array([s[0][0] - arrival for arrival, s in done])
    tpot = np.array([(s[-1][0] - s[0][0]) / max(1, sum(n for _, n in s) - 1) for _, s in done])
    itl = np.concatenate([np.diff([at for at, _ in s]) for _, s in done])
    seconds = max(s[-1][0] for _, s in done) - arrivals[0]
    ms = lambda a: {
        name: round(1e3 * float(f(a)), 2)
        for name, f in (
            ("mean", np.mean),
            ("median", np.median),
            ("p99", lambda a: np.quantile(a, 0.99)),
        )
    }
    good = ((ttft <= config.ttft_limit) & (tpot <= config.tpot_limit)).sum()
    return {
        "rate": rate if math.isfinite(rate) else "inf",
        "completed": len(done),
        "refused": len(streams) - len(done),
        "tokens_per_s": round(tokens / seconds, 1),
        "requests_per_s": round(len(done) / seconds, 2),
        "goodput_requests_per_s": round(good / seconds, 2),
        "ttft_ms": ms(ttft),
        "tpot_ms": ms(tpot),
        "itl_ms": ms(itl) if len(itl) else None,
    }


def engine_alone(config: BenchServeConfig) -> Callable:
    """run(n) does all requests, n times, on an engine without HTTP; memory() does the first few one by one."""
    from engine import Engine
    from sequence import SamplingParams
    from utils import open_model

    model, tokenizer, _ = open_model(ModelConfig(config.out_dir, config.init_from))
    engine = Engine(model, tokenizer, config.engine, progress=False)

    def run(n: int) -> None:
        for _ in range(n):
            bodies = serve_requests(config)
            engine.generate(
                [b.pop("prompt") for b in bodies],
                [SamplingParams(**b) for b in bodies],
                progress=False,
            )

    def memory() -> dict:
        ttft = []
        for body in serve_requests(config)[:8]:
            times = engine.generate([body.pop("prompt")], SamplingParams(**body), progress=False)[
                0
            ][0].times
            ttft.append(times.first_token - times.added)
        return {"ttft_alone_ms": round(statistics.median(ttft) * 1e3, 2)}

    run.memory = memory
    return run


def bench_serve(config: BenchServeConfig) -> dict:
    """Each rate in turn; then, if the model is named, all requests at once, in turns with an engine without HTTP."""
    results = []
    try:
        asyncio.run(load(dataclasses.replace(config, requests=1), math.inf))
    except ConnectionRefusedError:
        raise ValueError(
            f"no server answers at {config.url}: start one with python server.py"
        ) from None
    for rate in config.rates:
        results.append(asyncio.run(load(config, rate)))
        print(", ".join(f"{key} {value}" for key, value in results[-1].items()))
    plot_serve(config, results)
    report = {"bench": "serve", "rates": results}
    if config.out_dir or config.init_from:
        offline = Contender(engine_alone, config)
        offline.ready()
        tokens, ours = sum(body["max_tokens"] for body in serve_requests(config)), []
        for _ in range(config.rounds):
            offline.measure(1)
            ours.append(asyncio.run(load(config, math.inf))["tokens_per_s"])
        engine = tokens / offline.median
        url = urllib.parse.urlsplit(config.url)

        async def alone(body: dict) -> float:
            begin = time.perf_counter()
            return (await stream(url, body))[0][0] - begin

        ttft = statistics.median(asyncio.run(alone(body)) for body in serve_requests(config)[:8])
        report["at_once"] = {
            "http_tokens_per_s": statistics.median(ours),
            "engine_tokens_per_s": round(engine, 1),
        }
        report["ttft_alone_ms"] = {
            "http": round(ttft * 1e3, 2),
            "engine": offline.close()["ttft_alone_ms"],
        }
        report["ratio"] = round(statistics.median(ours) / engine, 3)
    return report


def plot_serve(config: BenchServeConfig, results: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    load_ = [r["requests_per_s"] for r in results]
    titles = {
        "ttft_ms": "time to first token",
        "tpot_ms": "time per output token",
        "itl_ms": "inter-token latency",
    }
    for axis, (key, title) in zip(axes, titles.items()):
        for which in ("median", "mean", "p99"):
            axis.plot(
                load_,
                [r[key][which] if r[key] else math.nan for r in results],
                marker="o",
                label=which,
            )
        axis.set(title=title, xlabel="requests per second completed", ylabel="ms", ylim=(0, None))
    axes[0].legend()
    figure.savefig(config.plot, dpi=120)
