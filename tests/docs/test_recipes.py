"""The recipes of .github/docs/recipes.md, run as they stand there, against the textbook forms and their gradients."""

from __future__ import annotations

import doctest
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.nn import functional as F

import xent

PAGE = Path(__file__).parents[2] / ".github" / "docs" / "recipes.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
B, T, V = 4, 6, 11
IGNORED = (slice(1), slice(2))


def code(section: str) -> str:
    """The statements of a section, without prompts."""
    blocks = "".join(re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL))
    return doctest.script_from_examples(blocks)


def run(section: str, replace: dict[str, str] | None = None, **names: object) -> dict[str, object]:
    """A section run with our tensors in the place of its own; a replacement that finds nothing is an error."""
    text = code(section)
    for old, new in (replace or {}).items():
        assert old in text, f"{section} no longer says {old}"
        text = text.replace(old, new)
    found: dict[str, object] = {"torch": torch, "xent": xent, "B": B, "T": T, "V": V, **names}
    exec(text, found)
    return found


def problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = (2 * torch.randn(B, T, V, dtype=torch.float64)).requires_grad_()
    target = torch.randint(V, (B, T))
    target[IGNORED] = -100
    return logits, target, (target != -100).sum()


def textbook(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target), all log p, and where they count, in torch's own operations."""
    counts = target != -100
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0][counts], log_p, counts


def same(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(expected, inputs, retain_graph=True)
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients), "a gradient to compare"
    torch.testing.assert_close(torch.autograd.grad(found, inputs, retain_graph=True), gradients, rtol=1e-8, atol=1e-10)


def focal(log_p: Tensor, *_: Tensor) -> Tensor:
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def poly1(log_p: Tensor, *_: Tensor) -> Tensor:
    return (-log_p + (1 - log_p.exp())).mean()


def bonus(log_p: Tensor, all_log_p: Tensor, counts: Tensor) -> Tensor:
    entropy = -(all_log_p.exp() * all_log_p).sum(-1)[counts]
    return (-log_p - 0.01 * entropy).mean()


@pytest.mark.parametrize(
    ("section", "name", "formula"),
    [("Focal loss", "focal", focal), ("Poly-1", "poly1", poly1), ("Entropy bonus", "loss", bonus)],
)
def test_terms_of_a_token(section: str, name: str, formula: Callable[..., Tensor]) -> None:
    logits, target, count = problem()
    found = run(section, logits=logits, target=target, count=count)[name]
    same(found, formula(*textbook(logits, target)), logits)


def test_distillation() -> None:
    logits, _, _ = problem()
    names = run("Distillation", {"torch.randn(B, T, V)": "torch.randn(B, T, V, dtype=torch.float64)"}, logits=logits)
    teacher, t = names["teacher"], names["t"]
    divergence = F.kl_div((logits / t).log_softmax(-1), teacher, reduction="none").sum(-1).mean() * t**2
    entropy = -(teacher * teacher.log()).sum(-1).mean() * t**2
    same(names["soft"], divergence + entropy, logits)


def test_distillation_from_the_best_classes() -> None:
    logits, _, _ = problem()
    section = "Distillation from a teacher's best classes"
    names = run(section, {"torch.randn(B, T, V)": "torch.randn(B, T, V, dtype=torch.float64)"}, logits=logits)
    teacher, log_p = names["teacher"], logits.log_softmax(-1)
    q = torch.where(teacher >= names["q"].min(-1, keepdim=True).values, teacher, 0)
    same(names["top_k"], -(q * log_p).sum(-1).mean(), logits)
    tail = torch.where(q > 0, 0, log_p.exp()).sum(-1).log()
    same(names["with_tail"], -((q * log_p).sum(-1) + (1 - q.sum(-1)) * tail).mean(), logits)
    same(names["warm"], -(q * (logits / 2).log_softmax(-1)).sum(-1).mean() * 4, logits)
    head = {"8, requires_grad=True": "8, dtype=torch.float64, requires_grad=True"}
    names = run(section, head, logits=logits)
    hidden, weight, best = names["hidden"], names["weight"], names["best"]
    picked = (hidden @ weight.T).log_softmax(-1).gather(-1, best)
    same(names["of_head"], -(names["q"] * picked).sum(-1).mean(), hidden, weight)


