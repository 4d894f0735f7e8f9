"""The scheduler on a device made of dicts, with a model that is a hash: whole workloads in milliseconds.

A page slot holds the tokens that led to it; a plan that reads what is not there, or samples from the wrong place, gives other
tokens than the same request gives alone."""

import itertools
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from block_manager import BlockManager
from scheduler import Scheduler
from sequence import SamplingParams

STOP = 0


def next_token(tokens, index) -> int:
    return hash((tuple(tokens), index)) % 11  # 0 is STOP


def alone(prompt, params, index) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens and not (
        len(tokens) > len(prompt) and tokens[-1] == STOP
    ):
        tokens.append(next_token(tokens, index))
    return tokens[len(prompt) :]


class Machine:
    """Runs plans as the engine does, one step ahead of what the host knows."""

    def __init__(self, num_pages=9, page_size=2, max_num_seqs=3, tiles=3, chunk_size=4):
        self.P = page_size
        self.scheduler = Scheduler(
            BlockManager(num_pages, page_size),
            max_num_seqs=max_num_seqs,
            tiles=tiles,
            chunk_size=chunk_size,
        )
        self.pages, self.slots, self.swapped, self.in_flight = {}, {}, {}, []
        self.overtaken = 0  # resumed with nothing to restore
        self.requests, self.first_admitted, self.done, self.ids = {}, [], {}, itertools.count()

    def add(self, prompt, **params):
        params = SamplingParams(**params)
        i = next(self.ids)
        self.requests[i] = prompt, params, self.scheduler.add(prompt, params, i)
        return i

    def cancel(self, i):
        for seq in self.requests.pop(i)[2]:
            if not seq.finished:
                self.scheduler.finish(seq)

    def read(self, page, n):
        return tuple(self.pages[page, j] for j in range(n))

    def step(self):
        scheduler, P = self.scheduler, self.P
        oldest = min(
            (s.key for _, _, seqs in self.requests.values() for s in seqs if self.has_work(s)),
            default=None,
        )
        plan = scheduler.schedule()
        scheduler.blocks.check()
        assert not (plan.swap_out and plan.admitted), "a step that lacks pages lets others in"
        advanced = {s.key for s, _, _ in plan.tiles} | {s.key for s in plan.decodes}
        assert oldest is None or oldest in advanced, f"{oldest} came first and waits for {advanced}"
        for seq, pages in plan.swap_out:
            self.swapped[seq.key] = [
                {j: self.pages.get((page, j)) for j in range(P)} for page in pages
            ]
        for source, target in plan.copies:
            self.pages |= {(target, j): self.pages.get((source, j)) for j in range(P)}
        for seq, first, pages in plan.swap_in:
            for page, content in zip(pages, self.swapped[seq.key][first:], strict=True):
                self.pages |= {(page, j): c for j, c in content.items()}
        restored = [seq for seq, _, _ in plan.swap_in]
        for seq in plan.admitted:
            self.overtaken += self.swapped.pop(seq.key, None) is not None and seq not in restored
            new = seq in plan.decodes or seq in [s for _, s in plan.samples]
            assert len(seq.tokens) == seq.prompt_len + seq.sampled - new, (
                "resumed before its last token is known"
            )
            self.slots[seq.slot] = list(seq.tokens)
        self.first_admitted += [s.key for s in plan.admitted if s.key not in self.first_admitted]
        used = [s.slot for r in scheduler.running for s in (r, *r.followers)]
        assert len(set(used)) == len(used) and set(used).isdisjoint(scheduler.free_slots), (
            "a slot with two owners"
        )

        assert len(plan.tiles) <= scheduler.tiles and len(plan.samples) <= scheduler.tiles
        for seq, start, new in plan.tiles:
            assert start % P == 0 and 0 < new <= P
            table = scheduler.blocks.tables[seq.key]
            for j in range(new):
                self.pages[table[start // P], j] = tuple(self.slots[seq.slot][: start + j + 1])
        samples = []
        for row, seq in plan.samples:
            source, start, new = plan.tiles[row]
            assert start + new == seq.prompt_len == source.prompt_len
            samples.append((seq, self.attend(seq, seq.prompt_len)))
        for seq, token in samples:
            self.slots[seq.slot][seq.prompt_len :] = [token]
        for seq in plan.decodes:
            at = seq.computed - 1
            self.pages[scheduler.blocks.tables[seq.key][at // P], at % P] = tuple(
                self.slots[seq.slot][: at + 1]
            )
        for seq in plan.decodes:
            token = self.attend(seq, seq.computed)
            self.slots[seq.slot][seq.computed :] = [token]
            samples.append((seq, token))
        self.collect(samples)

    def has_work(self, seq):
        return not seq.finished and (
            seq.prefilling or not seq.sampled or seq.sampled < seq.params.max_tokens
        )

    def attend(self, seq, n):
        """What the model sees from position n - 1 of seq: every page must hold that part of its tokens."""
        tokens, table = self.slots[seq.slot], self.scheduler.blocks.tables[seq.key]
        for i in range(n):
            assert self.pages[table[i // self.P], i % self.P] == tuple(tokens[: i + 1]), (
                f"{seq.key} reads another's page at {i}"
            )
        return next_token(tokens[:n], seq.key[1])

    def collect(self, started):
        landed, self.in_flight = self.in_flight, started
        for seq, token in landed:
            if seq.finished:
                continue
            if seq.params.max_tokens:
                seq.tokens.append(token)
            made = seq.tokens[seq.prompt_len :]
            if len(made) >= seq.params.max_tokens or made[-1] == STOP:
                self.scheduler.finish(seq)
                self.done[seq.key] = made
                if all(s.finished for s in self.requests[seq.key[0]][2]):
                    prompt, params, seqs = self.requests.pop(seq.key[0])
                    for i, s in enumerate(seqs):
                        assert self.done[s.key] == alone(prompt, params, i), (
                            f"{s.key} got other tokens than alone"
                        )

    def run(self, limit=500):
        steps = 0
        while self.requests or self.in_flight:
            self.step()
            steps += 1
            assert steps < limit, "a request never ends"
        blocks = self.scheduler.blocks
        assert blocks.num_free == blocks.num_pages - 1 and not self.scheduler.waiting, (
            "pages leaked"
        )
        assert self.first_admitted == sorted(self.first_admitted), (
            f"not first come, first served: {self.first_admitted}"
        )
        return steps


class Random(RuleBasedStateMachine):
    """Catches chunks of wrong length, pages read after others wrote to them, tokens lost in a preemption, forks that share
    what they write, starvation, and leaks, in workloads that nobody thought of."""

    def __init__(self):
        super().__init__()
        self.machine = Machine()

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=11),
        max_tokens=st.integers(1, 5),
        n=st.integers(1, 4),
        scored=st.booleans(),
    )
    def add(self, prompt, max_tokens, n, scored):
        self.machine.add(prompt, max_tokens=max_tokens, n=n, prompt_logprobs=0 if scored else None)

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


def test_every_arrival_of_three_requests_at_four_pages():
    """Catches an order of arrivals and ends, however rare, in which a request starves or reads another's page."""
    shapes = [([1, 1, 1, 1, 1], 4), ([1, 1, 2], 3), ([1, 1, 1, 1], 2)]
    preempted = 0
    for arrivals, which in itertools.product(
        itertools.product(range(4), repeat=3), itertools.permutations(shapes)
    ):
        for chunk_size, cancelled in ((2, None), (4, None), (2, 2), (2, 4)):
            machine = Machine(num_pages=5, chunk_size=chunk_size, tiles=2)
            for step in range(5):
                for arrival, (prompt, max_tokens) in zip(arrivals, which):
                    if arrival == step:
                        machine.add(prompt, max_tokens=max_tokens)
                if step == cancelled and machine.requests:
                    machine.cancel(min(machine.requests))
                machine.step()
            machine.run()
            preempted += machine.scheduler.preemptions
    assert preempted > 100


def test_a_request_that_never_fits_is_refused():
    """Catches a request larger than the pool that waits for ever, and those behind it with it."""
    machine = Machine(num_pages=5)
    machine.add([1] * 5, max_tokens=4)  # 8 positions are written: exactly 4 pages
    with pytest.raises(ValueError, match="5 pages .* has 4"):
        machine.add([1] * 5, max_tokens=5)
    machine.run()


def test_a_prefix_hit_after_preemption():
    """Catches restoring pages over a prefix that others, in the meantime, computed further than the preempted sequence had."""
    machine = Machine(num_pages=8, tiles=1, chunk_size=2)
    for length, max_tokens in ((3, 6), (9, 6), (5, 7)):
        machine.step()
        machine.add([1] * length, max_tokens=max_tokens)
    machine.run()
    assert machine.overtaken == 1


def test_a_long_prompt_shares_its_steps():
    """Catches a long prompt that takes every step's tiles for itself."""
    machine = Machine(num_pages=20, tiles=3, chunk_size=4)
    long, short = machine.add([1] * 11, max_tokens=1), machine.add([2] * 3, max_tokens=1)
    computed = lambda i: machine.requests[i][2][0].computed
    for expected in ((4, 2), (8, 3), (11, 3)):
        machine.step()
        assert (computed(long), *(computed(i) for i in (short,) if i in machine.requests)) in (
            expected,
            expected[:1],
        )
    machine.run()


def test_more_samples_than_rows_fork_in_groups():
    """Catches samples beyond the rows that can be sampled from one prompt: lost, or waiting for ever."""
    machine = Machine(num_pages=12, max_num_seqs=3, tiles=2)
    machine.add([1, 2, 1], max_tokens=4, n=7)
    machine.run()
    assert len(machine.done) == 7 and len(set(map(tuple, machine.done.values()))) > 1
    assert machine.scheduler.blocks.hit_tokens == 3 * 2, (
        "the later groups find the first one's prefix"
    )


def test_kv_memory_holds_tokens_and_three_times_as_many_sequences():
    """Catches pages reserved before they are needed: nano-vllm's job (256 prompts and outputs of 100 to 1024 tokens) in the
    memory of a dense cache of 16 rows, whose sequences wait for the longest of their batch."""
    rng = random.Random(0)
    requests = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(256)]
    longest = max(a + b for a, b in requests)
    P, rows = 16, 16
    scheduler = Scheduler(
        BlockManager(1 + rows * longest // P, P), max_num_seqs=256, tiles=32, chunk_size=512
    )
    for i, (length, max_tokens) in enumerate(requests):
        scheduler.add([i] * length, SamplingParams(max_tokens=max_tokens), i)
    utilization, in_flight, blocks = [], [], scheduler.blocks
    while scheduler.waiting or scheduler.running:
        scheduler.schedule()
        for seq in scheduler.running:
            seq.tokens += [0] * (seq.prompt_len + seq.sampled - len(seq.tokens))
        if scheduler.running:
            held = blocks.num_pages - 1 - blocks.num_free
            utilization.append(sum(s.computed for s in scheduler.running) / (held * P))
        if scheduler.waiting:
            in_flight.append(len(scheduler.running))
    mean = lambda x: sum(x) / len(x)
    dense = mean(
        [
            mean([b for _, b in requests[i : i + rows]])
            / max(b for _, b in requests[i : i + rows])
            * rows
            for i in range(0, 256, rows)
        ]
    )
    assert mean(utilization) > 0.96, f"{mean(utilization):.3f} of the held slots hold tokens"
    assert mean(in_flight) > 3 * dense, (
        f"{mean(in_flight):.1f} sequences in flight, {dense:.1f} in a dense cache"
    )
