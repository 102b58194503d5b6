"""What the compiled backend does to the process: its threads, the lock, forked workers, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from oracle import Upstream, each, grad_of, stats_of
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xent._records import Stats
from xent._rows import dispatch as _primitives

native = _primitives.load("native")
assert not isinstance(native, str), native

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SHAPE = (64, 20_000)

PRELUDE = """
import os, sys, torch
from oracle import Upstream, grad_of, stats_of
def count(): return len(os.listdir("/proc/self/task"))
def both(x, y):
    found = stats_of(x, y)
    return grad_of(x, y, found, Upstream(*found[1:3]))
x, y = torch.randn(64, 20_000), torch.arange(64)
"""


@pytest.fixture(autouse=True)
def on_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", "native")


def run(code: str) -> str:
    """In a process of its own, with only what the code does to it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XENT_BACKEND": "native"}
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def problem() -> tuple[Tensor, Tensor, Stats]:
    x, y = torch.randn(SHAPE), torch.arange(SHAPE[0])
    return x, y, stats_of(x, y)


def gradient(x: Tensor, y: Tensor, found: Stats, out: Tensor | None = None) -> Tensor:
    return grad_of(x, y, found, Upstream(*found[1:3]), out=out)


@linux
def test_threads_are_torchs_own() -> None:
    """Whoever comes first; and torch's own number of them is obeyed."""
    first = "torch.set_num_threads(3); torch.exp(x); a = count(); both(x, y); print(count() - a)"
    assert run(first) == "0\n"
    # The other way round: none for little, as many as torch may have for much, and then torch uses the same ones.
    code = """
started = []
for threads, classes in ((4, 1000), (1, 20_000), (4, 20_000)):
    torch.set_num_threads(threads)
    before = count()
    both(x[:, :classes], y)
    started.append(count() - before)
before = count()
torch.exp(x)
print(*started, count() - before)
print(len({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}))
"""
    assert run(code) == "0 0 3 0\n1\n", "threads started by each call; and OpenMP runtimes"


def test_the_number_of_threads_changes_no_bit() -> None:
    x, y, found = problem()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((stats_of(x, y).lse, gradient(x, y, found), stats_of(x[:2].repeat(1, 5), y[:2]).lse))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_without_an_openmp_runtime_one_thread_does_the_work() -> None:
    x, y, found = problem()
    native._native.use_openmp(0, False, 0)
    try:
        assert torch.equal(stats_of(x, y).lse, found.lse)
    finally:
        native._use_torch_openmp()


def test_the_lock_is_released() -> None:
    """Another Python thread makes progress during a call: during one of many, for the machine may be busy."""
    x, y = torch.randn(400, 50_000), torch.zeros(400, dtype=torch.int64)
    interval, ticks, running, during = sys.getswitchinterval(), [], True, 0

    def tick() -> None:
        while running:
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    sys.setswitchinterval(10)  # the lock changes hands only where it is given up
    thread = threading.Thread(target=tick)
    try:
        thread.start()
        for _ in range(200):
            begin = time.perf_counter()
            stats_of(x, y)
            end = time.perf_counter()
            during += sum(begin < t < end for t in ticks[-100:])
            if during >= 3:
                break
    finally:
        running = False
        thread.join()
        sys.setswitchinterval(interval)
    assert during >= 3


class Losses(Dataset):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return gradient(self.x, self.y, stats_of(self.x, self.y))


@linux
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # which is the point
def test_in_forked_data_loader_workers() -> None:
    x, y, found = problem()  # the parent's threads are running by now, and do not exist in the workers
    loader = DataLoader(Losses(x, y), num_workers=1, batch_size=2, multiprocessing_context="fork", timeout=60)
    for batch in loader:
        assert torch.equal(batch[0], gradient(x, y, found))
        assert torch.equal(batch[0], batch[1])


@linux
def test_fresh_gradients_lie_in_huge_pages_and_ignored_rows_of_them_nowhere() -> None:
    """Once in pages of 2 MB; where most rows are ignored, together or scattered, only the others take memory."""
    code = """
def huge(): return sum(int(l.split()[1]) for l in open("/proc/self/smaps") if l.startswith("AnonHugePages")) / 1024
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
a = huge(); x = torch.zeros(64, 500_000); b = huge(); d = both(x, y); print(b - a, huge() - b)
del x, d
for counted in (slice(0, 80), slice(0, 640, 8)):
    x, y = torch.ones(640, 50_000), torch.full((640,), -100); y[counted] = 0
    found = stats_of(x, y)
    before = resident()
    d = grad_of(x, y, found, Upstream(*found[1:3]))
    print(resident() - before, int(d.count_nonzero()) / 50_000)
    del x, d
"""
    (before, after), *ignored = (map(float, line.split()) for line in run(code).splitlines())
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        assert "[never]" in file.read() or after >= 100 > before  # MiB, of 122; the logits are torch's affair
    for grown, rows in ignored:
        assert 15 <= grown <= 40  # MiB, of 122
        assert rows == 80


@pytest.mark.parametrize(("N", "C", "ignored"), [(1800, 5001, 0.5), (180, 50_001, 0.8)])
def test_zeros_for_ignored_rows_of_a_large_gradient(N: int, C: int, ignored: float) -> None:
    """By ordinary stores, by such as go past the caches, and by none at all; rows begin at any address."""
    x, y = torch.randn(N, C), torch.arange(N)
    y[torch.rand(N) < ignored] = -100
    assert x.nbytes > 32 << 20
    found, step = stats_of(x, y), N // 18
    expected = []
    for rows in (slice(i, i + step) for i in range(0, N, step)):
        part = each(lambda row, rows=rows: row[rows], found)
        expected.append(gradient(x[rows], y[rows], part))
    expected = torch.cat(expected)
    assert torch.equal(expected.eq(0).all(1), y == -100)
    for out in (None, torch.full_like(x, float("nan")), x):
        assert torch.equal(gradient(x, y, found, out), expected)


@pytest.mark.slow
def test_more_than_2_to_the_31_logits() -> None:
    """bfloat16 and in place: 4.3 GB. All rows alike but the last, which a 32-bit index would not reach."""
    N, C = 43_000, 50_257
    assert N * C > 2**31
    common, last = torch.randn(1, C).bfloat16(), torch.randn(1, C).bfloat16()
    x = torch.empty(N, C, dtype=torch.bfloat16)
    x[:-1], x[-1] = common, last
    y = torch.arange(N) % C
    y[N - 2] = -100
    found = stats_of(x, y)
    for rows, logits in (slice(-2), common), (slice(-1, None), last):
        u = logits.double() - logits.max()
        assert torch.equal(found.top[rows], logits.max().double().expand(len(found.top[rows])))
        assert (found.lse[rows] - u.logsumexp(1)).abs().max() < 1e-6
        assert torch.equal(found.picked[rows], u[0, y[rows]])
    g = torch.ones(N, dtype=torch.float64)
    assert grad_of(x, y, found, Upstream(g, -g), out=x) is x
    for row, logits in [(0, common), (N // 2, common), (N - 3, common), (N - 1, last)]:
        truth = torch.softmax(logits.double(), 1)[0]
        truth[y[row]] -= 1
        assert ((x[row] - truth).abs() <= truth.abs() * 2**-8).all()
    assert x[N - 2].eq(0).all()
