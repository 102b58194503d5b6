"""For the whole suite: shapes and types checked at run time, and every backend that this machine has."""

from __future__ import annotations

import gc
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: each has a core, and so have those that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import interpreter
import jaxtyping
import pytest
import torch
import torch.distributed as dist
from beartype import BeartypeConf, beartype
from ranks import Ranks, threads

# What the import hook puts on every function of xent. The numeric tower: an int will do where a float is asked for.
typed = beartype(conf=BeartypeConf(is_pep484_tower=True))

# All that is public or a primitive. Not the Functions and records, which torch's compiler must be able to read.
CHECKED = [
    f"xent.{name}"
    for name in (
        "functional",
        "linear",
        "modules",
        "_inputs.options",
        "_rows.dispatch",
        "_backends",
    )
]

with jaxtyping.install_import_hook(CHECKED, "conftest.typed"):
    from xent._rows import dispatch as _primitives

interpreter.round_to_nearest()
interpreter.do_once()


def backends() -> list[str]:
    """The backends to test: the one that XENT_BACKEND asks for, whether it is there or not, or else all that can."""
    if _primitives.FORCED_BACKEND:
        return [_primitives.FORCED_BACKEND]
    modules = {name: _primitives.load(name) for name in _primitives.BACKENDS}
    rows = torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64)
    return [name for name, module in modules.items() if not isinstance(module, str) and not module.refusal(*rows)]


EVERY_BACKEND = backends()  # before `backend` asks for one of them


@pytest.fixture(params=EVERY_BACKEND)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once on each backend. One that was asked for and is missing fails the test, with its reason."""
    module = _primitives.load(request.param)
    assert not isinstance(module, str), f"XENT_BACKEND={request.param}: {module}"
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def every_backend() -> list[str]:
    """Their names, for a test that gives all of them to one process."""
    return EVERY_BACKEND


def kernels() -> list[str]:
    """The backends, and of the compiled one each instruction set that this machine has."""
    native = _primitives.load("native")
    sets = [] if isinstance(native, str) else [f"native {name}" for name in native._native.instruction_sets()]
    return [kernel for name in EVERY_BACKEND for kernel in ((name == "native" and sets) or [name])]


@pytest.fixture(params=kernels())
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test once on each backend and instruction set."""
    name, _, instructions = request.param.partition(" ")
    module = _primitives.load(name)
    assert not isinstance(module, str), f"XENT_BACKEND={name}: {module}"
    monkeypatch.setattr(_primitives, "FORCED_BACKEND", name)
    before = module._native.use(instructions) if instructions else None
    yield request.param
    if before:
        module._native.use(before)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """xent as its users have it: without the run-time checks, which would meet bad input before xent's own do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes on gloo, for all tests that need some. What those leave behind must not grow with them."""
    processes = Ranks(4)
    yield processes
    counts = processes.run(threads, 4)
    processes.stop()
    assert max(counts) < 200, f"threads of the ranks: {counts}; a mesh or a group was made and not destroyed"


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of one, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest is not the last one, for which a worker would be waited for."""
    items.sort(key=lambda item: item.path.name != "test_tracers.py")


def pytest_collection_finish() -> None:
    """What was imported is no garbage, and need not be looked through each time that some is collected."""
    gc.collect()
    gc.freeze()
