"""Where xent is better than F.cross_entropy on purpose: each sentence of the specification is a test.

Where it is cheap, torch's own answer is asserted too, so that a test whose reason has gone can be told.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from oracle import every_dtype, loss_and_grad
from pairs import pairwise
from torch import Tensor
from torch.nn import functional as F

import xent

LAYOUTS = {"(C)": (200,), "(N, C)": (4, 200), "(N, C, d1)": (3, 200, 2), "(B, T, V)": (3, 2, 200)}


def batch(layout: str = "(N, C)", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits over 200 classes and targets."""
    torch.manual_seed(0)
    shape = LAYOUTS[layout]
    return torch.randn(shape).to(dtype), torch.randint(200, [n for n in shape if n != 200])


@pairwise(
    options=[{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 5.0}],
    dtype=oracle.ALL_DTYPES,
    poison=[torch.nan, torch.inf, -torch.inf],
)
def test_ignored_row_never_poisons(options: dict[str, float], poison: float, dtype: torch.dtype) -> None:
    x, y = batch(dtype=dtype)
    y[2] = -100
    clean = loss_and_grad(xent.cross_entropy, x, y, **options)
    x[2] = poison
    loss, grad = loss_and_grad(xent.cross_entropy, x, y, **options)
    assert loss.equal(clean[0])
    assert grad.equal(clean[1])
    assert not grad[2].any()
    if not options and poison != -torch.inf:
        assert loss_and_grad(F.cross_entropy, x, y)[1][2].isnan().any(), "torch's gradient there"


# Half precision accumulates in float32 or better and rounds once


def test_bfloat16_mean_over_many_rows() -> None:
    """The mean of 8192 losses near 7.387; torch's is off by 0.05."""
    torch.manual_seed(0)
    x, y = torch.randn(8192, 1000, dtype=torch.bfloat16), torch.randint(1000, (8192,))
    truth, _ = oracle.true_loss_and_grad(x, y)
    assert xent.cross_entropy(x, y).double() == truth.to(torch.bfloat16).double()
    oracle.assert_loss(xent.cross_entropy(x, y, loss_dtype=torch.float32), truth)
    assert (F.cross_entropy(x, y) - truth).abs() > 0.04, "torch rounds on the way"


def test_float16_mean_over_70000_rows() -> None:
    """The count itself is beyond float16, which ends at 65504: torch gives NaN, and a gradient of zeros."""
    torch.manual_seed(0)
    x, y = torch.randn(70000, 5).half(), torch.randint(5, (70000,))
    truth = oracle.true_loss_and_grad(x, y)
    loss, grad = loss_and_grad(xent.cross_entropy, x, y)
    oracle.assert_loss(loss, truth[0])
    oracle.assert_grad(grad, truth[1], y)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("N", "C"), [(40000, 10), (4, 129)], ids=["mean of 40,000 rows", "129 classes"])
def test_float16_does_not_overflow_before_the_one_rounding(N: int, C: int, label_smoothing: float) -> None:
    """Sums beyond 65504 are on the way to a mean that is not."""
    torch.manual_seed(0)
    x, y = (torch.randn(N, C) * 40).half(), torch.randint(C, (N,))
    truth, _ = oracle.true_loss_and_grad(x, y, label_smoothing=label_smoothing)
    oracle.assert_loss(xent.cross_entropy(x, y, label_smoothing=label_smoothing), truth)


def test_float16_smoothing_of_logits_whose_sum_overflows() -> None:
    x, y = torch.full((2, 129), -1000.0).half(), torch.tensor([0, 1])
    x[:, :2] = 40
    truth, _ = oracle.true_loss_and_grad(x, y, label_smoothing=0.1)
    oracle.assert_loss(xent.cross_entropy(x, y, label_smoothing=0.1), truth)
    assert F.cross_entropy(x, y, label_smoothing=0.1).isinf(), "torch"


# Options and dtypes that torch lets pass or refuses


@pytest.mark.parametrize("value", [-0.1, 1.1, torch.nan, torch.inf])
def test_label_smoothing_outside_of_0_to_1_raises(value: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing: expected a number in \[0, 1\], got"):
        xent.cross_entropy(*batch(), label_smoothing=value)


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_index_targets_of_any_integer_dtype(dtype: torch.dtype, layout: str) -> None:
    x, y = batch(layout)
    y = y % 128
    for options in ({}, {"weight": torch.rand(200)}, {"label_smoothing": 0.1}, {"ignore_index": int(y.view(-1)[0])}):
        ours, wide = (loss_and_grad(xent.cross_entropy, x, t, reduction="sum", **options) for t in (y.to(dtype), y))
        assert ours[0].equal(wide[0])
        assert ours[1].equal(wide[1])


@pytest.mark.usefixtures("backend")
def test_ignore_index_beyond_int32_is_no_class() -> None:
    """Compared as an int32, 2^32 + 1 would be class 1."""
    x, y = batch()
    assert xent.cross_entropy(x, y.fill_(1).int(), ignore_index=2**32 + 1).equal(xent.cross_entropy(x, y))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.complex64], ids=str)
