"""The products of a head in half precision: which are taken where, how exact they are, and that nothing leaks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xent
from xent import _products, _torch

F = torch.nn.functional
HALVES = (torch.bfloat16, torch.float16)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
BLOCKS = 100_000  # bytes: several blocks for each of the batches below


def batch(dtype: torch.dtype, N: int = 256, D: int = 64, C: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    W = (torch.randn(C, D, generator=generator) / D**0.5).to(dtype).requires_grad_()
    return h, W, torch.randint(C, (N,), generator=generator)


class Products(TorchDispatchMode):
    """Records the matrix products: the operator's overload and the dtypes of the factors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[torch.dtype, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.append((str(func), tuple(x.dtype for x in args if isinstance(x, Tensor))[-2:]))
            if func._overloadname == "dtype_out":  # of a device that is not here: torch's own stand-in may be missing
                return kwargs["out"]
        return func(*args, **(kwargs or {}))


def settings() -> tuple[Any, ...]:
    matmul = torch.backends.mkldnn.matmul
    return (
        matmul.fp32_precision,
        torch.backends.mkldnn.fp32_precision,
        torch.backends.fp32_precision,
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


def test_no_setting_of_the_process_is_touched() -> None:
    """Read all the time by this thread, whose own float32 products keep their bits, while two others take steps."""
    before, x = settings(), torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    product, errors = x @ x, []

    def steps(dtype: torch.dtype) -> None:
        try:
            for reduction in ("mean", "none"):
                h, W, y = batch(dtype)
                for _ in range(6):
                    xent.linear_cross_entropy(h, W, y, reduction=reduction, max_bytes=BLOCKS).sum().backward()
        except Exception as error:  # this thread reports it
            errors.append(error)

    threads = [threading.Thread(target=steps, args=(dtype,)) for dtype in HALVES]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert settings() == before
        assert (x @ x).equal(product)
    assert settings() == before
    assert not errors


@pytest.fixture(params=[True, False], ids=["half products", "no half products"])
def multiplies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """A CPU that has products in half precision, and one that has not."""
    monkeypatch.setattr(_torch, "cpu_multiplies", lambda dtype: request.param)
    yield request.param


def losses_and_grads(function: Any, h: Tensor, W: Tensor) -> list[Tensor]:
    losses = function(h, W)
    upstream = torch.linspace(0.5, 1.5, losses.numel()).view(losses.shape).to(losses.dtype)
    return [losses.detach(), *torch.autograd.grad(losses, (h, W), upstream)]


@every_half
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_errors(dtype: torch.dtype, reduction: str, multiplies: bool) -> None:
    """At most 1.25 times those of F.linear and F.cross_entropy: each block's rounding must not add up."""
    h, W, y = batch(dtype)
    options: dict[str, Any] = {"reduction": reduction}
    exact = [t.detach().double().requires_grad_() for t in (h, W)]
    truth = losses_and_grads(lambda h, W: F.cross_entropy(h @ W.T, y, **options), *exact)
    torchs = losses_and_grads(lambda h, W: F.cross_entropy(F.linear(h, W), y, **options), h, W)
    ours = losses_and_grads(lambda h, W: xent.linear_cross_entropy(h, W, y, max_bytes=BLOCKS, **options), h, W)
    for a, b, t in zip(ours, torchs, truth, strict=True):
        assert (a - t).norm() <= 1.25 * (b - t).norm()


@every_half
def test_statistics_of_float32_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "cpu_multiplies", lambda dtype: False)
    h, W, y = batch(dtype)
    stats = xent.linear_token_stats(h, W, y, max_bytes=BLOCKS)
    log_p = (h.double() @ W.double().T).log_softmax(1)
    torch.testing.assert_close(stats.log_prob.double(), log_p.gather(1, y[:, None])[:, 0], rtol=0, atol=1e-5)


@every_half
def test_half_products_only_where_the_cpu_has_them(dtype: torch.dtype, multiplies: bool) -> None:
    """torch's own, where it has not, are up to 100 times slower than those of float32."""
    h, W, y = batch(dtype)
    with Products() as products:
        xent.linear_cross_entropy(h, W, y, max_bytes=BLOCKS).backward()
    expected = dtype if multiplies else torch.float32
    assert {dtypes for _, dtypes in products.seen} == {(expected, expected)}


@every_half
def test_cuda_products_write_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and head gradient by `out_dtype`; the hidden states' gradient from the gradient in the head's dtype."""
    monkeypatch.setattr(_torch, "writes_float32", lambda device: True)
    with Products() as products:
        h, W = torch.empty(8, 4, dtype=dtype, device="meta"), torch.empty(16, 4, dtype=dtype, device="meta")
        logits = torch.empty(8, 16, dtype=_products.block_dtype(dtype, h.device), device="meta")
        assert _products.logits_of(h, W, None, out=logits).dtype == torch.float32
        assert _products.hidden_gradient(logits, W).dtype == dtype
        _products.add_outer(torch.empty(16, 4, device="meta"), logits, h, 1)
    assert [name for name, _ in products.seen] == ["aten.mm.dtype_out", "aten.mm.default", "aten.addmm.dtype_out"]
    assert all(dtypes == (dtype, dtype) for _, dtypes in products.seen)
