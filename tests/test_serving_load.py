"""Tests of the server under load: clients that leave or stall, full queues, pages, metrics."""

import contextlib
import json
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import soak
from benchmarks.serving import BenchServeConfig, bench_serve, serve_requests
from block_manager import BlockManager
from heavy_requests import Limits
from sequence import SamplingParams, Times
from serving.metrics import Metrics, SampleEnd

pytestmark = pytest.mark.slow

pytest_plugins = ["server_fixtures"]


def read_metrics(server) -> dict[str, float]:
    """What /metrics says, by name and labels."""
    return samples_in(server.get("/metrics").text)


def samples_in(text: str) -> dict[str, float]:
    """The values in a text in Prometheus' format, by name and labels."""
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def metric(name: str, labels: str = "") -> str:
    """The name of a metric as it stands in /metrics."""
    return f'vllm:{name}{{{labels}model_name="tiny"}}'


class Growth:
    """How much each metric grows from when this is made."""

    def __init__(self, server) -> None:
        """The requests of other tests, which share the server, have ended and are counted first:
        the answer to another request comes only after that."""
        server.until(lambda: is_empty(server), "idle")
        server.complete(prompt="a", max_tokens=1)
        self.server = server
        self.before = read_metrics(server)
        self.after = self.before

    def look(self) -> None:
        """Take what /metrics says now."""
        self.after = read_metrics(self.server)

    def of(self, name: str, labels: str = "") -> float:
        """The growth of one metric."""
        key = metric(name, labels)
        return self.after[key] - self.before.get(key, 0)


def test_metrics(server):
    """Catches: a count that misses requests or counts them twice, a prompt whose tokens do not
    count because they were in the cache, lengths and limits taken for each other."""
    growth = Growth(server)
    server.complete(prompt="0123456789" * 4, max_tokens=5, n=2, echo=True)
    server.complete(prompt="0123456789" * 4, max_tokens=7, stop_token_ids=list(range(97)))
    growth.look()
    assert growth.of("generation_tokens_total") == 11
    assert growth.of("prefix_cache_queries_total") == 80
    assert growth.of("prefix_cache_hits_total") == 32
    assert growth.of("prompt_tokens_total") == 80
    assert growth.of("request_success_total", 'finished_reason="length",') == 2
    assert growth.of("request_success_total", 'finished_reason="stop",') == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert growth.of(f"{name}_count") == 3
    assert growth.of("inter_token_latency_seconds_count") == 8
    assert growth.of("request_prompt_tokens_sum") == 3 * 40
    assert growth.of("request_generation_tokens_sum") == 11
    assert growth.of("request_params_max_tokens_sum") == 5 + 5 + 7
    assert growth.of("request_params_n_sum") == 2 + 1
    assert growth.of("request_params_n_count") == 2
    assert growth.of("request_max_num_generation_tokens_sum") == 5 + 1
    assert growth.of("request_time_per_output_token_seconds_count") == 2
    assert growth.of("iteration_tokens_total_sum") == 80 - 32 + 11
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert growth.after[metric(gauge)] == 0
    assert metric("num_preemptions_total") in growth.after


def test_times_in_metrics():
    """Catches: a wait that is told as work, times of another phase, a wait for the engine that
    counts from when the engine took the request up."""
    metrics = Metrics("tiny", max_model_len=128)
    times = Times(added=12.0, admitted=13.0, first_token=17.0, finished=25.0)
    metrics.observe_sample_end(
        SampleEnd("stop", 10.0, 26.0, times, prompt_tokens=30, new_tokens=5, max_tokens=16)
    )
    samples = samples_in(metrics.text().decode())
    sums = {
        "request_queue_time_seconds": 3,
        "request_prefill_time_seconds": 4,
        "request_decode_time_seconds": 8,
        "request_inference_time_seconds": 12,
        "e2e_request_latency_seconds": 16,
        "request_time_per_output_token_seconds": 2,
        "request_prompt_tokens": 30,
        "request_generation_tokens": 5,
        "request_params_max_tokens": 16,
    }
    assert {name: samples[metric(f"{name}_sum")] for name in sums} == sums
    assert samples[metric("request_prompt_tokens_bucket", 'le="20.0",')] == 0
    assert samples[metric("request_prompt_tokens_bucket", 'le="50.0",')] == 1


