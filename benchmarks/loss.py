"""The loss section of bench.py: cross-entropy from logits, checked against float64 and then timed.

Every contender does the same work: `loss = f(logits, target)`, then `torch.autograd.grad(loss, logits)` on a leaf,
so that the gradient is really written. Two more rows are no losses but limits: what the memory alone takes.

Bytes. Forward must read the logits once; backward must read them again and write the gradient: 3 bytes for a byte
of logits. Of an ignored row only the zeros of the gradient are needed: 1. `logits.clone()` and `copy_` read once
and write once: 2. GB/s is this count over the time for everybody, whatever a contender really moves. On CPU the
first write to new memory costs page faults, often more than the copy itself: `logits.clone()` has them and `copy_`
into old memory has not. (Below 32 MiB glibc hands out old memory again, and nobody has them.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from contenders import BASELINE, CONTENDERS, COPY, IGNORE, Contender, Loss, Unavailable
from memory import SMALLEST, growth, peak_of
from report import Row
from timing import Run, forced, interleaved
from torch import Tensor

# The largest error against float64 that passes. F.cross_entropy's own: 1e-6 in float32, 3e-2 in bfloat16.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 6e-2}


@dataclass(frozen=True)
class Case:
    """A shape, classes last, and the share of targets that is ignored. Written 4x256x50257 or 4x256x50257:0.7."""

    shape: tuple[int, ...]
    ignored: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Case:
        """Raises ValueError for text of any other form."""
        size, _, ignored = text.partition(":")
        case = cls(tuple(int(n) for n in size.split("x")), float(ignored or 0))
        if len(case.shape) < 2 or min(case.shape) < 1 or case.shape[-1] < 2 or not 0 <= case.ignored < 1:
            raise ValueError(text)
        return case

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return "x".join(map(str, self.shape)) + (f":{self.ignored}" if self.ignored else "")

    def inputs(self, dtype: str, device: str) -> tuple[Tensor, Tensor]:
        """Standard normal logits, a leaf, and uniform targets, of which the first one always counts."""
        torch.manual_seed(0)
        logits = torch.empty(self.shape, dtype=getattr(torch, dtype), device=device).normal_().requires_grad_()
        target = torch.randint(self.shape[-1], self.shape[:-1], device=device)
        others = target.view(-1)[1:]
        others[torch.rand(others.shape, device=device) < self.ignored] = IGNORE
        return logits, target


CASES = [
    Case((8, 3, 27)),
    Case((4096, 1000)),
    Case((1_000_000, 32)),
    Case((4, 256, 50257)),
    Case((4, 256, 50257), ignored=0.7),
    Case((2, 128, 128256)),
]
CUDA_CASES = [
    Case((4096, 1000)),
    Case((1_000_000, 32)),
    Case((8, 1024, 50257)),
    Case((8, 1024, 50304)),
    Case((8, 1024, 50257), ignored=0.7),
    Case((4, 1024, 128256)),
    Case((16, 128256)),  # few rows: each is shared by many programs
]
QUICK = [Case((8, 3, 27)), Case((2, 128, 50257))]


class Truth:
    """The loss and its gradient in float64, from the formula and not through any contender's code."""

    def __init__(self, logits: Tensor, target: Tensor) -> None:
        x, y = logits.detach().flatten(0, -2).double(), target.flatten()
        keep = y != IGNORE
        self.at = y.clamp(min=0)[:, None]
        self.counted = keep.double().mean().item()
        lse = x.logsumexp(1)
        self.loss = (lse - x.gather(1, self.at)[:, 0])[keep].mean().item()
        share = (keep.double() / keep.sum())[:, None]
        p = (x - lse[:, None]).exp_()
        self.picked = share * (p.gather(1, self.at) - 1)
        self.rest = p.mul_(share).scatter_(1, self.at, 0)
        self.rest_norm = self.rest.norm(dim=1)

    def error(self, loss: Tensor, grad: Tensor) -> float:
        """The largest of three relative errors: of the loss, of a target's entry, of the rest of a row.

        The two are kept apart, and each row is measured by its own norm, since the entries of a row shrink like
        1 / (N C): beside the target's entry, or under an absolute tolerance, nobody would miss the rest.
        """
        g = grad.flatten(0, -2).double()
        picked = _relative((g.gather(1, self.at) - self.picked).abs(), self.picked.abs())
        rest = _relative((g.scatter(1, self.at, 0) - self.rest).norm(dim=1), self.rest_norm)
        value = torch.tensor(abs(loss.item() - self.loss) / abs(self.loss))
        return torch.stack([value, picked.max().cpu(), rest.max().cpu()]).max().item()  # NaN stays NaN


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """error / size; where nothing was due (an ignored row), nothing is right and anything else infinitely wrong."""
    return torch.where(error == 0, 0, error / size)


