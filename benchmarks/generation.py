"""Speed of the engine without HTTP, against peers: start with bench_generate.

One job is a list of requests; a contender's unit of work is the whole job.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

from benchmarks.contender import (
    Contender,
    ContenderProcess,
    in_words,
    milliseconds,
    ratio,
    take_turns,
)
from benchmarks.other_interpreters import llama_cpp, vllm
from benchmarks.transformers_peers import TransformersContinuous, TransformersPadded
from benchmarks.workload import (
    Request,
    dense_utilization,
    padded_batches,
    random_length,
    require_ranges,
    total_output,
)
from config import EngineConfig, GPTConfig
from errors import require, require_at_least

PEERS_MAX_NUM_SEQS = 64  # sequences that a peer of another interpreter may run at once

BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2}

# The fields of the config that say where peers run which need an interpreter of their own.
INTERPRETERS = {
    "vllm": "vllm_python",
    "llama_cpp": "llama_cpp_python",
    "llama_cpp_q8_0": "llama_cpp_python",
}

# Equal streams: short prompts, so that the time is that of decode steps.
STREAM_PROMPT_TOKENS = 16
STREAM_OUTPUT_TOKENS = 64
STREAM_PREFILL_TOKENS = 64  # of the engine: its default would be padding for so few prompts


@dataclass(frozen=True)
class BenchGenerateConfig:
    """Tokens per second of the engine, with random weights.

    First on requests of unequal length, then on a few equal streams."""

    model: tyro.conf.OmitArgPrefixes[GPTConfig] = GPTConfig()
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = EngineConfig()
    requests: int = 32
    """requests with prompts and outputs of random lengths, all there from the start; nano-vllm's
    job is 256 of 100 to 1024 tokens each"""
    prompt_tokens: tuple[int, int] = (16, 128)
    """fewest and most tokens of a prompt"""
    output_tokens: tuple[int, int] = (16, 128)
    """fewest and most tokens of an output"""
    seed: int = 1337
    """seed of the lengths and the tokens"""
    peers: tuple[
        Literal[
            "dense",
            "transformers",
            "transformers_continuous",
            "vllm",
            "llama_cpp",
            "llama_cpp_q8_0",
            "products",
        ],
        ...,
    ] = (
        "dense",
        "transformers",
        "transformers_continuous",
        "products",
    )
    """who to race against: dense is our own dense generate in padded batches, transformers the
    same of transformers, transformers_continuous its continuous batching; vllm and llama_cpp, which
    q8_0 gives 8-bit weights, have interpreters of their own; products is no peer but a limit: the
    engine's products with the weights by themselves"""
    vllm_python: Path | None = None
    """an interpreter that has vLLM, for the peer vllm"""
    llama_cpp_python: Path | None = None
    """an interpreter that has llama-cpp-python, gguf, numpy and safetensors, for llama_cpp"""
    batch_sizes: tuple[int, ...] = (8, 32)
    """sizes of the padded batches"""
    streams: tuple[int, ...] = (1, 8)
    """numbers of equal sequences, of 16 tokens and then 64 new ones, that are raced as well"""
    temperature: float = 0.0
    """of ours; peers take the likeliest token. With random weights the likeliest soon repeat
    themselves, and at 1 nothing does: --speculate races against ours without it"""
    rounds: int = 3
    """turns of each contender; medians count"""

    def __post_init__(self):
        require_at_least(self, 1, "requests", "rounds")
        require_at_least(self, 0, "temperature")
        require_ranges(self, "prompt_tokens", "output_tokens")
        for peer in self.peers:
            interpreter = INTERPRETERS.get(peer)
            require(
                interpreter is None or getattr(self, interpreter) is not None,
                f"the peer {peer} needs an interpreter that has it: --{interpreter}=PATH",
                param="peers",
            )
        longest = self.prompt_tokens[1] + self.output_tokens[1]
        require(
            longest <= self.model.block_size,
            f"prompts and outputs of up to {longest} tokens do not fit "
            f"block_size={self.model.block_size}",
            param="block_size",
        )
        stream = STREAM_PROMPT_TOKENS + STREAM_OUTPUT_TOKENS
        require(
            not self.streams or stream <= self.model.block_size,
            f"streams of {stream} tokens do not fit block_size={self.model.block_size}: "
            "leave them out with --streams and no number",
            param="streams",
        )