def test_waiting_counts_as_queue_time(server):
    """Catches: times that begin when the request has reached the engine."""
    seconds = 0.1
    growth = Growth(server)
    with server.standing():
        client = server.connection({"prompt": "ab", "max_tokens": 3})
        server.until(lambda: server.worker.open_jobs, "arrived")
        threading.Event().wait(seconds)
    assert client.recv(1 << 16)
    client.close()
    server.until(lambda: not server.worker.open_jobs, "ended")
    growth.look()
    queue = growth.of("request_queue_time_seconds_sum")
    inference = growth.of("request_inference_time_seconds_sum")
    assert queue >= seconds
    assert queue + inference <= growth.of("e2e_request_latency_seconds_sum")


def test_metrics_under_load(server):
    """Catches: what waits told as running or not at all, clients that left counted once for all
    their samples or as if they had stayed, pages that nobody holds in the usage."""
    growth = Growth(server)
    server.step_seconds = 0.02
    worker = server.worker
    stayed = [server.connection({"prompt": "y" * 40, "max_tokens": 60}) for _ in range(4)]
    server.until(lambda: worker.stats.running == 4, "all slots taken")
    leaving = server.connection({"prompt": ["z", "z"], "max_tokens": 60, "n": 3})
    server.until(lambda: worker.stats.waiting, "waiting")
    growth.look()
    assert growth.after[metric("num_requests_running")] == 4
    assert growth.after[metric("num_requests_waiting")] == 2
    pages = growth.after[metric("kv_cache_usage_perc")] * 64
    assert 4 * 5 <= pages + 3 * 5 <= 64  # each has 40 tokens, and they may share 5 pages
    assert pages == pytest.approx(round(pages))
    leaving.close()
    server.until(lambda: len(worker.open_jobs) == 4, "noticed")
    server.step_seconds = 0.0
    for client in stayed:
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        client.close()
    server.until(lambda: is_empty(server), "ended")
    growth.look()
    assert growth.of("request_success_total", 'finished_reason="abort",') == 6
    assert growth.of("request_success_total", 'finished_reason="length",') == 4
    assert growth.of("e2e_request_latency_seconds_count") == 4
    assert growth.of("request_generation_tokens_sum") == 4 * 60


def test_dashboards_find_their_metrics(server):
    """Catches: a metric that docs/serving.md promises and the server lacks, and one that it has
    and nobody can find."""
    text = (soak.ROOT / "docs" / "serving.md").read_text()
    promised = set(re.findall(r"^\| `vllm:([a-z0-9_]+)`", text, re.MULTILINE))
    names = re.findall(r"^# HELP vllm:(\w+)", server.get("/metrics").text, re.MULTILINE)
    assert promised == {name for name in names if not name.endswith("_created")}
    [info] = [name for name in read_metrics(server) if "cache_config_info" in name]
    layout = {'block_size="8"', 'num_gpu_blocks="64"', 'cache_dtype="auto"'}
    assert layout <= set(re.findall(r'\w+="\w+"', info))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
def test_client_that_goes_away_frees_its_pages(server, when, stream):
    """Catches: generation that goes on for nobody, whatever the request was doing when its client
    left."""
    worker = server.worker
    before = worker.stats.generation_tokens
    server.step_seconds = 0.05  # so a request would take more than a second
    others = []
    if when == "queued":  # all slots are taken
        others = [server.connection({"prompt": "x", "max_tokens": 120}) for _ in range(4)]
    with server.standing() if when == "prefill" else contextlib.nullcontext():
        client = server.connection({"prompt": "y" * 100, "max_tokens": 28, "stream": stream})
        server.until(lambda: len(worker.open_jobs) == len(others) + 1, "arrived")
        if when == "decode":
            server.until(lambda: worker.stats.generation_tokens > before, "decoding")
        for connection in (client, *others):
            connection.close()
        server.until(lambda: not worker.open_jobs, "noticed")
    server.step_seconds = 0.0
    server.until(lambda: is_empty(server), "freed")
    generated = worker.stats.generation_tokens - before
    assert generated < 28 * (len(others) + 1), "it was generated to its end for nobody"
    worker.engine.blocks.check()
    assert not worker.jobs
    assert worker.queued == 0


