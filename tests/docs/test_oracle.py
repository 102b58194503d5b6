"""The tests' own tools: the truth agrees with torch, and the comparison sees what it is there to see."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch.nn import functional as F


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("soft", [False, True])
def test_truth_agrees_with_torch(soft: bool, label_smoothing: float, reduction: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4).double()
    target = torch.randn(3, 5, 4).double().softmax(1) if soft else torch.tensor([[0, 1, -1], [2, 4, 3], [1, -1, 0]])
    target = target if soft else F.pad(target, (0, 1), value=2)
    weight = torch.rand(5).double()
    ignore = {} if soft else {"ignore_index": -1}
    options = {"reduction": reduction, "label_smoothing": label_smoothing, **ignore}
    ours = oracle.loss_and_grad(oracle.cross_entropy, x, target, weight, **options)
    torch.testing.assert_close(ours, oracle.loss_and_grad(F.cross_entropy, x, target, weight, **options))


def large_vocabulary() -> tuple[torch.Tensor, torch.Tensor]:
    """The true gradient of the mean over (8, 128 * 1024) logits, and the targets."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 128 * 1024).double().div(2).requires_grad_(), torch.randint(128 * 1024, (8,))
    return torch.autograd.grad(oracle.cross_entropy(x, y), x)[0], y


def test_zeroed_rest_of_a_large_vocabulary_is_seen() -> None:
    """Only the target's entry is right, and yet the absolute tolerances of published kernel suites pass."""
    truth, y = large_vocabulary()
    only_target = truth * oracle.one_hot(y, truth.shape[1])
    assert torch.allclose(only_target, truth, rtol=1e-5, atol=1e-5), "as those compare"
    errors = oracle.gradient_errors(only_target.float(), truth, y)
    assert errors.target < 1e-6
    assert errors.rest == pytest.approx(1)
    with pytest.raises(AssertionError, match="of the row's norm"):
        oracle.assert_grad(only_target.float(), truth, y)


def test_wrong_target_entry_of_one_row_is_seen() -> None:
    truth, y = large_vocabulary()
    wrong = truth.clone()
    wrong[3, y[3]] *= 1.001
    errors = oracle.gradient_errors(wrong.float(), truth, y)
    assert errors.target == pytest.approx(1e-3, rel=0.01)
    assert errors.rest < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e-30])
def test_anything_in_a_row_that_must_be_zero_is_seen(value: float) -> None:
    truth, y = torch.zeros(2, 5).double(), torch.tensor([0, 1])
    truth[1] = 1
    got = truth.clone()
    assert oracle.gradient_errors(got, truth, y) == (0, 0)
    got[0, 2] = value
    with pytest.raises(AssertionError, match="of the row's norm"):
        oracle.assert_grad(got.float(), truth, y)