def test_generalised_jsd() -> None:
    logits, _, _ = problem()
    double = {"torch.randn(B, T, V)": "torch.randn(B, T, V, dtype=torch.float64)", "beta = 0.5": "beta = 0.3"}
    names = run("Generalised Jensen-Shannon divergence", double, logits=logits)
    best, q = names["best"], names["q"]
    others = torch.ones_like(logits).scatter(-1, best, 0)
    p = logits.softmax(-1)
    student = torch.cat([p.gather(-1, best), (p * others).sum(-1, keepdim=True)], -1)
    teacher = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    mixture = 0.3 * teacher + 0.7 * student
    divergences = [(a * (a / mixture).log()).sum(-1).mean() for a in (teacher, student)]
    same(names["jsd"], 0.3 * divergences[0] + 0.7 * divergences[1], logits)


def test_multiple_choice() -> None:
    replace = {"8, requires_grad=True": "8, dtype=torch.float64, requires_grad=True", "[0, 3]": "[0, 3, 1, 2]"}
    names = run("Multiple choice", replace)
    hidden, weight, answers, right = (names[name] for name in ("hidden", "weight", "answers", "right"))
    logits = hidden @ weight.T
    same(names["scores"][:, 1].sum(), logits.log_softmax(-1).gather(-1, answers)[:, 1].sum(), hidden, weight)
    among = logits.gather(-1, answers)
    same(names["choice"], F.cross_entropy(among, right), hidden, weight)
    assert names["correct"] == (among.argmax(-1) == right).sum()


def test_mixup_and_cutmix() -> None:
    logits, target, _ = problem()
    target, double = target.clamp(min=0), torch.float64
    replace = {"torch.tensor([1 - share, share])": "shares", "torch.tensor([0.25, 0.0])": "areas"}
    areas = torch.tensor([0.25, 0.0, 0.5, 0.9], dtype=double)
    given = {"shares": torch.tensor([0.7, 0.3], dtype=double), "areas": areas}
    found = run("Mixup and CutMix", replace, logits=logits, target=target, **given)
    both = [F.cross_entropy(logits.movedim(-1, 1), y, reduction="none").mean(1) for y in (target, target.flip(0))]
    same(found["mixed"], (0.7 * both[0] + 0.3 * both[1]).mean(), logits)
    same(found["cut"], ((1 - areas) * both[0] + areas * both[1]).mean(), logits)


def test_z_loss() -> None:
    logits, target, count = problem()
    found = run("z-loss", logits=logits, target=target, count=count)["with_z"]
    lse = logits.logsumexp(-1)[target != -100]
    same(found, F.cross_entropy(logits.movedim(-1, 1), target) + 1e-4 * (lse**2).mean(), logits)


