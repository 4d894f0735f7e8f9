"""Measure, in one run, against peers: python bench.py train|compile|generate|kernel|serve|eval [--key=value ...]

Contenders run in processes of their own and take turns, so that a machine whose speed drifts is fair to all; medians count. The last
line printed is one JSON object. Its `ratio` is ours over the best peer: above 1, ours is faster.
"""

import config as configs

if __name__ == "__main__":  # flags first: --help and typos answer before JAX is loaded
    CONFIG = configs.parse_command(configs.BENCHES)

import asyncio
import collections
import dataclasses
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import (
    BenchCompileConfig,
    BenchEvalConfig,
    BenchGenerateConfig,
    BenchKernelConfig,
    BenchServeConfig,
    BenchTrainConfig,
    GPTConfig,
    ModelConfig,
    TrainConfig,
)


class Contender:
    """A process of its own that makes something ready with make(*args) -> run, and then, whenever asked, times run(n).

    run(n) does n units of work and returns when they are done; run.warm_up(), by default run(2), is not timed."""

    def __init__(self, make: Callable, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=contend, args=(theirs, make, args), daemon=True)
        self.process.start()
        theirs.close()
        self.seconds: list[float] = []

    def ready(self) -> None:
        assert self.pipe.recv() == "ready"

    def measure(self, n: int) -> None:
        """Append the seconds per unit of work to self.seconds."""
        self.pipe.send(n)
        self.seconds.append(self.pipe.recv() / n)

    def close(self) -> dict:
        """End the process; returns its peak memory in MiB and whatever else the platform tells."""
        self.pipe.send(None)
        memory = self.pipe.recv()
        self.process.join()
        return memory

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def contend(pipe, make: Callable, args: tuple) -> None:
    run = make(*args)
    getattr(run, "warm_up", lambda: run(2))()
    pipe.send("ready")
    while (n := pipe.recv()) is not None:
        begin = time.perf_counter()
        run(n)
        pipe.send(time.perf_counter() - begin)
    pipe.send(
        {
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **getattr(run, "memory", dict)(),
        }
    )


def take_turns(contenders: dict[str, Contender], rounds: int, units: int) -> None:
    """`rounds` times: every contender in turn does `units` units of work."""
    for contender in contenders.values():
        contender.ready()
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for contender in contenders.values():
            contender.measure(units)


def ours_train(config: TrainConfig, tokens: Path) -> Callable:
    import jax

    import train
    import utils
    from mesh import PEAK_FLOPS, training_mesh, use_cpu_cores, whole_sequences
    from model import choose_attention

    use_cpu_cores(config)
    mesh = training_mesh(config)
    config = dataclasses.replace(
        config, model=choose_attention(config.model, whole_sequences(mesh))
    )
    state = utils.TrainState.create(config, mesh=mesh)
    batches = train.batches(train.TokenFile(tokens, "uint16"), config, 0, mesh)

    def run(n: int) -> None:
        nonlocal state
        for _ in range(n):
            state, metrics = train.train_step(state, next(batches), config)
        jax.block_until_ready(state)
        float(metrics["loss"])

    def memory() -> dict:
        device, told = jax.devices()[0], {"attention": config.model.training_attention}
        if stats := device.memory_stats():
            told["peak_device_mib"] = stats["peak_bytes_in_use"] >> 20
        if device.device_kind in PEAK_FLOPS:
            told["peak_flops"] = PEAK_FLOPS[device.device_kind] * mesh.size
        return told

    run.memory = memory
    return run


