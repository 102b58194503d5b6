"""Every operator that the package registers, found in torch's own list: what it says of itself is what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import ALL_DTYPES, rows
from pairs import pairwise
from torch import Tensor
from torch._subclasses import FakeTensorMode

from xent._head.blocks import HeadOptions
from xent._records import HeadRows, Layout, Objective, RowSpec, Wanted
from xent._rows.operators import flatten

pytestmark = [
    pytest.mark.usefixtures("unchecked"),  # a tracer cannot read the checks
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own, met while it traces
]
OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("xent::"))
Samples = Iterator[tuple[Any, ...]]

N, C, D = 6, 5, 3
SPEC = RowSpec(scale=0.5, softcap=3.0)
ALL = Wanted(True, True, True)


def logits_of(dtype: torch.dtype, soft: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows, with one that is ignored; classes apart, as in a batch of images; none at all."""
    x, y = rows(dtype, N=N, C=C, soft=soft)
    if not soft:
        y[1] = -100
    yield x[None], y[None]
    x, y = x.unflatten(0, (2, 3)), y.unflatten(0, (2, 3))
    yield x.mT.contiguous().mT, y
    yield x[:, :0], y[:, :0]


def numbers(x: Tensor) -> tuple[Tensor, ...]:
    """top, lse and upstream numbers of the rows."""
    return tuple(torch.rand(6, *x.shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def class_weight(x: Tensor) -> Tensor:
    return torch.arange(1.0, C + 1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def statistics(dtype: torch.dtype, soft: bool, *group: str) -> Samples:
    for x, target in logits_of(dtype, soft):
        layout = Layout(2, *x.shape[:2])
        yield x, target, class_weight(x), *group, *layout, *SPEC, *ALL, False
        yield x.movedim(2, 1), target, None, *group, *layout._replace(axis=1), *SPEC, *Wanted(), False


def gradient(dtype: torch.dtype, soft: bool) -> Samples:
    for x, target in logits_of(dtype, soft):
        layout = Layout(2, *x.shape[:2])
        yield x, target, *numbers(x), class_weight(x), *layout, *SPEC
        yield x.movedim(2, 1), target, *numbers(x)[:4], None, None, None, *layout._replace(axis=1), *SPEC


FORMULA = Objective("sum", label_smoothing=0.1, z_loss=0.1)


def heads(dtype: torch.dtype, soft: bool) -> Iterator[tuple[HeadRows, HeadOptions]]:
    """In blocks, also cast as autocast has it; no rows."""
    torch.manual_seed(0)
    W, b = torch.randn(C, D, dtype=dtype), torch.randn(C, dtype=dtype)
    some, _, none = logits_of(dtype, soft)
    other = {torch.float64: torch.float64, torch.bfloat16: torch.float16}.get(dtype, torch.bfloat16)
    for (x, target), products in ((some, dtype), (some, other), (none, dtype)):
        target = target.flatten(0, 1)
        h = torch.randn(len(target), D, dtype=dtype)
        options = HeadOptions(SPEC, products, max_bytes=100, wanted=FORMULA.wanted)
        yield HeadRows(h, W, b, target, None, class_weight(x)), options


def head_loss(dtype: torch.dtype, soft: bool) -> Samples:
    factor = torch.tensor(0.5, dtype=torch.float64)
    for row, options in heads(dtype, soft):
        for needs in ([True, True, True, soft, False], [True, False, False, False, False], [False] * 5):
            yield *row, factor, *flatten(options, FORMULA), needs
    if not soft:  # K classes of each row
        y = torch.stack([row.target, row.target], 1)
        for needs in ([True, True, True, False, True], [False] * 5):
            of_several = row._replace(target=y, prob=torch.rand(y.shape, dtype=dtype))
            yield *of_several, factor, *flatten(options, FORMULA), needs


def head_statistics(dtype: torch.dtype, soft: bool) -> Samples:
    seed = torch.tensor(3)
    for row, options in heads(dtype, soft):
        own = options._replace(resolution=0.3, spec=SPEC._replace(softcap=None))
        yield *row, *flatten(options._replace(wanted=ALL))
        yield *row._replace(class_weight=None), *flatten(options)
        yield *row._replace(seed=seed), *flatten(own)
        yield *row._replace(seed=seed), *flatten(own._replace(wanted=ALL))


def rank_head_statistics(dtype: torch.dtype, soft: bool, group: str) -> Samples:
    for row, options in heads(dtype, soft):
        sparse = row._replace(class_weight=None, seed=torch.tensor(3))
        yield *row, group, *flatten(options._replace(wanted=ALL))
        yield *sparse, group, *flatten(options._replace(resolution=0.3))


def head_gradients(dtype: torch.dtype, soft: bool) -> Samples:
    for i, arguments in enumerate(head_statistics(dtype, soft)):
        row, flat = HeadRows.split(arguments)
        found = torch.ops.xent.head_statistics(*arguments)
        top, lse, picked = found[:3]
        entries = [None] * 3 if row.seed is None else found[-3:]
        upstream = (lse * 0.5, lse * 0.25, lse * 0.1, None if i % 2 else lse * 0.2)
        for needs in ([True, True, True, soft, False], [False, True, False, False, False]):
            g_mass = lse if soft else None
            yield *row, picked, *entries, top, lse, *upstream, g_mass, *flat, needs


# One line for each operator: its arguments, given a dtype, whether targets are probabilities, and a group of one.
SAMPLES: dict[str, Callable[[torch.dtype, bool, str], Samples]] = {
    "xent::row_statistics": lambda dtype, soft, _: statistics(dtype, soft),
    "xent::row_gradient": lambda dtype, soft, _: gradient(dtype, soft),
    "xent::row_gradient_": lambda dtype, soft, _: gradient(dtype, soft),
    "xent::rank_statistics": statistics,
    "xent::head_loss": lambda dtype, soft, _: head_loss(dtype, soft),
    "xent::head_statistics": lambda dtype, soft, _: head_statistics(dtype, soft),
    "xent::head_gradients": lambda dtype, soft, _: head_gradients(dtype, soft),
    "xent::rank_head_statistics": rank_head_statistics,
}
every_operator = pytest.mark.parametrize("name", OPERATORS)
TARGETS = {"indices": False, "probabilities": True}
every_target = pytest.mark.parametrize("soft", TARGETS.values(), ids=TARGETS)


def operator(name: str) -> Any:
    return getattr(torch.ops.xent, name.removeprefix("xent::"))


def test_every_operator_has_samples() -> None:
    assert sorted(SAMPLES) == OPERATORS


@pairwise(name=OPERATORS, soft=TARGETS, dtype=ALL_DTYPES)
def test_opcheck(name: str, soft: bool, dtype: torch.dtype, alone: Any) -> None:
    """torch's own check of schema, registration, fake results and tracing, with all options at once."""
    outcome = torch.library.opcheck(operator(name), next(SAMPLES[name](dtype, soft, alone.group_name)))
    assert set(outcome.values()) == {"SUCCESS"}


@pairwise(name=OPERATORS, soft=TARGETS, dtype=ALL_DTYPES)
def test_fake_results_are_like_real_ones(name: str, soft: bool, dtype: torch.dtype, backend: str, alone: Any) -> None:
    for arguments in SAMPLES[name](dtype, soft, alone.group_name):
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            fake = operator(name)(*fakes)
        real = operator(name)(*arguments)
        assert described(fake) == described(real)


@every_operator
@every_target
def test_no_derivative_is_forgotten(name: str, soft: bool, alone: Any) -> None:
    """Each operator that returns something has its derivative or says why not. (torch would warn, and give none.)"""
    x, *rest = next(SAMPLES[name](torch.float64, soft, alone.group_name))
    if operator(name).default._schema.is_mutable:
        return
    results = operator(name)(x.requires_grad_(), *rest)
    results = [results] if isinstance(results, Tensor) else results
    loss = sum(t.sum() for t in results if t.requires_grad)
    try:
        (grad,) = torch.autograd.grad(loss, x)
    except NotImplementedError as error:
        assert str(error).startswith(("group: a second derivative", "double backward"))  # noqa: PT017
    else:
        assert grad.any()


def described(results: Any) -> list[Any]:
    results = [results] if isinstance(results, Tensor) else results or []
    return [(t.dtype, t.shape, t.stride() if t.numel() else (), t.device) for t in results]
