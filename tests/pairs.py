"""Instead of all combinations of many parameters, few in which every two values still meet: most bugs need no three."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

Axis = Mapping[str, Any] | Iterable[Any]


def pairs(**axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Tuples of one value for each axis, the same ones every time, so that every two values of two axes are in one."""
    values = [list(axis) for axis in axes.values()]
    left = {
        ((i, a), (j, b)): None  # a dict, which keeps its order
        for i, j in itertools.combinations(range(len(values)), 2)
        for a, b in itertools.product(range(len(values[i])), range(len(values[j])))
    }
    if len(values) < 2:
        return [(value,) for axis in values for value in axis]

    def new(row: dict[int, int], i: int, a: int) -> int:
        """How many pairs that are left this value makes with those chosen."""
        return sum(tuple(sorted([(i, a), other])) in left for other in row.items())

    found = []
    while left:
        row = dict(next(iter(left)))
        for i, axis in enumerate(values):
            if i not in row:
                row[i] = max(range(len(axis)), key=lambda a, i=i: (new(row, i, a), -a))  # type: ignore[misc]
        for pair in itertools.combinations(sorted(row.items()), 2):
            left.pop(pair, None)
        found.append(tuple(axis[row[i]] for i, axis in enumerate(values)))
    return found


def _named(axis: Axis) -> dict[str, Any]:
    if isinstance(axis, Mapping):
        return dict(axis)
    return {getattr(value, "__name__", str(value)): value for value in axis}


def pairwise(**axes: Axis) -> pytest.MarkDecorator:
    """Parametrize by `pairs`. An axis is a sequence of values, or a mapping from what they are called to them."""
    rows = pairs(**{name: _named(axis).items() for name, axis in axes.items()})
    cases = [pytest.param(*(value for _, value in row), id="-".join(name for name, _ in row)) for row in rows]
    return pytest.mark.parametrize(tuple(axes), cases)
