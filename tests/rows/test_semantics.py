"""What F.cross_entropy does, and xent with it: each sentence of the specification is a test."""

from __future__ import annotations

import oracle
import pytest
import torch
from oracle import loss_and_grad
from pairs import pairwise
from torch import Tensor
from torch.nn import functional as F

import xent

LAYOUTS = {"(C)": (5,), "(N, C)": (4, 5), "(N, C, d1)": (3, 5, 4), "(N, C, d1, d2)": (2, 5, 3, 2)}
REDUCTIONS = ("none", "mean", "sum")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
either_target = pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
smooth_or_not = pytest.mark.parametrize("label_smoothing", [0.0, 0.1])


def batch(layout: str = "(N, C)", soft: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits and a target; of the index targets of a batch, the first is ignored."""
    torch.manual_seed(0)
    shape = LAYOUTS[layout]
    axis = min(1, len(shape) - 1)
    x = torch.randn(shape, dtype=torch.float64).to(dtype) * 2
    if soft:
        return x, torch.rand(shape, dtype=torch.float64).softmax(axis).to(dtype)
    y = torch.randint(5, shape[:axis] + shape[axis + 1 :])
    if y.dim():
        y.view(-1)[0] = -100
    return x, y


def drop_in(x: Tensor, target: Tensor, *args: Tensor | None, **options: object) -> Tensor:
    """xent.cross_entropy. Probabilities of three or more dimensions fit two layouts, and so must name torch's."""
    return xent.cross_entropy(x, target, *args, dim=1 if x.dim() > 2 and x.shape == target.shape else None, **options)


def assert_as_torch(x: Tensor, *args: Tensor | None, **options: object) -> tuple[Tensor, Tensor]:
    """Loss and gradient are torch's, NaN for NaN; returns xent's."""
    ours, torchs = (loss_and_grad(f, x, *args, **options) for f in (drop_in, F.cross_entropy))
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-13, equal_nan=True)
    return ours


@pytest.mark.usefixtures("backend")
@either_target
@pairwise(layout=LAYOUTS.keys(), reduction=REDUCTIONS, label_smoothing=[0.0, 0.03, 1.0], weighted=[False, True])
def test_every_combination(layout: str, soft: bool, reduction: str, label_smoothing: float, weighted: bool) -> None:
    """Value, shape, dtype and gradient are those of F.cross_entropy, and of the formulas as they are written."""
    x, target = batch(layout, soft)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]).double() if weighted else None
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    ours = assert_as_torch(x, target, weight, **options)
    torch.testing.assert_close(ours, oracle.true_loss_and_grad(x, target, weight, **options), rtol=1e-12, atol=1e-13)


# Mode


def test_shape_alone_selects_probabilities() -> None:
    """Of the shapes (C) and (C), a floating target is a distribution, and class 0 is dimension 0."""
    x, q = batch("(C)", soft=True)
    assert assert_as_torch(x, q)[0].item() == pytest.approx(-(q * x.log_softmax(0)).sum().item())


@every_layout
def test_integer_target_of_the_shape_of_input_is_an_error(layout: str) -> None:
    x, _ = batch(layout)
    for function in (xent.cross_entropy, F.cross_entropy):
        with pytest.raises(RuntimeError):
            function(x, torch.zeros(x.shape, dtype=torch.int64))


# Reductions


@smooth_or_not
def test_mean_of_indices_divides_both_terms_by_the_weights_of_the_valid_targets(label_smoothing: float) -> None:
    x, y = batch()
    weight = torch.rand(5).double()
    options = {"label_smoothing": label_smoothing}
    total = assert_as_torch(x, y, weight, reduction="sum", **options)[0] / weight[y[1:]].sum()
    torch.testing.assert_close(assert_as_torch(x, y, weight, **options)[0], total)


def test_unweighted_mean_divides_by_the_valid_rows() -> None:
    x, y = batch()
    torch.testing.assert_close(assert_as_torch(x, y)[0], assert_as_torch(x, y, reduction="sum")[0] / 3)


@smooth_or_not
def test_mean_of_probabilities_divides_by_the_positions_and_never_by_weights(label_smoothing: float) -> None:
    x, q = batch("(N, C, d1)", soft=True)
    weight = torch.rand(5).double() + 1
    options = {"label_smoothing": label_smoothing}
    total = assert_as_torch(x, q, weight, reduction="sum", **options)[0]
    torch.testing.assert_close(assert_as_torch(x, q, weight, **options)[0], total / (3 * 4))


@smooth_or_not
def test_one_hot_probabilities_agree_with_indices_only_without_weights(label_smoothing: float) -> None:
    x, y = batch()
    y, weight = y.clamp(min=0), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()
    q, options = F.one_hot(y, 5).double(), {"label_smoothing": label_smoothing}
    torch.testing.assert_close(xent.cross_entropy(x, q, **options), xent.cross_entropy(x, y, **options))
    assert not torch.isclose(xent.cross_entropy(x, q, weight, **options), xent.cross_entropy(x, y, weight, **options))


