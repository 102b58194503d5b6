"""The linear section of bench.py: a head and its loss together, from hidden states (N, D) and a weight (C, D).

Time is forward + backward, with the gradients of both. Its unit is that of three bare matrix products, which any
implementation that keeps the logits' gradient out of memory has to do (`reduction="none"` four). Memory is the peak in
a fresh process beyond what is held before, less the gradients themselves, and for a half-precision head less the
float32 sum of its gradient: in MiB, for this N and for 8 times as many rows.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from memory import growth
from report import Row
from timing import Run, interleaved
from torch import Tensor
from torch.nn import functional as F

import xent

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, D), weight (C, D), target (N,) -> loss
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3, "float64": 1e-12}
PRODUCTS = "three bare products"
BLOCKS = (128, 256, 512, 1024)  # rows that F.linear_cross_entropy may take at a time, to find its best


@dataclass(frozen=True)
class Shape:
    """N rows of D features and C classes. Written 2048x768x50257."""

    N: int
    D: int
    C: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Raises ValueError, as argparse expects it."""
        shape = cls(*map(int, text.split("x")))
        if min(shape.N, shape.D, shape.C) < 2:
            raise ValueError(text)
        return shape

    def __str__(self) -> str:
        """As `parse` takes it."""
        return f"{self.N}x{self.D}x{self.C}"

    def inputs(self, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight and targets, the logits of unit variance."""
        g = torch.Generator(device).manual_seed(0)
        h = torch.randn(self.N, self.D, generator=g, device=device)
        W = torch.randn(self.C, self.D, generator=g, device=device) * self.D**-0.5
        y = torch.randint(self.C, (self.N,), generator=g, device=device)
        kind = getattr(torch, dtype)
        return h.to(kind).requires_grad_(), W.to(kind).requires_grad_(), y


DEFAULT = Shape(2048, 768, 50257)


def plain(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """The usual two lines."""
    return F.cross_entropy(F.linear(h, W), y)


def chunked(rows: int | None, h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """torch's own, which takes some rows at a time: its default, or `rows`."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return F.linear_cross_entropy(h, W, y, options=options)


@cache
def compiler() -> Head:
    """Only when it is asked for: torch's compiler takes seconds to import."""
    return torch.compile(plain, dynamic=False)


def compiled(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """The usual two lines, compiled."""
    return compiler()(h, W, y)


def ours(reduction: str, h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """xent; "none" with a mean that autograd knows nothing of in advance."""
    return xent.linear_cross_entropy(h, W, y, reduction=reduction).mean()


HEADS: dict[str, Head] = {
    "F.linear + F.cross_entropy": plain,
    "torch.compile of these": compiled,
    "xent": partial(ours, "mean"),
    "xent, reduction none": partial(ours, "none"),
}
if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
    HEADS["F.linear_cross_entropy"] = partial(chunked, None)
    HEADS |= {f"F.linear_cross_entropy, {rows} rows": partial(chunked, rows) for rows in BLOCKS}


def gradients(head: Head, h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The loss and its gradients: the work that is timed."""
    loss = head(h, W, y)
    return loss, *torch.autograd.grad(loss, (h, W))


def error(head: Head, inputs: tuple[Tensor, Tensor, Tensor], truth: tuple[Tensor, ...]) -> float:
    """The largest relative error, of the loss or of the whole of a gradient."""
    found = [t.detach().double() for t in gradients(head, *inputs)]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))


def bare(inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[Tensor], object]:
    """The three products alone, each into a tensor of its own; the logits' gradient is any (N, C)."""
    _, W, _ = inputs
    G: list[Tensor] = []

    @torch.no_grad()
    def products(h: Tensor) -> object:
        if not G:
            G.append(torch.mm(h, W.t()))
        return torch.mm(h, W.t()), torch.mm(G[0], W), torch.mm(G[0].t(), h)

    return products


def measure(shape: Shape, dtype: str, device: str, threads: int, rounds: int, peak: bool) -> Iterator[Row]:
    """A row for each contender, checked against float64, then timed."""
    torch.set_num_threads(threads)
    inputs = h, W, y = shape.inputs(dtype, device)
    exact = h.detach().double().requires_grad_(), W.detach().double().requires_grad_(), y
    truth = tuple(t.detach() for t in gradients(plain, *exact))
    rows = {name: Row("linear", str(shape), dtype, device, name, threads) for name in (PRODUCTS, *HEADS)}
    runs, seconds = [Run(PRODUCTS, bare(inputs))], dict[str, float]()
    for name, head in HEADS.items():
        row = rows[name]
        begin = time.perf_counter()
        try:
            row.error = error(head, inputs, truth)
        except Exception as reason:  # a compiler that is not there; but xent has to work
            row.status, row.note = "failed" if head is HEADS["xent"] else "unavailable", f"{type(reason).__name__}"
            continue
        seconds[name] = time.perf_counter() - begin
        if row.error <= TOLERANCE[dtype]:
            runs.append(Run(name, lambda h, head=head: gradients(head, h, W, y)))  # type: ignore[misc]
        else:
            row.status, row.note = "wrong", f"error {row.error:.1e}, expected at most {TOLERANCE[dtype]:.0e}"
    del exact, truth
    slower = sorted((name for name in seconds if name.endswith(" rows")), key=seconds.__getitem__)[1:]
    times = interleaved([run for run in runs if run.name not in slower], h, rounds=rounds, threads=threads)
    for name, row in rows.items():
        if name in slower:
            continue
        if name in times:
            row.ms = times[name].median * 1e3
            row.ratio = times[name].median / times[PRODUCTS].median
            if peak and name != PRODUCTS and device == "cpu":
                row.extra_mib = [extra(name, shape, dtype, threads, times_N) for times_N in (1, 8)]
        yield row


def extra(name: str, shape: Shape, dtype: str, threads: int, times: int) -> float:
    """MiB beyond the gradients, in a fresh process, of `times` as many rows."""
    size = str(Shape(shape.N * times, shape.D, shape.C))
    command = [sys.executable, __file__, name, size, dtype, str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(child.stdout.split()[-1])


def memory_curves(shape: Shape, dtype: str, threads: int) -> tuple[list[int], dict[str, list[float]]]:
    """`extra` for a quarter to 8 times the rows, for those contenders whose memory differs."""
    rows = [shape.N // 4 * 2**i for i in range(6)]
    names = [name for name in HEADS if not name.endswith((" none", " rows"))]
    quarter = Shape(shape.N // 4, shape.D, shape.C)
    return rows, {name: [extra(name, quarter, dtype, threads, n // rows[0]) for n in rows] for name in names}


def main() -> None:
    """The fresh process: prints one number. Arguments as `extra` passes them."""
    name, size, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    shape = Shape.parse(size)
    h, W, y = shape.inputs(dtype, "cpu")
    sums = W.numel() * 4 if W.element_size() == 2 else 0

    def step(rows: slice = slice(None)) -> None:
        gradients(HEADS[name], h[rows], W, y[rows])

    step(slice(1024))  # imports, threads, compilation, the buffers that a BLAS keeps
    grown = growth(step) - h.nbytes - W.nbytes - (sums if name.startswith("xent") else 0)
    print(grown / 2**20)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
