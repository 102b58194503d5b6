"""Which backend runs, and what it says when it cannot; and that on a device nothing waits for the host."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import xent
from xent import _torch
from xent._backends import check_range
from xent._records import Stats
from xent._rows import dispatch as _primitives


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python that imports what we import, with warnings as errors."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-W", "error", *command], env=env, capture_output=True, text=True)


def test_a_backend_is_two_functions(backend: str) -> None:
    """And `refusal`, and a line about itself; perhaps a loss's formula and a sparse gradient. No more is public."""
    module = _primitives.load(backend)
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    public = {name for name in own if not name.startswith("_")}
    public -= {"losses", "losses_gradient", "linear", "row_samples", "transpose", "gather_sums"}
    assert public == {"row_statistics", "row_gradient", "refusal"}
    assert module.refusal(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64)) is None
    assert "\n" not in module.ABOUT


def test_eager_takes_everything() -> None:
    """It is the last in order of preference, and there is always one that can."""
    assert _primitives.BACKENDS[-1] == "eager"
    module = _primitives.load("eager")
    for device in ("cpu", "meta"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = torch.empty(2, 3, dtype=dtype, device=device)
            assert module.refusal(x, x) is None


def fake(refusal: str | None) -> ModuleType:
    """A backend that takes everything, or refuses it for a reason."""
    module = ModuleType("fake")
    vars(module)["refusal"] = lambda logits, target: refusal
    return module


@pytest.mark.parametrize(
    ("found", "forced", "expected"),
    [
        pytest.param(("works", "works", "works"), None, 0, id="the first that works"),
        pytest.param(("missing", "refuses", "works"), None, 2, id="the others are passed over"),
        pytest.param(("works", "works", "works"), "triton", 1, id="the one that is forced"),
        pytest.param(("missing", "refuses", "refuses"), None, ("native: missing", "triton: refuses"), id="none"),
        pytest.param(("missing", "works", "works"), "native", ("native: missing",), id="forced and missing"),
        pytest.param(("refuses", "works", "works"), "native", ("native: refuses",), id="forced and refuses"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, found: tuple[str, ...], forced: str | None, expected: int | tuple[str, ...]
) -> None:
    """Never a silent fallback: what was forced runs or raises, with all the reasons."""
    modules = {
        name: "missing" if what == "missing" else fake("refuses" if what == "refuses" else None)
        for name, what in zip(("native", "triton", "eager"), found, strict=True)
    }
    monkeypatch.setattr(_primitives, "load", modules.__getitem__)
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", forced)
    args = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    if isinstance(expected, int):
        assert _primitives.backend_for(*args) is modules[("native", "triton", "eager")[expected]]
        return
    with pytest.raises(RuntimeError, match=r"no backend for torch.float32 logits on cpu: ") as raised:
        _primitives.backend_for(*args)
    assert all(reason in str(raised.value) for reason in expected)


def test_forced_name_that_is_none() -> None:
    code = "import torch, xent; xent.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))"
    result = run("-c", code, XENT_BACKEND="cuda")
    assert result.returncode == 1
    assert "ValueError: XENT_BACKEND: expected one of native, triton, eager, got 'cuda'" in result.stderr


def test_no_backend_is_imported_before_it_is_asked_for() -> None:
    code = """
import sys, torch, xent
loaded = lambda: {name for name in sys.modules if name.startswith("xent._backends.")}
assert not loaded(), loaded()
xent.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
assert loaded() == {"xent._backends.eager"}, loaded()
"""
    result = run("-c", code, XENT_BACKEND="eager")
    assert result.returncode == 0, result.stderr


CHOSEN = """
import sys, torch
from xent._rows import dispatch
sys.modules["xent._backends.native._native"] = None  # as if it could not be built
print(dispatch.backend_for(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)).__name__)
"""


@pytest.mark.parametrize(("forced", "expected"), [("", "eager"), ("triton", "triton")])
def test_the_interpreter_is_nobodys_choice(forced: str, expected: str) -> None:
    """TRITON_INTERPRET=1 alone, which somebody may have set for other kernels, moves nothing onto it."""
    pytest.importorskip("triton")
    child = run("-c", CHOSEN, TRITON_INTERPRET="1", XENT_BACKEND=forced)
    assert child.stdout == f"xent._backends.{expected}\n", child.stderr


def test_missing_triton_says_so() -> None:
    child = run(
        "-c", "import sys; sys.modules['triton'] = None\nfrom xent._rows import dispatch as d; print(d.load('triton'))"
    )
    assert "triton cannot be imported" in child.stdout
    assert "pip install" in child.stdout


@pytest.mark.parametrize("forced", ["", "eager"])
def test_python_m_xent(forced: str) -> None:
    """One line for the versions, one for each backend: available, or missing and why."""
    result = run("-m", "xent", XENT_BACKEND=forced)
    assert result.returncode == 0, result.stderr
    first, *lines = result.stdout.splitlines()
    assert f"xent {xent.__version__}" in first
    assert f"torch {torch.__version__}" in first
    for name, line in zip(_primitives.BACKENDS, lines, strict=False):
        module = _primitives.load(name)
        assert line.split() == [
            name,
            *(f"missing: {module}" if isinstance(module, str) else f"available: {module.ABOUT}").split(),
        ]
    assert len(lines) == len(_primitives.BACKENDS) + bool(forced)
    assert not forced or "XENT_BACKEND=eager" in lines[-1]


# Rows of 1024 float32 logits are one or more whole pages of memory; those that are ignored may not be looked at.
NEVER_READ = """
import ctypes, mmap, sys, torch
from oracle import EVERYTHING, grad_of, stats_of, upstream
from xent._rows import dispatch
N, row = 8, max(mmap.PAGESIZE, 4096)
pages = mmap.mmap(-1, N * row)
x = torch.frombuffer(pages, dtype=torch.float32).view(N, row // 4)
x.copy_(torch.randn(x.shape))
y = torch.randint(1024, (N,))
y[[0, 3, 4, 7]] = -100
protect = ctypes.CDLL(None).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
for n in (0, 3, 4, 7):
    assert protect(x[n].data_ptr(), row, 0) == 0
for name in sys.argv[1:]:
    dispatch.FORCED_BACKEND = name
    print(name, flush=True)
    grad = grad_of(x, y, stats_of(x, y, EVERYTHING), upstream(N))
    assert grad.count_nonzero(1).bool().tolist() == [False, True, True, False, False, True, True, False], grad
"""


def test_ignored_rows_are_not_read_at_all(every_backend: list[str]) -> None:
    """Not one number of them: with their memory locked, a look would end the process."""
    child = run("-c", NEVER_READ, *every_backend)
    assert child.returncode == 0, child.stdout + (child.stderr or f"ended by signal {-child.returncode}")
    assert child.stdout.split() == every_backend


# A device without the device: fake tensors have shapes, dtypes and a device that is not the CPU, but no numbers, so
# that whatever would wait for a number raises. "lazy" is a device that torch knows and needs no hardware for.


class Recorder(TorchDispatchMode):
    """Remembers the operations that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def device_calls() -> dict[str, Callable[[Callable[..., Tensor], Callable[..., Tensor]], object]]:
    """Calls of every layout, given makers of logits and of index targets."""
    return {
        "(C)": lambda x, y: xent.cross_entropy(x(5), y()),
        "(N, C)": lambda x, y: xent.cross_entropy(x(4, 5), y(4), label_smoothing=0.1),
        "(N, C), weight": lambda x, y: xent.cross_entropy(x(4, 5), y(4), x(5), on_empty="zero"),
        "(N, C, d1)": lambda x, y: xent.cross_entropy(x(4, 3, 5).mT, y(4, 3), reduction="none", z_loss=0.1),
        "(B, T, V)": lambda x, y: xent.cross_entropy(x(4, 3, 5), y(4, 3), softcap=3.0),
        "token_stats": lambda x, y: xent.token_stats(x(4, 3, 5), y(4, 3), entropy=True, prediction=True),
    }


@pytest.mark.parametrize("call", device_calls())
def test_no_host_sync(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward never waits for a number, and checks the targets with an assertion on the device, in every layout."""
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", "eager")
    monkeypatch.setattr(_torch, "needs_operator", lambda *_: False)  # into the primitive, fake as these tensors are
    with FakeTensorMode(), torch.no_grad(), Recorder() as recorder:
        flag = torch.empty(1, device="lazy") > 0
        with pytest.raises(DataDependentOutputException):
            bool(flag)
        device_calls()[call](
            lambda *shape: torch.empty(shape, device="lazy"),
            lambda *shape: torch.empty(shape, device="lazy", dtype=torch.int64),
        )
    assert torch.ops.aten._assert_async.msg in recorder.seen


def test_no_host_sync_in_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", "eager")
    with FakeTensorMode(), torch.no_grad():
        x, y = torch.empty(4, 5, device="lazy"), torch.empty(4, device="lazy", dtype=torch.int64)
        rows = torch.empty(4, device="lazy", dtype=torch.float64)
        grad = oracle.grad_of(x, y, Stats(*[rows] * 7), oracle.Upstream(rows, rows, rows, rows), scale=2.0, softcap=3.0)
        assert grad.shape == x.shape
        assert grad.device.type == "lazy"


@pytest.mark.parametrize("wrong", [-1, 5])
def test_the_assertion_on_the_device(wrong: int) -> None:
    """Its message is the CPU's, as far as can be said without looking."""
    y = torch.tensor([0, wrong, -100])
    flagged: list[tuple[bool, str]] = []

    class OnDevice(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._assert_async.msg:
                flagged.append((bool(args[0]), args[1]))
                return None
            return func(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch, OnDevice():
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # takes the way of a device
        check_range(y, 5, -100)
        check_range(y.clamp(0, 4), 5, -100)
    assert [ok for ok, _ in flagged] == [False, True]
    assert flagged[0][1].startswith("target: expected class indices in [0, 5)")
