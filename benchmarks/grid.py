"""The map of bench.py: N rows by C classes, and images, each cell F.cross_entropy's time over xent's.

A cell is written NxC, or NxCxHxW for an image, then perhaps a variant: 8x21x256x256:channels_last; or BxTxV for
sequences whose last position has no target, logits[:, :-1]. The time is that of forward + backward, the gradient fresh.
A ratio above 1 says how many times as fast xent is; below 1 it is slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import Case
from common import Row, empty_table, figure_style, number
from contenders import IGNORE, Contender, Loss, flat
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import xent

ROWS = [10**k for k in range(7)]
CLASSES = [2, 10, 32, 100, 1000, 8192, 50257, 262144]
LARGEST = 2**25  # logits of a cell: their check in float64 takes some ten times their memory
TIMED = 2**26  # logits in all rounds of a cell, but for three: large cells vary less, and the whole map takes minutes
VARIANTS = ("", "channels_last", "weight", "smoothing", "probabilities", "none", "inplace")
IMAGES = [
    *(f"8x21x256x256{':' * bool(variant)}{variant}" for variant in ("", "channels_last", "weight", "smoothing")),
    *("4x150x128x128", "2x19x512x1024", "16x2x256x256"),
]


@dataclass(frozen=True)
class Cell(Case):
    """Logits (N, C), (B, T, V) or (N, C, H, W), and a variant. "weight" also ignores a fifth of the targets."""

    variant: str = ""

    section = "map"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Raises ValueError for text of any other form."""
        size, _, variant = text.partition(":")
        shape = tuple(int(n) for n in size.split("x"))
        image = len(shape) == 4
        if len(shape) not in (2, 3, 4) or min(shape) < 1 or shape[1] < 2:
            raise ValueError(text)
        if variant not in VARIANTS or (variant == "channels_last" and not image) or text.endswith(":"):
            raise ValueError(text)
        if len(shape) == 3 and variant not in ("", "inplace"):
            raise ValueError(text)
        return cls(shape, 0.2 if variant == "weight" else 0.0, variant)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return "x".join(map(str, self.shape)) + f":{self.variant}" * bool(self.variant)

    def contenders(self) -> dict[str, Contender]:
        """As a user calls them: xent chooses the backend."""
        ours = partial(xent.cross_entropy, dim=self.dim, inplace_backward=self.variant == "inplace", **self.options())
        losses = {"F.cross_entropy": self.truth(), "xent": cut(ours) if self.dim == 2 else ours}
        return {name: Contender(lambda loss=loss: loss) for name, loss in losses.items()}  # type: ignore[misc]

    def truth(self) -> Loss:
        """What is right, given float64."""
        return cut(flat(F.cross_entropy)) if self.dim == 2 else partial(F.cross_entropy, **self.options())

    @property
    def dim(self) -> int:
        """Of the classes."""
        return 2 if len(self.shape) == 3 else 1

    def options(self) -> dict[str, Any]:
        """Both losses'. The weight is an input."""
        known: dict[str, dict[str, Any]] = {"smoothing": {"label_smoothing": 0.1}, "none": {"reduction": "none"}}
        return known.get(self.variant, {})

    def inputs(self, dtype: str, device: str) -> list[Tensor]:
        """Standard normal logits, a leaf; uniform targets, of which the first one always counts; perhaps a weight."""
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        logits = torch.empty(self.shape, dtype=kind, device=device).normal_()
        if self.variant == "channels_last":
            logits = logits.contiguous(memory_format=torch.channels_last)
        if self.variant == "probabilities":
            return [logits.requires_grad_(), torch.empty_like(logits).normal_().softmax(1)]
        shape = [size for dim, size in enumerate(self.shape) if dim != self.dim]
        target = torch.randint(self.shape[self.dim], shape, device=device)
        others = target.view(-1)[1:]
        others[torch.rand(others.shape, device=device) < self.ignored] = IGNORE
        weight = [(torch.rand(self.shape[1], device=device) + 0.5).to(kind)] * (self.variant == "weight")
        return [logits.requires_grad_(), target, *weight]

    def parts(self, found: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The loss; of the gradient the targets' entries, and the rest, each as a whole.

        Not row by row: of two classes, one with nearly all the probability, both gradients are differences of
        nearly equal numbers, and no float32 has their digits.
        """
        loss, grad = (t.detach().double() for t in found)
        if inputs[1].is_floating_point():
            return [loss.reshape(1, -1), grad.reshape(1, -1)]
        at = inputs[1].clamp(min=0).unsqueeze(self.dim)
        return [t.reshape(1, -1) for t in (loss, grad.gather(self.dim, at), grad.scatter(self.dim, at, 0))]

    def rounds(self, asked: int) -> int:
        """Fewer of a large cell."""
        return min(asked, max(3, TIMED // math.prod(self.shape)))

    def bytes_moved(self, *_: object) -> None:
        """The ratio counts, not the bytes."""

    def peak(self, *_: object) -> list[float]:
        """Nothing to tell."""
        return []


def cut(loss: Loss) -> Loss:
    """Of sequences without their last position."""
    return lambda logits, target: loss(logits[:, :-1], target[:, :-1])


CELLS = [Cell((N, C)) for N in ROWS for C in CLASSES if N * C <= LARGEST] + list(map(Cell.parse, IMAGES))


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """F.cross_entropy's time over xent's, by cell, of the cells where both are right."""
    return {row.case: 1 / row.ratio for row in rows if row.contender == "xent" and row.ratio}


def table(rows: Sequence[Row]) -> Table:
    """A line for each cell, dtype and number of threads. Where xent is slower it says so."""
    result = empty_table(
        f"map on {rows[0].device}: forward + backward, ms", ["logits", "dtype", "threads", "F", "xent", "F / xent", ""]
    )
    for base, ours in zip(rows[::2], rows[1::2], strict=True):
        ratio = 1 / ours.ratio if ours.ratio else None
        cells = [ours.dtype, str(ours.threads), number(base.ms, ".4g"), number(ours.ms, ".4g"), number(ratio, ".2f")]
        result.add_row(ours.case, *cells, "slower" if ratio and ratio < 1 else "")
    return result


def chart(path: Path, rows: Sequence[Row]) -> None:
    """N by C as colours, all other cells below: green where xent is faster, red where slower, its ratio written in."""
    plt = figure_style()
    found = ratios(rows)
    cells = {text: Cell.parse(text) for text in found}
    plane = {cell.shape: found[text] for text, cell in cells.items() if len(cell.shape) == 2 and not cell.variant}
    others = {text: found[text] for text, cell in cells.items() if len(cell.shape) > 2 or cell.variant}
    heights = [max(len({N for N, _ in plane}), 1), max(len(others), 1)]
    size = (8, 0.42 * sum(heights) + 1.8)
    figure, (top, low) = plt.subplots(2, 1, figsize=size, layout="constrained", height_ratios=heights)
    Ns, Cs = sorted({N for N, _ in plane}), sorted({C for _, C in plane})
    paint(top, [[plane.get((N, C)) for C in Cs] for N in Ns])
    top.set_xticks(range(len(Cs)), [f"{C:,}" for C in Cs])
    top.set_yticks(range(len(Ns)), [f"{N:,}" for N in Ns])
    slower = sum(ratio < 1 for ratio in found.values())
    top.set(xlabel="classes", ylabel="rows")
    top.set_title(
        f"time of F.cross_entropy / time of xent, {rows[0].dtype}, {rows[0].device}, threads: {rows[0].threads}\n"
        f"median {median(found.values()) if found else 0:.1f}; xent is slower in {slower} of {len(found)}",
        loc="left", fontsize=9,
    )  # fmt: skip
    paint(low, [[ratio] for ratio in others.values()])
    low.set_xticks([])
    low.set_yticks(range(len(others)), [text.replace("x", " x ").replace(":", ", ") for text in others])
    figure.savefig(path, dpi=150, transparent=True)
    plt.close(figure)


def paint(ax: Any, lines: Sequence[Sequence[float | None]]) -> None:
    """A square for each ratio, on a logarithmic scale around 1; nothing where none was measured."""
    from matplotlib.colors import LogNorm

    if not lines:
        return
    values = [[float("nan") if ratio is None else ratio for ratio in line] for line in lines]
    ax.imshow(values, cmap="RdYlGn", norm=LogNorm(0.25, 4), aspect="auto")
    for i, line in enumerate(lines):
        for j, ratio in enumerate(line):
            if ratio is not None:
                text = f"{ratio:.2f}" + "\nslower" * (ratio < 1)
                color = "black" if 0.35 < ratio < 2.8 else "white"  # the ends of the scale are dark
                ax.text(j, i, text, ha="center", va="center", color=color, fontsize=8, linespacing=1)
