"""What Prometheus reads at /metrics, under vLLM's names, so that dashboards made for it work.

Metrics is told what happens, as plain numbers; EngineCollector looks at what the engine counts
itself, each time somebody reads /metrics, so that nothing is counted twice. What vLLM calls a
request is a sample here: a prompt with n=3 is three of them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from config import EngineConfig
from engine import Stats
from sequence import Times

PREFIX = "vllm:"

# Upper ends of buckets, in seconds.
# fmt: off
BETWEEN_TOKENS = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10,
)
UNTIL_A_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160,
)
UNTIL_THE_END = (
    0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480,
)
# fmt: on


class HistogramSpec(NamedTuple):
    """One histogram."""

    name: str
    """As vLLM has it, without the prefix."""
    help: str
    buckets: tuple[float, ...] | None
    """Their upper ends; None: numbers of tokens, up to the model's context."""


OF_TOKENS = (
    HistogramSpec("time_to_first_token_seconds", "from the request's arrival", UNTIL_A_TOKEN),
    HistogramSpec("inter_token_latency_seconds", "between tokens of a sample", BETWEEN_TOKENS),
)
OF_SAMPLES = (
    HistogramSpec("e2e_request_latency_seconds", "from arrival to end", UNTIL_THE_END),
    HistogramSpec("request_queue_time_seconds", "from arrival to the first step", UNTIL_A_TOKEN),
    HistogramSpec("request_prefill_time_seconds", "first step to first token", UNTIL_A_TOKEN),
    HistogramSpec("request_decode_time_seconds", "first token to last", UNTIL_THE_END),
    HistogramSpec("request_inference_time_seconds", "first step to last token", UNTIL_THE_END),
    HistogramSpec(
        "request_time_per_output_token_seconds",
        "decode time by the tokens after the first",
        BETWEEN_TOKENS,
    ),
    HistogramSpec("request_prompt_tokens", "of the sample's prompt", None),
    HistogramSpec("request_generation_tokens", "new tokens", None),
    HistogramSpec("request_params_max_tokens", "new tokens that were allowed", None),
)
OF_PROMPTS = (
    HistogramSpec("request_params_n", "samples of a prompt", (1, 2, 5, 10, 20)),
    HistogramSpec("request_max_num_generation_tokens", "of a prompt's longest sample", None),
)
OF_STEPS = (
    HistogramSpec(
        "iteration_tokens_total",
        "prompt tokens and new tokens of a step",
        tuple(2**power for power in range(15)),
    ),
)
HISTOGRAMS = (*OF_TOKENS, *OF_SAMPLES, *OF_PROMPTS, *OF_STEPS)


class SampleEnd(NamedTuple):
    """What is known of a sample that has come to its end."""

    finish_reason: str
    """Either "stop" or "length"."""
    arrived: float
    """When its request did, like `now` and `times` in seconds of time.perf_counter()."""
    now: float
    times: Times
    prompt_tokens: int
    new_tokens: int
    max_tokens: int
    """How many it was allowed."""


