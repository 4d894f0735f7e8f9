"""Do a request's tokens and logprobs, compared as bits, depend on anything but the request?

Run it: python tests/same_bits.py

It runs the same seeded requests together, in another order, one by one, in small and large chunks,
with and without prefix hits, and in pools one three times the other, the smaller with preemption;
with --speculate 2 4 7 guessing ahead too.
As a control, it resumes requests by computing their generated tokens again as if they were prompt:
what other engines do after a preemption. With XLA that must give other bits; with the native CPU
code it must give the same. It prints a line for each
way, and ends with 1 if one of them gives other bits than it should. Start with `compare`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import CPUConfig, EngineConfig, GPTConfig
from engine import Engine
from mesh import prepare_devices
from model import GPT
from sequence import Logprobs, SamplingParams

Request = tuple[list[int], SamplingParams]
Result = tuple[list[int], list[Logprobs]]  # tokens, and logprobs as their exact value

DEFAULT_CPU = CPUConfig()

WAYS_TO_SAMPLE: tuple[dict, ...] = (
    {"temperature": 0},
    {},
    {"temperature": 0.8, "top_k": 20},
    {"top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"logit_bias": {3: 2.0}},
)


class Way(NamedTuple):
    """A way of running the requests, and what came of it."""

    name: str
    different: int
    """Requests that got other bits than in the first way."""
    must_agree: bool = True
    """Whether there must be none of them. The control must have some, if XLA computes."""

    @property
    def as_it_must_be(self) -> bool:
        """Whether the bits agree if and only if they must."""
        return (self.different == 0) == self.must_agree


class Setting(NamedTuple):
    """A model, and how the engines that run it are laid out."""

    model: GPT
    max_num_seqs: int
    page_size: int
    prefill_tokens: int
    num_scheduler_steps: int
    progress: bool
    cpu: CPUConfig
    mesh: str | None = None

    def engine(self, num_pages: int, chunk_size: int | None = None, speculate: int = 0) -> Engine:
        """Return an engine with a pool of so many pages."""
        config = EngineConfig(
            page_size=self.page_size,
            kv_blocks=num_pages,
            max_num_seqs=self.max_num_seqs,
            prefill_tokens=self.prefill_tokens,
            chunk_size=chunk_size,
            num_scheduler_steps=self.num_scheduler_steps,
            speculate=speculate,
            mesh=self.mesh,
            **dataclasses.asdict(self.cpu),
        )
        return Engine(self.model, None, config, progress=self.progress)


def make_requests(n: int, vocab_size: int, longest: int, page_size: int) -> list[Request]:
    """Return n requests, all sampling parameters among them.

    A third of the prompts begin like another one."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest // 2, size=(n, 2))
    requests: list[Request] = []
    for i, (length, max_tokens) in enumerate(lengths.tolist()):
        prompt = rng.integers(vocab_size, size=length).tolist()
        if i % 3 == 2:
            beginning = requests[i - 2][0][: 2 * page_size]
            prompt = (beginning + prompt)[: longest // 2]
        way = WAYS_TO_SAMPLE[i % len(WAYS_TO_SAMPLE)]
        requests.append((prompt, SamplingParams(max_tokens=max_tokens, seed=i, logprobs=5, **way)))
    return requests


def run(engine: Engine, requests: list[Request], order: list[int] | None = None) -> list[Result]:
    """Return what each request gets if all are added at once, in the given order."""
    order = list(range(len(requests))) if order is None else order
    prompts = [requests[i][0] for i in order]
    params = [requests[i][1] for i in order]
    outputs = engine.generate(prompts, params, progress=False)
    result_of: dict[int, Result] = {}
    for i, [output] in zip(order, outputs, strict=True):
        result_of[i] = output.token_ids, output.logprobs or []
    return [result_of[i] for i in range(len(requests))]


def recompute(engine: Engine, requests: list[Request], whole: list[Result]) -> list[Result]:
    """Run each request again from half of its generated tokens on, which join the prompt.

    It should give the same as `whole`. With XLA it does not in bits."""
    engine.blocks.forget()
    halves = [len(tokens) // 2 for tokens, _ in whole]
    second_halves = []
    for (prompt, params), (tokens, _), half in zip(requests, whole, halves, strict=True):
        rest = dataclasses.replace(params, max_tokens=params.max_tokens - half)
        second_halves.append((prompt + tokens[:half], rest))
    results = []
    for first, second, half in zip(whole, run(engine, second_halves), halves, strict=True):
        tokens, logprobs = first
        more_tokens, more_logprobs = second
        results.append((tokens[:half] + more_tokens, logprobs[:half] + more_logprobs))
    return results


def count_different(results: list[Result], expected: list[Result]) -> int:
    """Return how many requests got something else."""
    return sum(a != b for a, b in zip(results, expected, strict=True))


def compare(
    model: GPT,
    n: int,
    *,
    max_num_seqs: int,
    page_size: int = 16,
    prefill_tokens: int = 64,
    num_scheduler_steps: int = 1,
    speculate: tuple[int, ...] = (),
    progress: bool = True,
    cpu: CPUConfig = DEFAULT_CPU,
    mesh: str | None = None,
) -> Iterator[Way]:
    """Yield one Way after the other of running n requests."""
    setting = Setting(
        model, max_num_seqs, page_size, prefill_tokens, num_scheduler_steps, progress, cpu, mesh
    )
    size = model.config.block_size
    requests = make_requests(n, model.config.vocab_size, size, page_size)
    few_pages = 1 + max_num_seqs * size // page_size // 4  # on average a request needs size / 2
    large = setting.engine(3 * few_pages)
    together = run(large, requests)
    yield from ways_of_one_engine(large, requests, together)

    engine = setting.engine(3 * few_pages)
    alone = [run(engine, [request])[0] for request in requests]
    yield Way("alone", count_different(alone, together))

    engine = setting.engine(3 * few_pages, chunk_size=page_size)
    yield Way("chunks of a page", count_different(run(engine, requests), together))

    small = setting.engine(few_pages)
    results = run(small, requests)
    assert small.stats().preemptions > 0, "nothing was preempted"
    yield Way("in a pool of a third, preempted", count_different(results, together))

    for guesses in speculate:
        engine = setting.engine(few_pages, speculate=guesses)
        results = run(engine, requests)
        right = engine.stats().num_accepted_tokens
        assert right > 0, "nothing was guessed right"
        name = f"guessing {guesses} ahead, {right} tokens right, in the pool of a third"
        yield Way(name, count_different(results, together))

    # These penalties tell generated tokens from the prompt's: as prompt, they are other requests.
    alike = [i for i, (_, p) in enumerate(requests) if not p.frequency_penalty]
    requests = [requests[i] for i in alike]
    together = [together[i] for i in alike]
    results = recompute(large, requests, together)
    name = "control: generated tokens computed again as prompt"
    must_agree = large.runner.same_bits_in_any_shape
    yield Way(name, count_different(results, together), must_agree)


def ways_of_one_engine(
    engine: Engine, requests: list[Request], together: list[Result]
) -> Iterator[Way]:
    """Yield what `compare` does on an engine that has run the requests once before."""
    stats = engine.stats()
    assert stats.hit_tokens < stats.queried_tokens / 2, (
        "most prefixes were found: there is no miss to compare"
    )
    yield Way(f"together, {engine.runner.decode_sizes} rows", 0)

    order = np.random.default_rng(1).permutation(len(requests)).tolist()
    shuffled = run(engine, requests, order)
    yield Way("in another order", count_different(shuffled, together))

    hits_before = engine.stats().hit_tokens
    again = run(engine, requests)
    assert engine.stats().hit_tokens > hits_before, "no prefix was found"
    yield Way("prefix hits", count_different(again, together))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max_num_seqs", type=int, default=64)
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_head", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--weights", choices=("int8",))
    parser.add_argument("--cpu_kernels", choices=("auto", "off"), default="auto")
    parser.add_argument("--num_scheduler_steps", type=int, default=1)
    parser.add_argument("--speculate", type=int, nargs="*", default=())
    parser.add_argument("--mesh")
    return parser.parse_args()


def main() -> None:
    """Compare the ways and print what came of each."""
    args = parse_arguments()
    config = GPTConfig(
        block_size=args.block_size,
        vocab_size=5000,
        n_layer=args.n_layer,
        n_head=args.n_head,
        n_embd=args.n_embd,
        dtype=args.dtype,
    )
    prepare_devices(args.mesh)
    model = GPT(config, rngs=nnx.Rngs(0))
    wrong = 0
    cpu = CPUConfig(args.cpu_kernels, args.weights)
    ways = compare(
        model,
        args.requests,
        max_num_seqs=args.max_num_seqs,
        num_scheduler_steps=args.num_scheduler_steps,
        speculate=tuple(args.speculate),
        cpu=cpu,
        mesh=args.mesh,
    )
    for way in ways:
        wrong += not way.as_it_must_be
        print(
            f"{way.name}: {way.different} of {args.requests} requests have other bits", flush=True
        )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