def is_empty(server) -> bool:
    """Nothing is in the engine or on its way to it."""
    return not server.worker.inbox and not server.worker.engine.busy and server.pages_held() == 0


def test_refused_prompt_takes_the_others_with_it(server):
    """Catches: good prompts that are computed for nobody, when another of their request is
    refused."""
    worker = server.worker
    prompts = [[1] * 40, [2] * 40, [10**6]]
    with server.standing():
        response = server.post(prompt=prompts, max_tokens=80, n=3)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"
        assert not worker.engine.requests
        assert not worker.jobs
    assert not worker.open_jobs
    server.until(lambda: is_empty(server) and worker.queued == 0, "empty")


def test_swapped_pages_of_cancelled_requests(offline, monkeypatch):
    """Catches: pages in host memory that stay there for ever, because their request was cancelled
    while it waited for room, or while they were on their way there."""
    blocks = BlockManager(33, offline.config.page_size)
    monkeypatch.setattr(offline, "blocks", blocks)
    monkeypatch.setattr(offline.scheduler, "blocks", blocks)
    params = SamplingParams(max_tokens=80)
    for steps_later in (0, 1):
        ids = [offline.add(letter * 40, params) for letter in "abcd"]
        while not offline.runner.swapped:
            offline.step()
        for _ in range(steps_later):
            offline.step()
        for request_id in ids:
            offline.cancel(request_id)
        while offline.busy:
            offline.step()
        assert not offline.runner.swapped
        assert blocks.num_free == 32
        blocks.check()


def test_pages_are_free_within_one_step(server, monkeypatch):
    """Catches: a cancellation that waits for the end of the request, or for a second step."""
    worker = server.worker
    step = worker.engine.step
    steps = []

    def counted_step():
        steps.append(1)
        return step()

    with server.standing():
        client = server.connection({"prompt": "y" * 100, "max_tokens": 28})
        server.until(lambda: worker.step_began is not None, "in a step")
        client.close()
        server.until(lambda: worker.inbox, "cancelled")
        monkeypatch.setattr(worker.engine, "step", counted_step)
    server.until(lambda: not worker.engine.busy and server.pages_held() == 0, "freed")
    assert len(steps) <= 1


def test_reader_that_stops_reading(server):
    """Catches: a slow reader that stalls the engine or other clients, or whose outputs pile up."""
    body = {"prompt": "z", "max_tokens": 100, "n": 4, "logprobs": 20, "stream": True}
    slow = server.connection(body)
    answer = server.complete(prompt="a", max_tokens=8)
    assert answer["usage"]["completion_tokens"] == 8
    server.until(lambda: server.worker.stats.running == 0, "the slow one's tokens generated")
    is_stalled = any(job.has_outputs for job in server.worker.open_jobs)
    assert is_stalled, "it was not slow enough to keep the server waiting"
    data = b""
    while b"[DONE]" not in data:
        piece = slow.recv(1 << 16)
        assert piece, "the stream broke off"
        data += piece
    slow.close()
    server.until(lambda: not server.worker.open_jobs, "ended")


