"""DOC"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro

from benchmarks.contender import Contender, require_ranges, take_turns
from config import EngineConfig, GPTConfig
from errors import require


@dataclass(frozen=True)
class BenchGenerateConfig:
    """Tokens per second of the engine on requests of unequal length, then latency of a few equal streams, with random weights."""

    model: tyro.conf.OmitArgPrefixes[GPTConfig] = GPTConfig()
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = EngineConfig()
    requests: int = 32
    """with prompts and outputs of random lengths, all there from the start; nano-vllm's job is 256 of 100 to 1024 tokens each"""
    prompt_tokens: tuple[int, int] = (16, 128)
    """fewest and most tokens of a prompt"""
    output_tokens: tuple[int, int] = (16, 128)
    """fewest and most tokens of an output"""
    seed: int = 1337
    """of the lengths and the tokens"""
    peers: tuple[Literal["dense", "transformers", "transformers_continuous", "products"], ...] = (
        "dense",
        "transformers",
        "transformers_continuous",
        "products",
    )
    """to race against: our own dense generate and transformers' in padded batches, and transformers' continuous batching; products
    is no peer but a limit: the engine's products with the weights by themselves"""
    batch_sizes: tuple[int, ...] = (8, 32)
    """of the padded batches"""
    streams: tuple[int, ...] = (1, 8)
    """numbers of sequences, of 16 and then 64 new tokens, whose time per step is taken"""
    rounds: int = 3
    """turns of each contender; medians count"""

    def __post_init__(self):
        require(
            self.requests >= 1 and self.rounds >= 1,
            f"requests={self.requests} and rounds={self.rounds} must be at least 1",
        )
        require_ranges(self, "prompt_tokens", "output_tokens")
        most = self.prompt_tokens[1] + self.output_tokens[1]
        require(
            most <= self.model.block_size,
            f"prompts and outputs of up to {most} tokens do not fit block_size={self.model.block_size}",
        )


