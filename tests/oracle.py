"""The truth in float64, written from the formulas and not from the package; and how far from it a result may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from xent._records import RowNumbers, RowSpec, Stats, Wanted
from xent._rows import dispatch as _primitives

Options = dict[str, Any]

# How many rounding errors of its own dtype a result may have: half a unit for the one rounding at the end of a half
# precision result, a few for arithmetic in the dtype itself (an exp near -20 alone has 20).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 1.01 * 2**-8, torch.float16: 1.01 * 2**-11}
ALL_DTYPES = tuple(TOLERANCE)
every_dtype = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
torch_has_linear = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch before 2.13 has no such loss to compare with"
)

NOTHING, EVERYTHING = Wanted(), Wanted(True, True, True)


class Upstream(NamedTuple):
    """The gradient of a loss for each statistic, one number per row."""

    lse: Tensor
    picked: Tensor
    wsum: Tensor | None = None
    entropy: Tensor | None = None


class Truth(NamedTuple):
    """The statistics of `xent._records.Stats`, all of them: relative to `top`, which is a constant."""

    top: Tensor
    lse: Tensor
    picked: Tensor
    mass: Tensor
    wsum: Tensor
    entropy: Tensor
    argmax: Tensor


def scores(x: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """The logits that count: kappa tanh(s x / kappa)."""
    z = x.double() * scale
    return z if softcap is None else softcap * (z / softcap).tanh()


def largest(z: Tensor) -> Tensor:
    """max_c z_c of each row, a constant; 0 where it is not finite."""
    top = z.detach().amax(1)
    return top.where(top.isfinite(), 0)


def log_sum_exp(u: Tensor) -> Tensor:
    """log sum_c exp(u_c) of rows relative to `largest`: log 0 for a whole row of -inf, NaN for one with +inf."""
    total = u.exp().sum(1)
    return total.where(total < torch.inf, torch.nan).log()


def weighted_sum(coefficient: Tensor, value: Tensor) -> Tensor:
    """sum_c k_c v_c of each row, where a coefficient of 0 contributes 0 whatever its value is."""
    unused = coefficient == 0
    return (coefficient * value.masked_fill(unused, 0)).sum(1)


def one_hot(y: Tensor, C: int) -> Tensor:
    """(N, C), with no 1 at all where y is not in [0, C)."""
    return (y[:, None] == torch.arange(C)).double()


def statistics(z: Tensor, target: Tensor, weight: Tensor | None = None, start: int = 0) -> Truth:
    """Of rows (N, C) of scores whose first class is number `start`, each by its definition."""
    C = z.shape[1]
    w = torch.ones(C).double() if weight is None else weight.double()
    t = target.double() * w if target.is_floating_point() else one_hot(target - start, C)
    top = largest(z)
    u = z - top[:, None]
    lse = log_sum_exp(u)
    log_p = u - lse[:, None]
    first = torch.arange(C).where(z == z.amax(1, keepdim=True), C).amin(1)
    entropy = -weighted_sum(log_p.exp(), log_p)
    return Truth(top, lse, weighted_sum(t, u), t.sum(1), weighted_sum(w.expand_as(u), u), entropy, first)


def gradient(
    x: Tensor,
    target: Tensor,
    stats: Truth | Stats,
    upstream: Upstream,
    weight: Tensor | None = None,
    start: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """dx (N, C), entry by entry, as the contract of `row_gradient` has it; `stats` may be of more classes than x."""
    g = each(lambda row: row[:, None], upstream)
    w = torch.ones(x.shape[1]).double() if weight is None else weight.double()
    t = target.double() * w if target.is_floating_point() else one_hot(target - start, x.shape[1])
    log_p = scores(x, scale, softcap) - stats.top[:, None] - stats.lse[:, None]
    p = log_p.exp()
    dz: Tensor = p * g.lse + g.picked * t
    if g.wsum is not None:
        dz = dz + g.wsum * w
    if g.entropy is not None:
        dz = dz - g.entropy * p * log_p.masked_fill(p == 0, 0)
    return dz * (scale if softcap is None else scale / (scale * x.double() / softcap).cosh() ** 2)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    dim: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | None = None,
    on_empty: str = "nan",
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The loss in float64, differentiable. `dim` defaults to PyTorch's layout.

    Both kinds of target are a distribution q over the classes, and the loss of a row is sum_c q_c w_c (lse - z_c).
    """
    axis = min(1, input.dim() - 1) if dim is None else dim
    logits = input.movedim(axis, -1)
    shape, C = logits.shape[:-1], logits.shape[-1]
    x = logits.reshape(shape.numel(), C)
    soft = target.shape == input.shape
    w = torch.ones(C).double() if weight is None else weight.double()
    if soft:
        q, keep = target.double().movedim(axis, -1).reshape(x.shape), torch.ones(len(x), dtype=torch.bool)
    else:
        q, keep = one_hot(target.reshape(-1).long(), C), target.reshape(-1).long() != ignore_index

    rows = keep.nonzero()[:, 0]
    z, q = scores(x[rows], logit_scale, softcap), q[rows]
    smooth = (1 - label_smoothing) * q + label_smoothing / C
    top = largest(z)
    u = z - top[:, None]
    lse = log_sum_exp(u)
    row_losses = weighted_sum(smooth * w, lse[:, None] - u) + z_loss * (top + lse) ** 2
    if reduction == "none":
        return torch.zeros(len(x)).double().index_put((rows,), row_losses).view(shape)
    if reduction == "sum":
        return row_losses.sum()
    count = torch.tensor(float(len(x))).double() if soft else (q * w).sum()
    if on_empty == "zero" and len(rows) == 0:
        count = count + 1
    return row_losses.sum() / (count if normalizer is None else normalizer)


