"""A running server under load, and what HTTP costs over the engine alone: start with bench_serve.

TTFT is the time to the first token of a request, TPOT the time per output token after it, ITL
the time between two tokens that arrive one after the other.
"""

import asyncio
import dataclasses
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

import numpy as np
import tyro

from benchmarks.contender import Contender, ContenderProcess, in_words, milliseconds, ratio
from benchmarks.workload import random_length, require_ranges
from config import EngineConfig, ModelConfig
from errors import UserError, require, require_at_least

SMALLEST_VOCABULARY = 50  # every vocabulary has so many tokens
REQUESTS_ALONE = 8  # requests that are sent one by one, to time their first tokens
LONGEST_LINE = 2**20  # bytes of a line of an answer
START_DELAY = 0.1  # seconds until the first arrival: time to start all clients


@dataclass(frozen=True)
class BenchServeConfig:
    """Latency and throughput of a running server under open-loop load, and the cost of HTTP."""

    url: str = "http://127.0.0.1:8000"
    """address of the server; its API key, if it has one, is read from NANOGPT_API_KEY"""
    rates: tuple[float, ...] = (1, 2, 4, 8)
    """requests per second, separated by spaces; they arrive as a Poisson process, whatever the
    server does; inf: all at once"""
    requests: int = 64
    """requests at each rate; prompts and outputs have random lengths"""
    prompt_tokens: tuple[int, int] = (16, 128)
    """fewest and most tokens of a prompt"""
    output_tokens: tuple[int, int] = (16, 128)
    """fewest and most tokens of an output"""
    ttft_limit: float = 1.0
    """seconds to the first token that a good request takes at most; goodput counts requests that
    keep this limit and tpot_limit"""
    tpot_limit: float = 0.1
    """seconds per token after the first that a good request takes at most"""
    seed: int = 1337
    """seed of the lengths and the arrivals"""
    plot: Path = Path("serve.png")
    """latency against load is drawn here"""
    out_dir: Path | None = None
    """run directory of the model that the server serves: to run the same requests, all at once,
    on an engine without HTTP, in turns with the server"""
    init_from: str | None = None
    """name or directory of the model that the server serves, instead of out_dir"""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = EngineConfig()
    rounds: int = 3
    """turns of server and engine; medians count"""

    def __post_init__(self):
        require(bool(self.rates) and min(self.rates) > 0, "rates must be positive", param="rates")
        require(
            self.out_dir is None or self.init_from is None,
            "name the server's model by out_dir or by init_from, not both",
            param="init_from",
        )
        require_at_least(self, 1, "requests", "rounds")
        require_ranges(self, "prompt_tokens", "output_tokens")


def serve_requests(config: BenchServeConfig) -> list[dict]:
    """Return the bodies of the requests, as HTTP and SamplingParams take them.

    Their lengths are a function of the seed. Their tokens are new each time, so that no prefix
    of theirs is in the server's cache."""
    lengths = np.random.default_rng(config.seed)
    tokens = np.random.default_rng()
    bodies = []
    for i in range(config.requests):
        prompt_length = random_length(lengths, config.prompt_tokens)
        bodies.append(
            {
                "prompt": tokens.integers(SMALLEST_VOCABULARY, size=prompt_length).tolist(),
                "max_tokens": random_length(lengths, config.output_tokens),
                "ignore_eos": True,
                "seed": i,
            }
        )
    return bodies


class Chunk(NamedTuple):
    """Tokens of a streamed completion that arrived together."""

    at: float  # time.perf_counter(), seconds
    tokens: int


async def stream(url: SplitResult, body: dict) -> list[Chunk]:
    """Ask for a streamed completion; return its chunks, or none if the server's queue was full.

    Plain sockets: a client library would take CPU time from a server on the same machine."""
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=LONGEST_LINE)
    writer.write(http_request(url, body))
    lines = [(time.perf_counter(), line) async for line in reader]
    writer.close()
    _, status_line = lines[0]
    _, last_line = lines[-1]
    status = int(status_line.split()[1])
    complete = any(line == b"data: [DONE]\n" for _, line in lines)
    require(
        status == 429 or (status == 200 and complete),
        f"{url.geturl()} answered {last_line.decode()}",
        param="url",
    )
    return chunks_of(lines)