def test_other_index_dtypes_are_refused(dtype: torch.dtype) -> None:
    x, y = batch()
    with pytest.raises(RuntimeError, match=r"target: expected class indices of dtype int64.*, got torch\."):
        xent.cross_entropy(x, y.to(dtype))


@pairwise(dtype=oracle.ALL_DTYPES, weight_dtype=oracle.ALL_DTYPES, soft=[False, True])
def test_weight_of_any_floating_dtype(weight_dtype: torch.dtype, soft: bool, dtype: torch.dtype) -> None:
    x, y = batch(dtype=dtype)
    target = torch.rand_like(x) if soft else y
    weight = torch.rand(200).to(weight_dtype)
    truth = oracle.true_loss_and_grad(x, target, weight, label_smoothing=0.1)
    loss, grad = loss_and_grad(xent.cross_entropy, x, target, weight, label_smoothing=0.1)
    assert loss.dtype == dtype
    oracle.assert_loss(loss, truth[0])
    oracle.assert_grad(grad, truth[1], None if soft else y)


@every_dtype
def test_probability_of_zero_at_minus_infinity(dtype: torch.dtype) -> None:
    """A masked class that has no probability costs nothing; torch multiplies 0 by inf."""
    x, y = batch(dtype=dtype)
    x[:, 7] = -torch.inf
    q = F.one_hot(y, 200).to(dtype)
    assert not q[:, 7].any()
    loss, grad = loss_and_grad(xent.cross_entropy, x, q)
    truth = oracle.true_loss_and_grad(x, q)
    oracle.assert_loss(loss, truth[0])
    oracle.assert_grad(grad, truth[1])
    assert F.cross_entropy(x, q).isnan(), "torch"


# uint8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_uint8_is_compared_with_ignore_index_as_an_integer(label_smoothing: float, layout: str) -> None:
    """-100 is 156 modulo 256, and class 156 is a class like any other."""
    x, y = batch(layout)
    y.fill_(156)
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    byte, long = (loss_and_grad(xent.cross_entropy, x, t, **options) for t in (y.byte(), y))
    assert byte[0].equal(long[0])
    assert byte[0].all()
    assert byte[1].equal(long[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uint8_is_range_checked(layout: str) -> None:
    x, y = batch(layout)
    y.view(-1)[-1] = 250
    with pytest.raises(IndexError, match=r"target: expected class indices in \[0, 200\).*got 250"):
        xent.cross_entropy(x, y.byte())


# Devices and autocast


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("stray", ["input", "target", "weight"])
def test_different_devices_raise(stray: str, reduction: str) -> None:
    """Meta included: in torch, a product of CPU and meta tensors is memory that nobody wrote."""
    x, y = batch()
    tensors = {"input": x, "target": y, "weight": torch.rand(200)}
    tensors[stray] = tensors[stray].to("meta")
    with pytest.raises(RuntimeError, match=r"(target|weight): expected a tensor on (cpu|meta) like input, got one on"):
        xent.cross_entropy(**tensors, reduction=reduction)


def test_normalizer_on_another_device_raises() -> None:
    """Here, a product of CPU and meta tensors would be the loss."""
    with pytest.raises(RuntimeError, match=r"normalizer: expected .*meta"):
        xent.cross_entropy(*batch(), normalizer=torch.tensor(4.0, device="meta"))


def test_all_on_meta() -> None:
    """Shapes and dtypes without numbers, as for any torch function."""
    x, y = (tensor.to("meta") for tensor in batch())
    loss, grad = loss_and_grad(lambda x: xent.cross_entropy(x, y, reduction="none"), x)
    assert loss.is_meta
    assert loss.shape == (4,)
    assert grad.shape == x.shape


@every_dtype
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_autocast_gives_float32(reduction: str, dtype: torch.dtype) -> None:
    """And float64 stays what it is. The logits' gradient has the dtype of the logits."""
    x, y = batch(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grad = loss_and_grad(xent.cross_entropy, x, y, reduction=reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    truth = oracle.true_loss_and_grad(x, y, reduction=reduction)
    oracle.assert_loss(loss, truth[0])
    oracle.assert_grad(grad, truth[1], y)


def test_a_normalizer_that_is_a_tensor_divides_before_the_one_rounding() -> None:
    x, y = oracle.rows(torch.bfloat16, N=64, C=40)
    for n in range(50, 70):
        found = xent.cross_entropy(x, y, normalizer=torch.tensor(float(n)))
        assert found.equal((xent.cross_entropy(x.double(), y, reduction="sum") / n).bfloat16())


@pytest.mark.parametrize("create_graph", [False, True])
def test_little_smoothing(create_graph: bool) -> None:
    x, y = oracle.rows(torch.float64, N=4, C=9)
    x.requires_grad_()
    losses = [f(x, y, label_smoothing=0.01) for f in (xent.cross_entropy, F.cross_entropy)]
    d, truth = (torch.autograd.grad(loss, x, create_graph=create_graph)[0] for loss in losses)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(d, truth)
