"""The options that torch does not have, each by itself and with the others."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from oracle import Options, loss_and_grad
from pairs import pairwise
from torch import Tensor
from torch.nn import functional as F

import xent

Shape = tuple[int, ...]
FLOAT32 = torch.finfo(torch.float32)


def batch(shape: Shape, target: Shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Mild logits, where nothing cancels, and index targets of 4 classes or fewer."""
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.float64).to(dtype), torch.randint(4, target)


def assert_true(x: Tensor, target: Tensor, weight: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
    """Loss and gradient of rows (N, C) are those of the formula; returns them."""
    ours = loss_and_grad(xent.cross_entropy, x, target, weight, **options)
    truth = oracle.true_loss_and_grad(x, target, weight, **options)
    oracle.assert_loss(ours[0], truth[0])
    oracle.assert_grad(ours[1], truth[1], None if target.shape == x.shape else target)
    return ours


# dim

DIMS = [
    pytest.param((5,), (), None, 0, id="(C)"),
    pytest.param((5,), (), -1, 0, id="(C), -1"),
    pytest.param((3, 5), (3,), None, 1, id="(N, C)"),
    pytest.param((5, 3), (3,), 0, 0, id="(C, N), 0: torch has no such layout"),
    pytest.param((3, 5, 4), (3, 4), None, 1, id="(N, C, d1)"),
    pytest.param((3, 4, 5), (3, 4), None, 2, id="(B, T, V)"),
    pytest.param((3, 4, 4), (3, 4), 1, 1, id="(N, C, d1), C = d1"),
    pytest.param((3, 4, 4), (3, 4), -1, 2, id="(B, T, V), T = V"),
    pytest.param((2, 5, 3, 4), (2, 3, 4), None, 1, id="(N, C, d1, d2)"),
    pytest.param((2, 3, 4, 5), (2, 3, 4), None, 3, id="(B, H, T, V)"),
    pytest.param((2, 3, 5, 4), (2, 3, 4), 2, 2, id="a middle dimension"),
    pytest.param((2, 3, 5, 4), (2, 3, 4), -2, 2, id="a middle dimension, from the end"),
    pytest.param((5, 2, 3), (2, 3), 0, 0, id="the first dimension"),
]


@pairwise(layout={str(case.id): case.values for case in DIMS}, dtype=oracle.ALL_DTYPES, reduction=["none", "mean"])
def test_class_dimension(layout: tuple[Shape, Shape, int | None, int], dtype: torch.dtype, reduction: str) -> None:
    """The loss over any dimension is that of the rows laid out with the classes last."""
    shape, target_shape, dim, axis = layout
    x, y = batch(shape, target_shape, dtype)
    loss, grad = loss_and_grad(xent.cross_entropy, x, y, dim=dim, reduction=reduction)
    truth = oracle.true_loss_and_grad(x, y, dim=axis, reduction=reduction)
    assert loss.shape == (target_shape if reduction == "none" else ())
    oracle.assert_loss(loss, truth[0])
    oracle.assert_grad(grad, truth[1], y, dim=axis)


@pytest.mark.parametrize(("shape", "_target", "dim", "axis"), DIMS)
def test_class_dimension_of_probabilities(shape: Shape, _target: object, dim: int | None, axis: int) -> None:
    x, _ = batch(shape, ())
    q = torch.rand(shape, dtype=torch.float64).softmax(axis)
    given = axis if len(shape) > 2 else dim  # three dimensions and more fit two readings
    loss, grad = loss_and_grad(xent.cross_entropy, x, q, dim=given, reduction="none")
    torch.testing.assert_close((loss, grad), oracle.true_loss_and_grad(x, q, dim=axis, reduction="none"))


@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [
        pytest.param((3, 4, 4), (3, 4), id="T = V"),
        pytest.param((2, 4, 4, 4), (2, 4, 4), id="T = H = V"),
        pytest.param((3, 4, 5), (3, 4, 5), id="probabilities"),
        pytest.param((0, 4, 4), (0, 4), id="no rows, T = V"),
    ],
)
def test_two_readings_are_never_guessed(shape: Shape, target_shape: Shape) -> None:
    x, y = torch.zeros(shape), torch.zeros(target_shape, dtype=torch.float32 if shape == target_shape else torch.int64)
    both = (
        rf"dim: input .* can be read in two ways, with the classes in dimension 1 \({shape[1]} classes, "
        rf"PyTorch's layout\) or in the last \({shape[-1]} classes, a language model's\): pass dim=1 or dim=-1"
    )
    with pytest.raises(ValueError, match=both):
        xent.cross_entropy(x, y)
    if x.numel():
        assert xent.cross_entropy(x, y, dim=1).isfinite()
        assert xent.cross_entropy(x, y, dim=-1).isfinite()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", oracle.ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"softcap": FLOAT32.max}, id="softcap, the largest"),
        pytest.param({"softcap": FLOAT32.tiny}, id="softcap, the smallest"),
        pytest.param({"logit_scale": 1e-60}, id="logit_scale that is 0 in float32"),
        pytest.param({"logit_scale": 1e4, "softcap": FLOAT32.tiny}, id="logit_scale / softcap is inf in float32"),
    ],
)
def test_the_largest_and_the_smallest(options: Options, dtype: torch.dtype) -> None:
    """Of a cap that does not bound, and of logits that are all alike; beside a logit of 0, which stays 0."""
    x, y = torch.tensor([[0.0, 2.0, -1.0]], dtype=dtype), torch.tensor([1])
    loss, grad = loss_and_grad(xent.cross_entropy, x, y, **options)
    alike = min(options.values()) < 1
    oracle.assert_loss(loss, oracle.true_loss_and_grad(x * 0 if alike else x, y)[0])
    assert grad.isfinite().all()
    assert not alike or grad[0, 1:].double().abs().max() < 1e-30


