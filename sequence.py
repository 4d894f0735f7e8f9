"""One sample of a request in the engine's books: its parameters, its state and its outputs.

Plain Python, no arrays, no JAX. Read SamplingParams for what a request may ask for, Sequence for
what is known of one sample while it is made, and Output for what leaves the engine.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Literal, NamedTuple

from errors import ContextLengthExceeded, require
from speculation.drafts import Speculation
from structured.outputs import StructuredOutput
from tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from structured.grammar import Matcher

INFINITY = float("inf")

MAX_LOGPROBS = 20
"""Alternatives that can be reported per token: the width of an array that each step computes."""

MAX_BIASES = 512
"""Entries of one request's logit_bias, plus the tokens that min_tokens bans: a column each."""

MAX_BAD_TOKENS = 512
"""Tokens that the spellings of one request's bad_words have in all: a column each."""

LARGEST_LOGIT_CHANGE = 1e4
"""Largest bias, penalty and temperature: far beyond any logit, and far from overflow in float32."""

FinishReason = Literal["stop", "length"]
StopReason = str | int | None  # a stop string, or one of stop_token_ids

CLOSED_RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (0, INFINITY),
    "n": (1, INFINITY),
    "min_p": (0, 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "top_k": (1, INFINITY),
    "frequency_penalty": (-LARGEST_LOGIT_CHANGE, LARGEST_LOGIT_CHANGE),
    "presence_penalty": (-LARGEST_LOGIT_CHANGE, LARGEST_LOGIT_CHANGE),
    "temperature": (0, LARGEST_LOGIT_CHANGE),
    "seed": (-(2**63), 2**63 - 1),
}
"""Smallest and largest allowed value of fields of SamplingParams; None is not checked."""


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    The distribution that a token is drawn from is made of the model's logits in this order:
    logit_bias and min_tokens; repetition, frequency and presence penalty; allowed_token_ids and
    bad_words; temperature; top_k; top_p; min_p. Each works on what the one before it left. Reported
    logprobs are the model's own: the log softmax of its logits before any of these.

    The device computes in float32. A value that float32 cannot hold acts as its limit does: a
    temperature below 1e-20 as 0, a top_p that would be 0 as the likeliest token alone."""

    max_tokens: int = 16
    """The largest number of new tokens; 0 only together with prompt_logprobs or echo."""
    min_tokens: int = 0
    """Until there are so many new tokens, the end-of-text token and stop_token_ids have probability
    0, and a stop string that is complete is ordinary text."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keeps the k largest logits (Fan et al. 2018), and those that equal the smallest of them; so
    do top_p and min_p. None keeps all."""
    top_p: float = 1.0
    """Keeps the smallest set of likeliest tokens whose probability is at least p (nucleus sampling,
    Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keeps tokens at least min_p times as probable as the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that are in the prompt or
    were generated (CTRL, Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Is subtracted from a token's logit each time it is generated (OpenAI API reference)."""
    presence_penalty: float = 0.0
    """Is subtracted once from the logit of each token that was generated (OpenAI API reference)."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Is added to the logits, by token id (OpenAI API reference)."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that may come; None allows all."""
    bad_words: tuple[str, ...] = ()
    """Texts that are not generated: the tokens that spell one, with or without a space before it,
    do not come one after the other. Other ways to spell it are not looked for."""
    seed: int | None = None
    """The token at a position is a function of the seed, the sample's index, the position and the
    distribution. None draws a seed."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample, and are cut off."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a sample; they are in its token_ids, not in its text."""
    include_stop_str_in_output: bool = False
    """Whether the text has what ended it: the stop string, or the token's text."""
    skip_special_tokens: bool = True
    """Whether the text leaves out the tokenizer's special tokens."""
    ignore_eos: bool = False
    """Whether to go on after the tokenizer's end-of-text token."""
    structured: StructuredOutput | None = None
    """What the text must be: JSON, a regular expression, one of some texts, or a grammar."""
    n: int = 1
    """Samples per prompt."""
    logprobs: int | None = None
    """Number of likeliest tokens reported beside each new token's logprob; None reports nothing."""
    prompt_logprobs: int | None = None
    """Number of likeliest tokens reported beside the logprob of each prompt token but the first;
    None reports nothing."""
    echo: bool = False
    """Whether the text begins with that of the prompt."""

    @property
    def adjusts(self) -> bool:
        """Whether this changes logits before the temperature does."""
        return bool(
            self.logit_bias
            or self.min_tokens
            or self.frequency_penalty
            or self.presence_penalty
            or self.repetition_penalty != 1
        )

    @property
    def bans(self) -> bool:
        """Whether this rules out tokens after certain others."""
        return bool(self.bad_words)

    @property
    def masks(self) -> bool:
        """Whether a bit for each token says which may come: for good, or next."""
        return self.allowed_token_ids is not None or self.structured is not None

    @property
    def restricts(self) -> bool:
        """Whether this leaves out tokens by top_k, top_p or min_p."""
        leaves_out = self.top_k is not None or self.top_p < 1 or self.min_p > 0
        return self.temperature > 0 and leaves_out

    def __post_init__(self) -> None:
        """Raise UserError, with the field's name as param, where a value is out of its range."""
        for name, (low, high) in CLOSED_RANGES.items():
            self._require_range(name, low, high)
        self._require_range("min_tokens", 0, self.max_tokens)
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]", param="top_p")
        require(
            0 < self.repetition_penalty <= LARGEST_LOGIT_CHANGE,
            f"repetition_penalty={self.repetition_penalty} must be in (0, 1e4]",
            param="repetition_penalty",
        )
        require(
            all(abs(bias) <= LARGEST_LOGIT_CHANGE for bias in self.logit_bias.values()),
            "each logit_bias must be from -1e4 to 1e4",
            param="logit_bias",
        )
        self._require_texts("stop")
        self._require_texts("bad_words")
        self._require_one_end()
        require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids is empty: allow at least 1 token",
            param="allowed_token_ids",
        )
        require(
            self.max_tokens > 0 or self.prompt_logprobs is not None or self.echo,
            "max_tokens=0 returns nothing: ask for prompt_logprobs or echo, or for at least 1 "
            "token",
            param="max_tokens",
        )

    def _require_range(self, name: str, low: float, high: float) -> None:
        """Raise UserError unless the field is None or in [low, high]. NaN is in no range."""
        value = getattr(self, name)
        in_range = value is None or low <= value <= high
        require(in_range, f"{name}={value} must be from {low} to {high}", param=name)

    def _require_one_end(self) -> None:
        """Raise UserError if structured output goes with a field that moves its end, or could rule
        out all that it allows."""
        if self.structured is None:
            return
        for name in ("stop_token_ids", "ignore_eos", "bad_words", "allowed_token_ids"):
            require(
                not getattr(self, name),
                f"{name} does not go with structured output, which says itself what may come and "
                f"where it ends: leave out one of them",
                param=name,
            )

    def _require_texts(self, name: str) -> None:
        """Raise UserError unless the field is a sequence of strings, none of them empty."""
        texts = getattr(self, name)
        require(
            not isinstance(texts, str) and all(texts),
            f"{name} must be a sequence of strings, none of them empty",
            param=name,
        )