def http_request(url: SplitResult, body: dict) -> bytes:
    """Return a whole request for a streamed completion."""
    data = json.dumps(body | {"stream": True, "return_token_ids": True}).encode()
    head = [
        "POST /v1/completions HTTP/1.1",
        f"Host: {url.netloc}",
        f"Authorization: Bearer {os.environ.get('NANOGPT_API_KEY', '')}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + data


def chunks_of(lines: list[tuple[float, bytes]]) -> list[Chunk]:
    """Return the chunks among an answer's lines and their times. An event may hold no token."""
    chunks = []
    for at, line in lines:
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            tokens = len(event["choices"][0]["token_ids"])
            if tokens:
                chunks.append(Chunk(at, tokens))
    return chunks


class Completion(NamedTuple):
    """A request that was answered in full."""

    arrival: float  # time.perf_counter() at which it was to arrive, seconds
    chunks: list[Chunk]

    @property
    def tokens(self) -> int:
        """How many tokens were generated."""
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def end(self) -> float:
        """When the last token arrived."""
        return self.chunks[-1].at

    @property
    def ttft(self) -> float:
        """Seconds from the arrival to the first token.

        It counts from when the request was to arrive, so a client that lags hides no latency."""
        return self.chunks[0].at - self.arrival

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        return (self.end - self.chunks[0].at) / max(1, self.tokens - 1)

    @property
    def itl(self) -> np.ndarray:
        """Seconds between neighbouring chunks."""
        return np.diff([chunk.at for chunk in self.chunks])


async def load(config: BenchServeConfig, rate: float) -> dict:
    """Send all requests, `rate` a second on average, and return the figures of that rate."""
    bodies = serve_requests(config)
    url = urlsplit(config.url)
    gaps = np.random.default_rng(config.seed).exponential(1 / rate, len(bodies))
    arrivals = time.perf_counter() + START_DELAY + np.cumsum(gaps)

    async def client(arrival: float, body: dict) -> list[Chunk]:
        await asyncio.sleep(arrival - time.perf_counter())
        return await stream(url, body)

    streams = await asyncio.gather(*map(client, arrivals, bodies))
    answered = zip(arrivals, streams, strict=True)
    completions = [Completion(arrival, chunks) for arrival, chunks in answered if chunks]
    require(bool(completions), "the server's queue is full: every request was answered 429")
    seconds = max(completion.end for completion in completions) - float(arrivals[0])
    return {
        "rate": rate if math.isfinite(rate) else "inf",
        "completed": len(completions),
        "refused": len(streams) - len(completions),
        **load_figures(completions, seconds, config),
    }


def load_figures(
    completions: list[Completion], seconds: float, config: BenchServeConfig
) -> dict[str, float | dict | None]:
    """Return throughput and latency of requests that were completed within so many seconds."""
    ttft = np.array([completion.ttft for completion in completions])
    tpot = np.array([completion.tpot for completion in completions])
    itl = np.concatenate([completion.itl for completion in completions])
    good = (ttft <= config.ttft_limit) & (tpot <= config.tpot_limit)
    tokens = sum(completion.tokens for completion in completions)
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "requests_per_s": round(len(completions) / seconds, 2),
        "goodput_requests_per_s": round(int(good.sum()) / seconds, 2),
        "ttft_ms": latency(ttft),
        "tpot_ms": latency(tpot),
        "itl_ms": latency(itl) if len(itl) else None,
    }


def latency(seconds: np.ndarray) -> dict[str, float]:
    """Return what is told of a distribution of times, in milliseconds."""
    return {
        "mean": milliseconds(float(seconds.mean())),
        "median": milliseconds(float(np.median(seconds))),
        "p99": milliseconds(float(np.quantile(seconds, 0.99))),
    }


