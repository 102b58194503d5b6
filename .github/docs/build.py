"""The site, built from these pages and the docstrings; and the check that the docstrings are fit for it.

    pip install -e '.[docs]' && python .github/docs/build.py        # writes build/docs, which is not committed

Fails on any warning of mkdocs (a link or an anchor that leads nowhere, a page that is in no menu), on a cross-reference
of a docstring that leads nowhere, and on a public name whose docstring lacks a formula, shapes, Args, Returns or an
example.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

MODULES = ("xent", "xent.integrations.transformers")
NEEDED = {
    "shapes": r"`\(((\w+|\.\.\.),? ?)+\)`",
    "a formula": r":math:|\.\. math::",
    "Args": r"^ *Args:\n",
    "Returns": r"^ *Returns:\n",
    "an example": r"^ *Example:\n(.|\n)+>>> ",
}
ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")


def public(module: ModuleType) -> dict[str, object]:
    """What a module offers: its `__all__`, or what it defines itself without an underscore."""
    if hasattr(module, "__all__"):
        names = [name for name in module.__all__ if not name.startswith("_")]
    else:
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        names = [name for name in own if not name.startswith("_") and callable(getattr(module, name))]
    return {name: getattr(module, name) for name in names}


def resolves(reference: str, module: ModuleType) -> bool:
    """Whether a dotted name leads to something, from the top or from the module that it stands in."""
    parts = reference.split(".")
    for start in range(len(parts), -1, -1):
        if start:
            try:
                found: object = importlib.import_module(".".join(parts[:start]))
            except ImportError:
                continue
        else:
            found = module
        for part in parts[start:]:
            found = getattr(found, part, None)
        if found is not None:
            return True
    return False


def problems(module: ModuleType) -> Iterator[str]:
    """Everything that is wrong with a module's docstrings, one line each."""
    for name, value in public(module).items():
        where, text = f"{module.__name__}.{name}", inspect.getdoc(value) or ""
        for what, pattern in NEEDED.items():
            if what == "Returns" and isinstance(value, type):
                continue  # a class
            if not re.search(pattern, text, re.MULTILINE):
                yield f"{where}: its docstring lacks {what}"
        home = sys.modules[getattr(value, "__module__", module.__name__)]
        texts = [text]
        if isinstance(value, type):
            texts += [inspect.getdoc(member) or "" for key, member in vars(value).items() if not key.startswith("_")]
        for reference in ROLE.findall("\n".join(texts)):
            if not resolves(reference, home):
                yield f"{where}: :{reference}: leads nowhere"


def main() -> int:
    """Check, then build."""
    found = [line for name in MODULES for line in problems(importlib.import_module(name))]
    for line in found:
        print(line, file=sys.stderr)
    if found:
        return 1
    config = str(Path(__file__).parents[1] / "mkdocs.yml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config]
    return subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode  # an advertisement


if __name__ == "__main__":
    sys.exit(main())
