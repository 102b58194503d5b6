"""Whoever looks on at a call, and every function: a tracer's graph computes it, a mode sees it and changes nothing.

A new tracer, mode or function is one line in its table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch._dynamo import compiled_autograd
from torch.distributed.tensor.debug import CommDebugMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from traced import FUNCTIONS, C, D, Loss, Run, batch_of, by_autograd, floating

import xent

pytestmark = [
    pytest.mark.usefixtures("unchecked", "alone"),  # a tracer cannot read the checks
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own, met while it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch looks at it itself
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # the batching of F.cross_entropy
]
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def by_func(loss: Loss) -> Run:
    def run(*batch: Tensor) -> tuple[Tensor, ...]:
        count = floating(batch)
        value, pull = func.vjp(lambda *leaves: loss(*leaves, *batch[count:]), *batch[:count])
        return value, *pull(2 * value)

    return run


def by_value(loss: Loss) -> Run:
    return lambda *batch: (loss(*batch),)


def by_batch(loss: Loss) -> Run:
    """The gradient from parts of it, which torch.autograd.grad computes at once."""

    def run(*batch: Tensor) -> tuple[Tensor, ...]:
        count = floating(batch)
        leaves = [t.detach().requires_grad_() for t in batch[:count]]
        value = loss(*leaves, *batch[count:])
        g = 2 * value.detach()
        share = torch.linspace(0.1, 0.7, g.numel(), dtype=g.dtype).view(g.shape)
        parts = torch.autograd.grad(value, leaves, torch.stack([share * g, (1 - share) * g / 2]), is_grads_batched=True)
        return value.detach(), *[part[0] + 2 * part[1] for part in parts]

    return run


def by_vmap(loss: Loss) -> Run:
    def run(*batch: Tensor) -> tuple[Tensor, ...]:
        pairs = [torch.stack([t.flip(0), t]) for t in batch]
        return tuple(found[1] for found in func.vmap(by_func(loss))(*pairs))

    return run


def by_compiled_autograd(loss: Loss, batch: tuple[Tensor, ...]) -> Run:
    """The loss as it is, and a compiler that traces its backward, once for both batches."""

    def run(*batch: Tensor) -> tuple[Tensor, ...]:
        with compiled_autograd._enable(partial(torch.compile, fullgraph=True, backend="aot_eager")):
            return by_autograd(loss)(*batch)

    torch._dynamo.reset()
    run(*batch)
    return run


Tracer = Callable[[Loss, tuple[Tensor, ...]], Run]


def traced(by: Callable[[Loss], Run], mode: str) -> Tracer:
    options = {"tracing_mode": mode, "_allow_non_fake_inputs": True}  # a class weight that is not an input
    return lambda loss, batch: make_fx(by(loss), **options)(*batch)


class Module(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(*batch)


def exported(loss: Loss, batch: tuple[Tensor, ...], dynamic: bool = False) -> Run:
    """For this number of rows, or for any."""
    leaves = tuple(t.clone().requires_grad_(t.is_floating_point()) for t in batch)
    rows = {0: torch.export.Dim.DYNAMIC} if dynamic else None
    shapes = tuple(rows if len(t) == len(batch[0]) else None for t in batch)
    return by_autograd(torch.export.export(Module(loss), leaves, dynamic_shapes=(shapes,)).module())


# From a loss and a first batch to a function of any other.
TRACERS: dict[str, Tracer] = {
    "make_fx of the value, fake": traced(by_value, "fake"),
    "make_fx of torch.func, real": traced(by_func, "real"),
    "make_fx of torch.func, symbolic": traced(by_func, "symbolic"),
    "make_fx of autograd, fake": traced(by_autograd, "fake"),
    "make_fx of autograd, symbolic": traced(by_autograd, "symbolic"),
    "torch.export": exported,
    "torch.export, symbolic": partial(exported, dynamic=True),
    "compiled autograd": by_compiled_autograd,
    "is_grads_batched": lambda loss, _: by_batch(loss),
    "torch.func.vjp": lambda loss, _: by_func(loss),
    "torch.func.vmap": lambda loss, _: by_vmap(loss),
}
# What a function cannot have, and says so: nobody gets wrong numbers.
BATCHED, MAPPED = r"^is_grads_batched=True of the statistics of a linear head: .* in a loop$", "^vmap of a linear head"
REFUSED = {
    ("is_grads_batched", "head, none"): BATCHED,
    ("is_grads_batched", "linear_token_stats"): BATCHED,
    ("is_grads_batched", "group, head"): BATCHED,
    ("is_grads_batched", "group, linear_token_stats"): BATCHED,
    ("torch.func.vmap", "head"): MAPPED,
    ("torch.func.vmap", "head, none"): MAPPED,
    ("torch.func.vmap", "head, candidates"): MAPPED,
    ("torch.func.vmap", "linear_token_stats"): MAPPED,
    ("torch.func.vmap", "group, head"): MAPPED,
    ("torch.func.vmap", "group, linear_token_stats"): MAPPED,
}


@every_function
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracer(tracer: str, name: str) -> None:
    """On a batch that it has not seen, and of another length where it may differ."""
    case = FUNCTIONS[name]
    first, second = batch_of(case, 6, seed=0), batch_of(case, 8 if "symbolic" in tracer else 6, seed=1)
    reason = REFUSED.get((tracer, name))
    if reason is not None:
        with pytest.raises(NotImplementedError, match=reason):
            TRACERS[tracer](case.ours, first)(*second)
        return
    found, expected = TRACERS[tracer](case.ours, first)(*second), by_autograd(case.theirs)(*second)
    torch.testing.assert_close(tuple(found), expected[: len(found)])


def test_a_traced_gradient_is_differentiated_again() -> None:
    """A graph of operators has no Functions any more, but the operators have their derivatives."""
    case = FUNCTIONS["weight and smoothing"]
    first, (x, y) = batch_of(case, 6, seed=0), batch_of(case, 6, seed=1)
    x.requires_grad_()
    _, g = make_fx(by_func(case.ours))(*first)(x, y)
    _, expected = by_func(case.theirs)(x, y)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_a_gradient_that_a_graph_does_not_have_is_no_zero() -> None:
    h, W, y = batch_of(FUNCTIONS["head"], 6, seed=0)
    program = torch.export.export(Module(xent.linear_cross_entropy), (h, W.requires_grad_(), y)).module()
    program(h, W, y).backward()
    assert W.grad is not None
    with pytest.raises(RuntimeError, match="traced for tensors of which fewer require grad"):
        program(h.requires_grad_(), W, y).backward()


# Modes


class Log(TorchDispatchMode):
    """The names of the operators that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(operator.name())
        return operator(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "CommDebugMode": CommDebugMode,
    "a log": Log,
}


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_mode(mode: str, dtype: torch.dtype, name: str) -> None:
    """It changes no bit of the value or of a gradient."""
    case = FUNCTIONS[name]
    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in batch_of(case, 6, seed=0))
    expected = by_autograd(case.ours)(*batch)
    with MODES[mode]():
        found = by_autograd(case.ours)(*batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_function
def test_a_mode_sees_the_operators(name: str) -> None:
    case = FUNCTIONS[name]
    with Log() as log:
        by_autograd(case.ours)(*batch_of(case, 6, seed=0))
    ours = {operator.rstrip("_") for operator in log.seen if operator.startswith("xent::")}
    assert ours == {"xent::row_statistics", "xent::row_gradient"}


def test_a_counter_sees_the_products() -> None:
    """Of a head those that are computed, 3 with the gradients in forward and 4 without."""
    for name, products in (("head", 3), ("head, none", 4), ("group, head", 4), ("indices", 0)):
        case = FUNCTIONS[name]
        _, *rest = batch = batch_of(case, 6, seed=0)
        rest[-1].clamp_(min=0)  # an ignored row has no product
        with FlopCounterMode(display=False) as counter:
            by_autograd(case.ours)(*batch)
        assert counter.get_total_flops() == products * 2 * 6 * D * C