def generate_requests(config: BenchGenerateConfig) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens are to follow each."""
    rng = np.random.default_rng(config.seed)
    draw = lambda low_high: int(rng.integers(*low_high, endpoint=True))
    return [
        (
            rng.integers(config.model.vocab_size, size=draw(config.prompt_tokens)).tolist(),
            draw(config.output_tokens),
        )
        for _ in range(config.requests)
    ]


def stream_requests(config: BenchGenerateConfig, streams: int) -> list[tuple[list[int], int]]:
    return [
        (np.random.default_rng(i).integers(config.model.vocab_size, size=16).tolist(), 64)
        for i in range(streams)
    ]


def padded_batches(requests: list, size: int) -> list[tuple[list[list[int]], int]]:
    """Batches of `size` requests in their order: prompts, and the tokens of the longest output, which all have to wait for."""
    batches = [requests[i : i + size] for i in range(0, len(requests), size)]
    return [([prompt for prompt, _ in batch], max(n for _, n in batch)) for batch in batches]


def ours_generate(config: BenchGenerateConfig, requests: list) -> Callable:
    """The engine. Reports the share of held page slots that hold tokens, and more, as means over all steps."""
    from flax import nnx

    from engine import Engine
    from model import GPT
    from sequence import SamplingParams

    engine = Engine(GPT(config.model, rngs=nnx.Rngs(0)), None, config.engine, progress=False)
    steps, saturated = [], []

    def run(n: int) -> None:
        for _ in range(n):
            engine.blocks.forget()  # else the second turn finds every prompt in the prefix cache
            for prompt, max_tokens in requests:
                engine.add(prompt, SamplingParams(max_tokens=max_tokens, temperature=0))
            while engine.busy:
                wall, host = time.perf_counter(), time.thread_time()
                engine.step()
                host, wall = time.thread_time() - host, time.perf_counter() - wall
                stats = engine.stats()
                if stats.pages_held:
                    steps.append(
                        (
                            stats.tokens_held / stats.pages_held / config.engine.page_size,
                            stats.running,
                            host,
                            wall,
                        )
                    )
                    if stats.waiting and stats.pages_held > 0.9 * stats.pages:
                        saturated.append(stats.running)

    def report() -> dict:
        utilization, running, host, wall = np.mean(steps, axis=0).tolist()
        result = {
            "kv_utilization": round(utilization, 4),
            "running": round(running, 2),
            "host_share": round(host / wall, 4),
            "ms_per_step": round(wall * 1e3, 2),
        }
        if saturated:  # dense: as many slots if each sequence had its own row of them, and all waited for the longest
            longest = max(len(prompt) + n for prompt, n in requests)
            outputs = [n for _, n in requests]
            rows = (engine.blocks.num_pages - 1) * config.engine.page_size / longest
            result["in_flight"] = {
                "paged": round(float(np.mean(saturated)), 2),
                "dense_same_memory": round(rows * float(np.mean(outputs)) / max(outputs), 2),
            }
        return result

    run.memory, run.warm_up = report, lambda: None
    return run


def ours_dense(config: BenchGenerateConfig, requests: list, batch_size: int) -> Callable:
    from flax import nnx

    from model import GPT

    model = GPT(config.model, rngs=nnx.Rngs(0)).for_inference()

    def run(n: int) -> None:
        for prompts, longest in padded_batches(requests, batch_size) * n:
            model.generate(prompts, longest, temperature=0)

    run.warm_up = lambda: run(1)
    return run


def ours_products(config: BenchGenerateConfig, requests: list) -> Callable:
    """The engine's products with the weights and nothing else, in the shapes and as often as the job has them: what is left to
    gain, and what is not, while XLA multiplies."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from engine import Engine
    from model import GPT
    from sequence import SamplingParams

    calls = collections.Counter()

    class Counting(Engine):
        def _call(self, work, tiles, samples, R, T):
            calls[R, T] += 1
            return super()._call(work, tiles, samples, R, T)

    model = GPT(config.model, rngs=nnx.Rngs(0))
    engine = Counting(model, None, config.engine, progress=False)
    calls.clear()
    engine.generate(
        [prompt for prompt, _ in requests],
        [SamplingParams(max_tokens=n, temperature=0) for _, n in requests],
        progress=False,
    )
    del engine

    graphdef, params = nnx.split(model.for_inference())

    @jax.jit
    def products(params, x):  # (R, T, C)
        model = nnx.merge(graphdef, params)
        for block in model.h:
            x = x + block.attn.c_proj(block.attn.c_attn(x, parts=3).sum(2))
            x = x + block.mlp.c_proj(block.mlp.c_fc(x))
        return model.logits(x[:, -1:])

    inputs = {shape: jnp.ones((*shape, config.model.n_embd)) for shape in calls}

    def run(n: int) -> None:
        for shape, count in calls.items():
            for _ in range(n * count):
                products(params, inputs[shape]).block_until_ready()

    run.warm_up = lambda: [jax.block_until_ready(products(params, x)) for x in inputs.values()]
    run.memory = lambda: {"calls": {f"{R}x{T}": count for (R, T), count in sorted(calls.items())}}
    return run


