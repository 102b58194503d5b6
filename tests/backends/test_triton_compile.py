"""What the Triton kernels become on devices that are not here: compiled for each of them, and read.

The launches are the backend's own, caught on their way to the kernels: what is compiled is what would run.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if os.environ.get("XENT_BACKEND") != "triton":  # where it is asked for and missing, that is a failure
    pytest.importorskip("triton")

from compiled import BFLOAT, DOUBLE, EVEN, FLOAT, HALF, KERNELS, ODD, SHARED, TARGETS, Case, instructions, read
from pairs import pairwise

from xent._backends.triton.plan import TILE, WARPS

pytestmark = pytest.mark.compile_table
every_target = pytest.mark.parametrize("target", TARGETS)


def per_thread(target: str) -> int:
    """Vectors of a tile for each thread: 4, and 2 on AMD, whose warps are of 64 threads."""
    return TILE // (WARPS * TARGETS[target].warp_size)


# For each vector of logits in a tile: loads of 16 bytes, other loads, stores of 16 bytes, and other stores, in forward
# and in backward. Logits and gradient alone are (1, 0, 0, 0) and (1, 0, 1, 0): one pass over memory, all of it in
# vectors. Then the most registers that an NVIDIA thread may need in either; 128 threads of 64 fit 8 times on a
# multiprocessor, of 168 three times, of 255 twice.
PLAIN = (1, 0, 0, 0), (1, 0, 1, 0)
OPTIONS = {
    "bfloat16, odd": (Case(BFLOAT, ODD), *PLAIN, 64),
    "bfloat16": (Case(BFLOAT, EVEN), *PLAIN, 64),
    "float16, odd": (Case(HALF, ODD), *PLAIN, 64),
    "float32, odd": (Case(FLOAT, ODD), *PLAIN, 64),
    "float32": (Case(FLOAT, EVEN), *PLAIN, 64),
    "float64, odd": (Case(DOUBLE, ODD), *PLAIN, 64),
    "few rows": (Case(BFLOAT, ODD, N=3), *PLAIN, 64),
    "a gradient that is out of step": (Case(BFLOAT, ODD, offset=3), (1, 0, 0, 0), (1, 0, 0, 8), 168),
    "images": (Case(BFLOAT, ODD, images=True), *PLAIN, 128),
    "images, in place": (Case(BFLOAT, 21, images=True, inplace=True), *PLAIN, 128),
    "images, float32": (Case(FLOAT, 21, images=True), *PLAIN, 80),
    "images, float64": (Case(DOUBLE, 21, images=True), *PLAIN, 128),
    "images of an odd size": (Case(BFLOAT, 21, N=4100, images=True), (0, 8, 0, 0), (0, 8, 0, 8), 168),
    "images of an even size": (Case(FLOAT, 21, N=4104, images=True), (0, 2, 0, 0), (0, 2, 0, 2), 128),
    "images of few positions": (Case(BFLOAT, ODD, N=256, images=True), (0, 1, 0, 0), (0, 1, 0, 1), 80),
    "images, probabilities": (Case(FLOAT, 21, target=FLOAT, images=True), (2, 0, 0, 0), (2, 0, 1, 0), 128),
    "few classes": (Case(FLOAT, 3), (0, 1, 0, 0), (0, 1, 0, 1), 64),
    "cut sequences": (Case(BFLOAT, EVEN, cut=True), *PLAIN, 64),
    "cut sequences, odd": (Case(BFLOAT, ODD, cut=True), (1, 0, 0, 0), (1, 0, 0, 8), 168),
    "the same, in place": (Case(BFLOAT, ODD, cut=True, inplace=True), *PLAIN, 64),
    "softcap": (Case(BFLOAT, ODD, softcap=30.0), *PLAIN, 128),
    "scale": (Case(BFLOAT, ODD, scale=0.5), *PLAIN, 64),
    "entropy and argmax": (Case(BFLOAT, ODD, everything=True), *PLAIN, 128),
    "smoothing": (Case(BFLOAT, ODD, smoothing=True), *PLAIN, 128),
    "smoothing with weights": (Case(BFLOAT, EVEN, smoothing=True, weight=True), (3, 0, 0, 0), (3, 0, 1, 0), 128),
    "the same, odd": (Case(BFLOAT, ODD, smoothing=True, weight=True), (1, 8, 0, 0), (1, 8, 1, 0), 128),
    "the same, one row": (Case(BFLOAT, ODD, N=1, smoothing=True, weight=True), (3, 0, 0, 0), (3, 0, 1, 0), 128),
    "probabilities": (Case(BFLOAT, ODD, target=BFLOAT), (2, 0, 0, 0), (2, 0, 1, 0), 128),
    "wide probabilities": (Case(BFLOAT, ODD, target=FLOAT), (3, 0, 0, 0), (3, 0, 1, 0), 128),
    "probabilities of whole vectors": (Case(FLOAT, EVEN, target=FLOAT), (2, 0, 0, 0), (2, 0, 1, 0), 128),
    "narrow probabilities, of 8 bytes a vector": (Case(FLOAT, ODD, target=HALF), (1, 1, 0, 0), (1, 1, 1, 0), 128),
    "everything": (
        Case(BFLOAT, EVEN, target=FLOAT, weight=True, smoothing=True, softcap=30.0, scale=0.5, everything=True),
        (5, 0, 0, 0),
        (5, 0, 1, 0),
        255,
    ),
    "everything, float64 and odd": (
        Case(DOUBLE, ODD, target=DOUBLE, weight=True, smoothing=True, softcap=30.0, scale=0.5, everything=True),
        (2, 2, 0, 0),
        (2, 2, 1, 0),
        255,
    ),
}


@every_target
@pytest.mark.parametrize(("case", "forward", "backward", "registers"), OPTIONS.values(), ids=OPTIONS)
def test_options(case: Case, forward: tuple[int, ...], backward: tuple[int, ...], registers: int, target: str) -> None:
    """Nothing spills, each number is read once and written once, in vectors wherever they are aligned."""
    n = per_thread(target)
    for launch in case.launches():
        kernel = launch.compile(target)
        assert "efficient_layout" not in kernel.asm["ttgir"]  # see `load_coefficient` in forward.py
        reading = read(kernel, target)
        assert reading.spills == 0
        assert reading.registers <= registers
        assert reading.shared <= SHARED
        if launch.kernel.__name__ == "combine_kernel":
            continue
        expected = forward if launch.kernel.__name__ == "row_statistics_kernel" else backward
        counts = reading.wide, reading.narrow, reading.stores, reading.others
        assert counts == tuple(n * count for count in expected)


def vocabularies(dtype: torch.dtype, odd: bool) -> list[int]:
    """Numbers of classes for which the chooser has a tile of its own each."""
    V = 16 // dtype.itemsize
    least = 2 * V if odd else 4
    return [V * vectors + odd for vectors in (2**k for k in range(10)) if least <= vectors <= TILE]


@pairwise(target=list(TARGETS), dtype=[BFLOAT, FLOAT], odd={"rows of whole vectors": False, "odd rows": True})
def test_tiles(dtype: torch.dtype, odd: bool, target: str) -> None:
    """From a few classes to many: of every tile, each thread has as many vectors, and rows share no memory."""
    seen, n = set(), per_thread(target)
    for C in vocabularies(dtype, odd):
        forward, backward = Case(dtype, C).launches()
        config = forward.args[-1]
        assert config.R * config.K == TILE
        assert config.edges == odd
        seen.add(config.K)
        for launch, expected in ((forward, (n, 0, 0, 0)), (backward, (n, 0, n, 0))):
            reading = read(launch.compile(target), target)
            assert (reading.wide, reading.narrow, reading.stores, reading.others) == expected
            assert reading.spills == 0
            assert reading.registers <= (64 if config.R == 1 else 128)
            assert reading.shared <= SHARED
    assert len(seen) == len(vocabularies(dtype, odd))


# Instructions per logit, of forward and of backward. Beyond 17 and 34 an H100 (19 and 39: an A100) could not keep up
# with its memory in bfloat16, beyond twice as many in float32: xent/_backends/triton/__init__.py derives it.
INSTRUCTIONS = {BFLOAT: (11, 18), FLOAT: (15, 20)}


@pytest.mark.parametrize("target", [name for name in TARGETS if name.startswith("sm")])
@pytest.mark.parametrize("dtype", INSTRUCTIONS, ids=str)
def test_arithmetic_keeps_up_with_memory(dtype: torch.dtype, target: str) -> None:
    """One exp for each logit, which is one instruction, and a few cheap ones."""
    logits = per_thread(target) * 16 // dtype.itemsize
    for launch, most in zip(Case(dtype, ODD).launches(), INSTRUCTIONS[dtype], strict=True):
        kernel = launch.compile(target)
        forward = launch.kernel.__name__ == "row_statistics_kernel"
        rescaling = per_thread(target) if forward else 0  # one for each vector
        assert read(kernel, target).exps == logits + rescaling
        assert kernel.asm["ptx"].count("ex2.approx.ftz.f32") == kernel.asm["ptx"].count("ex2.")
        assert instructions(kernel.asm["cubin"]) / logits <= most


@every_target
def test_half_precision_is_rounded_to_nearest(target: str) -> None:
    """Which Triton's interpreter does not do, and interpreter.py mends."""
    text = Case(BFLOAT, ODD).launches()[1].compile(target).asm["amdgcn" if target == "gfx942" else "ptx"]
    if target == "gfx942":  # no instruction for it: 0x7fff and the lowest bit that stays are added
        assert "0x7fff" in text
    else:
        assert "cvt.rn.bf16x2.f32" in text
        assert "cvt.rz" not in text


def test_every_kernel_is_caught() -> None:
    """The launches of few rows: a forward in parts, their combination, and the gradient."""
    names = [launch.kernel.__name__ for launch in Case(BFLOAT, ODD, N=3).launches()]
    assert names == list(KERNELS)


def test_numbers_are_not_compiled_in() -> None:
    """Another size or stride is no other kernel; that rows need two strides is one."""
    for launch in Case(BFLOAT, ODD, cut=True).launches() + Case(BFLOAT, ODD, N=3).launches():
        parameters = launch.kernel.params
        varying = [p.do_not_specialize for p, arg in zip(parameters, launch.args, strict=True) if type(arg) is int]
        assert varying
        assert all(varying)
