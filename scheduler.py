"""Which sequences advance at each step, and by how many tokens: plain Python, no arrays.

Read Scheduler.schedule. Which pages a sequence has is the BlockManager's matter; what its tokens
are is the Engine's.
"""

import dataclasses
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from block_manager import BlockManager, PageCopy
from errors import require
from sequence import SampleKey, SamplingParams, Sequence, State


@dataclass(frozen=True)
class Stats:
    """What goes on in an engine between two steps."""

    running: int
    """Sequences that have pages."""
    waiting: int
    """Sequences in the queue; samples that will fork from one of them are not counted."""
    pages: int
    """Pages of the pool, without the null page."""
    pages_held: int
    """Pages that sequences hold; the others are free, though they may be cached."""
    tokens_held: int
    """Tokens in the pages that are held."""
    queried_tokens: int
    """Prompt tokens looked up in the prefix cache, since the start, like all below."""
    hit_tokens: int
    """Prompt tokens found there."""
    preemptions: int
    """How often a sequence had to leave its pages to others."""
    computed_tokens: int
    """Prompt tokens computed."""
    prompt_tokens: int
    """Tokens of the prompts that are done, whether they were computed or found."""
    generation_tokens: int
    """New tokens given out."""
    num_drafts: int
    """How often a sequence has guessed."""
    num_draft_tokens: int
    """Tokens guessed."""
    num_accepted_tokens: int
    """Those of them that were right."""


class SwapOut(NamedTuple):
    """Pages of a preempted sequence, from its first on, that go to host memory."""

    seq: Sequence
    pages: list[int]


class SwapIn(NamedTuple):
    """Pages that a preempted sequence gets back from host memory."""

    seq: Sequence
    first: int
    """How many pages of the sequence come before them; these were found in the prefix cache."""
    pages: list[int]


class Row(NamedTuple):
    """One row of a model_step call: the tokens of seq at positions start to start + length - 1.

    A row of prefill is a tile: one page of a prompt, or what the prompt's end leaves of it. A row
    of decode is one token a step: its newest, then those that the steps before it sample."""

    seq: Sequence
    start: int
    length: int
    guess: int | None = None
    """Of decode: the token that is guessed to stand there, where none has been sampled yet."""


class Sample(NamedTuple):
    """A token to be sampled: seq gets what follows the last token of a row."""

    row: int
    seq: Sequence


@dataclass
class Plan:
    """What one step does, in the order in which the device must do it.

    Pages are read before others write to them."""

    swap_out: list[SwapOut] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    swap_in: list[SwapIn] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)  # to be written to their slots
    tiles: list[Row] = field(default_factory=list)  # prefill
    samples: list[Sample] = field(default_factory=list)  # from the last tiles of prompts
    decodes: list[Row] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) for f in dataclasses.fields(self))


