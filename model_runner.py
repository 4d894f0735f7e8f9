"""What an engine has on the device, and the compiled programs that work on it.

Read model_step in programs/model_step.py, then ModelRunner, then Probe, which chooses the sizes of
calls at start-up. Shapes: see there; `R` rows of a call with `T` new tokens each, `S` rows to
sample from, `M` pages of the longest sequence.

The same bits: a row of a call gets the same numbers whatever its slot and the other rows are. From
XLA it gets them only in calls of one shape, or of shapes that sum in the same order. So there are
few shapes: (R, P) for prompts, a page of tokens in each row, and (R, 1) for generated tokens; and
of the possible R only those that Probe found to give the bits of the largest. The native CPU code
gives a token the same bits in a call of any shape: then there is nothing to probe.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from config import EngineConfig, GPTConfig
from kernels import cpu_memory
from kernels.cpu_kernels import choose_packing
from mesh import (
    cut_for_engine,
    engine_mesh,
    in_host_memory,
    pool_sharding,
    replicated,
    shards_of_heads,
)
from model import GPT, Params
from paged_attention import (
    PagedKVCache,
    choose_implementation,
    num_pages_for,
    same_bits_in_any_shape,
)
from programs.model_step import (
    GUESS,
    NO_GUESS,
    PAGE_TABLE,
    SLOT,
    Pool,
    Sampled,
    model_step,
)
from sampling import Slots, StepNeeds, slot_row
from scheduler import Plan, Row, Sample
from sequence import SampleKey, SamplingParams, Sequence
from structured.masks import put_masks, write_some

TILE_COUNTS = (512, 128, 32, 8, 2)
"""Sizes of a prefill call to try besides the largest. Each is a program to compile, so few."""

ROW_COUNTS = (512, 256, 128, 64, 32, 16, 8, 2)
"""Sizes of a decode call to try besides the largest. A product with one row has bits of its own,
and 4 rows cost nearly what 8 do."""

NATIVE_ROW_COUNTS = (512, 256, 128, 64, 32, 16, 8, 1)  # the same where native code computes


@partial(jax.jit, donate_argnums=0)
def write_slot(slots: Slots, slot: int, row: Slots) -> Slots:
    """Put what the device needs to know of a sequence into a slot. `slots` is donated."""
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one), slots, row)


@jax.jit
def read_page(pool: Pool, page: int) -> Pool:
    """Return the keys and values of one page: (L, H, P, D) each."""
    return jax.tree.map(lambda pages: pages[:, page], pool)


@partial(jax.jit, donate_argnums=0)
def write_page(pool: Pool, page: int, keys_and_values: Pool) -> Pool:
    """Put what read_page returned into a page. `pool` is donated."""
    return jax.tree.map(lambda pages, one: pages.at[:, page].set(one), pool, keys_and_values)


@partial(jax.jit, donate_argnums=0)
def copy_page(pool: Pool, source: int, target: int) -> Pool:
    """Copy the keys and values of one page to another. `pool` is donated."""
    return jax.tree.map(lambda pages: pages.at[:, target].set(pages[:, source]), pool)


def compiled_programs() -> int:
    """Return how many programs are compiled, for all engines of this process."""
    functions: Any = (model_step, write_slot, put_masks, read_page, write_page, copy_page)
    return sum(function._cache_size() for function in functions)


class StepSize(NamedTuple):
    """How much a step takes on at most."""

    max_num_seqs: int
    prefill_tokens: int
    num_scheduler_steps: int


CPU_STEP = StepSize(max_num_seqs=32, prefill_tokens=256, num_scheduler_steps=1)
ACCELERATOR_STEP = StepSize(max_num_seqs=256, prefill_tokens=2048, num_scheduler_steps=8)


def step_size(config: EngineConfig) -> StepSize:
    """Return the sizes that config names; where it leaves one out, that of the device's kind."""
    default = CPU_STEP if jax.default_backend() == "cpu" else ACCELERATOR_STEP
    num_steps = 1 if config.speculate > 0 else default.num_scheduler_steps
    return StepSize(
        config.max_num_seqs or default.max_num_seqs,
        config.prefill_tokens or default.prefill_tokens,
        config.num_scheduler_steps or num_steps,
    )


