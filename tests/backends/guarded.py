"""Run by test_native_memory.py in a process of its own: rows between two pages that nobody may read or write."""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
from collections.abc import Callable

import oracle
import torch
from oracle import EVERYTHING, grad_of, stats_of, upstream
from torch import Tensor

from xent._records import RowSpec, compute_dtype
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


def sparse(x: Tensor, y: Tensor, h: Tensor, hold: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The entries of the rows; the same as those of the classes; and the products of these with h."""
    native, C, stats = dispatch.load("native"), x.shape[1], stats_of(x, y)
    numbers = stats.top[None], stats.lse[None], torch.linspace(0, 0.9, len(x)).double()
    counts, classes, p = dispatch.row_samples(hold(x)[None], y[None], *numbers, RowSpec(classes=C), 1 / 16)
    moved = [hold(t) for t in (torch.zeros(C, dtype=torch.int64), classes, p)]
    native._native.transpose(*[hold(t) for t in (counts.cumsum(0), classes, p)], *moved)  # type: ignore[union-attr]
    return [counts, classes, p, *moved, dispatch.gather_sums(*moved, hold(h), h.dtype)]


def the_same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included: `assert_close` would take longer than all the rest."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.view(bits), b.view(bits))


def main() -> None:
    """Prints each case before it is tried, since a fault ends the process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # others would wait longer for their turn than they work
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
        for (N, C), dtype in itertools.product([(3, 9), (16, 45), (20, 700)], oracle.ALL_DTYPES):
            print(f"{name}, entries of {N} rows of {C} {dtype}", flush=True)
            given = [*oracle.rows(dtype, N=N, C=C), torch.randn(N, 45).to(dtype)]
            found, expected = (sparse(*given, hold) for hold in (functools.partial(guarded, at_end=True), torch.clone))
            assert all(map(the_same, found, expected))
        for (n, C), dtype in itertools.product([(15, 7), (16, 48), (33, 100)], oracle.ALL_DTYPES):
            print(f"{name}, logits of {n} rows and {C} classes in {dtype}", flush=True)
            h, W = (torch.randn(k, 200).to(dtype) for k in (n, C))
            expected, out = h.double() @ W.double().t(), torch.zeros(n, C, dtype=compute_dtype(h))
            h, W, out = (guarded(t, True) for t in (h, W, out))
            dispatch.linear(h, W, out)
            assert ((out - expected).abs() < 1e-4).all()
    print("all")


if __name__ == "__main__":
    main()