def test_dpo() -> None:
    logits, target, _ = problem()
    reference = torch.randn(B, dtype=torch.float64)
    found = run("DPO", {"torch.zeros(B)": "given"}, given=reference, logits=logits, target=target)["dpo"]
    answer = torch.stack([textbook(x, y)[0].sum() for x, y in zip(logits, target, strict=True)]) - reference
    margins = torch.stack([answer[i] - answer[i + B // 2] for i in range(B // 2)])
    same(found, -(1 / (1 + (-0.1 * margins).exp())).log().mean(), logits)


def test_grpo() -> None:
    """With ratios on both sides of both clips."""
    _, target, count = problem()
    hidden = torch.randn(B, T, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 8, dtype=torch.float64, requires_grad=True)
    old, reference = torch.randn(2, B, T, dtype=torch.float64)
    log_p = (hidden @ weight.T).log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    old, reference = log_p.detach() + 0.3 * old, log_p.detach() + 0.5 * reference
    advantage = torch.tensor([1.0, -1.0, 2.0, -0.5], dtype=torch.float64)[:, None]
    replace = {
        "hidden, weight = torch.randn(B, T, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)\n": "",
        "new.detach(), new.detach() - 0.1": "given",
        "torch.tensor([1.0, -1.0])[:, None]": "advantages",
    }
    names = {"hidden": hidden, "weight": weight, "target": target, "count": count}
    found = run("GRPO", replace, given=(old, reference), advantages=advantage, **names)["grpo"]

    ratio = log_p.exp() / old.exp()
    assert (ratio > 1.2).any()
    assert (ratio < 0.8).any()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    penalty = reference.exp() / log_p.exp() - (reference - log_p) - 1
    same(found, (0.04 * penalty - gain)[target != -100].mean(), hidden, weight)


def test_perplexity_is_that_of_all_tokens() -> None:
    logits, target, _ = problem()
    batches = [(logits[:1], target[:1]), (logits[1:], target[1:])]
    setup = code("Perplexity of a data set").splitlines()[0] + "\n"
    found = run("Perplexity of a data set", {setup: ""}, batches=batches)["perplexity"]
    rows = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    expected = rows[target.flatten() != -100].mean().exp()
    same(found, expected, logits)
    means = torch.stack([F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in batches]).mean().exp()
    assert abs(means - expected) > 1e-2, "the mean of means is another number"


def test_accumulation_is_one_big_batch() -> None:
    logits, target, _ = problem()
    parts = [x.detach() for x in (logits[:1], logits[1:])]
    run(
        "Gradient accumulation and data parallel",
        batches=list(zip(parts, (target[:1], target[1:]), strict=True)),
        logits=logits,
        target=target,
    )
    (expected,) = torch.autograd.grad(F.cross_entropy(logits.movedim(-1, 1), target), logits)
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), expected, rtol=1e-9, atol=1e-12)


def worker(rank: int, store: str) -> None:
    """One of two ranks with unequal numbers of tokens, through DDP itself."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    _, target, _ = problem()
    torch.manual_seed(1)
    hidden, layer = torch.randn(B, T, 5, dtype=torch.float64), torch.nn.Linear(5, V).double()
    expected = torch.autograd.grad(F.cross_entropy(layer(hidden).movedim(-1, 1), target), list(layer.parameters()))
    mine = slice(1) if rank == 0 else slice(1, None)
    model = torch.nn.parallel.DistributedDataParallel(layer)  # alive until backward: it does the reduction
    logits, target = model(hidden[mine]), target[mine]
    text = code("Gradient accumulation and data parallel")
    tokens = (target != -100).sum()
    names = {"torch": torch, "xent": xent, "logits": logits, "target": target, "tokens": tokens}
    exec(text[text.index("world_size = 1") :], names)
    names["loss"].backward()
    found = [parameter.grad for parameter in layer.parameters()]
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-12)
    torch.distributed.barrier()
    os._exit(0)  # at once: gloo sometimes aborts a process while it takes its threads down


def test_data_parallel_is_one_big_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"),), nprocs=2)


def test_instruction_tuning() -> None:
    hidden = torch.randn(2, T, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 8, dtype=torch.float64, requires_grad=True)
    names = run("Masked instruction tuning", {"(B, T)": "(2, T)"}, hidden=hidden, weight=weight)
    labels = names["labels"]
    assert [(row != -100).sum() for row in labels] == [T - 4, T - 2]
    logits = (hidden @ weight.T)[:, :-1]
    same(names["loss"], F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()), hidden, weight)


def test_segmentation() -> None:
    names = run("Class-balanced segmentation", {"torch.randn(2, 4, 8, 8": "torch.randn(2, 4, 8, 8, dtype=torch.double"})
    image, mask = names["image"], names["mask"]
    counts = [(mask == c).sum() for c in range(4)]
    weight = torch.stack([(1 - 0.999) / (1 - 0.999**n) for n in counts])
    log_p = image.log_softmax(1)
    inside = mask != 255
    w = weight[mask[inside]]
    picked = log_p.movedim(1, -1)[inside].gather(-1, mask[inside][:, None])[:, 0]
    found, expected = names["loss"], -(w * picked).sum() / w.sum()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    pair = [torch.autograd.grad(loss, image)[0] for loss in (found, expected)]
    torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-9)


def test_every_recipe_is_tested() -> None:
    """A new section needs a test here, which names it."""
    here = Path(__file__).read_text(encoding="utf-8")
    for section in SECTIONS:
        assert f'"{section}"' in here or section.startswith("Lightning"), section
