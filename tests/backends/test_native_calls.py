"""What the compiled backend refuses, and what it converts: its loops take addresses, and rely on what is checked."""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
import torch
from oracle import stats_of
from torch import Tensor

import xent
from xent._records import RowNumbers, RowSpec, Stats, Wanted
from xent._rows import dispatch as _primitives

native = _primitives.load("native")
assert not isinstance(native, str), native
pytestmark = pytest.mark.usefixtures("unchecked", "on_native")


@pytest.fixture
def on_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", "native")


def grad(x: Tensor, y: Tensor, top: Tensor, lse: Tensor, *g: Tensor | None, **options: Any) -> Tensor:
    return oracle.grad_of(x, y, Stats(top, lse, *[lse] * 5), oracle.Upstream(*g), **options)


x, y = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
v = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
big = torch.randn(8, 10)
negated = torch.complex(x, -x).conj().imag


@pytest.mark.parametrize(
    ("logits", "target", "reason"),
    [
        (x.to("meta"), y, "CPU"),
        (x, y.to("meta"), "CPU"),
        (x.to_sparse(), y, "strided"),
        (x.to(torch.complex64), y, "float32, bfloat16"),
        (x.int(), y, "float32, bfloat16"),
        (negated, y, "negated"),
        (x, y.short(), "int64 and int32"),
        (x, x.to(torch.float8_e4m3fn), "probabilities in the dtypes of logits"),
        (x, negated, "negated"),
    ],
)
def test_refusals(logits: Tensor, target: Tensor, reason: str) -> None:
    assert re.search(reason, native.refusal(logits[None], target[None]))
    with pytest.raises(RuntimeError, match=f"no backend for .* native: .*{reason}"):
        stats_of(logits, target)
    with pytest.raises(RuntimeError, match=f"no backend for .* native: .*{reason}"):
        grad(logits, target, v, v, v, v)


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        ((v[:3], v, v, v), {}, "top: expected"),
        ((v, v[:3], v, v), {}, "lse: expected"),
        ((v, v, v[:, None], v), {}, "g_lse: expected"),
        ((v, v, v, v.to("meta")), {}, "g_picked: expected"),
        ((v, v, v, v, v[:1]), {}, "g_wsum: expected"),
        ((v, v, v, v, None, v[:1]), {}, "g_entropy: expected"),
        ((v, v, v, v), {"class_weight": torch.ones(4)}, "class_weight: expected"),
        ((v, v, v, v), {"out": x.double()}, "out: expected"),
        ((v, v, v, v), {"out": x[:3]}, "out: expected"),
        ((v, v, v, v), {"out": x.to("meta")}, "out: expected"),
        ((v, v, v, v), {"out": negated}, "out: expected"),
        ((v, v, v, v), {"out": x[:1].expand(4, 5)}, "apart from each other"),
        ((v, v, v, v), {"out": x[:, :1].expand(4, 5)}, "apart from each other"),
        ((v, v, v, v), {"out": torch.as_strided(torch.randn(30), (4, 5), (3, 1))}, "apart from each other"),
    ],
)
def test_wrong_arguments_raise(arguments: tuple[Any, ...], options: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        grad(x, y, *arguments, **options)


@pytest.mark.parametrize(
    ("g", "reason"),
    [
        (v, r"g_picked: expected a CPU tensor of shape \(1, 4, 2\), got \(1, 4\)"),
        (v[:, None], r"g_picked: expected a CPU tensor of shape \(1, 4, 2\), got \(1, 4, 1\)"),
        (v[:, None].expand(4, 2).to("meta"), "g_picked: expected a strided CPU tensor, got one on meta"),
    ],
    ids=["one class", "K = 1", "meta"],
)
def test_one_number_flows_back_to_each_candidate(g: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        grad(x, y[:, None].expand(4, 2), v, v, v, g)


@pytest.mark.parametrize(
    ("logits", "target", "reason"),
    [
        (x[0], y, "logits: expected floating logits with the classes in dimension 2, got"),
        (x.int(), y, "logits: expected floating logits with the classes in dimension 2, got"),
        (x, y[:3], r"target: expected a CPU tensor of shape \(1, 4\), got \(1, 3\)"),
        (x, y[:, None, None], r"target: expected a CPU tensor of shape \(1, 4\), got \(1, 4, 1, 1\)"),
        (x, torch.empty(4, 0, dtype=torch.int64), r"target: expected a CPU tensor of shape \(1, 4\), got \(1, 4, 0\)"),
        (x, y.short(), "target: expected int64 or int32 indices, or probabilities"),
        (x, x[:, :3], r"target: expected a CPU tensor of shape \(1, 4, 5\), got \(1, 4, 3\)"),
    ],
)
def test_logits_and_targets_of_the_wrong_shape(logits: Tensor, target: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        native.row_statistics(logits[None], target[None], RowSpec(classes=5), Wanted(), None)


def test_overlapping_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="memory of its own"):
        grad(big[:4, :5], y, v, v, v, v, out=big[1:5, :5])
    with pytest.raises(ValueError, match="memory of its own"):
        grad(big[:4, :5], y, v, v, v, v, out=big.view(-1)[:20].view(4, 5))  # the same start, other rows
    with pytest.raises(ValueError, match="memory of its own"):
        grad(big.view(-1)[:20].view(4, 5), y, v, v, v, v, out=big.view(-1)[19:39].view(4, 5))  # one number is in both
    with pytest.raises(ValueError, match="memory of its own"):
        grad(x, big[:4, :5], v, v, v, v, out=big[:4, :5])


def test_a_tensor_without_storage_raises() -> None:
    freed = torch.randn(1, 4, 5)
    freed.untyped_storage().resize_(0)
    numbers, rest = RowNumbers(*[v[None]] * 4), (RowSpec(classes=5), None)
    with pytest.raises(ValueError, match="storage"):
        native.row_statistics(freed, y[None], RowSpec(classes=5), Wanted(), None)
    with pytest.raises(ValueError, match="storage"):
        native.row_gradient(freed, y[None], numbers, *rest, None)
    with pytest.raises(ValueError, match="storage"):
        native.row_gradient(x[None], y[None], numbers, *rest, freed)
    freed.untyped_storage().resize_(80)  # torch itself crashes when pytest prints such a tensor


def test_other_dtypes_of_row_vectors_are_converted() -> None:
    found = stats_of(x, y)[:2]
    expected = grad(x, y, *found, v, -v)
    assert grad(x, y, *found, v.float(), -v.half()).equal(expected)
    assert grad(x, y, *found, v, torch.complex(v, v).conj().imag).equal(expected)


def test_numbers_that_are_yet_to_be_negated() -> None:
    """Of one row and one class, whose stride is no reason for a copy."""
    one, weight = torch.complex(v, v)[:1].conj().imag, torch.complex(big[0], big[0])[:1].conj().imag
    found = stats_of(x[:1], y[:1])[:2]
    assert grad(x[:1], y[:1], *found, one, one).equal(grad(x[:1], y[:1], *found, -v[:1], -v[:1]))
    several = grad(x[:1], y[:1, None], *found, one, one[:, None])
    assert several.equal(grad(x[:1], y[:1, None], *found, one, -v[:1, None]))
    q = torch.ones(4, 1)
    assert stats_of(x[:, :1], q, class_weight=weight).mass.equal(-big[0, :1].double().expand(4))


def test_a_loss_of_numbers_that_are_yet_to_be_negated() -> None:
    """Each tensor of a call, and the gradient that flows back, is read as it counts and not as it lies in memory."""
    weight, g = torch.complex(x[0], x[0].abs()).conj().imag, torch.complex(x[:, 0], x[:, 1]).conj().imag
    q = torch.complex(x, -x.softmax(1)).conj().imag
    for target, given in ((y, weight), (q, weight), (q, None), (y, None)):
        grads = []
        for numbers in (negated.detach(), negated.resolve_neg()):
            leaf = numbers.requires_grad_()
            same = [t if t is None or leaf.is_neg() else t.resolve_neg() for t in (target, given, g)]
            loss = xent.cross_entropy(leaf, same[0], weight=same[1], reduction="none")
            grads.append(torch.autograd.grad(loss, leaf, same[2])[0])
        assert grads[0].equal(grads[1])


def test_zeros_without_memory() -> None:
    """torch's zero tensors, which forward mode makes: as the logits, a class weight, and as what flows back."""
    zeros = torch._efficientzerotensor
    leaf, weight = x.clone().requires_grad_(), zeros(5)
    assert xent.cross_entropy(zeros(4, 5), y).equal(xent.cross_entropy(torch.zeros(4, 5), y))
    assert xent.cross_entropy(leaf, y, weight=weight, reduction="sum") == 0
    (grad,) = torch.autograd.grad(xent.cross_entropy(leaf, y, reduction="none"), leaf, zeros(4))
    assert not grad.any()


def test_dtypes_that_no_logits_have() -> None:
    """Of the loss, and so of what flows back, and of class weights."""
    kind, leaf = torch.float8_e5m2, x.clone().requires_grad_()
    few = torch.tensor([0.5, 1, 2, 0, 4])
    for reduction, eps, weight in (("mean", 0.0, None), ("none", 0.0, few), ("sum", 0.1, few)):
        loss = xent.cross_entropy(leaf, y, weight, reduction=reduction, label_smoothing=eps)
        given = None if weight is None else weight.to(kind)
        found = xent.cross_entropy(leaf, y, given, reduction=reduction, label_smoothing=eps, loss_dtype=kind)
        assert found.dtype == kind
        assert found.float().equal(loss.to(kind).float())
        ones = torch.ones(loss.shape)
        (expected,) = torch.autograd.grad(loss, leaf, ones)
        assert torch.autograd.grad(found, leaf, ones.to(kind))[0].equal(expected)


def test_the_module_checks_its_own_arguments() -> None:
    module = native._native
    with pytest.raises(TypeError, match="expected 13 arguments, got 1"):
        module.statistics(1)
    with pytest.raises(TypeError, match="expected 14 arguments, got 0"):
        module.gradient()
    with pytest.raises(TypeError, match="logits: expected a Tensor, got <class 'str'>"):
        module.statistics(*["?"] * 13)
    with pytest.raises(TypeError, match="expected a Layout and a RowSpec"):
        module.statistics(x, y, (0, 1), *[None] * 10)
    with pytest.raises(ValueError, match="top: expected 4 numbers side by side"):
        module.statistics(x, y, (1, 1, 4), RowSpec(), 1, None, v[:3], v, v, *[None] * 4)
    with pytest.raises(ValueError, match=r"out: expected a CPU tensor of shape \(4, 5\), got \(3, 5\)"):
        module.gradient(x, y, (1, 1, 4), RowSpec(), 1, None, v, v, v, v, None, None, x[:3], True)
    apart = torch.randn(2, 3, 4, 5).transpose(1, 2)  # three strides to its positions
    given = apart, torch.zeros(2, 4, 3).long(), (3, 1, 24), RowSpec(), 1, None, *[torch.zeros(24).double()] * 3
    assert module.statistics(*given, *[None] * 4) is NotImplemented
    with pytest.raises(ValueError, match="expected an instruction set of this machine, got 'mmx'"):
        module.use("mmx")
