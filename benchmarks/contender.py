"""Contenders that take turns, each in a process of its own. Read `Contender`, then `take_turns`.

A contender imports what it needs when it is made, not at the top of its file: so
`python bench.py --help` loads neither JAX nor torch, and no process holds a peer's library
beside its own.
"""

import abc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tqdm import tqdm

from errors import UserError

READY = "ready"  # what a process says when its contender is made and warm
END = None  # what a process is sent, instead of a number of units, when no turn is left


class Contender(abc.ABC):
    """One way to do the work of a bench; each class says what one unit of work is."""

    def warm_up(self) -> None:
        """Pay, outside the timed turns, what only the first work costs, such as compilation."""
        self.run(2)

    @abc.abstractmethod
    def run(self, n: int) -> None:
        """Do n units of work; return when they are done, on the device too."""

    def report(self) -> dict:
        """Return figures of the contender's own, to stand beside its speed."""
        return {}


class ContenderProcess:
    """A process in which a contender is made and, whenever asked, runs and is timed."""

    def __init__(self, make_contender: Callable[..., Contender], *args):
        """Start a process that calls make_contender(*args): a class, or a function of a module."""
        # A fork would inherit what this process has loaded, and JAX's threads do not survive one.
        context = multiprocessing.get_context("spawn")
        self.name = make_contender.__name__
        self._pipe, pipe_of_process = context.Pipe()
        self._process = context.Process(
            target=serve_turns, args=(pipe_of_process, make_contender, args), daemon=True
        )
        self._process.start()
        pipe_of_process.close()
        self.seconds: list[float] = []  # per unit of work, one entry a turn

    def wait_until_ready(self) -> None:
        """Return when the contender is made and warm."""
        answer = self._receive()
        assert answer == READY, f"a contender that was not ready sent {answer!r}"

    def measure(self, units: int) -> None:
        """Let the contender do `units` units of work and note the seconds per unit."""
        self._pipe.send(units)
        self.seconds.append(self._receive() / units)

    def close(self) -> dict:
        """End the process; return its peak memory in MiB and the contender's own report."""
        self._pipe.send(END)
        report = self._receive()
        self._process.join()
        return report

    def _receive(self) -> Any:
        """Return what the process sends. Raises UserError if it has failed, or has ended."""
        try:
            answer = self._pipe.recv()
        except EOFError:  # it was killed, for example because memory ran out
            self._process.join()
            answer = Failure(f"exit code {self._process.exitcode}")
        if isinstance(answer, Failure):
            raise UserError(f"the contender {self.name} has failed: {answer.reason}")
        return answer

    @property
    def median(self) -> float:
        """The median over all turns of the seconds per unit of work."""
        return statistics.median(self.seconds)


class Failure(NamedTuple):
    """What a process sends in place of an answer when its contender has failed."""

    reason: str


def serve_turns(pipe: Connection, make_contender: Callable[..., Contender], args: tuple) -> None:
    """Make a contender, then run and time it as often as the pipe asks. Runs in the process.

    What the contender raises is sent, in one line: another process has to tell of it."""
    try:
        contender = make_contender(*args)
        contender.warm_up()
        pipe.send(READY)
        for units in iter(pipe.recv, END):
            begin = time.perf_counter()
            contender.run(units)
            pipe.send(time.perf_counter() - begin)
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send({"peak_rss_mib": peak_kib // 1024, **contender.report()})
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        pipe.send(Failure(" ".join(message.split())))


def take_turns(contenders: dict[str, ContenderProcess], rounds: int, units: int) -> None:
    """Let every contender in turn do `units` units of work, `rounds` times over."""
    for contender in contenders.values():
        contender.wait_until_ready()
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for contender in contenders.values():
            contender.measure(units)


def ratio(ours: float, peers: Iterable[float]) -> dict[str, float]:
    """Return {"ratio": seconds of the fastest peer over ours}, or {} where there is no peer.

    Above 1, ours is faster."""
    fastest = min(peers, default=None)
    return {} if fastest is None else {"ratio": round(fastest / ours, 3)}


def milliseconds(seconds: float) -> float:
    """Return seconds in milliseconds, as reports show them: to two digits."""
    return round(1e3 * seconds, 2)


def in_words(figures: dict) -> str:
    """Return a report's figures as one line: "key value, key value"."""
    return ", ".join(f"{key} {value}" for key, value in figures.items())