def test_queue_limit(server):
    """Catches: a queue without end, a 5xx under load, places in the queue that are lost."""

    def one(i: int) -> int:
        response = server.post(prompt="abc", max_tokens=3)
        assert response.status_code != 429 or int(response.headers["Retry-After"]) > 0
        return response.status_code

    admitted = 16 + 4 + 16  # waiting, running, and as many again that could slip in between steps
    with ThreadPoolExecutor(100) as pool:
        with server.standing():
            futures = [pool.submit(one, i) for i in range(100)]
            server.until(lambda: sum(f.done() for f in futures) >= 100 - admitted, "refused")
        codes = [future.result() for future in futures]
    assert set(codes) == {200, 429}
    assert [one(i) for i in range(5)] == [200] * 5
    assert server.worker.queued == 0
    assert server.pages_held() == 0


def test_queue_limit_counts_prompts(server):
    """Catches: a limit that is one off, a request of many prompts that counts as one, or that is
    admitted in part."""
    limit = server.config.max_waiting
    worker = server.worker
    server.until(lambda: worker.queued == 0, "nothing queued")
    with server.standing():
        clients = [
            server.connection({"prompt": ["a"] * prompts, "max_tokens": 1})
            for prompts in (limit // 2, limit // 2 - 1)
        ]
        server.until(lambda: worker.queued == limit - 1, "one place left")
        assert server.post(prompt=["a", "a"], max_tokens=1).status_code == 429
        clients.append(server.connection({"prompt": "a", "max_tokens": 1}))
        server.until(lambda: worker.queued == limit, "full")
        assert server.post(prompt="a", max_tokens=1).status_code == 429
    for client in clients:
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        client.close()


def test_pool(server):
    """Catches: a page that is shown free while a request holds it, sharing that does not show."""
    prefix = "s" * 41  # 5 full pages
    with server.standing():
        clients = [server.connection({"prompt": prefix + c, "max_tokens": 60}) for c in "ab"]
        server.until(lambda: len(server.worker.open_jobs) == 2, "arrived")
    views = []

    def is_shared() -> bool:
        views.append(server.get("/pool").json())
        return any(len(page["holders"]) == 2 for page in views[-1]["used"])

    server.until(is_shared, "two requests on one page")
    shared = [page for page in views[-1]["used"] if len(page["holders"]) == 2 and page["cached"]]
    assert len(shared) == 5
    assert views[-1]["pages"] == 65
    assert views[-1]["page_size"] == 8
    for client in clients:
        client.close()


def test_mixed_load(server):
    """Catches: a 5xx, a stream that breaks off, pages that leak, when all kinds of clients come at
    once. soak.py takes longer."""
    limits = Limits(server.config.max_body_bytes, server.config.max_total_logprobs, 128)
    report = soak.soak(server.url, 3, lambda: 0, limits, clients=12, looks=1)
    assert not report["failed"]
    assert report["answers"]["200"]
    statuses = report["answers"].keys() - {"leave", "stuck", "tokens"}
    assert statuses <= {"200", "400", "429"}
    server.until(lambda: not server.worker.open_jobs, "ended")
    server.worker.engine.blocks.check()
    assert not server.worker.jobs
    assert server.worker.queued == 0


def test_bench_serve(server, tmp_path):
    """Catches: tokens that are not counted or counted twice, a report that is no JSON, arrivals
    that wait for answers."""
    config = BenchServeConfig(
        url=server.url,
        rates=(10.0, math.inf),
        requests=12,
        prompt_tokens=(4, 20),
        output_tokens=(3, 12),
        plot=tmp_path / "p.png",
    )
    tokens = sum(body["max_tokens"] for body in serve_requests(config))
    report = json.loads(json.dumps(bench_serve(config)))
    for rate in report["rates"]:
        assert rate["completed"] == 12
        assert rate["refused"] == 0
        assert rate["tokens_per_s"] / rate["requests_per_s"] == pytest.approx(tokens / 12, rel=0.05)
        assert 0 < rate["itl_ms"]["median"] <= rate["itl_ms"]["p99"]
        assert rate["ttft_ms"]["mean"] > 0
    assert report["rates"][1]["requests_per_s"] > report["rates"][0]["requests_per_s"]
    assert (tmp_path / "p.png").stat().st_size > 10_000
