"""Which sequences advance at each step, and by how many tokens: plain Python, no arrays.

Read Scheduler.schedule. The pages a sequence needs are the BlockManager's; what the sequences' tokens are is the Engine's.
"""

import dataclasses
from collections import deque
from dataclasses import dataclass, field

from block_manager import BlockManager
from errors import require
from sequence import SamplingParams, Sequence


@dataclass
class Plan:
    """What one step does, in the order in which the device must do it: pages are read before others write to them."""

    swap_out: list[tuple[Sequence, list[int]]] = field(default_factory=list)  # pages to host memory
    copies: list[tuple[int, int]] = field(default_factory=list)  # from page, to page
    swap_in: list[tuple[Sequence, int, list[int]]] = field(
        default_factory=list
    )  # first logical page, pages
    admitted: list[Sequence] = field(default_factory=list)  # to write to their slots
    tiles: list[tuple[Sequence, int, int]] = field(
        default_factory=list
    )  # prefill: start, number of tokens
    samples: list[tuple[int, Sequence]] = field(
        default_factory=list
    )  # last tile of a prompt, who samples from it
    decodes: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) for f in dataclasses.fields(self))


class Scheduler:
    """First come, first served: requests are admitted in order of arrival, the prompt tokens of a step go to the oldest first,
    and when pages run out the youngest leaves (its pages wait in host memory) and is the first to come back. So the oldest
    always moves, and since it fits the pool alone, every request ends."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, tiles: int, chunk_size: int):
        """tiles: prompt pages per step, over all sequences; chunk_size: prompt tokens per step of one sequence."""
        self.blocks, self.tiles, self.chunk_size = blocks, tiles, chunk_size
        self.waiting: deque[Sequence] = deque()  # both in order of arrival
        self.running: list[Sequence] = []
        self.free_slots = list(range(max_num_seqs))
        self.group_size = min(
            tiles, max_num_seqs
        )  # samples that can fork from one prompt: each needs a row to sample
        self.preemptions = 0

    def add(self, prompt: list[int], params: SamplingParams, request_id: int) -> list[Sequence]:
        """The n sequences of a request. Raises ValueError, with both numbers, if one could never fit the pool."""
        most = max(
            len(prompt), len(prompt) + params.max_tokens - 1
        )  # the last token sampled is never read
        pages = self.blocks.num_pages - 1
        require(
            self.blocks.pages_for(most) <= pages,
            f"{len(prompt)} prompt tokens and max_tokens={params.max_tokens} need {self.blocks.pages_for(most)} pages of "
            f"{self.blocks.page_size} tokens, and the pool has {pages}: ask for fewer tokens or give the KV cache more "
            "memory",
        )
        seqs = [Sequence((request_id, i), prompt, params) for i in range(params.n)]
        for i in range(0, params.n, self.group_size):
            seqs[i].followers = seqs[i + 1 : i + self.group_size]
            self.waiting.append(seqs[i])
        return seqs

    def schedule(self) -> Plan:
        """Decides who advances by how much, and accounts for it as done."""
        plan = Plan()
        for seq in [s for s in self.running if s.sampled and s.sampled >= s.params.max_tokens]:
            self._release(
                seq
            )  # its last step is in flight: what is launched from now on may have its pages
        for seq in list(self.running):
            if seq.slot is not None:  # else it was preempted by an older one
                self._advance(seq, plan)
        while not plan.swap_out and (seq := self._admit(plan)):
            self._advance(seq, plan)
        return plan

    def finish(self, seq: Sequence) -> None:
        """seq needs nothing any more, whatever state it is in; what of it is in flight is to be ignored."""
        seq.finished = True
        if seq in self.running:
            self._release(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def _advance(self, seq: Sequence, plan: Plan) -> None:
        """Gives seq its next chunk of prefill or its next token, at the cost of the youngest if pages run out."""
        end = self._chunk_end(seq, plan) if seq.prefilling else seq.computed + 1
        while (copies := self.blocks.write(seq.key, seq.computed, end)) is None:
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is seq:
                return
        plan.copies += copies
        if seq.prefilling:
            self._prefill(seq, end, plan)
        else:
            plan.decodes.append(seq)
            seq.computed = end
            seq.sampled += 1

    def _admit(self, plan: Plan) -> Sequence | None:
        """Moves the first of the queue to running, if there are slots, prompt tiles and pages for it."""
        if not self.waiting:
            return None
        seq, blocks = self.waiting[0], self.blocks
        group = [seq, *seq.followers]
        if len(group) > len(self.free_slots) or (seq.prefilling and len(plan.tiles) == self.tiles):
            return None
        # Logprobs of prompt tokens have to be computed, so a prefix found in the cache is of no use for them.
        hit = blocks.open(seq.key, seq.prompt, use_cache=seq.params.prompt_logprobs is None)
        need = blocks.pages_for(max(seq.prompt_len, seq.computed + 1)) - len(blocks.tables[seq.key])
        promised = sum(
            max(0, blocks.pages_for(s.prompt_len) - len(blocks.tables[s.key])) for s in self.running
        )
        # One page more for each sequence that runs: else their next tokens would preempt this one at once.
        if need + promised + len(self.running) > blocks.num_free:
            blocks.free(seq.key)
            return None
        if seq.computed > hit:  # it was preempted
            blocks.write(seq.key, hit, seq.computed)
            plan.swap_in.append(
                (seq, blocks.pages_for(hit), blocks.tables[seq.key][blocks.pages_for(hit) :])
            )
        else:
            blocks.count_hits(seq.prompt_len, hit)
            seq.computed = hit
        for s in group:
            s.slot = self.free_slots.pop()
        plan.admitted += group
        self.running.append(self.waiting.popleft())
        return seq

    def _chunk_end(self, seq: Sequence, plan: Plan) -> int:
        """Where this step's chunk of seq's prompt ends: at the end of a page, or of the prompt."""
        room = (self.tiles - len(plan.tiles)) * self.blocks.page_size
        end = min(seq.computed + min(self.chunk_size, room), seq.prompt_len)
        if end == seq.prompt_len and len(plan.samples) + 1 + len(seq.followers) > self.tiles:
            end = (
                (end - 1) // self.blocks.page_size * self.blocks.page_size
            )  # no row left to sample from its last tile
        return end

    def _prefill(self, seq: Sequence, end: int, plan: Plan) -> None:
        P = self.blocks.page_size
        plan.tiles += [(seq, start, min(P, end - start)) for start in range(seq.computed, end, P)]
        seq.computed = end
        self.blocks.filled(seq.key, seq.prompt, end)
        if not seq.prefilling:
            at = self.running.index(seq) + 1
            for s in seq.followers:
                self.blocks.fork(seq.key, s.key)
                s.computed = end
            for s in (seq, *seq.followers):
                s.sampled = 1
                plan.samples.append((len(plan.tiles) - 1, s))
            self.running[at:at] = seq.followers
            seq.followers = []

    def _preempt(self, seq: Sequence, plan: Plan) -> None:
        plan.swap_out.append(
            (seq, self.blocks.tables[seq.key][: self.blocks.pages_for(seq.computed)])
        )
        self._release(seq)
        self.waiting.appendleft(seq)
        self.preemptions += 1

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.free(seq.key)
        for s in (seq, *seq.followers):
            self.free_slots.append(s.slot)
            s.slot = None