def hf_model(config: BenchGenerateConfig):
    import torch
    import transformers

    c = config.model
    shape = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
    )
    model = transformers.GPT2LMHeadModel(shape).to(getattr(torch, c.dtype)).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # nothing ends early
    model.generation_config.pad_token_id = 0
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def hf_padded(config: BenchGenerateConfig, requests: list, batch_size: int) -> Callable:
    """transformers' generate on left-padded batches."""
    import torch

    model = hf_model(config)

    def generate(prompts: list, n: int) -> None:
        T = max(map(len, prompts))
        tokens = torch.tensor([[0] * (T - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor(
            [[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=model.device
        )
        assert (
            model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=n).shape[1]
            == T + n
        )

    def run(n: int) -> None:
        for prompts, longest in padded_batches(requests, batch_size) * n:
            generate(prompts, longest)

    run.warm_up = lambda: generate(padded_batches(requests, batch_size)[0][0], 4)
    return run


def hf_continuous(config: BenchGenerateConfig, requests: list) -> Callable:
    """transformers' own continuous batching, with pages for all requests at once."""
    from transformers import ContinuousBatchingConfig

    model, page = hf_model(config), 256
    pages = sum(-(-(len(prompt) + n) // page) for prompt, n in requests)
    settings = ContinuousBatchingConfig(
        page_size=page, num_blocks=pages + 1, max_batch_tokens=128 + len(requests)
    )

    def generate(requests: list) -> None:
        with model.continuous_batching_context_manager(
            continuous_batching_config=settings
        ) as manager:
            for prompt, n in requests:
                manager.add_request(prompt, max_new_tokens=n)
            for _ in requests:
                result = manager.get_result()
                assert result is not None and not result.error, (
                    f"continuous batching: {result and result.error}"
                )

    run = lambda n: [generate(requests) for _ in range(n)]
    run.warm_up = lambda: generate([(prompt, 4) for prompt, _ in requests[:2]])
    return run


def dense_utilization(requests: list, batch_size: int) -> float:
    """Share of the slots of a dense cache, padded to the longest row, that hold tokens of unfinished rows, mean over steps."""
    shares = []
    for i in range(0, len(requests), batch_size):
        prompts, outputs = np.array(
            [(len(prompt), n) for prompt, n in requests[i : i + batch_size]]
        ).T
        held = [(prompts + step)[outputs > step].sum() for step in range(outputs.max())]
        shares += [h / (len(prompts) * (prompts.max() + outputs.max())) for h in held]
    return float(np.mean(shares))


def read_bandwidth() -> float:
    """Bytes per second at which this process's device reads memory: the sum of a large array, best of ten."""
    import jax
    import jax.numpy as jnp

    x, total, best = jnp.ones(2**27), jax.jit(jnp.sum), math.inf
    for _ in range(10):
        begin = time.perf_counter()
        total(x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return x.nbytes / best


def race(contenders: dict[str, Contender], rounds: int, tokens: int) -> dict:
    """Take turns at one job of so many tokens; the figures of each, and ours over the best peer as `ratio`."""
    take_turns(contenders, rounds, 1)
    results = {}
    for name, contender in contenders.items():
        results[name] = {"tokens_per_s": round(tokens / contender.median, 1), **contender.close()}
        print(
            f"{name:24}" + ", ".join(f"{key} {value}" for key, value in results[name].items()),
            flush=True,
        )
    peers = [c.median for name, c in contenders.items() if name not in ("ours", "products")]
    return results | ({"ratio": round(min(peers) / contenders["ours"].median, 3)} if peers else {})


def bench_generate(config: BenchGenerateConfig) -> dict:
    """Useful tokens per second on one job, then milliseconds per step of equal streams."""
    requests = generate_requests(config)
    contenders = {"ours": Contender(ours_generate, config, requests)}
    padded = {"dense": ours_dense, "transformers": hf_padded}
    for peer in config.peers:
        if peer == "products":
            contenders[peer] = Contender(ours_products, config, requests)
        elif peer in padded:
            contenders |= {
                f"{peer}_{b}": Contender(padded[peer], config, requests, b)
                for b in config.batch_sizes
            }
        else:
            contenders[peer] = Contender(hf_continuous, config, requests)
    report = {
        "bench": "generate",
        "dtype": config.model.dtype,
        **race(contenders, config.rounds, sum(n for _, n in requests)),
    }
    ours = report["ours"]
    report["kv_utilization"] = ours["kv_utilization"]
    report["kv_utilization_dense"] = {
        b: round(dense_utilization(requests, b), 4) for b in config.batch_sizes
    }
    report["streams"] = {}
    for streams in config.streams:
        few = dataclasses.replace(
            config,
            engine=dataclasses.replace(config.engine, max_num_seqs=streams, prefill_tokens=64),
        )
        job = stream_requests(config, streams)
        contenders = {"ours": Contender(ours_generate, few, job)}
        contenders |= {
            peer: Contender(padded[peer], few, job, streams)
            for peer in config.peers
            if peer in padded
        }
        contenders |= (
            {"products": Contender(ours_products, few, job)} if "products" in config.peers else {}
        )
        report["streams"][streams] = race(contenders, config.rounds, 64 * streams)
    # A step reads every weight once, and the keys and values of its sequences.
    bandwidth, itemsize = (
        read_bandwidth(),
        np.dtype(np.float32).itemsize if config.model.dtype == "float32" else 2,
    )
    weights = config.model.num_params(embeddings=False) * itemsize
    report["bandwidth_gb_per_s"] = round(bandwidth / 1e9, 1)
    report["single_stream_limit_tokens_per_s"] = round(bandwidth / weights, 1)
    return report