def bytes_moved(logits: Tensor, counted: float, contender: Contender) -> float:
    """The count at the top of this file; `counted` is the share of rows with a target."""
    return logits.nbytes * (2 if contender.limit else 3 * counted + (1 - counted))


def gradient(loss: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The work that is timed: forward and backward."""
    value = loss(logits, target)
    return value, torch.autograd.grad(value, logits)[0]


def step_of(contender: Contender, loss: Loss, target: Tensor) -> Run:
    """The contender for timing.py: a step on given logits."""
    work = loss if contender.limit else partial(gradient, loss)
    return Run(contender.name, lambda logits: work(logits, target), contender.backend)


def check(contender: Contender, loss: Loss, logits: Tensor, target: Tensor, truth: Truth) -> float:
    """Its error against float64. Works on a copy: the contender may overwrite it."""
    with forced(contender.backend):
        value, grad = gradient(loss, logits.detach().clone().requires_grad_(), target)
    return truth.error(value.detach(), grad)


def admit(row: Row, contender: Contender, logits: Tensor, target: Tensor, truth: Truth) -> Run | None:
    """The contender ready to be timed; or None, and `row` says why."""
    try:
        loss = contender.ready(logits, target)
        if not contender.limit:
            row.error = check(contender, loss, logits, target, truth)
    except Unavailable as reason:
        row.status, row.note = "unavailable", str(reason)
    except Exception as error:  # a peer, or a compiler that is not there; but xent has to work
        row.status, row.note = "failed" if contender.backend else "unavailable", f"{type(error).__name__}: {error}"
    else:
        if row.error is None or row.error <= TOLERANCE[row.dtype]:
            return step_of(contender, loss, target)
        row.status, row.note = "wrong", f"error {row.error:.1e}, expected at most {TOLERANCE[row.dtype]:.0e}"
    return None


def memory(row: Row, contender: Contender, case: Case, logits: Tensor, target: Tensor) -> None:
    """Peak memory in units of the logits, gradient included, into `row`, unless it cannot be told from noise."""
    if row.status != "ok" or contender.limit:
        return
    if logits.device.type == "cpu":
        if logits.nbytes < SMALLEST:
            return
        code = f"from contenders import loss_named; loss = loss_named({contender.name!r})"
        try:
            row.memory = peak_of("loss(logits, target)", case.shape, row.dtype, setup=code, ignored=case.ignored)
        except RuntimeError as error:  # the fresh process failed: out of memory, say
            row.note = f"peak memory: {error}"
        return
    x = logits.detach().clone().requires_grad_()
    loss = contender.make()
    with forced(contender.backend):
        gradient(loss, x, target)  # compiles, fills caches
        row.memory = growth(lambda: gradient(loss, x, target), "cuda") / logits.nbytes


def measure(case: Case, dtype: str, device: str, threads: Sequence[int], rounds: int, peak: bool) -> Iterator[Row]:
    """All contenders on one case: a row for each contender and number of threads, checked, then timed."""
    logits, target = case.inputs(dtype, device)
    truth = Truth(logits, target)
    peaks: dict[Contender, float | None] = {}
    for count in threads:
        torch.set_num_threads(count)
        rows = {c: Row("loss", str(case), dtype, device, c.name, count) for c in CONTENDERS}
        runs = [run for c, row in rows.items() if (run := admit(row, c, logits, target, truth))]
        times = interleaved(runs, logits, rounds=rounds, threads=count)
        if peak and not peaks:  # once is enough; on CPU two processes at a time, since no clock is running now
            with ThreadPoolExecutor(2 if device == "cpu" else 1) as pool:
                list(pool.map(lambda c, row: memory(row, c, case, logits, target), rows, rows.values()))
            peaks = {c: row.memory for c, row in rows.items()}
        for c, row in rows.items():
            row.memory = peaks.get(c)
            if row.status == "ok":
                seconds = times[c.name].median
                row.ms = seconds * 1e3
                row.ratio = seconds / times[BASELINE].median if BASELINE in times else None
                row.gb_per_s = bytes_moved(logits, truth.counted, c) / seconds / 1e9
        copied = next((row.gb_per_s for c, row in rows.items() if c.name == COPY), None)
        for row in rows.values():
            row.of_copy = row.gb_per_s / copied if row.gb_per_s and copied else None
            yield row
