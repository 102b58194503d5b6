"""The products of a head in half precision: which are taken where, and how exact they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xent
from xent import _torch
from xent._head import products as _products

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


class CudaProducts(Products):
    """The products that write float32, which torch has for CUDA alone, computed here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
            return super().__torch_dispatch__(func, types, args, kwargs)
        *total, a, b, dtype = args
        self.seen.append((str(func), (a.dtype, b.dtype)))
        assert kwargs["out"].dtype == dtype == torch.float32
        product = a.float() @ b.float()
        return kwargs["out"].copy_(total[0] + product if total and kwargs.get("beta", 1) else product)


@pytest.fixture(params=["half products", "no half products", "CUDA"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Products]]:
    """A CPU that has products in half precision, one that has not, and the products of CUDA."""
    monkeypatch.setattr(_torch, "cpu_multiplies", lambda dtype: request.param == "half products")
    monkeypatch.setattr(_torch, "writes_float32", lambda factor: request.param == "CUDA")
    with CudaProducts() as products:
        yield request.param, products


def results(function: Any, h: Tensor, W: Tensor, y: Tensor, reduction: str, **options: Any) -> list[Tensor]:
    """The losses and their gradients."""
    b = W.new_zeros(len(W)).requires_grad_()
    losses = function(h, W, y, linear_bias=b, reduction=reduction, **options)
    upstream = torch.linspace(0.5, 1.5, losses.numel()).view(losses.shape).to(losses)
    return [losses.detach(), *torch.autograd.grad(losses, (h, W, b), upstream)]


def plain(h: Tensor, W: Tensor, y: Tensor, linear_bias: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(h, W, linear_bias), y, **options)


def statistics(function: Any, h: Tensor, W: Tensor, y: Tensor) -> list[Tensor]:
    """lse, log_prob, and the gradients of a sum of both."""
    lse, log_prob = function(h, W, y)
    weight = torch.linspace(0.5, 1.5, len(lse))
    loss = (weight * lse).sum() - (weight.flip(0) * log_prob).sum()
    return [lse.detach(), log_prob.detach(), *torch.autograd.grad(loss, (h, W))]


def plain_statistics(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, W)
    return logits.logsumexp(1), -F.cross_entropy(logits, y, reduction="none")