def generate_requests(config: BenchGenerateConfig) -> list[Request]:
    """Return the ragged job: a function of the seed, the vocabulary and the ranges."""
    rng = np.random.default_rng(config.seed)
    requests = []
    for _ in range(config.requests):
        prompt_length = random_length(rng, config.prompt_tokens)
        prompt = rng.integers(config.model.vocab_size, size=prompt_length).tolist()
        requests.append(Request(prompt, random_length(rng, config.output_tokens)))
    return requests


def stream_requests(config: BenchGenerateConfig, streams: int) -> list[Request]:
    """Return a job of requests that are all equally long."""
    requests = []
    for i in range(streams):
        rng = np.random.default_rng(i)
        prompt = rng.integers(config.model.vocab_size, size=STREAM_PROMPT_TOKENS).tolist()
        requests.append(Request(prompt, STREAM_OUTPUT_TOKENS))
    return requests


class StepFigures(NamedTuple):
    """What one step of the engine held and what it took."""

    kv_utilization: float  # share of the slots of held pages that hold a token
    running: float  # sequences
    host_seconds: float  # CPU time of the thread that calls Engine.step
    seconds: float  # wall time


class EngineGeneration(Contender):
    """The engine, with all requests there from the start."""

    def __init__(self, config: BenchGenerateConfig, requests: list[Request]):
        from flax import nnx

        from engine import Engine
        from mesh import prepare_devices
        from model import GPT

        self.config = config
        self.requests = requests
        prepare_devices(config.engine.mesh)
        model = GPT(config.model, rngs=nnx.Rngs(0))
        self.engine = Engine(model, None, config.engine, progress=False)
        self.steps: list[StepFigures] = []
        self.running_when_full: list[int] = []  # sequences, in steps whose pool had no room left

    def warm_up(self) -> None:
        """Do nothing: an engine compiles all that it will ever run when it is made."""

    def run(self, n: int) -> None:
        """Do the job n times."""
        from sequence import SamplingParams

        for _ in range(n):
            # Otherwise the second turn would find every prompt in the prefix cache.
            self.engine.blocks.forget()
            for seed, (prompt, output_tokens) in enumerate(self.requests):
                how = SamplingParams(
                    max_tokens=output_tokens, temperature=self.config.temperature, seed=seed
                )
                self.engine.add(prompt, how)
            while self.engine.busy:
                self._step()

    def _step(self) -> None:
        """Do one step of the engine and note its figures."""
        begin = time.perf_counter()
        host_begin = time.thread_time()
        self.engine.step()
        host_seconds = time.thread_time() - host_begin
        seconds = time.perf_counter() - begin
        stats = self.engine.stats()
        if stats.pages_held == 0:
            return
        utilization = stats.tokens_held / (stats.pages_held * self.config.engine.page_size)
        self.steps.append(StepFigures(utilization, stats.running, host_seconds, seconds))
        if stats.waiting and stats.pages_held > 0.9 * stats.pages:
            self.running_when_full.append(stats.running)

    def report(self) -> dict:
        """Return means over all steps."""
        means = StepFigures(*np.mean(self.steps, axis=0).tolist())
        figures: dict[str, Any] = {
            "kv_utilization": round(means.kv_utilization, 4),
            "running": round(means.running, 2),
            "host_share": round(means.host_seconds / means.seconds, 4),
            "ms_per_step": milliseconds(means.seconds),
        }
        if self.running_when_full:
            figures["in_flight"] = self._in_flight()
        stats = self.engine.stats()
        if stats.num_draft_tokens > 0:
            figures["guesses_right"] = round(stats.num_accepted_tokens / stats.num_draft_tokens, 3)
        return figures

    def _in_flight(self) -> dict[str, float]:
        """Return how many unfinished sequences a full pool held, and how many a dense cache of
        the same memory would hold.

        Each sequence of a dense cache has a row as long as the longest request, and waits there
        for the longest output."""
        longest = max(len(r.prompt) + r.output_tokens for r in self.requests)
        outputs = [r.output_tokens for r in self.requests]
        unfinished_share = float(np.mean(outputs)) / max(outputs)
        slots = (self.engine.blocks.num_pages - 1) * self.config.engine.page_size
        return {
            "paged": round(float(np.mean(self.running_when_full)), 2),
            "dense_same_memory": round(slots / longest * unfinished_share, 2),
        }


