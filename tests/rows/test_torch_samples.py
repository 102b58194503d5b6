"""PyTorch's own sample inputs: of the OpInfo of nn.functional.cross_entropy and the ModuleInfo of CrossEntropyLoss."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle import TOLERANCE, every_dtype, torch_has_linear
from torch import Tensor, nn

import xent

with warnings.catch_warnings():  # torch's tables warn of what they import
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

OP = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
MODULE = next(info for info in module_db if info.module_cls is nn.CrossEntropyLoss)


def classes_in_dim_1(input: Tensor) -> dict[str, int]:
    """torch's layout, said aloud, since a second one may fit."""
    return {"dim": 1} if input.dim() > 2 else {}


def no_smaller(tensor: Tensor | None) -> Tensor | None:
    """Half precision as float64, so that torch's own rounding is not taken for the truth."""
    small = tensor is not None and tensor.is_floating_point() and tensor.dtype.itemsize == 2
    return tensor.double() if small and tensor is not None else tensor


def assert_like(found: Tensor, x: Tensor, expected: Tensor, y: Tensor) -> None:
    """Value and gradient, for a random upstream gradient, as of the truth y -> expected in a dtype no smaller."""
    rtol = 2 * TOLERANCE[x.dtype]
    torch.testing.assert_close(found, expected.to(x.dtype), rtol=rtol, atol=rtol, equal_nan=True)
    upstream = torch.rand_like(found)
    (grad,) = torch.autograd.grad(found, x, upstream)
    (truth,) = torch.autograd.grad(expected, y, upstream.to(y.dtype))
    scale = float(upstream.abs().max()) if truth.numel() else 0.0  # of the one that p is subtracted from
    torch.testing.assert_close(grad, truth.to(x.dtype), rtol=rtol, atol=rtol * scale)


@every_dtype
def test_samples_of_the_function(dtype: torch.dtype) -> None:
    count = 0
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=True):
        x, target, options = sample.input, sample.args[0], dict(sample.kwargs)
        y = no_smaller(x.detach()).requires_grad_()
        truth = {**options, "weight": no_smaller(options.get("weight"))}
        expected = nn.functional.cross_entropy(y, no_smaller(target), **truth)
        found = xent.cross_entropy(x, target, **options, **classes_in_dim_1(x))
        assert found.dtype == dtype
        assert_like(found, x, expected, y)
        count += 1
    assert count > 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_samples_of_the_module(dtype: torch.dtype) -> None:
    count = 0
    for case in MODULE.module_inputs_func(MODULE, "cpu", dtype, requires_grad=True, training=True):
        (x, target), options = case.forward_input.args, case.constructor_input.kwargs
        y = no_smaller(x.detach()).requires_grad_()
        truth = {**options, "weight": no_smaller(options.get("weight"))}
        expected = nn.CrossEntropyLoss(**truth)(y, no_smaller(target))
        found = xent.CrossEntropyLoss(**options, **classes_in_dim_1(x))(x, target)
        assert_like(found, x, expected, y)
        count += 1
    assert count > 20


@torch_has_linear
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_of_the_linear_function(dtype: torch.dtype) -> None:
    """Against float64 where torch's own answer is of half precision: rounded logits are not the truth."""
    name, count = "nn.functional.linear_cross_entropy", 0
    op = next(op for op in op_db if op.name == name and not op.variant_test_name)
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        options = {key: value for key, value in sample.kwargs.items() if key != "options"}
        weight, target = sample.args
        bias = options.pop("linear_bias", None)
        ours = [t if t is None else t.detach().requires_grad_() for t in (sample.input, weight, bias)]
        theirs = [t if t is None else no_smaller(t.detach()).requires_grad_() for t in (sample.input, weight, bias)]
        found = xent.linear_cross_entropy(ours[0], ours[1], target.detach(), linear_bias=ours[2], **options)
        truth = {**options, "weight": no_smaller(options.get("weight"))}
        expected = nn.functional.linear_cross_entropy(
            theirs[0], theirs[1], no_smaller(target.detach()), linear_bias=theirs[2], **truth
        )
        assert found.dtype == dtype
        rtol = 2 * TOLERANCE[dtype] * (4 if dtype.itemsize == 2 else 1)  # the logits are rounded, too
        scale = max(t.detach().abs().max().item() for t in ours if t is not None) ** 2
        torch.testing.assert_close(found, expected.to(dtype), rtol=rtol, atol=rtol * scale)
        upstream = torch.rand_like(found)
        leaves = [[t for t in side if t is not None] for side in (ours, theirs)]
        grads = torch.autograd.grad(found, leaves[0], upstream)
        truths = torch.autograd.grad(expected, leaves[1], upstream.to(expected.dtype))
        for grad, true in zip(grads, truths, strict=True):
            torch.testing.assert_close(grad, true.to(dtype), rtol=rtol, atol=rtol * scale * max(1, upstream.numel()))
        count += 1
    assert count > 60
