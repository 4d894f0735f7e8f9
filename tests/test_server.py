"""Tests of the server as a process: how it starts, what its log says, how it ends."""

import configparser
import contextlib
import http.client
import json
import logging
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import yaml

import cli
import server as server_program
from errors import UserError
from model import GPT
from running_server import COMPILING, DEADLINE, TOKENIZER, Running
from serving.config import ServeConfig
from serving.log import JSONLines, RequestLog, TextLines, log_request, wants_text

pytestmark = pytest.mark.slow

pytest_plugins = ["server_fixtures"]

ROOT = Path(__file__).parents[1]
SMALL = ["--kv_blocks=65", "--page_size=8", "--prefill_tokens=32", "--max_num_seqs=2"]


def command(*flags: str) -> list[str]:
    """The command line of a server with a small engine."""
    return [sys.executable, "server.py", *SMALL, *flags]


@pytest.fixture(scope="module")
def model_dir(tiny_model, tmp_path_factory) -> Path:
    """A directory with the tiny model and its tokenizer."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.save_pretrained(directory, TOKENIZER)
    return directory


class ServerProcess:
    """A server.py of its own, and the lines of its log so far."""

    def __init__(self, *flags: str, stderr: int = subprocess.PIPE) -> None:
        env = os.environ | {"NANOGPT_API_KEY": "hidden-key"}
        self.process = subprocess.Popen(command(*flags), cwd=ROOT, stderr=stderr, env=env)
        self.lines: list[str] = []
        self.reader: threading.Thread | None = None

    def collect(self, stream) -> None:
        """Read the log from a binary stream, in a thread."""
        self.reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self.reader.start()

    def _read(self, stream) -> None:
        with contextlib.suppress(OSError):  # what a terminal raises once nobody writes to it
            for line in stream:
                self.lines.append(line.decode())

    def line_with(self, words: str) -> str:
        """Wait for a line of the log with these words."""
        end = time.monotonic() + COMPILING
        while True:
            found = [line for line in self.lines if words in line]
            if found:
                return found[0]
            assert time.monotonic() < end and self.process.poll() is None, self.lines
            time.sleep(0.02)

    def exit_code(self) -> int:
        """Wait for the end of the process and of its log."""
        code = self.process.wait(DEADLINE)
        self.reader.join(DEADLINE)
        return code

    def wait_until_healthy(self, url: str) -> None:
        """Wait until it is warm, before which it must not say that it is healthy."""
        codes = set()
        end = time.monotonic() + COMPILING
        while 200 not in codes:
            assert time.monotonic() < end, codes
            codes.add(requests.get(f"{url}/health", timeout=DEADLINE).status_code)
            time.sleep(0.05)
        assert codes == {503, 200}, "it was healthy before it was warm"


@contextlib.contextmanager
def server_process(model_dir: Path, port: int, *flags: str) -> Iterator[tuple[ServerProcess, str]]:
    """A healthy server.py that logs to a pipe, and its URL."""
    server = ServerProcess(f"--init_from={model_dir}", f"--port={port}", *flags)
    server.collect(server.process.stderr)
    try:
        url = json.loads(server.line_with("serving"))["url"]
        server.wait_until_healthy(url)
        yield server, url
    finally:
        server.process.kill()
        server.exit_code()


# How it starts.


def test_busy_port(tmp_path):
    """Catches: a port in use told by the system's words, or only after the model was loaded."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        # There is no model in the directory: the port must be found busy before that is found out.
        flags = [f"--out_dir={tmp_path}", f"--port={port}"]
        ended = subprocess.run(command(*flags), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    [sentence] = ended.stderr.splitlines()
    assert f"port {port}" in sentence
    assert "--port" in sentence


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1"])
def test_address_of_nobody_here(host):
    """Catches: a mistyped address told by the system's words alone."""
    with pytest.raises(UserError, match=f"host={host}.*--host") as mistake:
        server_program.hold_port(host, 0)
    assert mistake.value.param == "host"


def test_port_is_held_but_refuses_until_it_listens():
    """Catches: clients that hang while the model loads, two servers on one port."""
    first = server_program.hold_port("127.0.0.1", 0)
    address = first.getsockname()
    second = server_program.hold_port(*address)  # started at the same time
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    server_program.listen(first)
    with pytest.raises(UserError, match=f"port {address[1]} .*in use"):
        server_program.listen(second)
    socket.create_connection(address).close()
    first.close()
    second.close()


@pytest.mark.parametrize(
    "host, url",
    [
        ("127.0.0.1", "http://127.0.0.1:"),
        ("0.0.0.0", "http://127.0.0.1:"),
        ("::1", "http://[::1]:"),
        ("::", "http://[::1]:"),
    ],
)
def test_url_opens_in_a_browser(host, url):
    """Catches: an IPv6 address without brackets, an address that no browser can open."""
    try:
        listener = server_program.hold_port(host, 0)
    except UserError:
        pytest.skip(f"this machine has no {host}")
    with listener:
        port = listener.getsockname()[1]
        assert server_program.url_of(listener) == f"{url}{port}"


def test_mistake_that_the_engine_finds_at_the_start(tiny_model, monkeypatch, caplog):
    """Catches: a user's mistake that comes with a traceback, or leaves a server without engine."""

    def refuse(self):
        raise UserError("kv_blocks=1 is too small", param="kv_blocks")

    monkeypatch.setattr(Running, "make_engine", refuse)
    error = Running(tiny_model).ended()
    assert isinstance(error, UserError)
    assert not caplog.records


def test_a_model_cut_over_two_devices(model_dir):
    """Catches devices that are not there because JAX was used before they were asked for, and
    another answer than one device's."""
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 12, "temperature": 0}
    headers = {"Authorization": "Bearer hidden-key"}
    with server_process(model_dir, 0, "--mesh=tensor:2") as (_, url):
        answer = requests.post(f"{url}/v1/completions", json=body, headers=headers).json()
    prompt = TOKENIZER.encode("Hello")
    [whole] = GPT.from_pretrained(model_dir).generate([prompt], 12, temperature=0)
    assert answer["choices"][0]["text"] == TOKENIZER.decode(whole[len(prompt) :])


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("tensor:3", "n_head=2 must be divisible by 3, the mesh's tensor:3"),
        ("data:2", "mesh=data:2: an engine is cut along one axis: tensor:N"),
    ],
)
def test_a_mesh_that_does_not_fit(model_dir, mesh, sentence):
    """Catches a traceback, an exit code of 0, and a model cut into unequal parts."""
    flags = command(f"--init_from={model_dir}", "--port=0", f"--mesh={mesh}")
    ended = subprocess.run(flags, cwd=ROOT, capture_output=True, text=True, timeout=COMPILING)
    assert ended.returncode == 2
    assert sentence in ended.stderr.splitlines()[-1]


