"""What Prometheus reads at /metrics, under vLLM's names, so that dashboards made for it work.

Metrics is told what happens, as plain numbers; EngineCollector looks at what the engine counts
itself, each time somebody reads /metrics, so that nothing is counted twice.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine import Stats

PREFIX = "vllm:"


class HistogramSpec(NamedTuple):
    """One histogram: its name without the prefix, what it measures, its buckets in seconds."""

    name: str
    help: str
    buckets: tuple[float, ...]


TIME_TO_FIRST_TOKEN = HistogramSpec(
    "time_to_first_token_seconds",
    "from the request's arrival",
    # fmt: off
    (
        0.001,
        0.005,
        0.01,
        0.02,
        0.04,
        0.06,
        0.08,
        0.1,
        0.25,
        0.5,
        0.75,
        1,
        2.5,
        5,
        7.5,
        10,
        20,
        40,
        80,
        160,
    ),
    # fmt: on
)
INTER_TOKEN_LATENCY = HistogramSpec(
    "inter_token_latency_seconds",
    "between the tokens of a sample",
    # fmt: off
    (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10),
    # fmt: on
)
REQUEST_LATENCY = HistogramSpec(
    "e2e_request_latency_seconds",
    "of a sample, from the request's arrival to its end",
    # fmt: off
    (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480),
    # fmt: on
)


class Metrics:
    """The histograms and the counter that the server keeps. Lives on the event loop."""

    def __init__(self, model_name: str) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.labels = {"model_name": model_name}
        self.time_to_first_token = self._histogram(TIME_TO_FIRST_TOKEN)
        self.inter_token_latency = self._histogram(INTER_TOKEN_LATENCY)
        self.request_latency = self._histogram(REQUEST_LATENCY)
        self.ended = prometheus_client.Counter(
            f"{PREFIX}request_success",
            "samples that have ended",
            [*self.labels, "finished_reason"],
            registry=self.registry,
        )

    def observe_first_token(self, seconds: float) -> None:
        """Count a sample's first token, so many seconds after its request arrived."""
        self.time_to_first_token.observe(seconds)

    def observe_next_token(self, seconds: float) -> None:
        """Count a later token, so many seconds after the one before it."""
        self.inter_token_latency.observe(seconds)

    def observe_end(self, reason: str, seconds: float) -> None:
        """Count a sample that came to its end, so many seconds after its request arrived."""
        self.request_latency.observe(seconds)
        self.count_ended(reason)

    def count_ended(self, reason: str) -> None:
        """Count a sample that has ended: "stop", "length", or "abort" if its client left."""
        self.ended.labels(**self.labels, finished_reason=reason).inc()

    def text(self) -> bytes:
        """Return what /metrics answers."""
        return prometheus_client.generate_latest(self.registry)

    def _histogram(self, spec: HistogramSpec) -> prometheus_client.Histogram:
        histogram = prometheus_client.Histogram(
            PREFIX + spec.name,
            spec.help,
            list(self.labels),
            buckets=spec.buckets,
            registry=self.registry,
        )
        return histogram.labels(**self.labels)


class EngineCollector(Collector):
    """Reads the engine's own counts whenever Prometheus asks."""

    def __init__(
        self, read_stats: Callable[[], tuple[Stats, int] | None], labels: dict[str, str]
    ) -> None:
        """read_stats returns the engine's statistics and how many prompts it has not taken yet, or
        None while there is no engine."""
        self.read_stats = read_stats
        self.labels = labels

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
        yield self._counter(
            "prefix_cache_queries",
            "prompt tokens looked up in the prefix cache",
            stats.queried_tokens,
        )
        yield self._counter("prefix_cache_hits", "prompt tokens found there", stats.hit_tokens)
        yield self._counter("num_preemptions", "sequences moved to host memory", stats.preemptions)
        yield self._counter("prompt_tokens", "prompt tokens computed", stats.prompt_tokens)
        yield self._counter("generation_tokens", "tokens generated", stats.generation_tokens)

    def _gauge(self, name: str, help_text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, help_text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, help_text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family
