"""Whatever goes wrong on one rank, each rank ends with an error that says where and what, and none waits for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import RankError, Ranks
from torch import Tensor
from torch.distributed import ProcessGroup

import xent

SECONDS = 110.0  # below the 120 after which gloo gives up: an error that comes in time came from a message
Call = dict[str, Any]


def logits(N: int = 8, C: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(N, C, dtype=dtype)


def targets(N: int = 8, value: int = 1) -> Tensor:
    return torch.full((N,), value)


GOOD: Call = {"input": logits(), "target": targets()}


def attempt(group: ProcessGroup, calls: list[Call], stats: bool = False) -> tuple[str, str, float]:
    """What the call of this rank raised, and how long it took; then all is well again."""
    start = time.monotonic()
    function: Callable[..., Any] = xent.token_stats if stats else xent.cross_entropy
    try:
        function(**calls[group.rank()], group=group)
        kind, text = "", ""
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    seconds = time.monotonic() - start
    loss = xent.cross_entropy(**GOOD, group=group)
    torch.testing.assert_close(loss, torch.tensor(5.0 * group.size()).log())
    return kind, text, seconds


def errors(ranks: Ranks, calls: list[Call], **options: Any) -> tuple[str, str]:
    """The type and the text of the error that all ranks raised."""
    answers = ranks.run(attempt, len(calls), calls, **options)
    assert len({answer[:2] for answer in answers}) == 1, answers
    assert all(seconds < SECONDS for *_, seconds in answers)
    return answers[0][:2]


@pytest.mark.parametrize("value", [-1, 10, 15, 1000])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_target_out_of_range(ranks: Ranks, value: int, reduction: str) -> None:
    """Of the range of all classes: 5 and 9 are in it, though no rank holds more than 5."""
    bad = GOOD | {"target": targets(value=value), "reduction": reduction}
    kind, text = errors(ranks, [bad, bad])
    assert kind == "IndexError"
    assert text.startswith("ranks 0, 1 of 2: target: expected class indices in [0, 10) or ignore_index=-100, got ")
    assert f"got {value} (row 0 of 8)" in text


@pytest.mark.parametrize("sizes", [(5, 2), (1, 9), (0, 4, 2)])
def test_the_range_is_that_of_uneven_shards(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    """At the first call, too, when each rank still takes the others to hold as many classes as itself."""
    C = sum(sizes)
    calls = [{"input": logits(C=c), "target": targets(value=C)} for c in sizes]
    kind, text = errors(ranks, calls, fresh=120)
    assert kind == "IndexError"
    assert f"in [0, {C}) or ignore_index=-100, got {C} " in text


def test_only_one_rank_meets_a_target_out_of_range(ranks: Ranks) -> None:
    kind, text = errors(ranks, [GOOD, GOOD | {"target": targets(value=77)}, GOOD])
    assert kind == "IndexError"
    assert text.startswith("rank 1 of 3: target: ")
    assert "got 77" in text


FAILURES: dict[str, tuple[Call, str, str]] = {
    "no tensor": ({"input": None}, "TypeError", "input: expected a Tensor, got NoneType"),
    "integer logits": ({"input": logits(dtype=torch.int64)}, "RuntimeError", "input: expected floating logits"),
    "floating targets": ({"target": torch.zeros(8)}, "RuntimeError", "target: expected class indices of dtype"),
    "shapes": ({"target": targets(7)}, "ValueError", "target: expected shape (8,)"),
    "reduction": ({"reduction": "average"}, "ValueError", "reduction: expected one of none, mean, sum"),
    "smoothing": ({"label_smoothing": 2.0}, "ValueError", "label_smoothing: expected a number in [0, 1]"),
    "dim": ({"dim": 5}, "IndexError", "dim: expected a number in [-2, 2), got 5"),
    "weight's length": (
        {"weight": torch.ones(6)},
        "ValueError",
        "weight: expected shape (5,), one number per class he",
    ),
    "weight's grad": ({"weight": torch.ones(5, requires_grad=True)}, "RuntimeError", "weight: is not differentiated"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=list(FAILURES))
@pytest.mark.parametrize("first", [True, False], ids=["first call", "later"])
def test_one_rank_fails(ranks: Ranks, failure: tuple[Call, str, str], first: bool) -> None:
    """It says so in the message that the others wait for."""
    change, expected, words = failure
    kind, text = errors(ranks, [GOOD, GOOD, GOOD | change], fresh=120 if first else None)
    assert kind == expected
    assert text.startswith(f"rank 2 of 3: {words}")


def test_one_rank_fails_in_token_stats(ranks: Ranks) -> None:
    kind, text = errors(ranks, [GOOD | {"ignore_index": 1.0}, GOOD], stats=True)
    assert (kind, text) == ("TypeError", "rank 0 of 2: ignore_index: expected an int, got 1.0")


def test_several_ranks_fail_differently(ranks: Ranks) -> None:
    """The first one's error is raised."""
    kind, text = errors(ranks, [GOOD, GOOD | {"dim": 5}, GOOD | {"input": None}])
    assert kind == "IndexError"
    assert text.startswith("rank 1 of 3: ")


