"""What others compute stays as it is: no setting of the process is touched, on any path, at any time."""

from __future__ import annotations

import ast
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import xent

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PACKAGE = Path(xent.__file__).parent
PRECISIONS = ("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "cudnn", "cudnn.conv", "cuda.matmul")


def getters() -> dict[str, Callable[[], Any]]:
    """Whatever torch says of itself: torch.get_*() and torch.is_*() without an argument, and its backends' switches."""
    found: dict[str, Callable[[], Any]] = {"environ": lambda: dict(os.environ), "filters": lambda: [*warnings.filters]}
    for name in dir(torch):
        if re.match(r"(get|is|are)_(?!rng_state|autocast_(gpu|ipu|xla|cpu))", name):
            function = getattr(torch, name)
            try:
                function()
            except (TypeError, ValueError, RuntimeError, AssertionError):
                continue  # it asks for an argument
            found[name] = function
    found["random numbers"] = lambda: torch.get_rng_state().tolist()
    for name in ("", *PRECISIONS):
        owner = torch.backends
        for part in name.split(".") if name else ():
            owner = getattr(owner, part, None)  # type: ignore[assignment]
        for setting in ("fp32_precision", "enabled", "deterministic", "benchmark"):
            if hasattr(owner, setting):
                found[f"{name}.{setting}"] = lambda owner=owner, setting=setting: getattr(owner, setting)  # type: ignore[misc]
    return found


def settings() -> dict[str, Any]:
    return {name: read(get) for name, get in GETTERS.items()}


def read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError as error:  # so do some, where others contradict them
        return str(error)


GETTERS = getters()


def head(function: Callable[..., Any], h: Tensor, W: Tensor, y: Tensor, **options: Any) -> Any:
    return function(h, W, y, max_bytes=40_000, **options)  # several blocks


def loss(function: Callable[..., Any], h: Tensor, W: Tensor, y: Tensor, **options: Any) -> Any:
    return function(h @ W.t(), y, **options)


STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear mean": lambda h, W, y: head(xent.linear_cross_entropy, h, W, y),
    "linear none": lambda h, W, y: head(xent.linear_cross_entropy, h, W, y, reduction="none").sum(),
    "linear stats": lambda h, W, y: sum(map(Tensor.sum, head(xent.linear_token_stats, h, W, y, entropy=True)[:3])),
    "mean": lambda h, W, y: loss(xent.cross_entropy, h, W, y),
    "in place": lambda h, W, y: loss(xent.cross_entropy, h, W, y, inplace_backward=True, label_smoothing=0.1),
    "stats": lambda h, W, y: loss(xent.token_stats, h, W, y).log_prob.sum(),
}


def test_the_settings_are_read() -> None:
    """None of those that a loss could be tempted to set is lost among them."""
    expected = {"get_num_threads", "get_default_dtype", "get_float32_matmul_precision", "is_grad_enabled", "environ"}
    expected |= {"are_deterministic_algorithms_enabled", "mkldnn.enabled", "cudnn.benchmark"}
    if hasattr(torch.backends, "fp32_precision"):  # since torch 2.9
        expected |= {".fp32_precision", "mkldnn.fp32_precision", "mkldnn.matmul.fp32_precision"}
    assert expected <= GETTERS.keys()


def test_no_setting_of_the_process_is_touched(backend: str) -> None:
    """Read all the time by this thread, whose float32 products keep their bits, while one per dtype takes steps."""
    x = torch.randn(48, 48, generator=torch.Generator().manual_seed(1))
    before, product, errors = settings(), x @ x, []

    def steps(dtype: torch.dtype) -> None:
        mine = settings()  # some are this thread's own
        try:
            generator = torch.Generator().manual_seed(0)
            h, W = (torch.randn(n, 64, generator=generator).to(dtype).requires_grad_() for n in (64, 500))
            y = torch.randint(500, (64,), generator=generator)
            for step in STEPS.values():
                for _ in range(3):
                    step(h, W, y).backward()
            assert settings() == mine
        except BaseException as error:  # the other thread reports it
            errors.append(error)

    threads = [threading.Thread(target=steps, args=(dtype,)) for dtype in DTYPES]
    for thread in threads:
        thread.start()
    changed, rounded = set(), 0
    while any(thread.is_alive() for thread in threads):
        changed |= {(name, str(now)) for name, now in settings().items() if now != before[name]}
        rounded += not (x @ x).equal(product)
    for thread in threads:
        thread.join()
    assert not changed
    assert not rounded, "float32 products of this thread, meanwhile"
    assert not errors
    assert settings() == before


# ------------------------------------------------------------------------------------------------ from the source

SETTERS = re.compile(
    r"torch\.(.+\.)?(set_\w+|use_deterministic_algorithms|(manual_)?seed(_all)?)"
    r"|torch\.backends\..*flags|torch\.(random|mps|xpu|cuda)\.fork_rng"
    r"|os\.(environ\.(update|pop|popitem|clear|setdefault|__setitem__)|putenv|unsetenv|chdir|umask)"
    r"|warnings\.(filterwarnings|simplefilter|resetwarnings)|random\.seed|sys\.set\w+|signal\.signal|locale\.setlocale"
)
OWNERS = ("torch", "os", "sys", "warnings")


def full_names(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Each name with its attributes and subscripts as `module.attribute`, whatever it was imported as."""
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                origins[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            origins |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def name(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return origins.get(node.id, "")
        if isinstance(node, ast.Attribute):
            return f"{owner}.{node.attr}" if (owner := name(node.value)) else ""
        return name(node.value) if isinstance(node, ast.Subscript) else ""

    return ((node, name(node)) for node in ast.walk(tree))


def settings_of(source: str) -> list[str]:
    """What this code sets of torch's or the process's: attributes, items, and by the functions that are for it."""
    found = []
    tree = ast.parse(source)
    for node, name in full_names(tree):
        if SETTERS.fullmatch(name):
            found.append(name)
        written = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        if written and isinstance(node, ast.Attribute | ast.Subscript) and name.split(".")[0] in OWNERS:
            found.append(name)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            found += [] if ast.unparse(node.args[0]) == "self" else [ast.unparse(node)]
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_source_sets_nothing(file: Path) -> None:
    assert settings_of(file.read_text(encoding="utf-8")) == []


def test_the_native_source_sets_nothing() -> None:
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.h")]
    sources += [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.cpp")]
    assert sources
    assert not re.findall(r"setenv|_set_num_threads|fesetround|_MM_SET\w+|_mm_setcsr|setlocale", "\n".join(sources))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "from torch.backends import mkldnn as m\nm.matmul.fp32_precision = 'bf16'",
        "import torch\nwith torch.backends.mkldnn.flags(enabled=False): pass",
        "from torch import set_num_threads\nset_num_threads(1)",
        "import torch\ndef f(): torch.set_float32_matmul_precision('medium')",
        "import os\nos.environ['OMP_NUM_THREADS'] = '1'",
        "from os import environ\nenviron.setdefault('A', 'b')",
        "import torch, contextlib\nsetattr(torch.backends.mkldnn.matmul, 'fp32_precision', 'bf16')",
        "import warnings\nwarnings.simplefilter('ignore')",
    ],
)
def test_the_search_sees(code: str) -> None:
    assert settings_of(code)
