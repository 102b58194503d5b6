"""Who runs in the loss section of bench.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import xent
from xent import _primitives

Loss = Callable[[Tensor, Tensor], Tensor]

IGNORE = -100
BASELINE = "F.cross_entropy"
COPY = "warm copy_"


class Unavailable(Exception):
    """Why this machine, or this case, has to do without a contender."""


@dataclass(frozen=True)
class Contender:
    """`make()` gives the loss, as a function of logits (…, C) and targets (…), or raises Unavailable.

    A `limit` is no loss: it does to the logits what any loss must do at least, and is not checked.
    """

    name: str
    make: Callable[[], Loss]
    backend: str | None = None
    limit: bool = False

    def ready(self, logits: Tensor, target: Tensor) -> Loss:
        """`make`, after asking xent's backend, if it is one of those, whether it takes these tensors."""
        if self.backend:
            module = _primitives.load(self.backend)
            rows = logits.flatten(0, -2), target.flatten()
            if reason := module if isinstance(module, str) else module.refusal(*rows):
                raise Unavailable(reason)
        return self.make()


def flat(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """For a loss that knows only logits (N, C) with targets (N,)."""
    return lambda logits, target: loss(logits.flatten(0, -2), target.flatten())


def textbook(logits: Tensor, target: Tensor) -> Tensor:
    """-log(exp(x_y) / sum_c exp(x_c)), word for word: it overflows for logits above 88."""
    e = logits.exp()
    p = e.gather(-1, target.clamp(min=0)[..., None])[..., 0] / e.sum(-1)
    return -p.log()[target != IGNORE].mean()


def compiled() -> Loss:
    """torch.compile, once more for each case: for its shape and its number of threads."""
    torch.compiler.reset()
    return torch.compile(flat(F.cross_entropy), dynamic=False)


def peer(module: str, name: str) -> Loss:
    """Another package's loss, if it is installed."""
    try:
        return flat(getattr(importlib.import_module(module), name))
    except ImportError as error:
        raise Unavailable(str(error)) from error


def ours(inplace: bool) -> Loss:
    """xent, on whichever backend is forced. `dim` for the cases in which (…, C) is not the only reading."""
    return partial(xent.cross_entropy, dim=-1, inplace_backward=inplace)


def clone(logits: Tensor, target: Tensor) -> Tensor:
    """One read, one write into new memory."""
    return logits.detach().clone()


def warm_copy() -> Loss:
    """One read, one write into memory that was written before, and so without page faults."""
    buffers: list[Tensor] = []

    def copy(logits: Tensor, target: Tensor) -> Tensor:
        if not buffers:
            buffers.append(torch.empty_like(logits))
        return buffers[0].copy_(logits.detach())

    return copy


CONTENDERS = [
    Contender(BASELINE, lambda: flat(F.cross_entropy)),
    Contender("torch.compile(F.cross_entropy)", compiled),
    Contender("textbook exp, sum, log", lambda: textbook),
]
for backend in reversed(_primitives.NAMES):
    CONTENDERS += [
        Contender(f"xent {backend}", lambda: ours(inplace=False), backend),
        Contender(f"xent {backend}, in place", lambda: ours(inplace=True), backend),
    ]
CONTENDERS += [
    Contender("Liger-Kernel", lambda: peer("liger_kernel.transformers.functional", "liger_cross_entropy")),
    Contender("quack", lambda: peer("quack.cross_entropy", "cross_entropy")),
    Contender("logits.clone()", lambda: clone, limit=True),
    Contender(COPY, warm_copy, limit=True),
]


def loss_named(name: str) -> Loss:
    """For a process that runs one contender only (see memory.py): its backend is forced for good."""
    contender = next(c for c in CONTENDERS if c.name == name)
    _primitives.FORCED = contender.backend or _primitives.FORCED
    return contender.make()
