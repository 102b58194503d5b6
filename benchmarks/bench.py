"""How fast, how lean and how exact: `xent.cross_entropy` beside the other ways to compute it, on this machine.

    python benchmarks/bench.py --quick
    python benchmarks/bench.py --linear --small --device cuda --json gpu.json
    python benchmarks/bench.py --case 4x256x50257 2x128x128256:0.7 --dtype float32 --threads 1 2 --json out.json

First each contender is checked against float64 (loss, and gradient row by row); then forward + backward are timed,
interleaved, on the same values. The columns: the median time; that time over the time of F.cross_entropy (--linear:
of three bare products; --sparse: of one); the bytes that any loss must move, over the time (cases.py has the count);
the peak memory beyond the logits, in units of the logits, the gradient being 1 of it (--linear: MiB beyond the
gradients); the largest relative error, of the loss or of a row of the gradient. On a GPU also the share of what a warm
copy of the logits moves; the clock is the device's, and its L2 is cold. --small shows what a call costs: xent's time
over torch's.
--sparse is a head with a sparse gradient, in units of one bare product; of a trained head, too (see resolution.py).
--map shows where xent is faster and where slower: rows by classes, and images, torch's time over xent's; of large ones
fewer rounds, so that all of it takes minutes.

Exit code: 0; 1 if a contender computed something wrong (it is named and not timed) or xent failed; 2 for bad
options; 130 after Ctrl-C, with everything measured so far reported and saved.
"""

from __future__ import annotations

import argparse
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import common
import grid
import torch
from cases import CASES, CUDA_CASES, HEAD, QUICK, QUICK_HEAD, SPARSE_HEADS, Case, Linear, Small, Sparse
from common import Row, chart, machine, natural, picture, refusal, save, show
from contenders import COPY, OPTIONS, Unavailable, forced, gradients, missing
from grid import CELLS, Cell
from rich.console import Console
from torch import Tensor

# The largest error against float64 that passes. F.cross_entropy's own: 1e-6 in float32, 3e-2 in bfloat16.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 6e-2}
SMALL = 2**20  # bytes of input below which one timing runs over several copies of it
MOST_COPIES = 64
LONG = 0.5  # seconds
FLUSH = 512 * 2**20  # bytes that push everything else out of the L2 cache of any GPU


class Run(NamedTuple):
    """One contender, ready to be timed: `step` does all its work on the given input."""

    name: str
    step: Callable[[Tensor], object]
    backend: str | None = None  # of xent, where one is to be forced


def seconds(work: Callable[[], object], flush: Tensor | None) -> float:
    """By the host's clock. With a buffer on a GPU: by events on its stream, without the host's waiting, L2 cold."""
    if flush is None:
        return timeit.timeit(work, number=1)  # without garbage collection
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # type: ignore[no-any-return]


