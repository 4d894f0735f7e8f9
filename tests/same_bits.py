"""Do a request's tokens and logprobs, compared as bits, depend on anything but the request? python tests/same_bits.py

Runs the same seeded requests one by one, together, in another order, in small and large chunks, with and without prefix hits,
and in pools one three times the other, the smaller with preemption. As a control, it resumes requests by computing their generated tokens
again as if they were prompt: what other engines do after a preemption, and what must give other bits. Prints a line for each
way, and ends with 1 if one of them gives other bits than it should."""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import EngineConfig, GPTConfig
from engine import Engine
from model import GPT
from sequence import SamplingParams

WAYS_TO_SAMPLE = (
    dict(temperature=0),
    dict(),
    dict(temperature=0.8, top_k=20),
    dict(top_p=0.9),
    dict(temperature=1.3, min_p=0.05),
    dict(repetition_penalty=1.3),
    dict(frequency_penalty=0.5, presence_penalty=0.3),
    dict(logit_bias={3: 2.0}),
)


def make_requests(n: int, vocab_size: int, longest: int, page_size: int):
    """n (prompt, SamplingParams): a third of the prompts begin like another one; all sampling parameters take part."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest // 2, size=(n, 2))
    requests = []
    for i, (length, max_tokens) in enumerate(lengths.tolist()):
        prompt = rng.integers(vocab_size, size=length).tolist()
        if i % 3 == 2:
            prompt = (requests[i - 2][0][: 2 * page_size] + prompt)[: longest // 2]
        requests.append(
            (
                prompt,
                SamplingParams(
                    max_tokens=max_tokens,
                    seed=i,
                    logprobs=5,
                    **WAYS_TO_SAMPLE[i % len(WAYS_TO_SAMPLE)],
                ),
            )
        )
    return requests


def run(engine: Engine, requests, order=None) -> list:
    """What each request got: tokens, and logprobs as their exact value."""
    order = range(len(requests)) if order is None else order
    outputs = engine.generate(
        [requests[i][0] for i in order], [requests[i][1] for i in order], progress=False
    )
    got = {i: (out.token_ids, out.logprobs) for i, [out] in zip(order, outputs)}
    return [got[i] for i in range(len(requests))]


def recompute(engine: Engine, requests, whole) -> list:
    """Each request again from half of its generated tokens on, which join the prompt: should be the same, is not in bits."""
    halves = [len(tokens) // 2 for tokens, _ in whole]
    rest = [
        (prompt + tokens[:half], dataclasses.replace(params, max_tokens=params.max_tokens - half))
        for (prompt, params), (tokens, _), half in zip(requests, whole, halves)
    ]
    return [
        (tokens[:half] + more, logprobs[:half] + more_logprobs)
        for (tokens, logprobs), (more, more_logprobs), half in zip(whole, run(engine, rest), halves)
    ]


def compare(
    model: GPT,
    n: int,
    *,
    max_num_seqs: int,
    page_size: int = 16,
    prefill_tokens: int = 64,
    progress=True,
):
    """Yields (way, requests with other bits than in the first way, whether there must be none)."""
    size = model.config.block_size
    requests = make_requests(n, model.config.vocab_size, size, page_size)
    few = 1 + max_num_seqs * size // page_size // 4  # on average a request needs half of block_size

    def engine(num_pages, chunk_size=prefill_tokens):
        return Engine(
            model,
            None,
            EngineConfig(
                page_size=page_size,
                kv_blocks=num_pages,
                max_num_seqs=max_num_seqs,
                prefill_tokens=prefill_tokens,
                chunk_size=chunk_size,
            ),
            progress=progress,
        )

    different = lambda got: sum(a != b for a, b in zip(got, together, strict=True))
    large = engine(3 * few)
    together = run(large, requests)
    assert large.stats().hit_tokens < large.stats().queried_tokens / 2, (
        "most prefixes were found: there is no miss to compare"
    )
    yield f"together, {large.decode_rows} rows", 0, True
    yield (
        "in another order",
        different(run(large, requests, np.random.default_rng(1).permutation(n).tolist())),
        True,
    )
    hits = large.stats().hit_tokens
    yield "prefix hits", different(run(large, requests)), True
    assert large.stats().hit_tokens > hits, "no prefix was found"
    yield (
        "alone",
        different([run(engine, [r])[0] for engine in [engine(3 * few)] for r in requests]),
        True,
    )
    yield "chunks of a page", different(run(engine(3 * few, page_size), requests)), True
    small = engine(few)
    yield "in a pool of a third, preempted", different(run(small, requests)), True
    assert small.stats().preemptions > 0, "nothing was preempted"
    yield (
        "control: generated tokens computed again as prompt",
        different(recompute(large, requests, together)),
        False,
    )


def main() -> None:
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
    args = parser.parse_args()
    model = GPT(
        GPTConfig(
            block_size=args.block_size,
            vocab_size=5000,
            n_layer=args.n_layer,
            n_head=args.n_head,
            n_embd=args.n_embd,
            dtype=args.dtype,
        ),
        rngs=nnx.Rngs(0),
    )
    wrong = 0
    for way, different, must_agree in compare(model, args.requests, max_num_seqs=args.max_num_seqs):
        wrong += (different == 0) != must_agree
        print(f"{way}: {different} of {args.requests} requests have other bits", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
