"""Between the engine and HTTP: the thread that owns the engine, the jobs it works on, and what Prometheus reads of it.

A handler on the event loop submits a Job to the Worker and awaits what the engine brings it; nothing polls.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from config import ServeConfig
from engine import Engine, Stats
from sequence import Output, SamplingParams
from serving.metrics import Metrics
from serving.protocol import APIError, refused, unavailable

log = logging.getLogger("server")


class Job:
    """The prompts of one HTTP request on their way through the engine. Lives on the event loop.

    Outputs wait here for their reader, at most max_tokens of them for each sample: a slow one cannot fill the memory."""

    def __init__(
        self, request_id: str, prompts: list[list[int]], params: SamplingParams, stream: bool
    ):
        self.request_id = request_id
        self.prompts, self.params, self.stream = prompts, params, stream
        self.ids: list[int] = []  # the engine's, one per prompt
        self.unfinished = len(prompts) * params.n
        self.outputs: list[tuple[int, Output]] = []  # with the prompt's number
        self.changed = asyncio.Event()
        self.error: APIError | None = None
        self.submitted = time.perf_counter()
        self.last_token: dict[tuple[int, int], float] = {}  # when, by prompt and sample

    def fail(self, error: APIError) -> None:
        self.error = error
        self.changed.set()

    async def next(self) -> list[tuple[int, Output]]:
        """What is new of a streamed job; of another, all, once it is done. The outputs of a sample are merged.
        Raises APIError if the job has failed."""
        while not (self.error or not self.unfinished or (self.stream and self.outputs)):
            await self.changed.wait()
            self.changed.clear()
        if self.error:
            raise self.error
        merged: dict[tuple[int, int], Output] = {}
        for prompt, out in self.outputs:
            key = prompt, out.index
            merged[key] = merged[key] + out if key in merged else out
        self.outputs = []
        return [(prompt, out) for (prompt, _), out in merged.items()]


class Worker(threading.Thread):
    """The thread that owns the engine. The event loop leaves commands in `inbox`, which are carried out between steps; outputs
    go back by call_soon_threadsafe, once a step."""

    def __init__(self, make_engine: Callable[[], Engine], config: ServeConfig, metrics: "Metrics"):
        super().__init__(name="engine", daemon=True)
        self.make_engine, self.config, self.metrics = make_engine, config, metrics
        # Shared between the threads; `wake` guards inbox, queued and stats.
        self.wake = threading.Condition()
        self.inbox: list[Callable[[], None]] = []
        self.queued = 0  # prompts in the inbox, and those taken from it since the last step
        self.stats: Stats | None = None  # as of the last step; None until the engine is warm
        self.step_began: float | None = None
        self.stopping = False
        self.error: BaseException | None = None  # what ended the thread
        # The engine thread's own.
        self.engine: Engine | None = None
        self.jobs: dict[int, tuple[Job, int]] = {}  # by the engine's id
        # The event loop's own.
        self.open: set[Job] = set()
        self.idle = asyncio.Event()
        self.idle.set()
        self.draining = False
        self.on_death: Callable[[], None] = lambda: None

    # On the event loop.

    def problem(self) -> str | None:
        """Why the server should get no requests now, if there is a reason."""
        began = self.step_began
        if self.draining:
            return "the server is shutting down"
        if self.error:
            return "the engine has died"
        if self.stats is None:
            return "the model is warming up"
        if began is not None and time.monotonic() - began > self.config.step_timeout:
            return (
                f"the engine's step has taken more than step_timeout={self.config.step_timeout} s"
            )
        return None

    def check(self) -> None:
        """Raises APIError if the server should get no requests now."""
        if problem := self.problem():
            raise unavailable(problem)

    async def submit(self, job: Job) -> None:
        """Returns once the engine has accepted the job. Raises APIError."""
        self.check()
        with self.wake:
            waiting, limit = self.stats.waiting + self.queued, self.config.max_waiting
            if waiting + len(job.prompts) > limit:
                raise APIError(
                    429,
                    f"{waiting} prompts are waiting, and the limit is {limit}: try again later",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            self.queued += len(job.prompts)
            self.command(partial(self._add, job))
        self.open.add(job)
        self.idle.clear()
        try:
            await job.changed.wait()
        except asyncio.CancelledError:
            self.end(job)
            raise
        if job.error:
            job.unfinished = 0  # nothing of it is in the engine
            self.end(job)
            raise job.error

    def end(self, job: Job) -> None:
        """The job needs nothing any more; if it still runs, it ends before the engine's next step."""
        self.open.discard(job)
        if not self.open:
            self.idle.set()
        if job.unfinished:
            self.metrics.finished("abort")
            self.command(partial(self._cancel, job))

    def fail_all(self, error: APIError) -> None:
        for job in list(self.open):
            job.fail(error)

    def command(self, run: Callable[[], None]) -> None:
        with self.wake:
            self.inbox.append(run)
            self.wake.notify()

    async def ask(self, question: Callable[[Engine], object]) -> object:
        """question(engine), asked between steps."""
        self.check()
        answer = self.loop.create_future()
        settle = lambda value: answer.done() or answer.set_result(value)
        self.command(lambda: self._post(settle, question(self.engine)))
        return await asyncio.wait_for(answer, self.config.step_timeout)

    def stop(self) -> None:
        with self.wake:
            self.stopping = True
            self.wake.notify()

    def _deliver(self, now: float, outputs: list[tuple[Job, int, Output]]) -> None:
        for job, prompt, out in outputs:
            self.metrics.observe(job, prompt, out, now)
            job.outputs.append((prompt, out))
            job.unfinished -= out.finish_reason is not None
            if job.stream or not job.unfinished:
                job.changed.set()

    # On the engine thread.

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        super().start()

    def run(self) -> None:
        try:
            self.engine = self.make_engine()
            self._look()
            while not self.stopping:
                with self.wake:
                    self.wake.wait_for(lambda: self.inbox or self.engine.busy or self.stopping)
                    commands, self.inbox, taken = self.inbox, [], self.queued
                for command in commands:
                    command()
                self.step_began = time.monotonic()
                outputs = self.engine.step() if self.engine.busy else []
                self.step_began = None
                self._look(taken)
                if outputs:
                    self._post(
                        self._deliver,
                        time.perf_counter(),
                        [(*self.jobs[out.request_id], out) for out in outputs],
                    )
                for ended in {out.request_id for out in outputs} - self.engine.requests.keys():
                    del self.jobs[ended]
        except BaseException as e:
            log.exception("the engine has died")
            self.error = e
            self._post(self._died)

    def _look(self, taken: int = 0) -> None:
        stats = self.engine.stats()
        with self.wake:
            self.stats = stats
            self.queued -= taken

    def _died(self) -> None:
        self.fail_all(APIError(500, "the engine has died; the server is going down"))
        self.on_death()

    def _post(self, run: Callable, *args) -> None:
        """run(*args) on the event loop."""
        with contextlib.suppress(RuntimeError):  # it is closed: the process is ending
            self.loop.call_soon_threadsafe(run, *args)

    def _add(self, job: Job) -> None:
        """All prompts of the job or, if one is refused, none."""
        try:
            for i, prompt in enumerate(job.prompts):
                job.ids.append(self.engine.add(prompt, job.params))
                self.jobs[job.ids[-1]] = job, i
        except ValueError as e:
            self._cancel(job)
            self._post(job.fail, refused(e))
        else:
            self._post(job.changed.set)

    def _cancel(self, job: Job) -> None:
        for i in job.ids:
            self.engine.cancel(i)
            self.jobs.pop(i, None)
