"""A linear head's loss of K classes per position: the numbers of the dense target with the same probabilities."""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
import torch
from pairs import pairwise
from products import Products
from test_linear import BUDGETS, OPTIONS, REDUCTIONS, C, D, assert_close, problem
from torch import Tensor
from torch.nn import functional as F
from wrong_options import case

import xent
from xent._rows import dispatch

K = 3
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def several(*batch: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Hidden states, head, bias and q, which all require grad; and K classes of each row.

    Some classes of a row are equal, one counts next to nothing, one is ignored, and one row is: q is NaN there.
    """
    h, W, b, _ = problem(*batch, dtype=dtype)
    y, q = torch.randint(C, (*batch, K)), torch.rand(*batch, K).to(dtype)
    rows, p = y.view(-1, K), q.view(-1, K)
    rows[0] = 2
    p[3, 0] = 1e-6
    rows[1, 1] = rows[2] = -100
    p[1, 1] = p[2] = torch.nan
    return [h, W, b, q.requires_grad_()], y


def dense(y: Tensor, q: Tensor) -> Tensor:
    """The distribution over all classes, (..., C)."""
    return torch.zeros(*y.shape[:-1], C, dtype=q.dtype).scatter_add(-1, y.clamp(min=0), q.masked_fill(y < 0, 0))


def truth(logits: Tensor, y: Tensor, q: Tensor, **options: Any) -> Tensor:
    """The oracle's, of the rows that count."""
    counts, reduction = (y >= 0).any(-1), options.pop("reduction", "mean")
    losses = oracle.cross_entropy(logits[counts], dense(y, q)[counts], dim=-1, reduction="none", **options)
    if reduction == "none":
        return torch.zeros(counts.shape, dtype=losses.dtype).masked_scatter(counts, losses)
    return losses.sum() / (counts.sum() if reduction == "mean" else 1)


def grads(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors, oracle.upstream_for(loss), retain_graph=True)


@pairwise(
    options=OPTIONS | {"all smoothing": {"label_smoothing": 1.0, "z_loss": 0.1}},
    max_bytes=BUDGETS,
    reduction=REDUCTIONS,
    shift={"": False, "shift": True},
)
def test_the_truth(options: dict[str, Any], max_bytes: int | None, reduction: str, shift: bool) -> None:
    leaves, y = several(4, 5)
    h, W, b, q = leaves
    options = options | {"reduction": reduction}
    found = xent.linear_cross_entropy(
        h, W, y, linear_bias=b, target_prob=q, shift=shift, max_bytes=max_bytes, **options
    )
    cut = slice(1, None) if shift else slice(None)
    logits = F.linear(h, W, b)[:, : 4 if shift else 5]
    expected = truth(logits, y[:, cut], q[:, cut], **options)
    assert_close(found, expected)
    if options.get("label_smoothing") == 1:  # nothing of q is left
        assert not found.requires_grad or not any(
            g is not None and g.any() for g in torch.autograd.grad(found.sum(), q, allow_unused=True, retain_graph=True)
        )
        leaves = leaves[:3]
    assert_close(grads(found, *leaves), grads(expected, *leaves))


@every_reduction
def test_gradcheck(reduction: str) -> None:
    leaves, y = several(4)
    leaves[3] = torch.rand(4, K, dtype=torch.float64, requires_grad=True)

    def loss(h: Tensor, W: Tensor, b: Tensor, q: Tensor) -> Tensor:
        options = {**OPTIONS["all"], "reduction": reduction, "max_bytes": 200}
        return xent.linear_cross_entropy(h, W, y, linear_bias=b, target_prob=q, **options)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("sum", 3), ("none", 4)])
