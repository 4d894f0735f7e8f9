"""Continuous batching: many sequences of unequal length through one jitted step. No HTTP.

Read Engine.step, then Scheduler.schedule, then model_step. Shapes: see model.py and paged_attention.py; here `R` rows of a
call with `T` new tokens each, `S` rows to sample, `M` pages of the longest sequence.

The same bits. A request's tokens and logprobs do not depend on who else runs, on chunking, on prefix hits, on preemption or
on the pool's size, because nothing that reaches a number does:
- Prompt tokens go through the shape (R, P), R tiles of one page each. A tile is one page of one sequence, wherever the chunks
  end, so a chunk is just how many tiles of a sequence share a step. Generated tokens go through the shape (R, 1).
- For a fixed shape the bits of a row depend neither on its slot nor on the other rows; of either kind of shape only those R are
  used that a probe at start-up found to give the bits of the largest.
- Preemption moves pages to host memory and back; only pages that prefill filled are found by other prompts.
- A token is drawn with a key made of its request's seed, its sample's index and its position.
"""

import dataclasses
import itertools
import secrets
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from block_manager import BlockManager
from config import EngineConfig, GPTConfig
from errors import require
from model import GPT
from paged_attention import PagedKVCache, num_pages_for
from sampling import Slots, StepNeeds, sample
from scheduler import Plan, Scheduler
from sequence import (
    MAX_BIASES,
    MAX_LOGPROBS,
    Logprobs,
    Output,
    SamplingParams,
    Sequence,
    TextStream,
    Times,
)
from tokenizer import Tokenizer


class Sampled(NamedTuple):
    """What comes back from a call. Logprobs are a tuple: of the token, of the likeliest, ids of the likeliest."""

    token: jax.Array  # (S,) int32
    logprobs: tuple  # (S,), (S, MAX_LOGPROBS), (S, MAX_LOGPROBS)
    prompt: (
        tuple | None
    )  # of the token that follows each prompt token: (R, T), (R, T, MAX_LOGPROBS) twice


@partial(jax.jit, static_argnames=("config", "attention", "T"), donate_argnames=("pool", "slots"))
def model_step(
    params,
    pool,
    slots: Slots,
    rows,
    samples,
    needs: StepNeeds,
    *,
    config: GPTConfig,
    attention: str,
    T: int,
):
    """Advances each row by up to T tokens and samples what follows. `pool` and `slots` are donated.

    rows (R, 3 + M) int32: slot, tokens in the pages, new tokens (0 for a padding row), page table. Tokens are read from the
    slots. samples (S, 2) int32: row whose last new token to sample from, slot that gets the sample as its next token.
    Returns pool, slots, Sampled."""
    model = nnx.merge(inference_graphdef(config), params)
    slot, start, new = rows[:, 0], rows[:, 1], rows[:, 2]
    cache = PagedKVCache(*pool, rows[:, 3:], start, new, attention)
    at = start[:, None] + jnp.arange(T)  # (R, T)
    x, cache = model.hidden(slots.tokens[slot[:, None], at], cache)  # (R, T, C)

    source, slot = samples[:, 0], samples[:, 1]
    last = x[source, jnp.maximum(new[source], 1) - 1]  # (S, C)
    length = start[source] + new[source]  # position of the sampled token
    logits = model.logits(last[:, None])[:, 0]  # (S, V)
    token = sample(logits, slots, slot, length, needs)

    def score(logits, token):
        """Log softmax of token (...), and the likeliest tokens."""
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return (jnp.take_along_axis(logits, token[..., None], -1) - total)[..., 0], total

    def likeliest(logits, total):
        largest, ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
        return largest - total, ids

    logprob, total = score(logits, token)
    like = lambda f, *args: jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(f, *args)
    )
    skip = lambda f: lambda *args: like(f, *args)
    top = jax.lax.cond(needs.top, likeliest, skip(likeliest), logits, total)

    def score_prompt(x, next_token):
        """Tile by tile, so that logits exist for one page of tokens at a time."""

        def tile(x_token):
            logits = model.logits(x_token[0][None])[0]  # (T, V)
            logprob, total = score(logits, x_token[1])
            return logprob, *likeliest(logits, total)

        return jax.lax.map(tile, (x, next_token))

    prompt = None
    if T > 1:
        next_token = slots.tokens[rows[:, :1], at + 1]
        prompt = jax.lax.cond(needs.prompt, score_prompt, skip(score_prompt), x, next_token)
    slots = dataclasses.replace(slots, tokens=slots.tokens.at[slot, length].set(token))
    return (cache.k_pages, cache.v_pages), slots, Sampled(token, (logprob, *top), prompt)


