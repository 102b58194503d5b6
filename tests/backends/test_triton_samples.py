"""The sampling pass of a sparse gradient, compiled for devices that are not here, as test_triton_compile.py does it.

That it keeps what it should is the suite of tests/head/test_sparse_samples.py, in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if os.environ.get("XENT_BACKEND") != "triton":  # where it is asked for and missing, that is a failure
    pytest.importorskip("triton")

from compiled import BFLOAT, DOUBLE, EVEN, FLOAT, HALF, ODD, SHARED, TARGETS, Case, Catcher, Launch, backend, read

from xent._backends.triton.plan import WARPS
from xent._backends.triton.samples import LOGITS_OF_TILE
from xent._records import RowSpec

pytestmark = pytest.mark.compile_table
every_target = pytest.mark.parametrize("target", TARGETS)


def caught(case: Case) -> Launch:
    """The kernel as it was about to run, on 64 rows."""
    x = torch.empty(1, 64, case.C, dtype=case.dtype)
    target = torch.empty(x.shape if case.target.is_floating_point else x.shape[:2], dtype=case.target)
    numbers = torch.empty(1, 64, dtype=DOUBLE)
    found: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "row_samples_kernel", Catcher(backend.row_samples_kernel, found))
        spec = RowSpec(scale=case.scale, softcap=case.softcap, classes=case.C)
        backend.row_samples(x, target, numbers, numbers, numbers[0], spec, 1 / 256)
    return found[0]


SAMPLED = {
    "bfloat16, odd": Case(BFLOAT, ODD),
    "float16": Case(HALF, EVEN),
    "float32, odd": Case(FLOAT, ODD),
    "float64": Case(DOUBLE, EVEN),
    "probabilities": Case(BFLOAT, ODD, target=BFLOAT),
    "softcap and scale": Case(BFLOAT, ODD, softcap=30.0, scale=0.5),
}


@every_target
@pytest.mark.parametrize("case", SAMPLED.values(), ids=SAMPLED)
def test_samples(case: Case, target: str) -> None:
    """Of a sparse gradient: each logit is read once; what is stored are the numbers of an entry, and no registers."""
    launch = caught(case)
    reading = read(launch.compile(target), target)
    logits = LOGITS_OF_TILE.value // (WARPS * TARGETS[target].warp_size)
    # The exp of float64 has more constants than AMD's scalar registers: these wait in lanes of others, not in memory.
    assert reading.spills <= (16 if (case.dtype, target) == (DOUBLE, "gfx942") else 0)
    assert reading.registers <= 168
    assert reading.shared <= SHARED
    assert (reading.wide, reading.narrow) == (0, logits)
    assert (reading.stores, reading.others) == (0, 2 * logits)
    varying = [
        p.do_not_specialize for p, arg in zip(launch.kernel.params, launch.args, strict=True) if type(arg) is int
    ]
    assert all(varying), "numbers are not compiled in"
