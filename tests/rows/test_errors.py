"""Every bad input: the type of the exception, and a message that names the argument, what was expected, what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from oracle import Options
from torch.nn import functional as F
from wrong_options import OPTIONS, case, every_argument, flags

import xent

pytestmark = pytest.mark.usefixtures("unchecked")

FLOAT32 = torch.finfo(torch.float32)
HEADS = [xent.linear_cross_entropy, xent.linear_token_stats]
INDICES = "class indices of dtype int64, int32, int16, int8, uint8"


# What depends on the tensors: the usual call has input (4, 5) and target (4).
TENSORS = [
    case("input list", TypeError, "input: expected a Tensor, got list", input=[[0.0] * 5] * 4),
    case("target list", TypeError, "target: expected a Tensor, got list", target=[0, 1, 2, 3]),
    case("target int", TypeError, "target: expected a Tensor, got int", target=3),
    case(
        "input integer",
        RuntimeError,
        "input: expected floating logits, got torch.int64",
        input=torch.ones(4, 5, dtype=torch.int64),
    ),
    case(
        "input complex",
        RuntimeError,
        "input: expected floating logits, got torch.complex64",
        input=torch.ones(4, 5) + 0j,
    ),
    case(
        "input 0-d",
        ValueError,
        "input: expected at least one dimension, the classes, got a 0-d tensor",
        input=torch.tensor(1.0),
        target=torch.tensor(0),
    ),
    case(
        "integer target of the shape of input",
        RuntimeError,
        "target: has the shape of the logits, (4, 5), so it must hold probabilities of a floating dtype, "
        "got torch.int64; class indices come without the class dimension",
        target=torch.zeros(4, 5, dtype=torch.int64),
    ),
    case(
        "target bool",
        RuntimeError,
        f"target: expected {INDICES}, got torch.bool",
        target=torch.ones(4, dtype=torch.bool),
    ),
    case("target float", RuntimeError, f"target: expected {INDICES}, got torch.float32", target=torch.zeros(4)),
    *(
        case(
            f"shapes {shape} and {other}",
            ValueError,
            f"target: expected shape {expected} for indices, or that of input for probabilities, got input {shape} and "
            f"target {other}",
            input=torch.zeros(shape),
            target=torch.zeros(other, dtype=torch.int64),
        )
        for shape, other, expected in (
            ((4, 5), (3,), "(4,)"),
            ((4, 5), (4, 1), "(4,)"),
            ((4, 5), (5,), "(4,)"),
            ((4, 5), (), "(4,)"),
            ((2, 5, 3), (2, 4), "(2, 3) or (2, 5)"),
            ((2, 5, 3, 4), (2, 5, 4), "(2, 3, 4) or (2, 5, 3)"),
        )
    ),
    case("dim float", TypeError, "dim: expected an int or None, got 1.0", dim=1.0),
    case("dim bool", TypeError, "dim: expected an int or None, got True", dim=True),
    *(
        case(
            f"dim {dim}",
            IndexError,
            f"dim: expected a number in [-2, 2), got {dim} for input (4, 5) and target (4,)",
            dim=dim,
        )
        for dim in (2, -3)
    ),
    case(
        "dim that does not fit",
        ValueError,
        "target: expected shape (5,) for indices, or that of input for probabilities, got input (4, 5) and target (4,)",
        dim=0,
    ),
    *(
        case(
            f"target {wrong}",
            IndexError,
            f"target: expected class indices in [0, 5) or ignore_index=-100, got {wrong} (row 2 of 4)",
            target=torch.tensor([0, 1, wrong, 3]),
        )
        for wrong in (5, -1, 10**12)
    ),
]

WEIGHTS = [
    case("list", TypeError, "weight: expected a Tensor or None, got list", weight=[1.0] * 5),
    case("too short", ValueError, "weight: expected shape (5,), one number per class, got (4,)", weight=torch.ones(4)),
    case("2-D", ValueError, "weight: expected shape (5,), one number per class, got (1, 5)", weight=torch.ones(1, 5)),
    case("tall", ValueError, "weight: expected shape (5,), one number per class, got (5, 1)", weight=torch.ones(5, 1)),
    case("0-d", ValueError, "weight: expected shape (5,), one number per class, got ()", weight=torch.tensor(1.0)),
    case(
        "integer",
        RuntimeError,
        "weight: expected a floating dtype, got torch.int64",
        weight=torch.ones(5, dtype=torch.int64),
    ),
    case(
        "requires grad beside indices",
        RuntimeError,
        "weight: is not differentiated with class indices and may not require grad; detach it",
        weight=torch.ones(5, requires_grad=True),
    ),
    case(
        "ignore_index beside probabilities",
        ValueError,
        "ignore_index: has no meaning for probability targets, got 2",
        target=torch.ones(4, 5) / 5,
        ignore_index=2,
    ),
]

# torch lets this pass for the unbatched target that it documents, of shape ().
STRICTER = [
    case(
        "shapes (5,) and (1,)",
        ValueError,
        "target: expected shape () for indices, or that of input for probabilities, got input (5,) and target (1,)",
        input=torch.zeros(5),
        target=torch.tensor([2]),
    ),
]

every_option = pytest.mark.parametrize(
    ("arguments", "error", "message"), OPTIONS + WEIGHTS[:1] + flags("inplace_backward")
)


def usual(arguments: Options) -> Options:
    """Arguments that work, but for those given."""
    return {"input": torch.zeros(4, 5), "target": torch.tensor([0, 1, 2, 3])} | arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"), OPTIONS + TENSORS + WEIGHTS + STRICTER + flags("inplace_backward")
)
def test_cross_entropy(arguments: Options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$") as raised:
        xent.cross_entropy(**usual(arguments))
    assert raised.type is error


@pytest.mark.parametrize("arguments", [row.values[0] for row in TENSORS + WEIGHTS if "dim" not in row.values[0]])
def test_torch_refuses_these_tensors_too(arguments: Options) -> None:
    """A drop-in takes whatever torch takes."""
    with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)):
        F.cross_entropy(**usual(arguments))


@every_option
def test_module_when_it_is_built(arguments: Options, error: type[Exception], message: str) -> None:
    """torch lets reduction="bogus" through its constructor."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        xent.CrossEntropyLoss(**arguments)


