"""Every bad input of the linear losses: the type of the exception, and the whole message."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from oracle import Options
from wrong_options import OPTIONS, case, every_argument, flags

import xent

pytestmark = pytest.mark.usefixtures("unchecked")

N, D, C = 4, 3, 5
ELSEWHERE = torch.device("meta")


def usual(arguments: Options) -> Options:
    """Arguments that work, but for those given."""
    tensors = {"input": torch.zeros(N, D), "linear_weight": torch.zeros(C, D), "target": torch.tensor([0, 1, 2, 3])}
    return tensors | arguments


TENSORS = [
    *(
        case(f"{name} list", TypeError, f"{name}: expected a Tensor, got list", **{name: [1.0]})
        for name in ("input", "linear_weight", "target", "linear_bias")
    ),
    *(
        case(
            f"{name} elsewhere",
            RuntimeError,
            f"{name}: expected a tensor on cpu like input, got one on meta",
            **{name: torch.zeros(shape, device=ELSEWHERE)},
        )
        for name, shape in (("linear_weight", (C, D)), ("target", (N,)), ("linear_bias", (C,)))
    ),
    *(
        case(
            f"{name} integer",
            RuntimeError,
            f"{name}: expected a floating dtype, got torch.int64",
            **{name: torch.zeros(shape, dtype=torch.int64)},
        )
        for name, shape in (("input", (N, D)), ("linear_weight", (C, D)), ("linear_bias", (C,)))
    ),
    *(
        case(
            f"{name} of another dtype",
            RuntimeError,
            f"{name}: expected torch.float32 like input, got torch.float64",
            **{name: torch.zeros(shape, dtype=torch.float64)},
        )
        for name, shape in (("linear_weight", (C, D)), ("linear_bias", (C,)))
    ),
    case(
        "input 0-d",
        ValueError,
        "input: expected at least one dimension, the features, got a 0-d tensor",
        input=torch.tensor(1.0),
    ),
    case(
        "features",
        ValueError,
        "input: expected 3 features like linear_weight, got shape (4, 2)",
        input=torch.ones(4, 2),
    ),
    case("head 1-D", ValueError, "linear_weight: expected shape (C, D), got (3,)", linear_weight=torch.ones(3)),
    case("bias", ValueError, "linear_bias: expected shape (5,), got (4,)", linear_bias=torch.ones(4)),
    case(
        "rows",
        ValueError,
        "target: expected shape (4,) for indices or (4, 5) for probabilities, got (3,)",
        target=torch.zeros(3, dtype=torch.int64),
    ),
    case(
        "floating indices",
        RuntimeError,
        "target: expected class indices of dtype int64, int32, int16, int8, uint8, got torch.float32",
        target=torch.zeros(N),
    ),
    case(
        "target out of range",
        IndexError,
        "target: expected class indices in [0, 5) or ignore_index=-100, got 5 (row 2 of 4)",
        target=torch.tensor([0, 1, 5, 3]),
    ),
    case(
        "shift of rows",
        ValueError,
        "shift: expected input of shape (..., T, 3) and a head (C, 3), got (3,)",
        input=torch.zeros(D),
        target=torch.tensor(1),
        shift=True,
    ),
]

# Of the losses alone: `linear_token_stats` has no such option, or another sentence for it.
LOSSES = [
    case(
        "integer probabilities",
        RuntimeError,
        "target: has the shape of the logits, (4, 5), so it must hold probabilities of a floating dtype, "
        "got torch.int64; class indices come without the class dimension",
        target=torch.ones(N, C, dtype=torch.int64),
    ),
    case(
        "ignore_index beside probabilities",
        ValueError,
        "ignore_index: has no meaning for probability targets, got 2",
        target=torch.ones(N, C) / C,
        ignore_index=2,
    ),
    case(
        "further dimensions",
        ValueError,
        "input: expected shape (N, 3) beside a head of 1 more dimensions, got (2, 2, 3)",
        input=torch.zeros(2, 2, D),
        linear_weight=torch.zeros(C, 2, D),
    ),
    case("weight", ValueError, "weight: expected shape (5,), one number per class, got (4,)", weight=torch.ones(4)),
    case(
        "weight requires grad",
        RuntimeError,
        "weight: is not differentiated with class indices and may not require grad; detach it",
        weight=torch.ones(C, requires_grad=True),
    ),
]

# The one value that says nothing where torch has it, and those of the option that only these have.
BUDGETS = [
    case("max_bytes float", TypeError, "max_bytes: expected an int or None, got 1000000.0", max_bytes=1e6),
    case("max_bytes bool", TypeError, "max_bytes: expected an int or None, got True", max_bytes=True),
    case("max_bytes 0", ValueError, "max_bytes: expected a number of bytes > 0, got 0", max_bytes=0),
]
RESOLUTIONS = [
    case(
        f"grad_resolution {value!r}",
        ValueError,
        f"grad_resolution: expected None or a float in (0, 1), got {value!r}",
        grad_resolution=value,
    )
    for value in (0, 1, 0.0, 1.0, -0.1, float("nan"), True, "1/256")
]
of_all_options = [row for row in OPTIONS if row.id != "ignore_index None"] + BUDGETS + RESOLUTIONS


@pytest.mark.parametrize(("arguments", "error", "message"), of_all_options + TENSORS + LOSSES + flags("shift"))
def test_linear_cross_entropy(arguments: Options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$") as raised:
        xent.linear_cross_entropy(**usual(arguments))
    assert raised.type is error


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    TENSORS + BUDGETS + RESOLUTIONS + flags("entropy", "prediction", "shift"),
)
def test_linear_token_stats(arguments: Options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$") as raised:
        xent.linear_token_stats(**usual(arguments))
    assert raised.type is error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": torch.ones(N, C)}, "target: expected class indices, got probabilities of shape (4, 5)"),
        (
            {"linear_weight": torch.ones(C, 1, D), "target": torch.ones(N, 1).long()},
            "expected shape (C, D), got (5, 1, 3)",
        ),
    ],
)
def test_statistics_are_of_one_head_and_indices(arguments: Options, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        xent.linear_token_stats(**usual(arguments))


@pytest.mark.parametrize(("arguments", "error", "message"), of_all_options + flags("bias", "shift"))
def test_module_when_it_is_built(arguments: Options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        xent.LinearCrossEntropyLoss(D, C, **arguments)


def test_what_does_not_go_with_a_resolution() -> None:
    with pytest.raises(ValueError, match=r"grad_resolution: expected no softcap beside label_smoothing.*softcap=2.0"):
        xent.linear_cross_entropy(**usual({}), grad_resolution=0.1, softcap=2.0, label_smoothing=0.1)
    with pytest.raises(ValueError, match="generator: nothing is random without grad_resolution"):
        xent.linear_cross_entropy(**usual({}), generator=torch.Generator())
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator or None, got int"):
        xent.linear_token_stats(**usual({}), grad_resolution=0.1, generator=3)


def test_nothing_is_changed_by_a_call_that_raises() -> None:
    call = usual({"target": torch.tensor([0, 1, 5, 3])})
    before = {name: tensor.clone() for name, tensor in call.items()}
    with pytest.raises(IndexError):
        xent.linear_cross_entropy(**call)
    assert all(call[name].equal(tensor) for name, tensor in before.items())


@every_argument(xent.linear_cross_entropy, xent.linear_token_stats, xent.LinearCrossEntropyLoss)
def test_every_argument_is_named(function: Any, name: str, wrong: object) -> None:
    """Also those of tomorrow; `device` and `dtype` are torch's own, and each release says so in its own words."""
    ours, module = f"^{name}: expected .*, got ", function is xent.LinearCrossEntropyLoss
    given = ({"in_features": D, "num_classes": C} if module else usual({})) | {name: wrong}
    batch = (torch.zeros(N, D), torch.arange(N))
    torchs = f"argument '{name}' must be|device string|combination of arguments - got .*{name}="
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"{ours}|{torchs}"):
        function(**given)(*batch) if module else function(**given)
