"""The sparse gradient of a head whose classes are spread over ranks, each of which samples its own part."""

from __future__ import annotations

import torch
from oracle import Options
from pairs import pairwise
from ranks import Ranks
from test_parallel_linear import C, D, Sizes, check, part
from torch import Tensor
from torch.distributed import ProcessGroup

import xent

SPARSE = {
    "plain": {},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.3, "z_loss": 0.1},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
}


@pairwise(options=SPARSE, weights=["none", "full", "parts"], soft={"indices": False, "probabilities": True})
def test_sparse_gradient(ranks: Ranks, options: Options, weights: str, soft: bool) -> None:
    """Exact with a tiny resolution: each rank samples its own softmax, and its share of the whole flows back."""
    check(ranks, (20, 17), soft, weights, options | {"grad_resolution": 1e-13})


def mean_of_draws(group: ProcessGroup, sizes: Sizes) -> list[float]:
    """Errors of the hidden states' gradient: of the mean of 4000 draws, and of a single one."""
    torch.manual_seed(0)
    h, y = torch.randn(2, D).double(), torch.tensor([3, 30])
    W = part(torch.randn(C, D).double(), sizes, group.rank(), 0)

    def gradient(times: int, r: float | None) -> Tensor:
        leaf = h.repeat(times, 1).requires_grad_()
        options: Options = {"reduction": "sum", "grad_resolution": r, "group": group}
        loss = xent.linear_cross_entropy(leaf, W, y.repeat(times), **options)
        return torch.autograd.grad(loss, leaf)[0].view(times, 2, D)

    exact, draws = gradient(1, None)[0], gradient(4000, 0.2)
    return [(some - exact).norm().item() for some in (draws.mean(0), draws[0])]


def test_sparse_gradient_on_average(ranks: Ranks) -> None:
    for mean, one in ranks.run(mean_of_draws, 2, (20, 17)):
        assert mean < 0.05 * one


def kept(group: ProcessGroup) -> list[float]:
    """Of classes that are all alike, and all targets on the last rank."""
    torch.manual_seed(0)
    b = torch.zeros(50, requires_grad=True)
    h, W, y = torch.zeros(3, D), torch.zeros(50, D), torch.full((3,), 100)
    xent.linear_cross_entropy(h, W, y, linear_bias=b, grad_resolution=0.5, group=group).backward()
    assert b.grad is not None
    return b.grad.ne(0).tolist()  # type: ignore[no-any-return]


def test_each_rank_draws_for_itself(ranks: Ranks) -> None:
    first, second, _ = ranks.run(kept, 3)
    assert 0 < sum(first) <= 9
    assert first != second
