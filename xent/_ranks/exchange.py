"""How the ranks of a group share their numbers: one all-gather, which also finds out whether they agree.

Each rank sends one message, a header and its vectors, and reads those of all the others:

    header    whether this rank failed; how long its message is; how many classes it holds; which ones it took them to
              be (the first one, and how many there are in all); words that say what was called, or what went wrong
    vectors   what `compute` made of its classes

The messages of a gather must be of equal length, or the transport hangs or aborts. So nothing that one rank believes
decides a length: it is agreed, as the longest message of the last gathers, which every rank has seen. A rank that
fails, or whose shapes do not fit, sends a message of that length like everybody else, and all ranks read in it what
went wrong and raise the same error.

Two guesses can fail. A message was longer than agreed; or a rank holds other classes than it thought, for lack of
knowing how many the others hold (the first call with uneven shards). Then the gather is repeated, by all ranks, since
all have read the same headers; and from then on they know.

So every call reads the headers, although off the CPU the host waits for the device to do so, once in forward. A rank
cannot leave it out on the ground that a call like this one has gone well: what it sees, its own part, may be alike
where the others hold other parts than before, as with two heads of (3, 3) and (3, 4) classes. It would use the wrong
sizes, and leave the others alone in the gather that they repeat. Only a message can tell it, and that is the header.
"""

from __future__ import annotations

import functools
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import _torch

NUMBERS, TEXT = 5, 35  # of the header, in words of 8 bytes
HEADER = NUMBERS + TEXT
LEAST = 1024  # words: no message is shorter, and the first one is no longer
MEMORY = 64  # gathers whose longest message is the length of the next
PATIENCE = 5.0  # seconds to wait for the other ranks' reports, once the transport has failed
ERRORS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)
ALONE = nullcontext()
Compute = Callable[[int, int], list[Tensor]]


class Header(NamedTuple):
    """What a rank says of itself."""

    code: int  #     0, or 1 + the index in ERRORS of what it raised
    need: int  #     words of its message
    classes: int  #  held here; -1 where the rank failed before it knew
    start: int  #    the first class, as it took it to be
    total: int  #    the number of all classes, as it took it to be
    text: str  #     what was called, or what went wrong

    def words(self) -> list[int]:
        """As HEADER integers."""
        text = self.text.encode()[: 8 * TEXT].ljust(8 * TEXT, b"\0")
        return [self.code, self.need, self.classes, self.start, self.total, *array("q", text)]

    @classmethod
    def read(cls, words: list[int]) -> Header:
        """The inverse of `words`."""
        code, need, classes, start, total, *text = words
        letters = array("q", text).tobytes().rstrip(b"\0")
        return cls(code, need, classes, start, total, letters.decode(errors="ignore"))


class GroupState:
    """What the ranks of a group have in common: made from what all have read, and so the same on each of them."""

    def __init__(self) -> None:
        self.count = 0  # of gathers
        self.lengths: deque[int] = deque(maxlen=MEMORY)  # what the longest message of each took
        self.sizes: dict[int, tuple[int, ...]] = {}  # classes on each rank, by the number of those held here


_agreed: WeakKeyDictionary[ProcessGroup, GroupState] = WeakKeyDictionary()


def exchange(
    group: ProcessGroup, classes: int, note: str, device: torch.device, compute: Compute
) -> tuple[Tensor, tuple[int, ...]]:
    """All ranks' vectors, (R, numbers of one rank), and how many classes each rank holds.

    `compute(start, total)` makes the vectors of the `classes` held here, which begin with number `start` of `total`.
    `note` says what was called, in words that must be the same on all ranks.

    Raises, on every rank: what any rank raised in `compute`; ValueError where the notes differ; RuntimeError where the
    transport fails. Each names the ranks.
    """
    agreed = _agreed.setdefault(group, GroupState())
    R, rank = group.size(), group.rank()
    sizes = agreed.sizes.get(classes) or (classes,) * R
    guess = (sum(sizes[:rank]), sum(sizes))
    vectors, failure = _attempt(compute, *guess)
    while True:
        need = HEADER + sum(vector.numel() for vector in vectors)
        code, text = (0, note) if failure is None else _said(failure)
        own = Header(code, need, classes, *guess, text)
        length = max([LEAST, *agreed.lengths])
        gathered = _gather(group, agreed, own, _message(own, vectors, length, device))
        headers = [Header.read(row) for row in gathered[:, :HEADER].contiguous().view(torch.int64).tolist()]
        needed = max(header.need for header in headers)
        agreed.lengths.append(needed)
        if any(header.classes < 0 for header in headers):
            _raise_failure(headers, failure)
        _check_notes(headers)
        sizes = agreed.sizes[classes] = tuple(header.classes for header in headers)
        places = [(sum(sizes[:r]), sum(sizes)) for r in range(R)]
        if [(header.start, header.total) for header in headers] != places:
            if guess != places[rank]:
                guess = places[rank]
                vectors, failure = _attempt(compute, *guess)
            continue
        if any(header.code for header in headers):
            _raise_failure(headers, failure)
        if needed > length:
            continue
        return gathered[:, HEADER:need], sizes