# What its log says.


def formatted(formatter: logging.Formatter, request: RequestLog, caplog) -> str:
    """The line that a request leaves in the log."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "server"):
        log_request(request)
    return formatter.format(caplog.records[0])


def test_request_lines(caplog):
    """Catches: fields that the log loses, and people who must read JSON."""
    request = RequestLog("id-1", "POST", "/v1/completions")
    line = json.loads(formatted(JSONLines(), request, caplog))
    assert line["event"] == "request"
    assert line["status"] is None
    request.status = 200
    request.seconds = 0.5312
    request.prompt_tokens = 12
    request.completion_tokens = 64
    request.error = "gone"
    line = json.loads(formatted(JSONLines(), request, caplog))
    assert line.items() >= vars(request).items()
    assert line.keys() == vars(request).keys() | {"time", "level", "event"}
    words = "POST /v1/completions 200 in 0.53 s (12 prompt + 64 new tokens) error: gone"
    assert formatted(TextLines(), request, caplog).endswith(words)


def test_polled_routes_are_not_logged(caplog):
    """Catches: a log full of /health."""
    formatted(JSONLines(), RequestLog("id-1", "GET", "/health", 200), caplog)
    assert caplog.records[0].levelno == logging.DEBUG


@pytest.mark.parametrize("is_terminal", [True, False])
def test_form_of_the_log(monkeypatch, is_terminal):
    """Catches: JSON on a terminal, text where a program reads, a flag that does nothing."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    assert wants_text("text")
    assert not wants_text("json")
    assert wants_text("auto") == is_terminal


