"""How bench.py times a step: fresh values, medians, everybody in turn, and what lies between two events."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/bench.py` would find them

import bench  # noqa: E402
import contenders  # noqa: E402


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a small input."""
    monkeypatch.setattr(bench, "MOST_COPIES", 2)


def in_force() -> str | None:
    """The backend that xent has to take."""
    return contenders.dispatch.FORCED_BACKEND


def test_timed_steps_meet_fresh_values_and_the_backend_asked_for() -> None:
    logits = torch.randn(bench.SMALL // 4)
    fresh: list[bool] = []
    backends: list[str | None] = []

    def overwrite(x: Tensor) -> None:
        fresh.append(torch.equal(x, logits))
        backends.append(in_force())
        x.zero_()

    before = in_force()
    runs = [bench.Run("in place", overwrite, "eager"), bench.Run("other", lambda x: x.zero_())]
    assert bench.interleaved(runs, logits, rounds=1)["in place"] > 0
    assert all(fresh)
    assert set(backends) == {"eager"}
    assert before == in_force()


def test_the_median_is_that_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small input comes in several copies per timing."""
    steps: list[int] = []
    slow = iter((4.0, 100.0, 6.0))

    def seconds(work: Callable[[], object], flush: None) -> float:
        work()
        return next(slow)

    monkeypatch.setattr(bench, "seconds", seconds)
    times = bench.interleaved([bench.Run("step", lambda x: steps.append(x.data_ptr()))], torch.zeros(10), rounds=3)
    assert times == {"step": 6.0 / bench.MOST_COPIES}
    assert len(set(steps)) == bench.MOST_COPIES


def test_everybody_begins_in_turn() -> None:
    order: list[str] = []
    runs = [bench.Run(name, lambda x, name=name: order.append(name)) for name in "ab"]
    bench.interleaved(runs, torch.zeros(bench.SMALL), rounds=2)
    assert "".join(order) == "aaabbb" + "bbbaaa"


def test_events_time_the_device_from_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two events lies the work and nothing else: not what empties the cache."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 4.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    flush = SimpleNamespace(zero_=lambda: done.append("flush"))
    assert bench.seconds(lambda: done.append("work"), flush) == 0.004
    assert done == ["flush", "event", "work", "event", "wait"]
