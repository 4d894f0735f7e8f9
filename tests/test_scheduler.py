"""The scheduler on a device made of dicts, with a model that is a hash: workloads in milliseconds.

A page slot holds the tokens that led to it; a plan that reads what is not there, or samples from
the wrong place, gives other tokens than the same request gives alone. Start with Machine.step.
"""

import itertools
import random
from collections import Counter
from operator import attrgetter
from statistics import mean
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from block_manager import BlockManager
from errors import UserError
from scheduler import Plan, Row, Scheduler, reads_what_is_there
from sequence import SampleKey, SamplingParams, Sequence
from speculation.drafts import Speculation

STOP = 0  # the token that ends a sample


def next_token(tokens: list[int], sample: int, params: SamplingParams) -> int:
    """Return what the model says after tokens: one of 11 tokens, STOP among them.

    With a repetition_penalty the last token alone counts: so it repeats itself."""
    known = tokens if params.repetition_penalty == 1 else tokens[-1:]
    return hash((tuple(known), sample)) % 11


def alone(prompt: list[int], params: SamplingParams, sample: int) -> list[int]:
    """Return the new tokens of a sample that has the device for itself."""
    tokens = list(prompt)
    new: list[int] = []
    while len(new) < params.max_tokens and STOP not in new:
        new.append(next_token(tokens + new, sample, params))
    return new


class Request(NamedTuple):
    """A request that has not ended."""

    prompt: list[int]
    params: SamplingParams
    seqs: list[Sequence]


class SampledToken(NamedTuple):
    """A token on its way to the host."""

    seq: Sequence
    token: int
    row: Row


