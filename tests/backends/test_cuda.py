"""On a device: the truth, no host sync, CUDA graphs, the compiler, memory. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import jaxtyping
import oracle
import pytest
import torch
from oracle import EVERYTHING, Options, assert_stats, each, every_dtype, grad_of, rows, stats_of, truth_for, upstream
from pairs import pairwise
from torch import Tensor
from torch.nn import functional as F

import xent
from benchmarks.memory import growth
from xent._rows import dispatch as _primitives

pytestmark = pytest.mark.cuda
if not torch.cuda.is_available():
    pytest.skip("no CUDA or ROCm device", allow_module_level=True)
DEVICE_BACKENDS = ("triton", "eager")
CASES: dict[str, Options] = {
    "plain": {},
    "scale": {"scale": -0.5},
    "softcap": {"softcap": 3.0, "scale": 2.0},
    "weights": {"class_weight": True},
    "probabilities": {"soft": True},
    "probabilities, weights": {"soft": True, "class_weight": True},
}


@pytest.fixture(params=DEVICE_BACKENDS)
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend that a device has. Triton comes with torch there: that it is missing is a failure."""
    module = _primitives.load(request.param)
    assert not isinstance(module, str), module
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", request.param)
    return str(request.param)


def test_triton_is_the_first_choice() -> None:
    x, y = torch.zeros(2, 3, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
    assert _primitives.backend_for(x, y).__name__ == f"xent._backends.{_primitives.FORCED_BACKEND or 'triton'}"


@pairwise(case=CASES, C=[1, 5, 32, 37, 1000, 50257, 50304], dtype=oracle.ALL_DTYPES, N=[3, 2000])
def test_the_truth(case: Options, C: int, dtype: torch.dtype, N: int, on_device: str) -> None:
    """Both primitives, from one row for several programs to several rows for one."""
    if N * C > 10**7 and dtype != torch.bfloat16:
        N = 200
    reading = {name: case[name] for name in ("scale", "softcap") if name in case}
    x, target = rows(dtype, N=N, C=C, soft=case.get("soft", False))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(C, dtype=compute) if case.get("class_weight") else None
    g = upstream(N)
    w = None if weight is None else weight.cuda()
    got = stats_of(x.cuda(), target.cuda(), EVERYTHING, w, **reading)
    truth = truth_for(x, target, weight, **reading)
    assert_stats(each(Tensor.cpu, got), truth, x, target, slack=4)
    own, on_it = x.cuda(), each(Tensor.cuda, g)
    fresh = grad_of(own, target.cuda(), got, on_it, w, **reading)
    expected = oracle.gradient(x, target, truth, g, weight, **reading)
    oracle.assert_grad(fresh.cpu(), expected, None if target.is_floating_point() else target, slack=4)
    grad_of(own, target.cuda(), got, on_it, w, out=own, **reading)
    assert own.equal(fresh)


@every_dtype
def test_ignored_rows_are_not_read(dtype: torch.dtype, on_device: str) -> None:
    x, y = (tensor.cuda() for tensor in rows(dtype, N=300, C=5000))
    y[::3], x[::3] = -100, torch.nan
    loss = xent.cross_entropy(x.requires_grad_(), y)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert not grad[::3].any()
    assert grad.isfinite().all()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda x, y: xent.cross_entropy(x, y),
    "everything": lambda x, y: xent.cross_entropy(
        x, y, x[0].detach().exp(), label_smoothing=0.1, z_loss=1e-4, softcap=9.0
    ),
    "none": lambda x, y: xent.cross_entropy(x, y, reduction="none").square().sum(),
    "token_stats": lambda x, y: sum(xent.token_stats(x, y, entropy=True, prediction=True)[:3]).sum(),
    "in place": lambda x, y: xent.cross_entropy(2 * x, y, inplace_backward=True),
}


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    y = torch.randint(4999, (64,), device="cuda")
    y[5] = -100
    return torch.randn(64, 4999, device="cuda", requires_grad=True), y


@pytest.fixture
def warnings_for_syncs() -> Iterator[None]:
    """Anything that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_no_host_sync(loss: Callable[..., Tensor], on_device: str, request: pytest.FixtureRequest) -> None:
    x, y = batch()
    torch.autograd.grad(loss(x, y), x)  # compiles
    request.getfixturevalue("warnings_for_syncs")
    torch.autograd.grad(loss(x, y), x)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_cuda_graph(loss: Callable[..., Tensor], on_device: str) -> None:
    """Forward and backward captured once, and replayed on other numbers."""
    x, y = batch()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(loss(x, y), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(x, y)
        (grad,) = torch.autograd.grad(value, x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        y.random_(4999)
    graph.replay()
    expected = loss(x, y)
    assert value.equal(expected)
    assert grad.equal(torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_torch_compile(loss: Callable[..., Tensor], on_device: str) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    x, y = batch()
    found, expected = torch.compile(loss, fullgraph=True)(x, y), loss(x, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (found, expected)))
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(dtype: torch.dtype, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient and nothing beside it; in place, nothing."""
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", "triton")
    x = torch.randn(2048, 50257, device="cuda", dtype=dtype).requires_grad_()
    y = torch.randint(50257, (2048,), device="cuda")

    def step() -> None:
        torch.autograd.grad(xent.cross_entropy(x, y, inplace_backward=inplace), x)

    step()
    assert growth(step, "cuda") / x.nbytes < (0.01 if inplace else 1.01)


def test_rows_beyond_32_bits() -> None:
    """More than 2**31 logits, the last row's target at the last class."""
    N, C = 2**16 + 1, 2**15 + 1
    if torch.cuda.mem_get_info()[0] < 6 * N * C:
        pytest.skip("needs 13 GB")
    x = torch.zeros(N, C, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = 20
    y = torch.full((N,), C - 1, device="cuda")
    x.requires_grad_()
    losses = xent.cross_entropy(x, y, reduction="none", loss_dtype=torch.float32)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    expected = F.cross_entropy(x[-1:].detach().double(), y[-1:])
    torch.testing.assert_close(losses[-1].double(), expected, rtol=1e-5, atol=1e-7)
    assert grad[-1, 0] > 0
    assert grad[0, -1] < -0.9


WRONG = """
import torch, xent
y = torch.tensor([0, 5], device="cuda")
try:
    xent.cross_entropy(torch.zeros(2, 5, device="cuda"), y)
    torch.cuda.synchronize()
except RuntimeError as error:
    print("device-side assert" in str(error))
"""


def test_target_out_of_range() -> None:
    """An assertion on the device, which ends the process's use of it: so in a process of its own."""
    child = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True)
    assert child.stdout == "True\n", child.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device() -> None:
    """The kernels run where the logits are, not where the current device is."""
    x, y = torch.randn(4, 300, device="cuda:1", requires_grad=True), torch.randint(300, (4,), device="cuda:1")
    loss, expected = xent.cross_entropy(x, y), F.cross_entropy(x, y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (loss, expected)))