class DenseGeneration(Contender):
    """Our own dense generate on padded batches."""

    def __init__(self, config: GPTConfig, requests: list[Request], batch_size: int):
        from flax import nnx

        from kernels.cpu_kernels import choose_packing
        from model import GPT

        self.batches = padded_batches(requests, batch_size)
        packing = choose_packing(config.dtype)
        self.model = GPT(config, rngs=nnx.Rngs(0)).for_inference(packing=packing)

    def warm_up(self) -> None:
        """Do the job once: every batch may have shapes of its own."""
        self.run(1)

    def run(self, n: int) -> None:
        """Do the job n times."""
        for prompts, longest_output in self.batches * n:
            self.model.generate(prompts, longest_output, temperature=0)


class ProductsOnly(Contender):
    """The engine's products with the weights and nothing else, in its shapes and as often.

    It shows what is left to gain, and what is not, with the products as they are."""

    def __init__(self, config: BenchGenerateConfig, requests: list[Request]):
        import jax.numpy as jnp
        from flax import nnx

        from model import GPT

        model = GPT(config.model, rngs=nnx.Rngs(0))
        self.calls = count_calls(model, config.engine, requests)
        self.products = jitted_products(model, config.engine)
        self.inputs = {
            (rows, tokens): jnp.ones((rows, tokens, config.model.n_embd))
            for rows, tokens in self.calls
        }

    def warm_up(self) -> None:
        """Compile for every shape."""
        for x in self.inputs.values():
            self.products(x).block_until_ready()

    def run(self, n: int) -> None:
        """Do the products of n times the job."""
        for shape, count in self.calls.items():
            for _ in range(n * count):
                self.products(self.inputs[shape]).block_until_ready()

    def report(self) -> dict:
        """Return how often each shape occurs in the job."""
        ordered = sorted(self.calls.items())
        return {"calls": {f"{rows}x{tokens}": count for (rows, tokens), count in ordered}}


def count_calls(model, config: EngineConfig, requests: list[Request]) -> Counter:
    """Run the job on an engine; return its calls of model_step by shape (rows, tokens)."""
    from engine import Engine
    from sequence import SamplingParams

    engine = Engine(model, None, config, progress=False)
    engine.generate(
        [r.prompt for r in requests],
        [SamplingParams(max_tokens=r.output_tokens, temperature=0) for r in requests],
        progress=False,
    )
    return engine.calls