def test_products(reduction: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows that count; for q alone no gradient of logits."""
    (h, W, _, q), y = several(12)
    with Products() as made:
        xent.linear_cross_entropy(h, W, y, target_prob=q, reduction=reduction).sum().backward()
    assert (made.count, made.work) == (products, products * 11 * C * D)
    monkeypatch.setattr(dispatch, "row_gradient", None)
    with Products() as made:
        xent.linear_cross_entropy(h.detach(), W.detach(), y, target_prob=q, reduction=reduction).sum().backward()
    assert made.count == 1


@every_reduction
def test_a_probability_of_0_where_the_logit_is_minus_infinity(reduction: str) -> None:
    """Counts 0, as for a dense target, in the gradient of q too."""
    (h, W, b, _), _ = several(4)
    bias = b.detach().clone()
    bias[6] = -torch.inf
    y, q = torch.tensor([[6, 1, 2]] * 4), torch.tensor([[0.0, 0.5, 0.5]] * 4, dtype=torch.float64, requires_grad=True)
    loss = xent.linear_cross_entropy(h, W, y, linear_bias=bias, target_prob=q, reduction=reduction)
    assert_close(loss, xent.cross_entropy(F.linear(h, W, bias), y, target_prob=q, reduction=reduction))
    assert all(g.isfinite().all() for g in grads(loss, h, W, q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    """In float16 for a sum that is divided by many rows."""
    (h, W, b, q), y = several(2000, dtype=dtype)
    found = xent.linear_cross_entropy(h, W, y, linear_bias=b, target_prob=q, loss_dtype=torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (h, W, b, q)]
    expected = truth(F.linear(*wide[:3]), y, wide[3])
    scale, eps = 2.0**10, torch.finfo(dtype).eps
    theirs = torch.autograd.grad(expected * scale, wide)
    for a, e in zip(torch.autograd.grad(found * scale, (h, W, b, q)), theirs, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).norm() <= max(eps, 1e-6) * e.norm()


@every_reduction
def test_heads_of_more_dimensions(reduction: str) -> None:
    """K indices lie where the logits have their classes."""
    torch.manual_seed(0)
    h, W = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, D), (C, 2, 3, D)))
    y, q = torch.randint(C, (4, K, 2, 3)), torch.rand(4, K, 2, 3, dtype=torch.float64, requires_grad=True)
    found = xent.linear_cross_entropy(h, W, y, target_prob=q, reduction=reduction)
    logits = torch.einsum("nd,cijd->ncij", h, W)
    expected = truth(logits.movedim(1, -1), y.movedim(1, -1), q.movedim(1, -1), reduction=reduction)
    assert_close(found, expected)
    assert_close(grads(found, h, W, q), grads(expected, h, W, q))


def test_module() -> None:
    (h, *_, q), y = several(6)
    loss = xent.LinearCrossEntropyLoss(D, C, bias=True, dtype=torch.float64, weight=torch.rand(C), label_smoothing=0.1)
    found = loss(h, y, target_prob=q)
    head, rest = loss.linear, {"weight": loss.weight, "label_smoothing": 0.1}
    expected = truth(F.linear(h, head.weight, head.bias), y, q, **rest)
    assert_close(found, expected)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest result of an operation, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not func.is_view:
            self.bytes = max(self.bytes, found.nbytes)
        return found


@every_reduction
def test_memory_is_the_budget(reduction: str) -> None:
    """Nothing is as large as the logits of all rows."""
    h, W = (torch.randn(n, 8, requires_grad=True) for n in (256, 4096))
    y, q, budget = torch.randint(4096, (256, 16)), torch.rand(256, 16, requires_grad=True), 2**17
    with Largest() as largest:
        loss = xent.linear_cross_entropy(h, W, y, target_prob=q, reduction=reduction, max_bytes=budget)
        loss.sum().backward()
    assert largest.bytes <= max(budget, W.nbytes) < h.shape[0] * W.shape[0] * 4


N, ZEROS = 4, torch.zeros(4, 5, dtype=torch.int64)
SHAPE = "target: expected shape (4, K) for K >= 1 class indices per position, got "
WRONG = [
    case("no q", ValueError, "target: expected shape (4,) for indices or (4, 7) for probabilities, got (4, 5)",
         target_prob=None),
    case("q list", TypeError, "target_prob: expected a Tensor or None, got list", target_prob=[0.5]),
    case("q integer", RuntimeError, "target_prob: expected a floating dtype, got torch.int64", target_prob=ZEROS),
    case("q shape", ValueError, "target_prob: expected the shape of target, (4, 5), got (4,)",
         target_prob=torch.ones(4)),
    case("q device", RuntimeError, "target_prob: expected a tensor on cpu like target, got one on meta",
         target_prob=torch.ones(4, 5, device="meta")),
    case("positions", ValueError, SHAPE + "(3, 5)", target=ZEROS[1:]),
    case("no candidate", ValueError, SHAPE + "(4, 0)", target=ZEROS[:, :0]),
    case("one index", ValueError, SHAPE + "(4,)", target=ZEROS[:, 0]),
    case("floating", RuntimeError, "target: expected class indices of dtype", target=torch.ones(4, 5)),
    case("range", IndexError, "got 7 (row 1 of 4)", target=torch.tensor([[0], [7], [0], [0]])),
    case("sparse", ValueError, "grad_resolution: expected None for K classes per position, got 0.1",
         grad_resolution=0.1),
]  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_errors(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    target = wrong.pop("target", ZEROS)
    q = wrong.pop("target_prob", torch.ones(target.shape))
    with pytest.raises(error, match=re.escape(message)):
        xent.linear_cross_entropy(torch.zeros(4, D), torch.zeros(C, D), target, target_prob=q, **wrong)
