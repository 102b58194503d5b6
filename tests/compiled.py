"""Triton kernels compiled for devices that are not here, and read: what test_triton_compile.py measures with.

The launches are the backend's own, caught on their way to the kernels: what is compiled is what would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from xent._backends import triton as backend
from xent._records import RowNumbers, RowSpec, Wanted

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}
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
            soft = target.dim() == 3
            target = target.view(4, C, N // 4).transpose(1, 2) if soft else target.view(4, N // 4)
        elif self.cut:
            x, target = x.view(4, N // 4, C)[:, :-1], target.view(4, N // 4)[:, 1:]
        w = torch.empty(C, dtype=DOUBLE if self.dtype == DOUBLE else FLOAT) if self.weight else None
        numbers = torch.empty(x.shape[:2], dtype=DOUBLE)
        spec = RowSpec(scale=self.scale, softcap=self.softcap, classes=C)
        wanted = Wanted(self.smoothing, self.everything, self.everything)
        g = [numbers if yes else None for yes in (True, True, wanted.wsum, wanted.entropy)]
        caught: list[Launch] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "processors", lambda device: 4)  # a few, for whom to share a few rows
            for name in KERNELS:
                patch.setattr(backend, name, Catcher(getattr(backend, name), caught))
            backend.row_statistics(x, target, spec, wanted, w)
            backend.row_gradient(x, target, RowNumbers(numbers, numbers, *g), spec, w, x if self.inplace else None)
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