# normalizer and on_empty


@pairwise(
    normalizer={"7": 7, "2.5": 2.5, "int": torch.tensor(7), "32": torch.tensor(2.5), "64": torch.tensor(2.5).double()},
    weighted=[False, True],
    soft=[False, True],
)
def test_normalizer_replaces_the_count(normalizer: float | Tensor, soft: bool, weighted: bool) -> None:
    x, y = batch((6, 4), (6,))
    y[2] = -100
    target = torch.rand_like(x) if soft else y
    weight = torch.rand(4).double() if weighted else None
    loss, grad = loss_and_grad(xent.cross_entropy, x, target, weight, normalizer=normalizer)
    total, total_grad = loss_and_grad(xent.cross_entropy, x, target, weight, reduction="sum")
    torch.testing.assert_close((loss * float(normalizer), grad * float(normalizer)), (total, total_grad))


def test_normalizer_of_an_accumulated_batch() -> None:
    """What it is for: micro-batches of unlike numbers of tokens add up to the one big batch."""
    x, y = batch((10, 4), (10,))
    y[[0, 1, 7]] = -100
    whole = loss_and_grad(xent.cross_entropy, x, y)
    parts = [
        loss_and_grad(xent.cross_entropy, x[part], y[part], normalizer=(y != -100).sum())
        for part in (slice(0, 3), slice(3, 10))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole[0])
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole[1])