def nanogpt_train(config: TrainConfig, tokens: Path, directory: Path, compile_: bool) -> Callable:
    """nanoGPT's model and training step, as its train.py runs it, on our batches."""
    import contextlib

    import torch

    import train

    spec = importlib.util.spec_from_file_location("nanogpt_model", directory / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    torch.manual_seed(config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = config.model
    vocab_size = (
        shape.padded_vocab_size if shape.vocab_size > 1000 else shape.vocab_size
    )  # as nanoGPT pads 50257 to 50304
    with contextlib.redirect_stdout(None):
        model = nanogpt.GPT(
            nanogpt.GPTConfig(
                block_size=shape.block_size,
                vocab_size=vocab_size,
                n_layer=shape.n_layer,
                n_head=shape.n_head,
                n_embd=shape.n_embd,
                dropout=shape.dropout,
                bias=shape.bias,
            )
        ).to(device)
        optimizer = model.configure_optimizers(
            config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device
        )
    if compile_:
        model = torch.compile(model)
    # nanoGPT's train.py computes in float32 on a CPU, in bfloat16 under autocast on a GPU.
    precision = (
        torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    )
    batches = train.batches(train.TokenFile(tokens, "uint16"), config, 0)

    def run(n: int) -> None:
        for _ in range(n):
            for micro in torch.from_numpy(next(batches)).long().to(device):
                with precision:
                    _, loss = model(micro[:, :-1].contiguous(), micro[:, 1:].contiguous())
                (loss / config.gradient_accumulation_steps).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()

    if device == "cuda":
        run.memory = lambda: {"peak_device_mib": torch.cuda.max_memory_allocated() >> 20}
    return run


def bench_train(config: BenchTrainConfig) -> dict:
    """Tokens per second of train_step, data loading included; with config.nanogpt, of nanoGPT eager and compiled as well."""
    vocab_size = 65 if config.train.dataset.endswith("char") else 50257
    model = dataclasses.replace(config.train.model, vocab_size=vocab_size)
    train = dataclasses.replace(config.train, model=model)
    per_step = train.gradient_accumulation_steps * train.batch_size * model.block_size
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens.bin"  # speed does not depend on what the tokens are
        np.random.default_rng(0).integers(
            vocab_size, size=4 * per_step + 10**6, dtype=np.uint16
        ).tofile(tokens)
        contenders = {"ours": Contender(ours_train, train, tokens)}
        if config.nanogpt:
            configs.require(
                (config.nanogpt / "model.py").exists(),
                f"--nanogpt={config.nanogpt} has no model.py",
            )
            for name, compile_ in (("nanogpt_eager", False), ("nanogpt_compile", True)):
                contenders[name] = Contender(nanogpt_train, train, tokens, config.nanogpt, compile_)
        take_turns(contenders, config.rounds, config.steps)
        results = {
            name: {
                "ms_per_step": round(contender.median * 1e3, 2),
                "tokens_per_s": round(per_step / contender.median),
                **contender.close(),
            }
            for name, contender in contenders.items()
        }
    peak = results["ours"].pop("peak_flops", None)
    for name, result in results.items():
        if peak:  # model FLOPs utilization: flops_per_token * tokens per second / the device's peak
            result["mfu"] = round(result["tokens_per_s"] * model.flops_per_token / peak, 4)
        print(f"{name:16}" + ", ".join(f"{key} {value}" for key, value in result.items()))
    peers = [c.median for name, c in contenders.items() if name != "ours"]
    ratio = {"ratio": round(min(peers) / contenders["ours"].median, 3)} if peers else {}
    return {"bench": "train", "preset": config.preset, "dtype": model.dtype, **results, **ratio}


def bench_compile(config: BenchCompileConfig) -> dict:
    """Seconds to trace, lower and compile train_step for several numbers of layers. Nothing is allocated or run."""
    import jax

    import train
    import utils

    def compile_(n_layer: int) -> float:
        c = dataclasses.replace(
            config.train, model=dataclasses.replace(config.train.model, n_layer=n_layer)
        )
        state = jax.eval_shape(lambda: utils.TrainState.create(c))
        shape = (c.gradient_accumulation_steps, c.batch_size, c.model.block_size + 1)
        jax.clear_caches()
        begin = time.perf_counter()
        train.train_step.lower(state, jax.ShapeDtypeStruct(shape, np.int32), c).compile()
        return time.perf_counter() - begin

    compile_(1)  # what only the first compilation does
    turns = [
        {n_layer: compile_(n_layer) for n_layer in config.layers} for _ in range(config.rounds)
    ]
    seconds = {
        n_layer: round(statistics.median(turn[n_layer] for turn in turns), 2)
        for n_layer in config.layers
    }
    for n_layer, each in seconds.items():
        print(f"{n_layer:3} layers: {each} s")
    return {"bench": "compile", "preset": config.preset, "seconds": seconds}


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

    from engine import Engine, SamplingParams
    from model import GPT

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

    from engine import Engine, SamplingParams
    from model import GPT

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


def bench_kernel(config: BenchKernelConfig) -> dict:
    """Microseconds of each variant, median of ten runs of 12 calls that depend on each other, and the bytes per second at which
    it reads its keys and values."""
    import jax
    import jax.numpy as jnp

    import paged_attention as pa

    name, C = config.attention or pa.default_implementation(), config.n_head * config.head_dim
    constants = [(pa.SPLIT, pa.TILE, pa.WARPS)]
    if name == "triton":
        constants = itertools.product(config.splits, config.tiles, config.warps)
    results = []
    for rows, P, (pa.SPLIT, pa.TILE, pa.WARPS) in itertools.product(
        config.rows, config.page_sizes, constants
    ):
        pages = -(-config.context // P)
        rng = np.random.default_rng(0)
        tables = jnp.asarray(1 + rng.permutation(rows * pages).reshape(rows, pages), jnp.int32)
        shape = pa.pool_shape(
            GPTConfig(n_layer=1, n_head=config.n_head, n_embd=C), 1 + rows * pages, P, name
        )
        k, v = (jnp.asarray(rng.standard_normal(shape, np.float32), config.dtype) for _ in range(2))
        q = jnp.asarray(rng.standard_normal((rows, 1, config.n_head, config.head_dim)), jnp.float32)
        lengths, one = jnp.full(rows, config.context - 1, jnp.int32), jnp.ones(rows, jnp.int32)

        def calls(q, k, v):
            attend = lambda _, q: pa.paged_attention(
                q, k, v, tables, lengths, one, layer=0, scale=1.0, implementation=name
            )
            return jax.lax.fori_loop(0, 12, attend, q)

        run, seconds = jax.jit(calls), []
        run(q, k, v).block_until_ready()
        for _ in range(10):
            begin = time.perf_counter()
            run(q, k, v).block_until_ready()
            seconds.append((time.perf_counter() - begin) / 12)
        each = statistics.median(seconds)
        results.append(
            {
                "rows": rows,
                "page_size": P,
                "split": pa.SPLIT,
                "tile": pa.TILE,
                "warps": pa.WARPS,
                "us": round(each * 1e6, 1),
                "gb_per_s": round(2 * rows * config.context * C * k.itemsize / each / 1e9, 1),
            }
        )
        print(", ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    best = {
        rows: min((r for r in results if r["rows"] == rows), key=lambda r: r["us"])
        for rows in config.rows
    }
    return {
        "bench": "kernel",
        "attention": name,
        "dtype": config.dtype,
        "context": config.context,
        "best": best,
    }


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
    configs.require(
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
    configs.require(bool(done), "the server's queue is full: every request was answered 429")
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
    from scheduler import SamplingParams
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


def eval_job(config: BenchEvalConfig, lm) -> Callable:
    """run(n) scores the first n items of the task with a model of lm-eval; run.memory() tells the answers and the metrics."""
    import lm_eval.tasks

    task = lm_eval.tasks.TaskManager(include_path=config.include_path).load([config.task])["tasks"][
        config.task
    ]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=config.items)

    def run(n: int) -> None:
        requests = [request for request in task.instances if request.doc_id < n]
        run.answers = list(zip(requests, lm.loglikelihood(requests, disable_tqdm=True)))

    def memory() -> dict:
        items = {}
        for request, answer in run.answers:
            items.setdefault(request.doc_id, (request.doc, []))[1].append(answer)
        scores = [task.process_results(doc, answers) for doc, answers in items.values()]
        metrics = {
            name: statistics.mean(score[name] for score in scores)
            for name in ("acc", "acc_norm")
            if name in scores[0]
        }
        return {"answers": [answers for _, answers in items.values()], **metrics}

    run.warm_up, run.memory = lambda: run(100), memory
    return run


def ours_eval(config: BenchEvalConfig) -> Callable:
    import eval_harness

    return eval_job(config, eval_harness.JAXNanoGPT(init_from=config.init_from))


def hf_eval(config: BenchEvalConfig, batch_size: int) -> Callable:
    from lm_eval.models.huggingface import HFLM

    return eval_job(
        config,
        HFLM(pretrained=config.init_from, device="cpu", dtype="float32", batch_size=batch_size),
    )


def bench_eval(config: BenchEvalConfig) -> dict:
    """Items per second, float32 on a CPU; the largest difference between two log-likelihoods; whether each item's choice is
    the same."""
    contenders = {"ours": Contender(ours_eval, config)}
    contenders |= {f"hf_{b}": Contender(hf_eval, config, b) for b in config.batch_sizes}
    take_turns(contenders, config.rounds, config.probe)
    report = {
        "bench": "eval",
        "probe": {name: round(1 / c.median, 3) for name, c in contenders.items()},
    }
    print(f"items/s on {config.probe} items: {report['probe']}", flush=True)
    best = min(
        (name for name in contenders if name != "ours"), key=lambda name: contenders[name].median
    )
    answers = {}
    for name, contender in contenders.items():
        if name in ("ours", best):
            contender.measure(config.items)
        told = contender.close()
        if name in ("ours", best):
            answers[name] = told.pop("answers")
            report[name] = {"items_per_s": round(1 / contender.seconds[-1], 3), **told}
    pairs = list(zip(answers["ours"], answers[best]))
    logprobs = [[[logprob for logprob, _ in item] for item in pair] for pair in pairs]
    choice = lambda item: item.index(max(item))
    report["largest_difference"] = max(
        abs(a - b) for ours, theirs in logprobs for a, b in zip(ours, theirs)
    )
    report["same_choice"] = sum(choice(ours) == choice(theirs) for ours, theirs in logprobs) / len(
        pairs
    )
    report["ratio"] = round(contenders[best].seconds[-1] / contenders["ours"].seconds[-1], 3)
    return report


RUN = {
    BenchTrainConfig: bench_train,
    BenchCompileConfig: bench_compile,
    BenchGenerateConfig: bench_generate,
    BenchKernelConfig: bench_kernel,
    BenchServeConfig: bench_serve,
    BenchEvalConfig: bench_eval,
}

if __name__ == "__main__":
    with configs.user_errors():
        print(json.dumps(RUN[type(CONFIG)](CONFIG)))
