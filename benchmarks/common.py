"""What goes in and what comes out, for all scripts: command lines, the machine's name, tables and pictures."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import xent

GREY, XENT, OTHER = "#808080", "#2a9d8f", "#9aa5b1"


def parser(about: str | None) -> argparse.ArgumentParser:
    """With a script's docstring as its help: the first line above the options, the rest below them."""
    first, _, rest = (about or "").partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=form)
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    return result


def natural(text: str) -> int:
    """An argparse type: 1, 2, 3, ..."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def picture(text: str) -> Path:
    """An argparse type: a file that matplotlib is to write."""
    if not text.endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in .png or .svg")
    return Path(text)


def refusal(device: str, *results: Path | None) -> str | None:
    """Why a run would fail only at its end, or at once: results that cannot be written, a device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no CUDA device here"
    for file in filter(None, results):
        folder = file.absolute().parent
        if file.is_dir():
            return f"{file}: is a directory"
        if not folder.is_dir():
            return f"{folder}: no such directory"
        if not os.access(file if file.exists() else folder, os.W_OK):
            return f"{file}: cannot be written"
    return None


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or not a processor that says so
    try:
        triton = version("triton") if device == "cuda" else None
    except PackageNotFoundError:
        triton = None
    return {
        "cpu": cpu,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "xent": xent.__version__,
    }


def figure_style() -> Any:
    """matplotlib's pyplot, set for pictures in mid-tones on no background: to be read on light pages and on dark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"text.color": GREY, "xtick.color": GREY, "ytick.color": GREY, "font.size": 9})
    plt.rcParams.update({"axes.labelcolor": GREY, "axes.edgecolor": GREY})
    plt.rcParams["svg.hashsalt"] = "xent"  # the same ids each time
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return plt


# What bench.py measured.

MEMORY = {
    "loss": ["memory"],
    "linear": ["MiB", "MiB, 8 N"],
    "sparse": [],
    "small": [],
    "map": [],
}  # names in `Row.memory`


@dataclass
class Row:
    """One contender on one case with one number of threads. None: not measured, and `note` may say why."""

    section: str
    case: str
    dtype: str
    device: str
    contender: str
    threads: int
    ms: float | None = None  #        median of forward + backward
    ratio: float | None = None  #     ms over the ms of the case's first contender, same threads
    gb_per_s: float | None = None  #  useful bytes (see cases.py) over time
    of_copy: float | None = None  #   gb_per_s over that of a warm copy of the logits
    memory: list[float] = field(default_factory=list)  # peak, in logits or MiB (see cases.py)
    error: float | None = None  #     largest relative error against float64
    status: str = "ok"  #             or "unavailable", "failed", "wrong"
    note: str = ""


def number(value: float | None, form: str) -> str:
    """As text; nothing for None."""
    return "" if value is None else format(value, form)


def empty_table(title: str, heads: Sequence[str]) -> Table:
    """The first column holds names, the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=i > 0)
    return table


def title(row: Row, scaled: bool = False) -> str:
    """Of a table or a panel: what its rows have in common."""
    return f"{row.section} {row.case} {row.dtype} on {row.device}" + ("" if scaled else f", threads: {row.threads}")


def table(rows: Sequence[Row]) -> Table:
    """One case in one dtype: a line for each contender and number of threads that was timed."""
    first, scaled = rows[0], len({row.threads for row in rows}) > 1
    speed = ["GB/s"] * (first.section == "loss") + ["of copy"] * (first.section == "loss" and first.device == "cuda")
    peaks = MEMORY[first.section]
    heads = ["forward + backward", "ms", "ratio", *speed, *peaks, "error", *["threads", "speed-up"] * scaled]
    result = empty_table(title(first, scaled), heads)
    for row in rows:
        if row.status != "ok":
            continue
        memory = [number(peak, ".0f" if first.section == "linear" else ".2f") for peak in row.memory]
        cells = [number(row.ms, ".4g"), number(row.ratio, ".2f")]
        cells += [number(row.gb_per_s, ".1f"), number(row.of_copy, ".0%")][: len(speed)]
        cells += [*memory, *[""] * (len(peaks) - len(memory)), number(row.error, ".0e")]
        if scaled:
            one = next(r for r in rows if r.contender == row.contender)  # with the first number of threads
            cells += [str(row.threads), f"{one.ms / row.ms:.2f}" if one.ms and row.ms else ""]
        result.add_row(row.contender, *cells, style="bold" if row.contender.startswith("xent") else None)
    return result


def comparison(rows: Sequence[Row]) -> Table:
    """A line for each case and number of threads: everybody's time, and its ratio to the first one's."""
    names = list(dict.fromkeys(row.contender for row in rows))
    title = f"{rows[0].section} {rows[0].dtype} on {rows[0].device}: ms, and the ratio to {names[0]}"
    heads = [head for name in names[1:] for head in (name, "ratio")]
    result = empty_table(title, ["forward + backward", "threads", names[0], *heads])
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.case, row.threads), []).append(row)
    for (case, threads), line in lines.items():
        cells = [cell for row in line for cell in (number(row.ms, ".4g"), number(row.ratio, ".2f"))]
        result.add_row(case, str(threads), cells[0], *cells[2:])  # the first one's own ratio is 1
    return result


def show(console: Console, rows: Sequence[Row], form: Callable[[Sequence[Row]], Table] | None = None) -> None:
    """The table, of one case or of several or of this form, and below it what is not in it and why."""
    form = form or (comparison if len({row.case for row in rows}) > 1 else table)
    console.print(form(rows))
    notes: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(f"{row.status}: {row.note}", {})[row.contender] = None  # a set that keeps the order
    for note, contenders in notes.items():
        console.print(f"  {'; '.join(contenders)}: {note}", style="dim", markup=False, soft_wrap=True)


def save(path: Path, rows: Sequence[Row], options: dict[str, Any]) -> None:
    """Everything, as JSON: machine, options, rows."""
    content = {"machine": machine(options["device"]), "options": options, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def chart(path: Path, rows: Sequence[Row]) -> None:
    """A panel for each case: time over that of the first contender, with the peak memory written beside it."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.ratio is not None:
            panels.setdefault(title(row), []).append(row)
    plt = figure_style()
    counts = [len(panel) for panel in panels.values()] or [1]
    size = (8, 0.26 * sum(counts) + 0.8 * len(counts))
    figure, axes = plt.subplots(len(counts), 1, figsize=size, squeeze=False, layout="constrained", height_ratios=counts)
    for ax, (name, panel) in zip(axes[:, 0], panels.items(), strict=False):
        panel = panel[::-1]
        colors = [XENT if row.contender.startswith("xent") else OTHER for row in panel]
        bars = ax.barh([row.contender for row in panel], [row.ratio or 0 for row in panel], color=colors)
        units = ["{:.1f} logits"] if panel[0].section == "loss" else ["{:.0f} MiB", "{:.0f} for 8 N"]
        peaks = [[unit.format(peak) for unit, peak in zip(units, row.memory, strict=False)] for row in panel]
        notes = [", ".join([f"{row.ms:.4g} ms", *peak]) for row, peak in zip(panel, peaks, strict=True)]
        ax.bar_label(bars, notes, padding=3, color=GREY)
        ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        ax.set_title(name, loc="left", fontsize=9)
        ax.margins(x=0.6)
        ax.set_xlabel(f"time of forward + backward / that of {panel[-1].contender}: shorter is better")
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)
