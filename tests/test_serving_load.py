"""Tests of the server under load: clients that leave or stall, full queues, pages, metrics."""

import contextlib
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

import soak
from benchmarks.serving import BenchServeConfig, bench_serve, serve_requests

pytest_plugins = ["server_fixtures"]


def read_metrics(server) -> dict[str, float]:
    """What /metrics says, by name and labels."""
    lines = server.get("/metrics").text.splitlines()
    samples = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in samples}


def metric(name: str, labels: str = "") -> str:
    """The name of a metric as it stands in /metrics."""
    return f'vllm:{name}{{{labels}model_name="tiny"}}'


def test_metrics(server):
    """Catches: a name that vLLM's dashboards do not find, a count that misses requests or counts
    them twice."""
    before = read_metrics(server)
    server.complete(prompt="0123456789" * 4, max_tokens=5, n=2)
    server.complete(prompt="0123456789" * 4, max_tokens=5)
    after = read_metrics(server)

    def grown(name: str, labels: str = "") -> float:
        key = metric(name, labels)
        return after[key] - before.get(key, 0)

    assert grown("generation_tokens_total") == 15
    assert grown("prefix_cache_queries_total") == 80
    assert grown("prefix_cache_hits_total") == 32
    assert grown("prompt_tokens_total") == 80 - 32
    assert grown("request_success_total", 'finished_reason="length",') == 3
    assert grown("time_to_first_token_seconds_count") == 3
    assert grown("e2e_request_latency_seconds_count") == 3
    assert grown("inter_token_latency_seconds_count") == 12
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[metric(gauge)] == 0
    assert metric("num_preemptions_total") in after


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
    report = soak.soak(server.url, 3, lambda: 0, clients=12, looks=1)
    assert not report["failed"]
    assert report["answers"]["200"]
    assert report["answers"].keys() <= {"200", "400", "429", "leave", "stuck", "tokens"}
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
