"""Train a small U-Net to colour shapes with `xent.cross_entropy`, and watch it match `F.cross_entropy` step by step.

    python benchmarks/segment.py --quick               both losses side by side, in seconds
    python benchmarks/segment.py --steps 300 --size 128 --out masks.png

The images are generated: discs, squares and stripes of random place and size on noise, each pixel with the class of
the shape on top; a border of two pixels around each image is ignored. A second model begins from the same weights,
sees the same images and differs in nothing but the loss function, so that the two curves may differ by rounding only.
In the quick run they may differ by a relative 5e-5, which leaves room for what training makes of rounding; longer
runs amplify it, and have no tolerance unless one is given. The picture shows the curves, and
for four new images what there is and what either model sees. The time of the loss is that of its forward pass and of
its gradient in the logits, without the network.

Exit code: 0; 1 if the curves differ by more than --tolerance; 2 for bad options.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import common
import torch
from common import XENT, figure_style, natural, picture, refusal
from contenders import IGNORE
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from train import differences

import xent

Loss = Callable[[Tensor, Tensor], Tensor]
CLASSES = 4  # nothing, disc, square, stripe
BORDER = 2
TOLERANCE = 5e-5  # see the docstring above


def scenes(count: int, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, size, size) and the class of each pixel; the brightness alone does not tell the class."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.randn(count, 1, size, size, generator=draw) * 0.3
    target = torch.zeros(count, size, size, dtype=torch.int64)
    for image, classes in zip(images, target, strict=True):
        for kind in range(1, CLASSES):
            row, column, radius, light = torch.rand(4, generator=draw).tolist()
            dy, dx, r = y - row * size, x - column * size, size * (0.1 + 0.12 * radius)
            inside = [dx**2 + dy**2 < r**2, torch.maximum(dx.abs(), dy.abs()) < r, dy.abs() < r / 4][kind - 1]
            image[0, inside] += 1 + light
            classes[inside] = kind
    for edge in (slice(BORDER), slice(-BORDER, None)):
        target[:, edge] = target[:, :, edge] = IGNORE
    return images, target


def block(before: int, after: int) -> nn.Sequential:
    """Two convolutions."""
    layers = [nn.Conv2d(n, after, 3, padding=1) for n in (before, after)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())


class UNet(nn.Module):
    """Down twice and up again; what was seen on the way down is seen again on the way up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList([block(n, m) for n, m in zip([1, *widths], widths, strict=False)])
        self.up = nn.ModuleList([block(n + m, m) for n, m in ((widths[2], widths[1]), (widths[1], widths[0]))])
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C, H, W) of images (N, 1, H, W), H and W multiples of 4."""
        seen = []
        for level, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if level else x)
            seen.append(x)
        for up, past in zip(self.up, seen[-2::-1], strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2), past], 1))
        return self.head(x)  # type: ignore[no-any-return]


class Learner:
    """A model, its optimizer and its loss function, with the record of its steps."""

    def __init__(self, name: str, loss: Loss, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)  # every learner begins from the same weights
        self.name, self.loss = name, loss
        self.model = UNet(options.width).to(options.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), options.lr, momentum=0.9)
        self.losses: list[float] = []
        self.seconds: list[float] = []  # of the loss alone

    def step(self, images: Tensor, target: Tensor) -> None:
        """One step of training."""
        logits = self.model(images)
        cut = logits.detach().requires_grad_()
        start = time.perf_counter()
        loss = self.loss(cut, target)
        (gradient,) = torch.autograd.grad(loss, cut)
        self.losses.append(loss.item())  # item() waits for the device
        self.seconds.append(time.perf_counter() - start)
        self.optimizer.zero_grad()
        logits.backward(gradient)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def masks(self, images: Tensor) -> Tensor:
        """The class of each pixel."""
        return self.model(images).argmax(1)  # type: ignore[no-any-return]


def plot(path: Path, learners: Sequence[Learner], images: Tensor, target: Tensor) -> None:
    """The curves, and below them the images, what there is, and what each learner sees."""
    plt = figure_style()
    lines = [("image", images[:, 0]), ("classes", target), *((one.name, one.masks(images)) for one in learners)]
    figure = plt.figure(figsize=(8, 9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 2.6])
    curve = above.subplots()
    looks = [{"color": XENT, "linewidth": 3}, {"color": "#e76f51", "linewidth": 1, "linestyle": "--"}]
    for learner, look in zip(learners, looks, strict=True):
        curve.plot(learner.losses, label=learner.name, **look)
    curve.set(xlabel="step", ylabel="training loss, nats per pixel")
    curve.legend(frameon=False)
    axes = below.subplots(len(lines), len(images), squeeze=False)
    for row, (name, pictures) in zip(axes, lines, strict=True):
        row[0].set_ylabel(name)
        for ax, pixels in zip(row, pictures.cpu(), strict=True):
            looks_of = {"cmap": "gray"} if name == "image" else {"cmap": "viridis", "vmin": 0, "vmax": CLASSES - 1}
            shown = pixels if name == "image" else pixels.double().masked_fill(pixels == IGNORE, torch.nan)
            ax.imshow(shown.numpy(), **looks_of)
            ax.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100, transparent=True)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, completed and checked."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="30 steps on images of 32 x 32, with --tolerance 5e-5")
    add("--out", type=picture, metavar="FILE", default=Path("segment.png"), help="default: segment.png")
    add("--tolerance", type=float, help="largest relative difference of the losses; with --quick 5e-5")
    add("--steps", type=natural, help="default: 200")
    add("--size", type=natural, help="of an image, a multiple of 4; default: 64")
    add("--batch", type=natural, default=8, help="default: 8")
    add("--width", type=natural, default=8, help="channels of the first level; default: 8")
    add("--lr", type=float, default=0.05, help="of SGD with momentum; default: 0.05")
    add("--seed", type=int, default=0, help="of weights and images; default: 0")
    options = parser.parse_args(argv)
    if options.quick and options.tolerance is None:
        options.tolerance = TOLERANCE
    options.steps = options.steps or (30 if options.quick else 200)
    options.size = options.size or (32 if options.quick else 64)
    if options.size % 4 or options.size <= 2 * BORDER:
        parser.error(f"--size: expected a multiple of 4 above {2 * BORDER}, got {options.size}")
    if reason := refusal(options.device, options.out):
        parser.error(reason)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = parse(argv)
    console = Console(highlight=False)
    learners = [Learner("xent", xent.cross_entropy, options), Learner("F.cross_entropy", F.cross_entropy, options)]
    draw = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        images, target = (t.to(options.device) for t in scenes(options.batch, options.size, draw))
        for learner in learners[:: 1 if step % 2 else -1]:  # nobody is always the first
            learner.step(images, target)
    images, target = (t.to(options.device) for t in scenes(4, options.size, draw))
    table = common.empty_table("", ["loss", "ms of the loss", "first", "last", "pixels right"])
    for one in learners:
        right = (one.masks(images) == target)[target != IGNORE].double().mean().item()
        cells = [f"{median(one.seconds) * 1e3:.3f}", f"{one.losses[0]:.4f}", f"{one.losses[-1]:.4f}", f"{right:.1%}"]
        table.add_row(one.name, *cells)
    console.print(table)
    worst = max(differences(learners[0].losses, learners[1].losses))
    console.print(f"largest relative difference of the losses in {options.steps} steps: {worst:.1e}")
    plot(options.out, learners, images, target)
    console.print(f"curves and masks: {options.out}", soft_wrap=True)
    if options.tolerance is None or worst <= options.tolerance:
        return 0
    print(f"segment.py: the losses differ: expected at most {options.tolerance:.0e}, got {worst:.1e}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
