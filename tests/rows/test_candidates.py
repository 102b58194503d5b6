"""Targets of K classes per position: the numbers of the dense target with the same probabilities, without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from oracle import Options, Upstream, every_dtype
from pairs import pairwise
from torch import Tensor
from wrong_options import case

import xent
from xent._records import RowNumbers, RowSpec, Wanted
from xent._rows import dispatch

C, K = 37, 6

LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {  # of logits, and their class dimension
    "rows": ((8, C), 1),
    "sequences": ((2, 4, C), 2),
    "images": ((2, C, 2, 2), 1),
    "one row": ((C,), 0),
}
MEMORY: dict[str, Callable[[Tensor], Tensor]] = {  # the same numbers (A, B, C), in another order of memory
    "contiguous": lambda x: x,
    "images": lambda x: x.mT.contiguous().mT,
    "cut": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
}
OPTIONS: dict[str, Options] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.3},
    "all smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.1},
    "softcap and scale": {"softcap": 5.0, "logit_scale": -0.7},
    "normalizer": {"normalizer": 4.5},
}


def problem(rows: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, C), and K classes of each row with their probabilities; some are ignored, equal, or of probability 0.

    The last row is ignored, and holds NaN.
    """
    generator = torch.Generator().manual_seed(1)
    x, _ = oracle.rows(torch.float64, N=rows, C=C)
    y = torch.randint(C, (rows, K), generator=generator)
    y[0, :3] = 0
    y[1 % rows, 1] = y[-1] = -100
    q = torch.rand(rows, K, generator=generator, dtype=torch.float64)
    q[0, 4] = 0
    x[-1] = torch.nan
    return x, y, q


def dense(y: Tensor, q: Tensor) -> Tensor:
    """The distribution over all classes, (N, C)."""
    return torch.zeros(*y.shape[:-1], C, dtype=q.dtype).scatter_add(-1, y.clamp(min=0), q.masked_fill(y < 0, 0))


