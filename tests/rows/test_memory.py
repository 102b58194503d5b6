"""How much memory forward + backward adds, in logits-sized buffers: all of it in one fresh process per backend."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@functools.cache
def measured(*arguments: str) -> dict[str, Any]:
    """The cases of peaks.py, given a backend, and `all` for one of them.

    glibc is told to keep no freed block, which would be used again and not counted; nor one of 201 kB, as the terms
    of a Hessian-vector product: in the heap they lie differently in each run, and add 0 to 5 MB.
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XENT_BACKEND": arguments[0]}
    env |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    command = [sys.executable, str(Path(__file__).with_name("peaks.py")), *arguments]
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return dict(json.loads(child.stdout))


@pytest.fixture
def of_backend(backend: str, every_backend: list[str]) -> dict[str, Any]:
    """What was measured with this backend."""
    return measured(backend, *["all"] * (backend == every_backend[0]))


@pytest.fixture
def of_first(every_backend: list[str]) -> dict[str, Any]:
    """What is the same with each of them."""
    return measured(every_backend[0], "all")


# Blocks of rows on their way through the caches are a few tens of MB, whatever the number of rows: at most a tenth of
# these logits of 103 MB (51 MB in half precision), and less the larger they are. A second (N, C) tensor would be 2.0.
@pytest.mark.parametrize(
    ("case", "least", "most"),
    [
        pytest.param("plain", 0.95, 1.05, id="the gradient, and nothing beside it"),
        pytest.param("in place", 0, 0.1, id="in place"),
        pytest.param("token_stats", 0.95, 1.05, id="token_stats"),
        pytest.param("half", 0.95, 1.25, id="half precision: no float32 copy"),
        pytest.param("options", 0.95, 1.25, id="options: nothing per class"),
        pytest.param("entropy", 0.95, 1.25, id="entropy: nothing per class"),
    ],
)
def test_peak(case: str, least: float, most: float, of_backend: dict[str, Any]) -> None:
    assert least <= of_backend[case] <= most


@pytest.mark.parametrize(
    ("case", "most"),
    [
        pytest.param("product", 2.05, id="the gradient and the product"),
        pytest.param("product, softcap", 2.05, id="softcap"),
        pytest.param("product, z-loss", 3.05, id="beside a z-loss, the square of lse has a part of its own"),
    ],
)
def test_hessian_vector_product(case: str, most: float, of_first: dict[str, Any]) -> None:
    assert 1.95 <= of_first[case] <= most


def test_torch_holds_three_buffers(of_first: dict[str, Any]) -> None:
    """The measure itself: log-softmax, its gradient and the gradient."""
    assert 2.9 < of_first["torch"] < 3.1


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_memory_of_a_head_does_not_grow_with_the_rows(dtype: str, of_backend: dict[str, Any]) -> None:
    """Beyond the gradients: the budget and a slice of the head, for 4 times and for 8 times as many rows as fit."""
    assert max(of_backend[f"head of {dtype}"]) < 16 + 8 + 3  # MiB


def test_memory_of_a_sparse_gradient(of_first: dict[str, Any]) -> None:
    """Beyond the gradients and what is saved: the budget of 72 MiB, for 2048 rows and for 16384."""
    for beyond, per_row in of_first["sparse head"]:
        assert beyond < 80  # MiB
        assert 8 * 256 < per_row <= 8 * (2 * 256 + 1)