DEFAULT_PARAMS = SamplingParams()


def require_context(
    prompt_tokens: int,
    max_tokens: int,
    context: int,
    prompt_name: str = "prompt",
    max_tokens_name: str = "max_tokens",
) -> None:
    """Raise ContextLengthExceeded, about the field that is too large, unless it all fits."""
    total = prompt_tokens + max_tokens
    if total <= context:
        return
    leaves_no_room = prompt_tokens + min(1, max_tokens) > context
    raise ContextLengthExceeded(
        context,
        f"{prompt_tokens} tokens of {prompt_name} and {max_tokens_name}={max_tokens} make {total}: "
        "ask for fewer",
        param=prompt_name if leaves_no_room else max_tokens_name,
    )


class Logprobs(NamedTuple):
    """What the model thought of one token."""

    token: int
    logprob: float
    rank: int
    """1 for the likeliest token, 2 for the next, and so on."""
    top: dict[int, float]
    """The likeliest tokens and their logprobs, likeliest first, as many as were asked for."""


class Times(NamedTuple):
    """When things happened to a sample, in seconds of time.perf_counter()."""

    added: float
    admitted: float
    first_token: float
    finished: float


@dataclass
class Output:
    """What one step has brought one sample; Engine.generate returns the sum over all steps."""

    request_id: int
    index: int
    """Number of the sample in its request, 0 to n - 1."""
    token_ids: list[int]
    """The new tokens."""
    text: str
    """What became certain: text is withheld while it could begin a stop string."""
    logprobs: list[Logprobs] | None
    """One for each new token, if they were asked for."""
    prompt_logprobs: list[Logprobs | None] | None = None
    """One for each token of the prompt, if they were asked for; on a sample's first output."""
    finish_reason: FinishReason | None = None
    """Why the sample has ended; on its last output."""
    stop_reason: StopReason = None
    """Which of the request's stop strings or stop_token_ids has ended it; on its last output."""
    times: Times | None = None
    """On a sample's last output."""

    def absorb(self, later: "Output") -> None:
        """Become this output and a later one of the same sample, at the cost of the later one."""
        self.token_ids += later.token_ids
        self.text += later.text
        if self.logprobs is not None:
            assert later.logprobs is not None, "logprobs are reported for some of a sample's tokens"
            self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.times = later.times


