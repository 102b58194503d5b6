"""K classes per position of a linear head spread over ranks: the loss and all gradients of one process."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks, mesh_of
from test_parallel import LAYOUTS, OPTIONS, Sizes, class_weights, part
from test_parallel_dtensor import Placements, R, S, full
from test_parallel_linear import batch
from test_parallel_linear_dtensor import PLACED
from test_parallel_linear_dtensor import batch as dtensor_batch
from torch.distributed import ProcessGroup
from torch.distributed.tensor import distribute_tensor

import xent


def candidates(group: ProcessGroup, sizes: Sizes, weighted: bool) -> None:
    """In any of the shards."""
    h, W, b, y = batch(False)
    several, q = torch.stack([y, y.roll(1), y], -1), torch.rand(*y.shape, 3).double().requires_grad_()
    options = OPTIONS["everything"] | {"reduction": "mean", "shift": True, "max_bytes": 2000, "target_prob": q}
    options["weight"] = class_weights() if weighted else None
    answers = []
    for over in (None, group):
        leaves = [t.clone().requires_grad_() for t in (h, W, b)]
        mine = [part(t, sizes, group.rank(), 0) if over else t for t in leaves[1:]]
        loss = xent.linear_cross_entropy(leaves[0], mine[0], several, linear_bias=mine[1], group=over, **options)
        grads = torch.autograd.grad(loss, [*leaves, q])
        local = [part(g, sizes, group.rank(), 0) for g in grads[1:3]]  # of the whole head, of which it took a part
        answers.append([loss, *grads[::3], *local])
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_candidates(ranks: Ranks, sizes: Sizes, weighted: bool) -> None:
    ranks.run(candidates, len(sizes), sizes, weighted)


def of_dtensors(group: ProcessGroup, hidden: Placements, head: Placements, shift: bool) -> None:
    """The mean is over the positions of the whole batch that count."""
    mesh = mesh_of(group, len(head))
    h, W, b, y, w = dtensor_batch(False)
    several, q = torch.stack([y, y, y.roll(1, 0)], -1), torch.rand(4, 5, 3).double()
    rows = [R if p == S(0) else q for p, q in zip(head, hidden, strict=True)]
    given = ((h, hidden), (W, head), (several, rows), (b, head), (q, rows))
    placed = [distribute_tensor(t, mesh, at, src_data_rank=None) for t, at in given]
    losses, grads = [], []
    for tensors in (placed, [h, W, several, b, q]):
        leaves = [t.detach().requires_grad_() for t in (tensors[0], tensors[1], tensors[4])]
        losses.append(
            xent.linear_cross_entropy(
                *leaves[:2], tensors[2], linear_bias=tensors[3], target_prob=leaves[2], weight=w, shift=shift
            )
        )
        one = torch.ones((), dtype=torch.float64)
        one = one if tensors is not placed else distribute_tensor(one, mesh, [R] * len(head), src_data_rank=None)
        grads.append(torch.autograd.grad(losses[-1], leaves, one))
    torch.testing.assert_close(losses[0].full_tensor(), losses[1], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close([full(g) for g in grads[0]], list(grads[1]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("placed", [PLACED[1], PLACED[3]], ids=str)
def test_dtensors(ranks: Ranks, placed: tuple[Placements, Placements], shift: bool) -> None:
    ranks.run(of_dtensors, 2 * len(placed[1]), *placed, shift)
