"""The checks of options: of their types and ranges, and of what they are to the tensors beside them."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


def check_options(
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    normalizer: float | Tensor | None,
    on_empty: str,
    z_loss: float,
    loss_dtype: torch.dtype | None,
    softcap: float | None,
    logit_scale: float,
    **_: object,
) -> None:
    """The options of a loss that do not depend on any tensor's shape; called by functions and module constructors."""
    check_transform(logit_scale, softcap)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check_ignore_index(ignore_index)
    _check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer: only reduction='mean' divides by one, got reduction={reduction!r}")
        if not isinstance(normalizer, Tensor):
            _check_number("normalizer", normalizer)
        elif normalizer.dim() != 0:
            raise ValueError(f"normalizer: expected a number or a 0-d tensor, got shape {tuple(normalizer.shape)}")
        elif normalizer.is_complex():
            raise TypeError(f"normalizer: expected a real number, got {normalizer.dtype}")
    if on_empty not in ("nan", "zero"):
        raise ValueError(f"on_empty: expected 'nan' or 'zero', got {on_empty!r}")
    _check_number("z_loss", z_loss)
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a finite number >= 0, got {z_loss}")
    if loss_dtype is not None and not (isinstance(loss_dtype, torch.dtype) and loss_dtype.is_floating_point):
        raise ValueError(f"loss_dtype: expected None or a floating torch.dtype, got {loss_dtype!r}")


def check_flag(name: str, value: bool) -> None:
    """A bool, and not something that happens to be true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def check_size(name: str, value: int) -> None:
    """An int; torch would not name it."""
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {value!r}")


def check_ignore_index(ignore_index: int) -> None:
    """An int, and not a float or a bool that happens to compare equal to some target."""
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected a number that int64 holds, got {ignore_index}")


def check_normalizer_device(normalizer: float | Tensor | None, input: Tensor) -> None:
    """A 0-d tensor on the CPU goes with any device; one on meta with meta only."""
    if isinstance(normalizer, Tensor) and normalizer.device != input.device and normalizer.device.type != "cpu":
        raise RuntimeError(
            f"normalizer: expected a tensor on {input.device} or the CPU, got one on {normalizer.device}"
        )


def check_transform(logit_scale: float, softcap: float | None) -> None:
    """The two options that change the logits themselves."""
    _check_number("logit_scale", logit_scale)
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale: expected a finite number, got {logit_scale}")
    if softcap is not None:
        _check_number("softcap", softcap)
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap: expected None or a finite number > 0, got {softcap}")


def check_transform_range(logit_scale: float, softcap: float | None, logits: torch.dtype) -> None:
    """The dtype of the arithmetic, float32 of all logits but float64, holds both, and 1 / softcap."""
    if softcap is None and logit_scale == 1:
        return
    of = torch.finfo(torch.float64 if logits == torch.float64 else torch.float32)
    for name, value, least in (("logit_scale", logit_scale, of.min), ("softcap", softcap, of.tiny)):
        if value is not None and not least <= value <= of.max:
            raise ValueError(f"{name}: expected a number in [{least}, {of.max}] beside {logits} logits, got {value}")


def check_grad_resolution(
    grad_resolution: float | None,
    softcap: float | None,
    label_smoothing: float = 0,
    generator: object = None,
    candidates: bool = False,
) -> None:
    """A probability, above which the gradient of a linear head is as it is."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if grad_resolution is None:
        if generator is not None:
            raise ValueError("generator: nothing is random without grad_resolution")
        return
    if not (isinstance(grad_resolution, float) and 0 < grad_resolution < 1):
        raise ValueError(f"grad_resolution: expected None or a float in (0, 1), got {grad_resolution!r}")
    if candidates:  # a sparse gradient has one entry of a target in each row
        raise ValueError(f"grad_resolution: expected None for K classes per position, got {grad_resolution}")
    if softcap is not None and label_smoothing > 0:
        raise ValueError(
            "grad_resolution: expected no softcap beside label_smoothing, whose part of the gradient is then neither "
            f"sparse nor of rank one, got softcap={softcap}, label_smoothing={label_smoothing}"
        )


def check_tensor_or_none(name: str, value: object) -> None:
    """Its type alone, where its shape is checked later."""
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(value).__name__}")


def check_weight(weight: Tensor | None, classes: int, logits: Tensor, soft: bool, sharded: bool = False) -> None:
    """A class weight is floating and of shape (C,); beside index targets a constant.

    Where the classes are spread over ranks, C is known only later, and a weight is a constant always.
    """
    if weight is None:
        return
    check_tensor_or_none("weight", weight)
    check_dtype_and_device("weight", weight, logits, "input")
    if weight.shape != (classes,) and not (sharded and weight.dim() == 1):
        raise ValueError(f"weight: expected shape ({classes},), one number per class, got {tuple(weight.shape)}")
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return
    if sharded:
        raise RuntimeError("weight: is not differentiated over a group and may not require grad; detach it")
    if not soft:
        raise RuntimeError("weight: is not differentiated with class indices and may not require grad; detach it")


def check_target_prob(target_prob: Tensor, target: Tensor) -> None:
    """One probability for each of the K indices of a position."""
    check_dtype_and_device("target_prob", target_prob, target, "target")
    if target_prob.shape != target.shape:
        raise ValueError(
            f"target_prob: expected the shape of target, {tuple(target.shape)}, got {tuple(target_prob.shape)}"
        )


def check_dtype_and_device(name: str, x: Tensor, other: Tensor, whose: str, floating: bool = True) -> None:
    """A floating tensor, if it should be one, beside another."""
    if floating and not x.is_floating_point():
        raise RuntimeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.device != other.device:
        raise RuntimeError(f"{name}: expected a tensor on {other.device} like {whose}, got one on {x.device}")


def _check_number(name: str, value: object) -> None:
    if type(value) is not float and not isinstance(value, numbers.Real):  # an abstract class takes its time
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