@pytest.mark.parametrize("C", [5, 20_000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_normalizer_that_changes_before_backward(C: int, z_loss: float) -> None:
    """As torch has it for whatever a gradient depends on: an error, and not the gradient of another loss."""
    x, y, count = torch.zeros(4, C, requires_grad=True), torch.tensor([0, 1, 2, 3]), torch.tensor(4.0)
    loss = xent.cross_entropy(x, y, normalizer=count, z_loss=z_loss)
    count.add_(4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_normalizer_that_requires_grad() -> None:
    x, y = batch((6, 4), (6,))
    count = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = xent.cross_entropy(x, y, normalizer=count)
    (grad,) = torch.autograd.grad(loss, count)
    torch.testing.assert_close(grad, -loss / 3)


def test_all_ignored_with_a_normalizer_is_zero() -> None:
    x, _ = batch((6, 4), ())
    loss, grad = loss_and_grad(xent.cross_entropy, x, torch.full((6,), -100), normalizer=5)
    assert loss == 0
    assert not grad.any()


@pairwise(options=[{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}], weighted=[False, True], rows=[0, 6])
def test_on_empty(rows: int, options: Options, weighted: bool) -> None:
    """All ignored, or none there at all: "zero" makes 0 of torch's NaN; the gradients are 0 in both."""
    x, y = torch.randn(rows, 4), torch.full((rows,), -100)
    weight = torch.rand(4) if weighted else None
    for on_empty in ("nan", "zero"):
        loss, grad = loss_and_grad(xent.cross_entropy, x, y, weight, on_empty=on_empty, **options)
        assert loss.isnan() if on_empty == "nan" else loss == 0
        assert not grad.any()
    if rows == 0:
        assert xent.cross_entropy(x, x, on_empty="zero") == 0
        assert xent.cross_entropy(x, x, on_empty="nan").isnan()


def test_on_empty_changes_nothing_else() -> None:
    """Neither a batch with a target that counts, nor 0/0 from weights of zero."""
    x, y = batch((6, 4), (6,))
    y[1:] = -100
    for weight in (None, torch.rand(4).double()):
        plain, zero = (xent.cross_entropy(x, y, weight, on_empty=on_empty) for on_empty in ("nan", "zero"))
        assert plain.equal(zero)
    assert xent.cross_entropy(x, y, torch.zeros(4), on_empty="zero").isnan()


# z_loss, logit_scale, softcap

FORMULAS = [
    pytest.param({"z_loss": 0.3}, id="z_loss: lambda lse^2 for each position that counts, unweighted"),
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"logit_scale": 0.25}, id="logit_scale"),
    pytest.param({"logit_scale": -1.5}, id="negative logit_scale"),
    pytest.param({"logit_scale": 0.0}, id="logit_scale of 0: uniform"),
    pytest.param({"logit_scale": 3.0, "softcap": 2.0}, id="logit_scale goes before the softcap"),
    pytest.param({"z_loss": 0.3, "logit_scale": 3.0, "softcap": 2.0, "label_smoothing": 0.1}, id="all together"),
]


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pairwise(
    options={str(case.id): case.values[0] for case in FORMULAS},
    dtype=oracle.ALL_DTYPES,
    reduction=["none", "mean", "sum"],
    weighted=[False, True],
)
def test_formula(options: Options, soft: bool, weighted: bool, reduction: str, dtype: torch.dtype) -> None:
    x, y = batch((6, 4), (6,), dtype)
    y[2] = -100
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=dtype) if weighted else None
    assert_true(x, torch.rand(6, 4).to(dtype) if soft else y, weight, reduction=reduction, **options)


def test_options_of_the_logits_are_those_of_the_logits() -> None:
    x, y = batch((6, 4), (6,))
    torch.testing.assert_close(
        loss_and_grad(xent.cross_entropy, x, y, softcap=2.0, logit_scale=3.0),
        loss_and_grad(lambda x: F.cross_entropy(2 * (3 * x / 2).tanh(), y), x),
    )


def test_softcap_of_infinite_logits_is_finite() -> None:
    """tanh is bounded: a masked class has the score -kappa, as in the formula."""
    x, y = batch((6, 4), (6,))
    x[:, 3], y[:] = -torch.inf, 0
    loss, grad = assert_true(x, y, softcap=2.0)
    assert loss.isfinite()
    assert grad.isfinite().all()


# loss_dtype


@pairwise(dtype=oracle.ALL_DTYPES, loss_dtype=oracle.ALL_DTYPES, reduction=["none", "mean", "sum"])
def test_loss_dtype(reduction: str, loss_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The dtype of the result, and no rounding before it; the gradient keeps that of the logits."""
    x, y = batch((6, 4), (6,), dtype)
    loss, grad = loss_and_grad(xent.cross_entropy, x, y, loss_dtype=loss_dtype, reduction=reduction)
    truth = oracle.true_loss_and_grad(x, y, reduction=reduction)
    assert loss.dtype == loss_dtype
    assert grad.dtype == dtype
    arithmetic = oracle.TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    oracle.assert_loss(loss, truth[0], slack=max(1.0, arithmetic / oracle.TOLERANCE[loss_dtype]))
    oracle.assert_grad(grad, truth[1], y)


def test_loss_dtype_keeps_what_half_precision_would_round() -> None:
    x, y = batch((1000, 4), (1000,), torch.bfloat16)
    loss = xent.cross_entropy(x, y, loss_dtype=torch.float32)
    assert loss.item() != xent.cross_entropy(x, y).item()
    assert loss.item() == pytest.approx(oracle.cross_entropy(x, y).item(), rel=1e-6)


def test_loss_dtype_under_autocast() -> None:
    x, y = batch((6, 4), (6,), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert xent.cross_entropy(x, y, loss_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_uniform_logits_under_every_option() -> None:
    """log C whatever the smoothing; and z_loss adds lambda (log C)^2."""
    y = torch.tensor([0, 3])
    loss = xent.cross_entropy(torch.zeros(2, 4).double(), y, label_smoothing=0.2, z_loss=0.5, softcap=3.0)
    assert loss.item() == pytest.approx(math.log(4) + 0.5 * math.log(4) ** 2, rel=1e-14)