class TextStream:
    """The text of one sample, given out as it becomes certain.

    What could still turn out to be the beginning of a stop string is withheld, unless stop strings
    are part of the text."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self.decoder = StreamDecoder(tokenizer, params.skip_special_tokens)
        self.stop_strings = params.stop
        self.includes_stop = params.include_stop_str_in_output
        self.tail = ""  # the end of the text so far, which may begin a stop string
        self.stop_string: str | None = None  # the one that was found

    def echo(self, prompt: list[int]) -> str:
        """Return the text of the prompt's tokens, in which no stop string begins."""
        return self.decoder.push(prompt)

    def push(self, tokens: list[int], last: bool = False, search: bool = True) -> str:
        """Return the text that became certain with these tokens.

        After the last tokens that is all there is, up to the first stop string. Without search,
        stop strings that end with these tokens are ordinary text."""
        new_text = self.decoder.push(tokens)
        if last:
            new_text += self.decoder.finish()
        text = self.tail + new_text
        found = first_stop(text, self.stop_strings, len(self.tail)) if search else None
        if found is not None:
            return self._stop(text, *found)
        given_out = len(self.tail) if self.includes_stop else 0
        doubtful = 0 if last else longest_beginning(text, self.stop_strings)
        self.tail = text[len(text) - doubtful :]
        certain = len(text) if self.includes_stop else len(text) - doubtful
        return text[given_out:certain]

    def _stop(self, text: str, begin: int, stop_string: str) -> str:
        """Note the stop string that begins there, and return what is left to give out."""
        self.stop_string = stop_string
        if self.includes_stop:
            return text[len(self.tail) : begin + len(stop_string)]
        return text[:begin]


def first_stop(text: str, strings: Iterable[str], start: int) -> tuple[int, str] | None:
    """Return where the first of the strings begins that end behind `start`, and that string.

    Of several that begin there it is the shortest. None if there is none."""
    found = []
    for string in strings:
        begin = text.find(string, max(0, start - len(string) + 1))
        if begin >= 0:
            found.append((begin, string))
    return min(found, key=begin_and_length, default=None)


def begin_and_length(occurrence: tuple[int, str]) -> tuple[int, int]:
    """Return by what the occurrences of stop strings are ordered."""
    begin, string = occurrence
    return begin, len(string)


def longest_beginning(text: str, strings: Iterable[str]) -> int:
    """Return how many characters at the end of text may be the beginning of one of the strings."""
    longest = 0
    for string in strings:
        for length in range(longest + 1, len(string)):
            if text.endswith(string[:length]):
                longest = length
    return longest


class State(Enum):
    """Where a sample stands. The scheduler alone moves it from one state to another.

    WAITING, RUNNING, then PREEMPTED and RUNNING again as often as pages run out, then ENDING and
    FINISHED. A stop token, a stop string or a cancelled request ends it from any of them."""

    WAITING = auto()
    """It is in the queue, or its leader is. It holds nothing."""
    RUNNING = auto()
    """It holds a slot; and pages, unless it waits for its leader to compute the prompt."""
    PREEMPTED = auto()
    """It is in the queue again, or its leader is. Its pages are in host memory."""
    ENDING = auto()
    """The step that samples its last token is in flight; its slot and pages are free for others."""
    FINISHED = auto()
    """It needs nothing any more. Tokens of it that are still in flight are ignored."""


class SampleKey(NamedTuple):
    """Names one sample among all that an engine ever makes."""

    request_id: int
    sample: int
    """Its number in the request, 0 to n - 1."""


