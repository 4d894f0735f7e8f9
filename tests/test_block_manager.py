"""The block manager against a model of the device: each slot of each page remembers what it holds.

Start with Device, then Random, which runs it through workloads that nobody thought of.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from block_manager import BlockManager

P = 2  # tokens per page


@dataclass
class DeviceSequence:
    """A sequence on the device: its prompt, its tokens so far, how many of them are in pages."""

    prompt: list[int]
    tokens: list[int]
    computed: int

    @property
    def prefilling(self) -> bool:
        """Whether tokens of the prompt are left to compute."""
        return self.computed < len(self.prompt)

    def __deepcopy__(self, memo: dict) -> "DeviceSequence":
        """Copy what changes. Explorer copies a device often, and the general way takes long."""
        return DeviceSequence(self.prompt, list(self.tokens), self.computed)


class Device:
    """Runs sequences on a BlockManager and checks, at each step, that each finds what it wrote.

    What a slot holds depends on all tokens up to its own, as keys and values do, and on which shape
    computed it."""

    def __init__(self, num_pages: int):
        self.blocks = BlockManager(num_pages, P)
        self.slots: dict[
            tuple[int, int], tuple | None
        ] = {}  # (page, slot) -> (shape, tokens so far)
        self.seqs: dict[Any, DeviceSequence] = {}

    def open(self, name: Any, prompt: list[int], use_cache: bool = True) -> None:
        """Admit a sequence."""
        hit = self.blocks.open(name, prompt, use_cache)
        assert hit % P == 0 and hit < len(prompt)
        self.seqs[name] = DeviceSequence(prompt, list(prompt), hit)

    def advance(self, name: Any, most: int = P, token: int = 7) -> bool:
        """Compute a chunk of prefill, up to a page's end, or one token that was sampled.

        Returns False, and has changed nothing, if there are too few pages."""
        seq = self.seqs[name]
        start = seq.computed
        end = start + 1
        if seq.prefilling:
            end = min(start - start % P + most, len(seq.prompt))
        if not self.make_writable(name, start, end):
            return False
        shape = "prefill" if seq.prefilling else "decode"
        if not seq.prefilling:
            seq.tokens.append(token)
        for i in range(start, end):
            page = self.blocks.tables[name][i // P]
            self.slots[page, i % P] = shape, tuple(seq.tokens[: i + 1])
        seq.computed = end
        if shape == "prefill":
            self.blocks.filled(name, seq.prompt, end)
        return True

    def make_writable(self, name: Any, start: int, end: int) -> bool:
        """Ask for pages to write to, and make the copies that this takes."""
        before = self.books()
        copies = self.blocks.write(name, start, end)
        if copies is None:
            assert before == self.books(), "None changed something"
            return False
        for source, target in copies:
            for slot in range(P):
                self.slots[target, slot] = self.slots.get((source, slot))
        return True

    def books(self) -> tuple:
        """Return a copy of what `write` may change."""
        blocks = self.blocks
        return copy.deepcopy(blocks.tables), list(blocks.free_queue), list(blocks.refs)

    def fork(self, parent: Any, child: Any) -> None:
        """Let a sequence go two ways from here."""
        self.blocks.fork(parent, child)
        seq = self.seqs[parent]
        self.seqs[child] = DeviceSequence(seq.prompt, list(seq.tokens), seq.computed)

    def free(self, name: Any) -> None:
        """End a sequence."""
        self.blocks.free(name)
        del self.seqs[name]

    def check(self) -> None:
        """Assert that the books are in order and that nobody has lost anything."""
        self.blocks.check()
        for name, seq in self.seqs.items():
            for i in range(seq.computed):
                shape = "prefill" if i < len(seq.prompt) else "decode"
                slot = self.blocks.tables[name][i // P], i % P
                expected = shape, tuple(seq.tokens[: i + 1])
                assert self.slots[slot] == expected, f"{name} lost position {i}"
        if not self.seqs:
            assert self.blocks.num_free == self.blocks.num_pages - 1, "pages leaked"


class Random(RuleBasedStateMachine):
    """Catches a page that two sequences write, a shared page written without a copy, a prefix taken
    for another, a page evicted while held, decoded pages in the prefix cache, and leaks."""

    def __init__(self):
        super().__init__()
        self.device = Device(num_pages=7)
        self.names = iter(range(10**6))

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=7), use_cache=st.booleans())
    def open(self, prompt, use_cache):
        self.device.open(next(self.names), prompt, use_cache)

    @precondition(lambda self: self.device.seqs)
    @rule(data=st.data(), most=st.sampled_from([P, 2 * P]), token=st.integers(0, 1))
    def advance(self, data, most, token):
        self.device.advance(self.any_sequence(data), most, token)

    @precondition(lambda self: self.device.seqs)
    @rule(data=st.data())
    def fork(self, data):
        self.device.fork(self.any_sequence(data), next(self.names))

    @precondition(lambda self: self.device.seqs)
    @rule(data=st.data())
    def free(self, data):
        self.device.free(self.any_sequence(data))

    @invariant()
    def holds(self):
        self.device.check()

    def any_sequence(self, data):
        return data.draw(st.sampled_from(sorted(self.device.seqs)))

    def teardown(self):
        for name in list(self.device.seqs):
            self.device.free(name)
        self.device.check()


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


class Explorer:
    """Walks through every order of the steps of three requests, each state once."""

    PROMPTS = {"a": [1, 1, 2], "b": [1, 1, 3], "c": [1, 1, 2, 2, 4]}
    STEPS = 5  # of each request: the first opens it, the last frees it, those between advance it

    def __init__(self):
        self.seen: set[str] = set()
        self.ends = 0

    def explore(self, device: Device, steps_left: dict[str, int]) -> None:
        """Check this state, then go on from it in every possible way."""
        device.check()
        state = self.fingerprint(device, steps_left)
        if state in self.seen:
            return
        self.seen.add(state)
        self.ends += not any(steps_left.values())
        for name, steps in steps_left.items():
            if steps > 0:
                self.take_step(copy.deepcopy(device), name, steps_left)

    def take_step(self, device: Device, name: str, steps_left: dict[str, int]) -> None:
        """Take a request's next step, and go on from there."""
        steps = steps_left[name]
        after = steps - 1
        if steps == self.STEPS:
            device.open(name, self.PROMPTS[name])
        elif steps == 1:
            device.free(name)
        elif not device.advance(name):
            if name == min(device.seqs):
                return  # the first goes on when the others have left
            device.free(name)
            after = self.STEPS
        self.explore(device, {**steps_left, name: after})

    @staticmethod
    def fingerprint(device: Device, steps_left: dict[str, int]) -> str:
        """Return what tells this state from others."""
        blocks = device.blocks
        books = (blocks.tables, list(blocks.free_queue), sorted(blocks.page_of.values()))
        return repr((steps_left, device.seqs, books))