def report_failure_to_ranks(group: ProcessGroup | None, input: object) -> AbstractContextManager[None]:
    """A rank that fails in this context takes part in the exchange all the same, which raises its error everywhere."""
    return ALONE if group is None or torch.compiler.is_compiling() else _report_failure(group, input)


@contextmanager
def _report_failure(group: ProcessGroup, input: object) -> Iterator[None]:
    if not isinstance(group, ProcessGroup):
        kind = type(group).__name__
        raise TypeError(f"group: expected None or a ProcessGroup of which this process is a rank, got {kind}")
    try:
        yield
    except Exception as error:
        device = input.device if isinstance(input, Tensor) else torch.device("cpu")
        exchange(group, -1, "", device, functools.partial(_fail, error))


def _fail(error: Exception, start: int, total: int) -> NoReturn:
    raise error


def _attempt(compute: Compute, start: int, total: int) -> tuple[list[Tensor], Exception | None]:
    try:
        return compute(start, total), None
    except Exception as error:  # whatever it is, the other ranks are waiting
        return [], error


def _message(own: Header, vectors: list[Tensor], length: int, device: torch.device) -> Tensor:
    """Exactly as long as agreed: filled up with zeros, or nothing but the header where the vectors do not fit."""
    parts = [torch.tensor(own.words(), device=device).view(torch.float64)]
    if own.need <= length:
        parts += vectors
    used = sum(part.numel() for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(length - used)])


def _gather(group: ProcessGroup, agreed: GroupState, own: Header, message: Tensor) -> Tensor:
    """(R, length): the messages of all ranks, by the functional collective, in one call."""
    agreed.count += 1
    collectives = torch.ops._c10d_functional
    try:
        gathered = collectives.all_gather_into_tensor(message, group.size(), group.group_name)
        gathered = collectives.wait_tensor(gathered)
    except RuntimeError as error:
        raise RuntimeError(_report(group, agreed.count, own, error)) from error
    return gathered.view(group.size(), -1)  # type: ignore[no-any-return]


def _said(failure: Exception) -> tuple[int, str]:
    """The code of its kind, and its words: a kind that has no code is among them."""
    if type(failure) in ERRORS:
        return 1 + ERRORS.index(type(failure)), str(failure)
    return 1, f"{type(failure).__name__}: {failure}"


def _raise_failure(headers: list[Header], failure: Exception | None) -> NoReturn:
    """The same error on every rank: the first one's, and all whose it is."""
    first = next(header for header in headers if header.code)
    same = [r for r, header in enumerate(headers) if (header.code, header.text) == (first.code, first.text)]
    raise ERRORS[first.code - 1](f"{_ranks(same)} of {len(headers)}: {first.text}") from failure


def _check_notes(headers: list[Header]) -> None:
    """The ranks that did not fail were called with the same words."""
    called = {r: header.text for r, header in enumerate(headers) if not header.code}
    if len(set(called.values())) > 1:
        texts = dict.fromkeys(called.values())
        each = [f"{_ranks([r for r in called if called[r] == text])} with {text}" for text in texts]
        raise ValueError(f"group: expected the same call on all {len(headers)} ranks, got {'; '.join(each)}")


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _report(group: ProcessGroup, count: int, own: Header, error: Exception) -> str:
    """Why the transport failed. Whoever finds that it did leaves a note in the group's store and looks for the others'.

    Not before: a step that goes well never touches the store. A rank without a note never came here, or is dead.
    """
    R, rank = group.size(), group.rank()
    about = f"group: the all-gather of rank {rank} of {R} failed ({error})"
    keys = [f"xent/{group.group_name}/{count}/{r}" for r in range(R)]
    try:
        store = _torch.store(group)
        store.set(keys[rank], own.text)
        end = time.monotonic() + PATIENCE
        silent = list(range(R))
        while silent and time.monotonic() < end:
            silent = [r for r in silent if not store.check([keys[r]])]
            time.sleep(0.05)
        calls = {r: store.get(keys[r]).decode(errors="ignore") for r in range(R) if r not in silent}
    except Exception as lost:
        return f"{about}; the group's store cannot be reached either ({lost})"
    if silent:
        return f"{about}: {_ranks(silent)} did not take part in exchange {count}, where this rank has {own.text}"
    each = "; ".join(f"rank {r} with {text}" for r, text in calls.items())
    return f"{about}, in exchange {count}: {each}"