class Machine:
    """Runs plans as the engine does, one step ahead of what the host knows."""

    def __init__(
        self,
        *,
        num_pages: int = 9,
        page_size: int = 2,
        max_num_seqs: int = 3,
        tiles: int = 3,
        chunk_size: int = 4,
        max_steps: int = 1,
        max_guesses: int = 0,
    ):
        self.P = page_size
        self.scheduler = Scheduler(
            BlockManager(num_pages, page_size),
            max_num_seqs=max_num_seqs,
            tiles=tiles,
            chunk_size=chunk_size,
            max_steps=max_steps,
            max_guesses=max_guesses,
        )
        self.blocks = self.scheduler.blocks
        # The device: the tokens that led to each (page, slot), and the tokens of each slot.
        self.pages: dict[tuple[int, int], tuple] = {}
        self.slots: dict[int, list[int]] = {}
        # The host.
        self.swapped: dict[SampleKey, list[dict]] = {}  # pages of preempted sequences
        self.in_flight: list[SampledToken] = []
        self.requests: dict[int, Request] = {}
        self.ids = itertools.count()
        self.done: dict[SampleKey, list[int]] = {}
        # What tests look at.
        self.first_admitted: list[SampleKey] = []
        self.overtaken = 0  # preempted sequences that came back with nothing to restore
        self.steps_together = 0  # the most of one plan
        self.right_guesses = 0

    def add(self, prompt: list[int], **params) -> int:
        """Queue a request and return its id."""
        how = SamplingParams(**params)
        request_id = next(self.ids)
        seqs = self.scheduler.add(prompt, how, request_id)
        if self.scheduler.max_guesses > 0:
            for seq in seqs:
                seq.speculation = Speculation()
        self.requests[request_id] = Request(prompt, how, seqs)
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request early."""
        for seq in self.requests.pop(request_id).seqs:
            if not seq.finished:
                self.scheduler.finish(seq)

    def step(self) -> None:
        """Run what the scheduler plans, in the order of Plan, and take in the step before."""
        oldest = self.oldest_with_work()
        plan = self.scheduler.schedule()
        self.blocks.check()
        self.check_fairness(plan, oldest)
        self.move_pages(plan)
        self.fill_slots(plan)
        sampled = self.prefill(plan) + self.decode(plan)
        landed = self.in_flight
        self.in_flight = sampled
        self.collect(landed)

    def run(self, limit: int = 500) -> None:
        """Run until nothing is left to do, and check that nothing remains."""
        steps = 0
        while self.requests or self.in_flight:
            self.step()
            steps += 1
            assert steps < limit, "a request never ends"
        assert self.blocks.num_free == self.blocks.num_pages - 1, "pages leaked"
        assert not self.scheduler.waiting
        assert self.first_admitted == sorted(self.first_admitted), (
            f"not first come, first served: {self.first_admitted}"
        )

    def oldest_with_work(self) -> SampleKey | None:
        """Return who has to advance at the next step; None if it has to wait for its token."""
        seqs = [seq for request in self.requests.values() for seq in request.seqs if has_work(seq)]
        oldest = min(seqs, key=attrgetter("key"), default=None)
        return None if oldest is None or oldest.awaits_token else oldest.key

    def check_fairness(self, plan: Plan, oldest: SampleKey | None) -> None:
        """Assert that the plan keeps to its limits and serves whoever came first."""
        assert not (plan.swap_out and plan.admitted), "a step that lacks pages lets others in"
        advanced = {row.seq.key for row in plan.tiles + plan.decodes}
        assert oldest is None or oldest in advanced, f"{oldest} came first and waits for {advanced}"
        assert len(plan.tiles) <= self.scheduler.tiles
        assert len(plan.samples) <= self.scheduler.tiles
        used = [seq.slot for leader in self.scheduler.running for seq in leader.group]
        assert len(set(used)) == len(used), "a slot with two owners"
        assert set(used).isdisjoint(self.scheduler.free_slots), "a slot in use is free"

    def move_pages(self, plan: Plan) -> None:
        """Swap pages out, copy pages, swap pages in."""
        for seq, pages in plan.swap_out:
            self.swapped[seq.key] = [self.read_page(page) for page in pages]
        for source, target in plan.copies:
            self.write_page(target, self.read_page(source))
        for seq, first, pages in plan.swap_in:
            contents = self.swapped[seq.key][first : first + len(pages)]
            for page, content in zip(pages, contents, strict=True):
                self.write_page(page, content)

    def read_page(self, page: int) -> dict:
        """Return what each slot of a page holds."""
        return {i: self.pages.get((page, i)) for i in range(self.P)}

    def write_page(self, page: int, content: dict) -> None:
        """Put into a page what read_page returned."""
        self.pages |= {(page, i): tokens for i, tokens in content.items()}

    def fill_slots(self, plan: Plan) -> None:
        """Write those that are admitted to their slots."""
        restored = [swap.seq for swap in plan.swap_in]
        new_tokens = Counter({row.seq.key: row.length for row in plan.decodes if row.guess is None})
        new_tokens.update(sample.seq.key for sample in plan.samples)
        for seq in plan.admitted:
            preempted = self.swapped.pop(seq.key, None) is not None
            self.overtaken += preempted and seq not in restored
            new = new_tokens[seq.key]
            assert len(seq.tokens) == seq.prompt_len + seq.num_sampled - new, (
                "resumed before its last token is known"
            )
            self.slots[seq.occupied_slot] = list(seq.tokens)
            if seq.key not in self.first_admitted:
                self.first_admitted.append(seq.key)

    def prefill(self, plan: Plan) -> list[SampledToken]:
        """Compute the tiles, then sample what follows prompts that are complete."""
        for seq, start, length, _ in plan.tiles:
            assert start % self.P == 0 and 0 < length <= self.P
            for position in range(start, start + length):
                self.compute(seq, position)
        sampled = []
        for row, seq in plan.samples:
            source, start, length, _ = plan.tiles[row]
            assert start + length == seq.prompt_len == source.prompt_len
            token = self.attend(seq, seq.prompt_len)
            sampled.append(SampledToken(seq, token, plan.tiles[row]))
        self.write_tokens(sampled, [one.seq.prompt_len for one in sampled])
        return sampled

    def decode(self, plan: Plan) -> list[SampledToken]:
        """Compute the newest token of sequences and sample the next, as often as planned."""
        all_sampled: list[SampledToken] = []
        for step in range(self.scheduler.max_steps):
            rows = [row for row in plan.decodes if step < row.length]
            for row in rows:
                if row.guess is not None:
                    self.slots[row.seq.occupied_slot][row.start :] = [row.guess]
            for row in rows:
                self.compute(row.seq, row.start + step)
            ends = [row.start + step + 1 for row in rows]
            sampled = [
                SampledToken(row.seq, self.attend(row.seq, end), row)
                for row, end in zip(rows, ends, strict=True)
            ]
            self.write_tokens(sampled, ends)
            self.steps_together = max(self.steps_together, step * bool(rows) + 1)
            all_sampled += sampled
        assert len(all_sampled) == sum(row.length for row in plan.decodes)
        return all_sampled

    def compute(self, seq: Sequence, position: int) -> None:
        """Write keys and values of one token: here, the tokens that lead to it."""
        page = self.blocks.tables[seq.key][position // self.P]
        tokens = self.slots[seq.occupied_slot][: position + 1]
        self.pages[page, position % self.P] = tuple(tokens)

    def attend(self, seq: Sequence, length: int) -> int:
        """Return what the model says after the first tokens of seq: its pages must hold all of
        them."""
        tokens = self.slots[seq.occupied_slot]
        table = self.blocks.tables[seq.key]
        for i in range(length):
            held = self.pages[table[i // self.P], i % self.P]
            assert held == tuple(tokens[: i + 1]), f"{seq.key} reads another's page at {i}"
        return next_token(tokens[:length], seq.key.sample, seq.params)

    def write_tokens(self, sampled: list[SampledToken], positions: list[int]) -> None:
        """Put sampled tokens into their slots, as the next step is to find them."""
        for (seq, token, _), position in zip(sampled, positions, strict=True):
            self.slots[seq.occupied_slot][position : position + 1] = [token]

    def collect(self, landed: list[SampledToken]) -> None:
        """Take in the tokens of the step before."""
        for seq, token, row in landed:
            if seq.finished or not reads_what_is_there(row):
                continue
            self.right_guesses += row.guess is not None
            if seq.params.max_tokens:
                seq.tokens.append(token)
            new = seq.tokens[seq.prompt_len :]
            if len(new) >= seq.params.max_tokens or new[-1] == STOP:
                self.scheduler.finish(seq)
                self.done[seq.key] = new
                self.end_request(seq.key.request_id)

    def end_request(self, request_id: int) -> None:
        """If all its samples have ended, check what they are."""
        prompt, params, seqs = self.requests[request_id]
        if not all(seq.finished for seq in seqs):
            return
        del self.requests[request_id]
        for seq in seqs:
            expected = alone(prompt, params, seq.key.sample)
            assert self.done[seq.key] == expected, f"{seq.key} got other tokens than alone"


def has_work(seq: Sequence) -> bool:
    """Return whether a step that is yet to be launched must advance seq."""
    if seq.finished:
        return False
    return seq.num_sampled == 0 or seq.num_sampled < seq.params.max_tokens


class Random(RuleBasedStateMachine):
    """Catches chunks of wrong length, pages read after others wrote to them, tokens lost in a
    preemption, forks that share what they write, starvation, and leaks, in workloads that nobody
    thought of."""

    @initialize(at_once=st.sampled_from([{}, {"max_steps": 3}, {"max_guesses": 3}]))
    def start(self, at_once):
        self.machine = Machine(**at_once)

    @rule(
        prompt=st.lists(st.sampled_from([1, 3]), min_size=1, max_size=11),
        max_tokens=st.integers(1, 5),
        n=st.integers(1, 4),
        scored=st.booleans(),
        repetition_penalty=st.sampled_from([1.0, 2.0]),
    )
    def add(self, scored, **params):
        prompt_logprobs = 0 if scored else None
        self.machine.add(prompt_logprobs=prompt_logprobs, **params)

    @rule(data=st.data())
    def cancel(self, data):
        if self.machine.requests:
            self.machine.cancel(data.draw(st.sampled_from(sorted(self.machine.requests))))

    @rule(steps=st.integers(1, 4))
    def step(self, steps):
        for _ in range(steps):
            self.machine.step()

    def teardown(self):
        self.machine.run()


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=200, stateful_step_count=25, deadline=None)


def preemptions_of(
    arrivals, requests, chunk_size: int, cancel_at: int | None, at_once: dict
) -> int:
    """Run requests that arrive at given steps, the first of them cancelled at one; count
    preemptions."""
    machine = Machine(num_pages=5, chunk_size=chunk_size, tiles=2, **at_once)
    for step in range(5):
        for arrival, (prompt, max_tokens) in zip(arrivals, requests, strict=True):
            if arrival == step:
                machine.add(prompt, max_tokens=max_tokens)
        if step == cancel_at and machine.requests:
            machine.cancel(min(machine.requests))
        machine.step()
    machine.run()
    return machine.scheduler.preemptions


@pytest.mark.parametrize("at_once", [{}, {"max_steps": 4}, {"max_guesses": 4}])
def test_every_arrival_of_three_requests_at_four_pages(at_once):
    """Catches an order of arrivals and ends, however rare, in which a request starves or reads
    another's page."""
    shapes = [([1, 1, 1, 1, 1], 4), ([1, 1, 2], 3), ([1, 1, 1, 1], 2)]
    preempted = sum(
        preemptions_of(arrivals, requests, chunk_size, cancel_at, at_once)
        for arrivals in itertools.product(range(4), repeat=3)
        for requests in itertools.permutations(shapes)
        for chunk_size, cancel_at in ((2, None), (4, None), (2, 2), (2, 4))
    )
    assert preempted > 100


