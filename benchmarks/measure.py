"""Numbers fairly taken: fresh processes, CPU seconds, peer and ours in turn, medians of several.

The ratio of a result is always peer / ours (or allowed / ours), so more is better and `bar` is the least.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

Numbers = dict[str, float]


class Call(Protocol):
    """Calls a function, in this process or in another."""

    def __call__(self, function: Callable[..., Any], /, **arguments: Any) -> Any:
        """Its result."""
        ...


@dataclass(frozen=True)
class Result:
    """What one benchmark found; numbers carry their unit in the key, `promises` says which were kept."""

    peer: Numbers
    ours: Numbers
    ratio: float
    bar: float
    promises: dict[str, bool]
    repetitions: int
    compared: str
    samples: dict[str, list[Numbers]]
    extra: dict[str, Any] = field(default_factory=dict)


def apart(function: Callable[..., Any], /, **arguments: Any) -> Any:
    """Call in a fresh process, which carries over neither memory nor caches."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, **arguments).result()


def here(function: Callable[..., Any], /, **arguments: Any) -> Any:
    """Call in this process: quicker, and good enough where no number is read."""
    return function(**arguments)


@contextmanager
def cpu_seconds(numbers: Numbers, key: str = "cpu_seconds") -> Iterator[None]:
    """Write the CPU seconds of all threads of this process, user and system, to numbers[key]."""
    started = time.process_time()
    yield
    numbers[key] = time.process_time() - started


def peak_bytes() -> int:
    """The most resident memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_turn(repetitions: int, **measurements: Callable[[], Numbers]) -> dict[str, list[Numbers]]:
    """Every measurement `repetitions` times: first each once, then each again, so that noise falls on all."""
    samples: dict[str, list[Numbers]] = {name: [] for name in measurements}
    for _ in range(repetitions):
        for name, measurement in measurements.items():
            samples[name].append(measurement())
    return samples


def medians(samples: list[Numbers]) -> Numbers:
    """The median of every number.

    >>> medians([{"cpu_seconds": 3.0}, {"cpu_seconds": 1.0}, {"cpu_seconds": 2.0}])
    {'cpu_seconds': 2.0}
    """
    return {key: statistics.median(one[key] for one in samples) for key in samples[0]}
