"""Fair timing: everybody in turn, round after round, on fresh values, and then the medians.

A machine's speed drifts (heat, neighbours). Interleaving lets a slow second hit every contender, where timing one
after the other would make it one contender's fault. On CPU the stopwatch is `torch.utils.benchmark.Timer`, which sets
the number of threads. On CUDA it is a pair of events on the stream, so that the host's own clock and its waiting do not
count; and the cache is cold, since a buffer larger than any L2 is written before each timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Measurement, TaskSpec, Timer

from xent import _primitives

SMALL = 2**20  # bytes of input below which one timing runs over several copies of it
MOST_COPIES = 64
FLUSH = 512 * 2**20  # bytes that push everything else out of the L2 cache of any GPU


class Run(NamedTuple):
    """One contender, ready to be timed: `step` does all its work on the given input."""

    name: str
    step: Callable[[Tensor], object]
    backend: str | None = None  # of xent, where one is to be forced


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """xent on this backend only, as XENT_BACKEND does it for a whole process. Backward belongs inside, too."""
    before = _primitives.FORCED
    _primitives.FORCED = backend or before
    try:
        yield
    finally:
        _primitives.FORCED = before


def interleaved(runs: Sequence[Run], input: Tensor, *, rounds: int, threads: int) -> dict[str, Measurement]:
    """Seconds for one `step(input)`, for each run: `rounds` measurements each, merged. Read `.median`.

    A step may overwrite its input. So every step works on copies, written anew before each timing and outside it.
    That also leaves everyone the same cache: the input was just written, as if by the layer before. Small inputs
    come in several copies per timing, or the clock itself would be measured.
    """
    count = min(max(SMALL // input.nbytes, 1), MOST_COPIES)
    copies = [torch.empty_like(input).requires_grad_(input.requires_grad) for _ in range(count)]

    @torch.no_grad()
    def refill() -> None:
        for copy in copies:
            copy.copy_(input)

    flush = torch.empty(FLUSH, dtype=torch.uint8, device=input.device) if input.is_cuda else None

    def timer(run: Run) -> Timer | EventTimer:
        if flush is not None:
            return EventTimer(run, refill, copies, flush)
        names = {"refill": refill, "step": run.step, "copies": copies}
        return Timer("for copy in copies: step(copy)", "refill()", globals=names, label=run.name, num_threads=threads)

    timers = [timer(run) for run in runs]
    measured: list[list[Measurement]] = [[] for _ in runs]
    for first in range(rounds):
        for turn in range(len(runs)):
            i = (first + turn) % len(runs)  # nobody is always the first
            with forced(runs[i].backend):
                measured[i].append(timers[i].timeit(1))  # setup and two warm-ups; setup again and one timing
    merged = [Measurement(count, [t for m in ms for t in m.raw_times], ms[0].task_spec) for ms in measured]
    return {run.name: measurement for run, measurement in zip(runs, merged, strict=True)}


class EventTimer:
    """What `interleaved` needs of a Timer, by CUDA events and from a cold L2."""

    def __init__(self, run: Run, refill: Callable[[], None], copies: Sequence[Tensor], flush: Tensor) -> None:
        """All timers share `flush`, which is on the device."""
        self.run, self.refill, self.copies, self.flush = run, refill, copies, flush

    def timeit(self, number: int) -> Measurement:
        """Two warm-ups, as Timer has them; then each timing on fresh values."""
        for _ in range(2):
            self.refill()
            self.work()
        times = []
        for _ in range(number):
            self.refill()
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            self.work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return Measurement(1, times, TaskSpec("", "", label=self.run.name))

    def work(self) -> None:
        """What is timed."""
        for copy in self.copies:
            self.run.step(copy)
