"""The sparse gradient of a linear head among the rest of PyTorch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from test_linear import C, D, assert_close, grads, problem
from torch import Tensor, func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import xent

pytestmark = [
    pytest.mark.usefixtures("unchecked"),  # a compiler cannot read the checks
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own, met while it compiles
]
every_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])


def sparse(reduction: str, r: float = 0.2) -> Any:
    def loss(h: Tensor, W: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"reduction": reduction, "max_bytes": 400, "label_smoothing": 0.1}
        return xent.linear_cross_entropy(h, W, y, linear_bias=b, grad_resolution=r, **options).sum()

    return loss


def seeded(loss: Any, *arguments: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    value = loss(*arguments)
    return value.detach(), *torch.autograd.grad(value, [t for t in arguments if t.requires_grad])


@pytest.mark.parametrize(("reduction", "dynamic"), [("mean", True), ("none", None)])
def test_compile(reduction: str, dynamic: bool | None) -> None:
    """One graph, and of the same seed the same gradient."""
    torch._dynamo.reset()
    compiled = torch.compile(sparse(reduction), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (6, 9):
        arguments = problem(N, dtype=torch.float32)
        h, W, b, y = arguments
        for a, c in zip(seeded(compiled, h, W, y, b), seeded(sparse(reduction), h, W, y, b), strict=True):
            torch.testing.assert_close(a, c)


def test_inductor() -> None:
    torch._dynamo.reset()
    h, W, _, y = problem(6, dtype=torch.float32)
    found = seeded(torch.compile(sparse("mean", 1e-9), fullgraph=True), h, W, y)
    for a, c in zip(found, seeded(sparse("mean", 1e-9), h, W, y), strict=True):
        torch.testing.assert_close(a, c)


@every_reduction
def test_shapes_without_numbers(reduction: str) -> None:
    with FakeTensorMode():
        h, W = torch.randn(6, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
        loss = sparse(reduction)(h, W, torch.randint(C, (6,)))
        loss.backward()
        assert h.grad is not None
        assert (loss.shape, h.grad.shape) == ((), (6, D))


@every_reduction
def test_func_checkpoint_and_hooks(reduction: str) -> None:
    h, W, _, y = problem(6)
    loss = sparse(reduction)
    expected = seeded(loss, h, W, y)[1:]
    torch.manual_seed(3)
    assert_close(func.grad(loss, argnums=(0, 1))(h.detach(), W.detach(), y), expected)
    for reentrant in (False, True):
        again = functools.partial(checkpoint, loss, use_reentrant=reentrant)
        torch.manual_seed(3)
        for tensor in (h, W):
            tensor.grad = None
        again(h, W, y).backward()
        assert_close((h.grad, W.grad), expected)
    with torch.autograd.graph.save_on_cpu(), torch.autograd.set_detect_anomaly(True):
        assert_close(seeded(loss, h, W, y)[1:], expected)


@every_reduction
def test_what_is_refused(reduction: str) -> None:
    h, W, _, y = problem(6)
    (g,) = torch.autograd.grad(sparse(reduction)(h, W, y), h, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"double backward.*F?linear"):
        torch.autograd.grad(g.pow(2).sum(), W)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        func.jvp(lambda h: sparse(reduction)(h, W, y), (h.detach(),), (h.detach(),))
    with pytest.raises((NotImplementedError, RuntimeError), match=r"vmap"):
        func.vmap(lambda h, y: sparse(reduction)(h, W.detach(), y))(h.detach()[:, None], y[:, None])


@every_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(reduction: str, dtype: torch.dtype) -> None:
    h, W, b, y = problem(6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found = xent.linear_cross_entropy(h, W, y, linear_bias=b, reduction=reduction, grad_resolution=1e-9)
        expected = xent.linear_cross_entropy(h, W, y, linear_bias=b, reduction=reduction)
    assert torch.equal(found, expected)
    ours, theirs = grads(found, h, W, b), grads(expected, h, W, b)
    assert [g.dtype for g in ours] == [torch.float32] * 3
    for a, c in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, c, rtol=5e-2, atol=2e-2)