def test_every_interleaving_of_three_requests_on_four_pages():
    """Catches an order of events, however rare, that loses a page or lets one request read
    another's."""
    explorer = Explorer()
    explorer.explore(Device(num_pages=5), dict.fromkeys(Explorer.PROMPTS, Explorer.STEPS))
    assert explorer.ends > 0 and len(explorer.seen) > 1000


def prefilled(device: Device, name: str, prompt: list[int]) -> None:
    """Admit a sequence and compute its prompt."""
    device.open(name, prompt)
    while device.seqs[name].prefilling:
        assert device.advance(name)


def test_a_hit_needs_the_whole_prefix_and_leaves_a_token_to_compute():
    """Catches a lookup by the page's own tokens only, and one that leaves no token whose logits
    could be sampled from."""
    device = Device(9)
    prefilled(device, "a", [1, 1, 2, 2])
    assert device.blocks.open("same", [1, 1, 2, 2]) == 2
    assert device.blocks.open("longer", [1, 1, 2, 2, 5]) == 4
    assert device.blocks.open("other start", [3, 3, 2, 2, 5]) == 0


def test_generated_tokens_are_never_found():
    """Catches a page that decode filled, with other bits than prefill has for these tokens, serving
    as a prefix."""
    device = Device(9)
    prefilled(device, "a", [1, 1, 1])
    device.advance("a", token=2)
    device.free("a")
    assert device.blocks.open("b", [1, 1, 1, 2, 5]) == 2


@pytest.mark.parametrize(
    "tokens, left_of_b, left_of_a",
    [
        pytest.param(4, 4, 4, id="pages that cache nothing"),
        pytest.param(5, 2, 4, id="the end of the prefix held longest ago"),
        pytest.param(7, 0, 4, id="its start"),
        pytest.param(9, 0, 2, id="the end of the other prefix"),
    ],
)
def test_order_of_eviction(tokens, left_of_b, left_of_a):
    """Catches eviction while other pages are free, by age of computation, and of starts, without
    which ends are unreachable."""
    prompts = {name: [ord(name)] * 5 for name in "ab"}
    device = Device(7)
    for name, prompt in prompts.items():
        prefilled(device, name, prompt)  # two full pages, which are cached, and one that is not
    device.free("a")
    device.free("b")
    device.open("a", prompts["a"])
    device.free("a")  # a is now the one held last
    prefilled(device, "c", [0])
    device.free("c")

    device.open("d", [0] * tokens)
    assert device.blocks.write("d", 0, tokens) == []
    assert device.blocks.open("b", prompts["b"]) == left_of_b
    assert device.blocks.open("a", prompts["a"]) == left_of_a


def test_fork_copies_only_the_page_it_writes_and_only_while_shared():
    """Catches a copy of full pages, and a copy by the last holder, which would waste a page per
    sample."""
    device = Device(9)
    prefilled(device, "a", [1, 1, 2])
    device.fork("a", "b")
    device.fork("a", "c")
    first = device.blocks.tables["a"][0]
    for name, pages_held in (("b", 3), ("c", 4), ("a", 4)):
        assert device.advance(name)
        assert device.blocks.num_pages - 1 - device.blocks.num_free == pages_held
        assert device.blocks.tables[name][0] == first
    device.check()


def wrong_count(blocks: BlockManager) -> None:
    blocks.refs[1] = 5


def lost_page(blocks: BlockManager) -> None:
    blocks.free_queue.popitem()


def null_page_in_a_table(blocks: BlockManager) -> None:
    blocks.tables["a"].append(0)


def key_without_page(blocks: BlockManager) -> None:
    blocks.page_of.clear()


def page_twice_in_a_table(blocks: BlockManager) -> None:
    blocks.tables["a"].append(blocks.tables["a"][0])


@pytest.mark.parametrize(
    "break_books",
    [wrong_count, lost_page, null_page_in_a_table, key_without_page, page_twice_in_a_table],
)
def test_broken_books_are_noticed(break_books: Callable[[BlockManager], None]):
    """Catches a check() that checks nothing."""
    device = Device(9)
    prefilled(device, "a", [1, 1, 2])
    break_books(device.blocks)
    with pytest.raises(AssertionError):
        device.check()
