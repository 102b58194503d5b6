"""`python -m xent`: which versions and backends this machine has and, for each that it lacks, why."""

import platform

import torch

from . import __version__
from ._rows import dispatch


def main() -> None:
    """Print one line for each version and backend."""
    print(f"xent {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name in dispatch.BACKENDS:
        module = dispatch.load(name)
        print(f"  {name:8} {'missing: ' + module if isinstance(module, str) else 'available: ' + module.ABOUT}")
    if dispatch.FORCED_BACKEND:
        print(f"  XENT_BACKEND={dispatch.FORCED_BACKEND} forces one")


if __name__ == "__main__":
    main()
