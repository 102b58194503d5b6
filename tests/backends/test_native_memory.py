"""Gradients into memory that the allocator hands out with its pages, as tcmalloc does, and into fresh pages."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import NOTHING, Upstream, grad_of, stats_of, upstream
from torch import Tensor

from xent._rows import dispatch as _primitives

native = _primitives.load("native")
assert not isinstance(native, str), native

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the system for residency")
BYTES = 40 << 20


@pytest.fixture(autouse=True)
def on_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", "native")


def resident(x: Tensor) -> bool:
    return native._native.resident(x.data_ptr(), x.nbytes)


def memory(like: Tensor, *, used: bool, offset: int = 0) -> Tensor:
    """Pages from the system; `used` are full of NaN."""
    x = torch.frombuffer(mmap.mmap(-1, like.nbytes + 64, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=like.dtype)
    x = x[offset : offset + like.numel()].view_as(like)
    return x.fill_(float("nan")) if used else x


def take(monkeypatch: pytest.MonkeyPatch, out: Tensor) -> None:
    """For a result, instead of what torch's allocator has; not for one in place."""
    make = native._memory
    monkeypatch.setattr(native, "_memory", lambda given, *rest: make(out[None] if given is None else given, *rest))


@linux
@pytest.mark.parametrize("written", [(), (0,), (0, 0.5, 1), (0, 0.3), None])
def test_residency(written: tuple[float, ...] | None) -> None:
    """Fresh, touched here and there, used."""
    x = memory(torch.empty(BYTES, dtype=torch.uint8), used=False)
    x.fill_(1) if written is None else [x[int(at * (BYTES - 1))].fill_(1) for at in written]
    assert resident(x) is (written is None)


@linux
@pytest.mark.parametrize("used", [True, False])
def test_used_pages_are_kept(used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of ignored rows, too. Fresh ones of these never come to be."""
    x, y = torch.zeros(200, 50_000), torch.full((200,), -100)
    y[:20] = 0
    found = stats_of(x, y)
    out = memory(x, used=used, offset=3)
    out[-1, -8:] = float("nan")  # in the last page, which is not whole, and so not given back
    assert out._base is not None
    before = out._base[:3].fill_(7)  # in the first one, of which others have a part
    take(monkeypatch, out)
    grad = grad_of(x, y, found, Upstream(*found[1:3]))
    assert resident(grad) is used
    assert grad[20:].count_nonzero() == 0
    assert grad[:20].count_nonzero() == 20 * 50_000
    assert before.eq(7).all()


@linux
def test_pages_that_are_shared_cannot_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no zeros then, not even where they have just been tried."""
    x, y = torch.zeros(200, 50_000), torch.full((200,), -100)
    y[-20:] = 0
    out = torch.frombuffer(mmap.mmap(-1, x.nbytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS), dtype=x.dtype)
    take(monkeypatch, out.view_as(x))
    assert grad_of(x, y, stats_of(x, y), upstream(200, False, False))[:180].count_nonzero() == 0


CASES = [  # rows, classes, how far from a cache line the gradient begins, what else
    (180, 50_257, 1, "all"),
    (350, 50_257, 3, "bfloat16"),
    (90, 50_257, 1, "float64"),
    (2, 5_000_000, 1, "float32"),
    (1_000_000, 10, 0, "float32"),
]


@linux
@pytest.mark.parametrize(("N", "C", "offset", "what"), CASES)
def test_the_memory_changes_no_bit(N: int, C: int, offset: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(N, C, dtype=torch.float32 if what == "all" else getattr(torch, what))
    y = torch.arange(N) % C
    y[::7] = -100
    reading = {"scale": 1.5, "softcap": 20.0} if what == "all" else {}
    weight = torch.rand(C) if what == "all" else None
    found = stats_of(x, y, NOTHING, weight, **reading)
    g = torch.rand(N, dtype=torch.float64)
    given = Upstream(g, -g, g, g) if what == "all" else Upstream(g, -g)
    grads = []
    for used in (True, False):
        take(monkeypatch, memory(x, used=used, offset=offset))
        grads.append(grad_of(x, y, found, given, weight, **reading))
    grads.append(grad_of(x, y, found, given, weight, out=x, **reading))
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@linux
def test_an_allocator_that_keeps_its_pages() -> None:
    """With glibc as it is, large memory is fresh each time; told to keep what it has, it hands that out again."""
    code = """
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native, c = importlib.util.module_from_spec(spec), ctypes.CDLL(None)
c.malloc.argtypes, c.malloc.restype, c.free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(2):
    memory = c.malloc(BYTES)
    print(native.resident(memory, BYTES))
    ctypes.memset(memory, 1, BYTES)
    c.free(memory)
""".replace("BYTES", str(BYTES))
    keeping = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    for tunables, expected in ({}, "False\nFalse\n"), (keeping, "False\nTrue\n"):
        command = [sys.executable, "-c", code, native._native.__file__]
        done = subprocess.run(command, env=os.environ | tunables, capture_output=True, text=True, timeout=120)
        assert done.stdout == expected, done.stderr


@linux
def test_nothing_beside_the_rows_is_touched() -> None:
    """Not even read: a matrix may end where a page does, and the next one belong to nobody."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XENT_BACKEND": "native"}
    command = [sys.executable, str(Path(__file__).with_name("guarded.py"))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    last = (done.stdout.splitlines() or [""])[-1]
    assert last == "all", f"{last}: {done.stderr or done.returncode}"