def test_several_steps_at_once_where_nobody_waits():
    """Catches a sequence that gets its tokens one call at a time although there is nothing to
    decide in between, or more of them than it asked for."""
    machine = Machine(max_steps=4)
    machine.add([1, 2], max_tokens=4)
    machine.run()
    assert machine.steps_together == 3
    machine.add([1, 2], max_tokens=9)
    machine.run()
    assert machine.steps_together == 4


def test_one_step_at_a_time_while_a_prompt_is_computed():
    """Catches a prompt that waits while others are given several tokens."""
    machine = Machine(max_steps=4, tiles=1)
    machine.add([1, 2], max_tokens=9)
    machine.step()
    machine.add([1] * 8, max_tokens=4)  # a page of two tokens a step
    for _ in range(4):
        machine.steps_together = 0
        machine.step()
        assert machine.steps_together == 1
    machine.run()


REPEATS = {"prompt": [3, 3, 3], "repetition_penalty": 2.0}  # after 3 comes 3: all guesses are right


def test_right_guesses_save_steps():
    """Catches guesses that are never right, or that go on in a sequence that has all its tokens."""
    machine = Machine(num_pages=40, max_guesses=4, max_num_seqs=5)
    machine.add(max_tokens=31, **REPEATS)
    steps = 0
    while machine.requests:
        machine.step()
        steps += 1
    machine.run()
    assert machine.right_guesses == 24
    assert steps < 20