class Scheduler:
    """First come, first served.

    Requests are admitted in order of arrival, the prompt tokens of a step go to the oldest first,
    and when pages run out the youngest leaves (its pages wait in host memory) and is the first to
    come back. So the oldest always moves, and since it fits the pool alone, every request ends."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        tiles: int,
        chunk_size: int,
        max_steps: int = 1,
        max_guesses: int = 0,
    ):
        """Start with nobody in it.

        tiles: prompt pages per step, over all sequences. chunk_size: prompt tokens per step of one
        sequence. max_steps: how many tokens a sequence may be given at once, one a step, before
        there is anything else to decide. max_guesses: how many tokens more a sequence may be given
        in a step if it guesses them."""
        self.blocks = blocks
        self.tiles = tiles
        self.chunk_size = chunk_size
        self.max_decodes = max_num_seqs + max_guesses  # rows of a step, guesses included
        self.max_steps = max_steps
        self.max_guesses = max_guesses
        self.waiting: deque[Sequence] = deque()  # in order of arrival, like running
        self.running: list[Sequence] = []  # not those that have yet to fork
        self.free_slots = list(range(max_num_seqs))
        # Samples that can fork from one prompt: each needs a slot, and a row to be sampled from.
        self.group_size = min(tiles, max_num_seqs)
        self.preemptions = 0

    def add(self, prompt: list[int], params: SamplingParams, request_id: int) -> list[Sequence]:
        """Queue the n samples of a request and return them.

        Raises UserError, with both numbers, if one of them could never fit the pool."""
        self._require_fit(len(prompt), params.max_tokens)
        seqs = [Sequence(SampleKey(request_id, i), prompt, params) for i in range(params.n)]
        for i in range(0, params.n, self.group_size):
            leader, *followers = seqs[i : i + self.group_size]
            leader.followers = followers
            self.waiting.append(leader)
        return seqs

    def schedule(self) -> Plan:
        """Decide who advances by how much, and account for it as done."""
        plan = Plan()
        self._release_fully_sampled()
        for seq in list(self.running):
            # An older one may have preempted it in this loop.
            if seq.state is State.RUNNING and not seq.awaits_token:
                self._advance(seq, plan)
        while not plan.swap_out:
            newcomer = self._admit(plan)
            if newcomer is None:
                break
            self._advance(newcomer, plan)
        if self.max_guesses > 0:
            plan.decodes = self._with_guesses(plan.decodes)
        else:
            plan.decodes = self._with_more_steps(plan)
        return plan

    def cache_generated(self, seq: Sequence) -> None:
        """Let other prompts find the full pages of seq whose tokens the host knows, if it runs.

        Only for models whose generated tokens have the bits that they would get as a prompt."""
        read_tokens = len(seq.tokens) - 1  # the newest has not been read
        if seq.state is State.RUNNING and read_tokens % self.blocks.page_size == 0:
            self.blocks.filled(seq.key, seq.tokens, read_tokens)

    def finish(self, seq: Sequence) -> None:
        """End seq, whatever its state, and the followers that have not forked from it yet.

        Such a follower ends with its leader, never alone. What is in flight is to be ignored."""
        if seq.state is State.RUNNING:
            self._release(seq, State.FINISHED)
        elif seq.state in (State.WAITING, State.PREEMPTED):
            self.waiting.remove(seq)
        for member in seq.group:
            member.state = State.FINISHED

    def _require_fit(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raise UserError if a sample of such a request could never fit the pool, even alone."""
        # The last token that is sampled is never read, so it needs no place in a page.
        most_tokens = max(prompt_tokens, prompt_tokens + max_tokens - 1)
        needed = self.blocks.pages_for(most_tokens)
        pages = self.blocks.num_pages - 1  # without the null page
        require(
            needed <= pages,
            f"{prompt_tokens} prompt tokens and max_tokens={max_tokens} need {needed} pages of "
            f"{self.blocks.page_size} tokens, and the pool has {pages}: ask for fewer tokens or "
            "give the KV cache more memory",
        )

    def _release_fully_sampled(self) -> None:
        """Take slots and pages from those whose last step is in flight.

        The device works in order, so what is launched from now on may have them."""
        for seq in [s for s in self.running if s.fully_sampled]:
            self._release(seq, State.ENDING)

    def _advance(self, seq: Sequence, plan: Plan) -> None:
        """Give seq its next chunk of prefill or its next token.

        If pages run out, the youngest pay for it, even if that is seq itself."""
        start = seq.num_computed
        end = self._chunk_end(seq, plan) if seq.needs_prefill else start + 1
        copies = self.blocks.write(seq.key, start, end)
        while copies is None:
            youngest = self.running[-1]
            self._preempt(youngest, plan)
            if youngest is seq:
                return
            copies = self.blocks.write(seq.key, start, end)
        plan.copies += copies
        if seq.needs_prefill:
            self._prefill(seq, end, plan)
        else:
            self._decode(seq, plan)

    def _admit(self, plan: Plan) -> Sequence | None:
        """Move the first of the queue to running, if there are slots, tiles and pages for it."""
        if not self.waiting:
            return None
        seq = self.waiting[0]
        tiles_used_up = len(plan.tiles) == self.tiles
        if len(seq.group) > len(self.free_slots) or (seq.needs_prefill and tiles_used_up):
            return None
        # Logprobs of prompt tokens must be computed: a prefix found in the cache is no use for
        # them.
        use_cache = seq.params.prompt_logprobs is None
        hit = self.blocks.open(seq.key, seq.prompt, use_cache)
        if not self._has_pages_for(seq):
            self.blocks.free(seq.key)
            return None
        self._bring_back(seq, hit, plan)
        for member in seq.group:
            member.slot = self.free_slots.pop()
            member.state = State.RUNNING
        plan.admitted += seq.group
        self.running.append(self.waiting.popleft())
        return seq

    def _has_pages_for(self, seq: Sequence) -> bool:
        """Return whether there are pages for all that seq, which has a table, is about to need."""
        tokens = max(seq.prompt_len, seq.num_computed + 1)
        needed = self._pages_missing(seq, tokens)
        promised = sum(max(0, self._pages_missing(s, s.prompt_len)) for s in self.running)
        # One page for each that runs: else their next tokens would preempt the newcomer at once.
        spare = len(self.running)
        return needed + promised + spare <= self.blocks.num_free

    def _pages_missing(self, seq: Sequence, tokens: int) -> int:
        """Return how many pages more seq needs for so many tokens; negative if it has too many."""
        return self.blocks.pages_for(tokens) - len(self.blocks.tables[seq.key])

    def _bring_back(self, seq: Sequence, hit: int, plan: Plan) -> None:
        """Settle what of a newcomer is computed; the prefix cache holds its first `hit` tokens.

        A preempted sequence gets its other pages back from host memory, unless the cache, which
        other prompts go on filling, holds as many tokens by now."""
        blocks = self.blocks
        if seq.num_computed > hit:
            blocks.write(seq.key, hit, seq.num_computed)
            first = blocks.pages_for(hit)
            plan.swap_in.append(SwapIn(seq, first, blocks.tables[seq.key][first:]))
        else:
            blocks.count_hits(seq.prompt_len, hit)
            seq.num_computed = hit

    def _chunk_end(self, seq: Sequence, plan: Plan) -> int:
        """Return where this step's chunk of seq's prompt ends: with a page, or with the prompt."""
        page_size = self.blocks.page_size
        room = (self.tiles - len(plan.tiles)) * page_size
        end = min(seq.num_computed + min(self.chunk_size, room), seq.prompt_len)
        samples = len(plan.samples) + len(seq.group)
        if end == seq.prompt_len and samples > self.tiles:
            # No row is left to sample from the last tile: it has to wait for the next step.
            end = (end - 1) // page_size * page_size
        return end

    def _prefill(self, seq: Sequence, end: int, plan: Plan) -> None:
        """Plan the tiles that bring seq's prompt to `end`, and its samples if that completes it."""
        page_size = self.blocks.page_size
        for start in range(seq.num_computed, end, page_size):
            plan.tiles.append(Row(seq, start, min(page_size, end - start)))
        seq.num_computed = end
        self.blocks.filled(seq.key, seq.prompt, end)
        if not seq.needs_prefill:
            last_tile = len(plan.tiles) - 1
            for member in seq.group:
                member.num_sampled = 1
                plan.samples.append(Sample(last_tile, member))
            self._fork(seq)

    def _fork(self, seq: Sequence) -> None:
        """Give seq's followers the prompt that it has computed, and let them run on their own.

        They stand right behind it: they arrived together."""
        for follower in seq.followers:
            self.blocks.fork(seq.key, follower.key)
            follower.num_computed = seq.num_computed
        behind = self.running.index(seq) + 1
        self.running[behind:behind] = seq.followers
        seq.followers = []

    def _decode(self, seq: Sequence, plan: Plan) -> None:
        """Plan the row that reads seq's newest token and samples the next."""
        plan.decodes.append(Row(seq, seq.num_computed, 1))
        seq.num_computed += 1
        seq.num_sampled += 1
        seq.num_guesses = 0

    def _with_guesses(self, rows: list[Row]) -> list[Row]:
        """Return the decodes of a plan, each with the rows of what its sequence guesses behind it.

        They take rows and pages that are left. num_computed and num_sampled do not count them:
        the engine adds those that turn out right."""
        room = self.max_decodes - len(rows)
        with_guesses = []
        for row in rows:
            guesses = self._guesses(row, room)
            room -= len(guesses)
            with_guesses += [row, *guesses]
        return with_guesses

    def _guesses(self, row: Row, room: int) -> list[Row]:
        """Return up to `room` rows of what the sequence of a decode guesses, with their pages."""
        seq = row.seq
        if seq.speculation is None or seq.num_sampled > seq.num_generated + 1:
            return []  # its newest token is not known
        count = min(self.max_guesses, room, seq.params.max_tokens - seq.num_sampled)
        tokens = seq.speculation.draft(seq.tokens, count) if count > 0 else []
        first = row.start + 1
        to_spare = self.blocks.num_free - len(self.running)  # a page for everyone's next token
        while tokens and self._pages_missing(seq, first + len(tokens)) > max(0, to_spare):
            tokens.pop()
        if not tokens:
            return []
        copies = self.blocks.write(seq.key, first, first + len(tokens))
        assert copies == [], f"{seq.key}: pages for guesses are not its own: {copies}"
        seq.num_guesses = len(tokens)
        return [Row(seq, first + i, 1, token) for i, token in enumerate(tokens)]

    def _with_more_steps(self, plan: Plan) -> list[Row]:
        """Return the decodes of a plan with as many steps each as nobody has to wait for.

        That is one where a prompt is being computed, where pages are short, and where what a
        sequence may be given depends on its token before."""
        rows = plan.decodes
        has_matcher = any(row.seq.matcher is not None for row in rows)
        if plan.tiles or plan.swap_out or has_matcher:
            return rows
        steps = self.max_steps
        while steps > 1 and self._pages_for_steps(rows, steps) > self.blocks.num_free:
            steps //= 2
        return [self._lengthen(row, steps) for row in rows] if steps > 1 else rows

    def _pages_for_steps(self, rows: list[Row], steps: int) -> int:
        """Return how many pages more the rows need for so many steps."""
        return sum(
            max(0, self._pages_missing(row.seq, row.start + steps_left(row, steps))) for row in rows
        )

    def _lengthen(self, row: Row, steps: int) -> Row:
        """Return the row with up to `steps` steps, for which there are pages."""
        seq = row.seq
        length = steps_left(row, steps)
        copies = self.blocks.write(seq.key, row.start, row.start + length)
        assert copies == [], f"{seq.key}: pages for {length} steps are not its own: {copies}"
        seq.num_computed += length - row.length
        seq.num_sampled += length - row.length
        return row._replace(length=length)

    def _preempt(self, seq: Sequence, plan: Plan) -> None:
        """Take slots and pages from seq and its followers, and put it at the head of the queue."""
        used = self.blocks.pages_for(seq.num_computed + seq.num_guesses)
        plan.swap_out.append(SwapOut(seq, self.blocks.tables[seq.key][:used]))
        self._release(seq, State.PREEMPTED)
        self.waiting.appendleft(seq)
        self.preemptions += 1

    def _release(self, seq: Sequence, state: State) -> None:
        """Take slots and pages from seq and its followers, and leave them in the given state."""
        self.running.remove(seq)
        self.blocks.free(seq.key)
        for member in seq.group:
            self.free_slots.append(member.occupied_slot)
            member.slot = None
            member.state = state


def steps_left(row: Row, steps: int) -> int:
    """Return `steps`, or what is left to a row of decode until its sequence has all its tokens."""
    return min(steps, 1 + row.seq.params.max_tokens - row.seq.num_sampled)


def reads_what_is_there(row: Row) -> bool:
    """Return whether a row of decode has read the token that stands there by now.

    A guess that is right is counted in its sequence, which has taken in the tokens before it."""
    if row.guess is None:
        return True
    seq = row.seq
    is_next = len(seq.tokens) == row.start + 1  # not if a guess before was wrong
    is_right = is_next and seq.tokens[row.start] == row.guess
    assert seq.speculation is not None, f"{seq.key} has guessed without speculation"
    seq.speculation.note(seq.tokens, is_right)
    seq.num_computed += is_right
    seq.num_sampled += is_right
    return is_right
