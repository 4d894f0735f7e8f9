"""Between the engine and HTTP: the thread that owns the engine.

A route on the event loop submits a Job to the Worker and awaits what the engine brings it; nothing
polls. Read Worker.submit, then Worker._turn, then Worker._deliver: there and back.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from engine import Engine, Stats
from errors import UserError
from sequence import Output
from serving.api_errors import APIError, refused, unavailable
from serving.config import ServeConfig
from serving.job import Job
from serving.metrics import Metrics, SampleEnd

log = logging.getLogger("server")

OPEN_ANSWERS = 8
"""So many answers of ServeConfig.max_total_logprobs may be open at once, from their admission until
their client has read them. It bounds the memory that readers can take, slow ones too."""

Command = Callable[[Engine], None]
Answer = TypeVar("Answer")


class Worker:
    """The thread that owns the engine, and the event loop's way to it.

    The event loop leaves commands in `inbox`, which the thread carries out between two steps of the
    engine; outputs go back by call_soon_threadsafe, once a step."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        config: ServeConfig,
        metrics: Metrics,
        on_death: Callable[[], None],
    ) -> None:
        """make_engine runs on the thread, and takes as long as compiling does. on_death is called
        on the event loop when the thread has ended by an error."""
        self.make_engine = make_engine
        self.config = config
        self.metrics = metrics
        self.on_death = on_death
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

        # Shared by both threads, under `wake`, which is notified when the engine has work to do.
        self.wake = threading.Condition()
        self.inbox: list[Command] = []
        self.queued = 0  # prompts in the inbox, and those taken from it since the last step
        self.stats: Stats | None = None  # as of the last step; None until the engine is warm
        self.stopping = False

        # Written by the engine's thread, read by the event loop. Each is replaced as a whole, so
        # that a reader sees the old or the new without a lock.
        self.step_began: float | None = None  # time.monotonic(); None between steps
        self.error: BaseException | None = None  # what ended the thread

        # The engine's thread alone.
        self.engine: Engine | None = None
        self.jobs: dict[int, tuple[Job, int]] = {}  # the engine's id -> job, number of the prompt

        # Set by start(), before the thread runs; read by both.
        self.loop: asyncio.AbstractEventLoop | None = None

        # The event loop alone.
        self.open_jobs: set[Job] = set()
        self.idle = asyncio.Event()  # set while no job is open
        self.idle.set()
        self.draining = False
        self.watchers: set[asyncio.Event] = set()  # read by the engine's thread: are there any?

    # On the event loop.

    def start(self) -> None:
        """Start the thread; outputs will come to the event loop that is running now."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """Let the thread end after its current step."""
        with self.wake:
            self.stopping = True
            self.wake.notify()

    def problem(self) -> str | None:
        """Return why the server should get no requests now, None if it should."""
        step_began = self.step_began
        limit = self.config.step_timeout
        if self.draining:
            return "the server is shutting down"
        if self.error:
            return "the engine has died"
        if self.stats is None:
            return "the model is warming up"
        if step_began is not None and time.monotonic() - step_began > limit:
            return f"the engine's step has taken more than step_timeout={limit} s"
        return None

    def require_ready(self) -> None:
        """Raise APIError 503 if the server should get no requests now."""
        problem = self.problem()
        if problem is not None:
            raise unavailable(problem)

    def begin_draining(self) -> None:
        """Admit nothing from now on, and tell those who watch."""
        self.draining = True
        self._wake_watchers()

    @contextlib.contextmanager
    def watching(self) -> Iterator[asyncio.Event]:
        """Inside, the event is set after each step of the engine, and when the server ends."""
        changed = asyncio.Event()
        self.watchers.add(changed)
        try:
            yield changed
        finally:
            self.watchers.discard(changed)

    def _wake_watchers(self) -> None:
        for changed in self.watchers:
            changed.set()

    def stats_and_queued(self) -> tuple[Stats, int] | None:
        """Return the engine's statistics as of the last step, and how many prompts it has not taken
        up yet; None until the engine is warm."""
        with self.wake:
            return None if self.stats is None else (self.stats, self.queued)

    async def submit(self, job: Job) -> None:
        """Return once the engine has accepted the job. Raises APIError if it does not.

        Whoever has submitted a job must close it."""
        self.require_ready()
        self._enqueue(job)
        self.open_jobs.add(job)
        self.idle.clear()
        try:
            await job.changed.wait()
        except asyncio.CancelledError:
            self.close(job)
            raise
        if job.error:
            job.unfinished = 0  # nothing of it is in the engine
            self.close(job)
            raise job.error

    def close(self, job: Job) -> None:
        """Note that the job needs nothing more; what still runs ends before the next step."""
        self.open_jobs.discard(job)
        if not self.open_jobs:
            self.idle.set()
        if job.unfinished:
            self.metrics.count_aborted(job.unfinished)
            self._send_command(partial(self._cancel, job))

    def fail_all(self, error: APIError) -> None:
        """Answer everything that is open with this error."""
        for job in list(self.open_jobs):
            job.fail(error)

    async def ask(self, question: Callable[[Engine], Answer]) -> Answer:
        """Return question(engine), asked on the engine's thread between two steps."""
        self.require_ready()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def settle(value: Answer) -> None:
            if not answer.done():  # it is, if nobody waits any more
                answer.set_result(value)

        def answer_question(engine: Engine) -> None:
            self._post(settle, question(engine))

        self._send_command(answer_question)
        return await asyncio.wait_for(answer, self.config.step_timeout)

    def _enqueue(self, job: Job) -> None:
        """Leave the job in the inbox. Raises APIError 429 if there is no room for it."""
        self._require_room_for_logprobs(job)
        limit = self.config.max_waiting
        with self.wake:
            assert self.stats is not None, "jobs come only once the engine is warm"
            waiting = self.stats.waiting + self.queued
            if waiting + len(job.prompts) > limit:
                raise too_busy(f"{waiting} prompts are waiting, and the limit is {limit}")
            self.queued += len(job.prompts)
            self._send_command(partial(self._add, job))

    def _require_room_for_logprobs(self, job: Job) -> None:
        """Raise APIError 429 if the logprobs of all open answers would take too much memory."""
        limit = OPEN_ANSWERS * self.config.max_total_logprobs
        open_logprobs = sum(open_job.logprobs for open_job in self.open_jobs)
        if job.logprobs and open_logprobs + job.logprobs > limit:
            raise too_busy(
                f"open answers have {open_logprobs} logprobs, this one would have {job.logprobs}, "
                f"and the limit is {limit}"
            )

    def _send_command(self, command: Command) -> None:
        with self.wake:
            self.inbox.append(command)
            self.wake.notify()

    def _deliver(
        self, now: float, step_tokens: int, outputs: list[tuple[Job, int, Output]]
    ) -> None:
        """Hand the outputs of one step, which ended at `now`, to their jobs.

        step_tokens: prompt tokens that it computed, and new ones that it brought."""
        if step_tokens:
            self.metrics.observe_step(step_tokens)
        for job, prompt, output in outputs:
            if job in self.open_jobs:
                self._measure(job, prompt, output, now)
                job.put(prompt, output)

    def _measure(self, job: Job, prompt: int, output: Output, now: float) -> None:
        since_previous = job.note_output(prompt, output, now)
        if since_previous is None:
            self.metrics.observe_first_token(now - job.arrived)
        else:
            self.metrics.observe_next_token(since_previous)
        if output.finish_reason is not None:
            self._measure_end(job, prompt, output, now)

    def _measure_end(self, job: Job, prompt: int, output: Output, now: float) -> None:
        assert output.finish_reason is not None and output.times is not None
        self.metrics.observe_sample_end(
            SampleEnd(
                finish_reason=output.finish_reason,
                arrived=job.arrived,
                now=now,
                times=output.times,
                prompt_tokens=len(job.prompts[prompt]),
                new_tokens=job.new_tokens(prompt, output),
                max_tokens=job.params.max_tokens,
            )
        )
        longest = job.note_end(prompt, output)
        if longest is not None:
            self.metrics.observe_prompt_end(job.params.n, longest)

    def _announce_death(self) -> None:
        self.fail_all(APIError(500, "the engine has died; the server is going down"))
        self._wake_watchers()
        self.on_death()

    # On the engine's thread.

    def holders(self) -> dict[int, str]:
        """Return the request id of each job in the engine, by the engine's own id."""
        return {engine_id: job.request_id for engine_id, (job, _) in self.jobs.items()}

    def _run(self) -> None:
        try:
            self.engine = self._warm_up()
            while not self.stopping:
                self._turn(self.engine)
        except BaseException as error:
            self._die(error)

    def _warm_up(self) -> Engine:
        begin = time.perf_counter()
        engine = self.make_engine()
        self._publish_stats(engine, prompts_taken=0)
        seconds = round(time.perf_counter() - begin, 1)
        log.info("ready after %s s", seconds, extra={"fields": {"seconds": seconds}})
        return engine

    def _turn(self, engine: Engine) -> None:
        """Carry out what the event loop asks for, advance the engine by a step, and report."""
        commands, prompts_taken = self._wait_for_work(engine)
        was_busy = engine.busy  # a command may end the last request
        for command in commands:
            command(engine)
        changes = was_busy or engine.busy
        tokens_before = tokens_done(engine)
        self.step_began = time.monotonic()
        outputs = engine.step() if engine.busy else []
        self.step_began = None
        self._publish_stats(engine, prompts_taken)
        self._return_outputs(outputs, tokens_done(engine) - tokens_before)
        self._forget_ended(engine, outputs)
        if changes and self.watchers:
            self._post(self._wake_watchers)

    def _wait_for_work(self, engine: Engine) -> tuple[list[Command], int]:
        """Return the commands in the inbox, and how many prompts they bring; sleep while there is
        neither a command nor anything in the engine."""
        with self.wake:
            while not (self.inbox or engine.busy or self.stopping):
                self.wake.wait()
            commands = self.inbox
            self.inbox = []
            return commands, self.queued

    def _publish_stats(self, engine: Engine, prompts_taken: int) -> None:
        """Show the event loop how the engine is. The prompts taken before the step are in its
        statistics now, so they no longer count as queued."""
        stats = engine.stats()
        with self.wake:
            self.stats = stats
            self.queued -= prompts_taken

    def _return_outputs(self, outputs: list[Output], step_tokens: int) -> None:
        if not outputs and not step_tokens:
            return
        addressed = [(*self.jobs[output.request_id], output) for output in outputs]
        self._post(self._deliver, time.perf_counter(), step_tokens, addressed)

    def _forget_ended(self, engine: Engine, outputs: list[Output]) -> None:
        for engine_id in {output.request_id for output in outputs}:
            if engine_id not in engine.requests:
                del self.jobs[engine_id]

    def _die(self, error: BaseException) -> None:
        """Note the error and tell the event loop, which ends the process.

        A user's mistake that keeps the engine from starting is told by the program itself, in one
        sentence; everything else is logged here with its traceback."""
        is_mistake_at_start = self.stats is None and isinstance(error, UserError)
        if not is_mistake_at_start:
            log.error("the engine has died", exc_info=error)
        self.error = error
        self._post(self._announce_death)

    def _post(self, function: Callable, *args: object) -> None:
        """Run function(*args) on the event loop."""
        assert self.loop is not None, "start() sets it before the thread runs"
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self.loop.call_soon_threadsafe(function, *args)

    def _add(self, job: Job, engine: Engine) -> None:
        """Give the engine all prompts of the job or, if one is refused, none."""
        try:
            for number, prompt in enumerate(job.prompts):
                engine_id = engine.add(prompt, job.params)
                job.engine_ids.append(engine_id)
                self.jobs[engine_id] = (job, number)
        except ValueError as error:
            self._cancel(job, engine)
            self._post(job.fail, refused(error))
        else:
            self._post(job.changed.set)

    def _cancel(self, job: Job, engine: Engine) -> None:
        for engine_id in job.engine_ids:
            engine.cancel(engine_id)
            self.jobs.pop(engine_id, None)


def tokens_done(engine: Engine) -> int:
    """Return the prompt tokens computed and the new tokens given out since the start."""
    return engine.computed_tokens + engine.generation_tokens


def too_busy(reason: str) -> APIError:
    """Return a 429: the request may be sent again, here or to another replica."""
    return APIError(
        429, f"{reason}: try again later", code="queue_full", headers={"Retry-After": "1"}
    )
