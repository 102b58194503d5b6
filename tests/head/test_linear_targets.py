"""Probability targets of a linear head that require grad: the gradient of cross_entropy(F.linear(...)), by blocks."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from pairs import pairwise
from products import Products
from test_linear import BUDGETS, OPTIONS, REDUCTIONS, C, D, assert_close, problem
from torch import Tensor, func
from torch.nn import functional as F

import xent
from xent._head import blocks as _blocks
from xent._rows import dispatch as _primitives

pytestmark = [
    pytest.mark.usefixtures("unchecked"),  # a compiler cannot read the checks
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own, met while it compiles
]
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def soft_problem(*batch: int, **options: Any) -> list[Tensor]:
    """Hidden states, head, bias and probabilities, which all require grad."""
    return [t.requires_grad_() for t in problem(*batch, soft=True, **options)]


def grads(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors, oracle.upstream_for(loss), retain_graph=True)


@pairwise(options=OPTIONS, max_bytes=BUDGETS, reduction=REDUCTIONS, shift={"": False, "shift": True})
def test_the_truth(options: dict[str, Any], max_bytes: int | None, reduction: str, shift: bool) -> None:
    h, W, b, q = leaves = soft_problem(4, 5)
    options = options | {"reduction": reduction}
    found = xent.linear_cross_entropy(h, W, q, linear_bias=b, shift=shift, max_bytes=max_bytes, **options)
    logits = F.linear(h, W, b)
    rows, targets = (logits[:, :-1], q[:, 1:]) if shift else (logits, q)
    expected = oracle.cross_entropy(rows, targets, dim=-1, **options)
    assert_close(found, expected)
    assert_close(grads(found, *leaves), grads(expected, *leaves))


@every_reduction
def test_gradcheck(reduction: str) -> None:
    h, W, b, q = soft_problem(3)

    def loss(*leaves: Tensor) -> Tensor:
        h, W, b, q = leaves
        options = {**OPTIONS["all"], "reduction": reduction, "max_bytes": 200}
        return xent.linear_cross_entropy(h, W, q, linear_bias=b, **options)

    assert torch.autograd.gradcheck(loss, (h, W, b, q))


@every_reduction
def test_only_where_it_is_asked_for(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it takes no gradient of any logits; without it nothing of its size is made."""
    h, W, _, q = soft_problem(6)
    made = []
    original = _blocks.Grads.found
    monkeypatch.setattr(_blocks.Grads, "found", lambda self: made.append(self) or original(self))
    xent.linear_cross_entropy(h, W, q.detach(), reduction=reduction).sum().backward()
    assert made[-1].dq is None
    monkeypatch.setattr(_primitives, "row_gradient", None)
    with Products() as products:
        loss = xent.linear_cross_entropy(h.detach(), W.detach(), q, reduction=reduction)
        (found,) = grads(loss, q)
    assert products.count == (2 if reduction == "none" else 1)
    assert (made[-1].dh, made[-1].dW, made[-1].db) == (None,) * 3
    assert_close(found, grads(oracle.cross_entropy(F.linear(h, W), q, reduction=reduction), q)[0])


@pairwise(
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    target_dtype=[None, torch.float32, torch.float16, torch.float64],
    reduction=["mean", "none"],
)
def test_every_dtype(dtype: torch.dtype, target_dtype: torch.dtype | None, reduction: str) -> None:
    """No worse than with logits, and in float16 for a sum that is divided by many rows."""
    h, W, b, q = soft_problem(2000, dtype=dtype)
    q = q.detach().to(target_dtype or dtype).requires_grad_()
    found = xent.linear_cross_entropy(h, W, q, linear_bias=b, reduction=reduction, loss_dtype=torch.float32)
    theirs = xent.cross_entropy(F.linear(h, W, b), q, reduction=reduction, loss_dtype=torch.float32)
    q64 = q.detach().double().requires_grad_()
    truth = oracle.cross_entropy(F.linear(h.double(), W.double(), b.double()), q64, reduction=reduction)
    g, scale = oracle.upstream_for(truth), 2.0**10  # of a loss scaler, which keeps small gradients in float16's range
    ours, other = (torch.autograd.grad(loss * scale, q, g.float())[0] for loss in (found, theirs))
    (exact,) = torch.autograd.grad(truth * scale, q64, g)
    assert ours.dtype == q.dtype
    assert (ours.double() - exact).norm() <= 1.05 * (other.double() - exact).norm() + 1e-6 * exact.norm()