class Sequence:
    """One sample of a request, in numbers of tokens.

    Samples of a prompt form groups: a leader computes it, then its followers fork: share pages."""

    def __init__(self, key: SampleKey, prompt: list[int], params: SamplingParams):
        self.key = key
        self.params = params
        self.tokens = list(prompt)  # the prompt and the new tokens that have reached the host
        self.prompt_len = len(prompt)
        # The scheduler's part, as it will be once the steps in flight are done, guesses apart.
        self.state = State.WAITING
        self.num_computed = 0  # tokens whose keys and values are in pages
        self.num_sampled = 0  # new tokens; `tokens` lags behind
        self.num_guesses = 0  # in its newest step
        self.slot: int | None = None
        self.followers: list[Sequence] = []  # those that have not forked yet
        # The engine's part: what it needs to make outputs.
        self.stop_ids: set[int] = set()
        self.bad_words: list[list[int]] = []  # the tokens that spell each of them
        self.text_stream: TextStream | None = None
        self.matcher: Matcher | None = None  # of structured output: which tokens may come next
        self.speculation: Speculation | None = None  # what it guesses ahead
        self.prompt_logprobs: list[Logprobs | None] = [None]  # the prompt's first token has none
        self.added_at = time.perf_counter()  # seconds, like the next three
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at: float | None = None

    @property
    def prompt(self) -> list[int]:
        """The prompt's tokens, as a list of its own."""
        return self.tokens[: self.prompt_len]

    @property
    def group(self) -> list["Sequence"]:
        """This sequence and the followers that will fork from it."""
        return [self, *self.followers]

    @property
    def occupied_slot(self) -> int:
        """Its slot."""
        assert self.slot is not None, f"{self.key} has no slot: it is {self.state.name}"
        return self.slot

    @property
    def finished(self) -> bool:
        """Whether it needs nothing any more."""
        return self.state is State.FINISHED

    @property
    def needs_prefill(self) -> bool:
        """Whether tokens of the prompt are left to compute."""
        return self.num_computed < self.prompt_len

    @property
    def awaits_token(self) -> bool:
        """Whether its next mask or guess depends on its token in flight."""
        might_guess = self.speculation is not None and self.speculation.draft(self.tokens, 1)
        depends = self.matcher is not None or self.num_guesses > 0 or bool(might_guess)
        return depends and self.num_sampled > self.num_generated

    @property
    def fully_sampled(self) -> bool:
        """Whether the step that samples its last token was launched.

        One token is sampled even for max_tokens=0, where the prompt alone is of interest."""
        return self.num_sampled >= max(1, self.params.max_tokens)

    @property
    def num_generated(self) -> int:
        """New tokens that have reached the host."""
        return len(self.tokens) - self.prompt_len

    @property
    def ended_by_token(self) -> bool:
        """Whether its newest token is one that ends a sample."""
        return self.num_generated > 0 and self.tokens[-1] in self.stop_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ends with its newest token, judged after take_text; None if it goes on."""
        ended_by_text = self.text_stream is not None and self.text_stream.stop_string is not None
        if self.matcher is not None and (ended_by_text or self.matcher.stuck):
            return "length"  # cut off: the text is not of the form that was asked for
        if self.matcher is not None and self.matcher.ended:
            return "stop"
        if self.ended_by_token or ended_by_text:
            return "stop" if self.matcher is None else "length"
        if self.num_generated >= self.params.max_tokens:
            return "length"
        return None

    @property
    def stop_reason(self) -> StopReason:
        """Which of its stop strings or stop_token_ids ends it, judged after take_text."""
        if self.ended_by_token:
            token = self.tokens[-1]
            return token if token in self.params.stop_token_ids else None
        return None if self.text_stream is None else self.text_stream.stop_string

    def take_text(self) -> str:
        """Decode the newest token and return the text that became certain. Call it once a token.

        A token that ends the sample is part of the text if what stops it is."""
        if self.text_stream is None:
            return ""
        is_text = not self.ended_by_token or self.params.include_stop_str_in_output
        has_text = self.num_generated > 0 and is_text
        return self.text_stream.push(
            self.tokens[-1:] if has_text else [],
            last=self.finish_reason is not None,
            search=self.num_generated >= self.params.min_tokens,
        )

    def times(self) -> Times:
        """Return when things happened to it, once it has finished."""
        assert self.admitted_at is not None, f"{self.key} was never admitted"
        assert self.first_token_at is not None, f"{self.key} never had a token"
        assert self.finished_at is not None, f"{self.key} has not finished"
        return Times(self.added_at, self.admitted_at, self.first_token_at, self.finished_at)