def jitted_products(model, config: EngineConfig) -> Callable:
    """Return a jitted function of x (R, T, C): all products of a call, one after the other.

    Each product needs the result of the one before, so that XLA leaves none out."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from kernels.cpu_kernels import choose_packing

    packing = choose_packing(model.config.dtype, config.weights, config.cpu_kernels)
    graphdef, params = nnx.split(model.for_inference(packing=packing))

    @jax.jit
    def products(params, x):
        model = nnx.merge(graphdef, params)
        R, T, _ = x.shape
        for block in model.h:
            q, k, v = block.attn.query_key_value(x, jnp.arange(T))
            needs_all = q + (k + v).sum(2, keepdims=True)  # (R, T, H, D)
            x = x + block.attn.c_proj(needs_all.reshape(R, T, -1))
            x = x + block.mlp(x)
        return model.logits(x[:, -1:])

    # As an argument, the weights are no constants of the program.
    return partial(products, params)


# The peers that run padded batches of a size.
PADDED = {"dense": DenseGeneration, "transformers": TransformersPadded}


def other_interpreter(
    config: BenchGenerateConfig, peer: str, requests: list[Request], max_num_seqs: int
) -> ContenderProcess:
    """Start a peer that has an interpreter of its own, for at most so many sequences at once."""
    python = getattr(config, INTERPRETERS[peer])
    arguments = (python, config.model, requests, max_num_seqs)
    if peer == "vllm":
        return ContenderProcess(vllm, *arguments)
    weights = "q8_0" if peer == "llama_cpp_q8_0" else config.model.dtype
    return ContenderProcess(llama_cpp, *arguments, weights)


def bench_generate(config: BenchGenerateConfig) -> dict:
    """Return useful tokens per second on the ragged job, then on equal streams."""
    requests = generate_requests(config)
    contenders = ragged_contenders(config, requests)
    report = {
        "bench": "generate",
        "dtype": config.model.dtype,
        **race(contenders, config.rounds, total_output(requests)),
    }
    report["kv_utilization"] = report["ours"]["kv_utilization"]
    report["kv_utilization_dense"] = {
        size: round(dense_utilization(requests, size), 4) for size in config.batch_sizes
    }
    report["streams"] = {streams: race_streams(config, streams) for streams in config.streams}
    return report | bandwidth_limit(config.model)


def ours(config: BenchGenerateConfig, requests: list[Request]) -> dict[str, ContenderProcess]:
    """Start the engine, and beside one that guesses ahead one that does not."""
    contenders = {"ours": ContenderProcess(EngineGeneration, config, requests)}
    if config.engine.speculate > 0:
        plain = dataclasses.replace(config.engine, speculate=0)
        config = dataclasses.replace(config, engine=plain)
        contenders["without_guesses"] = ContenderProcess(EngineGeneration, config, requests)
    return contenders


def ragged_contenders(
    config: BenchGenerateConfig, requests: list[Request]
) -> dict[str, ContenderProcess]:
    """Start ours and the peers of the config: a padded one once for each batch size."""
    contenders = ours(config, requests)
    for peer in config.peers:
        if peer in PADDED:
            for size in config.batch_sizes:
                process = ContenderProcess(PADDED[peer], config.model, requests, size)
                contenders[f"{peer}_{size}"] = process
        elif peer == "products":
            contenders[peer] = ContenderProcess(ProductsOnly, config, requests)
        elif peer in INTERPRETERS:
            most = min(config.requests, PEERS_MAX_NUM_SEQS)
            contenders[peer] = other_interpreter(config, peer, requests, most)
        else:
            contenders[peer] = ContenderProcess(TransformersContinuous, config.model, requests)
    return contenders


def race_streams(config: BenchGenerateConfig, streams: int) -> dict:
    """Race at so many equal sequences, which fit one batch exactly."""
    engine = dataclasses.replace(
        config.engine, max_num_seqs=streams, prefill_tokens=STREAM_PREFILL_TOKENS
    )
    config = dataclasses.replace(config, engine=engine)
    requests = stream_requests(config, streams)
    contenders = ours(config, requests)
    for peer in config.peers:
        if peer in PADDED:
            contenders[peer] = ContenderProcess(PADDED[peer], config.model, requests, streams)
        elif peer in INTERPRETERS:
            contenders[peer] = other_interpreter(config, peer, requests, streams)
    if "products" in config.peers:
        contenders["products"] = ContenderProcess(ProductsOnly, config, requests)
    return race(contenders, config.rounds, total_output(requests))


def race(contenders: dict[str, ContenderProcess], rounds: int, tokens: int) -> dict:
    """Take turns at one job of so many tokens; return everyone's figures and the ratio."""
    take_turns(contenders, rounds, 1)
    results = {}
    for name, contender in contenders.items():
        results[name] = {"tokens_per_s": round(tokens / contender.median, 1), **contender.close()}
        print(f"{name:24}{in_words(results[name])}", flush=True)
    peers = [c.median for name, c in contenders.items() if name not in ("ours", "products")]
    return results | ratio(contenders["ours"].median, peers)


def bandwidth_limit(config: GPTConfig) -> dict[str, float]:
    """Return the memory's speed and what it allows a single stream.

    A step reads every weight once; the keys and values of one sequence are little beside them."""
    bandwidth = read_bandwidth()
    weights = config.num_params(embeddings=False) * BYTES_PER_WEIGHT[config.dtype]
    return {
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "single_stream_limit_tokens_per_s": round(bandwidth / weights, 1),
    }


def read_bandwidth() -> float:
    """Return the bytes per second at which this process's device reads memory.

    That is the best of ten sums of an array of 512 MiB, far larger than any cache."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(2**27)
    total = jax.jit(jnp.sum)
    best = math.inf
    for _ in range(10):
        begin = time.perf_counter()
        total(x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return x.nbytes / best
