"""The check that .github/docs/build.py makes before it builds, on what there is and on what it must not let through."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from oracle import torch_has_linear

import xent

spec = importlib.util.spec_from_file_location("docs_build", Path(__file__).parents[2] / ".github" / "docs" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


@torch_has_linear  # the pages refer to it
@pytest.mark.parametrize("name", build.MODULES)
def test_every_public_name_is_fit_for_the_reference(name: str) -> None:
    if name != "xent":
        pytest.importorskip("transformers")
    module = importlib.import_module(name)
    assert build.public(module)
    assert list(build.problems(module)) == []


def test_all_public_names_are_looked_at() -> None:
    assert set(build.public(xent)) == set(xent.__all__) - {"__version__"}


GOOD = """The loss of `(N, C)` logits, see :func:`xent.cross_entropy`, :class:`torch.nn.Linear` and :func:`neighbour`.

With :math:`x`.

Args:
    input: the logits.

Returns:
    A number.

Example:
    >>> 1
    1
"""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("", "", None),
        ("`(N, C)`", "some", "lacks shapes"),
        (":math:`x`", "`x`", "lacks a formula"),
        ("Args:", "Shapes:", "lacks Args"),
        ("Returns:", "Yields:", "lacks Returns"),
        (">>> 1", "1", "lacks an example"),
        ("xent.cross_entropy", "xent.cross_entropi", "xent.cross_entropi: leads nowhere"),
        ("torch.nn.Linear", "torch.nn.Linnear", "torch.nn.Linnear: leads nowhere"),
        ("`neighbour`", "`neighbor`", "neighbor: leads nowhere"),
    ],
)
def test_what_is_complained_about(old: str, new: str, complaint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("made_up")
    monkeypatch.setitem(sys.modules, "made_up", module)

    def neighbour() -> None: ...

    neighbour.__module__ = "made_up"
    neighbour.__doc__ = GOOD.replace(old, new) if old else GOOD
    module.neighbour = neighbour
    found = list(build.problems(module))
    assert found == ([] if complaint is None else found[:1])
    assert complaint is None or complaint in found[0]