@pytest.mark.parametrize("num_pages", range(10, 20))
def test_preempted_while_its_guesses_are_checked(num_pages):
    """Catches pages of right guesses that are lost when another sequence takes their place, and
    guesses that take the place of another sequence."""
    machine = Machine(num_pages=num_pages, page_size=1, max_guesses=4, max_num_seqs=8)
    machine.add([1], max_tokens=8)
    machine.add(max_tokens=6, **REPEATS)
    machine.run()
    assert machine.right_guesses > 0


def test_a_newcomer_leaves_room_for_the_next_tokens_of_others():
    """Catches one that is let in only to be sent out at the next step, and its work."""
    machine = Machine(num_pages=3)
    machine.add([1, 2], max_tokens=3)  # its next token needs the second page
    machine.add([2, 1], max_tokens=2)
    machine.run()
    assert machine.scheduler.preemptions == 0


def test_a_request_that_never_fits_is_refused():
    """Catches a request larger than the pool that waits for ever, and those behind it with it."""
    machine = Machine(num_pages=5)
    machine.add([1] * 5, max_tokens=4)  # 8 positions are written: exactly 4 pages
    with pytest.raises(UserError, match="5 pages .* has 4"):
        machine.add([1] * 5, max_tokens=5)
    machine.run()


def test_a_prefix_hit_after_preemption():
    """Catches restoring pages over a prefix that others, in the meantime, computed further than the
    preempted sequence had."""
    machine = Machine(num_pages=8, tiles=1, chunk_size=2)
    for length, max_tokens in ((3, 6), (9, 6), (5, 7)):
        machine.step()
        machine.add([1] * length, max_tokens=max_tokens)
    machine.run()
    assert machine.overtaken == 1