@every_option
def test_module_when_it_is_called(arguments: Options, error: type[Exception], message: str) -> None:
    """Its attributes may have been assigned since."""
    module = xent.CrossEntropyLoss()
    vars(module).update(arguments)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        module(**usual({}))


TOKEN_OPTIONS = [row for row in OPTIONS if set(row.values[0]) <= {"ignore_index", "softcap", "logit_scale"}]


CANDIDATES = ("integer target of the shape of input", "shapes (4, 5) and (4, 1)")  # 5 or 1 for each position
TOKEN_TENSORS = [row for row in TENSORS if row.id not in CANDIDATES]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), TOKEN_OPTIONS + TOKEN_TENSORS + flags("entropy", "prediction")
)
def test_token_stats(arguments: Options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        xent.token_stats(**usual(arguments))


def test_token_stats_of_probabilities() -> None:
    message = r"^target: expected class indices, got probabilities of the shape of input, \(4, 5\)$"
    with pytest.raises(ValueError, match=message):
        xent.token_stats(torch.zeros(4, 5), torch.zeros(4, 5))


@pytest.mark.parametrize("function", [xent.cross_entropy, xent.CrossEntropyLoss])
def test_nothing_after_weight_by_position(function: Any) -> None:
    """F.cross_entropy(input, target, weight, None, -1) has its old `size_average` in fourth place."""
    args = [torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)] if function is xent.cross_entropy else []
    with pytest.raises(TypeError, match="positional argument"):
        function(*args, torch.ones(5), None)


def test_nothing_is_written_when_the_target_is_out_of_range() -> None:
    """In-place backward or not: the error comes before anything happens."""
    x = torch.randn(4, 5, requires_grad=True)
    before = x.detach().clone()
    with pytest.raises(IndexError, match="got 9"):
        xent.cross_entropy(x, torch.tensor([0, 9, 1, 2]), inplace_backward=True)
    assert x.equal(before)
    assert x.grad is None


def test_a_dim_that_only_equals_a_number() -> None:
    """What is known of these shapes with dim=1 is not known with True."""
    logits, target = torch.randn(2, 5, 3), torch.zeros(2, 3, dtype=torch.int64)
    xent.cross_entropy(logits, target, dim=1)
    with pytest.raises(TypeError, match="dim: expected an int or None, got True"):
        xent.cross_entropy(logits, target, dim=True)


@pytest.mark.parametrize("function", [xent.cross_entropy, xent.token_stats, *HEADS])
@pytest.mark.parametrize(
    ("name", "wrong", "least"),
    [
        ("logit_scale", 1e39, -FLOAT32.max),
        ("logit_scale", -1e39, -FLOAT32.max),
        ("softcap", 1e39, FLOAT32.tiny),
        ("softcap", 1e-38, FLOAT32.tiny),
    ],
)
def test_numbers_that_float32_does_not_hold(function: Any, name: str, wrong: float, least: float) -> None:
    """Its arithmetic, that of all logits but float64, would make inf and NaN of them."""
    x, y, head = torch.tensor([[0.0, 1e-9]]), torch.tensor([0]), [torch.eye(2)] * (function in HEADS)
    for dtype in (torch.float32, torch.bfloat16):
        message = f"{name}: expected a number in [{least}, {FLOAT32.max}] beside {dtype} logits, got {wrong}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            function(x.to(dtype), *[W.to(dtype) for W in head], y, **{name: wrong})
    found = function(x.double(), *[W.double() for W in head], y, **{name: wrong})
    assert (found if isinstance(found, torch.Tensor) else found.log_prob).isfinite().all()


def test_a_number_that_float64_does_not_hold() -> None:
    with pytest.raises(ValueError, match=r"softcap: expected .* beside torch.float64 logits, got 1e-310"):
        xent.cross_entropy(torch.zeros(1, 2).double(), torch.tensor([0]), softcap=1e-310)


@every_argument(xent.cross_entropy, xent.token_stats, xent.CrossEntropyLoss)
def test_every_argument_is_named(function: Any, name: str, wrong: object) -> None:
    """Also those of tomorrow: in the message are the argument, what was expected and what came."""
    module = function is xent.CrossEntropyLoss
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*, got "):
        function(**{name: wrong})(**usual({})) if module else function(**usual({name: wrong}))