class Metrics:
    """The histograms and the counter that the server keeps. Lives on the event loop."""

    def __init__(self, model_name: str, max_model_len: int) -> None:
        """max_model_len: tokens of the model's context."""
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)  # CPU, memory, start
        self.labels = {"model_name": model_name}
        self.token_buckets = buckets_of_tokens(max_model_len)
        self.histograms = {spec.name: self._histogram(spec) for spec in HISTOGRAMS}
        self.ended = prometheus_client.Counter(
            f"{PREFIX}request_success",
            "samples that have ended",
            [*self.labels, "finished_reason"],
            registry=self.registry,
        )

    def observe_first_token(self, seconds: float) -> None:
        """Count a sample's first token, so many seconds after its request arrived."""
        self._observe("time_to_first_token_seconds", seconds)

    def observe_next_token(self, seconds: float) -> None:
        """Count a later token, so many seconds after the one before it."""
        self._observe("inter_token_latency_seconds", seconds)

    def observe_sample_end(self, end: SampleEnd) -> None:
        """Count a sample that came to its end."""
        times = end.times
        decode_time = times.finished - times.first_token
        self._observe("e2e_request_latency_seconds", end.now - end.arrived)
        self._observe("request_queue_time_seconds", times.admitted - end.arrived)
        self._observe("request_prefill_time_seconds", times.first_token - times.admitted)
        self._observe("request_decode_time_seconds", decode_time)
        self._observe("request_inference_time_seconds", times.finished - times.admitted)
        if end.new_tokens > 1:
            self._observe(
                "request_time_per_output_token_seconds", decode_time / (end.new_tokens - 1)
            )
        self._observe("request_prompt_tokens", end.prompt_tokens)
        self._observe("request_generation_tokens", end.new_tokens)
        self._observe("request_params_max_tokens", end.max_tokens)
        self._count_ended(end.finish_reason, samples=1)

    def observe_prompt_end(self, n: int, longest: int) -> None:
        """Count a prompt whose n samples have ended; the longest has so many new tokens."""
        self._observe("request_params_n", n)
        self._observe("request_max_num_generation_tokens", longest)

    def observe_step(self, tokens: int) -> None:
        """Count a step of the engine that computed so many prompt tokens and brought new ones."""
        self._observe("iteration_tokens_total", tokens)

    def count_aborted(self, samples: int) -> None:
        """Count samples that were broken off, because their client left or the server ends."""
        self._count_ended("abort", samples)

    def text(self) -> bytes:
        """Return what /metrics answers."""
        return prometheus_client.generate_latest(self.registry)

    def _count_ended(self, reason: str, samples: int) -> None:
        self.ended.labels(**self.labels, finished_reason=reason).inc(samples)

    def _observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(value)

    def _histogram(self, spec: HistogramSpec) -> prometheus_client.Histogram:
        histogram = prometheus_client.Histogram(
            PREFIX + spec.name,
            spec.help,
            list(self.labels),
            buckets=spec.buckets or self.token_buckets,
            registry=self.registry,
        )
        return histogram.labels(**self.labels)


def buckets_of_tokens(most: int) -> tuple[float, ...]:
    """Return 1, 2, 5, 10, 20, 50, ... up to `most`."""
    buckets = []
    power = 1
    while power <= most:
        buckets += [power, 2 * power, 5 * power]
        power *= 10
    return tuple(bucket for bucket in buckets if bucket <= most)


class EngineCollector(Collector):
    """Reads the engine's own counts whenever Prometheus asks."""

    def __init__(
        self,
        read_stats: Callable[[], tuple[Stats, int] | None],
        labels: dict[str, str],
        config: EngineConfig,
    ) -> None:
        """read_stats returns the engine's statistics and how many prompts it has not taken yet, or
        None while there is no engine."""
        self.read_stats = read_stats
        self.labels = labels
        self.config = config

    def collect(self) -> Iterator[Metric]:
        """Yield the counts as of now; none while the engine warms up."""
        stats_and_queued = self.read_stats()
        if stats_and_queued is None:
            return
        stats, queued = stats_and_queued
        waiting = stats.waiting + queued
        usage = stats.pages_held / stats.pages
        yield self._gauge("num_requests_running", "sequences in the batch", stats.running)
        yield self._gauge("num_requests_waiting", "sequences in the queue", waiting)
        yield self._gauge("kv_cache_usage_perc", "pages held; 1 is all of them", usage)
        yield self._cache_config(stats)
        yield self._counter(
            "prefix_cache_queries",
            "prompt tokens looked up in the prefix cache",
            stats.queried_tokens,
        )
        yield self._counter("prefix_cache_hits", "prompt tokens found there", stats.hit_tokens)
        yield self._counter("num_preemptions", "sequences moved to host memory", stats.preemptions)
        yield self._counter(
            "prompt_tokens", "tokens of the prompts that are done", stats.prompt_tokens
        )
        yield self._counter("generation_tokens", "tokens generated", stats.generation_tokens)
        yield self._counter("spec_decode_num_drafts", "times a sequence guessed", stats.num_drafts)
        yield self._counter(
            "spec_decode_num_draft_tokens", "tokens guessed", stats.num_draft_tokens
        )
        yield self._counter(
            "spec_decode_num_accepted_tokens",
            "tokens guessed that were right",
            stats.num_accepted_tokens,
        )

    def _cache_config(self, stats: Stats) -> Metric:
        """Return how the KV cache is laid out, as labels of a gauge that is always 1."""
        layout = {
            "block_size": str(self.config.page_size),
            "num_gpu_blocks": str(stats.pages),
            "cache_dtype": self.config.kv_dtype or "auto",
            "enable_prefix_caching": "True",
        }
        return self._gauge("cache_config_info", "layout of the KV cache", 1, layout)

    def _gauge(
        self, name: str, help_text: str, value: float, more_labels: dict[str, str] | None = None
    ) -> Metric:
        labels = self.labels | (more_labels or {})
        family = GaugeMetricFamily(PREFIX + name, help_text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, help_text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family
