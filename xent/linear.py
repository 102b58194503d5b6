"""The losses of a linear head, from hidden states, without the logits."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor
from torch.distributed import ProcessGroup

from ._head.blocks import HeadOptions
from ._head.functions import head_stats, loss_by_gradient, with_seed
from ._inputs import options
from ._inputs.head import LinearRows, check_max_bytes, to_linear_rows
from ._inputs.rows import holds_candidates, result_dtype
from ._ranks.dtensor import on_head, overridable
from ._ranks.exchange import report_failure_to_ranks
from ._ranks.head import rank_head_stats
from ._records import Objective, RowSpec, Wanted
from ._rows import objective
from .functional import TokenStats


@overridable(on_head)
def linear_cross_entropy(
    input: Float[Tensor, "... D"],
    linear_weight: Float[Tensor, "C ... D"],
    target: Shaped[Tensor, "..."],
    *,
    linear_bias: Float[Tensor, "C ..."] | None = None,
    weight: Float[Tensor, " C"] | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0,
    normalizer: float | Tensor | None = None,
    on_empty: str = "nan",
    z_loss: float = 0,
    softcap: float | None = None,
    logit_scale: float = 1,
    loss_dtype: torch.dtype | None = None,
    shift: bool = False,
    max_bytes: int | None = None,
    target_prob: Float[Tensor, "..."] | None = None,
    group: ProcessGroup | None = None,
    grad_resolution: float | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    r"""Cross-entropy, in nats, of the logits :math:`x = W h + b` of a linear head, which are never held.

    The loss is that of :func:`xent.cross_entropy`, :math:`\mathrm{lse}(x) - x_y` with all its options, for hidden
    states `h`. Rows are taken in blocks whose logits fit in `max_bytes`; those of ignored targets are left out before
    the first matrix product. For "mean" and "sum" the gradients are computed in forward, block by block, by three
    products in all (:math:`x = h W^\top`, :math:`dh = G W`, :math:`dW = G^\top h`), and backward only scales them; for
    "none" backward computes each block's logits again, four products. No gradient is computed that nobody asks for.

    Beside the gradients this needs `max_bytes` and a few MB, however many rows there are; with half-precision heads a
    float32 sum of the head's gradient too, which is rounded once at the end.

    The logits of a half-precision head are float32 on CUDA and on a CPU without instructions for products in this
    dtype. On a CPU that has them (on x86 AMX or AVX512_BF16 for bfloat16, AVX512_FP16 for float16) they are rounded to
    the head's dtype, as those of :func:`torch.nn.functional.linear` are.

    With `grad_resolution=r` the gradient is sparse, random and unbiased: a probability `p >= r` counts as it is, and a
    smaller one as r with probability `p / r`, else as 0, so that each is `p` on average. The loss is the same to the
    bit, and so are the target's own entry and label smoothing's part. Per position at most `1 / r + 2` of the C
    probabilities are left, whatever C is; forward saves them (8 bytes each) and computes no gradient, and the two
    products of backward become sparse: one dense product in all, for "mean", "sum" and "none" alike. The variance that
    this adds to a position's gradient is about r times what the random target itself brings: 0.1 % for r = 1/1024.
    Leave it None where gradients are compared or have to repeat without a seed, for few classes, whose products are
    cheap, and for probabilities as targets, whose own part of the gradient is dense and takes its products.

    The arguments that :func:`torch.nn.functional.linear_cross_entropy` has mean what they mean there.

    Args:
        input: hidden states `(..., D)`, of any floating dtype.
        linear_weight: `(C, D)`, of input's dtype (under autocast any). Or `(C, d1, ..., D)`, a head for each index of
            the further dimensions, for input `(N, D)`.
        target: class indices `(...)` in `[0, C)`; or probabilities `(..., C)`, which may require grad; or, with
            `target_prob`, K indices `(..., K)`. With further dimensions `(N, d1, ...)`, `(N, C, d1, ...)` or
            `(N, K, d1, ...)`.
        linear_bias: `(C)` or `(C, d1, ...)`, added to the logits; -inf masks a class.
        weight: `(C,)`, a weight for each class.
        reduction: "mean", "sum" or "none".
        ignore_index: positions with this target are left out, whatever they hold. None is -100.
        label_smoothing, normalizer, on_empty, z_loss, softcap, logit_scale: see :func:`xent.cross_entropy`.
        loss_dtype: dtype of the result. None is `input`'s (float32 under autocast).
        shift: predict the next position: `input[..., :-1, :]` against `target[..., 1:]`, without a copy of either.
        max_bytes: what the logits of one block may take; at least one row is taken. None is 72 MiB.
        target_prob: the probabilities of K indices per position, of the target's shape: see
            :func:`xent.cross_entropy`. They may require grad.
        group: the ranks over which the classes are spread, as in :func:`xent.cross_entropy`: `linear_weight` and
            `linear_bias` hold some of them on each rank, `input` is the same on all. Forward is one all-gather of a few
            numbers per position; backward is one all-reduce, of the hidden states' gradient, and computes each block's
            logits again (not with `grad_resolution`).
        grad_resolution: r in (0, 1), see above: 1/1024, or 1/256 where that saves time. None is the exact gradient.
            Not for `label_smoothing` beside `softcap`, whose gradient is neither sparse nor of rank one, and not beside
            `target_prob`.
        generator: where the one seed of a call comes from; None is the device's default generator, as for dropout. The
            same seed keeps the same entries of the same logits, whatever the number of threads or `max_bytes`; but a
            product of another size may round a logit differently, and so keep another entry.

    Returns:
        A 0-d tensor, or for "none" one loss for each position, of the target's shape without the class dimension (with
        `shift`, one position less).

    Raises:
        TypeError: an argument is not of its type, or a DTensor that is not gathered.
        ValueError: shapes do not fit each other, or an option is out of its range or has no meaning beside the others;
            over a `group`, the arguments of two ranks do not fit each other.
        IndexError: a target is outside `[0, C)` and not `ignore_index` (on CUDA: an asynchronous device-side
            assertion).
        RuntimeError: dtypes or devices differ; `weight` requires grad (unless gradients are off); in backward, `input`
            or the head was modified; over a `group`, the transport failed or a rank never came.
        NotImplementedError: under vmap and forward-mode differentiation; when a gradient that was computed with
            `create_graph=True` is differentiated again; and, for "none" or with `grad_resolution`,
            `torch.autograd.grad(is_grads_batched=True)`.

    Example:
        >>> import torch, xent
        >>> _ = torch.manual_seed(0)
        >>> h = torch.randn(2, 6, 8, requires_grad=True)           # (B, T, D)
        >>> W = torch.randn(50, 8, requires_grad=True)             # (V, D)
        >>> target = torch.randint(50, (2, 6))
        >>> loss = xent.linear_cross_entropy(h, W, target)
        >>> torch.allclose(loss, xent.cross_entropy(h @ W.T, target))
        True
        >>> loss.backward()
        >>> h.grad.shape, W.grad.shape
        (torch.Size([2, 6, 8]), torch.Size([50, 8]))

    Source:
        Gradients in forward, block by block: Hsu et al., Liger Kernel, 2024, arXiv:2410.10989; logits that never reach
        memory: Wijmans et al., Cut Your Losses, 2024, arXiv:2411.09009; the rounding is systematic sampling: Madow,
        1949.
    """
    ignore = -100 if ignore_index is None else ignore_index
    with report_failure_to_ranks(group, input):
        options.check_options(
            ignore, reduction, label_smoothing, normalizer, on_empty, z_loss, loss_dtype, softcap, logit_scale
        )
        options.check_flag("shift", shift)
        options.check_tensor_or_none("target_prob", target_prob)
        several = target_prob is not None
        options.check_grad_resolution(grad_resolution, softcap, label_smoothing, generator, several)
        budget = check_max_bytes(max_bytes)
        rows = to_linear_rows(input, linear_weight, target, linear_bias, weight, shift, ignore, several, target_prob)
        options.check_transform_range(logit_scale, softcap, rows.dtype)
        options.check_weight(weight, len(linear_weight), input, False, sharded=group is not None)
        options.check_normalizer_device(normalizer, input)
        if group is not None and linear_weight.dim() > 2:
            raise ValueError(f"linear_weight: expected shape (C, D) over a group, got {tuple(linear_weight.shape)}")

    formula = Objective(reduction, label_smoothing, z_loss, on_empty, ignore, loss_dtype or result_dtype(input))
    spec = RowSpec(ignore, logit_scale, softcap)
    settings = HeadOptions(spec, rows.dtype, budget, rows.shift, formula.wanted, grad_resolution)
    rows = rows._replace(heads=[with_seed(head, grad_resolution, generator) for head in rows.heads])
    if group is not None or reduction == "none":
        return _by_rows(rows, settings, formula, normalizer, group)
    return loss_by_gradient(rows, settings, formula, normalizer)


def _by_rows(
    rows: LinearRows,
    settings: HeadOptions,
    formula: Objective,
    normalizer: float | Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    """The loss of each row from its statistics, whose gradient is known in backward only: four products."""
    losses = []
    for head in rows.heads:
        q, head = head.prob, head._replace(prob=None)
        if group is None:
            stats = head_stats(head, settings)
            terms = objective.class_terms(head.target[None], head.class_weight, len(head.weight), formula)
        else:
            stats, terms = rank_head_stats(head, settings, group)
        if q is not None:
            stats, terms = objective.of_candidates(stats, terms, head.target[None], q[None], formula.ignore_index)
        losses.append(objective.row_losses(stats, terms, formula)[0])
    found = losses[0] if len(losses) == 1 else torch.stack(losses, 1)
    if formula.reduction == "none":
        return rows.shaped(found.to(formula.dtype))
    divisor = objective.divisor(rows.targets[None], terms.row_weight, normalizer, formula)
    return objective.reduce(found, divisor, formula)


@overridable(on_head)
def linear_token_stats(
    input: Float[Tensor, "... D"],
    linear_weight: Float[Tensor, "C D"],
    target: Integer[Tensor, "..."],
    *,
    linear_bias: Float[Tensor, " C"] | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1,
    entropy: bool = False,
    prediction: bool = False,
    shift: bool = False,
    max_bytes: int | None = None,
    group: ProcessGroup | None = None,
    grad_resolution: float | None = None,
    generator: torch.Generator | None = None,
) -> TokenStats:
    r"""Per-token statistics, in nats, of the logits :math:`x = W h + b` of a linear head, which are never held.

    With :math:`z` the scaled and capped logits: :math:`\mathrm{log\_prob} = z_y - \mathrm{lse}`,
    :math:`\mathrm{lse} = \log \sum_c e^{z_c}`, the entropy and the prediction, as :func:`xent.token_stats` has them.
    Whatever is built on them, backward computes each block of logits once more: four matrix products in all.

    Args:
        input: hidden states `(..., D)`, of any floating dtype.
        linear_weight: `(C, D)`, of input's dtype (under autocast any).
        target: class indices `(...)` in `[0, C)`; or `(..., K)`, K of them for each position: then log_prob has K
            numbers for each.
        linear_bias: `(C,)`, added to the logits.
        ignore_index: a position with this target is left out: its log_prob, lse and entropy are 0, its prediction -1,
            its gradient 0. Of K indices, one that is ignored has a log_prob of 0.
        softcap, logit_scale: see :func:`xent.cross_entropy`.
        entropy, prediction: whether to compute them; the lowest of equal classes is predicted.
        shift: statistics of `target[..., 1:]` from `input[..., :-1, :]`; the results have one position less.
        max_bytes: what the logits of one block may take; at least one row is taken. None is 72 MiB.
        group: the ranks over which the classes are spread, as in :func:`linear_cross_entropy`.
        grad_resolution, generator: a sparse unbiased gradient, as in :func:`linear_cross_entropy`, by one product in
            all; the statistics are the same to the bit.

    Returns:
        TokenStats(log_prob, lse, entropy, prediction), float32 (float64 for float64; the prediction int64).

    Raises:
        ValueError: `target` holds probabilities; or as :func:`linear_cross_entropy`, for an argument that both have.
        TypeError: as there, and so are IndexError and RuntimeError.
        NotImplementedError: as there, and for `torch.autograd.grad(is_grads_batched=True)` in any case.

    Example:
        >>> import torch, xent
        >>> _ = torch.manual_seed(0)
        >>> h, W, target = torch.randn(2, 6, 8), torch.randn(50, 8), torch.randint(50, (2, 6))
        >>> stats = xent.linear_token_stats(h, W, target, prediction=True)
        >>> torch.allclose(stats.log_prob, xent.token_stats(h @ W.T, target).log_prob, atol=1e-6)
        True
        >>> bool((stats.prediction == (h @ W.T).argmax(-1)).all())
        True
    """
    with report_failure_to_ranks(group, input):
        options.check_ignore_index(ignore_index)
        options.check_transform(logit_scale, softcap)
        for name, flag in (("entropy", entropy), ("prediction", prediction), ("shift", shift)):
            options.check_flag(name, flag)
        one_head = isinstance(linear_weight, Tensor) and linear_weight.dim() <= 2
        several = one_head and holds_candidates(input, target)
        options.check_grad_resolution(grad_resolution, softcap, generator=generator, candidates=several)
        budget = check_max_bytes(max_bytes)
        rows = to_linear_rows(input, linear_weight, target, linear_bias, None, shift, ignore_index, several)
        options.check_transform_range(logit_scale, softcap, rows.dtype)
        if linear_weight.dim() > 2:
            raise ValueError(f"linear_weight: expected shape (C, D), got {tuple(linear_weight.shape)}")
        head, y = rows.heads[0], rows.heads[0].target
        if y.is_floating_point():
            raise ValueError(f"target: expected class indices, got probabilities of shape {tuple(target.shape)}")
    spec = RowSpec(ignore_index, logit_scale, softcap)
    wanted = Wanted(False, entropy, prediction)
    settings = HeadOptions(spec, rows.dtype, budget, rows.shift, wanted, grad_resolution)
    head = with_seed(head, grad_resolution, generator)
    if group is None:
        stats = head_stats(head, settings)
    else:
        stats, _ = rank_head_stats(head, settings, group)
    return TokenStats._of(stats, y[None], ignore_index, settings.weight_dtype, rows.shaped)
