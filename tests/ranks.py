"""Real processes on gloo: started once, and then given one function after the other to run together.

A test hands over a function of the module that it is in, and plain arguments; each rank calls it with its group first.
"""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

START = "forkserver" if sys.platform == "linux" else "spawn"  # torch is imported once, and not by each process
ABSENT = "not one of the ranks"
TIMEOUT = 120.0  # seconds until a call that hangs is an error; this machine may be busy with something else


class RankError(AssertionError):
    """What went wrong on which ranks."""


class Ranks:
    """`world` processes; `run` gives a function to the first few of them."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.start()

    def start(self) -> None:
        """Start the processes, which find each other by a file."""
        context = multiprocessing.get_context(START)
        if START == "forkserver":
            context.set_forkserver_preload(["pytest", "torch.distributed.tensor"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world, str(Path(self.folder.name) / "store"), theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(
        self,
        function: Callable[..., Any],
        count: int,
        *args: Any,
        fresh: float | None = None,
        timeout: float = TIMEOUT,
        may_die: bool = False,
        **options: Any,
    ) -> Any:
        """`function(group, *args, **options)` on a group of the first `count` ranks: what each returned, in a list.

        `fresh` is the timeout in seconds of a group of their own, for those who break it or need one that has seen
        nothing yet; it is destroyed in the end.
        """
        for pipe in self.pipes:
            pipe.send((function, count, fresh, args, options))
        count = len(self.pipes)
        results: dict[int, Any] = {}
        while len(results) < count:
            waiting = [rank for rank in range(count) if rank not in results]
            ready = wait([self.pipes[rank] for rank in waiting], timeout)
            if not ready:
                self.stop()
                self.start()  # others, which answer the next test
                raise RankError(f"ranks {waiting} did not answer within {timeout:.0f} s")
            for rank in waiting:
                if self.pipes[rank] in ready:
                    try:
                        results[rank] = self.pipes[rank].recv()
                    except (EOFError, ConnectionResetError):
                        results[rank] = (may_die, None)
        failed = [f"rank {rank}: {results[rank][1]}" for rank in range(count) if not results[rank][0]]
        if failed:
            raise RankError("\n".join(failed))
        answers = [results[rank][1] for rank in range(count)]
        return [answer for answer in answers if not (isinstance(answer, str) and answer == ABSENT)]

    def stop(self) -> None:
        """End the processes, those that hang as well."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def threads(group: dist.ProcessGroup) -> int:
    """How many threads this process has; each group of gloo keeps some for itself."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0


@functools.cache
def mesh_of(group: dist.ProcessGroup, dims: int) -> DeviceMesh:
    """A mesh over the group, or, of two dimensions, over all four ranks. Made once: its groups keep threads."""
    if dims == 1:
        return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("data",))
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    groups = {count: dist.new_group(list(range(count))) for count in range(1, world + 1)}
    while True:
        try:
            function, count, fresh, args, options = pipe.recv()
        except EOFError:
            os._exit(0)  # at once: to take gloo's threads down takes seconds, or for ever
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated")  # see pyproject.toml
        try:
            group, own = groups[count], None
            if fresh is not None:
                group = own = dist.new_group(list(range(count)), timeout=datetime.timedelta(seconds=fresh))
            try:
                answer = (True, function(group, *args, **options) if rank < count else ABSENT)
            finally:
                if own is not None and rank < count:
                    dist.destroy_process_group(own)
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
