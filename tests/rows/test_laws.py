"""Laws that hold whatever the numbers are."""

from __future__ import annotations

import oracle
import pytest
import torch
from oracle import Options, every_dtype, loss_and_grad
from pairs import pairwise
from torch import Tensor

import xent

N, C = 8, 50


def batch(dtype: torch.dtype = torch.float64, soft: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits in steps of 1/32, so that small shifts are exact in half precision too, and targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-64, 65, (N, C), generator=generator).to(dtype) / 32
    if soft:
        return x, torch.rand(N, C, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
    return x, torch.randint(C, (N,), generator=generator)


either_target = pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])


@pairwise(dtype=oracle.ALL_DTYPES, soft=[False, True], shift=[-1.0, 2.0], label_smoothing=[0.0, 0.2])
def test_shift_invariance(label_smoothing: float, shift: float, soft: bool, dtype: torch.dtype) -> None:
    """Adding one number to all the logits of a row changes nothing, neither loss nor gradient."""
    x, target = batch(dtype, soft)
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    if soft:
        target = (target.double() / target.double().sum(1, keepdim=True)).to(dtype)
    plain, shifted = (loss_and_grad(xent.cross_entropy, x + by, target, **options) for by in (0, shift))
    mass_error = abs(shift) * (target.double().sum(1) - 1).abs().max() if soft else 0  # q rounded does not sum to 1
    tolerance = oracle.TOLERANCE[dtype]
    torch.testing.assert_close(plain[0], shifted[0], rtol=tolerance, atol=tolerance + mass_error)
    torch.testing.assert_close(plain[1], shifted[1], rtol=4 * tolerance, atol=4 * tolerance / C)


@pytest.mark.parametrize("offset", [1e3, 1e4, -1e4, 1e20, -3e38])
def test_common_offset_in_float32(offset: float) -> None:
    """With all the logits far from 0, the loss is as exact as the logits themselves, in every term of it."""
    x, y = batch(torch.float32)
    x = x + offset
    for options in ({}, {"label_smoothing": 0.2}):
        truth = oracle.true_loss_and_grad(x, y, **options)
        loss, grad = loss_and_grad(xent.cross_entropy, x, y, **options)
        oracle.assert_loss(loss, truth[0])
        oracle.assert_grad(grad, truth[1], y)


@every_dtype
@either_target
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"softcap": None, "logit_scale": 0.5}], ids=str)
def test_gradient_rows_sum_to_zero(options: Options, soft: bool, dtype: torch.dtype) -> None:
    """The differential form of shift invariance; unweighted, and with q of mass 1."""
    x, target = batch(dtype, soft)
    x[:, 0] += 8  # confident rows
    _, grad = loss_and_grad(xent.cross_entropy, x, target, reduction="sum", **options)
    upstream = abs(oracle.upstream_for(torch.zeros(())).item())
    # Each entry has a rounding error of its own size, and the sizes of a row's entries add up to 2 at most.
    assert grad.double().sum(1).abs().max() <= 2 * oracle.TOLERANCE[dtype] * upstream


@either_target
def test_permutation_of_the_classes(soft: bool) -> None:
    x, target = batch(soft=soft)
    weight, order = torch.rand(C).double(), torch.randperm(C, generator=torch.Generator().manual_seed(1))
    moved = target[:, order] if soft else order.argsort()[target]
    loss, grad = loss_and_grad(xent.cross_entropy, x, target, weight, label_smoothing=0.1)
    there = loss_and_grad(xent.cross_entropy, x[:, order], moved, weight[order], label_smoothing=0.1)
    torch.testing.assert_close(there, (loss, grad[:, order]))


@either_target
def test_permutation_of_the_rows(soft: bool) -> None:
    x, target = batch(soft=soft)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    loss, grad = loss_and_grad(xent.cross_entropy, x, target)
    torch.testing.assert_close(loss_and_grad(xent.cross_entropy, x[order], target[order]), (loss, grad[order]))


def test_each_row_stands_alone() -> None:
    """A row's loss and gradient are the same in any company."""
    x, y = batch()
    losses, grad = loss_and_grad(xent.cross_entropy, x, y, reduction="none")
    for n in range(N):
        loss, row = loss_and_grad(xent.cross_entropy, x[n], y[n])
        torch.testing.assert_close(loss, losses[n])
        torch.testing.assert_close(
            row * oracle.upstream_for(losses)[n] / oracle.upstream_for(loss), grad[n], rtol=1e-12, atol=1e-14
        )


def test_an_ignored_row_is_a_row_that_is_not_there() -> None:
    x, y = batch()
    y[[1, 4]] = -100
    keep = y != -100
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}):
        loss, grad = loss_and_grad(xent.cross_entropy, x, y, **options)
        without = loss_and_grad(xent.cross_entropy, x[keep], y[keep], **options)
        torch.testing.assert_close((loss, grad[keep]), without)


def test_weights_scale_out_of_the_mean() -> None:
    x, y = batch()
    weight = torch.rand(C).double()
    loss, double = (xent.cross_entropy(x, y, w, label_smoothing=0.1) for w in (weight, 2 * weight))
    torch.testing.assert_close(loss, double)


def test_a_class_masked_out_is_a_class_that_is_not_there() -> None:
    x, y = batch()
    y = y.clamp(max=C - 6)
    masked = torch.cat([x[:, : C - 5], torch.full((N, 5), -torch.inf)], 1)
    loss, grad = loss_and_grad(xent.cross_entropy, masked, y)
    without = loss_and_grad(xent.cross_entropy, x[:, : C - 5], y)
    torch.testing.assert_close((loss, grad[:, : C - 5]), without)
    assert not grad[:, C - 5 :].any()


def test_gibbs_inequality() -> None:
    """The cross-entropy of q is least, and equal to its entropy, where the softmax is q; the gradient is 0 there."""
    _, q = batch(soft=True)
    entropy = -(q * q.log()).sum(1).mean()
    least, grad = loss_and_grad(xent.cross_entropy, q.log(), q)
    torch.testing.assert_close(least, entropy)
    assert grad.abs().max() < 1e-15
    for seed in range(5):
        assert xent.cross_entropy(batch(seed=seed)[0], q) > entropy


@every_dtype
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    x, y = batch(dtype)
    first, second = (loss_and_grad(xent.cross_entropy, x, y, label_smoothing=0.1) for _ in range(2))
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