def test_a_long_prompt_shares_its_steps():
    """Catches a long prompt that takes every step's tiles for itself."""
    machine = Machine(num_pages=20, tiles=3, chunk_size=4)
    long_request = machine.add([1] * 11, max_tokens=1)
    short_request = machine.add([2] * 3, max_tokens=1)
    [long_seq] = machine.requests[long_request].seqs
    [short_seq] = machine.requests[short_request].seqs
    for long_computed, short_computed in ((4, 2), (8, 3), (11, 3)):
        machine.step()
        assert long_seq.num_computed == long_computed
        assert short_seq.num_computed == short_computed
    machine.run()


def test_more_samples_than_rows_fork_in_groups():
    """Catches samples beyond the rows that can be sampled from one prompt: lost, or waiting for
    ever."""
    machine = Machine(num_pages=12, max_num_seqs=3, tiles=2)
    machine.add([1, 2, 1], max_tokens=4, n=7)
    machine.run()
    assert len(machine.done) == 7
    assert len(set(map(tuple, machine.done.values()))) > 1
    # The later groups find the first one's prefix.
    assert machine.blocks.hit_tokens == 3 * 2


class Lengths(NamedTuple):
    """Tokens of a request."""

    prompt: int
    new: int


class Load(NamedTuple):
    """Means over the steps of a job."""

    slot_use: float  # share of the places in held pages that hold a token
    in_flight: float  # sequences that run while others wait


def run_job(scheduler: Scheduler, lengths: list[Lengths]) -> Load:
    """Schedule requests that arrive all at once, without computing anything."""
    blocks = scheduler.blocks
    for i, (prompt, new) in enumerate(lengths):
        scheduler.add([i] * prompt, SamplingParams(max_tokens=new), i)
    slot_use, in_flight = [], []
    while scheduler.waiting or scheduler.running:
        scheduler.schedule()
        for seq in scheduler.running:
            seq.tokens += [0] * (seq.prompt_len + seq.num_sampled - len(seq.tokens))
        if scheduler.running:
            held = blocks.num_pages - 1 - blocks.num_free
            computed = sum(seq.num_computed for seq in scheduler.running)
            slot_use.append(computed / (held * blocks.page_size))
        if scheduler.waiting:
            in_flight.append(len(scheduler.running))
    return Load(mean(slot_use), mean(in_flight))


def dense_in_flight(lengths: list[Lengths], rows: int) -> float:
    """Return how many sequences run in a dense cache, whose batches wait for their longest."""
    batches = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    return mean(
        rows * mean(request.new for request in batch) / max(request.new for request in batch)
        for batch in batches
    )


def test_kv_memory_holds_tokens_and_three_times_as_many_sequences():
    """Catches pages reserved before they are needed: nano-vllm's job (256 prompts and outputs of
    100 to 1024 tokens) in the memory of a dense cache of 16 rows."""
    rng = random.Random(0)
    lengths = [Lengths(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(256)]
    longest = max(prompt + new for prompt, new in lengths)
    page_size, rows = 16, 16
    scheduler = Scheduler(
        BlockManager(1 + rows * longest // page_size, page_size),
        max_num_seqs=256,
        tiles=32,
        chunk_size=512,
    )
    load = run_job(scheduler, lengths)
    dense = dense_in_flight(lengths, rows)
    assert load.slot_use > 0.96, f"{load.slot_use:.3f} of the held places hold tokens"
    assert load.in_flight > 3 * dense, (
        f"{load.in_flight:.1f} sequences in flight, {dense:.1f} in a dense cache"
    )
