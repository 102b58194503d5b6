"""The losses of a linear head: the same numbers as from its logits, whatever the blocks and the options."""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import pytest
import torch
from pairs import pairwise
from products import Products
from torch import Tensor
from torch.nn import functional as F

import xent
from xent._head import blocks as _blocks
from xent._head import products as _products
from xent._rows import dispatch as _primitives

C, D = 7, 5
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 1.5, 1.0, 3.0], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": WEIGHT},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing and weight": {"label_smoothing": 0.3, "weight": WEIGHT},
    "z-loss": {"z_loss": 0.1},
    "softcap and scale": {"softcap": 2.0, "logit_scale": 0.7},
    "all": {"weight": WEIGHT, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 1.3},
}
every_target = pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
BUDGETS = {"1 row": 1, "3 rows": 3 * 8 * (C + 2 * D), "default": None}  # bytes of logits
REDUCTIONS = ["mean", "sum", "none"]


def problem(
    *batch: int, soft: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, bias, and targets of which every third is ignored."""
    torch.manual_seed(0)
    h, W, b = torch.randn(*batch, D), torch.randn(C, D), torch.randn(C)
    y = torch.randn(*batch, C).softmax(-1).to(dtype) if soft else torch.randint(C, batch)
    if not soft:
        y.view(-1)[::3] = -100
    return h.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), y


def grads(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad(loss, tensors, upstream, retain_graph=True)


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@every_target
@pairwise(options=OPTIONS, max_bytes=BUDGETS, reduction=REDUCTIONS)
def test_loss_and_gradients(options: dict[str, Any], max_bytes: int | None, reduction: str, soft: bool) -> None:
    h, W, b, y = problem(4, 5, soft=soft)
    found = xent.linear_cross_entropy(h, W, y, linear_bias=b, reduction=reduction, max_bytes=max_bytes, **options)
    expected = oracle.cross_entropy(F.linear(h, W, b), y, dim=-1, reduction=reduction, **options)
    assert_close(found, expected)
    assert_close(grads(found, h, W, b), grads(expected, h, W, b))


@every_target
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_predicts_the_next_position(reduction: str, soft: bool) -> None:
    h, W, b, y = problem(3, 7, soft=soft)  # of two sequences the first target counts, unless it is nobody's
    options = {**OPTIONS["all"], "reduction": reduction}
    found = xent.linear_cross_entropy(h, W, y, linear_bias=b, shift=True, max_bytes=400, **options)
    expected = oracle.cross_entropy(F.linear(h, W, b)[:, :-1], y[:, 1:], dim=-1, **options)
    assert_close(found, expected)
    assert_close(grads(found, h, W, b), grads(expected, h, W, b))
    stats = xent.linear_token_stats(h, W, torch.ones(3, 7, dtype=torch.uint8), shift=True)
    assert stats.log_prob.shape == (3, 6)


@pytest.mark.parametrize("asked", [a for a in itertools.product([False, True], repeat=3) if any(a)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_that_are_asked_for(
    reduction: str, asked: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [t.detach().requires_grad_(yes) for t, yes in zip(problem(6)[:3], asked, strict=True)]
    h, W, b, y = *tensors, problem(6)[3]
    made = []
    original = _blocks.Grads.found
    monkeypatch.setattr(_blocks.Grads, "found", lambda self: made.append(self) or original(self))
    loss = xent.linear_cross_entropy(h, W, y, linear_bias=b, reduction=reduction).sum()
    expected = oracle.cross_entropy(F.linear(h, W, b), y, reduction=reduction).sum()
    wanted = [t for t in tensors if t.requires_grad]
    assert_close(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted))
    assert [t is not None for t in (made[-1].dh, made[-1].dW, made[-1].db)] == list(asked)


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("sum", 3), ("none", 4)])
def test_products(reduction: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all rows that count, each (n, C, D); with no_grad only the first; none of an ignored row."""
    h, W, _, y = problem(12)
    with Products() as made:
        xent.linear_cross_entropy(h, W, y, reduction=reduction).sum().backward()
    assert (made.count, made.work) == (products, products * 8 * C * D)
    monkeypatch.setattr(_primitives, "row_gradient", None)
    with Products() as made, torch.no_grad():
        xent.linear_cross_entropy(h, W, y, reduction=reduction)
    assert (made.count, made.work) == (1, 8 * C * D)


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [
        pytest.param(66, 30, [22, 22, 22], id="30, 30 and 6 would fit, too"),
        pytest.param(200, 100, [64, 64, 72], id="whole tiles, where the product fills them up"),
        pytest.param(128, 95, [64, 64], id="no more rows than fit"),
        pytest.param(66, 0, [1] * 66, id="one by one"),
    ],
)
def test_blocks_are_of_equal_size(count: int, most: int, sizes: list[int]) -> None:
    h, W, _, y = (t.detach() for t in problem(count * 3 // 2 + 1))
    y[:] = -100
    y[:count] = 0
    head = _blocks.HeadOptions(_blocks.RowSpec(), torch.float64, most * 8 * (C + 2 * D))
    blocks = _blocks.Blocks(_blocks.HeadRows(h, W, None, y, None, None), head)
    assert [len(block.hidden) for block in blocks] == sizes
    assert len(blocks.buffer) <= max(1, most)


@pytest.mark.parametrize("classes", [1, 7, 8, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sum_of_outer_products_in_slices(classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 classes at a time: fewer, a remainder, an even number of slices, one class left over."""
    torch.manual_seed(0)
    monkeypatch.setattr(_products, "SLICE_BYTES", 4 * 3 * dtype.itemsize)
    G, h, total = torch.randn(5, classes).to(dtype), torch.randn(5, 3).bfloat16(), torch.randn(classes, 3)
    product = (G.double().t() @ h.double()).float()
    rounded = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for block, error in ((0, rounded), (1, max(rounded**2, 1e-6)), (2, rounded)):  # every other one to twice the digits
        found = total.clone()
        _products.add_outer(found, G, h, block)
        assert (found - (total + product if block else product)).norm() <= error * (product.norm() + total.norm())


@pytest.mark.parametrize("classes", [1, 7, 8, 9])
def test_products_with_the_head_in_slices(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a half-precision head with float32: all slices count, for the logits and for the hidden gradient."""
    torch.manual_seed(0)
    monkeypatch.setattr(_products, "SLICE_BYTES", 4 * 3 * 4)
    h, W, G = torch.randn(5, 3).bfloat16(), torch.randn(classes, 3).bfloat16(), torch.randn(5, classes)
    logits = _products.logits_of(h, W, None, torch.empty(5, classes))
    torch.testing.assert_close(logits, h.float() @ W.float().t())
    torch.testing.assert_close(_products.hidden_gradient(G, W), (G @ W.float()).bfloat16())


def test_upstream_and_repeated_backward() -> None:
    h, W, b, y = problem(6)
    for reduction in ("mean", "none"):
        loss = xent.linear_cross_entropy(h, W, y, linear_bias=b, reduction=reduction).sum() * 3
        first = torch.autograd.grad(loss, (h, W, b), retain_graph=True)
        first = tuple(g.clone() for g in first)
        again = torch.autograd.grad(loss, (h, W, b), torch.tensor(0.5, dtype=torch.float64), retain_graph=True)
        last = torch.autograd.grad(loss, (h, W, b))
        assert all(torch.equal(a, c) and torch.equal(a, 2 * b) for a, b, c in zip(first, again, last, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, (h, W, b))


def test_normalizer_may_be_anything() -> None:
    h, W, _, y = problem(6)
    n = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    for normalizer in (3, 3.1, torch.tensor(3), n):  # 3.1 is another number in float32
        found = xent.linear_cross_entropy(h, W, y, normalizer=normalizer)
        expected = oracle.cross_entropy(F.linear(h, W), y, reduction="sum") / normalizer
        assert_close(found, expected)
        assert_close(grads(found, h, W), grads(expected, h, W))
    found = xent.linear_cross_entropy(h, W, y, normalizer=n)
    (d,) = torch.autograd.grad(found, n)
    assert_close(d, -found.detach() / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_counts(reduction: str, dtype: torch.dtype) -> None:
    h, W, _, y = problem(6, dtype=dtype)
    y.fill_(-100)
    h.data.fill_(torch.nan)
    loss = xent.linear_cross_entropy(h, W, y, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else loss.eq(0).all()
    loss.sum().backward()
    assert h.grad.eq(0).all()
    assert W.grad.eq(0).all()
    assert xent.linear_cross_entropy(h, W, y, on_empty="zero") == 0
    empty = xent.linear_token_stats(h[:0], W, y[:0], entropy=True, prediction=True)
    assert [len(stat) for stat in empty] == [0] * 4


def test_ignored_rows_may_hold_anything() -> None:
    h, W, b, y = problem(6)
    expected = grads(xent.linear_cross_entropy(h, W, y, linear_bias=b), h, W, b)
    bad = h.detach().clone()
    bad[y == -100] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 1], dtype=torch.float64)
    bad.requires_grad_()
    assert all(map(torch.equal, grads(xent.linear_cross_entropy(bad, W, y, linear_bias=b), bad, W, b), expected))


def test_masked_vocabulary() -> None:
    h, W, b, y = problem(6)
    masked = b.detach().clone()
    masked[:2] = -torch.inf
    y = y.clamp(min=-100).where(y < 0, y.clamp(min=2))
    found = xent.linear_cross_entropy(h, W, y, linear_bias=masked)
    expected = oracle.cross_entropy(F.linear(h, W, masked), y)
    assert_close(found, expected)
    dW = grads(found, W)[0]
    assert dW[:2].eq(0).all()
    assert_close(dW, grads(expected, W)[0])


def test_token_stats() -> None:
    h, W, b, y = problem(4, 5)
    options = {"softcap": 2.0, "logit_scale": 0.7, "entropy": True, "prediction": True}
    found = xent.linear_token_stats(h, W, y, linear_bias=b, max_bytes=500, **options)
    expected = xent.token_stats(F.linear(h, W, b), y, dim=-1, **options)
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        assert_close(ours, theirs)
        if name != "prediction":
            assert_close(grads(ours, h, W, b), grads(theirs, h, W, b))
    assert found.prediction.view(-1)[0] == -1


def test_tied_weights() -> None:
    _, W, _, y = problem(6)
    tokens = torch.tensor([0, 1, 2, 3, 2, 1])
    found = xent.linear_cross_entropy(W[tokens], W, y)
    expected = oracle.cross_entropy(F.linear(W[tokens], W), y)
    assert_close(grads(found, W), grads(expected, W))


@pytest.mark.parametrize("soft", [False, True])
def test_heads_of_more_dimensions(soft: bool) -> None:
    torch.manual_seed(0)
    h, W, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, D), (C, 2, 3, D), (C, 2, 3)))
    y = torch.rand(4, C, 2, 3, dtype=torch.float64) if soft else torch.randint(C, (4, 2, 3))
    logits = torch.einsum("nd,cijd->ncij", h, W) + b
    for reduction in ("mean", "none"):
        found = xent.linear_cross_entropy(h, W, y, linear_bias=b, weight=WEIGHT, reduction=reduction)
        expected = oracle.cross_entropy(logits, y, WEIGHT, reduction=reduction)
        assert_close(found, expected)
        assert_close(grads(found, h, W, b), grads(expected, h, W, b))


@oracle.torch_has_linear
def test_module() -> None:
    theirs = torch.nn.LinearCrossEntropyLoss(D, C, bias=True, dtype=torch.float64, weight=WEIGHT, label_smoothing=0.1)
    ours = xent.LinearCrossEntropyLoss(D, C, bias=True, dtype=torch.float64, weight=WEIGHT, label_smoothing=0.1)
    ours.load_state_dict(theirs.state_dict())
    h, _, _, y = problem(6)
    for criterion in (ours, theirs):
        criterion.zero_grad()
        criterion(h, y).backward()
    assert_close(ours(h, y), theirs(h, y))
    assert_close(ours.linear.weight.grad, theirs.linear.weight.grad)
    many = xent.LinearCrossEntropyLoss(D, C, out_features=(2, 3), bias=True)
    assert many(torch.randn(4, D), torch.randint(C, (4, 2, 3))).shape == ()
    assert "num_classes=7" in repr(ours)


def test_the_primitives_write_nowhere_but_into_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer of logits, as large as a block; each block is in it."""
    places = []
    original = _primitives.row_gradient

    def watch(logits: Tensor, *args: Any) -> Tensor:
        places.append((logits.data_ptr(), args[-1].data_ptr()))
        return original(logits, *args)

    monkeypatch.setattr(_primitives, "row_gradient", watch)
    h, W, _, y = problem(12)
    xent.linear_cross_entropy(h, W, y, max_bytes=500).backward()
    assert len(places) > 1
    assert len(set(places)) == 1