@pairwise(layout=LAYOUTS.keys(), reduction=REDUCTIONS, label_smoothing=[0.0, 0.1])
def test_probabilities_and_weights_are_differentiable(layout: str, reduction: str, label_smoothing: float) -> None:
    x, q = batch(layout, soft=True)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    results = []
    for function in (drop_in, F.cross_entropy):
        variables = [x.clone(), q.clone(), torch.linspace(0.0, 2.0, 5).double()]
        loss = function(*[variable.requires_grad_() for variable in variables], **options)
        results.append(torch.autograd.grad(loss, variables, oracle.upstream_for(loss)))
    torch.testing.assert_close(*results)


@smooth_or_not
@pytest.mark.parametrize("weighted", [False, True])
def test_all_ignored(label_smoothing: float, weighted: bool) -> None:
    """mean is NaN with a gradient of exactly 0, sum is 0, none zeros."""
    x, y = batch()
    weight = torch.rand(5).double() if weighted else None
    options = {"label_smoothing": label_smoothing}
    for reduction, expected in (("mean", [torch.nan]), ("sum", [0.0]), ("none", [0.0] * 4)):
        loss, grad = loss_and_grad(xent.cross_entropy, x, y.fill_(-100), weight, reduction=reduction, **options)
        torch.testing.assert_close(loss.reshape(-1), torch.tensor(expected).double(), equal_nan=True, rtol=0, atol=0)
        assert not grad.any()
        torchs, _ = loss_and_grad(F.cross_entropy, x, y, weight, reduction=reduction, **options)
        torch.testing.assert_close(loss, torchs, equal_nan=True)


@pytest.mark.usefixtures("backend")
@either_target
@pytest.mark.parametrize(
    ("reduction", "label_smoothing"), [("mean", 0.0), ("mean", 0.1), ("mean", 1.0), ("sum", 0.1), ("none", 0.1)]
)
@pairwise(weight=[[1.0, 1.0, 0.0, 1.0, 1.0], [0.0] * 5], layout=["(C)", "(N, C)"], on_empty=["nan", "zero"])
def test_targets_in_classes_of_weight_zero(
    layout: str, soft: bool, weight: list[float], reduction: str, label_smoothing: float, on_empty: str
) -> None:
    """All valid ones: the mean of indices is 0 / 0, and NaN whatever the smoothing adds; it is not empty, either."""
    x, y = batch(layout)
    y, options = y.where(y < 0, 2), {"reduction": reduction, "label_smoothing": label_smoothing}
    target, w = F.one_hot(y.clamp(0), 5).double() if soft else y, torch.tensor(weight).double()
    expected = loss_and_grad(F.cross_entropy, x, target, w, **options)
    found = loss_and_grad(drop_in, x, target, w, on_empty=on_empty, **options)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[0].isnan().all() == (reduction == "mean" and not soft)
    head = torch.eye(5).double()
    through = xent.linear_cross_entropy(x, head, target, weight=w, on_empty=on_empty, **options)
    torch.testing.assert_close(through, expected[0], equal_nan=True)


def test_unbatched_mean_cancels_the_weight() -> None:
    x, y = batch("(C)")
    torch.testing.assert_close(assert_as_torch(x, y, torch.rand(5).double())[0], assert_as_torch(x, y)[0])


# ignore_index


def test_ignore_index_in_range_drops_rows_but_not_the_class() -> None:
    x, y = batch()
    y[:] = torch.tensor([1, 2, 1, 3])
    loss, grad = assert_as_torch(x, y, ignore_index=1)
    assert loss.item() == pytest.approx(-x.log_softmax(1)[[1, 3], [2, 3]].mean().item())
    assert not grad[[0, 2]].any()
    assert grad[[1, 3], 1].all(), "class 1 is in the denominator of the rows that count"


@pytest.mark.parametrize("ignore_index", [0, 3, 7])
def test_ignore_index_beside_probabilities_raises(ignore_index: int) -> None:
    for function in (xent.cross_entropy, F.cross_entropy):
        with pytest.raises((ValueError, RuntimeError), match="ignore_index"):
            function(*batch(soft=True), ignore_index=ignore_index)


@pytest.mark.parametrize("ignore_index", [-1, -100, -7])
def test_negative_ignore_index_beside_probabilities_is_unused(ignore_index: int) -> None:
    assert_as_torch(*batch(soft=True), ignore_index=ignore_index)


# Empty


