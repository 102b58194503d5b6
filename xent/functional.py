"""The losses as functions. Each is a few lines: lay out rows, take their statistics, apply the formula, reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor
from torch.distributed import ProcessGroup

from ._inputs import options, rows
from ._ranks.dtensor import on_logits, overridable
from ._ranks.exchange import report_failure_to_ranks
from ._ranks.functions import rank_stats
from ._records import LossOptions, Objective, RowOptions, RowSpec, Stats, Wanted, compute_dtype, has_candidates
from ._rows import objective
from ._rows.functions import row_stats
from ._rows.loss import loss


@overridable(on_logits)
def cross_entropy(
    input: Float[Tensor, "..."],
    target: Shaped[Tensor, "..."],
    weight: Float[Tensor, " C"] | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0,  # of 0.0 torch.compile(dynamic=True) makes a symbol, and then has to trace again
    dim: int | None = None,
    normalizer: float | Tensor | None = None,
    on_empty: str = "nan",
    z_loss: float = 0,
    softcap: float | None = None,
    logit_scale: float = 1,
    loss_dtype: torch.dtype | None = None,
    inplace_backward: bool = False,
    target_prob: Float[Tensor, "..."] | None = None,
    group: ProcessGroup | None = None,
) -> Float[Tensor, "..."]:
    r"""Cross-entropy between logits and targets, in nats.

    For one position with logits :math:`x`, let :math:`z_c = \kappa \tanh(s x_c / \kappa)` (:math:`s` = `logit_scale`,
    :math:`\kappa` = `softcap`; without them :math:`z = x`), :math:`\mathrm{lse} = \log \sum_c e^{z_c}`,
    :math:`\varepsilon` = `label_smoothing`, :math:`\lambda` = `z_loss`, :math:`w` = `weight`. An index target `y` has

    .. math:: \ell = (1-\varepsilon)\, w_y\, (\mathrm{lse} - z_y)
              + \frac{\varepsilon}{C} \sum_c w_c\, (\mathrm{lse} - z_c) + \lambda\, \mathrm{lse}^2

    and a target distribution `q` has :math:`\sum_c ((1-\varepsilon) q_c + \varepsilon/C)\, w_c\, (\mathrm{lse} - z_c)`
    in the place of the first two terms. So has a target of K indices :math:`y_k` per position with the probabilities
    :math:`q_k` = `target_prob`, and :math:`q_c = 0` for all other classes. "mean" divides the sum by :math:`\sum w_y`
    over the positions that count, for single indices, and by their number else. Each position's gradient is the
    classic one, `softmax - one-hot`.

    The arguments that :func:`torch.nn.functional.cross_entropy` has mean what they mean there.

    Args:
        input: logits of shape `(C)`, `(N, C)`, `(N, C, d1, ...)` (PyTorch's layout) or `(..., C)` (a language model's),
            of any floating dtype and any strides.
        target: class indices in `[0, C)`, of `input`'s shape without the class dimension, int64, int32, int16, int8 or
            uint8; or probabilities, of `input`'s shape and any floating dtype, which may require grad. With
            `target_prob`, K indices in the place of the class dimension: `(N, K, d1, ...)` or `(..., K)`.
        weight: `(C,)`, a weight for each class, of any floating dtype.
        ignore_index: positions with this target count for nothing: they are not read, add nothing to the loss and
            have a gradient of exactly 0, even where they hold NaN. Index targets only; of K indices, one that is
            ignored counts as one of probability 0, and a position counts for nothing where all are.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        dim: the class dimension. None finds it from the shapes, and refuses where two readings fit.
        normalizer: what "mean" divides by instead of its own count: a number or a 0-d tensor. Where the batch is spread
            over R ranks and their gradients are averaged (DistributedDataParallel, FSDP), the mean over the whole
            batch needs the count of all ranks divided by R::

                count = (target != -100).sum()
                torch.distributed.all_reduce(count)
                loss = xent.cross_entropy(input, target, normalizer=count / torch.distributed.get_world_size())
        on_empty: what "mean" gives where every target is ignored: "nan", as torch, or "zero". Gradients are 0 in both.
        z_loss: :math:`\lambda \ge 0`, pulls lse towards 0.
        softcap: :math:`\kappa > 0`, bounds the logits.
        logit_scale: :math:`s`, multiplies the logits, before the softcap.
        loss_dtype: dtype of the result. None is `input`'s (float32 under autocast), rounded once at the end; all
            arithmetic on single logits is in float32 (float64 for float64), on rows and their sums in float64.
        inplace_backward: let backward write the gradient over the logits, so that it needs no memory of its own. The
            logits are gone then: a second use of them in a backward raises, as after any in-place operation.
        target_prob: :math:`q_k`, of the shape of a target of K indices and any floating dtype; may require grad. No
            (N, C) tensor is made of it. The :math:`q_k` need not sum to 1: nothing is done about the rest. An index
            that is there twice counts twice.
        group: the ranks over which the classes are spread: `input` holds some of them on each rank (probabilities and,
            if it has their length, `weight`, too), in the order of the ranks, not necessarily as many as on another;
            the target's indices are those of all classes, and the same on each rank. Each gets the same loss, the one
            of all classes, and the gradient of its own logits. Forward is one all-gather of a few numbers per
            position, backward needs none. A `DTensor` sharded over the classes knows its group, and the loss is a
            `DTensor` as well: the mean over its whole batch. What one rank raises is raised on all, and names the rank.

    Returns:
        A 0-d tensor, or for "none" one loss for each position, of the target's shape without the class dimension.

    Raises:
        TypeError: a tensor is not a Tensor, or an option is not of its type.
        ValueError: shapes do not fit each other, two class dimensions fit, or an option is out of its range or has no
            meaning beside the others; over a `group`, the arguments of two ranks do not fit each other.
        IndexError: a target is outside `[0, C)` and not `ignore_index` (on CUDA: an asynchronous device-side
            assertion), or `dim` is out of range.
        RuntimeError: a dtype is not among those above, devices differ, `weight` requires grad beside class
            indices (unless gradients are off); `inplace_backward` meets a DTensor, logits that are not rows in memory
            of their own, or `create_graph=True`; in backward, the logits were modified; over a `group`, the transport
            failed or a rank never came.
        NotImplementedError: forward mode over forward mode; vmap over `weight` where all classes' weights count; over a
            `group`, a second derivative or forward mode.

    Example:
        >>> import torch, xent
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(4, 3, requires_grad=True)          # (N, C)
        >>> target = torch.tensor([0, 1, 2, 1])                     # (N,)
        >>> loss = xent.cross_entropy(logits, target)
        >>> print(f"{loss.item():.4f}")
        1.4412
        >>> loss.backward()
        >>> one_hot = torch.nn.functional.one_hot(target, 3)
        >>> torch.allclose(logits.grad, (logits.softmax(1) - one_hot) / 4)
        True
        >>> batch = torch.randn(2, 5, 7)                            # (B, T, V) with (B, T) targets, as they are
        >>> xent.cross_entropy(batch, torch.randint(7, (2, 5)), reduction="none").shape
        torch.Size([2, 5])

    Source:
        The loss is the negative log-likelihood of softmax regression (Bridle, 1990); label smoothing: Szegedy et al.,
        2016, arXiv:1512.00567; z-loss: Chowdhery et al., 2022, arXiv:2204.02311; softcap: Gemma 2, 2024,
        arXiv:2408.00118. The one-pass stable lse: Milakov and Gimelshein, 2018, arXiv:1805.02867.
    """
    with report_failure_to_ranks(group, input):
        options.check_options(
            ignore_index, reduction, label_smoothing, normalizer, on_empty, z_loss, loss_dtype, softcap, logit_scale
        )
        options.check_flag("inplace_backward", inplace_backward)
        options.check_tensor_or_none("target_prob", target_prob)
        several = target_prob is not None
        layout, y, soft = rows.read_batch(input, target, dim, ignore_index, several, inplace_backward)
        if target_prob is not None:
            options.check_target_prob(target_prob, target)
            target_prob = layout.rows(target_prob)
        options.check_transform_range(logit_scale, softcap, input.dtype)
        options.check_weight(weight, input.shape[layout.axis], input, soft, sharded=group is not None)
        options.check_normalizer_device(normalizer, input)

    spec, dtype = RowSpec(ignore_index, logit_scale, softcap), loss_dtype or rows.result_dtype(input)
    formula = Objective(reduction, label_smoothing, z_loss, on_empty, ignore_index, dtype)
    if group is None:
        batch_options = LossOptions(layout, spec, formula, inplace_backward)
        return loss(input, y, weight, normalizer, target_prob, batch_options)
    y = layout.targets(y, input.dim())
    stats, terms = rank_stats(input, y, weight, group, RowOptions(layout, spec, formula.wanted, inplace_backward))
    if target_prob is not None:
        stats, terms = objective.of_candidates(stats, terms, y, target_prob, ignore_index)
    return layout.shaped(objective.evaluate(stats, terms, y, normalizer, formula)[0], input.shape)


class TokenStats(NamedTuple):
    r"""What :func:`token_stats` returns: one number per position, of shape `(...)`, the shape of its target.

    Args:
        log_prob: :math:`z_y - \mathrm{lse} \le 0`, in nats.
        lse: :math:`\log \sum_c e^{z_c}`, in nats.
        entropy: :math:`-\sum_c p_c \log p_c \in [0, \log C]`, in nats; None where it was not asked for.
        prediction: :math:`\operatorname{argmax}_c z_c`, int64; None where it was not asked for.

    Example:
        >>> import torch, xent
        >>> stats = xent.token_stats(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), prediction=True)
        >>> stats.prediction
        tensor([1])
        >>> stats.entropy is None
        True
    """

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor | None
    prediction: Tensor | None

    @classmethod
    def _of(
        cls, stats: Stats, target: Tensor, ignore_index: int, dtype: torch.dtype, shaped: Callable[[Tensor], Tensor]
    ) -> TokenStats:
        if has_candidates(target):  # some of a position may be ignored
            log_prob = (stats.picked - stats.lse[..., None]).masked_fill(target == ignore_index, 0)
        else:
            log_prob = stats.picked - stats.lse
        return cls(
            log_prob=shaped(log_prob.to(dtype)),
            lse=shaped((stats.top + stats.lse).to(dtype)),
            entropy=None if stats.entropy is None else shaped(stats.entropy.to(dtype)),
            prediction=None if stats.argmax is None else shaped(stats.argmax),
        )


@overridable(on_logits)
def token_stats(
    input: Float[Tensor, "..."],
    target: Integer[Tensor, "..."],
    *,
    dim: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1,
    entropy: bool = False,
    prediction: bool = False,
    group: ProcessGroup | None = None,
) -> TokenStats:
    r"""Per-token log-probability, log-normaliser, entropy (in nats) and prediction: the parts to build a loss from.

    With :math:`z` the scaled and capped logits of :func:`cross_entropy` and :math:`p = \mathrm{softmax}(z)`,

    .. math:: \mathrm{log\_prob} = z_y - \mathrm{lse}, \quad \mathrm{lse} = \log \sum_c e^{z_c}, \quad
              \mathrm{entropy} = -\sum_c p_c \log p_c, \quad \mathrm{prediction} = \operatorname{argmax}_c z_c

    All but the prediction are differentiable, any number of times. Whatever is built on them, the logits are read once
    in forward and once in backward, and their gradient is the only tensor of their size that is ever made.

    Args:
        input: logits of shape `(C)`, `(N, C)`, `(N, C, d1, ...)` or `(..., C)`, of any floating dtype.
        target: class indices as in :func:`cross_entropy`, of `input`'s shape without the class dimension; or with K of
            them in its place, `(N, K, d1, ...)` or `(..., K)`: then log_prob has K numbers for each position.
        dim: the class dimension. None finds it from the shapes, and refuses where two readings fit.
        ignore_index: a position with this target is not read: its log_prob, lse and entropy are 0, its prediction -1,
            its gradient 0. Of K indices, one that is ignored has a log_prob of 0.
        softcap: :math:`z = \kappa \tanh(x / \kappa)`.
        logit_scale: multiplies the logits, before the softcap.
        entropy: whether to compute the entropy.
        prediction: whether to find the most likely class; the lowest of equals.
        group: the ranks over which the classes are spread, as in :func:`cross_entropy`.

    Returns:
        TokenStats(log_prob, lse, entropy, prediction), each with one number per position (log_prob with K, in the
        target's shape, where the target has K indices), float32 (float64 for float64 logits; the prediction int64);
        entropy and prediction are None unless asked for.

    Raises:
        ValueError: `target` holds probabilities; or as :func:`cross_entropy`, for an argument that both have.
        TypeError: as there, and so are IndexError, RuntimeError and NotImplementedError.

    Example:
        A focal loss, :math:`-(1 - p_y)^\gamma \log p_y`, and the textbook form of it:

        >>> import torch, xent
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)     # (B, T, V)
        >>> target = torch.randint(7, (2, 5))                                         # (B, T)
        >>> log_p = xent.token_stats(logits, target).log_prob
        >>> focal = (-((1 - log_p.exp()) ** 2) * log_p).mean()
        >>> p = logits.softmax(-1).gather(-1, target[..., None])[..., 0]
        >>> textbook = (-((1 - p) ** 2) * p.log()).mean()
        >>> torch.allclose(focal, textbook)
        True
        >>> torch.allclose(*torch.autograd.grad(focal, logits), *torch.autograd.grad(textbook, logits))
        True

    Source:
        Focal loss: Lin et al., 2017, arXiv:1708.02002.
    """
    with report_failure_to_ranks(group, input):
        options.check_ignore_index(ignore_index)
        options.check_transform(logit_scale, softcap)
        options.check_flag("entropy", entropy)
        options.check_flag("prediction", prediction)
        layout, y, soft = rows.read_batch(input, target, dim, ignore_index, rows.holds_candidates(input, target))
        options.check_transform_range(logit_scale, softcap, input.dtype)
        if soft:
            raise ValueError(
                f"target: expected class indices, got probabilities of the shape of input, {tuple(target.shape)}"
            )
        y = layout.targets(y, input.dim())
    wanted = RowOptions(layout, RowSpec(ignore_index, logit_scale, softcap), Wanted(False, entropy, prediction))
    if group is None:
        stats = row_stats(input, y, None, wanted)
    else:
        stats, _ = rank_stats(input, y, None, group, wanted)
    return TokenStats._of(
        stats, y, ignore_index, compute_dtype(input), lambda numbers: layout.shaped(numbers, input.shape)
    )