def interleaved(runs: Sequence[Run], input: Tensor, rounds: int) -> dict[str, float]:
    """Seconds for one `step(input)`, for each run: the median of `rounds` timings.

    A machine's speed drifts (heat, neighbours). Everybody in turn, round after round, lets a slow second hit all of
    them, where timing one after the other would make it one contender's fault.

    A step may overwrite its input. So every step works on copies, written anew before each timing and outside it.
    That also leaves everyone the same cache: the input was just written, as if by the layer before. Small inputs
    come in several copies per timing, or the clock itself would be measured.
    """
    count = min(max(SMALL // input.nbytes, 1), MOST_COPIES)
    copies = [torch.empty_like(input).requires_grad_(input.requires_grad) for _ in range(count)]
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=input.device) if input.is_cuda else None

    def all_copies(step: Callable[[Tensor], object]) -> None:
        for copy in copies:
            step(copy)

    @torch.no_grad()
    def refill() -> None:
        for copy in copies:
            copy.copy_(input)

    def timed(step: Callable[[Tensor], object]) -> float:
        refill()
        return seconds(lambda: all_copies(step), flush)

    times: dict[str, list[float]] = {run.name: [] for run in runs}
    for first in range(rounds):
        for turn in range(len(runs)):
            run = runs[(first + turn) % len(runs)]  # nobody is always the first
            with forced(run.backend):
                found = timed(run.step)
                if found < LONG:  # twice to warm up: what takes seconds was warm from its check
                    timed(run.step)
                    found = timed(run.step)
                times[run.name].append(found / count)
    return {name: median(some) for name, some in times.items()}


def relative(found: Tensor, truth: Tensor) -> Tensor:
    """The largest error of a row, over its norm; where nothing was due (an ignored row), anything else is infinite."""
    error = (found - truth).norm(dim=1)
    return torch.where(error == 0, 0, error / truth.norm(dim=1)).max().cpu()  # NaN stays NaN


def admit(row: Row, case: Case, inputs: Sequence[Tensor], truth: Sequence[Tensor]) -> Run | None:
    """The contender, checked and ready to be timed; or None, and `row` says why."""
    name, contender, rest = row.contender, case.contenders()[row.contender], inputs[1:]
    try:
        if contender.backend and (reason := missing(contender.backend, *inputs)):
            raise Unavailable(reason)
        loss = contender.make()
        if contender.limit:
            loss(*inputs)  # warm, as the others are after their check
            return Run(name, lambda x: loss(x, *rest))
        with forced(contender.backend):  # on a copy, which the contender may overwrite
            found = gradients(loss, inputs[0].detach().clone().requires_grad_(), *rest)
        pairs = zip(case.parts(found, inputs), truth, strict=True)
        row.error = torch.stack([relative(*pair) for pair in pairs]).max().item()
    except Unavailable as reason:
        row.status, row.note = "unavailable", str(reason)
    except Exception as error:  # a peer, or a compiler that is not there; but xent has to work
        row.status = "failed" if name.startswith("xent") else "unavailable"
        row.note = f"{type(error).__name__}: {error}"
    else:
        if row.error <= TOLERANCE[row.dtype]:
            return Run(name, lambda x: gradients(loss, x, *rest), contender.backend)
        row.status, row.note = "wrong", f"error {row.error:.1e}, expected at most {TOLERANCE[row.dtype]:.0e}"
    return None


def memory(row: Row, case: Case) -> None:
    """The peak into `row`."""
    if row.status == "ok" and not case.contenders()[row.contender].limit:
        try:
            row.memory = case.peak(row.contender, row.dtype, row.device)
        except RuntimeError as error:  # the fresh process failed: out of memory, say
            row.note = f"peak memory: {error}"


def measure(case: Case, dtype: str, options: argparse.Namespace) -> Iterator[Row]:
    """All contenders on one case: a row for each contender and number of threads, checked, then timed."""
    inputs = case.inputs(dtype, options.device)
    truth = case.exact(inputs)
    peaks: dict[str, list[float]] = {}
    for count in options.threads:
        torch.set_num_threads(count)
        names = list(case.contenders())
        rows = {name: Row(case.section, str(case), dtype, options.device, name, count) for name in names}
        runs = [run for row in rows.values() if (run := admit(row, case, inputs, truth))]
        times = interleaved(runs, inputs[0], case.rounds(options.rounds))
        if options.memory and not peaks:  # once is enough; no clock is running now
            with ThreadPoolExecutor(case.processes if options.device == "cpu" else 1) as pool:
                list(pool.map(lambda row: memory(row, case), rows.values()))
            peaks = {name: row.memory for name, row in rows.items()}
        for name, seconds in times.items():
            row = rows[name]
            row.ms = seconds * 1e3
            row.ratio = seconds / times[names[0]] if names[0] in times else None
            if moved := case.bytes_moved(case.contenders()[name].limit, inputs):
                row.gb_per_s = moved / seconds / 1e9
        copied = rows[COPY].gb_per_s if COPY in rows else None
        for name, row in rows.items():
            row.memory = peaks.get(name, [])
            row.of_copy = row.gb_per_s / copied if row.gb_per_s and copied else None
            yield row


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, completed and checked; `groups` are the cases, those of one table together."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="small cases, float32, few rounds: within a minute")
    names = " ".join(map(str, CASES))
    add("--case", nargs="+", type=Case.parse, metavar="SHAPE[:IGNORED]", help=f"classes last; default: {names}")
    add("--linear", nargs="*", type=Linear.parse, metavar="NxDxC", help=f"a head and its loss; default: {HEAD}")
    add("--sparse", nargs="*", type=Sparse.parse, metavar="NxDxC[@SD]", help="a head's sparse gradient; or a .pt file")
    add("--small", nargs="*", type=Small.parse, metavar="NxC", help="what a call costs, by option; default: 32x27")
    add("--map", nargs="*", type=Cell.parse, metavar="NxC[xHxW]", help="rows by classes, and images; alone")
    add("--dtype", nargs="+", choices=list(TOLERANCE), help="default: float32 bfloat16")
    add("--threads", nargs="+", type=natural, help="default: torch's own choice")
    add("--rounds", type=natural, help="timings of each contender; their median counts; default: 15")
    add("--no-memory", dest="memory", action="store_false", help="do not measure the peak memory")
    add("--json", type=Path, metavar="FILE", help="save machine, versions and all figures")
    add("--png", type=picture, metavar="FILE", help="save a chart, as PNG or SVG")
    options = parser.parse_args(argv)
    usual = QUICK if options.quick else CUDA_CASES if options.device == "cuda" else CASES
    others = [cases for cases in (options.linear, options.sparse, options.small) if cases is not None]
    if options.map is not None and (options.case or others):
        parser.error("--map: expected alone, got another table beside it")
    only = bool(others) or options.map is not None
    options.case = options.case or ([] if only else usual)
    if options.linear == []:
        options.linear = [QUICK_HEAD if options.quick else HEAD]
    if options.sparse == []:
        options.sparse = SPARSE_HEADS
    if options.small == []:
        options.small = [Small((32, 27))]
    if options.map == []:
        options.map = CELLS
    options.groups = [[case] for case in options.case + (options.linear or []) + (options.sparse or [])]
    options.groups += [[Small(case.shape, case.ignored, option) for option in OPTIONS] for case in options.small or []]
    options.groups += [options.map] * bool(options.map)
    options.dtype = options.dtype or (["float32"] if options.quick or options.map else ["float32", "bfloat16"])
    options.rounds = options.rounds or (5 if options.quick else 15)
    options.threads = options.threads or [torch.get_num_threads()]
    if reason := refusal(options.device, options.json, options.png):
        parser.error(reason)
    return options


def run(options: argparse.Namespace, console: Console, rows: list[Row]) -> None:
    """Measures into `rows`, which so holds what is done whenever this is interrupted."""
    for group in options.groups:
        for dtype in options.dtype:
            start = len(rows)
            try:
                for case in group:
                    console.print(f"{case} {dtype}: checking, then timing ...")  # a spinner would disturb it
                    rows.extend(measure(case, dtype, options))
            finally:
                if rows[start:]:
                    show(console, rows[start:], grid.table if options.map else None)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = parse(argv)
    console = Console(highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in machine(options.device).items() if value))
    rows: list[Row] = []
    code = 0
    try:
        run(options, console, rows)
    except KeyboardInterrupt:
        console.print("interrupted")
        code = 130
    if options.json:
        save(options.json, rows, vars(options))
    if options.png:
        (grid.chart if options.map else chart)(options.png, rows)
    bad = [row for row in rows if row.status in ("wrong", "failed")]
    for row in bad:
        print(f"bench.py: {row.contender} on {row.case} {row.dtype}: {row.status}: {row.note}", file=sys.stderr)
    return code or int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
