"""Options that are wrong by themselves, whatever is called: their exceptions and the whole messages."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch


def case(name: str, error: type[Exception], message: str, **arguments: Any) -> Any:
    """A row of a table: what is wrong, the exception and the whole message, and the arguments that are not as usual."""
    return pytest.param(arguments, error, message, id=name)


# What depends on no tensor: checked when a module is built and when anything is called.
OPTIONS = [
    case("reduction", ValueError, "reduction: expected one of none, mean, sum, got 'bogus'", reduction="bogus"),
    case("reduction None", ValueError, "reduction: expected one of none, mean, sum, got None", reduction=None),
    case("reduction 1", ValueError, "reduction: expected one of none, mean, sum, got 1", reduction=1),
    case("ignore_index float", TypeError, "ignore_index: expected an int, got -100.0", ignore_index=-100.0),
    case("ignore_index bool", TypeError, "ignore_index: expected an int, got True", ignore_index=True),
    case("ignore_index None", TypeError, "ignore_index: expected an int, got None", ignore_index=None),
    *(
        case(f"{name} {wrong!r}", TypeError, f"{name}: expected a number, got {type(wrong).__name__}", **{name: wrong})
        for name in ("label_smoothing", "z_loss", "logit_scale", "softcap", "normalizer")
        for wrong in ("0.1", 1j, [0.1])
    ),
    *(
        case(f"{name} None", TypeError, f"{name}: expected a number, got NoneType", **{name: None})
        for name in ("label_smoothing", "z_loss", "logit_scale")
    ),
    *(
        case(f"{name} {wrong}", ValueError, f"{name}: expected {expected}, got {wrong}", **{name: wrong})
        for name, expected, wrongs in (
            ("label_smoothing", "a number in [0, 1]", (-0.1, 1.1, -1, 2, torch.nan, torch.inf)),
            ("z_loss", "a finite number >= 0", (-1e-4, torch.nan, torch.inf)),
            ("logit_scale", "a finite number", (torch.nan, torch.inf, -torch.inf)),
            ("softcap", "None or a finite number > 0", (0, -30.0, torch.nan, torch.inf)),
        )
        for wrong in wrongs
    ),
    case("on_empty", ValueError, "on_empty: expected 'nan' or 'zero', got 'skip'", on_empty="skip"),
    case("on_empty None", ValueError, "on_empty: expected 'nan' or 'zero', got None", on_empty=None),
    case(
        "loss_dtype int",
        ValueError,
        "loss_dtype: expected None or a floating torch.dtype, got torch.int64",
        loss_dtype=torch.int64,
    ),
    case(
        "loss_dtype name",
        ValueError,
        "loss_dtype: expected None or a floating torch.dtype, got 'half'",
        loss_dtype="half",
    ),
    *(
        case(
            f"normalizer and {reduction}",
            ValueError,
            f"normalizer: only reduction='mean' divides by one, got reduction='{reduction}'",
            normalizer=4,
            reduction=reduction,
        )
        for reduction in ("sum", "none")
    ),
    case(
        "normalizer per row",
        ValueError,
        "normalizer: expected a number or a 0-d tensor, got shape (4,)",
        normalizer=torch.ones(4),
    ),
    case(
        "normalizer complex",
        TypeError,
        "normalizer: expected a real number, got torch.complex64",
        normalizer=torch.tensor(2j),
    ),
]


def flags(*names: str) -> list[Any]:
    """Of options that are true or false, each with what is neither."""
    return [
        case(f"{name} {wrong!r}", TypeError, f"{name}: expected a bool, got {wrong!r}", **{name: wrong})
        for name in names
        for wrong in ("yes", 1, None)
    ]


class Nothing:
    """What no argument can be."""


def every_argument(*functions: Any) -> Any:
    """Each argument of each function, with what it cannot be; a test of them needs no list, and so forgets none."""
    return pytest.mark.parametrize(
        ("function", "name", "wrong"),
        [
            pytest.param(function, name, wrong, id=f"{function.__name__} {name} {type(wrong).__name__}")
            for function in functions
            for name in inspect.signature(function).parameters
            for wrong in (Nothing(), "a")
        ],
    )
