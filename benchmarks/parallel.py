"""Classes spread over processes: `xent.cross_entropy` beside torch's `loss_parallel`, on gloo, on this machine.

    python benchmarks/parallel.py --quick
    python benchmarks/parallel.py --case 1024x50256 --world 1 2 --json out.json

Each of the processes holds C / world classes of the same rows. First all is checked against float64 on fewer rows;
then forward + backward are timed, interleaved, all processes starting together: the slowest one's median counts. The
columns: that time; the collectives of a step and the bytes that a process receives through them; the peak memory of
a process beyond its logits, in units of these, the gradient being 1 of it (not below 8 MB, which is noise).

Last, cases that are known to be hard are compared with one process. Exit code: 0, or 1 if xent was wrong anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from memory import SMALLEST, growth
from rich.console import Console
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import xent

CHECKED = 64  # rows
TOLERANCE = 1e-5  # of a row's norm, for float32
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives, and the bytes that a process receives through them."""

    def __init__(self, world: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.world, self.count, self.bytes = world, 0, 0.0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """An all-gather brings the message of each other process, an all-reduce 2 / world of one from each."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the collectives are within
        name = str(op)
        if name.startswith(("_c10d_functional.all_gather", "_c10d_functional.all_reduce")):
            self.count += 1
            share = 1.0 if "gather" in name else 2 / self.world
            self.bytes += (self.world - 1) * share * args[0].nbytes
        return op(*args, **(kwargs or {}))


def ours(mesh: DeviceMesh, **options: Any) -> Step:
    """xent with a group."""
    group = mesh.get_group()

    def step(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = xent.cross_entropy(logits, target, dim=1, group=group, **options)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    return step


def on_dtensors(mesh: DeviceMesh, loss: Callable[..., Any], context: Any, **options: Any) -> Step:
    """A loss that takes a DTensor."""

    def step(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = DTensor.from_local(logits.detach(), mesh, [Shard(1)], run_check=False).requires_grad_()
        with context():
            value = loss(x, target, **options)
            value.backward()
        assert isinstance(x.grad, DTensor)
        return value.detach().full_tensor(), x.grad.to_local()

    return step


def contenders(mesh: DeviceMesh, **options: Any) -> dict[str, Step]:
    """By name, the baseline first."""
    return {
        "torch loss_parallel": on_dtensors(mesh, F.cross_entropy, loss_parallel, **options),
        "xent, group=": ours(mesh, **options),
        "xent, DTensor": on_dtensors(mesh, xent.cross_entropy, nullcontext, **options),
    }


def inputs(N: int, C: int, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """The whole of the logits, the same on each process, and targets."""
    torch.manual_seed(0)
    return torch.randn(N, C), torch.randint(C, (N,))


def part(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The columns of this process, in memory of their own."""
    return x.chunk(mesh.size(), 1)[mesh.get_local_rank()].clone().requires_grad_()


def error(step: Step, x: Tensor, target: Tensor, mesh: DeviceMesh, **options: Any) -> float:
    """The largest relative error, of the loss or of a row of the gradient, against one process in float64."""
    whole = x.double().requires_grad_()
    if "weight" in options:
        options["weight"] = options["weight"].double()
    loss = F.cross_entropy(whole, target, **options)
    truth = part(torch.autograd.grad(loss, whole)[0], mesh).detach()
    value, grad = step(part(x, mesh), target)
    rows = (grad - truth).norm(dim=1) / truth.norm(dim=1).clamp(min=1e-300)
    rows[truth.norm(dim=1) == 0] = 0
    return torch.stack([((value - loss) / loss).abs(), rows.max()]).max().item()


def hard_cases(C: int) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Targets (8,) and options of losses that have gone wrong somewhere."""
    plain = torch.arange(8) % C
    ignored, outside = plain.clone(), plain.clone()
    ignored[::2] = -100
    outside[3] = C
    return {
        "ignored rows": (ignored, {}),
        "class weight": (plain, {"weight": torch.rand(C) + 0.5}),
        "class weight with ignored rows": (ignored, {"weight": torch.rand(C) + 0.5}),
        "label smoothing": (plain, {"label_smoothing": 0.1}),
        "a target out of range": (outside, {}),
    }


def verdict(name: str, x: Tensor, mesh: DeviceMesh, target: Tensor, options: dict[str, Any]) -> str:
    """What a contender makes of a hard case."""
    bad = bool((target >= x.shape[1]).any())
    try:
        step = contenders(mesh, **options)[name]
        if not bad:
            found = error(step, x, target, mesh, **options)
            return "right" if found <= TOLERANCE else f"wrong: error {found:.0e}"
        step(part(x, mesh), target)
        return "wrong: not noticed"
    except Exception as failure:
        return "right: raises" if bad else f"raises {type(failure).__name__}"


def measure(mesh: DeviceMesh, N: int, C: int, rounds: int) -> dict[str, dict[str, Any]]:
    """What one process finds, for each contender."""
    x, target = inputs(N, C, mesh)
    found: dict[str, dict[str, Any]] = {}
    steps = contenders(mesh)
    for name, step in steps.items():
        found[name] = {"error": error(step, x[:CHECKED], target[:CHECKED], mesh), "seconds": []}
    logits = part(x, mesh)
    del x
    for name, step in steps.items():
        for _ in range(2):  # the first call of a new shape may tell the processes of it
            with Traffic(mesh.size()) as traffic:
                step(logits, target)
        dist.barrier(mesh.get_group())
        found[name] |= {"collectives": traffic.count, "bytes": traffic.bytes}
        found[name]["memory"] = growth(lambda step=step: step(logits, target)) / logits.nbytes  # type: ignore[misc]
    names = list(steps)
    for first in range(rounds):
        for turn in range(len(names)):
            name = names[(first + turn) % len(names)]
            dist.barrier(mesh.get_group())
            start = time.perf_counter()
            steps[name](logits, target)
            found[name]["seconds"].append(time.perf_counter() - start)
    small = inputs(8, 10, mesh)[0]
    for case, (y, options) in hard_cases(10).items():
        for name in names:
            found[name].setdefault("cases", {})[case] = verdict(name, small, mesh, y, options)
    return found


def work(rank: int, world: int, folder: str, N: int, C: int, rounds: int) -> None:
    """One of the processes: leaves what it found in a file."""
    warnings.simplefilter("ignore")  # of parts of torch that are marked as private
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = DeviceMesh("cpu", list(range(world)))
    found = measure(mesh, N, C, rounds)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # at once: gloo sometimes aborts a process while it takes its threads down, with all work done


def merged(N: int, C: int, world: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender: of all the processes the slowest, the largest, the least exact."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (world, folder, N, C, rounds), nprocs=world)  # type: ignore[no-untyped-call]
        all_found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    rows = []
    for name in all_found[0]:
        of_ranks = [found[name] for found in all_found]
        row = {key: max(found[key] for found in of_ranks) for key in ("error", "collectives", "bytes", "memory")}
        row["memory"] = row["memory"] if N * C // world * 4 >= SMALLEST else None
        row["ms"] = 1e3 * max(statistics.median(found["seconds"]) for found in of_ranks)
        rows.append({"contender": name, "N": N, "C": C, "world": world, **row, "cases": of_ranks[0]["cases"]})
    for row in rows:
        row["ratio"] = row["ms"] / rows[0]["ms"]
    return rows


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """A table of figures, and one of hard cases."""
    first = rows[0]
    title = f"({first['N']}, {first['C']}) float32, processes: {first['world']}"
    heads = ("forward + backward", "ms", "ratio", "collectives", "kB received", "memory", "error")
    table = common.empty_table(title, heads)
    for row in rows:
        figures = f"{row['ms']:.4g}|{row['ratio']:.2f}|{row['collectives']}|{row['bytes'] / 1e3:.1f}|"
        memory = "" if row["memory"] is None else f"{row['memory']:.2f}"
        table.add_row(row["contender"], *f"{figures}{memory}|{row['error']:.0e}".split("|"))
    console.print(table)
    for case in first["cases"]:
        verdicts = "; ".join(f"{row['contender']} {row['cases'][case]}" for row in rows)
        console.print(f"  {case}: {verdicts}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="one small case, few rounds")
    add("--case", nargs="+", metavar="NxC", help="rows x all classes; default: 24x1000 512x32000 1024x50256")
    add("--world", nargs="+", type=common.natural, default=[1, 2], help="numbers of processes; default: 1 2")
    add("--rounds", type=common.natural, help="timings of each contender; their median counts; default: 15")
    add("--json", type=Path, metavar="FILE", help="save machine, versions and all figures")
    options: argparse.Namespace = parser.parse_args(argv)
    if reason := common.refusal(options.device, options.json):
        parser.error(reason)
    cases = options.case or (["24x1000"] if options.quick else ["24x1000", "512x32000", "1024x50256"])
    console = Console(highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in common.machine("cpu").items() if value))
    rows: list[dict[str, Any]] = []
    for case in cases:
        N, C = map(int, case.split("x"))
        for world in options.world:
            rows += merged(N, C, world, options.rounds or (5 if options.quick else 15))
            show(console, rows[-3:])
    if options.json:
        options.json.write_text(json.dumps({"machine": common.machine("cpu"), "rows": rows}, indent=1) + "\n")
    wrong = [
        row
        for row in rows
        if row["contender"].startswith("xent")
        and (not row["error"] <= TOLERANCE or not all(v.startswith("right") for v in row["cases"].values()))
    ]
    for row in wrong:
        print(f"parallel.py: {row['contender']}: wrong: error {row['error']:.0e}, {row['cases']}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
