"""Continuous batching: many sequences of unequal length through one jitted step. No HTTP.

Read Engine.step, then Scheduler.schedule, then model_step in model_runner.py.

The same bits. A request's tokens and logprobs do not depend on who else runs, on chunking, on
prefix hits, on preemption or on the pool's size, because nothing that reaches a number does:
- Prompt tokens go through calls whose rows are tiles. A tile is one page of one sequence, wherever
  the chunks end, so a chunk is just how many tiles of a sequence share a step. Generated tokens go
  through calls whose rows have one token.
- The bits of a row depend neither on its slot nor on the other rows of the call, nor on how many
  these are: see model_runner.py.
- Preemption moves pages to host memory and back. Other prompts find pages that prefill filled, and
  generated tokens only where these get the bits that they would have in a prompt.
- A token is drawn with a key made of its request's seed, its sample's index and its position.
"""

import dataclasses
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as AnySequence
from typing import Any

from tqdm import tqdm

from block_manager import BlockManager
from config import EngineConfig
from errors import UserError, require
from model import GPT
from model_runner import CallInFlight, ModelRunner, compiled_programs, step_size
from programs.model_step import Sampled, Scores
from sampling import most_banned, spell
from scheduler import Plan, Row, Scheduler, Stats, reads_what_is_there
from sequence import (
    DEFAULT_PARAMS,
    MAX_BAD_TOKENS,
    MAX_BIASES,
    Logprobs,
    Output,
    SampleKey,
    SamplingParams,
    Sequence,
    TextStream,
    require_context,
)
from speculation.drafts import Speculation
from structured.grammar import matcher_for
from structured.masks import write_masks
from tokenizer import Tokenizer

Prompt = str | AnySequence[int]  # text or token ids

DEFAULT_CONFIG = EngineConfig()


