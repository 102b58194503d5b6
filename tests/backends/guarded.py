"""Run by test_native_memory.py in a process of its own: rows between two pages that nobody may read or write."""

from __future__ import annotations

import ctypes
import itertools
import mmap

import oracle
import torch
from oracle import EVERYTHING, grad_of, stats_of, upstream
from torch import Tensor

from xent._records import compute_dtype
from xent._rows import dispatch

PAGE = mmap.PAGESIZE
SHAPES = [(N, C) for N in (16, 21, 40) for C in (1, 2, 3, 7, 10, 17, 45, 61, 190)] + [(3, 9), (3, 1100), (20, 700)]


def guarded(x: Tensor, at_end: bool) -> Tensor:
    """The same numbers, directly before the second page, or behind the first."""
    size = -(-x.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + size):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    first = PAGE + (size - x.nbytes if at_end else 0)
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=first).view(x.shape).copy_(x)


def both(x: Tensor, target: Tensor, w: Tensor, rows: bool) -> list[Tensor]:
    """All statistics, and the gradient in place; of images the other way round."""
    x, target = (t if rows or t.dim() == 1 else t.t() for t in (x, target))
    stats = stats_of(x, target, EVERYTHING, w)
    return [*stats.pack(), grad_of(x, target, stats, upstream(len(x)), out=x)]


def the_same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included: `assert_close` would take longer than all the rest."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.view(bits), b.view(bits))


def main() -> None:
    """Prints each case before it is tried, since a fault ends the process."""
    native = dispatch.load("native")
    for name in native._native.instruction_sets():  # type: ignore[union-attr]
        native._native.use(name)  # type: ignore[union-attr]
        for (N, C), dtype in itertools.product(SHAPES, oracle.ALL_DTYPES):
            w = torch.rand(C, dtype=compute_dtype(torch.empty(0, dtype=dtype)))
            for soft, rows in itertools.product((False, True), (True, False)):
                given = [*oracle.rows(dtype, N=N, C=C, soft=soft), w]
                given = [t if rows or t.dim() == 1 else t.t().contiguous() for t in given]
                expected = both(*[t.clone() for t in given], rows)
                for at_end in (True, False):
                    print(f"{name}, {N} rows of {C} {dtype}, {soft=}, {rows=}, {at_end=}", flush=True)
                    assert all(map(the_same, both(*[guarded(t, at_end) for t in given], rows), expected))
        for n, C in ((15, 7), (16, 48), (33, 100)):
            print(f"{name}, logits of {n} rows and {C} classes", flush=True)
            h, W, out = (guarded(t, True) for t in (torch.randn(n, 200), torch.randn(C, 200), torch.zeros(n, C)))
            dispatch.linear(h, W, out)
            assert ((out - h.double() @ W.double().t()).abs() < 1e-4).all()
    print("all")


if __name__ == "__main__":
    main()