def upstream_for(loss: Tensor) -> Tensor:
    """One random number per loss, to hand to backward: with all ones, an upstream that is never read goes unnoticed.

    Odd multiples of 1/32, which every dtype holds as they are, and none of them 0.
    """
    numbers = torch.randint(-64, 64, loss.shape, generator=torch.Generator().manual_seed(7))
    return ((2 * numbers + 1) / 32).to(loss)


def loss_and_grad(
    function: Callable[..., Tensor], x: Tensor, *args: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`function(x, *args, **options)` and its gradient at x for `upstream_for` its result."""
    x = x.detach().requires_grad_()
    loss = function(x, *args, **options)
    (grad,) = torch.autograd.grad(loss, x, upstream_for(loss))
    return loss.detach(), grad


def true_loss_and_grad(x: Tensor, *args: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The same in float64, for the very logits that x holds."""
    return loss_and_grad(cross_entropy, x.double(), *args, **options)


class Errors(NamedTuple):
    """The largest error over the rows of a gradient, each in units of a norm of the row itself."""

    target: float  # the target's entry, in units of the row's norm
    rest: float  #   all other entries, in units of the norm of the others


def gradient_errors(got: Tensor, truth: Tensor, target: Tensor | None = None, dim: int = -1) -> Errors:
    """How far a gradient is from the truth, row by row, the target's entry and the rest apart.

    An absolute tolerance does not see a large vocabulary: all the entries but the target's shrink like 1/C, and at
    C = 128k zeros pass for them. A row that must be 0 has an infinite error if it is anything else. `target` holds
    class indices; without it (probabilities) every entry is one of the rest.
    """
    C = got.shape[dim]
    truth = truth.movedim(dim, -1).reshape(-1, C)
    error = got.double().movedim(dim, -1).reshape(-1, C) - truth
    # Below the smallest normal number a dtype has fixed steps, and rounding to them is no error of ours.
    info = torch.finfo(got.dtype)
    error = error.abs().sub(info.smallest_normal * info.eps / 2).clamp(min=0)
    is_target = torch.zeros_like(truth) if target is None else one_hot(target.reshape(-1).long(), C)
    at_target, rest = error * is_target, error * (1 - is_target)

    def worst(e: Tensor, of: Tensor) -> float:
        relative = e.norm(dim=1) / of.norm(dim=1)
        return float(relative.where(e.norm(dim=1) != 0, 0).max()) if e.numel() else 0.0

    return Errors(worst(at_target, truth), worst(rest, truth * (1 - is_target)))


def assert_grad(got: Tensor, truth: Tensor, target: Tensor | None = None, dim: int = -1, slack: float = 1.0) -> None:
    """The gradient is as close to the truth as its dtype allows; NaN in either fails."""
    errors = gradient_errors(got, truth, target, dim)
    limit = TOLERANCE[got.dtype] * slack
    assert all(error <= limit for error in errors), f"{errors} of the row's norm, expected at most {limit}"


def assert_loss(got: Tensor, truth: Tensor, slack: float = 1.0) -> None:
    """The loss is as close to the truth as its dtype allows, in units of itself or, where it is small, of 1."""
    tolerance = TOLERANCE[got.dtype] * slack
    small = min(tolerance, TOLERANCE[torch.float32])  # half precision results come from float32 arithmetic
    torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=small, equal_nan=True)


