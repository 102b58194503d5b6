"""Linear heads and groups on a device. Skipped where there is none; `test_devices.py` reads what would run there."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

import xent

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
N, C, D = 96, 1001, 64
BYTES = 20 * C * 4  # several blocks


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    y = torch.randint(C, (N,), device="cuda")
    y[::5] = -100
    h, W = torch.randn(N, D, device="cuda"), torch.randn(C, D, device="cuda") / 8
    return h.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), y


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessGroup]:
    """A group of this process alone, on NCCL."""
    store = Path(tmp_path_factory.mktemp("nccl")) / "store"
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1, timeout=limit)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_head_against_float64(dtype: torch.dtype, reduction: str) -> None:
    """Logits are float32 whatever the head is, so the loss is as good as that; gradients are of the head's dtype."""
    h, W, y = batch(dtype)
    found = xent.linear_cross_entropy(h, W, y, reduction=reduction, max_bytes=BYTES, loss_dtype=torch.float32)
    grads = torch.autograd.grad(found.sum(), (h, W))
    exact = [x.detach().double().requires_grad_() for x in (h, W)]
    truth = F.cross_entropy(F.linear(*exact), y, reduction=reduction)
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)
    bound = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for grad, expected in zip(grads, torch.autograd.grad(truth.sum(), exact), strict=True):
        assert grad.dtype == dtype
        assert (grad.double() - expected).norm() <= bound * expected.norm()


def test_token_stats_of_a_head() -> None:
    h, W, y = batch(torch.float32)
    found = xent.linear_token_stats(h, W, y, entropy=True, prediction=True, max_bytes=BYTES)
    expected = xent.token_stats(F.linear(h.double(), W.double()), y, entropy=True, prediction=True)
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    assert found.prediction is not None
    assert found.prediction.equal(expected.prediction)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_normalizer_on_the_cpu(requires_grad: bool) -> None:
    h, W, y = batch(torch.float32)
    normalizer = torch.tensor(3.0, requires_grad=requires_grad)
    loss = xent.linear_cross_entropy(h, W, y, normalizer=normalizer)
    loss.backward()
    torch.testing.assert_close(loss, xent.linear_cross_entropy(h, W, y, reduction="sum") / 3)
    if requires_grad:
        torch.testing.assert_close(normalizer.grad, -loss.detach().cpu() / 3)


def test_a_group(alone: ProcessGroup) -> None:
    """Of one rank: logits, a head and statistics are what they are without, and so are all gradients."""
    h, W, y = batch(torch.float32)
    for _ in range(2):
        for call in (
            lambda **group: xent.cross_entropy(F.linear(h, W), y, label_smoothing=0.1, **group),
            lambda **group: xent.linear_cross_entropy(h, W, y, label_smoothing=0.1, **group),
            lambda **group: xent.linear_token_stats(h, W, y, **group).log_prob.sum(),
        ):
            found, expected = call(group=alone), call()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            grads = (torch.autograd.grad(loss, (h, W)) for loss in (found, expected))
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
