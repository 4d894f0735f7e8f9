"""One request in the engine's books: how to sample it, where it stands, what it has given out. No arrays, no JAX."""

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

from errors import require
from tokenizer import StreamDecoder, Tokenizer

MAX_LOGPROBS = 20  # alternatives that can be reported per token


MAX_BIASES = 512  # entries of logit_bias, and tokens banned by min_tokens, of one request


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. With l the model's logits, what is sampled from is made in this order:

    logit_bias, min_tokens -> repetition, frequency and presence penalty -> temperature -> top_k -> top_p -> min_p, each on
    what the one before it left. Reported logprobs are log softmax(l): the model's, before any of these."""

    max_tokens: int = 16
    """new tokens at most; 0 only together with prompt_logprobs or echo"""
    min_tokens: int = 0
    """before so many new tokens the end-of-text token and stop_token_ids have l = -inf, and stop strings are not looked for"""
    temperature: float = 1.0
    """l / temperature; 0 takes the likeliest token"""
    top_k: int | None = None
    """keep the k largest l (Fan et al. 2018); equals of the smallest kept are kept, here and below; None keeps all"""
    top_p: float = 1.0
    """keep the smallest set of largest l whose probability is at least p (nucleus, Holtzman et al. 2020)"""
    min_p: float = 0.0
    """keep tokens at least min_p times as probable as the likeliest (Nguyen et al. 2024)"""
    repetition_penalty: float = 1.0
    """of tokens in the prompt or generated: l / penalty where l > 0, l * penalty elsewhere (CTRL, Keskar et al. 2019)"""
    frequency_penalty: float = 0.0
    """l - penalty * (how often the token was generated) (OpenAI API reference)"""
    presence_penalty: float = 0.0
    """l - penalty, if the token was generated (OpenAI API reference)"""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """added to l, by token id (OpenAI API reference)"""
    seed: int | None = None
    """the token at a position is a function of (seed, index of the sample, position, distribution); None draws a seed"""
    stop: tuple[str, ...] = ()
    """text that ends a sample, and is cut off"""
    stop_token_ids: tuple[int, ...] = ()
    """tokens that end a sample; they are in token_ids, not in the text"""
    ignore_eos: bool = False
    """go on after the tokenizer's end-of-text token"""
    n: int = 1
    """samples per prompt"""
    logprobs: int | None = None
    """report the logprob of each new token and of so many likeliest ones"""
    prompt_logprobs: int | None = None
    """the same for the prompt's tokens; its first has none"""
    echo: bool = False
    """outputs begin with the prompt"""

    @property
    def adjusts(self) -> bool:
        """Whether it changes logits before the temperature does."""
        return bool(
            self.logit_bias
            or self.min_tokens
            or self.frequency_penalty
            or self.presence_penalty
            or self.repetition_penalty != 1
        )

    @property
    def keeps(self) -> bool:
        """Whether it leaves out tokens."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1 or self.min_p > 0)

    def __post_init__(self):
        infinity = float("inf")
        for name, low, high in (
            ("max_tokens", 0, infinity),
            ("min_tokens", 0, self.max_tokens),
            ("n", 1, infinity),
            ("min_p", 0, 1),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
            ("top_k", 1, infinity),
            ("frequency_penalty", -1e4, 1e4),
            ("presence_penalty", -1e4, 1e4),
            ("temperature", 0, 1e4),
            ("seed", -(2**63), 2**63 - 1),
        ):
            value = getattr(self, name)
            require(
                value is None or low <= value <= high,
                f"{name}={value} must be from {low} to {high}",
            )
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")
        require(
            0 < self.repetition_penalty <= 1e4,
            f"repetition_penalty={self.repetition_penalty} must be in (0, 1e4]",
        )
        require(
            all(abs(b) <= 1e4 for b in self.logit_bias.values()),
            "each logit_bias must be from -1e4 to 1e4",
        )
        require(
            not isinstance(self.stop, str) and all(self.stop),
            "stop must be a sequence of strings, none of them empty",
        )
        require(
            self.max_tokens > 0 or self.prompt_logprobs is not None or self.echo,
            "max_tokens=0 returns nothing: ask for prompt_logprobs or echo, or for at least 1 token",
        )


class Logprobs(NamedTuple):
    token: int
    logprob: float
    top: dict[int, float]  # the likeliest tokens and their logprobs, as many as were asked for


class Times(NamedTuple):
    """Seconds of time.perf_counter()."""

    added: float
    admitted: float
    first_token: float
    finished: float


@dataclass
class Output:
    """What one step has brought one sample; `generate` returns the sum over all steps."""

    request_id: int
    index: int  # of the sample, 0 to n - 1
    token_ids: list[int]
    text: str  # what became certain: withheld while it could begin a stop string
    logprobs: list[Logprobs] | None  # one per new token
    prompt_logprobs: list[Logprobs | None] | None  # on a sample's first output
    finish_reason: str | None  # "stop" or "length" on the last output
    times: Times | None = None  # on the last output

    def __add__(self, later: "Output") -> "Output":
        return dataclasses.replace(
            later,
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            logprobs=None if self.logprobs is None else self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


class TextStream:
    """The text of one sample, given out as it becomes certain: nothing that could still turn out to begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.decoder, self.stop = StreamDecoder(tokenizer), stop
        self.held = ""
        self.stopped = False

    def push(self, tokens: list[int], last: bool = False, search: bool = True) -> str:
        """What became certain with these tokens; after the last ones that is all, up to the first stop string found."""
        text = self.held + self.decoder.push(tokens) + (self.decoder.finish() if last else "")
        stop = self.stop if search else ()
        found = [at for s in stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        most = (
            0
            if last
            else max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        )
        self.held = text[len(text) - most :]
        return text[: len(text) - most]


class Sequence:
    """One sample of a request, in numbers of tokens: no arrays."""

    def __init__(self, key: tuple[int, int], prompt: list[int], params: SamplingParams):
        self.key, self.params = key, params
        self.tokens, self.prompt_len = list(prompt), len(prompt)
        self.computed = (
            0  # tokens whose keys and values are in pages, once the steps in flight are done
        )
        self.sampled = 0  # new tokens, once the steps in flight are done; `tokens` lags behind
        self.slot: int | None = None
        self.followers: list[
            Sequence
        ] = []  # samples that fork from this one when its prompt is computed
        self.finished = False
        # What the engine needs to make outputs.
        self.stop_ids: set[int] = set()
        self.text: TextStream | None = None
        self.prompt_logprobs: list[Logprobs | None] = []
        self.times: list[float] = []

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_len]

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt_len
