"""How fast, how lean and how exact: `xent.cross_entropy` beside the other ways to compute it, on this machine.

    python benchmarks/bench.py --quick
    python benchmarks/bench.py --device cuda --json gpu.json
    python benchmarks/bench.py --case 4x256x50257 2x128x128256:0.7 --dtype float32 --threads 1 2 --json out.json

First each contender is checked against float64 (loss, and gradient row by row); then forward + backward are timed,
interleaved, on the same values. The columns: the median time; that time over the time of F.cross_entropy; the bytes
that any loss must move, over the time (loss.py has the count); the peak memory beyond the logits, in units of the
logits, the gradient being 1 of it (memory.py); the largest relative error, of the loss or of a row of the gradient.
On a GPU also the share of what a warm copy of the logits moves; the clock is the device's, and its L2 is cold.

Exit code: 0; 1 if a contender computed something wrong (it is named and not timed) or xent failed; 2 for bad
options; 130 after Ctrl-C, with everything measured so far reported and saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cli
import linear
import loss
import torch
from cli import natural, picture, refusal
from contenders import CONTENDERS
from report import Row, chart, machine, memory_chart, save, show
from rich.console import Console


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, completed and checked."""
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="two cases, float32, few rounds: within a minute")
    add("--list", action="store_true", help="name the cases and the contenders, and end")
    add("--case", nargs="+", type=loss.Case.parse, metavar="SHAPE[:IGNORED]", help="default: see --list")
    shape = linear.Shape.parse
    add("--linear", nargs="*", type=shape, metavar="NxDxC", help="the linear section; default: 2048x768x50257")
    add("--dtype", nargs="+", choices=list(loss.TOLERANCE), help="default: float32 bfloat16")
    add("--threads", nargs="+", type=natural, help="default: torch's own choice")
    add("--rounds", type=natural, help="timings of each contender; their median counts; default: 15")
    add("--no-memory", dest="memory", action="store_false", help="do not measure the peak memory")
    add("--json", type=Path, metavar="FILE", help="save machine, versions and all figures")
    add("--png", type=picture, metavar="FILE", help="save a chart, as PNG or SVG")
    options = parser.parse_args(argv)
    if options.linear is not None and options.quick:
        parser.error("--quick has no linear section")
    usual = loss.CUDA_CASES if options.device == "cuda" else loss.CASES
    cases = loss.QUICK if options.quick else usual
    options.case = options.case or ([] if options.linear is not None else cases)
    options.linear = [linear.DEFAULT] if options.linear == [] else options.linear or []
    options.dtype = options.dtype or (["float32"] if options.quick else ["float32", "bfloat16"])
    options.rounds = options.rounds or (5 if options.quick else 15)
    options.threads = options.threads or [torch.get_num_threads()]
    if reason := refusal(options.device, options.json, options.png):
        parser.error(reason)
    return options


def listing(console: Console) -> None:
    """What --list shows."""
    console.print("cases:", *map(str, loss.CASES), "or any other: classes last, and :0.7 to ignore 70 % of the targets")
    console.print("cases on a GPU:", *map(str, loss.CUDA_CASES))
    console.print("contenders:", "; ".join(contender.name for contender in CONTENDERS))


def run(options: argparse.Namespace, console: Console, rows: list[Row]) -> None:
    """Measures into `rows`, which so holds what is done whenever this is interrupted."""
    for case in options.case:
        for dtype in options.dtype:
            start = len(rows)
            console.print(f"\n{case} {dtype}: checking, then timing ...")  # a spinner would disturb it
            for row in loss.measure(case, dtype, options.device, options.threads, options.rounds, options.memory):
                rows.append(row)
            show(console, rows[start:])
    for shape in options.linear:
        for dtype in options.dtype:
            start = len(rows)
            console.print(f"\nlinear {shape} {dtype}: checking, then timing ...")
            for threads in options.threads:
                measured = linear.measure(shape, dtype, options.device, threads, options.rounds, options.memory)
                rows.extend(measured)
            show(console, rows[start:])


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = parse(argv)
    console = Console(highlight=False)
    if options.list:
        listing(console)
        return 0
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
    if options.png and options.case:
        chart(options.png, rows)
    elif options.png:
        shape, dtype = options.linear[0], options.dtype[0]
        title = f"{shape.D} features, {shape.C} classes, {dtype}"
        memory_chart(options.png, title, *linear.memory_curves(shape, dtype, options.threads[0]))
    bad = [row for row in rows if row.status in ("wrong", "failed")]
    for row in bad:
        print(f"bench.py: {row.contender} on {row.case} {row.dtype}: {row.status}: {row.note}", file=sys.stderr)
    return code or int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