@lru_cache
def inference_graphdef(config: GPTConfig) -> nnx.GraphDef:
    """The static half of GPT.for_inference. Looked up by config, whose hash costs less than that of the graph at each call."""
    return nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)).for_inference()))[0]


@partial(jax.jit, donate_argnums=0)
def seat(slots: Slots, slot, row: Slots) -> Slots:
    """Puts a sequence into a slot."""
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one), slots, row)


@jax.jit
def read_page(pool, page):
    """Keys and values of one page: (L, P, C) each."""
    return jax.tree.map(lambda pages: pages[:, page], pool)


@partial(jax.jit, donate_argnums=0)
def write_page(pool, page, kv):
    return jax.tree.map(lambda pages, one: pages.at[:, page].set(one), pool, kv)


@partial(jax.jit, donate_argnums=0)
def copy_page(pool, source, target):
    return jax.tree.map(lambda pages: pages.at[:, target].set(pages[:, source]), pool)


class Call(NamedTuple):
    """A model_step in flight."""

    tiles: list[tuple[Sequence, int, int]]  # of a prefill
    seqs: list[Sequence]  # who gets the samples
    needs: StepNeeds
    sampled: Sampled


@dataclass(frozen=True)
class Stats:
    running: int
    waiting: int
    pages: int  # of the pool, without the null page
    pages_held: int  # by sequences; the others are free, though they may be cached
    tokens_held: int  # in these pages
    queried_tokens: (
        int  # prompt tokens looked up in the prefix cache, since the start, like all below
    )
    hit_tokens: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int


