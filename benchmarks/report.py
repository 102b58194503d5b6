"""What bench.py shows of its rows: a table on screen, a JSON file, a chart."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import xent

GREY, XENT, OTHER = "#808080", "#2a9d8f", "#9aa5b1"
Status = Literal["ok", "unavailable", "failed", "wrong"]


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
    ratio: float | None = None  #     ms over the ms of F.cross_entropy (of three products), same case and threads
    gb_per_s: float | None = None  #  useful bytes (see the section's file) over time
    of_copy: float | None = None  #   gb_per_s over that of a warm copy of the logits
    memory: float | None = None  #    peak beyond the logits, in units of the logits; the gradient is 1 of it
    extra_mib: list[float] | None = None  # linear section: memory beyond the gradients, for N and for 8 N rows
    error: float | None = None  #     largest relative error against float64
    status: Status = "ok"
    note: str = ""


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or not a processor that says so
    return {
        "cpu": cpu,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version() if device == "cuda" else None,
        "xent": xent.__version__,
    }


def triton_version() -> str | None:
    """Of what is installed, imported or not."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(rows: Sequence[Row]) -> Table:
    """One case in one dtype: a line for each contender and number of threads that was timed."""
    first = rows[0]
    scaled = len({row.threads for row in rows}) > 1
    title = f"{first.section} {first.case} {first.dtype} on {first.device}"
    result = Table(
        title=title if scaled else f"{title}, threads: {first.threads}",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    result.add_column("forward + backward")
    is_linear, cuda = first.section == "linear", first.device == "cuda"
    measures = ["MiB", "MiB, 8 N"] if is_linear else ["GB/s"] + ["of copy"] * cuda + ["memory"]
    for head in ["ms", "ratio", *measures, "error"] + ["threads", "speed-up"] * scaled:
        result.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        if row.status != "ok":
            continue
        cells = [_number(row.ms, ".4g"), _number(row.ratio, ".2f")]
        if is_linear:
            cells += [_number(mib, ".0f") for mib in row.extra_mib or (None, None)]
        else:
            cells += [_number(row.gb_per_s, ".1f"), *[_number(row.of_copy, ".0%")] * cuda, _number(row.memory, ".2f")]
        cells.append(_number(row.error, ".0e"))
        if scaled:
            one = next(r for r in rows if r.contender == row.contender)  # with the first number of threads
            cells += [str(row.threads), f"{one.ms / row.ms:.2f}" if one.ms and row.ms else ""]
        result.add_row(row.contender, *cells, style="bold" if row.contender.startswith("xent") else None)
    return result


def show(console: Console, rows: Sequence[Row]) -> None:
    """The table, and below it what is not in it and why."""
    console.print(table(rows))
    notes: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(f"{row.status}: {row.note}", {})[row.contender] = None  # a set that keeps the order
    for note, contenders in notes.items():
        console.print(f"  {'; '.join(contenders)}: {note}", style="dim", markup=False, soft_wrap=True)


def save(path: Path, rows: Sequence[Row], options: dict[str, Any]) -> None:
    """Everything, as JSON: machine, options, rows."""
    device = rows[0].device if rows else "cpu"
    content = {"machine": machine(device), "options": options, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


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


def memory_chart(path: Path, title: str, rows: Sequence[int], curves: dict[str, list[float]]) -> None:
    """Memory beyond the gradients against the number of rows, a line for each contender."""
    plt = figure_style()
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, curve in curves.items():
        color = XENT if name.startswith("xent") else GREY
        ax.plot(rows, curve, color=color, marker="o", markersize=3)
        ax.annotate(name, (rows[-1], curve[-1]), (5, 0), textcoords="offset points", color=color, va="center")
    ax.set(xscale="log", yscale="log", xticks=rows, xlabel="rows", ylabel="MiB beyond the gradients", title=title)
    ax.set_xticklabels([str(n) for n in rows])
    ax.minorticks_off()
    ax.margins(x=0.35)
    figure.savefig(path, transparent=True, dpi=120)


def chart(path: Path, rows: Sequence[Row]) -> None:
    """A panel for each case: time over that of F.cross_entropy, with the peak memory written beside it."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.ratio is not None:
            title = f"{row.section} {row.case} {row.dtype} on {row.device}, threads: {row.threads}"
            panels.setdefault(title, []).append(row)
    plt = figure_style()
    counts = [len(panel) for panel in panels.values()] or [1]
    size = (8, 0.26 * sum(counts) + 0.8 * len(counts))
    figure, axes = plt.subplots(len(counts), 1, figsize=size, squeeze=False, layout="constrained", height_ratios=counts)
    for ax, (title, panel) in zip(axes[:, 0], panels.items(), strict=False):
        panel = panel[::-1]
        colors = [XENT if row.contender.startswith("xent") else OTHER for row in panel]
        bars = ax.barh([row.contender for row in panel], [row.ratio or 0 for row in panel], color=colors)
        notes = [f"{row.ms:.3g} ms" + ("" if row.memory is None else f", {row.memory:.1f} logits") for row in panel]
        ax.bar_label(bars, notes, padding=3, color=GREY)
        ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        ax.set_title(title, loc="left", fontsize=9)
        ax.margins(x=0.25)
    axes[-1, 0].set_xlabel("time of forward + backward / time of F.cross_entropy: shorter is better")
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)