def test_autocast() -> None:
    h, W, b, q = soft_problem(6, dtype=torch.float32)
    for reduction in ("mean", "none"):
        with torch.autocast("cpu", torch.bfloat16):
            found = xent.linear_cross_entropy(h, W, q, linear_bias=b, reduction=reduction)
            expected = xent.cross_entropy(F.linear(h, W, b), q, reduction=reduction)
        half = [t.detach().bfloat16() for t in (h, W, b)]
        exact = xent.linear_cross_entropy(*half[:2], q, linear_bias=half[2], reduction=reduction, loss_dtype=h.dtype)
        assert torch.equal(*grads(found, q), *grads(exact, q)), "of the same products, which this CPU may round or not"
        torch.testing.assert_close(grads(found, q), grads(expected, q), rtol=2e-2, atol=5e-2)


def test_heads_of_more_dimensions() -> None:
    torch.manual_seed(0)
    h, W = (torch.randn(s, dtype=torch.float64) for s in ((4, D), (C, 2, 3, D)))
    q = torch.rand(4, C, 2, 3, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "none"):
        found = xent.linear_cross_entropy(h, W, q, reduction=reduction)
        expected = oracle.cross_entropy(torch.einsum("nd,cijd->ncij", h, W), q, reduction=reduction)
        assert_close(grads(found, q), grads(expected, q))


def loss_by_rows(reduction: str) -> Any:
    def loss(h: Tensor, W: Tensor, q: Tensor) -> Tensor:
        return xent.linear_cross_entropy(h, W, q, reduction=reduction, max_bytes=400, label_smoothing=0.1).sum()

    return loss


@every_reduction
def test_compile_and_func_grad(reduction: str) -> None:
    torch._dynamo.reset()
    h, W, _, q = soft_problem(6)
    expected = torch.autograd.grad(loss_by_rows(reduction)(h, W, q), (h, W, q))
    compiled = torch.compile(loss_by_rows(reduction), fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(h, W, q), (h, W, q)), expected)
    plain = [t.detach() for t in (h, W, q)]
    assert_close(func.grad(loss_by_rows(reduction), argnums=(0, 1, 2))(*plain), expected)
    assert_close(func.grad(loss_by_rows(reduction), argnums=2)(*plain), expected[2])


@every_reduction
def test_it_is_not_differentiated_again(reduction: str) -> None:
    h, W, _, q = soft_problem(6)
    for leaf in (h, q):
        (g,) = torch.autograd.grad(loss_by_rows(reduction)(h, W, q), leaf, create_graph=True)
        for source in (h, W, q):
            with pytest.raises(NotImplementedError, match="double backward"):
                torch.autograd.grad(g.sum(), source, retain_graph=True)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        func.jvp(lambda q: loss_by_rows(reduction)(h.detach(), W.detach(), q), (q.detach(),), (q.detach(),))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of any tensor that an operation made, but for those of a given shape."""

    def __init__(self, result: torch.Size) -> None:
        super().__init__()
        self.result, self.bytes = result, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(t, Tensor) and t.shape[-2:] != self.result:
                self.bytes = max(self.bytes, t.numel() * t.itemsize)
        return found


@every_reduction
def test_by_blocks(reduction: str) -> None:
    h, W, _, q = soft_problem(1000)
    budget = 20_000
    with Largest(q.shape) as largest:
        xent.linear_cross_entropy(h.detach(), W.detach(), q, reduction=reduction, max_bytes=budget).sum().backward()
    assert largest.bytes <= max(budget, h.nbytes)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_candidates(dtype: torch.dtype, shift: bool) -> None:
    """K classes per position, with ignored and equal ones: as of the logits, whatever the blocks."""
    generator = torch.Generator().manual_seed(0)
    h, W = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 6, 8), (50, 8)))
    h, W = h.to(dtype).requires_grad_(), W.to(dtype).requires_grad_()
    y = torch.randint(50, (2, 6, 3), generator=generator)
    y[0, 2], y[1, 3, 1], y[1, 4] = -100, -100, 7
    options = {"softcap": 5.0, "entropy": True, "prediction": True}
    found = xent.linear_token_stats(h, W, y, shift=shift, max_bytes=W.shape[0] * 40, **options)
    logits = h.double() @ W.double().T
    x, target = (logits[:, :-1], y[:, 1:]) if shift else (logits, y)
    expected = xent.token_stats(x, target, dim=-1, **options)
    g = torch.randn(found.log_prob.shape, generator=generator)
    both = [(stats.log_prob * g).sum() + stats.entropy.sum() for stats in (found, expected)]  # type: ignore[union-attr]
    grads = [torch.autograd.grad(value, (h, W)) for value in both]
    close = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.2}
    for a, b in zip((*found[:3], *grads[0]), (*expected[:3], *grads[1]), strict=True):
        torch.testing.assert_close(a.double(), b.double(), **close)  # type: ignore[arg-type]
