"""DOC"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

from tqdm import tqdm

from errors import require


class Contender:
    """A process of its own that makes something ready with make(*args) -> run, and then, whenever asked, times run(n).

    run(n) does n units of work and returns when they are done; run.warm_up(), by default run(2), is not timed."""

    def __init__(self, make: Callable, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=contend, args=(theirs, make, args), daemon=True)
        self.process.start()
        theirs.close()
        self.seconds: list[float] = []

    def ready(self) -> None:
        assert self.pipe.recv() == "ready"

    def measure(self, n: int) -> None:
        """Append the seconds per unit of work to self.seconds."""
        self.pipe.send(n)
        self.seconds.append(self.pipe.recv() / n)

    def close(self) -> dict:
        """End the process; returns its peak memory in MiB and whatever else the platform tells."""
        self.pipe.send(None)
        memory = self.pipe.recv()
        self.process.join()
        return memory

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def contend(pipe, make: Callable, args: tuple) -> None:
    run = make(*args)
    getattr(run, "warm_up", lambda: run(2))()
    pipe.send("ready")
    while (n := pipe.recv()) is not None:
        begin = time.perf_counter()
        run(n)
        pipe.send(time.perf_counter() - begin)
    pipe.send(
        {
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **getattr(run, "memory", dict)(),
        }
    )


def take_turns(contenders: dict[str, Contender], rounds: int, units: int) -> None:
    """`rounds` times: every contender in turn does `units` units of work."""
    for contender in contenders.values():
        contender.ready()
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for contender in contenders.values():
            contender.measure(units)


def require_ranges(config, *names: str) -> None:
    for name in names:
        low, high = getattr(config, name)
        require(
            1 <= low <= high,
            f"{name}={low} {high}: the first must be at least 1, the second no less than it",
        )