def test_a_long_text_is_cut(ranks: Ranks) -> None:
    kind, text = errors(ranks, [GOOD, GOOD | {"reduction": "é" * 1000}])
    assert kind == "ValueError"
    assert 200 < len(text.encode()) < 320


class Odd(Exception):
    """None of the types that a message has a number for."""


class Refuses(float):
    """A number that does not want to be compared."""

    def __gt__(self, other: object) -> bool:
        raise Odd("no order")


def test_an_error_of_another_type(ranks: Ranks) -> None:
    kind, text = errors(ranks, [GOOD, GOOD | {"logit_scale": Refuses(1)}])
    assert (kind, text) == ("RuntimeError", "rank 1 of 2: Odd: no order")


MISMATCHES: dict[str, tuple[Call, str, str]] = {
    "fewer rows": ({"input": logits(3), "target": targets(3)}, "8 rows", "3 rows"),
    "many more rows": ({"input": logits(3000), "target": targets(3000)}, "8 rows", "3000 rows"),
    "dtype": ({"input": logits(dtype=torch.float64)}, "torch.float32", "torch.float64"),
    "probabilities": ({"target": torch.full((8, 5), 0.2)}, "class indices", "probabilities"),
    "ignore_index": ({"ignore_index": 1}, "ignore_index=-100", "ignore_index=1"),
    "softcap": ({"softcap": 3.0}, "softcap=None", "softcap=3.0"),
    "logit_scale": ({"logit_scale": 3.0}, "logit_scale=1.0", "logit_scale=3.0"),
    "label_smoothing": ({"label_smoothing": 0.1}, "[]", "['wsum']"),
    "weight": ({"weight": torch.ones(5)}, "[]", "['weight']"),
}


@pytest.mark.parametrize("mismatch", MISMATCHES.values(), ids=list(MISMATCHES))
@pytest.mark.parametrize("first", [True, False], ids=["first call", "later"])
def test_ranks_that_are_called_with_different_arguments(
    ranks: Ranks, mismatch: tuple[Call, str, str], first: bool
) -> None:
    change, usual, other = mismatch
    kind, text = errors(ranks, [GOOD, GOOD | change, GOOD], fresh=120 if first else None)
    assert kind == "ValueError"
    assert text.startswith("group: expected the same call on all 3 ranks, got ranks 0, 2 with 8 rows of torch.float32")
    first_part, second_part = text.split("; rank 1 with ")
    assert usual in first_part
    assert other in second_part


def test_ranks_that_write_the_same_numbers_differently(ranks: Ranks) -> None:
    whole, real = {"logit_scale": 1, "softcap": 3}, {"logit_scale": 1.0, "softcap": 3.0}
    assert errors(ranks, [GOOD | whole, GOOD | real]) == ("", "")


# Nobody comes


def wait_in_vain(group: ProcessGroup, absent: int) -> tuple[str, float]:
    if group.rank() == absent:
        time.sleep(1)
        return "", 0.0
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        xent.cross_entropy(**GOOD, group=group)
    return str(caught.value), time.monotonic() - start