def own_statistics(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    stats = xent.linear_token_stats(h, W, y, max_bytes=BLOCKS)
    return stats.lse, stats.log_prob


# Few classes and many blocks; many classes; classes of which few are frequent, so that a block has several of each.
SHAPES = {"rows": (1000, 32, 50), "classes": (96, 32, 2000), "frequent": (128, 256, 500)}


@every_half
@pytest.mark.parametrize("shape", SHAPES)
def test_errors(dtype: torch.dtype, shape: str, machine: tuple[str, Products]) -> None:
    """At most 1.25 times those of F.linear and F.cross_entropy: each block's rounding must not add up."""
    h, W, y = batch(dtype, *SHAPES[shape])
    if shape == "frequent":
        y = (len(W) ** (y / len(W))).long()
    exact = [t.detach().double().requires_grad_() for t in (h, W)]
    budget = BLOCKS // 4 if shape == "rows" else BLOCKS

    def check(ours: list[Tensor], torchs: list[Tensor], truth: list[Tensor]) -> None:
        for a, b, t in zip(ours, torchs, truth, strict=True):
            assert a.isfinite().all()
            rounding = torch.finfo(dtype).eps / 2 * t.abs() if t.dim() == 0 else 0  # one number is right by chance
            assert (a - t).norm() <= 1.25 * (b - t).norm() + rounding

    for reduction in ("mean", "sum", "none"):
        found = results(xent.linear_cross_entropy, h, W, y, reduction, max_bytes=budget)
        check(found, results(plain, h, W, y, reduction), results(plain, *exact, y, reduction))
    tables = (statistics(own_statistics, h, W, y), statistics(plain_statistics, h, W, y))
    check(*tables, statistics(plain_statistics, *exact, y))


@every_half
def test_float32_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever half-precision products do not write the logits, these are exact to float32 rounding."""
    monkeypatch.setattr(_torch, "cpu_multiplies", lambda dtype: False)
    h, W, y = batch(dtype)
    b = torch.randn(len(W)).to(dtype)
    stats = xent.linear_token_stats(h, W, y, linear_bias=b, max_bytes=BLOCKS)
    log_p = (h.double() @ W.double().T + b.double()).log_softmax(1)
    torch.testing.assert_close(stats.log_prob.double(), log_p.gather(1, y[:, None])[:, 0], rtol=0, atol=1e-5)
    loss = xent.linear_cross_entropy(h, W, y, linear_bias=b, max_bytes=BLOCKS, loss_dtype=torch.float32)
    torch.testing.assert_close(loss.double(), F.nll_loss(log_p, y), rtol=0, atol=1e-5)


@every_half
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_which_products(dtype: torch.dtype, reduction: str, autocast: bool, machine: tuple[str, Products]) -> None:
    """Those of half precision only where the device has them: torch's own are up to 100 times slower than float32's.

    On CUDA the logits and the head's gradient are float32, by `out_dtype`, and no factor is converted to float32.
    """
    name, products = machine
    h, W, y = batch(torch.float32 if autocast else dtype)
    bias = torch.zeros(len(W), dtype=W.dtype, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = xent.linear_cross_entropy(h, W, y, linear_bias=bias, reduction=reduction, max_bytes=BLOCKS)
        loss.sum().backward()
    expected = torch.float32 if name == "no half products" else dtype
    assert {dtypes for _, dtypes in products.seen} == {(expected, expected)}
    names = [name for name, _ in products.seen]
    if name == "CUDA":
        blocks = names.count("aten.mm.default")  # one product each for the hidden states' gradient
        passes = 1 if reduction == "mean" else 2
        assert blocks > 2
        assert names.count("aten.mm.dtype_out") == passes * blocks
        assert names.count("aten.addmm.dtype_out") == blocks
        assert len(names) == (passes + 2) * blocks
    else:
        assert not any("dtype" in name for name in names)


@pytest.mark.parametrize("instructions", [True, False])
def test_emulated_products_are_not_taken(instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has bfloat16 on every CPU with AVX-512, but where its own instructions are missing float32 is faster."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    assert _torch.cpu_multiplies.__wrapped__(torch.bfloat16) == instructions


old = pytest.mark.xfail(torch.__version__ < (2, 13), reason="torch 2.12 has the product for CUDA, and no rule for meta")


@every_half
@pytest.mark.parametrize(("device", "writes"), [("cpu", False), pytest.param("meta", True, marks=old)])
def test_a_device_is_asked_once_whether_its_products_write_float32(
    dtype: torch.dtype, device: str, writes: bool
) -> None:
    """Not taken for granted: torch refuses it on a CPU, as some releases and ROCm builds do on their devices."""
    with Products() as products:
        assert _torch._adds_float32.__wrapped__(dtype, torch.device(device)) == writes
    assert not products.seen
    assert not _torch.writes_float32(torch.zeros(1, dtype=dtype))


@every_half
def test_products_that_write_float32_on_meta(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schemas of torch's own operators take what they are given."""
    monkeypatch.setattr(_torch, "writes_float32", lambda factor: True)
    with Products() as products:
        h, W = torch.empty(8, 4, dtype=dtype, device="meta"), torch.empty(16, 4, dtype=dtype, device="meta")
        logits = torch.empty(8, 16, dtype=_products.block_dtype(dtype, h.device), device="meta")
        assert _products.logits_of(h, W, None, out=logits).dtype == torch.float32
        assert _products.hidden_gradient(logits, W).dtype == dtype
        _products.add_outer(torch.empty(16, 4, device="meta"), logits, h, 1)
    assert [name for name, _ in products.seen] == ["aten.mm.dtype_out", "aten.mm.default", "aten.addmm.dtype_out"]
    assert all(dtypes == (dtype, dtype) for _, dtypes in products.seen)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@every_half
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_on_a_device(dtype: torch.dtype, reduction: str) -> None:
    """The products that write float32 are used there, and the errors are no larger than torch's."""
    h, W, y = (t.detach().cuda() for t in batch(dtype))
    h, W = h.requires_grad_(), W.requires_grad_()
    assert _torch.writes_float32(h)
    with Products() as products:
        ours = results(xent.linear_cross_entropy, h, W, y, reduction, max_bytes=BLOCKS)
    names = [name for name, _ in products.seen]
    assert names.count("aten.addmm.dtype_out") == names.count("aten.mm.default") > 2
    assert all(dtypes == (dtype, dtype) for _, dtypes in products.seen)
    truth = results(plain, *(t.detach().double().requires_grad_() for t in (h, W)), y, reduction)
    for a, b, t in zip(ours, results(plain, h, W, y, reduction), truth, strict=True):
        rounding = torch.finfo(dtype).eps / 2 * t.abs() if t.dim() == 0 else 0
        assert (a - t).norm() <= 1.25 * (b - t).norm() + rounding