class CallInFlight(NamedTuple):
    """A call of model_step whose results may not be there yet."""

    rows: list[Row]
    samples: list[Sample]
    needs: StepNeeds
    shape: tuple[int, int]
    """Rows, with padding, and new tokens in each step."""
    num_steps: int
    launched: "Future[tuple[Pool, Slots, Sampled]]"
    """What model_step returns, once the call was handed to the device."""

    @property
    def sampled(self) -> Sampled:
        """The tokens of the call, which the device may not have sampled yet."""
        return self.launched.result()[2]

    def steps_of(self, sample: Sample) -> int:
        """Return how many tokens were sampled for it, one a step."""
        return self.rows[sample.row].length if self.num_steps > 1 else 1

    def needed(self) -> Sampled:
        """Return what somebody asked for; the rest stays on the device."""
        token, scores, prompt_scores = self.sampled
        if not self.needs.ranks:
            scores = scores._replace(rank=None)
        if not self.needs.top_logprobs:
            scores = scores._replace(top_logprobs=None, top_tokens=None)
        return Sampled(token, scores, prompt_scores if self.needs.prompt_logprobs else None)


class ModelRunner:
    """The parameters, the KV pool and the slots of an engine, and all that runs on them.

    Everything that will ever run is compiled at start-up. Calls return at once; `fetch` waits."""

    def __init__(self, model: GPT, config: EngineConfig, step: StepSize, *, progress: bool):
        """step: what step_size says of config."""
        self.model_config = model.config
        self.page_size = config.page_size
        self.max_num_seqs = step.max_num_seqs
        self.max_tiles = step.prefill_tokens // config.page_size  # rows of a prefill call
        self.max_steps = step.num_scheduler_steps  # of a decode call
        self.max_guesses = config.speculate
        self.pages_per_seq = -(-model.config.block_size // config.page_size)
        self.padding_slot = step.max_num_seqs  # the last one, which no sequence gets
        self.mesh = engine_mesh(config.mesh, model.config)
        # Native code computes on one CPU; devices that JAX simulates share it.
        cpu_kernels = config.cpu_kernels if self.mesh is None else "off"
        cache = create_cache(model.config, config, cpu_kernels, self.mesh)
        self.num_pages = cache.k_pages.shape[1]
        self.attention = cache.attention
        self.packing = choose_packing(model.config.dtype, config.weights, cpu_kernels)
        self.same_bits_in_any_shape = self.packing is not None and same_bits_in_any_shape(
            self.attention
        )
        """Whether a token gets the same bits as part of a prompt and when it was generated."""
        # A restored checkpoint is committed to its device, and with it whatever a step returns. All
        # that a step takes is so from the start: what became so after the first step would compile
        # every program again, in the middle of the first request.
        self.params = place_params(model, self.packing, self.mesh)
        self.pool: Pool = jax.device_put((cache.k_pages, cache.v_pages), pool_sharding(self.mesh))
        if self.mesh is None and jax.default_backend() == "cpu":
            cpu_memory.keep_freed_memory()
            cpu_memory.use_huge_pages(jax.tree.leaves((self.params, self.pool)))
        self.slots = self._empty_slots()
        # XLA's host thread takes part in every step of a loop, so a thread of its own waits for it.
        self.launcher = ThreadPoolExecutor(1, "launcher")
        self.launching: Future[tuple[Pool, Slots, Sampled]] | None = None
        # Pages of preempted sequences. Those of `leaving` are on their way to host memory.
        self.swapped: dict[SampleKey, list[Pool]] = {}
        self.leaving: list[SampleKey] = []
        self.prefill_sizes, self.decode_sizes = self._choose_sizes(progress)

    def settle(self) -> None:
        """Wait until the last call was handed to the device, before anything else is.

        Then `pool` and `slots` are what it leaves to the next."""
        if self.launching is not None:
            self.pool, self.slots, _ = self.launching.result()
            self.launching = None

    def move_pages(self, plan: Plan) -> None:
        """Start the page copies of a step, in the order of Plan."""
        for seq, pages in plan.swap_out:
            self.swapped[seq.key] = [read_page(self.pool, page) for page in pages]
        self.leaving = [swap.seq.key for swap in plan.swap_out]
        for source, target in plan.copies:
            self.pool = copy_page(self.pool, source, target)
        for seq, first, pages in plan.swap_in:
            contents = self.swapped[seq.key][first : first + len(pages)]  # behind are wrong guesses
            for page, content in zip(pages, contents, strict=True):
                self.pool = write_page(self.pool, page, content)

    def fill_slot(self, seq: Sequence) -> None:
        """Write what the device needs to know of seq to its slot."""
        row = slot_row(seq, self.model_config)
        self.slots = write_slot(self.slots, seq.occupied_slot, row)

    def drop_swapped(self, key: SampleKey) -> None:
        """Forget pages of a sequence in host memory, if there are any."""
        self.swapped.pop(key, None)

    def prefill(
        self, tiles: list[Row], tables: list[list[int]], samples: list[Sample]
    ) -> CallInFlight:
        """Start to compute tiles, whose page tables are given, and to sample from some of them."""
        size = smallest_at_least(max(len(tiles), len(samples)), self.prefill_sizes)
        return self.call_model(tiles, tables, samples, (size, self.page_size))

    def decode(self, rows: list[Row], tables: list[list[int]]) -> CallInFlight:
        """Start to read the newest token of each row, and to sample the next: one a step."""
        samples = [Sample(i, row.seq) for i, row in enumerate(rows)]
        size = smallest_at_least(len(rows), self.decode_sizes)
        return self.call_model(rows, tables, samples, (size, 1))

    def call_model(
        self,
        rows: list[Row],
        tables: list[list[int]],
        samples: list[Sample],
        shape: tuple[int, int],
    ) -> CallInFlight:
        """Start a call of model_step in the given shape (R, T), filled up with padding."""
        self.settle()
        size, tokens = shape
        needs = step_needs(rows, samples, tokens)
        max_steps = self.max_steps if tokens == 1 else 1
        launch = partial(
            model_step,
            self.params,
            self.pool,
            self.slots,
            self._pack_rows(rows, tables, size),
            self._pack_samples(samples, size),
            needs,
            config=self.model_config,
            packing=self.packing,
            attention=self.attention,
            mesh=self.mesh,
            T=tokens,
            max_steps=max_steps,
            speculates=self.max_guesses > 0 and tokens == 1,
        )
        num_steps = max(row.length for row in rows) if tokens == 1 else 1
        launched = self._launch(launch, in_thread=max_steps > 1)
        return CallInFlight(rows, samples, needs, shape, num_steps, launched)

    def _launch(
        self, launch: Callable[[], tuple[Pool, Slots, Sampled]], *, in_thread: bool
    ) -> "Future[tuple[Pool, Slots, Sampled]]":
        """Hand a call to the device, at once or, in_thread, without waiting until it has it."""
        if in_thread:
            self.launching = self.launcher.submit(launch)
            return self.launching
        self.launching = Future()
        self.launching.set_result(launch())
        launched = self.launching
        self.settle()
        return launched

    def fetch(self, calls: list[CallInFlight]) -> list[Sampled]:
        """Wait for the results of calls, and for the pages that are leaving: a step's one sync."""
        results = [call.needed() for call in calls]
        leaving = {key: self.swapped[key] for key in self.leaving}
        results, pages = jax.device_get((results, leaving))
        self.swapped |= pages
        self.leaving = []
        return results

    def _pack_rows(self, rows: list[Row], tables: list[list[int]], size: int) -> np.ndarray:
        """Return rows as model_step takes them: (size, 4 + M) int32."""
        packed = np.zeros((size, PAGE_TABLE + self.pages_per_seq), np.int32)
        packed[:, SLOT] = self.padding_slot
        packed[:, GUESS] = NO_GUESS
        for i, (row, table) in enumerate(zip(rows, tables, strict=True)):
            guess = NO_GUESS if row.guess is None else row.guess
            packed[i, :PAGE_TABLE] = row.seq.occupied_slot, row.start, row.length, guess
            packed[i, PAGE_TABLE : PAGE_TABLE + len(table)] = table
        return packed

    def _pack_samples(self, samples: list[Sample], size: int) -> np.ndarray:
        """Return samples as model_step takes them: (size, 2) int32, as many as rows."""
        packed = np.zeros((size, 2), np.int32)
        packed[:, 1] = self.padding_slot
        for i, (row, seq) in enumerate(samples):
            packed[i] = row, seq.occupied_slot
        return packed

    def _empty_slots(self) -> Slots:
        """Return slots for max_num_seqs sequences and one for padding."""
        seq = Sequence(SampleKey(0, 0), [0], SamplingParams(seed=0))
        row = slot_row(seq, self.model_config)
        slots = jax.tree.map(lambda a: np.stack([np.asarray(a)] * (self.max_num_seqs + 1)), row)
        slots = jax.device_put(slots, replicated(self.mesh))
        return write_some(slots, [], self.padding_slot)  # compiles

    def _choose_sizes(self, progress: bool) -> tuple[list[int], list[int]]:
        """Run every program once, which compiles it. Return the sizes of prefill and decode calls.

        Both are ascending: smaller ones whose rows get the same bits, then the largest needed."""
        tiles = descending_sizes(self.max_tiles, TILE_COUNTS)
        # With bfloat16 XLA on a CPU is slow at a product with one row.
        least = 1 if self.packing or self.model_config.dtype == "float32" else 2
        row_counts = NATIVE_ROW_COUNTS if self.same_bits_in_any_shape else ROW_COUNTS
        rows = descending_sizes(max(self.max_num_seqs + self.max_guesses, least), row_counts)
        programs = 1 + len(tiles) + len(rows)
        with tqdm(total=programs, desc="compiling", disable=not progress) as bar:
            self._compile_page_copies()
            bar.update()
            probe = Probe(self, after_size=bar.update)
            choose = probe.sizes_of_equal_bits
            if self.same_bits_in_any_shape:
                choose = probe.all_sizes
            prefill_sizes = choose(tiles, self.page_size)
            decode_sizes = choose(rows, 1)
        return prefill_sizes, decode_sizes

    def _compile_page_copies(self) -> None:
        """Run each of the page copies once, on the null page."""
        content = jax.device_get(read_page(self.pool, 0))
        self.pool = write_page(self.pool, 0, content)
        self.pool = copy_page(self.pool, 0, 0)


class Probe:
    """Finds out in which sizes of a call rows get the same bits, by trying.

    A few sequences whose prompts are a page of random tokens go through calls of each size: first
    the prompts, then, again and again, the last token of each."""

    def __init__(self, runner: ModelRunner, after_size: Callable[[], object]):
        """after_size is called whenever a size was tried."""
        self.runner = runner
        self.after_size = after_size
        self.seqs = self._random_sequences()
        for seq in self.seqs:
            runner.fill_slot(seq)

    def sizes_of_equal_bits(self, sizes: list[int], tokens: int) -> list[int]:
        """Return, ascending, those of the descending sizes that come before the first whose
        logprobs have other bits than those of the largest. tokens: new tokens in each row."""
        largest, *smaller = sizes
        expected = self.logprob_bits(largest, tokens)
        equal = [largest]
        for size in smaller:
            bits = self.logprob_bits(size, tokens)
            if any((a != b).any() for a, b in zip(bits, expected, strict=True)):
                break
            equal.append(size)
        return equal[::-1]

    def all_sizes(self, sizes: list[int], tokens: int) -> list[int]:
        """Return the descending sizes, ascending, after a call of each, which compiles it."""
        for size in sizes:
            self._call(range(1), size, tokens)
            self.after_size()
        return sizes[::-1]

    def logprob_bits(self, size: int, tokens: int) -> list[np.ndarray]:
        """Return the arrays of Scores, as integers, of what follows the prompts.

        Calls have the shape (size, tokens); more rows than fit go through several. Decode tries
        as many rows as a step can have, so sequences recur."""
        total = len(self.seqs)
        if tokens < self.runner.page_size:
            total = max(self.runner.max_num_seqs + self.runner.max_guesses, size)
        parts = [
            self._call(range(first, min(first + size, total)), size, tokens)
            for first in range(0, total, size)
        ]
        self.after_size()
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def _call(self, numbers: range, size: int, tokens: int) -> list[np.ndarray]:
        """Return the part of logprob_bits that belongs to the rows with these numbers."""
        start = self.runner.page_size - tokens
        slots = [number % len(self.seqs) for number in numbers]
        rows = [Row(self.seqs[slot], start, tokens) for slot in slots]
        tables = [[slot + 1] for slot in slots]  # page 0 is the null page
        samples = [Sample(i, row.seq) for i, row in enumerate(rows)]
        call = self.runner.call_model(rows, tables, samples, (size, tokens))
        return [np.asarray(a)[0, : len(rows)].view(np.int32) for a in call.sampled.scores]

    def _random_sequences(self) -> list[Sequence]:
        """Return as many sequences as there are rows to prefill, slots and pages for."""
        runner = self.runner
        count = min(runner.max_tiles, runner.max_num_seqs, runner.num_pages - 1)
        rng = np.random.default_rng(0)
        seqs = []
        for slot in range(count):
            prompt = rng.integers(runner.model_config.vocab_size, size=runner.page_size).tolist()
            seq = Sequence(SampleKey(0, 0), prompt, SamplingParams(seed=0, logprobs=1))
            seq.slot = slot
            seqs.append(seq)
        return seqs


def step_needs(rows: list[Row], samples: list[Sample], tokens: int) -> StepNeeds:
    """Return what a call with so many new tokens in each row has to compute."""
    scores_prompts = tokens > 1 and any(row.seq.params.prompt_logprobs is not None for row in rows)
    return StepNeeds.of((seq.params for _, seq in samples), scores_prompts)


def place_params(model: GPT, packing: str | None, mesh: Mesh | None) -> Params:
    """Return the parameters of model.for_inference on the devices that compute with them."""
    with in_host_memory(mesh is not None):
        unstacked = model.for_inference(packing=packing)
    if mesh is None:
        return jax.device_put(unstacked.params(), replicated(None))
    return cut_for_engine(mesh, unstacked)


def create_cache(
    model_config: GPTConfig,
    config: EngineConfig,
    cpu_kernels: Literal["auto", "off"],
    mesh: Mesh | None,
) -> PagedKVCache:
    """Return an empty pool of config.kv_blocks pages, or as many as fit config.kv_cache_memory."""
    page_size = config.page_size
    dtype = config.kv_dtype or model_config.dtype
    attention = choose_implementation(config.attention, cpu_kernels)
    num_pages = config.kv_blocks or num_pages_for(
        model_config,
        page_size,
        dtype,
        config.kv_cache_memory,
        attention,
        shards_of_heads(mesh),
    )
    return PagedKVCache.create(model_config, num_pages, page_size, dtype, attention, mesh)


def descending_sizes(largest: int, choices: tuple[int, ...]) -> list[int]:
    """Return largest, and those of the descending choices that are smaller."""
    return [largest, *(size for size in choices if size < largest)]


def smallest_at_least(count: int, sizes: list[int]) -> int:
    """Return the first of the ascending sizes into which `count` rows fit."""
    return next(size for size in sizes if size >= count)
