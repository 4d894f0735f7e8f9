"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from engine import Stats
from sequence import Output

if TYPE_CHECKING:
    from serving.worker import Job


class Metrics:
    """What Prometheus reads at /metrics, under vLLM's names, so that dashboards made for it work."""

    def __init__(self, model_name: str):
        self.registry, self.labels = (
            prometheus_client.CollectorRegistry(),
            {"model_name": model_name},
        )
        self.stats: Callable[[], tuple[Stats, int] | None] = lambda: None
        self.registry.register(self)

        def histogram(name: str, text: str, *buckets: float) -> prometheus_client.Histogram:
            return prometheus_client.Histogram(
                f"vllm:{name}", text, list(self.labels), buckets=buckets, registry=self.registry
            ).labels(**self.labels)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds",
            "from the request's arrival",
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
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds",
            "between the tokens of a sample",
            0.005,
            0.01,
            0.025,
            0.05,
            0.075,
            0.1,
            0.15,
            0.2,
            0.3,
            0.4,
            0.5,
            0.75,
            1,
            2.5,
            5,
            10,
        )
        self.e2e_latency = histogram(
            "e2e_request_latency_seconds",
            "of a sample, from the request's arrival to its end",
            0.1,
            0.3,
            0.5,
            0.8,
            1,
            1.5,
            2,
            2.5,
            5,
            10,
            15,
            20,
            30,
            40,
            50,
            60,
            120,
            240,
            480,
        )
        self.success = prometheus_client.Counter(
            "vllm:request_success",
            "samples that have ended",
            [*self.labels, "finished_reason"],
            registry=self.registry,
        )

    def observe(self, job: Job, prompt: int, out: Output, now: float) -> None:
        key = prompt, out.index
        if key in job.last_token:
            self.inter_token_latency.observe(now - job.last_token[key])
        else:
            self.time_to_first_token.observe(now - job.submitted)
        job.last_token[key] = now
        if out.finish_reason:
            self.e2e_latency.observe(now - job.submitted)
            self.finished(out.finish_reason)

    def finished(self, reason: str) -> None:
        self.success.labels(**self.labels, finished_reason=reason).inc()

    def collect(self) -> list:
        """Prometheus calls it at each reading. What the engine counts itself is not counted twice."""
        if not (now := self.stats()):
            return []
        stats, queued = now
        families = []

        def add(family: type, name: str, text: str, value: float) -> None:
            families.append(family(f"vllm:{name}", text, labels=list(self.labels)))
            families[-1].add_metric(list(self.labels.values()), value)

        add(GaugeMetricFamily, "num_requests_running", "sequences in the batch", stats.running)
        add(
            GaugeMetricFamily,
            "num_requests_waiting",
            "sequences in the queue",
            stats.waiting + queued,
        )
        add(
            GaugeMetricFamily,
            "kv_cache_usage_perc",
            "pages held; 1 is all of them",
            stats.pages_held / stats.pages,
        )
        add(
            CounterMetricFamily,
            "prefix_cache_queries",
            "prompt tokens looked up in the prefix cache",
            stats.queried_tokens,
        )
        add(CounterMetricFamily, "prefix_cache_hits", "prompt tokens found there", stats.hit_tokens)
        add(
            CounterMetricFamily,
            "num_preemptions",
            "sequences moved to host memory",
            stats.preemptions,
        )
        add(CounterMetricFamily, "prompt_tokens", "prompt tokens computed", stats.prompt_tokens)
        add(CounterMetricFamily, "generation_tokens", "tokens generated", stats.generation_tokens)
        return families
