"""The sparse gradient of a linear head: the same loss to the bit, the gradient on average, and its variance's bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import pairwise
from products import Products
from test_linear import BUDGETS, OPTIONS, REDUCTIONS, C, D, assert_close, every_target, grads, problem
from torch import Tensor
from torch.nn import functional as F

import xent
from xent._head import blocks

SPARSE = {name: options for name, options in OPTIONS.items() if name != "all"}
SPARSE["all but smoothing"] = {**OPTIONS["all"], "label_smoothing": 0.0}
SPARSE["all but softcap"] = {**OPTIONS["all"], "softcap": None}
TINY = 1e-13


@every_target
@pairwise(options=SPARSE, max_bytes=BUDGETS, reduction=REDUCTIONS, shift={"": False, "shift": True})
def test_a_tiny_resolution_is_exact(
    options: dict[str, Any], max_bytes: int | None, reduction: str, shift: bool, soft: bool
) -> None:
    """And with any other the loss is the same to the bit."""
    h, W, b, y = problem(4, 5, soft=soft)
    leaves = [h, W, b, y.requires_grad_()] if soft else [h, W, b]

    def loss(grad_resolution: float | None) -> Tensor:
        given = {**options, "reduction": reduction, "max_bytes": max_bytes, "shift": shift}
        return xent.linear_cross_entropy(h, W, y, linear_bias=b, grad_resolution=grad_resolution, **given)

    expected, found = loss(None), loss(TINY)
    assert torch.equal(found, expected)
    assert torch.equal(loss(0.3), expected)
    assert_close(grads(found, *leaves), grads(expected, *leaves))


def test_token_stats() -> None:
    """The entropy too, whose gradient has p log p."""
    h, W, b, y = problem(4, 5)
    options: dict[str, Any] = {"softcap": 2.0, "logit_scale": 0.7, "entropy": True, "prediction": True}
    expected = xent.linear_token_stats(h, W, y, linear_bias=b, max_bytes=500, **options)
    found = xent.linear_token_stats(h, W, y, linear_bias=b, max_bytes=500, grad_resolution=TINY, **options)
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        assert torch.equal(ours, theirs)
        if name != "prediction":
            assert_close(grads(ours, h, W, b), grads(theirs, h, W, b))


@pytest.mark.parametrize(
    "asked", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_product_and_only_what_is_asked_for(asked: tuple[int, ...], reduction: str) -> None:
    *tensors, y = problem(12)
    h, W, b = (t.detach().requires_grad_(bool(yes)) for t, yes in zip(tensors, asked, strict=True))
    with Products() as made:
        loss = xent.linear_cross_entropy(h, W, y, linear_bias=b, reduction=reduction, grad_resolution=TINY).sum()
        loss.backward()
    assert (made.count, made.work) == (1, 8 * C * D)
    assert [t.grad is not None for t in (h, W, b)] == list(asked)
    expected = F.cross_entropy(F.linear(h, W, b), y, reduction=reduction).sum()
    wanted = [t for t in (h, W, b) if t.requires_grad]
    assert_close([t.grad for t in wanted], list(torch.autograd.grad(expected, wanted)))


def large(dtype: torch.dtype = torch.float64, N: int = 48, D: int = 16, C: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    h, W = torch.randn(N, D), torch.randn(C, D) / 2
    return h.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), torch.randint(C, (N,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}], ids=str)
def test_errors_of_a_tiny_resolution(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """No larger than those of the dense path."""
    h, W, y = large(dtype)
    doubles = [t.detach().double().requires_grad_() for t in (h, W)]
    truth = grads(F.cross_entropy(F.linear(*doubles), y, **options), *doubles)
    exact = grads(xent.linear_cross_entropy(h, W, y, **options), h, W)
    found = grads(xent.linear_cross_entropy(h, W, y, grad_resolution=TINY, **options), h, W)
    for a, b, t in zip(found, exact, truth, strict=True):
        assert a.dtype == dtype
        assert (a - t).norm() <= 1.1 * (b - t).norm() + 1e-6 * t.norm()


@pytest.mark.parametrize("r", [1 / 16, 1 / 128])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.01}, {"softcap": 4.0}], ids=str)
def test_mean_and_variance(r: float, options: dict[str, Any]) -> None:
    """The mean of many draws is the exact gradient, and the variance is at most r times that of a random target."""
    h, W, y = large()
    exact = grads(xent.linear_cross_entropy(h, W, y, reduction="sum", **options), h, W)

    def draw(count: int, leaf: int) -> Tensor:
        """The gradient of that leaf for each of `count` copies of the rows, in one call for h."""
        many = h.detach().repeat(count, 1).requires_grad_()
        loss = xent.linear_cross_entropy(many, W, y.repeat(count), reduction="sum", grad_resolution=r, **options)
        return grads(loss, many, W)[leaf]

    draws = draw(400, 0).unflatten(0, (400, -1)), torch.stack([draw(1, 1) for _ in range(100)])
    p = F.linear(h, W).detach().softmax(1)
    g = 1 + 0.02 * F.linear(h, W).detach().logsumexp(1).max() if options.get("z_loss") else 1.0
    bounds = (r * g**2 * (p @ W.detach().pow(2).sum(1)).sum(), r * g**2 * (h.detach().pow(2).sum(1)).sum())
    for found, truth, bound in zip(draws, exact, bounds, strict=True):
        variance = found.var(0).sum()
        assert 0 < variance <= bound
        assert (found.mean(0) - truth).norm() ** 2 <= 1.5 * variance / len(found)


def test_the_same_seed_is_the_same_gradient() -> None:
    """Whatever the threads and the blocks; another seed is another one; nothing else draws."""
    h, W, y = large(N=300)

    def draw(seed: int, max_bytes: int | None = None, **options: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        loss = xent.linear_cross_entropy(h, W, y, grad_resolution=0.1, max_bytes=max_bytes, **options)
        return *grads(loss, h, W), torch.rand(2)

    first, threads = draw(1), torch.get_num_threads()
    assert not torch.equal(draw(2)[0], first[0])
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for budget in (None, 400 * 8 * 100, 400 * 8 * 64):
                for a, b in zip(draw(1, budget), first, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, draw(1), first))
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    one, other = (draw(seed, generator=g) for seed, g in zip((1, 2), generators, strict=True))
    assert torch.equal(one[0], other[0])
    assert torch.equal(draw(1, generator=generators[0])[2], torch.manual_seed(1) and torch.rand(2))
    torch.manual_seed(1)
    with torch.no_grad():
        xent.linear_cross_entropy(h, W, y, grad_resolution=0.1)
    assert torch.equal(torch.rand(2), first[2]), "a seed is drawn with gradients off, too"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, draw(1), first))
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_and_repeated_backward(reduction: str) -> None:
    h, W, b, y = problem(6)
    loss = xent.linear_cross_entropy(h, W, y, linear_bias=b, reduction=reduction, grad_resolution=0.2).sum() * 3
    first = torch.autograd.grad(loss, (h, W, b), retain_graph=True)
    half = torch.autograd.grad(loss, (h, W, b), torch.tensor(0.5, dtype=torch.float64), retain_graph=True)
    for a, c in zip(first, half, strict=True):
        assert_close(a, 2 * c)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows(reduction: str) -> None:
    """May hold anything, and may be all."""
    h, W, b, y = problem(6)
    h.data[y == -100] = torch.nan
    options: dict[str, Any] = {"linear_bias": b, "reduction": reduction, "label_smoothing": 0.1}
    loss = xent.linear_cross_entropy(h, W, y, grad_resolution=TINY, **options)
    found, expected = grads(loss, h, W, b), grads(xent.linear_cross_entropy(h, W, y, **options), h, W, b)
    assert_close(found, expected)
    assert found[0][y == -100].eq(0).all()
    y.fill_(-100)
    loss = xent.linear_cross_entropy(h, W, y, grad_resolution=TINY, **options).sum()
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss, (h, W, b)))
    empty = xent.linear_cross_entropy(h[:0], W, y[:0], reduction="sum", grad_resolution=0.1)
    assert torch.autograd.grad(empty, W)[0].eq(0).all()


def test_heads_of_more_dimensions_and_tied_weights() -> None:
    torch.manual_seed(0)
    h, W = torch.randn(4, D).double().requires_grad_(), torch.randn(C, 2, 3, D).double().requires_grad_()
    y = torch.randint(C, (4, 2, 3))
    for reduction in ("mean", "none"):
        found = xent.linear_cross_entropy(h, W, y, reduction=reduction, grad_resolution=TINY)
        assert_close(grads(found, h, W), grads(xent.linear_cross_entropy(h, W, y, reduction=reduction), h, W))
    tied = W[:, 0, 0]
    loss = xent.linear_cross_entropy(tied[:3], tied, y[:3, 0, 0], grad_resolution=TINY)
    assert_close(grads(loss, W), grads(xent.linear_cross_entropy(tied[:3], tied, y[:3, 0, 0]), W))


def test_module_takes_it() -> None:
    h, _, _, y = problem(6)
    criterion = xent.LinearCrossEntropyLoss(D, C, dtype=torch.float64, grad_resolution=TINY)
    expected = xent.linear_cross_entropy(h, criterion.linear.weight, y)
    assert torch.equal(criterion(h, y), expected)
    assert_close(grads(criterion(h, y), h), grads(expected, h))


def test_entries_are_all_that_is_saved_beyond_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bytes each, at most 1 / r + 2 for a row, and a few numbers per row."""
    h, W, y = large(torch.float32, N=100, C=3000)
    saved: list[Tensor] = []
    monkeypatch.setattr(blocks, "loss_and_grads", None)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = xent.linear_cross_entropy(h, W, y, grad_resolution=1 / 32)
    own = {t.data_ptr(): t.nbytes for t in saved if t is not None}
    total = sum(size for address, size in own.items() if address not in (h.data_ptr(), W.data_ptr(), y.data_ptr()))
    assert total <= 100 * (8 * (32 + 2) + 5 * 8)
    loss.backward()
