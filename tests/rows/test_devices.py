"""Other devices than the CPU, where there is none: what runs there is run on meta tensors, and its operators are read.

A meta tensor has no numbers, so whatever makes the host wait for one raises here, all but `nonzero`, which is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import xent
from xent import _backends, _torch
from xent._rows import dispatch as _primitives

N, C, D = 12, 8, 4


class Operators(TorchDispatchMode):
    """The name of each operator, and what it returned on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:  # which rows count: all
            found: Any = args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        else:
            found = func(*args, **kwargs or {})
        results = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_meta]
        self.seen.append((func.overloadpacket.__name__, results))
        return found

    def count(self, name: str) -> int:
        return sum(name == operator for operator, _ in self.seen)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors are taken for those of a device: no operator without numbers stands in for the code."""
    monkeypatch.setattr(_torch, "needs_operator", lambda *tensors: False)
    monkeypatch.setattr(_torch, "is_traced", lambda *tensors: False)
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", "eager")


def floats(*shape: int, grad: bool = True) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=grad)


def indices(count: int = N) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device="meta")


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weight": {"weight": floats(C, grad=False)},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 9.0},
    "smoothing, weight, none": {"label_smoothing": 0.1, "weight": floats(C, grad=False), "reduction": "none"},
    "a number": {"normalizer": 3.0},
    "a number on the CPU": {"normalizer": torch.tensor(3.0)},
    "zero": {"on_empty": "zero"},
}


def calls() -> dict[str, Callable[[], Tensor]]:
    """Every public function with every option, each the sum of what it returns."""
    table: dict[str, Callable[[], Tensor]] = {}
    for name, options in OPTIONS.items():
        for soft in (False, True):
            y = (lambda: floats(N, C)) if soft else indices
            kind = f"{name}, {'probabilities' if soft else 'indices'}"
            table[f"cross_entropy: {kind}"] = lambda y=y, options=options: xent.cross_entropy(
                floats(N, C), y(), **options
            ).sum()
            table[f"linear_cross_entropy: {kind}"] = lambda y=y, options=options: xent.linear_cross_entropy(
                floats(N, D), floats(C, D), y(), linear_bias=floats(C), max_bytes=256, **options
            ).sum()
    table["linear_cross_entropy: shift"] = lambda: xent.linear_cross_entropy(
        floats(3, 4, D), floats(C, D), floats(3, 4, C), shift=True
    )
    table["linear_cross_entropy: several heads"] = lambda: xent.linear_cross_entropy(
        floats(N, D), floats(C, 2, D), torch.empty(N, 2, dtype=torch.int64, device="meta"), normalizer=torch.tensor(3.0)
    )
    everything = {"entropy": True, "prediction": True}
    table["token_stats"] = lambda: sum(xent.token_stats(floats(N, C), indices(), **everything)[:3]).sum()
    table["linear_token_stats"] = lambda: sum(
        xent.linear_token_stats(floats(N, D), floats(C, D), indices(), **everything)[:3]
    ).sum()
    return table


CALLS = calls()


@pytest.mark.parametrize("name", CALLS)
def test_no_float64_and_no_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS, nothing on the device is float64; and the host waits once for each pass over the rows of a head.

    That is to learn which rows are ignored. Gradients that forward has found cost no second pass.
    """
    for path, module in list(sys.modules.items()):
        if path.startswith("xent.") and hasattr(module, "statistics_dtype"):
            monkeypatch.setattr(module, "statistics_dtype", lambda device: torch.float32)
    with Operators() as operators:
        loss = CALLS[name]()
        forward = operators.count("nonzero")
        loss.backward()
    found = [(name, [tensor.dtype for tensor in results]) for name, results in operators.seen]
    assert not [operator for operator, dtypes in found if torch.float64 in dtypes]
    limit = 0 if not name.startswith("linear") else 2 if "several" in name else 1
    assert forward <= limit
    assert operators.count("nonzero") - forward <= (limit if "none" in name or "token" in name else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
def test_a_normalizer_on_the_cpu_beside_a_head(dtype: torch.dtype) -> None:
    """It goes with any device, as beside logits."""
    h, W = floats(N, D), floats(C, D)
    with Operators():
        loss = xent.linear_cross_entropy(h, W, indices(), normalizer=torch.tensor(3, dtype=dtype))
        loss.backward()
    assert loss.is_meta
    assert h.grad is not None
    assert h.grad.is_meta


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_takes_blocks(soft: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No temporary is larger than a block: of all logits there is the gradient alone."""
    rows = 4
    monkeypatch.setattr(_backends, "DEVICE_BYTES", rows * 1000 * 4)
    x = torch.empty(64, 1000, dtype=dtype, device="meta", requires_grad=True)
    y = torch.empty(64, 1000, device="meta") if soft else indices(64)
    options: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 9.0, "z_loss": 0.1}
    with Operators() as operators:
        torch.autograd.grad(xent.cross_entropy(x, y, **options), x)
    made = [(name, tensor.numel()) for name, results in operators.seen for tensor in results]
    whole = [name for name, numel in made if numel > rows * 1000]
    assert set(whole) <= {"empty_like", "detach", "view"}, whole
    assert whole.count("empty_like") == 1


def test_a_hessian_vector_product_takes_blocks_that_fill_a_device() -> None:
    """A row at a time would be as many launches as there are rows, for each term."""
    x = floats(512, 50257)
    (g,) = torch.autograd.grad(xent.cross_entropy(x, indices(512)), x, create_graph=True)
    with Operators() as operators:
        torch.autograd.grad(g, x, torch.empty_like(x))
    rows = _backends.DEVICE_BYTES // (50257 * 4)
    assert len(operators.seen) < 100 * (2 + 512 // rows)
    assert max(tensor.numel() for name, found in operators.seen for tensor in found if name == "exp") <= rows * 50257