class EngineAlone(Contender):
    """An engine without HTTP. A unit of work is all requests, there from the start."""

    def __init__(self, config: BenchServeConfig):
        from engine import Engine
        from utils import open_model

        self.config = config
        model, tokenizer, _ = open_model(
            ModelConfig(config.out_dir, config.init_from), config.engine.mesh
        )
        self.engine = Engine(model, tokenizer, config.engine, progress=False)

    def run(self, n: int) -> None:
        """Do all requests, n times."""
        for _ in range(n):
            self._generate(serve_requests(self.config))

    def _generate(self, bodies: list[dict]) -> list:
        """Do requests given as bodies of HTTP; return the engine's outputs."""
        from sequence import SamplingParams

        prompts = [body.pop("prompt") for body in bodies]
        params = [SamplingParams(**body) for body in bodies]
        return self.engine.generate(prompts, params, progress=False)

    def report(self) -> dict:
        """Return the median time to the first token of requests that run one by one."""
        seconds = []
        for body in serve_requests(self.config)[:REQUESTS_ALONE]:
            outputs = self._generate([body])
            times = outputs[0][0].times
            seconds.append(times.first_token - times.added)
        return {"ttft_alone_ms": milliseconds(statistics.median(seconds))}


def bench_serve(config: BenchServeConfig) -> dict:
    """Return the figures of each rate in turn, and draw them.

    Then, if the model is named, all requests at once, in turns with an engine without HTTP."""
    require_server(config)
    results = []
    for rate in config.rates:
        results.append(asyncio.run(load(config, rate)))
        print(in_words(results[-1]))
    plot_serve(config, results)
    report = {"bench": "serve", "rates": results}
    if config.out_dir or config.init_from:
        report |= race_engine(config)
    return report


def require_server(config: BenchServeConfig) -> None:
    """Raise UserError unless a server answers; the request that shows it warms it up as well."""
    try:
        asyncio.run(load(dataclasses.replace(config, requests=1), math.inf))
    except ConnectionRefusedError:
        raise UserError(
            f"no server answers at {config.url}: start one with python server.py", param="url"
        ) from None


def race_engine(config: BenchServeConfig) -> dict:
    """Return what the server and an engine without HTTP make of all requests at once, in turns."""
    engine = ContenderProcess(EngineAlone, config)
    engine.wait_until_ready()
    http_speeds = []
    for _ in range(config.rounds):
        engine.measure(1)
        http_speeds.append(asyncio.run(load(config, math.inf))["tokens_per_s"])
    http_speed = statistics.median(http_speeds)
    tokens = sum(body["max_tokens"] for body in serve_requests(config))
    return {
        "at_once": {
            "http_tokens_per_s": http_speed,
            "engine_tokens_per_s": round(tokens / engine.median, 1),
        },
        "ttft_alone_ms": {
            "http": milliseconds(http_ttft_alone(config)),
            "engine": engine.close()["ttft_alone_ms"],
        },
        **ratio(tokens / http_speed, [engine.median]),
    }


def http_ttft_alone(config: BenchServeConfig) -> float:
    """Return the median seconds to the first token of requests that are sent one by one."""
    url = urlsplit(config.url)
    seconds = []
    for body in serve_requests(config)[:REQUESTS_ALONE]:
        begin = time.perf_counter()
        chunks = asyncio.run(stream(url, body))
        seconds.append(chunks[0].at - begin)
    return statistics.median(seconds)


def plot_serve(config: BenchServeConfig, results: list[dict]) -> None:
    """Draw each latency against the requests per second that were completed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "ttft_ms": "time to first token",
        "tpot_ms": "time per output token",
        "itl_ms": "inter-token latency",
    }
    figure, axes = plt.subplots(1, len(titles), figsize=(12, 3.6), layout="constrained")
    speeds = [result["requests_per_s"] for result in results]
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for statistic in ("median", "mean", "p99"):
            # Where every output had one token, there is no inter-token latency.
            values = [result[key][statistic] if result[key] else math.nan for result in results]
            axis.plot(speeds, values, marker="o", label=statistic)
        axis.set(title=title, xlabel="requests per second completed", ylabel="ms", ylim=(0, None))
    axes[0].legend()
    figure.savefig(config.plot, dpi=120)
    plt.close(figure)
