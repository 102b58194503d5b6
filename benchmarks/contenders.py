"""Who runs in bench.py: by name, for each kind of case. A contender is a line in LOGITS or HEADS.

Every contender does the same work: a loss, then `torch.autograd.grad` on the leaves among its inputs, so that the
gradients are really written. Limits are no losses: they do what any loss must do at least, and are not checked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import xent
from xent._rows import dispatch

Loss = Callable[..., Tensor]

IGNORE = -100
COPY = "warm copy_"


# xent's backends. No other file here knows how the package chooses one.

BACKENDS = dispatch.BACKENDS  # in order of preference


def missing(backend: str, logits: Tensor, target: Tensor) -> str | None:
    """Why this machine lacks a backend, or why it does not take these tensors."""
    module = dispatch.load(backend)
    return module if isinstance(module, str) else module.refusal(logits.flatten(0, -2)[None], target.flatten()[None])


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """xent on this backend only, as XENT_BACKEND does it for a whole process. Backward belongs inside, too."""
    before = dispatch.FORCED_BACKEND
    dispatch.FORCED_BACKEND = backend or before
    try:
        yield
    finally:
        dispatch.FORCED_BACKEND = before


class Unavailable(Exception):
    """Why this machine, or this case, has to do without a contender."""


class Contender(NamedTuple):
    """`make()` gives a function of a case's inputs: a loss, or a limit. Or it raises Unavailable."""

    make: Callable[[], Loss]
    backend: str | None = None  # of xent, where one is to be forced
    limit: bool = False


def flat(loss: Loss) -> Loss:
    """For a loss that knows only logits (N, C) with targets (N,)."""
    return lambda logits, target: loss(logits.flatten(0, -2), target.flatten())


def textbook(logits: Tensor, target: Tensor) -> Tensor:
    """-log(exp(x_y) / sum_c exp(x_c)), word for word: it overflows for logits above 88."""
    e = logits.exp()
    p = e.gather(-1, target.clamp(min=0)[..., None])[..., 0] / e.sum(-1)
    return -p.log()[target != IGNORE].mean()


def compiled(loss: Loss) -> Loss:
    """Anew for each case: for its shape and its number of threads."""
    torch.compiler.reset()
    return torch.compile(loss, dynamic=False)


def peer(module: str, name: str) -> Loss:
    """Another package's loss, if it is installed."""
    try:
        return flat(getattr(importlib.import_module(module), name))
    except ImportError as error:
        raise Unavailable(str(error)) from error


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


def ours(inplace: bool) -> Loss:
    """xent. `dim` for the cases in which (..., C) is not the only reading."""
    return partial(xent.cross_entropy, dim=-1, inplace_backward=inplace)


# The first is what the ratios are to.
LOGITS = {
    "F.cross_entropy": Contender(lambda: flat(F.cross_entropy)),
    "torch.compile(F.cross_entropy)": Contender(lambda: compiled(flat(F.cross_entropy))),
    "textbook exp, sum, log": Contender(lambda: textbook),
    **{
        f"xent {backend}{', in place' if inplace else ''}": Contender(partial(ours, inplace), backend)
        for backend in reversed(BACKENDS)
        for inplace in (False, True)
    },
    "Liger-Kernel": Contender(lambda: peer("liger_kernel.transformers.functional", "liger_cross_entropy")),
    "quack": Contender(lambda: peer("quack.cross_entropy", "cross_entropy")),
    "logits.clone()": Contender(lambda: clone, limit=True),
    COPY: Contender(warm_copy, limit=True),
}


def gradients(loss: Loss, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The work that is timed: forward and backward."""
    value = loss(*inputs)
    upstream = torch.ones_like(value) if value.dim() else None
    return value, *torch.autograd.grad(value, [x for x in inputs if x.requires_grad], upstream)


def plain(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """The usual two lines."""
    return F.cross_entropy(F.linear(h, W), y)


def torchs(rows: int | None) -> Loss:
    """torch's own, which takes some rows at a time: its default, or `rows`. Since torch 2.13."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("torch 2.13 has it")
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows))


def none(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """xent, with a mean that autograd knows nothing of in advance."""
    return xent.linear_cross_entropy(h, W, y, reduction="none").mean()


def sparse(r: float, kind: str) -> Loss:
    """xent with an unbiased sparse gradient: of the mean, of a mean of losses per row, of statistics."""

    def loss(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
        if kind == "token stats":
            return -xent.linear_token_stats(h, W, y, grad_resolution=r).log_prob.mean()
        return xent.linear_cross_entropy(h, W, y, grad_resolution=r, reduction=kind).mean()

    return loss


def product() -> Loss:
    """The one product that any exact loss takes."""
    return torch.no_grad()(lambda h, W, y: torch.mm(h, W.t()))


def products() -> Loss:
    """The three products alone, each into a tensor of its own; the logits' gradient is any (N, C)."""
    G: list[Tensor] = []

    @torch.no_grad()
    def three(h: Tensor, W: Tensor, y: Tensor) -> Any:
        if not G:
            G.append(torch.mm(h, W.t()))
        return torch.mm(h, W.t()), torch.mm(G[0], W), torch.mm(G[0].t(), h)

    return three


# From hidden states and a head. The first is what the ratios are to.
HEADS = {
    "three bare products": Contender(products, limit=True),
    "F.linear + F.cross_entropy": Contender(lambda: plain),
    "torch.compile of these": Contender(lambda: compiled(plain)),
    "xent": Contender(lambda: xent.linear_cross_entropy),
    "xent, reduction none": Contender(lambda: none),
    "F.linear_cross_entropy": Contender(lambda: torchs(None)),
    "F.linear_cross_entropy, 256 rows": Contender(lambda: torchs(256)),
    "F.linear_cross_entropy, 512 rows": Contender(lambda: torchs(512)),
    "F.linear_cross_entropy, 1024 rows": Contender(lambda: torchs(1024)),
}


# The sparse gradient of a head, beside the exact one. The first is what the ratios are to.
SPARSE = {
    "one bare product": Contender(product, limit=True),
    "xent, exact gradient": HEADS["xent"],
    **{
        f"xent, 1/{n}{'' if kind == 'mean' else f', {kind}'}": Contender(partial(sparse, 1 / n, kind))
        for n, kinds in ((1024, ("mean", "none", "token stats")), (256, ("mean",)))
        for kind in kinds
    },
}


# What a call costs: the options of a small loss. Another one is a line.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "label_smoothing=0.1": {"label_smoothing": 0.1},
    "weight": {},
    "probabilities": {},
}
