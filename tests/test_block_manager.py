"""The block manager against a model of the device: each slot of each page remembers which tokens led to what it holds."""

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from block_manager import BlockManager

P = 2


class Device:
    """Runs sequences on a BlockManager and checks, at each step, that each still finds what it wrote.

    What a slot holds depends on all tokens up to its own, as keys and values do, and on which shape computed it."""

    def __init__(self, num_pages: int):
        self.blocks = BlockManager(num_pages, P)
        self.slots = {}  # (page, slot) -> ("prefill" or "decode", tokens so far)
        self.seqs = {}  # name -> [prompt, tokens, computed]

    def open(self, name, prompt, use_cache=True):
        hit = self.blocks.open(name, prompt, use_cache)
        assert hit % P == 0 and hit < len(prompt)
        self.seqs[name] = [prompt, list(prompt), hit]

    def advance(self, name, most=P, token=7) -> bool:
        """A chunk of prefill, up to a page's end, or one decoded token; False if there are too few pages."""
        prompt, tokens, computed = self.seqs[name]
        prefilling = computed < len(prompt)
        end = min(computed - computed % P + most, len(prompt)) if prefilling else computed + 1
        before = (
            copy.deepcopy(self.blocks.tables),
            list(self.blocks.free_queue),
            list(self.blocks.refs),
        )
        copies = self.blocks.write(name, computed, end)
        if copies is None:
            assert before == (self.blocks.tables, list(self.blocks.free_queue), self.blocks.refs), (
                "None changed something"
            )
            return False
        for source, target in copies:
            for slot in range(P):
                self.slots[target, slot] = self.slots.get((source, slot))
        if not prefilling:
            tokens.append(token)
        for i in range(computed, end):
            page = self.blocks.tables[name][i // P]
            self.slots[page, i % P] = (
                "prefill" if prefilling else "decode",
                tuple(tokens[: i + 1]),
            )
        self.seqs[name][2] = end
        if prefilling:
            self.blocks.filled(name, prompt, end)
        return True

    def fork(self, parent, child):
        self.blocks.fork(parent, child)
        prompt, tokens, computed = self.seqs[parent]
        self.seqs[child] = [prompt, list(tokens), computed]

    def free(self, name):
        self.blocks.free(name)
        del self.seqs[name]

    def check(self):
        self.blocks.check()
        for name, (prompt, tokens, computed) in self.seqs.items():
            for i in range(computed):
                held = self.slots[self.blocks.tables[name][i // P], i % P]
                assert held == (
                    "prefill" if i < len(prompt) else "decode",
                    tuple(tokens[: i + 1]),
                ), f"{name} lost position {i}"
        if not self.seqs:
            assert self.blocks.num_free == self.blocks.num_pages - 1, "pages leaked"


class Random(RuleBasedStateMachine):
    """Catches a page that two sequences write, a shared page written without a copy, a prefix taken for another, a page
    evicted while held, decoded pages in the prefix cache, and leaks."""

    def __init__(self):
        super().__init__()
        self.device, self.names = Device(num_pages=7), iter(range(10**6))

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=7), use_cache=st.booleans())
    def open(self, prompt, use_cache):
        self.device.open(next(self.names), prompt, use_cache)

    @precondition(lambda self: self.device.seqs)
    @rule(data=st.data(), most=st.sampled_from([P, 2 * P]), token=st.integers(0, 1))
    def advance(self, data, most, token):
        self.device.advance(data.draw(st.sampled_from(sorted(self.device.seqs))), most, token)

    @precondition(lambda self: self.device.seqs)
    @rule(data=st.data())
    def fork(self, data):
        self.device.fork(data.draw(st.sampled_from(sorted(self.device.seqs))), next(self.names))

    @precondition(lambda self: self.device.seqs)
    @rule(data=st.data())
    def free(self, data):
        self.device.free(data.draw(st.sampled_from(sorted(self.device.seqs))))

    @invariant()
    def holds(self):
        self.device.check()

    def teardown(self):
        for name in list(self.device.seqs):
            self.device.free(name)
        self.device.check()


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_every_interleaving_of_three_requests_on_four_pages():
    """Catches an order of events, however rare, that loses a page or lets one request read another's."""
    prompts = {"a": [1, 1, 2], "b": [1, 1, 3], "c": [1, 1, 2, 2, 4]}
    seen, ends = set(), 0

    def explore(device, left):
        nonlocal ends
        device.check()
        state = repr(
            (
                left,
                device.seqs,
                device.blocks.tables,
                list(device.blocks.free_queue),
                sorted(device.blocks.page_of.values()),
            )
        )
        if state in seen:
            return
        seen.add(state)
        ends += not any(left.values())
        for name, steps in left.items():
            if steps == 0:
                continue
            branch = copy.deepcopy(device)
            rest = {**left, name: steps - 1}
            if steps == 5:
                branch.open(name, prompts[name])
            elif steps == 1:
                branch.free(name)
            elif not branch.advance(name):
                if name == min(branch.seqs):  # the first goes on when the others have left
                    continue
                branch.free(name)
                rest[name] = 5
            explore(branch, rest)

    explore(Device(num_pages=5), dict.fromkeys(prompts, 5))
    assert ends > 0 and len(seen) > 1000


def prefilled(device, name, prompt):
    device.open(name, prompt)
    while device.seqs[name][2] < len(prompt):
        assert device.advance(name)


def test_a_hit_needs_the_whole_prefix_and_leaves_a_token_to_compute():
    """Catches a lookup by the page's own tokens only, and one that leaves no token whose logits could be sampled from."""
    device = Device(9)
    prefilled(device, "a", [1, 1, 2, 2])
    assert device.blocks.open("same", [1, 1, 2, 2]) == 2
    assert device.blocks.open("longer", [1, 1, 2, 2, 5]) == 4
    assert device.blocks.open("other start", [3, 3, 2, 2, 5]) == 0


def test_generated_tokens_are_never_found():
    """Catches a page that decode filled, with other bits than prefill has for these tokens, serving as a prefix."""
    device = Device(9)
    prefilled(device, "a", [1, 1, 1])
    device.advance("a", token=2)
    device.free("a")
    assert device.blocks.open("b", [1, 1, 1, 2, 5]) == 2


def test_eviction_takes_what_caches_nothing_then_the_prefix_held_longest_ago_and_its_end_before_its_start():
    """Catches eviction while other pages are free, by age of computation, and of starts, without which ends are unreachable."""
    device = Device(7)
    for name in "ab":
        prefilled(
            device, name, [ord(name)] * 5
        )  # two full pages, which are cached, and one that is not
    device.free("a"), device.free("b")
    device.open("a", [ord("a")] * 5), device.free("a")  # a is now the one held last
    prefilled(device, "c", [0]), device.free("c")
    for tokens, left_of_b, left_of_a in ((4, 4, 4), (5, 2, 4), (7, 0, 4), (9, 0, 2)):
        branch = copy.deepcopy(device)
        branch.open("d", [0] * tokens)
        assert branch.blocks.write("d", 0, tokens) == []
        assert (
            branch.blocks.open("b", [ord("b")] * 5),
            branch.blocks.open("a", [ord("a")] * 5),
        ) == (left_of_b, left_of_a)


def test_fork_copies_only_the_page_it_writes_and_only_while_shared():
    """Catches a copy of full pages, and a copy by the last holder, which would waste a page per sample."""
    device = Device(9)
    prefilled(device, "a", [1, 1, 2])
    device.fork("a", "b"), device.fork("a", "c")
    first = device.blocks.tables["a"][0]
    for name, pages_held in (("b", 3), ("c", 4), ("a", 4)):
        assert device.advance(name)
        assert device.blocks.num_pages - 1 - device.blocks.num_free == pages_held
        assert device.blocks.tables[name][0] == first
    device.check()


def test_broken_books_are_noticed():
    """Catches a check() that checks nothing."""
    for breakage in (
        lambda b: b.refs.__setitem__(1, 5),
        lambda b: b.free_queue.popitem(),
        lambda b: b.tables["a"].append(0),
        lambda b: b.page_of.clear(),
        lambda b: b.tables["a"].append(b.tables["a"][0]),
    ):
        device = Device(9)
        prefilled(device, "a", [1, 1, 2])
        breakage(device.blocks)
        with pytest.raises(AssertionError):
            device.check()
