"""Every function of xent beside the same one in torch's own words: for tests of whoever looks on at a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import xent

Loss = Callable[..., Tensor]
Run = Callable[..., tuple[Tensor, ...]]  # from a batch to the value, and perhaps the gradients of all that is floating

C, D = 5, 3
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5], dtype=torch.float64)


class Case(NamedTuple):
    """One of xent's functions, the same in torch's own, and what both take: a batch of N rows."""

    ours: Loss
    theirs: Loss
    batch: Callable[[int, torch.Generator], tuple[Tensor, ...]]


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def indices(N: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    y = torch.randint(C, (N,), generator=generator)
    y[1] = -100
    return randn(N, C, generator=generator), y


def probabilities(N: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return randn(N, C, generator=generator), randn(N, C, generator=generator).softmax(1)


def candidates(N: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.randint(C, (N, 3), generator=generator)
    y[1, 0] = -100
    return *probabilities(N, generator)[:1], torch.rand(N, 3, dtype=torch.float64, generator=generator), y


def of_dense(x: Tensor, q: Tensor, y: Tensor) -> Tensor:
    k = q.where(y != -100, 0)
    return F.cross_entropy(x, torch.zeros_like(x).scatter_add(1, y.clamp(min=0), k))


def images(N: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return randn(N, C, 2, 2, generator=generator), torch.randint(C, (N, 2, 2), generator=generator)


def heads(N: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    _, y = indices(N, generator)
    return randn(N, D, generator=generator), randn(C, D, generator=generator), y


def several_heads(N: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, W, _ = heads(N, generator)
    return h, W, *candidates(N, generator)[1:]


def together(stats: xent.TokenStats) -> Tensor:
    return torch.stack([stats.log_prob, stats.lse, stats.entropy])  # type: ignore[list-item]


def stats_of(logits: Tensor, y: Tensor) -> Tensor:
    log_p, counts = logits.log_softmax(1), y != -100
    log_prob = log_p.gather(1, y.clamp(min=0)[:, None])[:, 0]
    parts = (log_prob, logits.logsumexp(1), -(log_p.exp() * log_p).sum(1))
    return torch.stack([part.where(counts, 0) for part in parts])


def of_head(loss: Loss, **options: Any) -> Loss:
    return lambda h, W, y: loss(F.linear(h, W), y, **options)


def group() -> dict[str, Any]:
    return {"group": dist.group.WORLD}


all_options = {"weight": WEIGHT, "label_smoothing": 0.1}
FUNCTIONS: dict[str, Case] = {
    "indices": Case(xent.cross_entropy, F.cross_entropy, indices),
    "probabilities": Case(xent.cross_entropy, F.cross_entropy, probabilities),
    "candidates": Case(lambda x, q, y: xent.cross_entropy(x, y, target_prob=q), of_dense, candidates),
    "images": Case(xent.cross_entropy, F.cross_entropy, images),
    "weight and smoothing": Case(
        lambda x, y: xent.cross_entropy(x, y, **all_options), lambda x, y: F.cross_entropy(x, y, **all_options), indices
    ),
    "none": Case(
        lambda x, y: xent.cross_entropy(x, y, reduction="none"),
        lambda x, y: F.cross_entropy(x, y, reduction="none"),
        indices,
    ),
    "token_stats": Case(lambda x, y: together(xent.token_stats(x, y, entropy=True)), stats_of, indices),
    "head": Case(xent.linear_cross_entropy, of_head(F.cross_entropy), heads),
    "head, none": Case(
        lambda h, W, y: xent.linear_cross_entropy(h, W, y, reduction="none"),
        of_head(F.cross_entropy, reduction="none"),
        heads,
    ),
    "head, candidates": Case(
        lambda h, W, q, y: xent.linear_cross_entropy(h, W, y, target_prob=q),
        lambda h, W, q, y: of_dense(F.linear(h, W), q, y),
        several_heads,
    ),
    "linear_token_stats": Case(
        lambda h, W, y: together(xent.linear_token_stats(h, W, y, entropy=True)), of_head(stats_of), heads
    ),
    "group": Case(lambda x, y: xent.cross_entropy(x, y, **group()), F.cross_entropy, indices),
    "group, candidates": Case(lambda x, q, y: xent.cross_entropy(x, y, target_prob=q, **group()), of_dense, candidates),
    "group, token_stats": Case(
        lambda x, y: together(xent.token_stats(x, y, entropy=True, **group())), stats_of, indices
    ),
    "group, head": Case(lambda h, W, y: xent.linear_cross_entropy(h, W, y, **group()), of_head(F.cross_entropy), heads),
    "group, linear_token_stats": Case(
        lambda h, W, y: together(xent.linear_token_stats(h, W, y, entropy=True, **group())), of_head(stats_of), heads
    ),
}


def batch_of(case: Case, N: int, seed: int) -> tuple[Tensor, ...]:
    return case.batch(N, torch.Generator().manual_seed(seed))


def floating(tensors: tuple[Tensor, ...]) -> int:
    """How many come first."""
    return sum(t.is_floating_point() for t in tensors)


def by_autograd(loss: Loss) -> Run:
    """Value and gradients of the sum of squares, to which each number adds differently."""

    def run(*batch: Tensor) -> tuple[Tensor, ...]:
        count = floating(batch)
        leaves = [t.detach().requires_grad_() for t in batch[:count]]
        value = loss(*leaves, *batch[count:])
        return value.detach(), *torch.autograd.grad(value.square().sum(), leaves)

    return run
