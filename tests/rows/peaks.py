"""Run by test_memory.py in a process of its own: prints the memory that each of its cases adds, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import xent
from benchmarks.memory import growth

SHAPE = (2, 256, 50257)
Case = Callable[[Tensor, Tensor], Tensor]


def product(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """A Hessian-vector product, of which forward and backward are only a part."""
    (g,) = torch.autograd.grad(xent.cross_entropy(logits, target, **options), logits, create_graph=True)
    torch.autograd.grad(g, logits, logits.detach())
    return logits[0, 0].sum()


LOSSES: dict[str, Case] = {
    "plain": lambda x, y: xent.cross_entropy(x, y),
    "in place": lambda x, y: xent.cross_entropy(x, y, inplace_backward=True),
    "token_stats": lambda x, y: xent.token_stats(x, y).log_prob.sum(),
    "options": lambda x, y: xent.cross_entropy(x, y, label_smoothing=0.1, z_loss=0.1, softcap=30.0),
    "entropy": lambda x, y: sum(stat.sum() for stat in xent.token_stats(x, y, entropy=True)[:3]),  # type: ignore
}
OTHERS: dict[str, Case] = {
    "torch": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()),
    "product": product,
    "product, softcap": lambda x, y: product(x, y, softcap=30.0),
    "product, z-loss": lambda x, y: product(x, y, z_loss=0.1),
}


def of_logits(loss: Case, dtype: torch.dtype) -> float:
    """Forward and backward, in units of the logits."""
    x, y = torch.empty(SHAPE, dtype=dtype).normal_(), torch.randint(SHAPE[-1], SHAPE[:-1])
    x[0, 0, 0] = 1

    def step(x: Tensor = x, y: Tensor = y) -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(loss(leaf, y), leaf)

    step(x[:, :4], y[:, :4])  # what is made once does not count
    return growth(step) / x.nbytes


def of_a_head(dtype: torch.dtype, rows: int) -> float:
    """Forward and backward, in MiB beyond the gradients and what they are added up in; the budget is 16."""
    W = torch.randn(50_000, 16).to(dtype).requires_grad_()
    h, y = torch.randn(rows, 16).to(dtype).requires_grad_(), torch.randint(50_000, (rows,))

    def step() -> None:
        torch.autograd.grad(xent.linear_cross_entropy(h, W, y, max_bytes=16 << 20), (h, W))

    step()
    accumulator = 0 if dtype == torch.float32 else W.numel() * 4
    return (growth(step) - W.nbytes - h.nbytes - accumulator) / 2**20


def of_a_sparse_head(rows: int, r: float) -> tuple[float, float]:
    """Forward and backward, in MiB beyond the gradients and the saved entries; the entries' bytes per row.

    Flat logits, which keep the most. The budget is the default's, 72 MiB.
    """
    W = torch.randn(4000, 16).requires_grad_()
    h, y = (torch.randn(rows, 16) / 16).requires_grad_(), torch.randint(4000, (rows,))
    entries = 0

    def save(x: Tensor) -> Tensor:
        nonlocal entries
        entries += x.nbytes * (x.dim() == 1 and len(x) > rows)
        return x

    def step() -> None:
        nonlocal entries
        entries = 0
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            loss = xent.linear_cross_entropy(h, W, y, grad_resolution=r)
        torch.autograd.grad(loss, (h, W))

    step()
    grown = growth(step)
    return (grown - W.nbytes - h.nbytes - entries) / 2**20, entries / rows


def main() -> None:
    """All cases, one after the other; given `all`, also those that no backend has a say in.

    One thread: memory is the same, and on a busy machine two wait for each other.
    """
    torch.set_num_threads(1)
    losses = LOSSES | (OTHERS if "all" in sys.argv else {})
    found: dict[str, Any] = {name: of_logits(loss, torch.float32) for name, loss in losses.items()}
    found["half"] = of_logits(LOSSES["plain"], torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        found[f"head of {dtype}"] = [of_a_head(dtype, rows) for rows in (330, 660)]
    if "all" in sys.argv:
        found["sparse head"] = [of_a_sparse_head(rows, 1 / 256) for rows in (2048, 16384)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