def test_a_rank_that_never_comes(ranks: Ranks) -> None:
    """The others give up after the group's own timeout, and say whom they waited for."""
    answers = ranks.run(wait_in_vain, 3, 1, fresh=3)
    for rank, (text, seconds) in enumerate(answers):
        if rank != 1:
            assert f"group: the all-gather of rank {rank} of 3 failed (" in text
            assert "): rank 1 did not take part in exchange 1, where this rank has 8 rows of " in text
            assert seconds < SECONDS


def die(group: ProcessGroup) -> tuple[str, float]:
    xent.cross_entropy(**GOOD, group=group)
    if group.rank() == 1:
        os._exit(3)
    return wait_in_vain(group, 1)


@pytest.fixture
def mortals() -> Iterator[Ranks]:
    """Processes of this test alone."""
    processes = Ranks(2)
    yield processes
    processes.stop()


def test_a_rank_that_dies(mortals: Ranks) -> None:
    """At once: its connections are closed."""
    [(text, seconds), died] = mortals.run(die, 2, may_die=True)
    assert died is None
    assert "rank 1 did not take part in exchange 2" in text
    assert seconds < SECONDS


def sleep_for_ever(group: ProcessGroup) -> None:
    if group.rank() == 1:
        time.sleep(3600)


def test_a_rank_that_never_answers(mortals: Ranks) -> None:
    """Fails its own test, in time, and none that comes after."""
    with pytest.raises(RankError, match=r"ranks \[1\] did not answer within 2 s"):
        mortals.run(sleep_for_ever, 2, timeout=2.0)
    assert errors(mortals, [GOOD, GOOD]) == ("", "")


# Calls that only some of the ranks can tell apart


def two_heads(group: ProcessGroup) -> tuple[list[float], str]:
    """Rank 0 holds the same part of both, in the same words: their losses in turn, and then an error of rank 1."""
    y, losses = torch.tensor([0, 5, 1, 2]), []
    for N in (4, 4, 2, 4):
        for sizes in ((3, 3), (3, 4), (3, 3)):
            x = torch.arange(6.0)[: sizes[group.rank()]].repeat(N, 1)
            losses.append(xent.cross_entropy(x, y[:N], group=group).item())
    with pytest.raises(ValueError, match="expected the same call on all 2 ranks") as caught:
        xent.cross_entropy(torch.zeros(4, 3), y, group=group, softcap=30.0 + group.rank())
    return losses, str(caught.value)


def test_two_heads_that_one_rank_cannot_tell_apart(ranks: Ranks) -> None:
    """No rank goes by what it was once answered: here that would be the sizes of the other head."""
    answers = ranks.run(two_heads, 2, fresh=20)
    parts = torch.arange(6.0)
    expected = []
    for N in (4, 4, 2, 4):
        for C in (3, 4, 3):
            whole = torch.cat([parts[:3], parts[:C]]).repeat(N, 1)
            expected.append(torch.nn.functional.cross_entropy(whole, torch.tensor([0, 5, 1, 2])[:N]).item())
    for losses, _ in answers:
        assert losses == pytest.approx(expected)
    assert answers[0] == answers[1]


# What is no group


@pytest.mark.parametrize("group", ["tp", 0, torch.zeros(2)], ids=["name", "number", "tensor"])
def test_what_is_no_group(group: Any, unchecked: None) -> None:
    with pytest.raises(TypeError, match="group: expected None or a ProcessGroup of which this process is a rank, got "):
        xent.cross_entropy(logits(), targets(), group=group)


def from_outside(group: ProcessGroup) -> str:
    other = torch.distributed.new_group([1])
    if group.rank() == 1:
        torch.distributed.destroy_process_group(other)
        return ""
    with pytest.raises(TypeError) as caught:
        xent.cross_entropy(**GOOD, group=other)
    return str(caught.value)


def test_a_group_of_others(ranks: Ranks) -> None:
    """For which torch has a number."""
    assert "a ProcessGroup of which this process is a rank, got int" in ranks.run(from_outside, 4)[0]