@pairwise(shape=[(0, 5), (0, 5, 3), (2, 5, 0)], soft=[False, True], reduction=REDUCTIONS, label_smoothing=[0.0, 0.1])
def test_empty(shape: tuple[int, ...], soft: bool, reduction: str, label_smoothing: float) -> None:
    x = torch.empty(shape)
    target = torch.empty(shape) if soft else torch.empty(shape[:1] + shape[2:], dtype=torch.int64)
    loss, grad = assert_as_torch(x, target, reduction=reduction, label_smoothing=label_smoothing)
    assert grad.shape == shape
    assert loss.isnan() if reduction == "mean" else not loss.any()


# Infinite logits


def hit(x: Tensor, value: float) -> Tensor:
    """x with one entry of row 1 replaced, in class 3."""
    return x.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(value, dtype=x.dtype))


@pytest.mark.parametrize(
    ("target", "label_smoothing", "expected"),
    [
        pytest.param(2, 0.0, "finite", id="not the target: finite"),
        pytest.param(3, 0.0, "inf", id="the target: inf"),
        pytest.param(2, 0.1, "inf", id="not the target, but smoothing gives it a share: inf"),
    ],
)
def test_minus_infinity(target: int, label_smoothing: float, expected: str) -> None:
    """The gradient is finite in every case, and 0 where neither the softmax nor the target is anything."""
    x = hit(batch()[0], -torch.inf)
    loss, grad = assert_as_torch(x, torch.tensor([-100, target, 0, 1]), label_smoothing=label_smoothing)
    assert loss.isfinite() if expected == "finite" else loss == torch.inf
    assert grad.isfinite().all()
    assert (grad[1, 3] == 0) == (expected == "finite")


@pytest.mark.usefixtures("backend")
def test_minus_infinity_beside_probabilities_that_are_all_smoothing() -> None:
    """The targets are mixed first, so that nothing is left of q to multiply inf by 0."""
    x, q = batch(soft=True)
    assert assert_as_torch(hit(x, -torch.inf), q, label_smoothing=1.0)[0] == torch.inf


def test_whole_row_of_minus_infinity() -> None:
    x, y = batch()
    x[1] = -torch.inf
    loss, grad = assert_as_torch(x, y, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    assert grad.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinity_or_nan_in_a_row_that_counts(value: float) -> None:
    """NaN for that row, and for no other."""
    x, y = batch()
    loss, _ = assert_as_torch(hit(x, value), y, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_huge_finite_logits(reduction: str) -> None:
    x, y = batch()
    loss, grad = assert_as_torch(hit(x, 1e30), y, reduction=reduction)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("level", [1e4, 1e8, -1e8, 1e20, torch.finfo(torch.float32).min])
def test_equal_logits_far_from_0(level: float, dtype: torch.dtype) -> None:
    """log C, and a gradient of 1/C - one-hot, to the end of the range."""
    x, y = torch.full((2, 4), level, dtype=dtype), torch.tensor([0, 3])
    (loss, grad), (torchs, torchs_grad) = (loss_and_grad(f, x, y) for f in (xent.cross_entropy, F.cross_entropy))
    torch.testing.assert_close((loss, grad), (torchs, torchs_grad))
    torch.testing.assert_close(loss, torch.tensor(4.0, dtype=dtype).log())


# Targets out of range, weight, dtypes


@pairwise(layout=LAYOUTS.keys(), wrong=[-1, 5, -101, 10**12], reduction=REDUCTIONS, weighted=[False, True])
def test_target_out_of_range(layout: str, reduction: str, wrong: int, weighted: bool) -> None:
    """IndexError, whatever the reduction and the layout; a negative target is as wrong as one that is too large."""
    (x, y), weight = batch(layout), torch.ones(5).double() if weighted else None
    y.view(-1)[-1] = wrong
    for function in (xent.cross_entropy, F.cross_entropy):
        with pytest.raises(IndexError, match=r"(?i)target"):
            function(x, y, weight, reduction=reduction)


@every_reduction
def test_weight_beside_indices_may_not_require_grad(reduction: str) -> None:
    weight = torch.rand(5).double().requires_grad_()
    for function in (xent.cross_entropy, F.cross_entropy):
        with pytest.raises(RuntimeError):
            function(*batch(), weight, reduction=reduction).sum().backward()
        with torch.no_grad():
            assert function(*batch(), weight, reduction=reduction).isfinite().all()


@pairwise(layout=LAYOUTS.keys(), dtype=oracle.ALL_DTYPES, reduction=REDUCTIONS, soft=[False, True])
def test_dtype_and_shape_of_the_result(layout: str, soft: bool, reduction: str, dtype: torch.dtype) -> None:
    x, target = batch(layout, soft, dtype)
    (ours, grad), (torchs, _) = (loss_and_grad(f, x, target, reduction=reduction) for f in (drop_in, F.cross_entropy))
    assert ours.dtype == grad.dtype == torchs.dtype == dtype
    assert ours.shape == torchs.shape
