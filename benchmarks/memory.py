"""How much memory a training step of a Transformers model needs: with its own loss, with xent's, with a fused head.

    pip install -e '.[bench,transformers]' && python benchmarks/memory.py

A small GPT-2 with the full vocabulary, forward + backward in a fresh process each: the growth of the peak resident set,
beyond the model and gradients of the parameters, which are there before. The losses are printed beside it: they agree.

The measure itself serves other scripts and the tests:

    from benchmarks.memory import peak_of
    peak_of("F.cross_entropy(logits, target)", (1024, 50257), "float32")                          # about 3.0
    peak_of("xent.cross_entropy(logits, target)", (1024, 50257), "float32", setup="import xent")  # about 1.0

in units of the logits, of which the gradient is 1. On CPU the figure is the growth of the peak resident set (what the
system really handed out, whoever asked for it) over one forward + backward in a fresh process. Logits below `SMALLEST`
bytes drown in the noise of the process itself. On CUDA, `growth` reads the allocator's own statistics and needs no
fresh process.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch

SMALLEST = 8 * 2**20
WARM = "step() if reset_peak() else step(slice(1))"


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


def in_fresh_process(setup: str, *, warm: str = WARM, after: str = "", threads: int | None = None) -> list[float]:
    """`growth` of the `step(rows=slice(None))` that the statements of `setup` define, on CPU; then what `after` prints.

    `warm` comes before: imports, thread pools and compilation do not count. Where the peak can be reset, it runs the
    whole; elsewhere that would hide the very growth to be measured, and a single row must do. Raises RuntimeError with
    the last line of the process's complaint if that fails.
    """
    lines = ["from memory import growth, reset_peak", setup, warm, "print(growth(step))", after]
    code = "\n".join([f"import torch\ntorch.set_num_threads({threads or torch.get_num_threads()})", *lines])
    folders = [str(Path(__file__).parent), *sys.path]  # what we import is what is measured
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise RuntimeError(last[0])
    return [float(number) for number in child.stdout.split()]


LOGITS = """
from torch.nn import functional as F
{setup}
logits = torch.empty({shape}, dtype=torch.{dtype}).normal_()
target = torch.randint({classes}, {rows})
everything = logits, target
def step(rows=slice(None)):
    logits, target = everything[0][rows].requires_grad_(), everything[1][rows]
    torch.autograd.grad({loss}, logits)
"""


def peak_of(loss: str, shape: Sequence[int], dtype: str, *, setup: str = "") -> float:
    """Peak memory on CPU of forward + backward of `loss`, in units of the logits.

    `loss` is a Python expression of `logits` (*shape) and `target` (*shape[:-1]); `setup` are statements that run
    once before it. Raises RuntimeError if that fails.
    """
    *rows, classes = shape
    code = LOGITS.format(setup=setup, shape=tuple(shape), dtype=dtype, classes=classes, rows=tuple(rows), loss=loss)
    size = prod(shape) * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    return in_fresh_process(code)[0] / size


MODES = {"as it is": None, "use_xent(model)": False, "use_xent(model, fused_head=True)": True}
B, T, V = 4, 512, 50257


def transformer_step(mode: str) -> Callable[[], float]:
    """The training step of a small GPT-2, whose result is its loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from xent.integrations.transformers import use_xent

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=256, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    fused = MODES[mode]
    if fused is not None:
        use_xent(model, fused_head=fused)
    tokens = torch.randint(V, (B, T))

    def step() -> float:
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.item()  # type: ignore[no-any-return]

    return step


def main(argv: Sequence[str] | None = None) -> None:
    """One line per mode."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.parse_args(argv)
    if not find_spec("transformers"):
        parser.error("Transformers is not installed: pip install -e '.[bench,transformers]'")
    unit = 4 * B * T * V
    print(f"GPT-2 of 2 layers, ({B}, {T}) tokens, {V} classes, float32; logits {unit / 2**20:.0f} MiB")
    for mode in MODES:
        # The gradients of the parameters are made by the first step, and stay.
        code = f"from memory import transformer_step\nstep = transformer_step({mode!r})"
        after = "import time; start = time.perf_counter(); loss = step(); print(time.perf_counter() - start, loss)"
        grown, seconds, loss = in_fresh_process(code, warm="step()", after=after)
        print(f"{mode:34} {grown / 2**20:7.0f} MiB  {grown / unit:5.2f} logits  {seconds:6.2f} s  loss {loss:.6f}")


if __name__ == "__main__":
    main()
