"""The tests' own choice of cases: every two values meet, in far fewer cases than there are combinations."""

from __future__ import annotations

import itertools
import math

import pytest
from pairs import pairs, pairwise

AXES = [
    {"a": "xyz", "b": range(4)},
    {"a": "xy", "b": "xyz", "c": [{}, {"z": 1}], "d": range(5), "e": [None]},
    {name: range(size) for name, size in zip("abcdef", (10, 7, 4, 3, 2, 2), strict=True)},
]


@pytest.mark.parametrize("axes", AXES, ids=len)
def test_every_two_values_meet(axes: dict[str, list[object]]) -> None:
    rows = pairs(**axes)
    for (i, first), (j, second) in itertools.combinations(enumerate(axes.values()), 2):
        for a, b in itertools.product(first, second):
            assert any(row[i] == a and row[j] == b for row in rows), (a, b)
    sizes = sorted(len(list(axis)) for axis in axes.values())
    assert sizes[-1] * sizes[-2] <= len(rows) <= min(math.prod(sizes), 1.3 * sizes[-1] * sizes[-2])
    assert rows == pairs(**axes), "the same ones every time"


def test_one_axis_is_all_of_it() -> None:
    assert pairs(a="xyz") == [("x",), ("y",), ("z",)]


def test_cases_are_named() -> None:
    mark = pairwise(options={"none": {}, "z": {"z_loss": 0.1}}, soft=[False, True])
    names, cases = mark.args
    assert names == ("options", "soft")
    assert [case.id for case in cases] == ["none-False", "none-True", "z-False", "z-True"]
    assert cases[2].values == ({"z_loss": 0.1}, False)
