"""What bench.py measures: cases, each with its inputs, its contenders and what is compared. A case is a line in CASES.

- `Case`: cross-entropy from logits. Bytes: forward must read the logits once; backward must read them again and write
  the gradient: 3 bytes for a byte of logits. Of an ignored row only the zeros of the gradient are needed: 1.
  `logits.clone()` and `copy_` read once and write once: 2. On CPU the first write to new memory costs page faults,
  often more than the copy itself: `clone()` has them, but not below 32 MiB, where glibc hands out old memory again.
- `Linear`: a head and its loss together, from hidden states (N, D) and a weight (C, D), with the gradients of both.
  The limit is three bare matrix products (`reduction="none"`: four), with the logits' gradient kept out of memory.
- `Sparse`: a head with a sparse gradient. The limit is one bare product.
- `Small`: a few rows, where the call itself is what takes the time, once for each of OPTIONS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from contenders import HEADS, IGNORE, LOGITS, OPTIONS, SPARSE, Contender, Loss, flat, forced, gradients, plain
from memory import SMALLEST, WARM, growth, in_fresh_process
from torch import Tensor
from torch.nn import functional as F

import xent


@dataclass(frozen=True)
class Case:
    """Logits, classes last, and the share of targets that is ignored. Written 4x256x50257 or 4x256x50257:0.7."""

    shape: tuple[int, ...]
    ignored: float = 0.0

    section: ClassVar[str] = "loss"
    warm: ClassVar[str] = WARM  # before memory is measured
    processes: ClassVar[int] = 2  # that measure memory at a time

    def contenders(self) -> dict[str, Contender]:
        """By name, the baseline first."""
        return LOGITS

    def truth(self) -> Loss:
        """What is right, given float64."""
        return flat(F.cross_entropy)

    def rounds(self, asked: int) -> int:
        """How many timings of each contender."""
        return asked

    @classmethod
    def parse(cls, text: str) -> Case:
        """Raises ValueError for text of any other form."""
        size, _, ignored = text.partition(":")
        case = cls(tuple(int(n) for n in size.split("x")), float(ignored or 0))
        if not (len(case.shape) >= 2 and min(case.shape) >= 1 and case.shape[-1] >= 2 and 0 <= case.ignored < 1):
            raise ValueError(text)
        return case

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return "x".join(map(str, self.shape)) + (f":{self.ignored}" if self.ignored else "")

    def inputs(self, dtype: str, device: str) -> list[Tensor]:
        """Standard normal logits, a leaf, and uniform targets, of which the first one always counts."""
        torch.manual_seed(0)
        logits = torch.empty(self.shape, dtype=getattr(torch, dtype), device=device).normal_().requires_grad_()
        return [logits, self.targets(self.shape[:-1], device)]

    def targets(self, shape: tuple[int, ...], device: str) -> Tensor:
        """Of this case's classes."""
        target = torch.randint(self.shape[-1], shape, device=device)
        others = target.view(-1)[1:]
        others[torch.rand(others.shape, device=device) < self.ignored] = IGNORE
        return target

    def parts(self, found: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """What is compared row by row: losses; of the gradient the targets' entries, and the rest.

        These two are kept apart, and each row is measured by its own norm, since the entries of a row shrink like
        1 / (N C): beside the target's entry, or under an absolute tolerance, nobody would miss the rest.
        """
        loss, grad = (t.detach().double() for t in found)
        g, at = grad.flatten(0, -2), inputs[-1].flatten().clamp(min=0)[:, None]
        return [loss.reshape(-1, 1), g.gather(1, at), g.scatter(1, at, 0)]

    def exact(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What is right, in float64."""
        doubles = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
        return self.parts(gradients(self.truth(), *doubles), doubles)

    def bytes_moved(self, limit: bool, inputs: Sequence[Tensor]) -> float | None:
        """What any loss, or this limit, must move: the count at the top of this file."""
        logits, target = inputs
        counted = (target != IGNORE).double().mean().item()
        return logits.nbytes * (2 if limit else 3 * counted + (1 - counted))

    def peak(self, name: str, dtype: str, device: str) -> list[float]:
        """Peak memory in units of the logits, gradient included; nothing where it cannot be told from noise."""
        size = torch.Size(self.shape).numel() * getattr(torch, dtype).itemsize
        return [self.grown(name, dtype, device) / size] if device != "cpu" or size >= SMALLEST else []

    def grown(self, name: str, dtype: str, device: str) -> float:
        """Bytes that forward + backward need at their peak."""
        if device == "cpu":
            setup = f"from cases import *\nstep = {self!r}.alone({name!r}, {dtype!r}, {device!r})"
            return in_fresh_process(setup, warm=self.warm)[0]
        step = self.alone(name, dtype, device)
        step()  # compiles, fills caches
        return growth(step, device)

    def alone(self, name: str, dtype: str, device: str) -> Callable[..., None]:
        """One contender's step, on the first `rows` of its own inputs."""
        contender = self.contenders()[name]
        loss = contender.make()
        first, *middle, target = self.inputs(dtype, device)

        def step(rows: slice = slice(None)) -> None:
            with forced(contender.backend):
                gradients(loss, first[rows], *middle, target[rows])

        return step


@dataclass(frozen=True)
class Linear(Case):
    """N rows of D features and C classes. Written 2048x768x50257, or with a share of targets that is ignored.

    Standard normal logits are flat, of an entropy near log C: what a sparse gradient finds hardest. Behind an @ their
    standard deviation can be another one, 2048x768x50257@4 for an entropy of about 4 nats, as of a trained model.
    """

    deviation: float = 1.0

    section = "linear"
    warm = "step(slice(1024))"
    processes = 1

    def contenders(self) -> dict[str, Contender]:
        """By name, the bare products first."""
        return HEADS

    def truth(self) -> Loss:
        """What is right, given float64."""
        return plain

    @classmethod
    def parse(cls, text: str) -> Case:
        """Raises ValueError, as argparse expects it."""
        size, _, deviation = text.partition("@")
        case = cls(super().parse(size).shape, deviation=float(deviation or 1))
        if len(case.shape) != 3 or min(case.shape) < 2 or not 0 < case.deviation < math.inf:
            raise ValueError(text)
        return case

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return super().__str__() + (f"@{self.deviation:g}" if self.deviation != 1 else "")

    def inputs(self, dtype: str, device: str) -> list[Tensor]:
        """Hidden states, weight and targets."""
        torch.manual_seed(0)
        N, D, C = self.shape
        h, W = torch.randn(N, D, device=device), torch.randn(C, D, device=device) * (self.deviation * D**-0.5)
        kind = getattr(torch, dtype)
        return [h.to(kind).requires_grad_(), W.to(kind).requires_grad_(), self.targets((N,), device)]

    def parts(self, found: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The loss, and each gradient as a whole."""
        return [t.detach().double().reshape(1, -1) for t in found]

    def bytes_moved(self, *_: object) -> None:
        """The products count, not the bytes."""

    def peak(self, name: str, dtype: str, device: str) -> list[float]:
        """MiB beyond the gradients (and the float32 sum of a half-precision head's), for N rows and for 8 N."""
        N, D, C = self.shape
        size = getattr(torch, dtype).itemsize
        sums = 4 * C * D if size == 2 and name.startswith("xent") else 0
        cases = [replace(self, shape=(N * times, D, C)) for times in (1, 8)]
        return [(c.grown(name, dtype, device) - c.shape[0] * D * size - C * D * size - sums) / 2**20 for c in cases]


@dataclass(frozen=True)
class Sparse(Linear):
    """The same with a sparse gradient, in units of one bare product. Or a trained head, by its file's name.

    `resolution.py --head` saves it. Its features are filled up with zeros: the logits stay what they are, and the
    product is as large as that of a usual head.
    """

    file: str = ""

    section = "sparse"

    def contenders(self) -> dict[str, Contender]:
        """By name, the one product first."""
        return SPARSE

    @classmethod
    def parse(cls, text: str) -> Sparse:
        """Raises ValueError, as argparse expects it."""
        if not text.endswith(".pt"):
            return super().parse(text)  # type: ignore[return-value]
        try:
            saved = torch.load(text)
        except OSError as error:
            raise ValueError(text) from error
        return cls((len(saved["hidden"]), FEATURES, len(saved["weight"])), file=text)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return self.file or super().__str__()

    def inputs(self, dtype: str, device: str) -> list[Tensor]:
        """Hidden states, weight and targets: drawn, or from the file."""
        if not self.file:
            return super().inputs(dtype, device)
        h, W, y = torch.load(self.file, map_location=device).values()
        h, W = (F.pad(x, (0, FEATURES - x.shape[1])).to(getattr(torch, dtype)) for x in (h, W))
        return [h.requires_grad_(), W.requires_grad_(), y]

    @torch.no_grad()
    def exact(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The loss alone, some rows at a time: a gradient that is right on average is a matter of the tests."""
        h, W, y = inputs
        W, rows = W.double(), zip(torch.split(h, 256), torch.split(y, 256), strict=True)
        losses = [F.cross_entropy(F.linear(some.double(), W), target, reduction="none") for some, target in rows]
        return [torch.cat(losses).mean().reshape(1, 1)]

    def parts(self, found: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The loss."""
        return super().parts(found, inputs)[:1]

    def peak(self, *_: object) -> list[float]:
        """A test measures it."""
        return []


@dataclass(frozen=True)
class Small(Case):
    """A few rows, where the call itself is what takes the time, with one of OPTIONS. Written 32x27."""

    option: str = "plain"

    section = "small"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Raises ValueError for anything but NxC."""
        case = super().parse(text)
        if len(case.shape) != 2:
            raise ValueError(text)
        return case

    def __str__(self) -> str:
        """The shape and the option."""
        return f"{super().__str__()} {self.option}"

    def truth(self) -> Loss:
        """What is right, given float64."""
        return partial(F.cross_entropy, **OPTIONS[self.option])

    def contenders(self) -> dict[str, Contender]:
        """As a user calls them: xent chooses the backend."""
        losses: dict[str, Loss] = {"F.cross_entropy": F.cross_entropy, "xent": xent.cross_entropy}
        return {name: Contender(partial(partial, loss, **OPTIONS[self.option])) for name, loss in losses.items()}

    def inputs(self, dtype: str, device: str) -> list[Tensor]:
        """Logits (N, C), targets, and for "weight" one number per class."""
        logits, target = super().inputs(dtype, device)
        if self.option == "probabilities":
            target = torch.randn(self.shape, device=device).softmax(-1).to(logits.dtype)
        weight = [torch.rand(self.shape[-1:], device=device).to(logits.dtype) + 0.5] * (self.option == "weight")
        return [logits, target, *weight]

    def parts(self, found: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Each loss and each row of the gradient."""
        loss, grad = (t.detach().double() for t in found)
        return [loss.reshape(-1, 1), grad]

    def bytes_moved(self, *_: object) -> None:
        """The call counts, not the bytes."""

    def peak(self, *_: object) -> list[float]:
        """Nothing to tell."""
        return []


CASES = list(map(Case.parse, ["8x3x27", "4096x1000", "1000000x32", "4x256x50257", "4x256x50257:0.7", "2x128x128256"]))
CUDA_CASES = [
    *map(Case.parse, ["4096x1000", "1000000x32", "8x1024x50257", "8x1024x50304", "8x1024x50257:0.7", "4x1024x128256"]),
    Case((16, 128256)),  # few rows: each is shared by many programs
]
QUICK = list(map(Case.parse, ["8x3x27", "2x128x50257"]))
FEATURES = 768
HEAD, QUICK_HEAD = Linear((2048, FEATURES, 50257)), Linear((512, 64, 5000))
SPARSE_HEADS = list(map(Sparse.parse, ["2048x768x50257", "2048x768x50257@4", "2048x768x256000@4"]))