def truth(x: Tensor, y: Tensor, q: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    """Of rows (N, C), by the oracle's loss of the dense target; the mean is over the rows that count."""
    counts, reduction = (y >= 0).any(-1), options.pop("reduction", "mean")
    normalizer = options.pop("normalizer", None) or counts.sum()
    losses = oracle.cross_entropy(x[counts], dense(y, q)[counts], weight, reduction="none", **options)
    if reduction == "none":
        return torch.zeros(len(x), dtype=x.dtype).masked_scatter(counts, losses)
    return losses.sum() / (normalizer if reduction == "mean" else 1)


@pairwise(layout=LAYOUTS, options=OPTIONS, weighted=[False, True])
def test_loss(layout: tuple[tuple[int, ...], int], options: Options, weighted: bool) -> None:
    """With both gradients; and those of the gradients."""
    shape, dim = layout
    N = torch.Size(shape).numel() // C
    x, y, q = problem(max(N, 3))
    x, y, q = x[:N], y[:N], q[:N]
    weight = torch.linspace(0, 2, C, dtype=torch.float64) if weighted else None
    leaves = [x.requires_grad_(), q.requires_grad_()]
    positions = shape[:dim] + shape[dim + 1 :]

    def placed(t: Tensor) -> Tensor:
        return t.reshape(*positions, t.shape[-1]).movedim(-1, dim)

    got = xent.cross_entropy(placed(x), placed(y), weight, dim=dim, target_prob=placed(q), **options)
    expected = truth(x, y, q, weight, **options)
    torch.testing.assert_close(got.flatten(), expected.flatten(), rtol=1e-12, atol=1e-13)
    assert got.shape == (positions if options.get("reduction") == "none" else ())
    g = oracle.upstream_for(expected)
    rest = {"create_graph": True, "materialize_grads": True}  # nothing of q is left beside all of the smoothing
    found = torch.autograd.grad(got, leaves, g.view_as(got), **rest)
    wanted = torch.autograd.grad(expected, leaves, g, **rest)
    counts = (y >= 0).any(-1)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    if N > 1:
        assert not found[0][~counts].any()
    sines = [sum(d[counts].sin().sum() for d in ds) for ds in (found, wanted)]
    again = [torch.autograd.grad(sine, leaves, materialize_grads=True) for sine in sines]
    for a, b in zip(*again, strict=True):
        torch.testing.assert_close(a[counts], b[counts], rtol=1e-8, atol=1e-12)


@every_dtype
@pairwise(memory=MEMORY, inplace=[False, True], start=[0, 5])
def test_primitives(
    backend: str, dtype: torch.dtype, memory: Callable[[Tensor], Tensor], inplace: bool, start: int
) -> None:
    """Where some candidates are in another shard; each entry of the gradient is rounded once."""
    x, y, _ = problem()
    x, y = memory(x.to(dtype).view(2, 4, C)), torch.where(y < 0, y, y + start - 3 * (start > 0)).view(2, 4, K)
    spec, wanted = RowSpec(scale=0.5, softcap=7.0, start=start, classes=C + start), Wanted(True, True, True)
    w = torch.rand(C, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    stats = dispatch.row_statistics(x, y, spec, wanted, w)
    one = dispatch.row_statistics(x, y[..., 0].contiguous(), spec, wanted, w)
    counts, here = (y != -100).any(2), (y >= start) & (y < C + start)
    tolerance = {"rtol": 1e-6 if dtype != torch.float64 else 1e-14, "atol": 1e-6 if dtype != torch.float64 else 1e-14}
    for a, b in zip(stats._replace(picked=one.picked).pack(), one.pack(), strict=True):
        torch.testing.assert_close(a[y[..., 0] != -100], b[y[..., 0] != -100], **tolerance)

    z = 7 * torch.tanh(x.double() * 0.5 / 7)
    picked = z.gather(2, (y - start).clamp(0, C - 1)) - stats.top[..., None]
    torch.testing.assert_close(stats.picked, torch.where(here, picked, 0), **tolerance)
    g = Upstream(*torch.randn(2, 2, 4, dtype=torch.float64), *torch.randn(2, 2, 4, dtype=torch.float64))
    g = g._replace(picked=torch.randn(2, 4, K, dtype=torch.float64))
    log_p = z - (stats.top + stats.lse)[..., None]
    d = log_p.exp() * (g.lse[..., None] - g.entropy[..., None] * log_p) + g.wsum[..., None] * w
    d = d.scatter_add(2, (y - start).clamp(0, C - 1), torch.where(here, g.picked, 0)) * 0.5 * (1 - (z / 7) ** 2)
    d[~counts] = 0
    before = x.clone()
    found = dispatch.row_gradient(x, y, RowNumbers(stats.top, stats.lse, *g), spec, w, x if inplace else None)
    oracle.assert_grad(found.flatten(0, 1), d.flatten(0, 1))
    assert inplace == (found.data_ptr() == x.data_ptr())
    assert inplace or x.nan_to_num(7.5).equal(before.nan_to_num(7.5))


@pytest.mark.parametrize("ignored", [3, C], ids=["a class", "one more than there are"])
@pytest.mark.parametrize("rows", [8, 300], ids=str)
def test_an_ignore_index_of_0_or_more(backend: str, ignored: int, rows: int) -> None:
    """It is as good as any other; where it is a class, that one is not picked."""
    x, y, q = problem(rows)
    y[y == 3] = 4
    found, expected = (
        xent.cross_entropy(x, y.where(y != -100, index), target_prob=q, ignore_index=index) for index in (ignored, -100)
    )
    assert found.equal(expected)
    y, spec = y.where(y != -100, ignored)[None], RowSpec(ignore_index=ignored)
    stats = dispatch.row_statistics(x[None], y, spec, Wanted())
    assert stats.picked[y == ignored].eq(0).all()


def test_a_masked_candidate_has_no_entropy(backend: str) -> None:
    x, y, _ = problem()
    x[2, y[2, 0]] = -torch.inf
    leaf = x[:7].requires_grad_()
    xent.token_stats(leaf, y[:7], entropy=True).entropy.sum().backward()
    assert leaf.grad.isfinite().all()


def test_token_stats() -> None:
    """Each candidate's log-probability is the one that it has alone, and so is its gradient."""
    x, y, _ = problem()
    x = x.requires_grad_()
    many = xent.token_stats(x, y, dim=1, entropy=True, prediction=True)
    g = torch.randn(8, K, dtype=torch.float64)
    for k in range(K):
        one = xent.token_stats(x, y[:, k], entropy=True, prediction=True)
        counts = y[:, k] >= 0
        assert many.log_prob[:, k].equal(one.log_prob)
        assert all(a[counts].equal(b[counts]) for a, b in zip(many[1:], one[1:], strict=True))
    alone = sum(xent.token_stats(x, y[:, k]).log_prob @ g[:, k] for k in range(K))
    for a, b in zip(*(torch.autograd.grad(v, x) for v in ((many.log_prob * g).sum(), alone)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    image = xent.token_stats(torch.randn(2, C, 3, 5), torch.randint(C, (2, K, 3, 5)))
    assert image.log_prob.shape == (2, K, 3, 5)
    assert image.lse.shape == (2, 3, 5)


ONES, ZEROS = torch.ones(4, 5), torch.zeros(4, 5, dtype=torch.int64)
SHAPE = "target: expected shape (4, K) for K >= 1 class indices per position"
WRONG = [
    case("no q", RuntimeError, "class indices come without the class dimension", target_prob=None),
    case("q list", TypeError, "target_prob: expected a Tensor or None, got list", target_prob=[0.5]),
    case("q integer", RuntimeError, "target_prob: expected a floating dtype, got torch.int64", target_prob=ZEROS),
    case("q shape", ValueError, "target_prob: expected the shape of target, (4, 5), got (4,)", target_prob=ONES[:, 0]),
    case("q device", RuntimeError, "target_prob: expected a tensor on cpu like target", target_prob=ONES.to("meta")),
    case("positions", ValueError, SHAPE, target=ZEROS[1:]),
    case("no candidate", ValueError, SHAPE, target=ZEROS[:, :0]),
    case("one index", ValueError, SHAPE, target=ZEROS[:, 0]),
    case("floating", RuntimeError, "target: expected class indices of dtype", target=ONES),
    case("range", IndexError, "got 5 (row 1 of 4)", target=torch.tensor([[0], [5], [0], [0]])),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_errors(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    target = wrong.get("target", ZEROS)
    q = torch.ones(target.shape) if "target_prob" not in wrong else wrong["target_prob"]
    with pytest.raises(error, match=re.escape(message)):
        xent.cross_entropy(torch.zeros(4, 5), target, target_prob=q)


@pytest.mark.parametrize("offset", [1e30, -1e30, torch.finfo(torch.float32).min])
def test_far_from_0(backend: str, offset: float) -> None:
    """No common offset of the logits eats digits, of the gradient neither."""
    x = torch.full((3, C), offset, requires_grad=True)
    y, q = torch.tensor([[0, 5], [7, 7], [36, 1]]), torch.full((3, 2), 0.5)
    loss = xent.cross_entropy(x, y, target_prob=q)
    (grad,) = torch.autograd.grad(loss, x)
    expected = (1 / C - dense(y, q)) / 3
    torch.testing.assert_close(loss, torch.tensor(C).log())
    torch.testing.assert_close(grad, expected)
