"""The linear losses among the rest of PyTorch: what works, and what is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_linear import C, D, assert_close, problem
from torch import Tensor, func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import xent

pytestmark = [
    pytest.mark.usefixtures("unchecked"),  # a compiler cannot read the checks
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own, met while it compiles
]


def by_rows(reduction: str) -> Any:
    def loss(h: Tensor, W: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
        return xent.linear_cross_entropy(h, W, y, linear_bias=b, reduction=reduction, max_bytes=400).sum()

    return loss


def grads(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), tensors)


every_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])


@pytest.mark.parametrize(("reduction", "dynamic"), [("mean", None), ("none", None), ("mean", True), ("none", False)])
def test_compile(reduction: str, dynamic: bool | None) -> None:
    """One graph, forward and backward; no second compilation when only the number of rows changes."""
    torch._dynamo.reset()
    compiled = torch.compile(by_rows(reduction), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (6, 9, 12):
        h, W, b, y = problem(N, dtype=torch.float32)
        found, expected = compiled(h, W, y, b), by_rows(reduction)(h, W, y, b)
        torch.testing.assert_close(found, expected)
        ours, theirs = torch.autograd.grad(found, (h, W, b)), torch.autograd.grad(expected, (h, W, b))
        for a, c in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, c)
        if N == 9 and dynamic is not False:
            torch._dynamo.config.error_on_recompile = True
    torch._dynamo.config.error_on_recompile = False


def test_compile_token_stats() -> None:
    torch._dynamo.reset()

    def loss(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
        stats = xent.linear_token_stats(h, W, y, entropy=True, prediction=True, shift=True)
        return (stats.log_prob.exp() * stats.entropy * (stats.prediction + 2)).sum()  # type: ignore[operator]

    h, W, _, y = problem(2, 6)
    found, expected = torch.compile(loss, fullgraph=True)(h, W, y), loss(h, W, y)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, (h, W)), torch.autograd.grad(expected, (h, W)))


@every_reduction
def test_shapes_without_numbers(reduction: str) -> None:
    with FakeTensorMode():
        h, W = torch.randn(6, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
        loss = by_rows(reduction)(h, W, torch.randint(C, (6,)))
        loss.backward()
        assert h.grad is not None
        assert (loss.shape, h.grad.shape) == ((), (6, D))
    h, W = torch.empty(6, D, device="meta"), torch.empty(C, D, device="meta")
    y = torch.empty(6, dtype=torch.int64, device="meta")
    assert xent.linear_cross_entropy(h, W, y, reduction="none").shape == (6,)


@every_reduction
def test_func_grad(reduction: str) -> None:
    h, W, b, y = problem(6)
    found = func.grad(by_rows(reduction), argnums=(0, 1, 3))(h.detach(), W.detach(), y, b.detach())
    assert_close(found, grads(by_rows(reduction)(h, W, y, b), h, W, b))
    value, pull = func.vjp(lambda h: by_rows(reduction)(h, W.detach(), y), h.detach())
    assert_close(pull(torch.ones_like(value))[0], grads(by_rows(reduction)(h, W, y), h)[0])


@every_reduction
def test_higher_derivatives_are_refused_and_never_forgotten(reduction: str) -> None:
    h, W, _, y = problem(6)
    (g,) = torch.autograd.grad(by_rows(reduction)(h, W, y), h, create_graph=True)
    assert_close(g, grads(by_rows(reduction)(h, W, y), h)[0])
    with pytest.raises(NotImplementedError, match=r"double backward.*F?linear"):
        torch.autograd.grad(g.pow(2).sum(), W)
    with pytest.raises(NotImplementedError, match="double backward"):
        func.grad(lambda h: func.grad(by_rows(reduction))(h, W.detach(), y).pow(2).sum())(h.detach())


@every_reduction
def test_transforms_without_a_rule_are_refused(reduction: str) -> None:
    h, W, _, y = (t.detach() for t in problem(6))
    loss = by_rows(reduction)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        func.jvp(lambda h: loss(h, W, y), (h,), (h,))
    with pytest.raises(NotImplementedError, match="vmap"):
        func.vmap(lambda h, y: loss(h, W, y))(h[:, None], y[:, None])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(h, h)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            loss(dual, W, y)
        assert loss(h, W, y).isfinite()


@every_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(reduction: str, dtype: torch.dtype) -> None:
    """Products in half precision, as of F.linear; a float32 loss, and gradients in their tensors' own dtypes."""
    h, W, b, y = problem(6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found = xent.linear_cross_entropy(h, W, y, linear_bias=b, reduction=reduction)
        of_half = xent.linear_cross_entropy(h.to(dtype), W, y, linear_bias=b, reduction=reduction)
        expected = F.cross_entropy(F.linear(h, W, b).float(), y, reduction=reduction)
    halves = [t.detach().to(dtype) for t in (h, W)]
    exact = xent.linear_cross_entropy(
        *halves, y, linear_bias=b.detach().to(dtype), reduction=reduction, loss_dtype=torch.float32
    )
    assert found.equal(exact)  # float32, and of the same products
    assert of_half.equal(exact)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    ours, theirs = grads(found, h, W, b), grads(expected, h, W, b)
    assert [g.dtype for g in ours] == [torch.float32] * 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-2)


@every_reduction
def test_checkpoint_hooks_and_modes(reduction: str) -> None:
    h, W, _, y = problem(6)
    expected = grads(by_rows(reduction)(h, W, y), h, W)
    again = checkpoint(by_rows(reduction), h, W, y, use_reentrant=False)
    assert_close(grads(again, h, W), expected)
    with torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True):
        loss = by_rows(reduction)(h, W, y)
        assert_close(torch.autograd.grad(loss, (h, W)), tuple(expected))
    with torch.inference_mode():
        assert_close(by_rows(reduction)(h, W, y), loss.detach())


def test_a_second_backward_elsewhere_does_not_spoil_the_first() -> None:
    """Gradients that were given away are the caller's: a later backward of another loss leaves them alone."""
    h, W, _, y = problem(6)
    xent.linear_cross_entropy(h, W, y).backward()
    kept = W.grad.clone()
    second = xent.linear_cross_entropy(h, W, y)
    assert torch.equal(W.grad, kept)
    (second * 2).backward()
    assert_close(W.grad, 3 * kept)