def rows(dtype: torch.dtype, *, N: int = 13, C: int = 37, soft: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (N, C) with peaks at the first and the last class, and targets that hit both ends."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64) * 3
    x[:: max(1, N // 3), 0] += 9
    x[1 :: max(1, N // 3), -1] += 9
    if soft:
        return x.to(dtype), torch.rand(N, C, generator=generator).to(dtype) / C
    y = torch.randint(C, (N,), generator=generator)
    y[:3] = torch.tensor([0, C - 1, C - 1])
    return x.to(dtype), y


def truth_for(x: Tensor, target: Tensor, weight: Tensor | None = None, start: int = 0, **reading: Any) -> Truth:
    """`statistics` of these rows."""
    return statistics(scores(x, **reading), target, weight, start)


def upstream(N: int, wsum: bool = True, entropy: bool = True) -> Upstream:
    """One random number per row and statistic."""
    g = torch.randn(4, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Upstream(g[0], g[1], g[2] if wsum else None, g[3] if entropy else None)


def each(function: Callable[[Tensor], Tensor], record: Any) -> Any:
    """The same record with `function` of each tensor that there is."""
    return type(record)(*[None if tensor is None else function(tensor) for tensor in record])


def stats_of(
    x: Tensor, target: Tensor, wanted: Wanted = NOTHING, class_weight: Tensor | None = None, **spec: Any
) -> Stats:
    """`row_statistics` of rows (N, C), as all tests call it: with the fields of a `RowSpec` as options."""
    stats = _primitives.row_statistics(x[None], target[None], RowSpec(**spec), wanted, class_weight)
    return each(lambda stat: stat[0], stats)  # type: ignore[no-any-return]


def grad_of(
    x: Tensor,
    target: Tensor,
    stats: Any,
    g: Upstream,
    class_weight: Tensor | None = None,
    out: Tensor | None = None,
    **spec: Any,
) -> Tensor:
    """`row_gradient` in the same way, for `Stats` or a `Truth`."""
    numbers = each(lambda n: n[None], RowNumbers(stats.top, stats.lse, *g))
    whole = None if out is None else out[None]
    return _primitives.row_gradient(x[None], target[None], numbers, RowSpec(**spec), class_weight, whole)[0]


def assert_stats(got: Any, truth: Truth, x: Tensor, target: Tensor, slack: float = 1.0) -> None:
    """Each statistic is float64 (N,) and as exact as arithmetic on the logits x allows.

    The largest score is rounded as one number is. All others are sums of terms of one sign: relative to `top`, nothing
    cancels.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    tolerance, unit = slack * TOLERANCE[compute], torch.finfo(compute).eps
    torch.testing.assert_close(got.top, truth.top, rtol=4 * unit, atol=0)
    for name in ("lse", "picked", "mass", "wsum", "entropy"):
        value = getattr(got, name)
        if value is None:
            assert name in ("wsum", "entropy") or (name == "mass" and not target.is_floating_point())
            continue
        assert value.dtype == torch.float64, name
        torch.testing.assert_close(value, getattr(truth, name), rtol=tolerance, atol=tolerance)
    if got.argmax is not None:
        assert got.argmax.dtype == torch.int64
        assert got.argmax.equal(truth.argmax)