class Engine:
    """Runs requests on a model: `add` them and `step` while `busy`; or `generate`. Not thread-safe."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig = EngineConfig(),
        *,
        progress: bool = True,
    ):
        """Compiles all that will ever run. tokenizer: for text in outputs, stop strings and the end-of-text token."""
        rows, tokens = (16, 128) if jax.default_backend() == "cpu" else (256, 2048)
        config = dataclasses.replace(
            config,
            max_num_seqs=config.max_num_seqs or rows,
            prefill_tokens=config.prefill_tokens or tokens,
        )
        self.config, self.model_config, self.tokenizer = config, model.config, tokenizer
        # A restored checkpoint is committed to its device, and with it whatever a step returns. All that a step takes is so from the
        # start: what became so after the first step would compile every program again, in the middle of the first request.
        put = partial(jax.device_put, device=jax.devices()[0])
        self.params = put(model.for_inference().params())
        dtype, P = config.kv_dtype or model.config.dtype, config.page_size
        num_pages = config.kv_blocks or num_pages_for(
            model.config, P, dtype, config.kv_cache_memory, config.attention
        )
        cache = PagedKVCache.create(model.config, num_pages, P, dtype, config.attention)
        self.pool, self.attention = put((cache.k_pages, cache.v_pages)), cache.attention
        self.blocks = BlockManager(num_pages, P)
        self.tiles = config.prefill_tokens // P
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            tiles=self.tiles,
            chunk_size=config.chunk_size or config.prefill_tokens,
        )
        self.pages_per_seq = self.blocks.pages_for(model.config.block_size)
        self.swapped: dict[tuple[int, int], list] = {}  # pages of preempted sequences
        self.leaving: list[
            tuple[int, int]
        ] = []  # those of them that are on their way to host memory
        self.requests: dict[int, list[Sequence]] = {}  # those that have not ended
        self.ids = itertools.count()
        self.in_flight: list[Call] = []
        self.prompt_tokens = self.generation_tokens = 0
        self.prefill_tiles, self.decode_rows = self._warm_up(progress)
        self.programs_at_start = self.programs()

    def add(self, prompt: list[int], params: SamplingParams = SamplingParams()) -> int:
        """Queues a request, returns its id. Raises ValueError if it can never be served as it is asked."""
        V, size = self.model_config.vocab_size, self.model_config.block_size
        prompt = list(map(int, prompt))
        require(
            len(prompt) > 0,
            "the prompt is empty: give it at least 1 token, for example the end-of-text token",
        )
        for name, ids in (
            ("prompt", prompt),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            wrong = [t for t in ids if not 0 <= t < V]
            require(
                not wrong,
                f"{name} has token {wrong and wrong[0]}, and the vocabulary ends at {V - 1}",
            )
        require(
            len(prompt) + params.max_tokens <= size,
            f"{len(prompt)} prompt tokens and max_tokens={params.max_tokens} make {len(prompt) + params.max_tokens}, and the "
            f"model's context is {size}: ask for fewer",
        )
        require(
            self.tokenizer is not None or not params.stop,
            "stop strings need an engine with a tokenizer",
        )
        stop_ids = set(params.stop_token_ids)
        if (
            self.tokenizer is not None
            and self.tokenizer.eos_id is not None
            and not params.ignore_eos
        ):
            stop_ids.add(self.tokenizer.eos_id)
        biases = len(params.logit_bias) + len(stop_ids)
        require(
            biases <= MAX_BIASES,
            f"logit_bias and stop tokens have {biases} entries, and {MAX_BIASES} fit",
        )
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(63))
        request_id = next(self.ids)
        seqs = self.scheduler.add(prompt, params, request_id)
        for seq in seqs:
            seq.stop_ids = stop_ids
            seq.times = [time.perf_counter()]
            seq.text = None if self.tokenizer is None else TextStream(self.tokenizer, params.stop)
            if not seq.prompt_logprobs:
                seq.prompt_logprobs = [
                    None
                ]  # the first token has none; followers see what their leader fills in
                for follower in seq.followers:
                    follower.prompt_logprobs = seq.prompt_logprobs
        self.requests[request_id] = seqs
        return request_id

    @property
    def busy(self) -> bool:
        return bool(self.requests or self.in_flight)

    def step(self) -> list[Output]:
        """Starts a step, and while it runs takes in the one before: its samples are the one thing that is waited for."""
        started = self._launch(self.scheduler.schedule())
        assert started or self.in_flight or not self.requests, (
            f"none of {len(self.requests)} requests can go on"
        )
        landed, self.in_flight = self.in_flight, started
        return self._collect(landed)

    def cancel(self, request_id: int) -> None:
        """Ends a request without further outputs; one that has ended already is left as it is."""
        for seq in self.requests.pop(request_id, []):
            if not seq.finished:
                self._finish(seq)

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams | list[SamplingParams] = SamplingParams(),
        *,
        progress: bool = True,
    ) -> list[list[Output]]:
        """The n samples of each prompt, whole; params for all prompts or for each. The engine must not be busy."""
        assert not self.busy, "generate and add at the same time"
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        require(
            len(params) == len(prompts),
            f"{len(prompts)} prompts and {len(params)} SamplingParams: give one or one for each",
        )
        ids = [self.add(prompt, p) for prompt, p in zip(prompts, params)]
        done = {i: [None] * p.n for i, p in zip(ids, params)}
        with tqdm(total=sum(p.n for p in params), unit="sample", disable=not progress) as bar:
            while self.busy:
                for out in self.step():
                    whole = done[out.request_id][out.index]
                    done[out.request_id][out.index] = out if whole is None else whole + out
                    bar.update(out.finish_reason is not None)
        return [done[i] for i in ids]

    def stats(self) -> Stats:
        held = self.blocks.num_pages - 1 - self.blocks.num_free
        room = sum(
            len(self.blocks.tables[s.key]) * self.config.page_size - s.computed
            for s in self.scheduler.running
        )
        return Stats(
            len(self.scheduler.running),
            len(self.scheduler.waiting),
            self.blocks.num_pages - 1,
            held,
            held * self.config.page_size - room,
            self.blocks.queried_tokens,
            self.blocks.hit_tokens,
            self.scheduler.preemptions,
            self.prompt_tokens,
            self.generation_tokens,
        )

    def snapshot(self) -> list[tuple[list[tuple[int, int]], bool]]:
        """Of each page: which (request, sample) hold it, and whether it is in the prefix cache."""
        holders = [[] for _ in range(self.blocks.num_pages)]
        for key, table in self.blocks.tables.items():
            for page in table:
                holders[page].append(key)
        return [(keys, page in self.blocks.cached) for page, keys in enumerate(holders)]

    def programs(self) -> int:
        """Compiled programs of all engines of this process; an engine that runs adds none (see programs_at_start)."""
        return sum(f._cache_size() for f in (model_step, seat, read_page, write_page, copy_page))

    def _launch(self, plan: Plan) -> list[Call]:
        for seq, pages in plan.swap_out:
            self.swapped[seq.key] = [read_page(self.pool, page) for page in pages]
        self.leaving = [seq.key for seq, _ in plan.swap_out]
        for source, target in plan.copies:
            self.pool = copy_page(self.pool, source, target)
        for seq, first, pages in plan.swap_in:
            for page, kv in zip(pages, self.swapped[seq.key][first:], strict=True):
                self.pool = write_page(self.pool, page, kv)
        for seq in plan.admitted:
            self.swapped.pop(seq.key, None)
            self.slots = seat(self.slots, seq.slot, self._slot_row(seq))
            if len(seq.times) == 1:
                seq.times.append(time.perf_counter())
        calls = []
        if plan.tiles:
            rows = [
                (seq.slot, start, new, self.blocks.tables[seq.key])
                for seq, start, new in plan.tiles
            ]
            R = next(R for R in self.prefill_tiles if R >= max(len(rows), len(plan.samples)))
            calls.append(self._call(rows, plan.tiles, plan.samples, R, self.config.page_size))
            self.prompt_tokens += sum(new for _, _, new in plan.tiles)
        if plan.decodes:
            rows = [
                (seq.slot, seq.computed - 1, 1, self.blocks.tables[seq.key]) for seq in plan.decodes
            ]
            R = next(R for R in self.decode_rows if R >= len(rows))
            calls.append(self._call(rows, [], list(enumerate(plan.decodes)), R, 1))
        return calls

    def _call(
        self, work: list[tuple], tiles: list, samples: list[tuple[int, Sequence]], R: int, T: int
    ) -> Call:
        """Packs work (slot, tokens in pages, new tokens, page table) into the shape (R, T) and runs model_step on it."""
        padding = self.config.max_num_seqs  # the last slot
        rows, to_sample = (
            np.zeros((R, 3 + self.pages_per_seq), np.int32),
            np.zeros((R, 2), np.int32),
        )
        rows[:, 0] = to_sample[:, 1] = padding
        for row, (slot, start, new, table) in zip(rows, work):
            row[:3] = slot, start, new
            row[3 : 3 + len(table)] = table
        for i, (row, seq) in enumerate(samples):
            to_sample[i] = row, seq.slot
        asked = [seq.params for _, seq in samples]
        needs = StepNeeds(
            any(p.adjusts for p in asked),
            any(p.keeps for p in asked),
            any(p.logprobs for p in asked),
            any(seq.params.prompt_logprobs is not None for seq, _, _ in tiles),
        )
        self.pool, self.slots, sampled = model_step(
            self.params,
            self.pool,
            self.slots,
            rows,
            to_sample,
            needs,
            config=self.model_config,
            attention=self.attention,
            T=T,
        )
        return Call(tiles, [seq for _, seq in samples], needs, sampled)

    def _collect(self, calls: list[Call]) -> list[Output]:
        """Waits for a step's samples, and the pages that leave, and makes outputs of them."""
        wait_for = [
            (
                c.sampled.token,
                c.sampled.logprobs[: None if c.needs.top else 1],
                c.sampled.prompt if c.needs.prompt else None,
            )
            for c in calls
        ]
        results, pages = jax.device_get(
            (wait_for, {key: self.swapped[key] for key in self.leaving})
        )
        self.swapped |= pages
        outputs = []
        for call, (tokens, logprobs, prompt) in zip(calls, results):
            for r, (seq, start, new) in enumerate(call.tiles if call.needs.prompt else []):
                if seq.params.prompt_logprobs is not None:
                    for t, token in enumerate(seq.prompt[start + 1 : start + new + 1]):
                        seq.prompt_logprobs.append(
                            self._logprobs(token, prompt, (r, t), seq.params.prompt_logprobs)
                        )
            for i, seq in enumerate(call.seqs):
                if not seq.finished:
                    token = int(tokens[i])
                    outputs.append(
                        self._output(
                            seq, token, self._logprobs(token, logprobs, i, seq.params.logprobs)
                        )
                    )
        return outputs

    def _logprobs(self, token: int, arrays: tuple, at, top: int | None) -> Logprobs | None:
        if top is None:
            return None
        likeliest = zip(arrays[2][at].tolist()[:top], arrays[1][at].tolist()) if top else ()
        return Logprobs(
            token,
            float(arrays[0][at]),
            {t: p for t, p in likeliest if t < self.model_config.vocab_size},
        )

    def _output(self, seq: Sequence, token: int, logprobs: Logprobs | None) -> Output:
        params = seq.params
        out = Output(*seq.key, [], "", None if params.logprobs is None else [], None, None)
        if len(seq.times) == 2:
            seq.times.append(time.perf_counter())
            if params.prompt_logprobs is not None:
                out.prompt_logprobs = seq.prompt_logprobs
            if params.echo:
                out.token_ids += seq.prompt
                out.text += seq.text.push(seq.prompt, search=False) if seq.text else ""
        if params.max_tokens > 0:
            seq.tokens.append(token)
            out.token_ids.append(token)
            out.logprobs is None or out.logprobs.append(logprobs)
            self.generation_tokens += 1
        made = len(seq.tokens) - seq.prompt_len
        stopped = made > 0 and token in seq.stop_ids
        last = stopped or made >= params.max_tokens
        if seq.text:
            out.text += seq.text.push(
                [] if stopped or not made else [token], last=last, search=made >= params.min_tokens
            )
            stopped |= seq.text.stopped
        if stopped or last:
            out.finish_reason = "stop" if stopped else "length"
            out.times = Times(*seq.times, time.perf_counter())
            self._finish(seq)
        return out

    def _finish(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.swapped.pop(seq.key, None)
        seqs = self.requests.get(seq.key[0], [])
        if all(s.finished for s in seqs):
            self.requests.pop(seq.key[0], None)

    def _slot_row(self, seq: Sequence) -> Slots:
        p, V = seq.params, self.model_config.vocab_size
        tokens = np.zeros(self.model_config.block_size + 1, np.int32)
        tokens[: len(seq.tokens)] = seq.tokens
        banned = seq.stop_ids if p.min_tokens else ()
        bias_ids, biases = (
            np.full(MAX_BIASES, self.model_config.padded_vocab_size, np.int32),
            np.zeros(MAX_BIASES, np.float32),
        )
        for i, (t, bias) in enumerate([*p.logit_bias.items(), *((t, -np.inf) for t in banned)]):
            bias_ids[i], biases[i] = t, bias
        i32, f32 = np.int32, np.float32
        return Slots(
            tokens,
            i32(seq.prompt_len),
            i32(seq.prompt_len + p.min_tokens),
            np.array([p.seed >> 32 & 0xFFFFFFFF, p.seed & 0xFFFFFFFF], np.uint32),
            i32(seq.key[1]),
            f32(p.temperature),
            i32(min(p.top_k or V, V)),
            f32(p.top_p),
            f32(p.min_p),
            f32(p.repetition_penalty),
            f32(p.frequency_penalty),
            f32(p.presence_penalty),
            bias_ids,
            biases,
        )

    def _warm_up(self, progress: bool) -> tuple[list[int], list[int]]:
        """Runs each program once, which compiles it. Returns the tiles to prefill and the rows to decode with, ascending: the
        most that a step can have, and smaller powers of two down to the first whose logprobs have other bits."""
        P, most = self.config.page_size, self.config.max_num_seqs
        n = min(self.tiles, most, self.blocks.num_pages - 1)
        rng = np.random.default_rng(0)
        seqs = [
            Sequence(
                (0, 0),
                rng.integers(self.model_config.vocab_size, size=P).tolist(),
                SamplingParams(seed=0, logprobs=1),
            )
            for _ in range(n)
        ]
        empty = self._slot_row(Sequence((0, 0), [0], SamplingParams(seed=0)))
        empty = jax.tree.map(lambda a: np.stack([np.asarray(a)] * (most + 1)), empty)
        self.slots = jax.device_put(empty, jax.devices()[0])
        for slot, seq in enumerate(seqs):
            seq.slot = slot
            self.slots = seat(self.slots, slot, self._slot_row(seq))

        def bits(R: int, T: int) -> list[np.ndarray]:
            """Logprobs after all sequences' first P tokens, R rows of T new ones at a time, as integers."""
            total = n if T == P else max(most, R)
            calls = []
            for start in range(0, total, R):
                work = [(r % n, P - T, T, [r % n + 1]) for r in range(start, min(start + R, total))]
                samples = [(row, seqs[slot]) for row, (slot, *_) in enumerate(work)]
                logprobs = self._call(work, [], samples, R, T).sampled.logprobs
                calls.append([np.asarray(a)[: len(work)].view(np.int32) for a in logprobs])
            bar.update()
            return [np.concatenate(arrays) for arrays in zip(*calls)]

        def same_bits(sizes: list[int], T: int) -> list[int]:
            expected = bits(sizes[0], T)
            same = lambda R: all((a == b).all() for a, b in zip(bits(R, T), expected))
            return [sizes[0], *itertools.takewhile(same, sizes[1:])][::-1]

        below = lambda R, *sizes: [R, *(r for r in sizes if r < R)]
        tiles = below(self.tiles, 512, 128, 32, 8, 2)
        # A product with one row has bits of its own, and with bfloat16 a CPU is slow at it; 4 rows cost nearly what 8 do.
        rows = below(
            max(most, 1 if self.model_config.dtype == "float32" else 2),
            512,
            256,
            128,
            64,
            32,
            16,
            8,
            2,
        )
        with tqdm(total=1 + len(tiles) + len(rows), desc="compiling", disable=not progress) as bar:
            self.pool = copy_page(
                write_page(self.pool, 0, jax.device_get(read_page(self.pool, 0))), 0, 0
            )
            bar.update()
            return same_bits(tiles, P), same_bits(rows, 1)
