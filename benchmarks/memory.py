"""How much memory a loss needs beyond its logits, in units of the logits.

    from benchmarks.memory import peak_of
    peak_of("F.cross_entropy(logits, target)", (1024, 50257), "float32")                          # about 3.0
    peak_of("xent.cross_entropy(logits, target)", (1024, 50257), "float32", setup="import xent")  # about 1.0

The gradient counts: 1.0 is one buffer of the size of the logits. On CPU the figure is the growth of the peak
resident set (what the system really handed out, whoever asked for it) over one forward + backward in a fresh
process. Logits below `SMALLEST` bytes drown in the noise of the process itself. On CUDA, `growth` reads the
allocator's own statistics and needs no fresh process.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

SMALLEST = 8 * 2**20


def reset_peak() -> bool:
    """Set the system's record of our peak resident set back to now; False where there is no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident() -> int:
    """Peak resident set of this process, in bytes.

    Linux: VmHWM and not `ru_maxrss`, which survives exec and so begins at the peak of the parent process.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def growth(step: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that one call of `step` needs at its peak, beyond what is held when it begins."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # freed pages that glibc keeps would otherwise be used again, uncounted
    reset_peak()
    held = peak_resident()
    step()
    return peak_resident() - held


def peak_of(
    loss: str, shape: Sequence[int], dtype: str, *, setup: str = "", ignored: float = 0.0, threads: int | None = None
) -> float:
    """Peak memory on CPU of forward + backward of `loss`, in units of the logits.

    `loss` is a Python expression of `logits` (*shape) and `target` (*shape[:-1]); `setup` are statements that run
    once before it. Raises RuntimeError with the last line of the fresh process's complaint if that fails.
    """
    size = "x".join(map(str, shape))
    command = [
        sys.executable,
        __file__,
        loss,
        size,
        dtype,
        setup,
        str(ignored),
        str(threads or torch.get_num_threads()),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # what we import is what is measured
    child = subprocess.run(command, capture_output=True, text=True, env=env)
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise RuntimeError(f"{loss}: {last[0]}")
    return float(child.stdout.split()[-1])


def main() -> None:
    """The fresh process: prints one number. Arguments as `peak_of` passes them."""
    loss, size, dtype, setup, ignored, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    names: dict[str, object] = {"torch": torch, "F": F}
    exec(setup, names)  # the caller's own code
    code = compile(loss, "<loss>", "eval")
    shape = [int(n) for n in size.split("x")]
    logits = torch.empty(shape, dtype=getattr(torch, dtype)).normal_()
    target = torch.randint(shape[-1], shape[:-1])
    target[torch.rand(target.shape) < float(ignored)] = -100

    def step(rows: slice = slice(None)) -> None:
        x = logits[rows].requires_grad_()
        torch.autograd.grad(eval(code, {**names, "logits": x, "target": target[rows]}), x)

    # Imports, thread pools and compilation do not count. Where the peak can be reset, warm up on the whole; elsewhere
    # that would hide the very growth to be measured, and a single row must do.
    step() if reset_peak() else step(slice(1))
    print(growth(step) / logits.nbytes)


if __name__ == "__main__":
    main()
