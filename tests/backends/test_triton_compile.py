"""What the Triton kernels become on devices that are not here: compiled for each of them, and read.

The launches are the backend's own, caught on their way to the kernels: what is compiled is what would run.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if os.environ.get("XENT_BACKEND") != "triton":  # where it is asked for and missing, that is a failure
    pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from xent._backends import triton as backend
from xent._backends.triton.plan import TILE, WARPS
from xent._records import RowSpec, Upstream, Wanted

pytestmark = pytest.mark.compile_table
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}
every_target = pytest.mark.parametrize("target", TARGETS)
KERNELS = ("row_statistics_kernel", "combine_kernel", "row_gradient_kernel")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHARED = 16 << 10  # bytes; every device has several times as much for each of its multiprocessors
ODD, EVEN = 50257, 50304  # GPT-2's vocabulary, as it is and padded


class Launch(NamedTuple):
    """A kernel as it was about to run."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, int]

    def compile(self, target: str) -> Any:
        """With the types and alignments that Triton itself would find in the arguments."""
        names = self.kernel.arg_names
        fixed = {name: arg for name, arg in zip(names, self.args, strict=True) if arg is None or name == "config"}
        pointers = {name for name, arg in zip(names, self.args, strict=True) if isinstance(arg, torch.Tensor)}
        signature = {
            name: "constexpr" if name in fixed else "fp64" if isinstance(arg, float) else mangle_type(arg)
            for name, arg in zip(names, self.args, strict=True)
        }
        aligned = [name for name in pointers if self.args[names.index(name)].data_ptr() % 16 == 0]
        source = ASTSource(
            self.kernel,
            signature,
            {(names.index(name),): value for name, value in fixed.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        options = {name: value for name, value in self.options.items() if name != "maxnreg" or target.startswith("sm")}
        return triton.compile(source, TARGETS[target], options)


class Catcher:
    """Stands where a kernel stands, and keeps what comes."""

    def __init__(self, kernel: Any, caught: list[Launch]) -> None:
        self.kernel, self.caught = kernel, caught

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.caught.append(Launch(self.kernel, args, options))


class Case(NamedTuple):
    """A call of both primitives. N = 4096 rows leave each one to one program; of N = 3, several share one."""

    dtype: torch.dtype
    C: int
    N: int = 4096
    offset: int = 0  # of the first logit in memory, in logits
    target: torch.dtype = torch.int64
    weight: bool = False
    smoothing: bool = False
    softcap: float | None = None
    scale: float = 1.0
    everything: bool = False  # entropy and argmax as well
    images: bool = False  # (4, C, ...): classes lie apart in memory
    cut: bool = False  # the last of each of 4 sequences is cut off, its label's first
    inplace: bool = False

    def launches(self) -> list[Launch]:
        N, C = self.N, self.C
        x = torch.empty(N * C + self.offset, dtype=self.dtype)[self.offset :].view(1, N, C)
        target = torch.empty((1, N, C) if self.target.is_floating_point else (1, N), dtype=self.target)
        if self.images:
            x = x.view(4, C, N // 4).transpose(1, 2)
            target = target.view(4, N // 4)
        elif self.cut:
            x, target = x.view(4, N // 4, C)[:, :-1], target.view(4, N // 4)[:, 1:]
        w = torch.empty(C, dtype=DOUBLE if self.dtype == DOUBLE else FLOAT) if self.weight else None
        numbers = torch.empty(x.shape[:2], dtype=DOUBLE)
        spec = RowSpec(scale=self.scale, softcap=self.softcap, classes=C)
        wanted = Wanted(self.smoothing, self.everything, self.everything)
        g = [numbers if yes else None for yes in (True, True, wanted.wsum, wanted.entropy)]
        caught: list[Launch] = []
        with pytest.MonkeyPatch.context() as patch:
            for name in KERNELS:
                patch.setattr(backend, name, Catcher(getattr(backend, name), caught))
            backend.row_statistics(x, target, spec, wanted, w)
            backend.row_gradient(x, target, numbers, numbers, Upstream(*g), spec, w, x if self.inplace else None)
        return caught


class Reading(NamedTuple):
    """A compiled kernel, as far as numbers tell."""

    spills: int  #     bytes of registers that had no place, or on AMD their number
    registers: int  #  of each thread
    shared: int  #     bytes
    wide: int  #       loads of 16 bytes for each thread in the loop over tiles
    narrow: int  #     other loads there
    stores: int  #     stores of 16 bytes there
    others: int  #     other stores there
    exps: int  #       there


def loop(text: str) -> str:
    """The blocks of the loop over tiles, of which LLVM remarks that they are; everything, where there is no loop."""
    blocks = re.split(r"^(?=\S*BB\d+_\d+:|\S+ %bb\.\d+:)", text, flags=re.MULTILINE)
    assert text.count("Loop Header") <= 1, "more than one loop"
    return "".join(block for block in blocks if "in Loop: " in block or "Loop Header" in block) or text


def read(kernel: Any, target: str) -> Reading:
    """Count, in the loop over tiles, what the assembly says."""
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        body = loop(text)
        names = "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"
        spills = sum(number(rf"\.{name}:\s+", text) for name in names)
        registers = number(r"\.vgpr_count:\s+", text)
        memory, wide, exp = r"(?:global|buffer)_{}_", "dwordx4", "v_exp_f32"
        load, store = memory.format("load"), memory.format("store")
    else:
        body = loop(kernel.asm["ptx"])
        usage = tool("cuobjdump", "-res-usage", kernel.asm["cubin"])
        spills, registers = number("STACK:", usage) + number("LOCAL:", usage), number("REG:", usage)
        load, store, wide, exp = r"ld\.global\.", r"st\.global\.", r"v(?:4\.b32|2\.b64)", r"ex2\.approx"
    loads, stores = len(re.findall(load, body)), len(re.findall(store, body))
    wide_loads, wide_stores = len(re.findall(load + wide, body)), len(re.findall(store + wide, body))
    exps = len(re.findall(exp, body))
    others = loads - wide_loads, stores - wide_stores
    return Reading(spills, registers, kernel.metadata.shared, wide_loads, others[0], wide_stores, others[1], exps)


def number(name: str, text: str) -> int:
    """What stands behind the name."""
    found = re.search(rf"{name}(\d+)", text)
    assert found, name
    return int(found[1])


def tool(name: str, option: str, cubin: bytes) -> str:
    """What one of the tools that come with Triton says of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, option, file.name], capture_output=True, text=True, check=True).stdout


def instructions(cubin: bytes) -> int:
    """Of the machine itself, in the loop over tiles: from a label to the branch back to it."""
    text = tool("nvdisasm", "-c", cubin)
    jumps = [m for m in re.finditer(r"BRA.* `\((\.L_x_\d+)\) ;", text) if f"\n{m[1]}:" in text[: m.start()]]
    (jump,) = (m for m in jumps if "EXIT" in text[m.end() :])  # behind the last EXIT a trap jumps to itself
    return text[text.index(f"\n{jump[1]}:") : jump.end()].count(";")


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
    "images": (Case(BFLOAT, ODD, images=True), (0, 1, 0, 0), (0, 1, 0, 1), 128),
    "cut sequences": (Case(BFLOAT, EVEN, cut=True), *PLAIN, 64),
    "cut sequences, odd": (Case(BFLOAT, ODD, cut=True), (1, 0, 0, 0), (1, 0, 0, 8), 168),
    "the same, in place": (Case(BFLOAT, ODD, cut=True, inplace=True), *PLAIN, 64),
    "softcap": (Case(BFLOAT, ODD, softcap=30.0), *PLAIN, 128),
    "scale": (Case(BFLOAT, ODD, scale=0.5), *PLAIN, 64),
    "entropy and argmax": (Case(BFLOAT, ODD, everything=True), *PLAIN, 128),
    "smoothing": (Case(BFLOAT, ODD, smoothing=True), *PLAIN, 128),
    "smoothing with weights": (Case(BFLOAT, EVEN, smoothing=True, weight=True), (3, 0, 0, 0), (3, 0, 1, 0), 128),
    "the same, odd": (Case(BFLOAT, ODD, smoothing=True, weight=True), (1, 8, 0, 0), (1, 8, 1, 0), 128),
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


@every_target
@pytest.mark.parametrize("odd", [False, True], ids=["rows of whole vectors", "odd rows"])
@pytest.mark.parametrize("dtype", [BFLOAT, FLOAT], ids=str)
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