def test_log_on_a_terminal(model_dir):
    """Catches: a person who is not told where the page is, when the model is ready, what happens
    after Ctrl+C."""
    ours, theirs = pty.openpty()
    server = ServerProcess(f"--init_from={model_dir}", "--port=0", stderr=theirs)
    os.close(theirs)
    with os.fdopen(ours, "rb") as terminal:
        server.collect(terminal)
        try:
            serving = server.line_with("serving tiny at http://127.0.0.1:")
            url = next(word for word in serving.split() if word.startswith("http"))
            server.line_with("ready after")
            key = {"Authorization": "Bearer hidden-key"}
            body = {"prompt": "abc", "max_tokens": 4}
            requests.post(f"{url}/v1/completions", json=body, headers=key, timeout=DEADLINE)
            server.line_with("POST /v1/completions 200 in")
            server.process.send_signal(signal.SIGINT)
            assert server.exit_code() == 0
        finally:
            server.process.kill()
            server.exit_code()
    log = "".join(server.lines)
    assert "(3 prompt + 4 new tokens)" in log
    assert "draining for up to 30 s (requests open: 0)" in log
    assert log.rstrip().endswith("stopped")
    assert "{" not in log


# How it ends.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_it_compiles(model_dir, number):
    """Catches: an end that waits for the compiler, or breaks it off with a crash."""
    server = ServerProcess(f"--init_from={model_dir}", "--port=0")
    server.collect(server.process.stderr)
    try:
        server.line_with("serving")
        server.process.send_signal(number)
        assert server.exit_code() == 0
    finally:
        server.process.kill()
    assert "ready" not in "".join(server.lines)
    assert json.loads(server.lines[-1])["event"] == "stopped"


def test_engine_that_dies(tiny_model):
    """Catches: clients left hanging, and a process that lives on without its engine or ends as if
    all were well."""
    running = Running(tiny_model).ready()

    def die():
        raise MemoryError("no more pages")

    with running.standing():
        clients = [
            running.connection({"prompt": "a", "max_tokens": 50, "stream": stream})
            for stream in (False, True)
        ]
        running.until(lambda: len(running.worker.open_jobs) == 2, "arrived")
        running.worker.engine.step = die
    for client in clients:
        response = http.client.HTTPResponse(client)
        response.begin()
        text = response.read().decode()
        assert response.status == 500 or (response.status == 200 and "[DONE]" not in text)
        assert '"server_error"' in text
        assert "no more pages" not in text
    error = running.ended()
    assert isinstance(error, RuntimeError)
    assert isinstance(error.__cause__, MemoryError)


def test_health_when_a_step_hangs(tiny_model):
    """Catches: a load balancer that keeps sending requests to a server whose device hangs."""
    running = Running(tiny_model, step_timeout=0.1).ready()
    with running.standing():
        client = running.connection({"prompt": "a"})
        running.until(lambda: running.get("/health").status_code == 503, "unhealthy")
    running.until(lambda: running.get("/health").status_code == 200, "healthy again")
    client.close()
    running.drain()
    assert running.ended() is None


def stream(url: str, begun: threading.Event) -> tuple[int, bytes]:
    """The status and the last line of a streamed answer; begun is set when its first line comes."""
    headers = {"Authorization": "Bearer hidden-key"}
    body = {"prompt": "a", "max_tokens": 100, "stream": True, "temperature": 0}
    last = b""
    with requests.post(
        f"{url}/v1/completions", json=body, headers=headers, stream=True, timeout=DEADLINE
    ) as response:
        with contextlib.suppress(requests.RequestException):  # killed
            for line in response.iter_lines():
                begun.set()
                last = line or last
        return response.status_code, last


def signalled(process: subprocess.Popen, url: str, number: int) -> list[tuple[int, bytes]]:
    """The answers to eight streamed requests, during which the process gets a signal."""
    begun = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(stream, url, begun) for _ in range(8)]
        assert begun.wait(DEADLINE)
        process.send_signal(number)
        may_fail = number == signal.SIGKILL
        return [answer.result() for answer in answers if not may_fail or not answer.exception()]


def test_sigkill_then_sigterm_under_load(model_dir):
    """Catches: a port or a file that a killed server leaves in the way of the next; a request that
    was admitted and lost at the end, an end that waits for ever, an exit code other than 0."""
    with server_process(model_dir, 0) as (killed, url):
        signalled(killed.process, url, signal.SIGKILL)
        assert killed.exit_code() == -signal.SIGKILL
    with server_process(model_dir, int(url.rsplit(":", 1)[1])) as (server, url):
        assert requests.get(f"{url}/v1/models", timeout=DEADLINE).status_code == 401
        answers = signalled(server.process, url, signal.SIGTERM)
        assert server.exit_code() == 0
        lines = server.lines
    assert (200, b"data: [DONE]") in answers
    admitted = [last for status, last in answers if status == 200]
    assert set(admitted) == {b"data: [DONE]"}, "an admitted request was lost"
    assert {status for status, _ in answers} <= {200, 503}
    assert not any("hidden-key" in line or "Traceback" in line for line in lines)
    check_json_log(lines)


