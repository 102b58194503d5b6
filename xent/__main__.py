"""`python -m xent`: which versions and backends this machine has and, for each that it lacks, why."""

import platform

import torch

from . import __version__, _primitives


def main() -> None:
    """Print one line for each version and backend."""
    print(f"xent {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name in _primitives.NAMES:
        module = _primitives.load(name)
        print(f"  {name:8} {'missing: ' + module if isinstance(module, str) else 'available: ' + module.ABOUT}")
    if _primitives.FORCED:
        print(f"  XENT_BACKEND={_primitives.FORCED} forces one")


if __name__ == "__main__":
    main()