class Engine:
    """Runs requests on a model: `generate`, or `add` them and `step` while `busy`. Not thread-safe.

    `generate` takes whole prompts and returns whole answers. `add` and `step` are for those who
    want each token as it comes, or add requests while others run. A prompt is token ids or, for an
    engine with a tokenizer, text."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig = DEFAULT_CONFIG,
        *,
        progress: bool = True,
    ):
        """Compile all that will ever run. progress: show a bar meanwhile.

        tokenizer: for text in prompts and outputs, stop strings and the end-of-text token."""
        step = step_size(config)
        self.model_config = model.config
        self.tokenizer = tokenizer
        self.config = dataclasses.replace(config, **step._asdict())
        self.runner = ModelRunner(model, config, step, progress=progress)
        self.blocks = BlockManager(self.runner.num_pages, config.page_size)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=step.max_num_seqs,
            tiles=self.runner.max_tiles,
            chunk_size=config.chunk_size or step.prefill_tokens,
            max_steps=step.num_scheduler_steps,
            max_guesses=config.speculate,
        )
        self.requests: dict[int, list[Sequence]] = {}  # those that have not ended
        self.ids = itertools.count()
        self.in_flight: list[CallInFlight] = []  # the calls of the newest step
        self.computed_tokens = 0  # of prompts, not found in the cache
        self.prompt_tokens = 0  # of the prompts that are done
        self.generation_tokens = 0
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.calls: Counter[tuple[int, int]] = Counter()
        """How many steps were taken in each shape (rows, new tokens in each), since start-up."""
        self.programs_at_start = self.programs()

    def add(self, prompt: Prompt, params: SamplingParams = DEFAULT_PARAMS) -> int:
        """Queue a request and return its id.

        Raises UserError, whose `param` names the field, if it can never be served as it is."""
        token_ids = self._token_ids(prompt)
        stop_ids = self._stop_ids(params)
        self._check(token_ids, params, stop_ids)
        bad_words = self._bad_words(params)
        self._require_some_token(params, stop_ids, bad_words)
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(63))
        matcher = matcher_for(params.structured, self.tokenizer)
        request_id = next(self.ids)
        seqs = self.scheduler.add(token_ids, params, request_id)
        for seq in seqs:
            seq.stop_ids = stop_ids
            seq.bad_words = bad_words
            seq.matcher = matcher and matcher.fork()
            if self.config.speculate > 0 and matcher is None:
                seq.speculation = Speculation()
            if self.tokenizer is not None:
                seq.text_stream = TextStream(self.tokenizer, params)
            for follower in seq.followers:
                follower.prompt_logprobs = seq.prompt_logprobs  # sees what its leader fills in
        self.requests[request_id] = seqs
        return request_id

    @property
    def busy(self) -> bool:
        """Whether there is something to do for `step`."""
        return bool(self.requests or self.in_flight)

    def step(self) -> list[Output]:
        """Start a step and, while it runs, take in the one before.

        Its samples, and the pages that leave the device, are the one thing that is waited for."""
        started = self._launch(self.scheduler.schedule())
        assert started or self.in_flight or not self.requests, (
            f"none of {len(self.requests)} requests can go on"
        )
        landed = self.in_flight
        self.in_flight = started
        return self._collect(landed)

    def cancel(self, request_id: int) -> None:
        """End a request without further outputs; one that has ended already is left as it is."""
        for seq in self.requests.pop(request_id, []):
            if not seq.finished:
                self._finish(seq)

    def generate(
        self,
        prompts: AnySequence[Prompt],
        params: SamplingParams | list[SamplingParams] = DEFAULT_PARAMS,
        *,
        progress: bool = True,
    ) -> list[list[Output]]:
        """Return the n samples of each prompt, whole. The engine must not be busy.

        prompts: texts and token ids, also mixed. params: one for all prompts, or a list with one
        for each. Raises UserError, with nothing queued, if one of them can never be served."""
        assert not self.busy, (
            f"{len(self.requests)} requests were added that `step` has not finished"
        )
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        ids = self._add_all(prompts, params)
        samples = sum(p.n for p in params)
        whole: dict[SampleKey, Output] = {}
        with tqdm(total=samples, unit="sample", disable=not progress) as bar:
            while self.busy:
                for output in self.step():
                    key = SampleKey(output.request_id, output.index)
                    first = whole.setdefault(key, output)
                    if first is not output:
                        first.absorb(output)
                    bar.update(output.finish_reason is not None)
        return [
            [whole[SampleKey(request_id, index)] for index in range(p.n)]
            for request_id, p in zip(ids, params, strict=True)
        ]

    def stats(self) -> Stats:
        """Return what goes on, for monitoring."""
        page_size = self.config.page_size
        held = self.blocks.num_pages - 1 - self.blocks.num_free
        empty_places = sum(
            len(self.blocks.tables[seq.key]) * page_size - seq.num_computed
            for seq in self.scheduler.running
        )
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages=self.blocks.num_pages - 1,
            pages_held=held,
            tokens_held=held * page_size - empty_places,
            queried_tokens=self.blocks.queried_tokens,
            hit_tokens=self.blocks.hit_tokens,
            preemptions=self.scheduler.preemptions,
            computed_tokens=self.computed_tokens,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            num_drafts=self.num_drafts,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
        )

    def snapshot(self) -> list[tuple[list[SampleKey], bool]]:
        """Return, for each page, which samples hold it and whether it is in the prefix cache."""
        holders: list[list[Any]] = [[] for _ in range(self.blocks.num_pages)]
        for key, table in self.blocks.tables.items():
            for page in table:
                holders[page].append(key)
        return [(keys, page in self.blocks.cached) for page, keys in enumerate(holders)]

    def programs(self) -> int:
        """Return how many programs are compiled, for all engines of this process.

        An engine that runs adds none: see programs_at_start."""
        return compiled_programs()

    def _token_ids(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise UserError(
                "prompt is text, and this engine has no tokenizer: give it one, or token ids",
                param="prompt",
            )
        return self.tokenizer.encode_prompt(prompt)

    def _stop_ids(self, params: SamplingParams) -> set[int]:
        """Return the tokens that end a sample."""
        stop_ids = set(params.stop_token_ids)
        if self.tokenizer is not None and not params.ignore_eos:
            stop_ids |= self.tokenizer.stop_ids
        return stop_ids

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Return the tokens of each bad word. Raises UserError if they do not fit."""
        if not params.bad_words:
            return []
        if self.tokenizer is None:
            raise UserError("bad_words need an engine with a tokenizer", param="bad_words")
        spellings = spell(params.bad_words, self.tokenizer)
        tokens = sum(map(len, spellings))
        require(
            tokens <= MAX_BAD_TOKENS,
            f"bad_words have {tokens} tokens in their {len(spellings)} spellings, and "
            f"{MAX_BAD_TOKENS} fit: give fewer",
            param="bad_words",
        )
        return spellings

    def _require_some_token(
        self, params: SamplingParams, stop_ids: set[int], bad_words: list[list[int]]
    ) -> None:
        """Raise UserError unless some token has a probability, whatever was generated before."""
        always = stop_ids if params.min_tokens else set()
        allowed = None if params.allowed_token_ids is None else set(params.allowed_token_ids)
        num_allowed = self.model_config.vocab_size if allowed is None else len(allowed)
        num_banned = most_banned(always, bad_words, allowed)
        require(
            num_banned < num_allowed,
            f"of {num_allowed} tokens that are allowed, bad_words and min_tokens may ban "
            f"{num_banned} at once: allow more, or ban fewer",
            param="bad_words" if allowed is None else "allowed_token_ids",
        )

    def _check(self, prompt: list[int], params: SamplingParams, stop_ids: set[int]) -> None:
        """Raise UserError unless such a request can be served."""
        require(
            len(prompt) > 0,
            "the prompt is empty: give it at least 1 token, for example the end-of-text token",
            param="prompt",
        )
        self._check_tokens(prompt, "prompt")
        self._check_tokens(params.logit_bias, "logit_bias")
        self._check_tokens(params.stop_token_ids, "stop_token_ids")
        self._check_tokens(params.allowed_token_ids or (), "allowed_token_ids")
        require_context(len(prompt), params.max_tokens, self.model_config.block_size)
        require(
            self.tokenizer is not None or not params.stop,
            "stop strings need an engine with a tokenizer",
            param="stop",
        )
        biases = len(params.logit_bias) + len(stop_ids)
        require(
            biases <= MAX_BIASES,
            f"logit_bias and stop tokens have {biases} entries, and {MAX_BIASES} fit",
            param="logit_bias",
        )

    def _check_tokens(self, ids: Collection[int], name: str) -> None:
        """Raise UserError, about the field with this name, unless the vocabulary has all ids."""
        last = self.model_config.vocab_size - 1
        extremes = (min(ids, default=0), max(ids, default=0))  # ids may be many
        wrong = next((token for token in extremes if not 0 <= token <= last), None)
        require(
            wrong is None,
            f"{name} has token {wrong}, and the vocabulary ends at {last}",
            param=name,
        )

    def _add_all(self, prompts: AnySequence[Prompt], params: list[SamplingParams]) -> list[int]:
        """Queue a request for each prompt or, if one is refused, none. Return their ids."""
        require(
            not isinstance(prompts, str),
            "prompts is one text: give a list of prompts, each of them text or token ids",
            param="prompt",
        )
        require(
            len(params) == len(prompts),
            f"{len(prompts)} prompts and {len(params)} SamplingParams: give one or one for each",
        )
        ids: list[int] = []
        try:
            for prompt, p in zip(prompts, params, strict=True):
                ids.append(self.add(prompt, p))
        except ValueError:
            for request_id in ids:
                self.cancel(request_id)
            raise
        return ids

    def _launch(self, plan: Plan) -> list[CallInFlight]:
        """Start what the plan says, and return without waiting for it."""
        self.runner.settle()
        self.runner.move_pages(plan)
        for seq in plan.admitted:
            self.runner.drop_swapped(seq.key)  # what it needs of them is back
            self.runner.fill_slot(seq)
            if seq.admitted_at is None:
                seq.admitted_at = time.perf_counter()
        sampled = [sample.seq for sample in plan.samples] + [row.seq for row in plan.decodes]
        self.runner.slots = write_masks(self.runner.slots, sampled, self.runner.padding_slot)
        started = []
        if plan.tiles:
            started.append(self.runner.prefill(plan.tiles, self._tables(plan.tiles), plan.samples))
            self.computed_tokens += sum(tile.length for tile in plan.tiles)
        if plan.decodes:
            started.append(self.runner.decode(plan.decodes, self._tables(plan.decodes)))
            guesses = [row.seq.key for row in plan.decodes if row.guess is not None]
            self.num_drafts += len(set(guesses))
            self.num_draft_tokens += len(guesses)
        for call in started:
            self.calls[call.shape] += call.num_steps
        return started

    def _tables(self, rows: list[Row]) -> list[list[int]]:
        """Return the page table of each row."""
        return [self.blocks.tables[row.seq.key] for row in rows]

    def _collect(self, calls: list[CallInFlight]) -> list[Output]:
        """Wait for the results of calls and make outputs of them."""
        outputs = []
        for call, sampled in zip(calls, self.runner.fetch(calls), strict=True):
            if sampled.prompt_scores is not None:
                self._record_prompt_logprobs(call.rows, sampled.prompt_scores)
            outputs += self._outputs(call, sampled)
        return outputs

    def _record_prompt_logprobs(self, tiles: list[Row], scores: Scores) -> None:
        """Append what tiles say of prompts whose logprobs were asked for. scores: (R, T, ...)."""
        for i, (seq, start, length, _) in enumerate(tiles):
            count = seq.params.prompt_logprobs
            if count is None:
                continue
            # What follows the prompt's last token is not part of it.
            following = seq.prompt[start + 1 : start + length + 1]
            seq.prompt_logprobs += [
                self._logprobs(token, scores, (i, t), count) for t, token in enumerate(following)
            ]

    def _outputs(self, call: CallInFlight, sampled: Sampled) -> list[Output]:
        """Return the outputs of those that were sampled and still want tokens."""
        outputs = []
        for step in range(call.num_steps):
            for i, sample in enumerate(call.samples):
                seq = sample.seq
                # It may have ended while the call was in flight, or with an earlier step.
                if seq.finished or step >= call.steps_of(sample):
                    continue
                row = call.rows[sample.row]
                if not reads_what_is_there(row):
                    continue
                self.num_accepted_tokens += row.guess is not None
                token = int(sampled.token[step, i])
                logprobs = None
                if seq.params.logprobs is not None:
                    logprobs = self._logprobs(token, sampled.scores, (step, i), seq.params.logprobs)
                outputs.append(self._output(seq, token, logprobs))
        return outputs

    def _logprobs(self, token: int, scores: Scores, index: tuple[int, ...], count: int) -> Logprobs:
        """Return the logprobs of a token and of the `count` likeliest, at an index of scores."""
        assert scores.rank is not None, "the step was not asked for ranks"
        logprob = float(scores.logprob[index])
        rank = int(scores.rank[index])
        if count == 0:
            return Logprobs(token, logprob, rank, {})
        assert scores.top_tokens is not None and scores.top_logprobs is not None
        top_tokens = scores.top_tokens[index].tolist()[:count]
        top_logprobs = scores.top_logprobs[index].tolist()[:count]
        # A vocabulary of fewer tokens than alternatives: the rest are its padding.
        vocab_size = self.model_config.vocab_size
        pairs = zip(top_tokens, top_logprobs, strict=True)
        return Logprobs(token, logprob, rank, {t: p for t, p in pairs if t < vocab_size})

    def _output(self, seq: Sequence, token: int, logprobs: Logprobs | None) -> Output:
        """Take in a new token of seq and return what it brings."""
        output = empty_output(seq)
        if seq.first_token_at is None:
            seq.first_token_at = time.perf_counter()
            if seq.key.sample == 0:
                self.prompt_tokens += seq.prompt_len
            add_prompt(output, seq)
        if seq.params.max_tokens > 0:
            add_token(output, seq, token, logprobs)
            self.generation_tokens += 1
            if self.runner.same_bits_in_any_shape:
                self.scheduler.cache_generated(seq)
        output.text += seq.take_text()
        output.finish_reason = seq.finish_reason
        output.stop_reason = seq.stop_reason
        if output.finish_reason is not None:
            seq.finished_at = time.perf_counter()
            output.times = seq.times()
            self._finish(seq)
        return output

    def _finish(self, seq: Sequence) -> None:
        """End a sample, and its request if it is the last of it."""
        self.scheduler.finish(seq)
        self.runner.drop_swapped(seq.key)
        request_id = seq.key.request_id
        if all(sample.finished for sample in self.requests.get(request_id, [])):
            self.requests.pop(request_id, None)


def empty_output(seq: Sequence) -> Output:
    """Return an output of seq that brings nothing."""
    return Output(
        request_id=seq.key.request_id,
        index=seq.key.sample,
        token_ids=[],
        text="",
        logprobs=None if seq.params.logprobs is None else [],
    )


def add_prompt(output: Output, seq: Sequence) -> None:
    """Add to a sample's first output what was asked for of the prompt."""
    if seq.params.prompt_logprobs is not None:
        output.prompt_logprobs = seq.prompt_logprobs
    if seq.params.echo and seq.text_stream is not None:
        output.text += seq.text_stream.echo(seq.prompt)


def add_token(output: Output, seq: Sequence, token: int, logprobs: Logprobs | None) -> None:
    """Record a new token, in the sequence and in its output."""
    seq.tokens.append(token)
    if seq.matcher is not None:
        seq.matcher.advance(token)
    output.token_ids.append(token)
    if output.logprobs is not None:
        assert logprobs is not None, f"{seq.key} asked for logprobs and got none"
        output.logprobs.append(logprobs)