def check_json_log(lines: list[str]) -> None:
    """A log in a pipe is JSON, and tells of the server's life and of each request."""
    entries = [json.loads(line) for line in lines]
    entries = [entry for entry in entries if entry["level"] == "INFO"]  # JAX may warn
    told = [entry["event"].split()[0].rstrip(":") for entry in entries]
    life = [event for event in told if event != "request"]
    assert life == ["loading", "serving", "ready", "draining", "stopped"]
    whole = [entry for entry in entries if entry.get("completion_tokens") == 100]
    assert whole
    assert all(entry["prompt_tokens"] == 1 and entry["seconds"] > 0 for entry in whole)


def test_systemd_unit():
    """Catches: a unit whose flags the server refuses, that kills before the drain is over or does
    not restart what was killed."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.read(ROOT / "deploy" / "jax-nanogpt-vllm.service")
    service = unit["Service"]
    _, program, *flags = shlex.split(service["ExecStart"])
    assert program == "server.py"
    config = cli.parse(ServeConfig, argv=flags)
    assert int(service["TimeoutStopSec"]) >= longest_end(config)
    assert service["KillSignal"] == "SIGTERM"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2", "of a mistake in the flags, see cli.fail"


def longest_end(config: ServeConfig) -> float:
    """Return the seconds that a server takes at most from SIGTERM to its end."""
    return config.drain_timeout + server_program.CONNECTION_TIMEOUT + server_program.THREAD_TIMEOUT


def test_kubernetes_deployment():
    """Catches: a pod whose flags the server refuses, that is killed before the drain is over, that
    is asked for its health where nothing answers, and selectors that find no pod."""
    documents = yaml.safe_load_all((ROOT / "deploy" / "serve-kubernetes.yaml").read_text())
    by_kind = {document["kind"]: document["spec"] for document in documents}
    deployment = by_kind["Deployment"]
    pod = deployment["template"]["spec"]
    [container] = pod["containers"]
    config = cli.parse(ServeConfig, argv=container["args"])
    [port] = container["ports"]
    assert port["containerPort"] == config.port
    _, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + longest_end(config)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    labels = deployment["template"]["metadata"]["labels"]
    assert by_kind["Service"]["selector"] == labels
    assert deployment["selector"]["matchLabels"] == labels
    assert by_kind["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    minimum = by_kind["HorizontalPodAutoscaler"]["minReplicas"]
    assert by_kind["PodDisruptionBudget"]["minAvailable"] < minimum


def test_the_image_has_all_that_the_server_imports():
    """Catches: a new folder of ours that the Dockerfile does not copy."""
    listing = (
        "import sys, server, serving.routes, utils; "
        "print(*{m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)})"
    )
    done = subprocess.run(
        [sys.executable, "-c", listing], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [Path(file) for file in done.stdout.split()]
    ours = [file.relative_to(ROOT) for file in files if file.is_relative_to(ROOT)]
    folders = {file.parts[0] for file in ours if len(file.parts) > 1 and file.parts[0] != ".venv"}
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    copied = {line.split()[1] for line in dockerfile.splitlines() if line.startswith("COPY ")}
    assert {"serving", "kernels", "speculation"} <= folders
    assert folders <= copied


def test_drain_has_an_end(tiny_model):
    """Catches: an end that waits for ever for one request, a client that is not told why."""
    running = Running(tiny_model, drain_timeout=0.2).ready()
    with running.standing():
        client = running.connection({"prompt": "a", "max_tokens": 50, "stream": True})
        running.until(lambda: running.worker.open_jobs, "arrived")
        running.drain()
        running.until(lambda: running.get("/health").status_code == 503, "draining")
        answer = http.client.HTTPResponse(client)
        answer.begin()
        text = answer.read()
    assert b"drain_timeout=0.2" in text
    assert b"[DONE]" not in text
    assert running.ended() is None


def test_second_signal_does_not_wait(tiny_model):
    """Catches: a second signal that waits like the first, requests admitted after the first."""
    running = Running(tiny_model, drain_timeout=10 * DEADLINE).ready()
    with running.standing():
        client = running.connection({"prompt": "a", "max_tokens": 50})
        running.until(lambda: running.worker.open_jobs, "arrived")
        running.drain()
        running.until(lambda: running.worker.draining, "draining")
        assert running.post(prompt="a").status_code == 503
        assert not running.server.should_exit
        running.drain()
        running.until(lambda: running.server.should_exit, "not waiting")
        client.close()
    assert running.ended() is None
