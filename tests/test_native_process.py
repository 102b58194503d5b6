"""What the compiled backend does to the process: its threads, the lock, forked workers, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from test_native import grad, native, stats
from torch.utils.data import DataLoader, Dataset

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SHAPE = (64, 20_000)

PRELUDE = """
import os, sys, torch
import test_native as t
def count(): return len(os.listdir("/proc/self/task"))
x, y = torch.randn(64, 20_000), torch.arange(64)
def both():
    found = t.stats(x, y)
    return t.grad(x, y, found, *found[1:3])
"""


def run(code: str, **environment: str) -> str:
    """In a process of its own, with only what the code does to it."""
    paths = [*sys.path, os.path.dirname(__file__)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def problem():
    x, y = torch.randn(SHAPE), torch.arange(SHAPE[0])
    return x, y, stats(x, y)


@linux
def test_threads_are_torchs_own():
    assert run("torch.set_num_threads(3); torch.exp(x); a = count(); both(); print(count() - a)") == "0\n"
    # The other way round as well: torch's own operations then use the threads that were started here.
    code = "torch.set_num_threads(3); a = count(); both(); b = count(); torch.exp(x); print(b - a, count() - b)"
    assert run(code) == "2 0\n"


@linux
def test_one_openmp_runtime_is_loaded():
    paths = run("both(); print(*{l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split('/')[-1]})")
    assert len(paths.split()) == 1


@linux
def test_set_num_threads_is_obeyed():
    assert run("torch.set_num_threads(1); a = count(); both(); print(count() - a)") == "0\n"
    assert run("torch.set_num_threads(4); a = count(); both(); print(count() - a)") == "3\n"


@linux
def test_small_inputs_start_no_thread():
    assert run("torch.set_num_threads(4); x, y = x[:, :1000], y; a = count(); both(); print(count() - a)") == "0\n"


def test_the_number_of_threads_changes_no_bit():
    x, y, found = problem()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((stats(x, y).lse, grad(x, y, found, *found[1:3]), stats(x[:2].repeat(1, 5), y[:2]).lse))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_without_an_openmp_runtime_one_thread_does_the_work():
    x, y, found = problem()
    native._native.use_openmp(0, False)
    try:
        assert torch.equal(stats(x, y).lse, found.lse)
    finally:
        native._use_torch_openmp()


def test_the_lock_is_released():
    """Another Python thread makes progress during a call: during one of many, for the machine may be busy."""
    x, y = torch.randn(400, 50_000), torch.zeros(400, dtype=torch.int64)
    interval, ticks, running, during = sys.getswitchinterval(), [], True, 0

    def tick():
        while running:
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    sys.setswitchinterval(10)  # the lock changes hands only where it is given up
    thread = threading.Thread(target=tick)
    try:
        thread.start()
        for _ in range(200):
            begin = time.perf_counter()
            stats(x, y)
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
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return 4

    def __getitem__(self, index):
        found = stats(self.x, self.y)
        return grad(self.x, self.y, found, *found[1:3])


@linux
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # which is the point
def test_in_forked_data_loader_workers():
    x, y, found = problem()  # the parent's threads are running by now, and do not exist in the workers
    loader = DataLoader(Losses(x, y), num_workers=2, batch_size=2, multiprocessing_context="fork", timeout=60)
    for batch in loader:
        assert torch.equal(batch[0], grad(x, y, found, *found[1:3]))
        assert torch.equal(batch[0], batch[1])


@linux
def test_fresh_gradients_lie_in_huge_pages():
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        if "[never]" in file.read():
            pytest.skip("this system has no transparent huge pages")
    code = """
def huge(): return sum(int(l.split()[1]) for l in open("/proc/self/smaps") if l.startswith("AnonHugePages")) / 1024
a = huge(); x = torch.zeros(64, 500_000); b = huge(); d = both(); print(b - a, huge() - b)
"""
    before, after = map(float, run(code).split())
    assert after >= 100 > before  # MiB, of 122; the logits themselves are torch's affair


@linux
@pytest.mark.parametrize("counted", ["y[:80]", "y[::8]"], ids=["together", "scattered"])
def test_ignored_rows_of_a_fresh_gradient_take_no_memory(counted):
    code = f"""
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
x, y = torch.ones(640, 50_000), torch.full((640,), -100); {counted} = 0
found = t.stats(x, y)
before = resident(); d = t.grad(x, y, found, *found[1:3]); print(resident() - before, int(d.count_nonzero()) / 50_000)
"""
    grown, rows = map(float, run(code).split())
    assert 15 <= grown <= 40  # MiB, of 122
    assert rows == 80


@pytest.mark.parametrize(("N", "C", "ignored"), [(1800, 5001, 0.5), (180, 50_001, 0.8)])
def test_zeros_for_ignored_rows_of_a_large_gradient(N, C, ignored):
    """By ordinary stores, by such as go past the caches, and by none at all; rows begin at any address."""
    x, y = torch.randn(N, C), torch.arange(N)
    y[torch.rand(N) < ignored] = -100
    assert x.nbytes > 32 << 20
    found, step = stats(x, y)[:3], N // 18
    expected = []
    for rows in (slice(i, i + step) for i in range(0, N, step)):
        part = [stat[rows] for stat in found]
        expected.append(grad(x[rows], y[rows], part, *part[1:]))
    expected = torch.cat(expected)
    assert torch.equal(expected.eq(0).all(1), y == -100)
    for out in (None, torch.full_like(x, float("nan")), x):
        assert torch.equal(grad(x, y, found, *found[1:], out=out), expected)


@pytest.mark.slow
def test_more_than_2_to_the_31_logits():
    """bfloat16 and in place: 4.3 GB. All rows alike but the last, which a 32-bit index would not reach."""
    N, C = 43_000, 50_257
    assert N * C > 2**31
    common, last = torch.randn(1, C).bfloat16(), torch.randn(1, C).bfloat16()
    x = torch.empty(N, C, dtype=torch.bfloat16)
    x[:-1], x[-1] = common, last
    y = torch.arange(N) % C
    y[N - 2] = -100
    found = stats(x, y)
    for rows, logits in (slice(-2), common), (slice(-1, None), last):
        u = logits.double() - logits.max()
        assert torch.equal(found.top[rows], logits.max().double().expand(len(found.top[rows])))
        assert (found.lse[rows] - u.logsumexp(1)).abs().max() < 1e-6
        assert torch.equal(found.picked[rows], u[0, y[rows]])
    g = torch.ones(N, dtype=torch.float64)
    assert grad(x, y, found, g, -g, out=x) is x
    for row, logits in [(0, common), (N // 2, common), (N - 3, common), (N - 1, last)]:
        truth = torch.softmax(logits.double(), 1)[0]
        truth[y[row]] -= 1
        assert ((x[row] - truth).abs() <= truth.abs() * 2**-8).all()
    assert x[N - 2].eq(0).all()
